#!/usr/bin/env python3
"""Give every student of a class a Jupyter Notebook server of their own, on one host.

    sudo notebooks.py COMMAND [config file]

setup     makes an account with a home and passwords for each student of the list
send      copies the course's material into each account, over what is there
launch    starts the notebook servers and the web page that leads to them
shutdown  ends the students' notebook servers, kernels and terminals
retrieve  copies what the students made into the owner's storage
remove    deletes the accounts that setup made, with their homes

The course is described by an INI file (`notebooks.cfg`) and by a CSV file of students
(`students.csv`). There is no other state: the CSV file is the user database, passwd and
group say which accounts exist and which are ours (by a mark in their GECOS field), the
process table and the listening sockets say what runs.

`launch` consists of these processes:

launcher   root     binds all ports, has servers started, watches them; it waits on
                    sockets and never reads from the network
template   root     has imported Jupyter once; forks one notebook server per request and
                    never sees a password or anything else of a student's
webserver  nobody   the landing page on the base port
server     student  one Jupyter Notebook server per student, on a port of its own

Template and webserver are this script, executed afresh with the end of a socket pair;
each ends when the other end is gone. SIGHUP has the launcher read configuration and
list again; `setup` and `remove` send it. Whatever happens in a student's home, from
`send` to a server's log file, is done with that student's ids, and root follows no path
there; what a student could hold up is done by a worker, one process for each student,
that is given up when it gives no sign of life.
"""

import argparse
import asyncio
import base64
import codecs
import collections
import configparser
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import grp
import hashlib
import html
import importlib
import importlib.util
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import pickle
import pwd
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn, TypeVar

try:
    import pexpect
    import psutil
    import setproctitle
    from pexpect import fdpexpect
except ImportError as missing:
    print(
        f"notebooks.py: {sys.executable} lacks {missing.name}; run the notebooks.py"
        " that `sudo make install` puts into /usr/local/bin",
        file=sys.stderr,
    )
    sys.exit(2)

__version__ = "1.0.0"

log = logging.getLogger("notebooks")

Result = TypeVar("Result")

# -------------------------------------------------------------------------------------
# Constants
# -------------------------------------------------------------------------------------

# The GECOS subfield "other" of the accounts that setup made: only root can change it
# (chfn(1)), so it is the mark by which `remove` knows what it may delete.
MARK = "notebooks.py"
USERNAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")  # 32: LOGIN_NAME_MAX of utmp(5)
# Letters and digits that cannot be taken for one another on paper.
PASSWORD_ALPHABET = "".join(set(string.ascii_letters + string.digits) - set("0O1lI"))
MAX_PASSWORD_LENGTH = 200  # what chpasswd(8) surely takes

# Programs of the system's: where they are looked for, and those without which setup and
# remove do not begin.
PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNT_PROGRAMS = (
    *("useradd", "usermod", "userdel", "groupadd", "groupdel", "gpasswd", "chpasswd"),
    *("find", "rm", "ipcrm"),
)
# Where every user may have files, and System V objects (sysvipc(7), ipcrm(1)).
PUBLIC_DIRS = (
    *("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock"),
    *("/var/spool/cron/atjobs", "/var/crash"),
)
IPC_KINDS = {"shm": "--shmem-id", "msg": "--queue-id", "sem": "--semaphore-id"}

# Copying.
MAX_ENTRIES = 100_000  # of a directory of a student's that is tidied up
MAX_DEPTH = 100  # directories; each level of a copy holds three descriptors
ENTRY_BYTES = 4096  # what any file or directory counts for: it costs the owner an inode
PART_PREFIX = ".notebooks-part-"  # of files that are not whole yet
COPY_CHUNK_BYTES = 1 << 24

# Runtime files of servers and kernels, one directory a student. Short: the path of a
# kernel's unix socket must fit into 107 bytes (unix(7)). Not in /run: that is small,
# and the whole system fails when a student has filled it.
RUNTIME_DIR = Path("/var/lib/notebooks")
CONFIG_DIR = RUNTIME_DIR / "config"  # root's, where servers look for configuration
TEMPLATE_HOME = RUNTIME_DIR / "template"  # does not exist
SERVER_LOG = ".notebooks.log"  # in the student's home

# What ps shows.
SERVER_TITLE = "notebooks.py: notebook server of "
LAUNCHER_TITLE = "notebooks.py: launcher"
TEMPLATE_TITLE = "notebooks.py: template process"
WEBSERVER_TITLE = "notebooks.py: webserver"

# What students' processes may have, and how much of them is looked at.
MAX_PROCESSES = 1000  # and threads (RLIMIT_NPROC): stops a fork bomb
MAX_ARGV_BYTES = 1 << 14
OOM_SCORE = "500"  # in their disfavour when memory runs out: proc(5), oom_score_adj
MAX_LOOKED_DESCRIPTORS = 1000  # of each process

# Ending processes and deleting homes.
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
KILL_SECONDS = 10.0  # how long processes that keep forking are fought
DELETE_SECONDS = 300.0  # for a home with millions of files
LOOK_SECONDS = 5.0  # in which remove looks at the size of a home

# What ends us: Ctrl-C and kill(1).
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

# Workers, which do something for one student.
HEARTBEAT = b"."  # a sign of life
HEARTBEAT_SECONDS = 1.0
STUCK_SECONDS = 20.0  # without one, after which it is given up
STUCK = (
    "something of theirs does not answer, such as a FUSE file system; end all they run"
    " (su NAME -s /bin/sh -c 'kill -KILL -1'), and try again"
)

# The launcher, its helpers and the servers.
START_SECONDS = 60.0  # until a server that was started must have named its address
SLOT_SECONDS = 5.0  # for which a slow start keeps others waiting
MAX_RESTART_DELAY_SECONDS = 60.0
IDLE_CONNECTION_SECONDS = 60.0  # of a notebook server; WebSockets do not count
CULL_SECONDS = 60  # between two looks at what is idle
MEMORY_SECONDS = 5  # between two looks at what all processes hold
PAGE_SECONDS = 10.0  # in which a visitor of the web page must have made a request
VISIT_SECONDS = 2.0  # for which the web page waits for a notebook server
STOP_SECONDS = 1.5  # in which the launcher's helpers must have ended
MAX_MESSAGE_BYTES = 1 << 20
MAX_MESSAGE_DESCRIPTORS = 4
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
SYS_PIDFD_GETFD = 438  # the same on all architectures

CERTIFICATE_NAME = "notebooks.pem"  # beside the configuration file
CERTIFICATE_DAYS = 397  # browsers refuse much longer ones
CERTIFICATE_WARNING_DAYS = 14

# -------------------------------------------------------------------------------------
# Errors and words for people
# -------------------------------------------------------------------------------------


class Error(Exception):
    """Something that can be foreseen went wrong; the message says what to do."""

    exit_status = 1


class Interrupted(Error):
    """The teacher ended it before it had done anything that stays."""

    exit_status = 130


class UsageError(Error):
    """The command line, the configuration or the list is wrong; nothing was changed."""

    exit_status = 2


class StuckError(Error):
    """Something of a student's keeps a process of ours from going on."""


class BusyError(UsageError):
    """Another notebooks.py works with the list."""


def printable(text: str) -> str:
    """Return text that others made, without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def explain(error: Exception) -> str:
    """Return what an error says, of one of the system's without Python's own words."""
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    name = f": {error.filename!r}" if error.filename is not None else ""
    return f"{error.strerror or error}{name}"


def say(text: str) -> None:
    """Print a line for the teacher, above the status line if there is one."""
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            from tqdm import tqdm

            tqdm.write(text)
        else:
            print(text)
    leave_closed_output()


def leave_closed_output() -> None:
    """Write to nowhere from now on where a terminal or the reader of a pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null_fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_fd, stream.fileno())
            os.close(null_fd)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the right form."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


# -------------------------------------------------------------------------------------
# Configuration
# -------------------------------------------------------------------------------------


def parse_path(text: str) -> Path:
    """Read a path; it becomes relative to the configuration file in `read_config`."""
    if not text:
        raise ValueError("needs a path")
    if text == "~" or text.startswith("~/"):
        return Path(invoking_account().pw_dir, text[2:])
    return Path(text)


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that takes nothing, too."""
    return lambda text: parse(text) if text else None


def parse_home_path(text: str) -> PurePath:
    """Read a path that is relative to each student's home and stays in it."""
    path = PurePath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "~" in text:
        raise ValueError("must be a directory relative to the home, such as `course`")
    return path


def parse_bool(text: str) -> bool:
    try:
        return configparser.ConfigParser.BOOLEAN_STATES[text.lower()]
    except KeyError:
        raise ValueError("must be yes or no") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of numbers in that range."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_size(text: str) -> int:
    """Read a number of bytes with an optional K, M, G or T (powers of 1024)."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)i?B?", text, re.IGNORECASE)
    if not match or not text.isascii():
        raise ValueError("must be a size such as 500M or 2G")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def parse_group(text: str) -> str:
    if text and not USERNAME.fullmatch(text):
        raise ValueError("must be a group name: lower-case letters, digits, - and _")
    return text


def parse_profile(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*", text) or text in (".", ".."):
        raise ValueError("must be the name of an IPython profile, such as `course`")
    return text


def parse_owner(text: str) -> str:
    if text and not find_account(text):
        raise ValueError("is not a user of this machine")
    return text


def parse_address(text: str) -> str:
    """Read a host name or address, in which {username} may stand for the student's."""
    if "{username}" in text and not text.startswith("{username}."):
        raise ValueError("must have {username}. at its beginning, if at all")
    if text and not re.fullmatch(r"[\w.:\[\]-]+", text.replace("{username}", "u")):
        raise ValueError("must be a host name alone, such as `lab.example.org`")
    if text.count(":") == 1:
        raise ValueError("must not have a port: that is the key `port`")
    return f"[{text}]" if ":" in text and not text.startswith("[") else text


class Option(NamedTuple):
    """A key of the configuration file; `parse` raises ValueError with what is right."""

    section: str
    key: str
    parse: Callable[[str], Any]
    default: str


def setting(section: str, parse: Callable[[str], Any], default: str = "") -> Any:
    """Return a field that a key of the configuration file sets."""
    return dataclasses.field(metadata={"option": (section, parse, default)})


@dataclasses.dataclass(frozen=True)
class Config:
    """What `notebooks.cfg` says, checked; paths are absolute, those in a home pure."""

    path: Path
    user_list: Path = setting("Setup", parse_path, "students.csv")
    tutorial_dir: PurePath = setting("Setup", parse_home_path, "course")
    material_dir: Path = setting("Setup", parse_path, "material")
    password_length: int = setting("Setup", whole_number(8, 128), "12")
    group: str = setting("Setup", parse_group, "students")
    keep_changed: bool = setting("Setup", parse_bool, "no")
    profile: str = setting("Setup", parse_profile)
    cert_file: Path | None = setting("Launch", optional(parse_path))
    key_file: Path | None = setting("Launch", optional(parse_path))
    server_address: str = setting("Launch", parse_address)
    web_title: str = setting("Launch", str, "Notebooks")
    launch_dir: PurePath | None = setting("Launch", optional(parse_home_path))
    port: int = setting("Launch", whole_number(1, 65535), "8888")
    list_students: bool = setting("Launch", parse_bool, "yes")
    on_demand: bool = setting("Launch", parse_bool, "no")
    idle_minutes: int = setting("Launch", whole_number(0, 100000), "0")
    idle_kernel_minutes: int = setting("Launch", whole_number(0, 100000), "0")
    storage_dir: Path = setting("Shutdown", parse_path, "storage")
    owner: str = setting("Shutdown", parse_owner)
    retrieve_limit: int = setting("Shutdown", parse_size, "1G")

    @property
    def material_name(self) -> PurePath:
        """Where the material is in a home, relative to it."""
        return self.tutorial_dir / self.material_dir.name

    @property
    def start_dir(self) -> PurePath:
        """Where notebooks start, relative to the home."""
        return self.launch_dir or self.material_name


OPTIONS = [
    Option(section, field.name, parse, default)
    for field in dataclasses.fields(Config)[1:]
    for section, parse, default in [field.metadata["option"]]
]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word closest to a misspelt one."""
    words = {each.lower(): each for each in known}
    for close in difflib.get_close_matches(word.lower(), words, 1):
        return f"did you mean `{words[close]}`?"
    return "known are " + ", ".join(words.values())


def read_ini(path: Path) -> configparser.ConfigParser:
    """Read the file's text.

    Raises: UsageError for a file that is not there, not text or not an INI file.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UsageError(f"{path}: is not a text file")
        parser.read_string(text, str(path))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there is no such file; name your configuration file, as in"
            " `notebooks.py setup course.cfg`, or go to the directory it is in"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory; name the file in it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except configparser.Error as error:
        raise UsageError(f"{path}: {explain_ini(error)}") from None
    return parser


def explain_ini(error: configparser.Error) -> str:
    """Return what is wrong with an INI file, in a teacher's words."""
    match error:
        case configparser.DuplicateOptionError():
            return f"line {error.lineno}: [{error.section}] has `{error.option}` twice"
        case configparser.DuplicateSectionError():
            return f"line {error.lineno}: the section [{error.section}] is there twice"
        case configparser.MissingSectionHeaderError():
            return f"line {error.lineno}: begin with a section, such as [Setup]"
        case configparser.ParsingError():
            lines = ", ".join(str(number) for number, _ in error.errors)
            return f"line {lines}: is neither `key = value` nor a [Section]"
    return error.message


def unknown_keys(parser: configparser.ConfigParser) -> Iterator[str]:
    """Yield what the file has that OPTIONS does not know."""
    home = {option.key: option.section for option in OPTIONS}
    sections = list(dict.fromkeys(home.values()))
    if parser.defaults():
        yield "[DEFAULT]: unknown section; " + nearest("DEFAULT", sections)
    for section in parser.sections():
        if section not in sections:
            yield f"[{section}]: unknown section; {nearest(section, sections)}"
            continue
        for key in parser[section]:
            if key not in home:
                keys = [each for each in home if home[each] == section]
                yield f"[{section}] {key}: unknown key; {nearest(key, keys)}"
            elif home[key] != section:
                yield f"[{section}] {key}: belongs in section [{home[key]}]"


def read_config(path: Path, problems: list[str]) -> Config:
    """Read the configuration file; what is wrong with it is added to `problems`.

    Raises: UsageError if it cannot be read at all.
    """
    parser = read_ini(path)
    base = path.absolute().parent
    problems += [f"{path}: {problem}" for problem in unknown_keys(parser)]
    values: dict[str, Any] = {"path": path.absolute()}
    for section, key, parse, default in OPTIONS:
        text = parser.get(section, key, fallback=default).strip()
        if parse is not str:  # a title may be `Physics #1`
            text = re.sub(r"(^|\s+)[#;].*", "", text)
        try:
            if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
                raise ValueError("must be without quotation marks")
            value = parse(text)
        except ValueError as error:
            problems.append(f"{path}: [{section}] {key} = {text}: {error}")
            value = parse(default)
        if isinstance(value, Path):
            value = Path(os.path.normpath(base / value))
        values[key] = value
    config = Config(**values)
    problems += [f"{path}: {problem}" for problem in contradictions(config)]
    return config


def contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with several keys together, or with what they name."""
    if config.key_file and not config.cert_file:
        yield "[Launch] key_file: is of no use without cert_file"
    material = os.path.realpath(config.material_dir)
    private = [config.path, config.user_list, config.storage_dir]
    for path in (*private, config.cert_file, config.key_file):
        if path and Path(os.path.realpath(path)).is_relative_to(material):
            yield (
                f"[Setup] material_dir = {config.material_dir}: {path} lies in it,"
                " which is not for students; make a directory with the material alone"
            )
    low = read_login_defs("GID_MIN", 1000)
    with contextlib.suppress(KeyError):
        if config.group and grp.getgrnam(config.group).gr_gid < low:
            yield (
                f"[Setup] group = {config.group}: is a group of the system, with rights"
                " that are not for students; choose a name of your own"
            )


# -------------------------------------------------------------------------------------
# Students
# -------------------------------------------------------------------------------------

COLUMNS = ("username", "name", "surname", "email", "sys-pass", "nb-pass", "port")


@dataclasses.dataclass(frozen=True)
class Student:
    """A row of the list; `line` is where the row begins in the file."""

    line: int
    username: str
    name: str
    surname: str
    sys_pass: str
    nb_pass: str
    port: str

    @property
    def full_name(self) -> str:
        return f"{self.name} {self.surname}".strip()


@dataclasses.dataclass
class Record:
    """A record of a CSV file: where it begins, its raw cells and its line end."""

    line: int
    cells: list[str]
    end: str


class StudentList:
    """The CSV file, held as it was written: only the cells that we set change.

    Each record is a list of raw cells (quotes included) and its line end, so that
    columns of the teacher's own, quoting, line ends, byte-order mark and encoding stay
    as they are. Source: RFC 4180, with comma, semicolon or tab as the delimiter.
    """

    def __init__(self, path: Path, problems: list[str]) -> None:
        """Read and check the file; what is wrong with it is added to `problems`."""
        self.path = Path(os.path.realpath(path))
        self.lock_fd = -1
        self.changes: dict[str, dict[str, str]] = {}
        self.load()
        problems += [f"{self.path}: {problem}" for problem in self.check()]

    def load(self) -> None:
        """Read the file into raw records.

        Raises: UsageError for a file that cannot be read as CSV at all.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{self.path}: the list of students cannot be read: {error.strerror}"
            ) from None
        self.data = data
        if data.startswith(b"PK\3\4"):
            raise UsageError(
                f"{self.path}: is a workbook; save it as CSV, and name that"
            )
        try:
            self.mark, self.encoding, text = decode(data)
        except UnicodeDecodeError as error:
            name = error.encoding.upper()
            raise UsageError(f"{self.path}: is no {name} text; save it anew") from None
        if not text.strip() or "\0" in text:
            raise UsageError(f"{self.path}: needs a header line that names `username`")
        self.delimiter = max(",;\t", key=text.splitlines()[0].count)
        self.records = list(split_records(text, self.delimiter, self.path))
        self.header = [unquote(cell).lower() for cell in self.records[0].cells]
        self.rows = [each for each in self.records[1:] if any(map(unquote, each.cells))]
        self.by_name = {self.student(each).username: each for each in self.rows}

    def check(self) -> Iterator[str]:
        """Yield what is wrong, with line numbers."""
        if "username" not in self.header:
            found = ", ".join(f"`{printable(name)}`" for name in self.header)
            yield (
                "line 1: must name the columns, such as username,name,surname, with"
                f" commas, semicolons or tabs between; found {found}, no `username`"
            )
            return
        for name in COLUMNS:
            if self.header.count(name) > 1:
                yield f"line 1: the header has more than one column `{name}`"
        first_lines: dict[str, int] = {}
        for record in self.rows:
            student = self.student(record)
            where = f"line {student.line}"
            if any(map(unquote, record.cells[len(self.header) :])):
                yield (
                    f"{where}: has more cells than the header has columns; put text"
                    " that contains the separator in quotation marks"
                )
            for problem in student_problems(student):
                yield f"{where}: {problem}"
            first = first_lines.setdefault(student.username, student.line)
            if first != student.line:
                yield f"{where}: the name {student.username!r} is on line {first} too"

    def student(self, record: Record) -> Student:
        cells = [unquote(cell) for cell in record.cells]
        values = dict(zip(self.header, cells))
        return Student(
            record.line,
            *(values.get(name, "") for name in COLUMNS if name != "email"),
        )

    @property
    def students(self) -> list[Student]:
        return [self.student(record) for record in self.rows]

    def update(self, username: str, **values: str) -> None:
        """Set cells of a student's row (sys_pass for the column `sys-pass`)."""
        self.changes.setdefault(username, {}).update(values)
        if username not in self:  # the row was deleted meanwhile
            return
        record = self.by_name[username]
        for key, value in values.items():
            name = key.replace("_", "-")
            if name not in self.header and value:
                self.header.append(name)
                self.records[0].cells.append(name)
            if name in self.header and getattr(self.student(record), key) != value:
                column = self.header.index(name)
                record.cells += [""] * (column + 1 - len(record.cells))
                quoted = record.cells[column].startswith('"')
                record.cells[column] = quote(value, self.delimiter, quoted)

    def __contains__(self, username: str) -> bool:
        return username in self.by_name

    def forget(self, username: str) -> None:
        """Clear what only counts as long as there is an account, and save that."""
        self.update(username, sys_pass="", nb_pass="", port="")
        self.save()

    def check_writable(self) -> None:
        """Raises: UsageError if the list could not be written when it has to be."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written: {error.strerror}; nothing was done"
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the list against other notebooks.py, and read it anew.

        Raises: UsageError if another process holds it.
        """
        self.lock_fd = lock_file(self.path)
        try:
            self.load()
            problems = list(self.check())
            if problems:
                raise UsageError("\n".join(f"{self.path}: {each}" for each in problems))
            yield
        finally:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def save(self) -> None:
        """Replace the file by what is held, if that differs, and keep the lock.

        The file is whole at any time; it gets mode 0600, since it holds passwords, and
        keeps its owner.
        """
        if self.path.read_bytes() != self.data:
            log.warning(
                "%s was changed meanwhile: what is new there is kept", self.path
            )
            changes = self.changes
            self.load()
            for username, values in changes.items():
                self.update(username, **values)
        text = "".join(
            self.delimiter.join(record.cells) + record.end for record in self.records
        )
        data = self.mark + text.encode(self.encoding)
        info = self.path.stat()
        if data == self.data and stat.S_IMODE(info.st_mode) == 0o600:
            return
        fd = replace_file(self.path, data, info.st_uid, info.st_gid)
        os.close(self.lock_fd)
        self.lock_fd, self.data = fd, data


def replace_file(path: Path, data: bytes, uid: int, gid: int) -> int:
    """Replace a file by a private one (mode 0600); there is always a whole one.

    Returns: a descriptor of it, which holds its lock.
    """
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.fchown(fd, uid, gid)
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(fd)
            os.rename(temporary, path)
        except BaseException:
            os.close(fd)
            os.unlink(temporary)
            raise
    except OSError as error:
        error.filename = str(path)
        raise
    return fd


def decode(data: bytes) -> tuple[bytes, str, str]:
    """Return the byte-order mark, if any, the encoding that it tells, and the text.

    Without one it is UTF-8, else what Excel writes. Raises: UnicodeDecodeError.
    """
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return mark, encoding, data.removeprefix(mark).decode(encoding)
    for encoding in ("utf-8", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return b"", encoding, data.decode(encoding)
    return b"", "latin-1", data.decode("latin-1")


def unquote(cell: str) -> str:
    """Return what a raw cell says, without blanks at its ends."""
    if cell.startswith('"'):
        cell = cell[1:-1].replace('""', '"')
    return cell.strip()


def quote(value: str, delimiter: str, quoted: bool) -> str:
    """Return the raw cell for a value; quoted if it must be, or was before."""
    if quoted or re.search(rf'["{delimiter}\r\n]', value):
        return '"' + value.replace('"', '""') + '"'
    return value


def split_records(text: str, delimiter: str, path: Path) -> Iterator[Record]:
    """Cut CSV text into records of raw cells; nothing is lost.

    Raises: UsageError for a quote that is never closed, or text after a closing one.
    """
    cell = rf'("(?:[^"]|"")*"|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)'
    pattern = re.compile(rf"{cell}({delimiter}|\r\n|\n|\r|\Z)")
    position, line, record = 0, 1, Record(1, [], "")
    while position < len(text) or record.cells:
        match = pattern.match(text, position)
        if not match:
            raise UsageError(
                f"{path}: line {line}: a quotation mark is not closed, or stands in the"
                " middle of a cell"
            )
        position = match.end()
        line += len(re.findall(r"\r\n|\n|\r", match[0]))
        record.cells.append(match[1])
        if match[2] != delimiter:
            record.end = match[2]
            yield record
            record = Record(line, [], "")


def student_problems(student: Student) -> Iterator[str]:
    """Yield what is wrong with one row."""
    username = student.username
    if not username:
        yield "the username is missing"
    elif not USERNAME.fullmatch(username):
        yield (
            f"{username!r} cannot be a username: use at most 32 lower-case letters,"
            " digits, - _ and . that begin with a letter or _"
        )
    elif not is_ordinary(username):
        yield f"{username!r} is a system account and cannot be a student"
    for column, text in (("sys-pass", student.sys_pass), ("nb-pass", student.nb_pass)):
        if len(text) > MAX_PASSWORD_LENGTH:
            yield f"the {column} is longer than {MAX_PASSWORD_LENGTH} characters"
        if any(not character.isprintable() for character in text):
            yield f"the {column} has a line break or another unprintable character"
    if student.port and not re.fullmatch(r"[0-9]{1,5}", student.port):
        yield f"the port {student.port!r} is not a number; leave it empty for any"


def lock_file(path: Path) -> int:
    """Return a descriptor that holds the lock of a file that may be replaced meanwhile.

    The lock is on the file (which students cannot open), not on its directory.

    Raises: UsageError if another process has it.
    """
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise BusyError(
                f"{path}: another notebooks.py works with it; wait until that is done"
            ) from None
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
        os.close(fd)


# -------------------------------------------------------------------------------------
# Accounts
# -------------------------------------------------------------------------------------


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until what is within has been done."""
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def check_programs() -> None:
    """Refuse to begin what a missing program would leave half done."""
    for name in ACCOUNT_PROGRAMS:
        if not shutil.which(name, path=PROGRAM_PATH):
            raise UsageError(f"the program {name} is not installed on this machine")


def run_program(argv: Sequence[str], text: str = "") -> str:
    """Run a program of the system's and return what it printed on standard output.

    Ctrl-C waits until it has ended, and does not reach it, nor does a signal to our
    process group: no account database is left half written or locked.

    Raises: Error if it is missing or fails, with the last line of what it said.
    """
    log.debug("running %s", shlex.join(argv))
    program = shutil.which(argv[0], path=PROGRAM_PATH)
    if not program:
        raise Error(f"the program {argv[0]} is not installed on this machine")
    with uninterrupted():
        done = subprocess.run(
            [program, *argv[1:]],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={"PATH": PROGRAM_PATH, "LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
            restore_signals=False,  # a useradd must not die of SIGPIPE if we are killed
        )
    if done.returncode:
        words = done.stderr.strip() or f"exit status {done.returncode}"
        last = words.splitlines()[-1].removeprefix(f"{argv[0]}: ")
        raise Error(f"{argv[0]}: {last}")
    return done.stdout


def delete(*argv: str) -> None:
    """Run find(1) or rm(1), which may take long; Ctrl-C ends it.

    What it says is not kept: students can make it as long as they like.

    Raises: Error if it fails, or does not end.
    """
    log.debug("running %s", shlex.join(argv))
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": PROGRAM_PATH},
        cwd="/",
    )
    try:
        if process.wait(DELETE_SECONDS):
            raise Error(f"{shlex.join(argv[:2])} could not delete everything")
    except subprocess.TimeoutExpired:
        raise Error(f"{shlex.join(argv[:2])} does not end") from None
    finally:
        process.kill()  # it is not waited for: it may be stuck


def read_login_defs(key: str, default: int) -> int:
    """Return a number from login.defs(5)."""
    with contextlib.suppress(OSError, ValueError):
        text = Path("/etc/login.defs").read_text(errors="replace")
        for number in re.findall(rf"^\s*{key}\s+(\w+)", text, re.MULTILINE):
            return int(number, 0)
    return default


def find_account(username: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(username)
    except KeyError:
        return None


def is_ordinary(username: str) -> bool:
    """Say whether the name is free or that of a person, not of root or a service.

    Above 65535 are people again, of a directory service; between lie `nobody` and what
    systemd makes up (systemd's UIDS-GIDS).
    """
    account = find_account(username)
    low, high = read_login_defs("UID_MIN", 1000), read_login_defs("UID_MAX", 60000)
    return account is None or low <= account.pw_uid <= high or account.pw_uid > 65535


def invoking_account() -> pwd.struct_passwd:
    """Return the account of the user who called sudo, else that of this process."""
    try:
        return pwd.getpwuid(int(os.environ["SUDO_UID"]))
    except (KeyError, ValueError):
        return pwd.getpwuid(os.getuid())


def is_ours(account: pwd.struct_passwd | None) -> bool:
    """Say whether setup made this account, so that `remove` may delete it.

    Source: passwd(5), GECOS subfields: full name, room, work phone, home phone, other.
    """
    return (
        account is not None
        and account.pw_gecos.split(",")[4:] == [MARK]
        and is_ordinary(account.pw_name)
        and account.pw_uid != invoking_account().pw_uid
    )


def ensure_account(student: Student, group: str) -> str:
    """Make the account unless it exists; return what was done: new, adopted or kept.

    The home is made by `ensure_home`: useradd's own is open to all for a moment.

    Raises: Error if useradd refuses, or a home directory of that name is left over.
    """
    account = find_account(student.username)
    if account is None:
        home = Path("/home", student.username)
        if os.path.lexists(home):
            raise Error(f"{home} exists without an account; move it away first")
        groups = ["--groups", group] if group else []
        name = re.sub(r'[,:=\\"]', " ", printable(student.full_name))
        try:
            run_program(
                ["useradd", "--no-create-home", "--home-dir", str(home), "--user-group"]
                # No subordinate ids (subuid(5)): what runs under them is hard to find.
                + ["--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0"]
                + ["--shell", "/bin/bash", *groups]
                + ["--comment", f"{name},,,,{MARK}", "--", student.username]
            )
        except Error:  # unless a setup that was killed had just called it
            if not is_ours(find_account(student.username)):
                raise
        return "new"
    if is_ours(account) and is_closed(student.username):  # by a remove that failed
        run_program(["usermod", "--expiredate", "", "--", student.username])
    if group and student.username not in grp.getgrnam(group).gr_mem:
        run_program(["gpasswd", "--add", student.username, group])
        if not is_ours(account):
            return "adopted"
    return "kept"


def read_shadow(username: str) -> list[str]:
    """Return the fields of an account, if it has any: shadow(5)."""
    for line in Path("/etc/shadow").read_text().splitlines():
        if line.startswith(f"{username}:"):
            return line.split(":")
    return []


def is_closed(username: str) -> bool:
    """Say whether `end_account` has closed this account."""
    return read_shadow(username)[7:8] == ["1"]


def set_missing_passwords(students: Iterable[Student]) -> None:
    """Give our accounts that have no system password the one in the list.

    `!` before a password is something else: somebody has locked that account. All go
    through one pipe, since anyone can read arguments.
    """
    lines = "".join(
        f"{student.username}:{student.sys_pass}\n"
        for student in students
        if read_shadow(student.username)[1:2] == ["!"]
        and is_ours(find_account(student.username))
    )
    if lines:
        run_program(["chpasswd"], lines)


def make_password(length: int) -> str:
    return "".join(secrets.choice(PASSWORD_ALPHABET) for _ in range(length))


def end_account(account: pwd.struct_passwd) -> None:
    """End all that an account of ours runs, whatever its processes do, for good.

    It is closed first, so that neither ssh nor cron start anything new.

    Raises: Error if processes or mounts are in the way.
    """
    for _, mount, *_ in psutil.disk_partitions(all=True):
        if Path(account.pw_dir) in Path(mount).parents:  # userdel would empty it
            raise Error(
                f"something is mounted at {mount!r}; umount it, then remove again"
            )
    run_program(["usermod", "--expiredate", "1", "--", account.pw_name])
    Path("/var/spool/cron/crontabs", account.pw_name).unlink(missing_ok=True)
    kill_everything(account)


def remove_account(account: pwd.struct_passwd) -> None:
    """Delete an account of ours that was ended, and its home.

    Raises: Error; what is left can be removed by the same call again.
    """
    runtime_dir = RUNTIME_DIR / str(account.pw_uid)
    delete("rm", "-rf", "--one-file-system", "--", str(runtime_dir))
    clear_empty_runtime_dir()
    home = []
    if is_home_of(account) and not os.path.islink(account.pw_dir):
        home = ["--remove"]
        # userdel cannot remove directories that are nested a thousand deep.
        delete("find", account.pw_dir, "-xdev", "-mindepth", "1", "-delete")
    try:
        run_program(["userdel", *home, "--", account.pw_name])
    except Error:  # unless a remove that was killed had just called it
        if find_account(account.pw_name):
            raise
    if os.path.lexists(account.pw_dir):
        raise Error(
            f"the account is gone, but {account.pw_dir} was not theirs and stays"
        )


def delete_public_files(uids: Collection[int]) -> None:
    """Delete what users have where everyone may write: others may get their uids."""
    if not uids:
        return
    owned = " -o ".join(f"-uid {uid}" for uid in uids).split()
    for directory in PUBLIC_DIRS:
        if os.path.isdir(directory):
            with contextlib.suppress(Error):  # a directory that has files of others
                delete("find", directory, "-xdev", "(", *owned, ")", "-delete")
    for kind, option in IPC_KINDS.items():
        lines = Path("/proc/sysvipc", kind).read_text().splitlines()
        names = lines[0].split()
        for line in lines[1:]:
            row = dict(zip(names, map(int, line.split())))
            if row["uid"] in uids or row["cuid"] in uids:
                with contextlib.suppress(Error):  # it has gone meanwhile
                    run_program(["ipcrm", option, line.split()[1]])


def leave_group(username: str, group: str) -> None:
    with contextlib.suppress(KeyError):
        if username in grp.getgrnam(group).gr_mem:
            run_program(["gpasswd", "--delete", username, group])


def remove_empty_group(group: str) -> bool:
    """Delete the group when nobody is in it: groupdel refuses a primary one."""
    with contextlib.suppress(KeyError, Error):
        if not grp.getgrnam(group).gr_mem:
            run_program(["groupdel", "--", group])
            return True
    return False


# -------------------------------------------------------------------------------------
# Privileges
# -------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """The ids with which something is done."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def identity_of(account: pwd.struct_passwd) -> Identity:
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    return Identity(account.pw_uid, account.pw_gid, tuple(groups))


@contextlib.contextmanager
def acting_as(identity: Identity) -> Iterator[None]:
    """Use the effective ids of a user for the system calls within.

    The real and saved ids stay root's, so that the user can neither signal nor trace
    this process, nor hold it up in a FUSE file system of theirs. Ids belong to the
    whole process, which must have one thread. Source: credentials(7).
    """
    if identity.uid == os.geteuid():
        yield
        return
    groups = os.getgroups()
    try:
        os.setgroups(identity.groups)
        os.setegid(identity.gid)
        os.seteuid(identity.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def drop_privileges(identity: Identity) -> None:
    """Become a user for good.

    Raises: RuntimeError if anything of root's is left; the process must then end.
    """
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    with contextlib.suppress(PermissionError):
        os.setresuid(0, 0, 0)
    ids = {*os.getresuid(), identity.uid}, {*os.getresgid(), identity.gid}
    groups = set(os.getgroups())
    if ids != ({identity.uid}, {identity.gid}) or groups != set(identity.groups):
        raise RuntimeError(f"still has ids {ids} and groups {groups}")


def check_reachable() -> None:
    """Refuse to go on with software that students cannot execute and read.

    Their kernels are executed with this interpreter and its libraries, as them.

    Raises: UsageError that names the first file or directory in the way.
    """
    specs = map(importlib.util.find_spec, ("notebook", "ipykernel", "zmq"))
    origins = [spec.origin for spec in specs if spec and spec.origin]
    if len(origins) < 3:
        raise UsageError(
            f"{sys.executable} has no Jupyter Notebook; run the notebooks.py that"
            " `sudo make install` puts into /usr/local/bin"
        )
    targets = [sys.executable, os.__file__, shutil.__file__, *origins]
    with acting_as(identity_of(pwd.getpwnam("nobody"))):
        for path in (*targets, *map(os.path.realpath, targets)):
            for step in (*reversed(Path(path).parents), Path(path)):
                need = os.X_OK if step.is_dir() else os.R_OK
                if not os.access(step, need, effective_ids=True):
                    raise UsageError(
                        f"students cannot execute {sys.executable}: {step} is closed to"
                        " them; install notebooks.py where everyone may read, as `sudo"
                        " make install` does (into /opt/notebooks), and run that"
                    )


# -------------------------------------------------------------------------------------
# Processes of students
# -------------------------------------------------------------------------------------

# What a command line runs at the root of a tree of Jupyter's processes, itself or by a
# Python as a script or module; besides our servers, which have their title, and kernels
# of any language with a connection file.
JUPYTER = re.compile(
    r"(([^\0]*/)?python[\d.]*\0(-[^\0]*\0)*)?([^\0]*/)?"
    r"(jupyter[-\0](notebook|lab|server|nbclassic|kernel)|notebook|jupyterlab"
    r"|jupyter_server|nbclassic|ipykernel|ipykernel_launcher)(\0|\Z)"
)
CONNECTION_FILE = re.compile(rf"{re.escape(str(RUNTIME_DIR))}/\d+/kernel-.*\.json")


def read_argv(pid: int) -> list[str]:
    """Return the beginning of a process's command line, or nothing.

    A process can make it gigabytes long. Source: proc(5), /proc/PID/cmdline.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb", 0) as file:
        data = file.read(MAX_ARGV_BYTES)
        return data.rstrip(b"\0").decode(errors="replace").split("\0")
    return []


def read_name(pid: int) -> str:
    """Return the beginning of a process's title, or nothing.

    It can be read without its memory. Source: proc(5), /proc/PID/comm: 15 bytes.
    """
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_bytes()[:-1].decode(errors="replace")
    return ""


def is_jupyter(argv: Sequence[str]) -> bool:
    """Say whether a command line is that of a notebook server or of a kernel."""
    line = "\0".join(argv)
    return (
        line.startswith(SERVER_TITLE)
        or JUPYTER.match(line) is not None
        or any(map(CONNECTION_FILE.fullmatch, argv))
    )


def read_status(pid: int) -> tuple[int, bool]:
    """Return the real uid of a process and whether it is alive.

    Read here and not by psutil, whose patterns also match a name that a process gave
    itself (`Uid: 0`). A process whose first thread is dead may have others that live.
    Source: proc(5), /proc/PID/status. Raises: ProcessLookupError.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    fields = dict(re.findall(r"^(State|Uid|Threads):\t(\w+)", text, re.MULTILINE))
    return int(fields["Uid"]), fields["State"] not in "ZX" or int(fields["Threads"]) > 1


def processes_by_uid(uids: Iterable[int]) -> dict[int, list[psutil.Process]]:
    """Return the processes that run under each real uid, without dead ones."""
    found: dict[int, list[psutil.Process]] = {uid: [] for uid in uids}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            uid, alive = read_status(pid)
            if alive and uid in found:
                found[uid].append(psutil.Process(pid))
    return found


def find_roots(processes: Iterable[psutil.Process]) -> set[int] | None:
    """Return the pids of notebook servers and kernels, whoever started them.

    To read a command line takes a lock on the process's memory, which a student can
    keep for ever, as in an mmap(2) of a file in a FUSE file system of theirs.

    Returns: None if to look at them all takes too long.
    """
    deadline = time.monotonic() + STUCK_SECONDS
    roots = set()
    for process in processes:
        if time.monotonic() > deadline:
            return None
        if is_jupyter(read_argv(process.pid)):
            roots.add(process.pid)
    return roots


def family_of(
    processes: Iterable[psutil.Process], known: set[int]
) -> list[psutil.Process]:
    """Return those of one user's processes that are known, or relatives of these.

    Relatives are what descends from them, and what is in a session that one of them
    leads: an ssh login or a tmux leads its own. Their pids are added to `known`, so
    that they are recognized without a parent; so are servers that have just started.
    """
    facts = {}
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            relatives = {process.pid, process.ppid(), os.getsid(process.pid)}
            facts[process] = relatives
            if read_name(process.pid) == SERVER_TITLE[:15]:
                known.add(process.pid)
    found: set[psutil.Process] = set()
    while new := {each for each in facts if facts[each] & known} - found:
        found |= new
        known |= {process.pid for process in new}
    return sorted(found, key=lambda process: process.pid)


def signal_process(pid: int, uid: int, number: int) -> None:
    """Send a signal to a process if it runs under that uid, and to no other.

    The descriptor names one process, whatever becomes of its pid: pidfd_open(2).
    """
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if read_status(pid)[0] == uid:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def kill_everything(account: pwd.struct_passwd) -> None:
    """Kill every process of a user, also those that fork faster than anyone can look.

    Raises: Error if some remain.
    """
    identity = identity_of(account)
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        killed = kill_all_at_once(identity)
        left = processes_by_uid([identity.uid])[identity.uid]
        if killed and not left:
            return
        if time.monotonic() > deadline:
            raise Error(
                "a process of theirs cannot be killed; is it stuck on a disk, or a FUSE"
                " file system? (mount -t fusectl x /mnt; echo 1 >/mnt/NUMBER/abort)"
            )
        for process in left:
            signal_process(process.pid, identity.uid, signal.SIGKILL)
        time.sleep(0.02)


def kill_all_at_once(identity: Identity) -> bool:
    """Let the kernel kill all processes of a user in one step, and say if it did.

    A child becomes the user: kill(2) with pid -1 then reaches all of theirs, spares
    only the caller, and no fork escapes it. The user's processes may kill or stop the
    child before it comes to that.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            drop_privileges(identity)
            os.kill(-1, signal.SIGKILL)
            status = 0
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(wait_status):
        os.kill(pid, signal.SIGKILL)
        _, wait_status = os.waitpid(pid, 0)
    return wait_status == 0


@dataclasses.dataclass
class Worker:
    """A process that does something for one student, and what it has sent so far."""

    student: Student
    pid: int
    fd: int
    data: bytes = b""
    heard: float = dataclasses.field(default_factory=time.monotonic)

    def read(self) -> bool:
        """Read what has come; return whether there will be more."""
        data = os.read(self.fd, 1 << 16)
        self.data = (self.data + data).lstrip(HEARTBEAT)  # a pickle begins with 0x80
        self.heard = time.monotonic()
        return bool(data)

    def is_stuck(self) -> bool:
        """Say whether it has given no sign of life for long; one may wait unread."""
        late = time.monotonic() > self.heard + STUCK_SECONDS
        return late and not select.select([self.fd], [], [], 0)[0]

    def result(self) -> Any:
        os.close(self.fd)
        os.waitpid(self.pid, 0)
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            return pickle.loads(self.data)
        return Error("its process ended unexpectedly; out of memory?")

    def end(self, number: int) -> None:
        """End it with a signal, and if that does not help leave it to itself."""
        os.close(self.fd)
        deadline = time.monotonic() + 1
        os.kill(self.pid, number)
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                return
            time.sleep(0.01)


def for_each_student(
    function: Callable[[Student], Result], students: Iterable[Student]
) -> Iterator[tuple[Student, Result | Error]]:
    """Call a function for several students at once, each in a process of its own.

    Effective ids belong to a whole process, so threads cannot do this. And a student
    can make a process of ours sleep in the kernel for ever, such as one that wants a
    directory which a FUSE file system of theirs keeps locked: it is given up then.
    Yields what the function returned, or the Error that it ended in, as they come.
    """
    waiting = list(students)[::-1]
    workers: dict[int, Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < (os.cpu_count() or 1):
                worker = spawn_worker(function, waiting.pop())
                workers[worker.fd] = worker
            ready, _, _ = select.select(list(workers), [], [], HEARTBEAT_SECONDS)
            for worker in list(workers.values()):
                if worker.fd in ready and not worker.read():
                    del workers[worker.fd]
                    yield worker.student, worker.result()
                elif worker.is_stuck():
                    del workers[worker.fd]
                    worker.end(signal.SIGKILL)
                    yield worker.student, StuckError(STUCK)
    finally:
        for worker in workers.values():
            worker.end(signal.SIGTERM)


def spawn_worker(function: Callable[[Student], Any], student: Student) -> Worker:
    """Fork a worker; it holds nothing else that is open, above all no lock."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with uninterrupted():
        pid = os.fork()
        if pid:
            os.close(write_fd)
            return Worker(student, pid, read_fd)
        try:
            close_all_but({0, 1, 2, write_fd})
            send_result(function, student, write_fd)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)


def send_result(function: Callable[[Student], Any], student: Student, fd: int) -> None:
    """Write what the function returns, and until then a sign of life each second.

    Runs as: root, in a child, with Ctrl-C and SIGTERM still held back; they end it
    after its cleaning up.
    """

    def handle_end(*_: object) -> NoReturn:
        for number in INTERRUPTS:  # a second one must not interrupt the cleaning up
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in INTERRUPTS:
        signal.signal(number, handle_end)
    signal.signal(signal.SIGALRM, lambda *_: os.write(fd, HEARTBEAT))
    signal.setitimer(signal.ITIMER_REAL, HEARTBEAT_SECONDS, HEARTBEAT_SECONDS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    try:
        result = function(student)
    except (Error, OSError) as error:
        result = Error(explain(error))
    signal.setitimer(signal.ITIMER_REAL, 0)
    with open(fd, "wb") as file:
        pickle.dump(result, file)


def stop_jupyter(students: Iterable[Student]) -> dict[str, str]:
    """End the Jupyter processes of all these students at once.

    Who has a process that cannot be looked at loses all of theirs, unless the account
    is a person's own, which setup did not make: then only what ps shows as our server.

    Returns: the reason for each student with whom that failed.
    """
    accounts = {student: pwd.getpwnam(student.username) for student in students}
    problems: dict[str, str] = {}
    known: dict[int, set[int]] = {each.pw_uid: set() for each in accounts.values()}
    running = processes_by_uid(known)
    busy = [student for student in accounts if running[accounts[student].pw_uid]]
    hidden: list[Student] = []
    for student, result in for_each_student(
        lambda student: find_roots(running[accounts[student].pw_uid]), busy
    ):
        if result is None or isinstance(result, StuckError):
            hidden.append(student)
        elif isinstance(result, Error):
            problems[student.username] = str(result)
        else:
            known[accounts[student].pw_uid] |= result
    left = end_families(known)
    for student, account in accounts.items():
        if left[account.pw_uid]:
            count = counted(left[account.pw_uid], "process")
            problems[student.username] = f"{count} could not be ended"
    for student in hidden:
        try:
            if not is_ours(accounts[student]):
                raise StuckError(STUCK)
            kill_everything(accounts[student])
        except Error as error:
            problems[student.username] = str(error)
    return problems


def end_families(known: dict[int, set[int]]) -> dict[int, int]:
    """End processes that are known, by the uid they run under, and their families.

    They get SIGTERM, a grace period, then SIGKILL for as long as new ones appear.

    Returns: for each uid how many are left: 0, unless its processes keep forking.
    """

    def find_families() -> dict[int, list[psutil.Process]]:
        running = processes_by_uid(known)
        return {uid: family_of(running[uid], known[uid]) for uid in known}

    families = find_families()
    start = time.monotonic()
    number = signal.SIGTERM
    signalled: set[psutil.Process] = set()
    while any(families.values()) and time.monotonic() < start + GRACE_SECONDS * 2:
        if number == signal.SIGTERM and time.monotonic() > start + GRACE_SECONDS:
            number = signal.SIGKILL
        for uid, processes in families.items():
            for process in processes:
                if number == signal.SIGKILL or process not in signalled:
                    signal_process(process.pid, uid, number)
                    signalled.add(process)
        time.sleep(0.1)
        families = find_families()
    return {uid: len(processes) for uid, processes in families.items()}


def close_all_but(fds: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in fds:
            with contextlib.suppress(OSError):
                os.close(int(name))


# -------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a FIFO, or a file with a lease on it (fcntl(2)), would hold us up.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NOWHERE = os.devnull  # in the place of a directory: nothing is found in it
# What copy_file_range(2) says where it does not work, and a full disk (write(2)).
NOT_SHARED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
TEMPORARY_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclasses.dataclass
class CopyReport:
    """What a copy did, in numbers of files, and the first things that went wrong."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0
    backups: int = 0
    over_limit: str = ""
    copied_bytes: int = 0
    failed: int = 0
    first_failure: str = ""

    def add(self, other: "CopyReport") -> None:
        """Add the numbers of another report."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                vars(self)[name] += value

    def fail(self, path: Path, error: OSError) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or f"{str(path)!r}: {error.strerror}"

    @property
    def problem(self) -> str:
        """What the teacher has to know besides the numbers."""
        problems = []
        if self.failed:
            problems.append(f"{self.failed} not copied, first {self.first_failure}")
        if self.over_limit:
            problems.append(
                f"more than retrieve_limit: {self.over_limit!r} is left out"
            )
        return "; ".join(problems)

    def __str__(self) -> str:
        text = f"{self.new} new, {self.updated} updated, {self.unchanged} unchanged"
        if self.backups:
            text += f", {self.backups} kept as backups"
        if self.skipped:
            text += f", {self.skipped} skipped (links and other special files)"
        return text


def open_directory(
    start: Path, parts: Iterable[str], identity: Identity, create: bool = False
) -> int:
    """Return a descriptor of a directory below `start`, through no symbolic link.

    Runs as: `identity`, with which missing directories are made too.

    Raises: Error that names the directory which is missing, a link or not accessible.
    """
    path = start
    with acting_as(identity):
        try:
            fd = os.open(start, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for part in parts:
                path = path / part
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=fd)
                parent, fd = fd, os.open(part, DIRECTORY_FLAGS, dir_fd=fd)
                os.close(parent)
        except NotADirectoryError:
            raise Error(
                f"{str(path)!r} is a link or a file, not a directory: not followed"
            ) from None
        except OSError as error:
            raise Error(f"{str(path)!r}: {error.strerror}") from None
    return fd


def copy_data(source_fd: int, destination_fd: int, size: int) -> int:
    """Copy up to `size` bytes in the kernel and return how many there were.

    copy_file_range(2) shares extents where the file system can; sendfile(2) works
    between any two.
    """
    copied, count, sharing = 0, 1, True
    while count and copied < size:
        wanted = min(size - copied, COPY_CHUNK_BYTES)
        try:
            if sharing:
                count = os.copy_file_range(source_fd, destination_fd, wanted)
            else:
                count = os.sendfile(destination_fd, source_fd, None, wanted)
        except OSError as error:
            if not sharing or copied or error.errno not in NOT_SHARED:
                raise
            sharing = False
        else:
            copied += count
    return copied


def same_content(first_fd: int, second_fd: int) -> bool:
    """Compare two files from their beginnings, and leave both positions there."""
    offset = 0
    while True:
        first = os.pread(first_fd, 1 << 18, offset)
        if first != os.pread(second_fd, 1 << 18, offset):
            return False
        if not first:
            return True
        offset += len(first)


@dataclasses.dataclass
class TreeCopy:
    """A recursive copy that reads as one user and writes as another.

    It walks by descriptors, never by paths, so that nobody who moves, links or replaces
    something meanwhile can lead it elsewhere. Only regular files and directories of the
    source's own file system are copied. A file is written beside its destination and
    renamed over it: there is never half a file, and a link there is replaced.
    """

    reader: Identity
    writer: Identity
    backup: bool = False  # keep what differs and is overwritten as `name.~1~` and so on
    limit: int | None = None  # in bytes; each file counts ENTRY_BYTES at least
    wanted: Callable[[Path], bool] = lambda path: True  # of relative paths
    dry_run: bool = False  # only count
    report: CopyReport = dataclasses.field(default_factory=CopyReport)
    device: int = -1

    def run(
        self,
        source: Path,
        source_parts: Iterable[str],
        destination: Path,
        parts: Iterable[str],
    ) -> CopyReport:
        """Copy what is in one directory into another, which is made if it is missing.

        Each is a path and the parts below it that are not followed if they are links.

        Raises: Error if one cannot be opened, or the destination can take no more.
        """
        with contextlib.ExitStack() as stack:
            source_fd = open_directory(source, source_parts, self.reader)
            stack.callback(os.close, source_fd)
            try:
                create = not self.dry_run
                destination_fd = open_directory(destination, parts, self.writer, create)
            except Error:
                if not self.dry_run:
                    raise
                destination_fd = os.open(NOWHERE, os.O_PATH)
            stack.callback(os.close, destination_fd)
            self.device = os.fstat(source_fd).st_dev
            self.copy_directory(source_fd, destination_fd, Path())
        return self.report

    def charge(self, size: int) -> bool:
        """Take from the limit and say whether that was possible."""
        if self.limit is None:
            return True
        if size > self.limit:
            return False
        self.limit -= size
        return True

    def leave_out(self, path: Path) -> None:
        """Remember the first path that is over the limit."""
        self.report.over_limit = self.report.over_limit or str(path)

    def copy_directory(self, source_fd: int, destination_fd: int, path: Path) -> None:
        if not self.dry_run:
            self.remove_parts(destination_fd)
        with os.scandir(source_fd) as entries:
            for entry in entries:
                is_part = entry.name.startswith(PART_PREFIX)
                if is_part or not self.wanted(path / entry.name):
                    continue
                if not self.charge(ENTRY_BYTES):
                    self.leave_out(path / "...")
                    return
                try:
                    self.copy_entry(entry, source_fd, destination_fd, path)
                except OSError as error:
                    if error.errno in FULL:
                        raise Error(f"{error.strerror}; {self.report}") from None
                    self.report.fail(path / entry.name, error)

    def remove_parts(self, directory_fd: int) -> None:
        """Remove what a copy that was killed has left in a directory."""
        with acting_as(self.writer), os.scandir(directory_fd) as entries:
            for entry in itertools.islice(entries, MAX_ENTRIES):
                if entry.name.startswith(PART_PREFIX):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.name, dir_fd=directory_fd)

    def copy_entry(
        self, entry: "os.DirEntry[str]", source_fd: int, destination_fd: int, path: Path
    ) -> None:
        """Copy one entry of a directory, if it is something that is copied."""
        if not (
            entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
        ):
            self.report.skipped += 1
            return
        with acting_as(self.reader):
            fd = os.open(entry.name, FILE_FLAGS, dir_fd=source_fd)
        try:
            info = os.fstat(fd)
            deeper = info.st_dev == self.device and len(path.parts) < MAX_DEPTH
            if stat.S_ISDIR(info.st_mode) and deeper:
                self.enter_directory(entry.name, info, fd, destination_fd, path)
            elif not stat.S_ISREG(info.st_mode):
                self.report.skipped += 1
            elif not self.charge(max(info.st_size - ENTRY_BYTES, 0)):
                self.leave_out(path / entry.name)
            else:
                self.copy_file(entry.name, info, fd, destination_fd)
        finally:
            os.close(fd)

    def enter_directory(
        self, name: str, info: os.stat_result, fd: int, destination_fd: int, path: Path
    ) -> None:
        """Copy a directory into one of the same name, made if it is missing."""
        with acting_as(self.writer):
            inner_fd = self.open_inner(name, destination_fd)
        try:
            self.copy_directory(fd, inner_fd, path / name)
            if not self.dry_run:
                with acting_as(self.writer):
                    os.fchmod(inner_fd, info.st_mode & 0o777 | 0o700)
        finally:
            os.close(inner_fd)

    def open_inner(self, name: str, destination_fd: int) -> int:
        """Open a directory, or make it; what else has that name is moved aside."""
        try:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=destination_fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.dry_run:
                return os.open(NOWHERE, os.O_PATH)
            if isinstance(error, NotADirectoryError):  # links too
                self.move_aside(name, destination_fd)
        os.mkdir(name, 0o700, dir_fd=destination_fd)
        return os.open(name, DIRECTORY_FLAGS, dir_fd=destination_fd)

    def move_aside(self, name: str, directory_fd: int) -> None:
        """Rename a file or directory to the first of `name.~1~`... that is free."""
        stem = name
        if len(os.fsencode(name)) > 240:  # of the 255 bytes that a name may have
            digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
            stem = f"{os.fsdecode(os.fsencode(name)[:200])}-{digest}"
        for number in itertools.count(1):
            backup = f"{stem}.~{number}~"
            try:
                os.stat(backup, dir_fd=directory_fd, follow_symlinks=False)
            except FileNotFoundError:
                break
        os.rename(name, backup, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        self.report.backups += 1

    def compare(
        self, name: str, info: os.stat_result, fd: int, destination_fd: int
    ) -> str:
        """Say what a file is to the destination: new, updated, unchanged or blocked.

        A file with another's size and modification time, to the nanosecond, is taken to
        be unchanged. Blocked: a directory is in its place. Runs as: the writer.
        """
        try:
            old_fd = os.open(name, FILE_FLAGS, dir_fd=destination_fd)
        except (FileNotFoundError, NotADirectoryError):
            return "new"
        except OSError:
            return "updated"
        try:
            old = os.fstat(old_fd)
            if stat.S_ISDIR(old.st_mode):
                return "blocked"
            if not stat.S_ISREG(old.st_mode) or old.st_size != info.st_size:
                return "updated"
            same = old.st_mtime_ns == info.st_mtime_ns or same_content(fd, old_fd)
            return "unchanged" if same else "updated"
        finally:
            os.close(old_fd)

    def copy_file(
        self, name: str, info: os.stat_result, fd: int, destination_fd: int
    ) -> None:
        """Copy one regular file unless the destination has the same already.

        Runs as: the writer, so that the data count for their quota.
        """
        with acting_as(self.writer):
            change = self.compare(name, info, fd, destination_fd)
            if change != "unchanged" and not self.dry_run:
                aside = change == "blocked" or change == "updated" and self.backup
                self.replace_file(name, info, fd, destination_fd, aside)
        vars(self.report)["updated" if change == "blocked" else change] += 1

    def replace_file(
        self,
        name: str,
        info: os.stat_result,
        fd: int,
        destination_fd: int,
        aside: bool,
    ) -> None:
        """Write a file under another name, then rename it to its own."""
        temporary = PART_PREFIX + secrets.token_hex(8)
        new_fd = os.open(temporary, TEMPORARY_FLAGS, 0o600, dir_fd=destination_fd)
        try:
            self.report.copied_bytes += copy_data(fd, new_fd, info.st_size)
            os.fchmod(new_fd, info.st_mode & 0o777 | 0o600)
            os.utime(new_fd, ns=(info.st_mtime_ns, info.st_mtime_ns))
            if aside:
                self.move_aside(name, destination_fd)
            os.rename(
                temporary, name, src_dir_fd=destination_fd, dst_dir_fd=destination_fd
            )
        except BaseException:
            os.unlink(temporary, dir_fd=destination_fd)
            raise
        finally:
            os.close(new_fd)


def format_bytes(count: int) -> str:
    """Return a number of bytes as people read it, such as 1.5 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def is_profile_file(path: Path) -> bool:
    """Say whether a path of an IPython profile is given to students."""
    python = path.suffix == ".py" and path.parent in (Path(), Path("startup"))
    return python or path == Path("startup")


def ensure_home(account: pwd.struct_passwd) -> None:
    """Make the home of an account of ours, private and whole from its first moment.

    A home that exists is left as it is. Source: useradd(8), the skeleton directory.

    Raises: Error if that is somebody else's.
    """
    home = Path(account.pw_dir)
    if not is_ours(account) or is_home_of(account):
        return
    if os.path.lexists(home):
        raise Error(f"{home} is not theirs; move it away, and run setup again")
    unfinished = home.with_name(f".{home.name}-new")
    delete("rm", "-rf", "--", str(unfinished))
    unfinished.mkdir(mode=0o700)
    options = ["--recursive", "--no-dereference", "--"]
    if os.path.isdir("/etc/skel"):
        run_program(["cp", *options, "/etc/skel/.", str(unfinished)])
    owner = f"{account.pw_uid}:{account.pw_gid}"
    run_program(["chown", *options, owner, str(unfinished)])
    unfinished.rename(home)


def is_home_of(account: pwd.struct_passwd) -> bool:
    """Say whether an account's home is there, a directory, and theirs."""
    try:
        info = os.stat(account.pw_dir)  # in a directory of root's: a link is root's
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == account.pw_uid


def profile_dir(profile: str) -> Path:
    """Return where the invoking user has an IPython profile, or would have it."""
    return Path(invoking_account().pw_dir, ".ipython", f"profile_{profile}")


def ensure_config_dir() -> None:
    """Make the directories of root's that all servers need.

    Others may pass through the upper one but not list it: who can read a directory can
    keep it locked, and root waiting for it.
    """
    CONFIG_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    RUNTIME_DIR.chmod(0o711)
    # Without this file jupyter_core takes the directory for one of IPython 3's.
    (CONFIG_DIR / "migrated").touch(mode=0o644)


def ensure_runtime_dir(account: pwd.struct_passwd) -> None:
    """Make the private directory of a student's runtime files."""
    ensure_config_dir()
    directory = RUNTIME_DIR / str(account.pw_uid)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if os.lstat(directory).st_uid != account.pw_uid:
        os.chown(directory, account.pw_uid, account.pw_gid, follow_symlinks=False)


def clear_runtime_dir(student: Student) -> None:
    """Remove what servers and kernels of a student's have left."""
    directory = RUNTIME_DIR / str(pwd.getpwnam(student.username).pw_uid)
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(directory) as entries:
            for entry in itertools.islice(entries, MAX_ENTRIES):
                with contextlib.suppress(OSError):  # a directory: not a kernel's
                    os.unlink(entry.path)
        with contextlib.suppress(OSError):
            directory.rmdir()
        clear_empty_runtime_dir()


def clear_empty_runtime_dir() -> None:
    """Remove the directory above once nobody has one in it."""
    with contextlib.suppress(FileNotFoundError):
        if os.listdir(RUNTIME_DIR) == [CONFIG_DIR.name]:
            delete("rm", "-rf", "--", str(RUNTIME_DIR))


# -------------------------------------------------------------------------------------
# Certificate
# -------------------------------------------------------------------------------------


class Certificate(NamedTuple):
    """A PEM certificate chain and the file its key is in; only root need read them."""

    cert_file: Path
    key_file: Path

    def context(self) -> ssl.SSLContext:
        """Return a TLS server's context.

        Raises: UsageError that says what is wrong with the files.
        """
        try:
            cert_text, key_text = (path.read_text("latin-1") for path in self)
        except OSError as error:
            raise UsageError(
                f"{error.filename}: the certificate or its key cannot be read:"
                f" {error.strerror}; see the keys cert_file and key_file"
            ) from None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert_file, self.key_file, lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            fault = self.fault(cert_text, key_text, error)
            raise UsageError(f"{self.cert_file}: {fault}") from None
        return context

    def fault(self, cert_text: str, key_text: str, error: Exception) -> str:
        """Say why OpenSSL refused the certificate or the key."""
        reason = getattr(error, "reason", None) or ""
        if "BEGIN CERTIFICATE" not in cert_text:
            return "there is no certificate in it (PEM format)"
        if "PRIVATE KEY" not in key_text:
            return f"there is no key in {self.key_file} (PEM format); see key_file"
        if "ENCRYPTED" in key_text:
            return f"the key in {self.key_file} has a passphrase; remove that"
        if reason.endswith("_MISMATCH") or reason == "NO_CERTIFICATE_ASSIGNED":
            return f"the key in {self.key_file} is another certificate's"
        return f"cannot be used for TLS: {reason or error}"

    def valid_for(self, days: int) -> bool:
        """Say whether it will still be valid in so many days."""
        command = ["openssl", "x509", "-noout", "-in", str(self.cert_file)]
        try:
            run_program([*command, "-checkend", str(days * 86400)])
        except Error:
            return False
        return True

    def fingerprint(self) -> str:
        """Return the SHA-256 fingerprint that browsers show."""
        command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in"]
        return run_program([*command, str(self.cert_file)]).strip().partition("=")[2]


def host_names(config: Config) -> list[str]:
    """Return this host's names and addresses, as `subjectAltName` wants them.

    Left out are IPv6 addresses that change by themselves: link-local and temporary.
    Source: /proc/net/if_inet6 (scope in column 4, flags in 5; 0x01 is IFA_F_TEMPORARY).
    """
    addresses = {"127.0.0.1", "::1"}
    for entries in psutil.net_if_addrs().values():
        addresses |= {each.address for each in entries if each.family == socket.AF_INET}
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, _, _, scope, flags, *_ = line.split()
            if scope == "00" and not int(flags, 16) & 1:
                addresses.add(str(ipaddress.IPv6Address(int(number, 16))))
    names = {socket.gethostname(), socket.getfqdn(), "localhost"}
    address = config.server_address.strip("[]").replace("{username}", "*")
    if address:
        try:
            addresses.add(str(ipaddress.ip_address(address)))
        except ValueError:
            names |= {address, address.removeprefix("*.")}
    return [f"DNS:{name}" for name in sorted(names)] + [
        f"IP:{address}" for address in sorted(addresses)
    ]


def make_certificate(path: Path, names: Sequence[str]) -> None:
    """Write a self-signed certificate and its key into one file of mode 0600.

    Its first line, which TLS libraries skip, tells the names.
    """
    extension = f"subjectAltName={','.join(names)}"
    pem = run_program(
        ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-sha256"]
        + ["-pkeyopt", "ec_paramgen_curve:P-256", "-days", str(CERTIFICATE_DAYS)]
        + ["-subj", "/CN=notebooks.py", "-addext", "extendedKeyUsage=serverAuth"]
        + ["-addext", extension, "-keyout", "-"]
    )
    os.close(replace_file(path, f"{extension}\n{pem}".encode(), 0, 0))


def ensure_certificate(config: Config) -> Certificate:
    """Return the configured certificate, or our own.

    Raises: UsageError if it cannot be used.
    """
    if not config.cert_file:
        return ensure_own_certificate(config)
    certificate = Certificate(config.cert_file, config.key_file or config.cert_file)
    certificate.context()
    if not certificate.valid_for(0):
        raise UsageError(f"{config.cert_file}: the certificate has expired; renew it")
    if not certificate.valid_for(CERTIFICATE_WARNING_DAYS):
        log.warning(
            "%s: the certificate expires within %d days",
            *(config.cert_file, CERTIFICATE_WARNING_DAYS),
        )
    return certificate


def ensure_own_certificate(config: Config) -> Certificate:
    """Return our own certificate, made anew where it has to be.

    Raises: UsageError if there is another in its place, which is left alone.
    """
    path = config.path.parent / CERTIFICATE_NAME
    certificate, names = Certificate(path, path), host_names(config)
    if path.exists():
        try:
            certificate.context()
        except UsageError as error:
            raise UsageError(f"{error}; delete it, and a new one is made") from None
        first_line = path.read_text("latin-1").partition("\n")[0]
        if not first_line.startswith("subjectAltName="):
            raise UsageError(
                f"{path}: was not made by notebooks.py; move it away, or name it in the"
                " key cert_file"
            )
        known = first_line.removeprefix("subjectAltName=").split(",")
        missing = [name for name in names if name not in known]
        if not missing and certificate.valid_for(CERTIFICATE_WARNING_DAYS):
            return certificate
        log.warning(
            "%s: made anew for %s; notebooks that run keep the old one until shutdown",
            *(path, ", ".join(missing) or "its age"),
        )
    make_certificate(path, names)
    return certificate


# -------------------------------------------------------------------------------------
# Messages between our processes
# -------------------------------------------------------------------------------------


def send_message(
    channel: socket.socket,
    message: dict[str, Any],
    fds: Sequence[int] = (),
    flags: int = 0,
) -> None:
    """Send one message with descriptors.

    Shapes: a record of a SOCK_SEQPACKET socket, JSON in UTF-8. Raises: OSError if the
    other side is gone.
    """
    socket.send_fds(channel, [json.dumps(message).encode()], list(fds), flags)


def receive_message(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message; its descriptors are closed on exec.

    Raises: EOFError if the other side is gone, ValueError if it talks nonsense.
    """
    size = MAX_MESSAGE_DESCRIPTORS * 4
    try:
        data, ancillary, _, _ = channel.recvmsg(
            MAX_MESSAGE_BYTES, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        data, ancillary = b"", []
    if not data:
        raise EOFError
    fds = [
        int.from_bytes(content[i : i + 4], sys.byteorder)
        for level, kind, content in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for i in range(0, len(content), 4)
    ]
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        for fd in fds:
            os.close(fd)
        raise ValueError("a message is not a JSON object")
    return message, fds


# -------------------------------------------------------------------------------------
# The notebook server of a student
# -------------------------------------------------------------------------------------

# What a running server would import by and by; the last brings most of it. That is done
# before `rehearse_start` makes anything: what lies together stays shared, 1 MB more of
# it. tests/test_server.py finds out what is missing here.
SERVER_MODULES = (
    *("anyio._backends._asyncio", "babel.dates", "ipykernel.kernelspec"),
    *("jupyter_core.migrate", "notebook.app"),
)
EXPORTS = (
    *("asciidoc", "html", "latex", "markdown", "notebook", "pdf", "python", "rst"),
    *("script", "slides", "webpdf"),
)
EXPORT_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class ServerRequest:
    """All that a student's server is told.

    Shapes: crosses the process boundary as a JSON object. `password` is a hash in
    Jupyter's format.
    """

    username: str
    port: int
    url: str
    password: str
    start_dir: str
    profile: str
    idle_seconds: int
    idle_kernel_seconds: int
    cert_file: str
    key_file: str


def hash_password(password: str) -> str:
    """Return a salted hash as jupyter_server checks it.

    Source: jupyter_server.auth.security, format algorithm:salt:digest of password and
    salt. One round is enough for 70 random bits that never touch a disk.
    """
    salt = secrets.token_hex(8)
    digest = hashlib.sha256(password.encode() + salt.encode()).hexdigest()
    return f"sha256:{salt}:{digest}"


def server_environment(account: pwd.struct_passwd) -> dict[str, str]:
    """Return the whole environment of a student's server, kernels and terminals."""
    return {
        "HOME": account.pw_dir,
        "USER": account.pw_name,
        "LOGNAME": account.pw_name,
        "SHELL": account.pw_shell,
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "JUPYTER_RUNTIME_DIR": str(RUNTIME_DIR / str(account.pw_uid)),
    }


def server_settings(request: ServerRequest, account: pwd.struct_passwd) -> Any:
    """Return the traitlets configuration of a student's server."""
    from jupyter_core.paths import ENV_JUPYTER_PATH, SYSTEM_JUPYTER_PATH
    from traitlets.config import Config as Settings

    config_dir = Path(account.pw_dir, ".jupyter")
    start_dir = Path(account.pw_dir, request.start_dir)
    # What these took from the template's environment when they were imported.
    lab = {
        "user_settings_dir": str(config_dir / "lab/user-settings"),
        "workspaces_dir": str(config_dir / "lab/workspaces"),
        # Pages of extensions are shown to anybody, without a log-in: not the student's.
        "labextensions_path": [
            os.path.join(path, "labextensions")
            for path in (*ENV_JUPYTER_PATH, *SYSTEM_JUPYTER_PATH)
        ],
    }
    return Settings(
        ServerApp={
            "base_url": f"/{request.username}/",
            "port": request.port,
            "custom_display_url": request.url,
            "certfile": request.cert_file,  # for its name; the key was read before
            "default_url": "/tree",
            "root_dir": str(start_dir if start_dir.is_dir() else account.pw_dir),
            "open_browser": False,
            "allow_remote_access": True,
            "cookie_secret": secrets.token_bytes(32),  # no older cookie is good
            "terminado_settings": {"shell_command": [account.pw_shell, "-l"]},
            "jpserver_extensions": {"jupyter_lsp": False},  # it runs npm at each start
            "kernel_spec_manager_class": kernel_spec_manager_class(request.profile),
            "shutdown_no_activity_timeout": request.idle_seconds,
        },
        IdentityProvider={"token": ""},
        PasswordIdentityProvider={
            "hashed_password": request.password,
            "password_required": True,
            "allow_password_change": False,
        },
        # Over TCP any local user can connect to a kernel's IOPub port and read it.
        KernelManager={"transport": "ipc"},
        MappingKernelManager={
            "cull_idle_timeout": request.idle_kernel_seconds,
            "cull_interval": CULL_SECONDS,
            "cull_connected": True,
        },
        TerminalManager={
            "cull_inactive_timeout": request.idle_seconds,
            "cull_interval": CULL_SECONDS,
        },
        # Which notebooks are trusted is only remembered while the server runs: SQLite
        # would run what a database in the home says, and to find the directory
        # nbformat executes the configuration there.
        NotebookNotary={
            "data_dir": "",
            "db_file": ":memory:",
            "secret": secrets.token_bytes(64),
        },
        LabApp={**lab, "extension_manager": "readonly", "news_url": None},
        JupyterNotebookApp=lab,
        LabServerApp=lab,
    )


def kernel_spec_manager_class(profile: str) -> type:
    """Return a manager whose Python kernels run with an IPython profile."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class StudentKernelSpecManager(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            spec = super().get_kernel_spec(kernel_name)
            exists = Path.home().joinpath(".ipython", f"profile_{profile}").is_dir()
            if profile and exists and "ipykernel_launcher" in spec.argv:
                spec.argv.append(f"--profile={profile}")
            return spec

    return StudentKernelSpecManager


def export_handlers(base_url: str) -> list[tuple[str, type]]:
    """Return handlers that keep the menu *Save and export as*.

    They run `jupyter nbconvert` as a process of the student's, which holds no secrets.
    """
    from jupyter_server.auth.decorator import authorized
    from jupyter_server.base.handlers import APIHandler, JupyterHandler, path_regex
    from tornado import web

    class ExportFormatsHandler(APIHandler):
        auth_resource = "nbconvert"

        @web.authenticated
        @authorized
        async def get(self) -> None:
            await self.finish(
                json.dumps({name: {"output_mimetype": ""} for name in EXPORTS})
            )

    class ExportHandler(JupyterHandler):
        auth_resource = "nbconvert"

        @property
        def content_security_policy(self) -> str:
            return f"{super().content_security_policy}; sandbox allow-scripts"

        @web.authenticated
        @authorized
        async def get(self, export_format: str, path: str) -> None:
            self.check_xsrf_cookie()
            if export_format not in EXPORTS:
                raise web.HTTPError(404, f"unknown export format {export_format}")
            manager = self.contents_manager
            model: Any = await manager.get(  # type: ignore[no-untyped-call]
                path.strip("/"), content=False
            )
            source = os.path.join(manager.root_dir, model["path"])
            try:
                name, data = await export_notebook(export_format, source)
            except Error as error:
                raise web.HTTPError(500, f"nbconvert failed: {error}") from None
            if self.get_argument("download", "false").lower() == "true":
                self.set_attachment_header(name)
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            self.set_header("Content-Type", kind)
            self.set_header("Cache-Control", "no-store")
            await self.finish(data)

    return [
        (f"{base_url}api/nbconvert", ExportFormatsHandler),
        (rf"{base_url}nbconvert/(?P<export_format>\w+){path_regex}", ExportHandler),
    ]


async def export_notebook(export_format: str, source: str) -> tuple[str, bytes]:
    """Convert a notebook and return the result's name and content; several are zipped.

    Raises: Error with the last line of what nbconvert said.
    """
    with tempfile.TemporaryDirectory() as directory:
        output_dir = os.path.join(directory, "export")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nbconvert", "--to", export_format),
            *("--output-dir", output_dir, "--", source),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=directory,
        )
        try:
            _, words = await asyncio.wait_for(process.communicate(), EXPORT_SECONDS)
        except asyncio.TimeoutError:
            process.kill()
            raise Error(f"it took more than {EXPORT_SECONDS:.0f} seconds") from None
        names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
        if process.returncode or not names:
            lines = words.decode(errors="replace").strip().splitlines() or ["no output"]
            raise Error(lines[-1])
        if len(names) == 1:
            return names[0], Path(output_dir, names[0]).read_bytes()
        zipped = await asyncio.to_thread(
            shutil.make_archive, output_dir, "zip", output_dir
        )
        return f"{Path(source).stem}.zip", Path(zipped).read_bytes()


def make_server(request: ServerRequest, account: pwd.struct_passwd) -> Any:
    """Return the initialized application; nothing in the home has been executed.

    Runs as: the student, in the directory `/`. The configuration directory is root's
    while Jupyter looks for Python to execute; terminals and kernels do not see that.
    """
    from jupyter_server.serverapp import ServerApp

    os.environ["JUPYTER_CONFIG_DIR"] = str(CONFIG_DIR)
    # The trash directory was worked out from the template's HOME at import.
    importlib.reload(sys.modules["send2trash.plat_other"])
    app: Any = ServerApp(config=server_settings(request, account))
    app.name = "notebook"
    # The templates of nbconvert are Python in disguise, and are looked up in the home:
    # they would run in this process, which holds the host's key.
    app.default_services = [x for x in app.default_services if x != "nbconvert"]
    app.no_browser_open_file = True
    app.initialize(argv=[], new_httpserver=False)
    settings = Path(account.pw_dir, ".jupyter", app.config_manager.config_dir_name)
    app.config_manager.write_config_dir = str(settings)
    app.web_app.add_handlers(".*$", export_handlers(app.base_url))
    del os.environ["JUPYTER_CONFIG_DIR"]
    return app


def move_output_to_log() -> None:
    """Leave the terminal on which the launcher watched the start for a log in the home.

    Runs as: the student. A FIFO or a link in its place neither blocks nor leads away.
    The terminal may have been closed already, so that a flush would fail (EIO).
    """
    log_fd = null_fd = os.open(os.devnull, os.O_RDWR)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        fd = os.open(Path.home() / SERVER_LOG, flags, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.truncate(fd, 0)
            log_fd = fd
    for fd, target in ((null_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(fd, target)


def leave_session_keyring() -> None:
    """Join a new session keyring: the launcher's may hold the teacher's keys.

    Source: keyctl(2), KEYCTL_JOIN_SESSION_KEYRING, by its numbers. Raises: OSError.
    """
    number = {"x86_64": 250, "aarch64": 219, "riscv64": 219}.get(os.uname().machine)
    libc = ctypes.CDLL(None, use_errno=True)
    if number and libc.syscall(number, 1, None, 0, 0, 0) < 0:
        if ctypes.get_errno() != errno.ENOSYS:
            raise OSError(ctypes.get_errno(), "keyctl: cannot join a session keyring")


def run_server(request: ServerRequest, listener: socket.socket) -> None:
    """Serve a student's notebooks until SIGTERM, or until they were idle for long.

    Runs as: root, then the student, for good. The order matters: the key is read while
    root may; nothing of the student's is read before the ids are dropped.
    """
    from tornado.httpserver import HTTPServer

    account = pwd.getpwnam(request.username)
    context = Certificate(Path(request.cert_file), Path(request.key_file)).context()
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    with contextlib.suppress(OSError):  # in a container it may be higher already
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    setproctitle.setproctitle(SERVER_TITLE + request.username)
    os.setsid()
    drop_privileges(identity_of(account))
    leave_session_keyring()
    os.environ.clear()
    os.environ.update(server_environment(account))
    os.umask(0o077)
    os.chdir("/")
    app = make_server(request, account)
    os.chdir(account.pw_dir)
    server = HTTPServer(
        app.web_app,
        ssl_options=context,
        max_body_size=app.max_body_size,
        max_buffer_size=app.max_buffer_size,
        idle_connection_timeout=IDLE_CONNECTION_SECONDS,
    )
    listener.setblocking(False)
    server.add_sockets([listener])
    app.io_loop.add_callback(move_output_to_log)
    app.start()


# -------------------------------------------------------------------------------------
# The template process
# -------------------------------------------------------------------------------------


def preload() -> None:
    """Import what servers need, so that forks share it."""
    warnings.simplefilter("ignore")
    for module in SERVER_MODULES:
        importlib.import_module(module)
    # The first context makes OpenSSL load its tables: 2 MB that are then shared.
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    rehearse_start()
    release_memory()
    gc.freeze()


def rehearse_start() -> None:
    """Initialize a server that nobody uses, and throw it away.

    What Jupyter works out and keeps in its modules at a first start, for a first page
    and for a first notebook is then shared by all forks: each starts in half the CPU
    time and with 6 MB less of private memory, and a lesson costs 11 MB less.
    """
    import nbformat
    from jupyter_server.gateway.gateway_client import GatewayClient
    from tornado.ioloop import IOLoop

    ensure_config_dir()
    home = tempfile.mkdtemp(prefix=f"{TEMPLATE_HOME.name}-", dir=RUNTIME_DIR)
    account = pwd.struct_passwd(("", "", 0, 0, "", home, "/bin/sh"))
    request = ServerRequest("rehearsal", 0, "", "-", ".", "", 0, 0, "", "")
    os.environ["HOME"] = home  # run_server sets the whole environment anew
    logging.disable(logging.CRITICAL)
    app = make_server(request, account)
    app.io_loop.run_sync(functools.partial(rehearse_visit, app))
    notebook = {"cells": [], "metadata": {}, "nbformat": 4}
    for minor in range(nbformat.current_nbformat_minor + 1):  # compiles the schemas
        nbformat.validate({**notebook, "nbformat_minor": minor})
    logging.disable(logging.NOTSET)
    for number in (*INTERRUPTS, signal.SIGUSR1):  # Jupyter handles these
        signal.signal(number, signal.SIG_DFL)
    GatewayClient.clear_instance()
    IOLoop.current().close()
    asyncio.set_event_loop(None)
    shutil.rmtree(home)


async def rehearse_visit(app: Any) -> None:
    """Ask for the log-in page, whose templates and files are read then."""
    from tornado.httpserver import HTTPServer
    from tornado.iostream import IOStream

    ours, theirs = socket.socketpair()
    HTTPServer(app.web_app).handle_stream(IOStream(theirs), ("127.0.0.1", 0))
    stream = IOStream(ours)
    request = f"GET {app.base_url}login HTTP/1.0\r\nHost: localhost\r\n\r\n"
    await stream.write(request.encode())
    answer = await stream.read_until_close()
    if b" 200 OK\r\n" not in answer:
        raise RuntimeError(f"a rehearsed log-in page: {answer[:100]!r}")


def run_template(channel: socket.socket) -> None:
    """Fork a server for each channel that the launcher sends.

    The request itself goes through that channel, to the fork: this process never knows
    a student's secrets, and so no other student's server can have them in its memory.
    Ends when the launcher is gone. Reports the wait status of each fork that ends.

    Runs as: root, one thread, no event loop.
    """
    setproctitle.setproctitle(TEMPLATE_TITLE)
    wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    preload()
    with contextlib.suppress(OSError):  # the launcher is gone: seen below
        send_message(channel, {"ready": True})
    while True:
        ready, _, _ = select.select([channel.fileno(), wakeup_read], [], [])
        if wakeup_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup_read, 4096)
            reap_servers(channel)
        if channel.fileno() in ready:
            try:
                _, (fd,) = receive_message(channel)
            except EOFError:
                return
            spawn_server(fd)


def spawn_server(fd: int) -> None:
    """Fork; the child answers the request that comes through `fd` and never returns."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the template process has more than one thread")
    try:
        pid = os.fork()
    except OSError as error:
        with socket.socket(fileno=fd) as channel, contextlib.suppress(OSError):
            send_message(channel, {"problem": f"cannot fork: {error.strerror}"})
            # To close with the request unread, or before it came, would cost the
            # launcher this answer. One byte of a record is enough, without its secrets.
            channel.recv(1)
        return
    if pid == 0:
        status = 1
        try:
            answer_request(fd)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(fd)


def answer_request(fd: int) -> None:
    """Receive a request with a listening socket and a terminal, and run that server.

    Runs as: root, in the fork. Everything else that the template had open is closed.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    close_all_but({0, 1, 2, fd})
    with socket.socket(fileno=fd) as channel:
        try:
            message, (listener_fd, terminal_fd) = receive_message(channel)
            pid_fd = os.pidfd_open(os.getpid())
            send_message(channel, {"pid": os.getpid()}, [pid_fd])
        except (EOFError, ConnectionError):  # the launcher does not want it any more
            return
    os.close(pid_fd)
    for standard in (0, 1, 2):
        os.dup2(terminal_fd, standard)
    os.close(terminal_fd)
    run_server(ServerRequest(**message), socket.socket(fileno=listener_fd))


def reap_servers(channel: socket.socket) -> None:
    """Report the forks that have ended; the launcher names the reason."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with contextlib.suppress(OSError):  # the launcher is gone
                send_message(channel, {"pid": pid, "wait_status": status})


def explain_exit(wait_status: int) -> str:
    """Say how a process ended."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return f"ended with exit status {code}"
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}){hint}"


# -------------------------------------------------------------------------------------
# What the commands share
# -------------------------------------------------------------------------------------


class Course(NamedTuple):
    """What a command works on."""

    config: Config
    students: StudentList
    yes: bool


def load_course(path: Path, yes: bool) -> Course:
    """Read the configuration and the list of students.

    Raises: UsageError with everything that is wrong in either; nothing was changed.
    """
    problems: list[str] = []
    config = read_config(path, problems)
    try:
        students = StudentList(config.user_list, problems)
    except UsageError as error:
        raise UsageError("\n".join([*problems, str(error)])) from None
    if config.group in students:
        problems.append(f"{path}: [Setup] group = {config.group}: is a student's name")
    if problems:
        raise UsageError("\n".join(problems))
    if not students.students:
        raise UsageError(f"{students.path}: there is no student in it")
    return Course(config, students, yes)


def progress(steps: Iterable[Result], total: int, label: str) -> Iterable[Result]:
    """Pass steps on, with a bar if this is a terminal."""
    if not sys.stderr.isatty() or log.isEnabledFor(logging.DEBUG):
        return steps
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread: there will be forks
    return tqdm(steps, label, total, leave=False, unit="student", file=sys.stderr)


class Outcome:
    """Collects what a command did for each student, and says it.

    A line per student goes to standard output unless that is a terminal, which shows a
    bar; failures always go to standard error.
    """

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def done(self, username: str, text: str) -> None:
        if not sys.stdout.isatty() or log.isEnabledFor(logging.INFO):
            say(f"{username}: {text}")

    def failed(self, username: str, reason: str) -> None:
        self.failures[username] = reason

    def finish(self, text: str) -> int:
        """Print the summary and return the exit status."""
        for username, reason in self.failures.items():
            log.error("%s: %s", username, reason)
        if self.failures:
            text += f" {len(self.failures)} failed: {', '.join(self.failures)}."
        say(text)
        return 1 if self.failures else 0


def with_accounts(course: "Course", outcome: Outcome) -> list[Student]:
    """Return the students who have an account; the others fail."""
    present = []
    for student in course.students.students:
        if find_account(student.username):
            present.append(student)
        else:
            outcome.failed(student.username, "has no account; run setup first")
    return present


def warn_of_strays(course: "Course") -> None:
    """Name members of the group who have an account of ours, but no row."""
    with contextlib.suppress(KeyError):
        for name in sorted(set(grp.getgrnam(course.config.group).gr_mem)):
            if name not in course.students and is_ours(find_account(name)):
                log.warning(
                    "%s has an account that setup made, but no row in %s; to remove it,"
                    " put the row back",
                    *(name, course.students.path),
                )


# -------------------------------------------------------------------------------------
# Ports
# -------------------------------------------------------------------------------------


def assign_ports(students: Sequence[Student], base: int) -> dict[str, int]:
    """Give each of N students a port of base+1 ... base+N.

    It is the one in the list if it is unique and in range, else the lowest free one.
    """
    wanted = {each.username: int(each.port or 0) for each in students}
    uses = collections.Counter(wanted.values())
    ports = range(base + 1, base + len(students) + 1)
    kept = {name: port for name, port in wanted.items() if uses[port] == 1}
    kept = {name: port for name, port in kept.items() if port in ports}
    free = iter(sorted({*ports} - {*kept.values()}))
    return {name: kept.get(name) or next(free) for name in wanted}


def bind_port(port: int) -> socket.socket:
    """Return a socket that listens on a port in both families.

    It listens at once: a port that is bound and does not listen, or is held in one
    family only, can be taken by any user. Raises: OSError (EADDRINUSE).
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=1024)


# For each port the pids of those who listen on it, each with its descriptor.
Listeners = dict[int, list[tuple[int, int]]]


def find_listeners() -> Listeners:
    """Return who listens on which TCP port, of the first descriptors of each process.

    Source: proc(5), /proc/net/tcp: local address, state (0A: LISTEN), inode.
    """
    ports = {}
    for path in Path("/proc/net").glob("tcp*"):
        for line in path.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    listeners: Listeners = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in itertools.islice(entries, MAX_LOOKED_DESCRIPTORS):
                with contextlib.suppress(OSError):
                    port = ports.get(os.readlink(entry.path))
                    if port:
                        listeners.setdefault(port, []).append((pid, int(entry.name)))
    return listeners


def describe_holder(listeners: Listeners, port: int) -> str:
    """Name what holds a port."""
    for pid, _ in listeners.get(port, ()):
        with contextlib.suppress(ProcessLookupError, KeyError):
            user = pwd.getpwuid(read_status(pid)[0]).pw_name
            return f"{printable(read_name(pid))} (pid {pid}, user {user})"
    return f"a process that cannot be named (`ss -tanp | grep {port}` may)"


def find_launcher(port: int) -> int:
    """Return the pid of the `launch` of root's that holds this base port, or 0."""
    for pid, _ in find_listeners().get(port, ()):
        with contextlib.suppress(ProcessLookupError):
            is_root = read_status(pid)[0] == 0  # before its command line is read
            if is_root and " ".join(read_argv(pid)).startswith(LAUNCHER_TITLE):
                return pid
    return 0


def reload_launcher(port: int) -> None:
    """Have a `launch` that runs read its configuration and list again."""
    launcher = find_launcher(port)
    if launcher:
        signal_process(launcher, 0, signal.SIGHUP)
        say(f"The launch that runs (pid {launcher}) has been told.")


def take_listener(
    listeners: Listeners, port: int, uid: int
) -> tuple[socket.socket, int, int] | None:
    """Duplicate the listening socket out of a student's server that still runs.

    A socket that root made tells that the server is ours: a student's own socket
    belongs to the student. Source: pidfd_getfd(2), not in Python's os yet.

    Returns: the socket, the pid of the server and a descriptor of it, or None.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for pid, number in listeners.get(port, ()):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            pid_fd = os.pidfd_open(pid)
            stack.callback(os.close, pid_fd)
            if read_status(pid)[0] != uid:
                continue
            fd = libc.syscall(SYS_PIDFD_GETFD, pid_fd, number, 0)
            if fd < 0:
                continue
            listener = stack.enter_context(socket.socket(fileno=fd))
            if os.fstat(fd).st_uid == 0 and listener.getsockname()[1] == port:
                stack.pop_all()
                return listener, pid, pid_fd
    return None


def ensure_capacity(course: Course) -> None:
    """Allow the descriptors that all servers need: two each, more at the start.

    Our helpers and servers get as many: on the network as the system allows. Root may
    raise the hard limit too, unless something confines it (RLIMIT_NOFILE).

    Raises: UsageError if there are too few of them, or of ports.
    """
    config, count = course.config, len(course.students.students)
    if config.port + count > 65535:
        raise UsageError(f"{config.path}: [Launch] port: too few ports are above it")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 256 + 3 * count
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(need, hard), max(need, hard)))
    except (OSError, ValueError):
        raise UsageError(
            f"{count} students need {need} open files, only {hard} are allowed: run"
            f" `ulimit -n {need}` before, or set LimitNOFILE in the unit file"
        ) from None


# -------------------------------------------------------------------------------------
# The launcher
# -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A student's server as the launcher sees it: its port, and its process if any."""

    student: Student
    uid: int
    port: int
    listener: socket.socket
    pid: int = 0
    pid_fd: int = -1  # while it runs: pidfd_open(2)
    state: str = "stopped"  # or starting, running, failed
    failures: int = 0  # in a row
    settled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    @property
    def username(self) -> str:
        return self.student.username


def open_servers(
    course: Course, outcome: Outcome, known: Mapping[str, Server]
) -> list[Server]:
    """Hold a port for each student who can have a server, and write it to the list.

    known: servers whose ports we hold already; they get what the list says now. The
    list is locked.
    """
    config, students = course.config, course.students.students
    servers = []
    ports = assign_ports(students, config.port)
    listeners = find_listeners()
    for student in with_accounts(course, outcome):
        try:
            server = known.get(student.username) or open_server(
                student, ports, config.port, listeners
            )
        except Error as error:
            outcome.failed(student.username, str(error))
            continue
        server.student = student
        servers.append(server)
        course.students.update(student.username, port=str(server.port))
    try:
        course.students.save()
    except OSError as error:
        log.warning("the ports could not be written: %s", explain(error))
    return servers


def open_server(
    student: Student, ports: dict[str, int], base: int, listeners: Listeners
) -> Server:
    """Adopt the server that a student has, or bind their port, or find another one.

    Raises: Error if the student has no password, or there is no free port left.
    """
    if not student.nb_pass:
        raise Error("has no nb-pass; run setup first")
    port = ports[student.username]
    uid = pwd.getpwnam(student.username).pw_uid
    for known in {port, int(student.port or port)}:
        adopted = take_listener(listeners, known, uid)
        if adopted:
            log.info("%s: adopted, pid %d", student.username, adopted[1])
            return Server(student, uid, known, *adopted, state="running")
    try:
        return Server(student, uid, port, bind_port(port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise Error(f"port {port}: {error.strerror}") from None
    for other in range(base + len(ports) + 1, 65536):
        with contextlib.suppress(OSError):
            server = Server(student, uid, other, bind_port(other))
            log.warning(
                "%s: port %d is held by %s; using %d: let it through the firewall",
                student.username,
                port,
                describe_holder(listeners, port),
                other,
            )
            return server
    raise Error("no port is free")


def script_command(*arguments: str) -> list[str]:
    """Return the command line that executes this script for as long as a course lasts.

    Isolated mode keeps the environment and the current directory out of it. And of a
    script that it is given by name Python keeps the syntax tree, 9 MB, until the end.
    """
    run = (
        "import runpy, sys; del sys.argv[0];"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-I", "-c", run, __file__, *arguments]


class Helper:
    """One of the launcher's own processes: this script, executed afresh.

    It ends when our end of the socket pair is closed; one that ends before is started
    again, unless it never was ready.
    """

    def __init__(
        self,
        role: str,
        on_start: Callable[[], None],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        self.role = role
        self.on_start = on_start
        self.on_message = on_message
        self.ready = asyncio.Event()
        self.failures = 0
        self.proven = False
        self.replaced = False

    async def run(self) -> None:
        """Keep the process running until this is cancelled.

        What fails is tried again after a delay that doubles. Raises: Error or OSError
        if it cannot be started even once.
        """
        while True:
            reason = "ended"
            try:
                await self.run_once()
            except OSError as error:  # too little memory, or too many processes
                if not self.proven:
                    raise
                reason = f"could not be started: {explain(error)}"
            if not self.proven:
                raise Error(f"the {self.role} cannot start; what it said is above")
            if self.replaced:
                self.replaced = False
                continue
            delay = restart_delay(self.failures)
            self.failures += 1
            log.error(
                "the %s %s; starting it again in %.0f s", self.role, reason, delay
            )
            await asyncio.sleep(delay)

    async def run_once(self) -> None:
        """Start the process and take what it says until it ends, or talks nonsense."""
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self.channel, theirs:
            with contextlib.suppress(PermissionError):  # in a container: 200 kB will do
                self.channel.setsockopt(
                    socket.SOL_SOCKET, SO_SNDBUFFORCE, MAX_MESSAGE_BYTES
                )
            self.process = subprocess.Popen(
                script_command(self.role, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={
                    "PATH": PROGRAM_PATH,
                    "HOME": str(TEMPLATE_HOME),
                    "LANG": os.environ.get("LANG", "C.UTF-8"),
                },
                start_new_session=True,
            )
            theirs.close()
            try:
                self.on_start()
                while True:
                    await wait_readable(self.channel.fileno())
                    self.handle_message(*receive_message(self.channel))
            except (EOFError, ValueError):
                pass
            finally:
                self.ready.clear()
                self.channel.close()
                self.reap()

    def handle_message(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        for fd in fds:  # none is expected; one must not fill our table with them
            os.close(fd)
        if message.get("ready"):
            self.ready.set()
            self.proven = True
            self.failures = 0
        self.on_message(message)

    def reap(self) -> None:
        """Wait for the end of the process, whose channel is closed, or kill it."""
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message; a helper that cannot take it at once hangs, and is ended."""
        if self.channel.fileno() < 0:  # it is about to be started again
            return
        try:
            send_message(self.channel, message, fds, socket.MSG_DONTWAIT)
        except OSError as error:
            log.error("the %s does not listen: %s", self.role, error)
            self.process.kill()  # run_once sees its end

    def replace(self) -> None:
        """Start the process anew, with what it is told now."""
        if self.channel.fileno() >= 0:  # else it is waiting to be started again
            self.replaced = True
            self.process.kill()


def restart_delay(failures: int) -> float:
    """Return the seconds to wait before something that failed is tried again."""
    return min(2.0 ** min(failures, 10), MAX_RESTART_DELAY_SECONDS)


async def wait_readable(fd: int, seconds: float | None = None) -> None:
    """Wait until a descriptor can be read.

    Raises: asyncio.TimeoutError.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), seconds)
    finally:
        loop.remove_reader(fd)


async def end_tasks(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks until they have ended: `wait_for` of Python 3.11 may swallow it."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=0.5)
        for task in done:
            if not task.cancelled():
                task.exception()  # or asyncio complains that nobody has looked at it


def release_memory() -> None:
    """Give back the 8 MB that compiling and importing have used: malloc_trim(3)."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)


def last_lines(output: str) -> str:
    """Return the end of what a server said, in one line without control characters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    text = " / ".join(lines[-3:]) or "it said nothing"
    return printable(text)[-500:]


async def watch_start(terminal_fd: int, url: str) -> None:
    """Wait until a server names its address on its terminal, which is then closed.

    Raises: Error with the last lines of its output.
    """
    spawn = fdpexpect.fdspawn(
        terminal_fd, encoding="utf-8", codec_errors="replace", searchwindowsize=2000
    )
    outcomes: list[Any] = [re.compile(re.escape(url)), pexpect.EOF, pexpect.TIMEOUT]
    outcome = await spawn.expect(outcomes, timeout=START_SECONDS, async_=True)
    if outcome != 1 and spawn.async_pw_transport:  # on EOF asyncio has closed it
        spawn.async_pw_transport[1].close()
    if outcome:
        reason = ("it ended", f"no address within {START_SECONDS:.0f} s")[outcome - 1]
        words = last_lines(spawn.before or "")
        raise Error(f"the server did not start, {reason}: {words}")


def server_request(
    config: Config, certificate: Certificate, server: Server
) -> ServerRequest:
    """Return what a student's server is told; each has secrets of its own."""
    host = config.server_address.replace("{username}", server.username)
    host = host or visible_address(config)
    return ServerRequest(
        username=server.username,
        port=server.port,
        url=f"https://{host}:{server.port}/{server.username}/",
        password=hash_password(server.student.nb_pass),
        start_dir=str(config.start_dir),
        profile=config.profile,
        idle_seconds=config.idle_minutes * 60,
        idle_kernel_seconds=(config.idle_kernel_minutes or config.idle_minutes) * 60,
        cert_file=str(certificate.cert_file),
        key_file=str(certificate.key_file),
    )


class Launcher:
    """Owns the ports, has servers started, and listens in the place of those stopped.

    One mechanism serves start on demand, recovery from a crash and idle servers: a
    connection to a port whose server does not run has it started and is answered by it.
    """

    def __init__(
        self,
        config: Config,
        certificate: Certificate,
        base_listener: socket.socket,
        servers: Iterable[Server],
    ) -> None:
        self.config = config
        self.certificate = certificate
        self.fingerprint = certificate.fingerprint()
        self.base_listener = base_listener
        self.servers = {server.username: server for server in servers}
        self.pids: dict[int, str] = {}
        self.announced = False
        self.memory = 0  # of all students, in bytes
        self.starting = asyncio.Semaphore(os.cpu_count() or 1)
        self.template = Helper("template", lambda: None, self.handle_exit_report)
        self.web = Helper("webserver", self.brief_webserver, lambda _: None)

    async def run(self) -> int:
        """Serve until SIGTERM or Ctrl-C, and leave the notebook servers running."""
        loop = asyncio.get_running_loop()
        stop, reload = asyncio.Event(), asyncio.Event()
        for number in INTERRUPTS:
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        status = loop.create_task(self.show_status())
        ends = [
            loop.create_task(each)
            for each in (
                *(stop.wait(), self.start_all(reload)),
                *(self.template.run(), self.web.run()),
            )
        ]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        tend = [server.task for server in self.servers.values() if server.task]
        await end_tasks([status, *ends, *tend])
        running = self.count("running")
        say(f"The web page has ended. Notebook servers that run on: {running}.")
        for task in done:
            task.result()  # raises what went wrong in it
        if not self.announced:
            return Interrupted.exit_status
        return 1 if self.count("failed") else 0

    async def start_all(self, reload: asyncio.Event) -> None:
        """Start what has to run from the beginning, tell the teacher, then reload."""
        await asyncio.gather(self.template.ready.wait(), self.web.ready.wait())
        servers = list(self.servers.values())
        for server in servers:
            self.start_tending(server)
        await asyncio.gather(*(server.settled.wait() for server in servers))
        for line in self.summary():
            say(line)
        self.announced = True
        release_memory()
        while True:
            await reload.wait()
            reload.clear()
            try:
                await self.reload()
            except BusyError:
                reload.set()
                await asyncio.sleep(1)

    def count(self, state: str) -> int:
        return sum(server.state == state for server in self.servers.values())

    def summary(self) -> Iterator[str]:
        address = visible_address(self.config)
        yield f"{self.count('running')} of {len(self.servers)} notebook servers run."
        ports = [self.config.port, *(server.port for server in self.servers.values())]
        yield f"The firewall must let in TCP ports {min(ports)} to {max(ports)}."
        yield f"Fingerprint of the certificate (SHA-256): {self.fingerprint}"
        yield f"Ready: https://{address}:{self.config.port}/"

    async def show_status(self) -> None:
        """Keep a line on the terminal up to date, if this is one."""
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        threading.Thread(target=self.watch_memory, daemon=True).start()
        status = tqdm(bar_format="{desc}", file=sys.stderr, leave=False)
        with logging_redirect_tqdm(), status as line:
            while True:
                states = ("running", "starting", "stopped", "failed")
                counts = ", ".join(f"{self.count(state)} {state}" for state in states)
                text = (
                    f"{counts}; students hold {format_bytes(self.memory)};"
                    f" load {os.getloadavg()[0]:.1f}"
                )
                line.set_description_str(text[: shutil.get_terminal_size().columns - 1])
                await asyncio.sleep(1)

    def watch_memory(self) -> None:
        """Look again and again at what the students' processes hold.

        Runs as: a thread that nobody waits for, since a student may hold it up.
        """
        while True:
            uids = [server.uid for server in list(self.servers.values())]
            self.memory = memory_of_users(uids)
            time.sleep(MEMORY_SECONDS)

    def brief_webserver(self) -> None:
        """Tell the webserver what it shows; passwords are not part of that."""
        config = self.config
        rows = [
            (server.username, server.student.full_name[:100], server.port)
            for server in self.servers.values()
        ]
        rows.sort(key=lambda row: row[1] or row[0])  # by what is shown of them
        message = {
            "title": config.web_title,
            "address": config.server_address,
            "port": config.port,
            "cert_file": str(self.certificate.cert_file),
            "key_file": str(self.certificate.key_file),
            "shown": rows if config.list_students else [],
            "ports": {username: port for username, _, port in rows},
        }
        self.web.tell(message, [self.base_listener.fileno()])

    def start_tending(self, server: Server) -> None:
        server.task = asyncio.get_running_loop().create_task(self.tend(server))

    async def tend(self, server: Server) -> None:
        """Look after a student's server: start it when it is wanted, again and again.

        It is wanted at launch, unless on_demand, and whenever somebody connects to its
        port. What keeps failing is tried again after a delay that doubles.
        """
        wanted = not self.config.on_demand
        while True:
            if server.state != "running":
                if not wanted:
                    server.settled.set()
                    await wait_readable(server.listener.fileno())
                wanted = False
                await self.start(server)
            server.settled.set()
            started = time.monotonic()
            if server.state == "running":
                await wait_readable(server.pid_fd)
                os.close(server.pid_fd)
                server.pid_fd, server.pid = -1, 0
                server.state = "stopped"
                log.info("%s: stopped", server.username)
            if time.monotonic() - started > MAX_RESTART_DELAY_SECONDS:
                server.failures = 0
            await asyncio.sleep(restart_delay(server.failures) - 1)
            server.failures += 1

    async def start(self, server: Server) -> None:
        """Start a server; one that fails is reported.

        As many start at once as there are cores. One that takes long, for its student
        may have stopped it, does not hold others up after SLOT_SECONDS.
        """
        server.state = "starting"
        await self.starting.acquire()
        with contextlib.ExitStack() as slot:

            def give_up_slot() -> None:
                slot.close()
                server.settled.set()

            slot.callback(self.starting.release)
            loop = asyncio.get_running_loop()
            slot.callback(loop.call_later(SLOT_SECONDS, give_up_slot).cancel)
            await self.template.ready.wait()
            try:
                await self.request_server(server)
            except Exception as error:  # whatever it is, it is this student's alone
                foreseen = isinstance(error, (Error, OSError, asyncio.TimeoutError))
                text = explain(error)
                log.error("%s: %s", server.username, text, exc_info=not foreseen)
                server.state = "failed"
            else:
                server.state = "running"
                log.info(
                    "%s: started, port %d, pid %d",
                    *(server.username, server.port, server.pid),
                )

    async def request_server(self, server: Server) -> None:
        """Have the template fork a server and watch it until it is ready.

        Raises: Error, OSError or asyncio.TimeoutError; no half-started server is left.
        """
        account = find_account(server.username)
        if (
            account is None
            or account.pw_uid != server.uid
            or is_closed(server.username)
        ):
            raise Error("the account does not exist, or is closed; run setup")
        if not os.path.isdir(account.pw_dir):
            raise Error(f"{account.pw_dir} is missing; run setup")
        ensure_runtime_dir(account)
        request = server_request(self.config, self.certificate, server)
        pid, pid_fd, terminal_fd = await self.fork_server(server.listener, request)
        try:
            await watch_start(terminal_fd, request.url)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pid_fd, signal.SIGKILL)
            os.close(pid_fd)
            raise
        server.pid, server.pid_fd = pid, pid_fd
        self.pids[pid] = server.username

    async def fork_server(
        self, listener: socket.socket, request: ServerRequest
    ) -> tuple[int, int, int]:
        """Hand a request to a new fork of the template.

        Returns: its pid, a descriptor of the process, and the master of its terminal.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        terminal_fd, slave_fd = os.openpty()
        try:
            with ours, theirs:
                self.template.tell({}, [theirs.fileno()])
                theirs.close()
                fds = [listener.fileno(), slave_fd]
                send_message(ours, dataclasses.asdict(request), fds)
                await wait_readable(ours.fileno(), START_SECONDS)
                message, received = receive_message(ours)
                if "problem" in message:
                    raise Error(message["problem"])
        except BaseException as error:
            os.close(terminal_fd)
            if isinstance(error, EOFError):
                raise Error("the template process ended before it started it") from None
            raise
        finally:
            os.close(slave_fd)
        return message["pid"], received[0], terminal_fd

    def handle_exit_report(self, message: dict[str, Any]) -> None:
        """Say why a server ended, if not because it was idle or told to."""
        username = self.pids.pop(message.get("pid", 0), None)
        if username and message["wait_status"]:
            reason = explain_exit(message["wait_status"])
            log.warning(
                "%s: the server %s; its log is ~%s/%s",
                *(username, reason, username, SERVER_LOG),
            )

    async def reload(self) -> None:
        """Read the configuration and the list again; servers that run stay untouched.

        If either is bad, or cannot be read, everything goes on as before.

        Raises: BusyError if it has to be done again a little later.
        """
        outcome = Outcome()
        try:
            course = load_course(self.config.path, False)
            if course.config.port != self.config.port:
                log.warning("another `port` counts from the next launch on")
            config = dataclasses.replace(course.config, port=self.config.port)
            course = course._replace(config=config)
            certificate = ensure_certificate(config)
            fingerprint = certificate.fingerprint()
            ensure_capacity(course)
            with course.students.locked():
                gone = self.servers_not_in(course.students)
                await self.close_servers(gone)
                servers = open_servers(course, outcome, self.servers)
        except BusyError:
            raise
        except (Error, OSError) as error:
            for line in explain(error).splitlines():
                log.error("not reloaded: %s", line)
            self.brief_webserver()  # of those who have left by then
            return
        for username, reason in outcome.failures.items():
            log.error("%s: %s", username, reason)
        self.config, self.certificate = config, certificate
        new = [server for server in servers if server.task is None]
        self.servers = {server.username: server for server in servers}
        for server in new:
            self.start_tending(server)
        if fingerprint == self.fingerprint:
            self.brief_webserver()
        else:
            self.fingerprint = fingerprint
            self.web.replace()
        say(f"Reloaded: {counted(len(new), 'student')} came, {len(gone)} left.")

    def servers_not_in(self, students: StudentList) -> list[Server]:
        """Return the servers of those who are no students any more."""
        uids = {}
        for student in students.students:
            account = find_account(student.username)
            if account and student.nb_pass:
                uids[student.username] = account.pw_uid
        return [
            server
            for server in self.servers.values()
            if uids.get(server.username) != server.uid
        ]

    async def close_servers(self, servers: Sequence[Server]) -> None:
        """Give up the ports of students who left, and end their servers and kernels."""
        for server in servers:
            del self.servers[server.username]
            if server.task:
                await end_tasks([server.task])
            server.listener.close()
        known = {server.uid: {server.pid} for server in servers if server.pid}
        await asyncio.to_thread(end_families, known)
        for server in servers:
            if server.pid:
                os.close(server.pid_fd)


def visible_address(config: Config) -> str:
    """Return the host name under which the web page is announced."""
    if config.server_address:
        return config.server_address.replace("{username}.", "")
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def memory_of_users(uids: Iterable[int]) -> int:
    """Return the bytes that processes of these users hold.

    Pages that several share are divided among them: PSS, proc(5).
    """
    total = 0
    for processes in processes_by_uid(uids).values():
        for process in processes:
            with contextlib.suppress(OSError, psutil.Error):
                total += process.memory_full_info().pss
    return total


# -------------------------------------------------------------------------------------
# The web page
# -------------------------------------------------------------------------------------

STYLE = """
body { font: 1.1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 40rem;
       padding: 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; }
form { display: flex; gap: .5rem; flex-wrap: wrap; margin: 1.5rem 0; }
input, button { font: inherit; padding: .5rem .8rem; border: 1px solid #767676;
                border-radius: .4rem; }
input { flex: 100 1 12rem; min-width: 0; }
button { flex: 1 0 auto; background: #a8470b; border-color: #a8470b; color: #fff; }
ul { list-style: none; padding: 0; }
li a { display: flex; justify-content: space-between; gap: 1rem; padding: .6rem .2rem;
       border-bottom: 1px solid #ddd; color: inherit; text-decoration: none; }
li a:hover, li a:focus { background: #f6efe8; }
code { color: #666; }
.message { border-left: .3rem solid #a8470b; padding: .3rem .8rem; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #191919; } li a { border-color: #444; }
  li a:hover, li a:focus { background: #2c2620; } code { color: #aaa; }
  input { background: #222; color: inherit; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
FORM = """<form action="/" method="get">
<input name="username" aria-label="User name" placeholder="User name" required
 autocapitalize="none" autocomplete="username" spellcheck="false">
<button>Open my notebook</button>
</form>
"""


STARTING = (
    "Your notebook is being started. This page goes on to it by itself; if it has not"
    " within a minute, tell your teacher."
)


def content_security_policy() -> str:
    """Return a policy that allows this page's style and form, and nothing else.

    Browsers hold a form's redirect against form-action too, hence any https address.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action https:;"
        " base-uri 'none'; frame-ancestors 'none'"
    )


def make_page(title: str, body: str, message: str = "") -> str:
    """Return a page; title and message are escaped here, the body is HTML."""
    if message:
        body = f'<p class="message">{html.escape(message)}</p>\n{body}'
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def landing_page(
    title: str, students: Iterable[tuple[str, str, int]], message: str = ""
) -> str:
    """Return the page that lists students: user name, name, port."""
    rows = "".join(
        f'<li><a href="/{username}"><span>{html.escape(name or username)}</span>'
        f"<code>{username}</code></a></li>\n"
        for username, name, _ in students
    )
    return make_page(title, FORM + (f"<ul>\n{rows}</ul>" if rows else ""), message)


async def is_answered(port: int) -> bool:
    """Say whether a notebook server answers on a port within VISIT_SECONDS.

    The connection has a server started that does not run, as any visitor's would.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    visit = asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        _, writer = await asyncio.wait_for(visit, VISIT_SECONDS)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True


def page_handler(site: dict[str, Any]) -> type:
    """Return the handler of all requests to the base port.

    site: what the launcher has told last; see `Launcher.brief_webserver`.
    """
    from tornado import web

    class PageHandler(web.RequestHandler):
        def set_default_headers(self) -> None:
            self.set_header("Content-Security-Policy", content_security_policy())
            self.set_header("X-Content-Type-Options", "nosniff")
            self.set_header("Referrer-Policy", "no-referrer")
            self.set_header("Cache-Control", "no-store")
            self.clear_header("Server")

        def prepare(self) -> None:
            if self.request.protocol == "http":
                address = f"{visited_host(self.request)}:{site['port']}"
                self.redirect(f"https://{address}{self.request.uri}", status=307)

        async def get(self, path: str) -> None:
            """Show the page, or lead /USERNAME/anything to the student's server."""
            username, _, rest = path.partition("/")
            asked = self.get_query_argument("username", None)
            if not path and asked is None:
                await self.finish(landing_page(site["title"], site["shown"]))
                return
            if not path:
                username = asked.strip().lower() if asked else ""
            if username not in site["ports"]:
                self.set_status(404)
                message = f"Nobody here has the user name “{username}”."
                await self.finish(landing_page(site["title"], site["shown"], message))
            elif not await is_answered(site["ports"][username]):
                self.set_status(503)
                self.set_header("Refresh", "1")  # the same address again
                await self.finish(make_page(site["title"], "", STARTING))
            else:
                query = f"?{self.request.query}" if path and self.request.query else ""
                self.lead_to(username, urllib.parse.quote(rest) + query)

        def lead_to(self, username: str, target: str) -> None:
            address = site["address"] or visited_host(self.request)
            host = address.replace("{username}", username)
            port = site["ports"][username]
            self.redirect(f"https://{host}:{port}/{username}/{target}")

    return PageHandler


def visited_host(request: Any) -> str:
    """Return the host name that the visitor used, without the port."""
    host: str = request.host_name
    plain = re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", host)
    return host if plain else socket.getfqdn()


async def serve_web_page(
    channel: socket.socket, site: dict[str, Any], context: ssl.SSLContext, fd: int
) -> None:
    """Serve the base port until the launcher is gone: TLS, or a redirect to it.

    The first byte of a connection tells which: 22 opens a TLS handshake (RFC 8446).
    """
    from tornado import httpserver, iostream, tcpserver, web

    server = httpserver.HTTPServer(
        web.Application([(r"/(.*)", page_handler(site))]),
        no_keep_alive=True,
        idle_connection_timeout=PAGE_SECONDS,
        body_timeout=PAGE_SECONDS,
        max_header_size=16384,
        max_body_size=1024,
    )

    class FirstByteServer(tcpserver.TCPServer):
        async def handle_stream(
            self, stream: iostream.IOStream, address: tuple[Any, ...]
        ) -> None:
            try:
                await wait_readable(stream.socket.fileno(), PAGE_SECONDS)
                first = stream.socket.recv(1, socket.MSG_PEEK)
                if first == b"\x16":
                    handshake = stream.start_tls(True, context)
                    stream = await asyncio.wait_for(handshake, PAGE_SECONDS)
                server.handle_stream(stream, address)
            except (OSError, asyncio.TimeoutError, iostream.StreamClosedError):
                if stream.socket:  # else start_tls has it, and has closed it
                    stream.close()

    listener = socket.socket(fileno=fd)
    listener.setblocking(False)
    FirstByteServer().add_socket(listener)
    with contextlib.suppress(OSError):  # the launcher is gone: seen below
        send_message(channel, {"ready": True})
    await follow_launcher(channel, site)


async def follow_launcher(channel: socket.socket, site: dict[str, Any]) -> None:
    """Take what the launcher tells until it is gone."""
    while True:
        await wait_readable(channel.fileno())
        try:
            message, fds = receive_message(channel)
        except EOFError:
            return
        for fd in fds:  # the listening socket, again
            os.close(fd)
        site.update(message)


def run_webserver(channel: socket.socket) -> None:
    """Serve the landing page.

    Runs as: root until the key is read, then nobody. As it changed its ids without
    executing anything, other processes of nobody's can neither trace nor read it.
    """
    setproctitle.setproctitle(WEBSERVER_TITLE)
    logging.getLogger("tornado").setLevel(logging.ERROR)  # not each bad request
    try:
        message, (fd,) = receive_message(channel)
    except EOFError:
        return
    certificate = Certificate(Path(message["cert_file"]), Path(message["key_file"]))
    context = certificate.context()
    nobody = pwd.getpwnam("nobody")
    drop_privileges(Identity(nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid,)))
    release_memory()
    asyncio.run(serve_web_page(channel, message, context, fd))


# -------------------------------------------------------------------------------------
# Commands
# -------------------------------------------------------------------------------------


def command_setup(course: Course) -> int:
    """Make what is missing: group, accounts, passwords, directories, profiles.

    Passwords are in the list before an account has them, and which accounts have none
    yet can be seen: a setup that was interrupted anywhere is finished by the next one.
    """
    check_reachable()
    check_programs()
    config, students = course.config, course.students
    students.check_writable()
    warn_of_strays(course)
    if config.profile and not profile_dir(config.profile).is_dir():
        log.warning("there is no %s to copy", profile_dir(config.profile))
    outcome = Outcome()
    counts = {"new": 0, "adopted": 0, "kept": 0}
    with students.locked():
        renewed = prepare_passwords(config, students)
        if config.group:
            run_program(["groupadd", "--force", "--", config.group])
        done = ensure_accounts(config, students.students, outcome)
        furnish = functools.partial(furnish_home, config)
        results = for_each_student(furnish, done)
        for student, result in progress(results, len(done), "homes"):
            if isinstance(result, Error):
                outcome.failed(student.username, str(result))
            else:
                counts[done[student]] += 1
                outcome.done(student.username, done[student])
        students.save()  # if it was changed meanwhile, the passwords are not lost
    reload_launcher(config.port)
    passwords = f"; {renewed} got new system passwords" if renewed else ""
    return outcome.finish(
        f"{counted(counts['new'], 'account')} made, {counts['adopted']} adopted,"
        f" {counts['kept']} kept{passwords}. The passwords are in {students.path}."
    )


def ensure_accounts(
    config: Config, students: Sequence[Student], outcome: Outcome
) -> dict[Student, str]:
    """Make the accounts, with passwords; return what was done for whom."""
    done = {}
    try:
        for student in progress(students, len(students), "accounts"):
            try:
                done[student] = ensure_account(student, config.group)
            except (Error, OSError) as error:
                outcome.failed(student.username, explain(error))
    finally:
        with uninterrupted():
            set_missing_passwords(students)
    return done


def prepare_passwords(config: Config, students: StudentList) -> int:
    """Fill the empty password cells of the list and save it.

    An account of ours whose system password is not in the list any more loses it, so
    that it gets the new one. Returns: how many did.
    """
    make = functools.partial(make_password, config.password_length)
    renewed = 0
    for student in students.students:
        account = find_account(student.username)
        if not student.nb_pass:
            students.update(student.username, nb_pass=make())
        if not student.sys_pass and (account is None or is_ours(account)):
            if account:
                run_program(["usermod", "--password", "!", "--", student.username])
                renewed += 1
            students.update(student.username, sys_pass=make())
    students.save()
    return renewed


def furnish_home(config: Config, student: Student) -> None:
    """Make the home and the tutorial directory in it, and copy the IPython profile."""
    account = pwd.getpwnam(student.username)
    ensure_home(account)
    home, writer = Path(account.pw_dir), identity_of(account)
    os.close(open_directory(home, config.tutorial_dir.parts, writer, create=True))
    source = profile_dir(config.profile)
    if config.profile and source.is_dir():
        reader = identity_of(invoking_account())
        copy = TreeCopy(reader, writer, wanted=is_profile_file)
        problem = copy.run(source, (), home, source.parts[-2:]).problem
        if problem:
            raise Error(f"the IPython profile: {problem}")


def send_to(config: Config, student: Student) -> CopyReport:
    """Copy the material into one home."""
    account = pwd.getpwnam(student.username)
    reader, writer = identity_of(invoking_account()), identity_of(account)
    copy = TreeCopy(reader, writer, backup=config.keep_changed)
    parts = config.material_name.parts
    return copy.run(config.material_dir, (), Path(account.pw_dir), parts)


def command_send(course: Course) -> int:
    """Copy the material into each account, over what is there."""
    config = course.config
    try:
        os.close(
            open_directory(config.material_dir, (), identity_of(invoking_account()))
        )
    except Error as error:
        raise UsageError(f"{config.path}: [Setup] material_dir: {error}") from None
    return copy_for_all(course, "send", functools.partial(send_to, config))


def storage_owner(config: Config) -> pwd.struct_passwd:
    return pwd.getpwnam(config.owner) if config.owner else invoking_account()


def retrieve_from(
    config: Config, student: Student, dry_run: bool = False
) -> CopyReport:
    """Copy one student's tutorial directory into the storage, or count what that is."""
    home = Path(pwd.getpwnam(student.username).pw_dir)
    if config.storage_dir.is_relative_to(home / config.tutorial_dir):
        raise Error("storage_dir lies in what is to be retrieved; set another")
    copy = TreeCopy(
        reader=identity_of(pwd.getpwnam(student.username)),
        writer=identity_of(storage_owner(config)),
        backup=True,
        limit=config.retrieve_limit,
        dry_run=dry_run,
    )
    parts = config.tutorial_dir.parts
    return copy.run(home, parts, config.storage_dir, (student.username,))


def command_retrieve(course: Course) -> int:
    """Copy the students' work into the storage; nothing there is lost."""
    config = course.config
    owner = storage_owner(config)
    try:
        with acting_as(identity_of(owner)):
            config.storage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{config.path}: [Shutdown] storage_dir: {config.storage_dir} cannot be"
            f" made by its owner {owner.pw_name}: {error.strerror}"
        ) from None
    return copy_for_all(course, "retrieve", functools.partial(retrieve_from, config))


def copy_for_all(
    course: Course, label: str, copy: Callable[[Student], CopyReport]
) -> int:
    """Copy for all students and report it."""
    outcome = Outcome()
    total = CopyReport()
    with course.students.locked():
        students = with_accounts(course, outcome)
        if not students:
            raise UsageError(
                f"{course.students.path}: nobody has an account; run setup"
            )
        results = for_each_student(copy, students)
        for student, result in progress(results, len(students), label):
            if isinstance(result, Error):
                outcome.failed(student.username, str(result))
                continue
            outcome.done(student.username, str(result))
            if result.problem:
                outcome.failed(student.username, result.problem)
            total.add(result)
    return outcome.finish(
        f"{counted(len(students), 'student')}: {total};"
        f" {format_bytes(total.copied_bytes)} copied."
    )


def command_launch(course: Course) -> int:
    """Start the servers and serve the web page until SIGTERM or Ctrl-C.

    SIGHUP, as `setup` and `remove` send it, has it read configuration and list again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until it is handled
    setproctitle.setproctitle(LAUNCHER_TITLE)
    if not sys.stderr.isatty():
        log.setLevel(min(log.level, logging.INFO))  # a line per event
    check_reachable()
    config, students = course.config, course.students
    if not any(x.nb_pass and find_account(x.username) for x in students.students):
        raise UsageError(
            f"{students.path}: nobody has an account and a password; run setup"
        )
    ensure_capacity(course)
    certificate = ensure_certificate(config)
    base_listener = bind_base_port(config.port)
    outcome = Outcome()
    with students.locked():
        servers = open_servers(course, outcome, {})
    for username, reason in outcome.failures.items():
        log.error("%s: %s", username, reason)
    status = asyncio.run(Launcher(config, certificate, base_listener, servers).run())
    return 1 if outcome.failures else status


def bind_base_port(port: int) -> socket.socket:
    """Return the listening socket of the web page.

    Raises: UsageError that names who holds the port.
    """
    try:
        return bind_port(port)
    except OSError as error:
        launcher = find_launcher(port)
        if launcher:
            raise UsageError(
                f"launch runs already (pid {launcher}); end that, or leave it: `setup`"
                " brings new students into it"
            ) from None
        holder = describe_holder(find_listeners(), port)
        reason = os.strerror(error.errno or 0)
        raise UsageError(
            f"port {port}: {reason}: {holder}; end that, or set another `port`"
        ) from None


def command_shutdown(course: Course) -> int:
    """End the notebook servers, kernels and terminals of all students at once."""
    warn_of_strays(course)
    outcome = Outcome()
    students = [x for x in course.students.students if find_account(x.username)]
    problems = stop_jupyter(students)
    for student, result in for_each_student(clear_runtime_dir, students):
        if student.username in problems:
            outcome.failed(student.username, problems[student.username])
        elif isinstance(result, Error):
            outcome.failed(student.username, str(result))
        else:
            outcome.done(student.username, "shut down")
    launcher = find_launcher(course.config.port)
    if launcher:
        log.warning(
            "launch still runs (pid %d) and starts servers again when they are visited;"
            " end it with Ctrl-C or SIGTERM",
            launcher,
        )
    return outcome.finish(
        f"The notebooks of {counted(len(students), 'student')} are shut down."
    )


def command_remove(course: Course) -> int:
    """Delete the accounts that setup made, after asking."""
    check_programs()
    config, students = course.config, course.students
    students.check_writable()
    warn_of_strays(course)
    outcome = Outcome()
    present = [x for x in students.students if find_account(x.username)]
    ours = [x for x in present if is_ours(find_account(x.username))]
    others = [x for x in present if x not in ours]
    if present:
        describe_removal(config, ours, others)
    if ours and not course.yes:
        accounts = counted(len(ours), "account")
        confirm(f"Delete {accounts} and everything in their homes?")
    with students.locked():
        # What has changed since the question: fewer may be deleted, but no others.
        ours = [x for x in ours if x.username in students]
        ours = [x for x in ours if is_ours(find_account(x.username))]
        ended = end_accounts(ours, outcome)
        deleted = 0
        for student in progress(ended, len(ended), "remove"):
            students.forget(student.username)
            try:
                remove_account(pwd.getpwnam(student.username))
                outcome.done(student.username, "account and home deleted")
                deleted += 1
            except (Error, OSError) as error:
                outcome.failed(student.username, explain(error))
        others = [x for x in others if x.username in students]
        for student in others:
            leave_group(student.username, config.group)
            students.update(student.username, nb_pass="", port="")
            outcome.done(student.username, "not made by setup; the account stays")
        students.save()
    reload_launcher(config.port)
    group = config.group and remove_empty_group(config.group)
    return outcome.finish(
        f"{counted(deleted, 'account')} deleted, {len(others)} left"
        f"{f', group {config.group} deleted' if group else ''}."
    )


def end_accounts(students: Sequence[Student], outcome: Outcome) -> list[Student]:
    """End all that these students run, and return those with whom that worked."""
    accounts = {student: pwd.getpwnam(student.username) for student in students}
    ended = []
    for student, account in accounts.items():
        try:
            end_account(account)
            ended.append(student)
        except (Error, OSError) as error:
            outcome.failed(student.username, explain(error))
    delete_public_files([accounts[student].pw_uid for student in ended])
    return ended


def describe_removal(
    config: Config, students: Sequence[Student], others: Sequence[Student]
) -> None:
    """Say what remove will delete, and what would be lost."""
    sizes = {}
    newer = []
    look = functools.partial(look_at_home, config)
    for student, result in for_each_student(look, students):
        if not isinstance(result, Error):
            sizes[student.username], changed = result
            if changed:
                newer.append(student.username)
    total = format_bytes(sum(sizes.values()))
    accounts = counted(len(students), "account")
    say(f"{accounts} that setup made, with {total}, will be deleted.")
    for other in others:
        say(f"{other.username} was not made by setup: it only leaves the course.")
    names = {student.username for student in students}
    here = sorted({user.name for user in psutil.users()} & names)
    if here:
        say(f"Logged in at this moment: {', '.join(here)}.")
    if newer:
        say(f"Work that was not retrieved: {', '.join(sorted(newer))}.")


def look_at_home(config: Config, student: Student) -> tuple[int, bool]:
    """Return how many bytes a home holds, and whether there is work to be retrieved."""
    account = pwd.getpwnam(student.username)
    identity = identity_of(account)
    home_fd = open_directory(Path(account.pw_dir), (), identity)
    size = directory_bytes(home_fd, time.monotonic() + LOOK_SECONDS)
    try:
        report = retrieve_from(config, student, dry_run=True)
    except Error:
        return size, False
    return size, bool(report.new or report.updated or report.over_limit)


def directory_bytes(fd: int, deadline: float, depth: int = 0) -> int:
    """Return what a directory's files occupy, as far as it can be seen in that time.

    Closes `fd`.
    """
    total = 0
    with os.scandir(fd) as entries:
        for entry in entries:
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH:
                    inner = os.open(entry.name, DIRECTORY_FLAGS, dir_fd=fd)
                    total += directory_bytes(inner, deadline, depth + 1)
    os.close(fd)
    return total


def confirm(question: str) -> None:
    """Ask the teacher.

    Raises: UsageError if the answer is not yes, or nobody can answer.
    """
    if not sys.stdin.isatty():
        raise UsageError("nothing was deleted: without a terminal this needs --yes")
    try:
        answer = input(f"{question} [yes/no] ")
    except EOFError:
        say("")
        answer = ""
    except KeyboardInterrupt:
        say("")
        raise Interrupted("interrupted; nothing was deleted") from None
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was deleted")


# -------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------


COMMANDS: dict[str, Callable[[Course], int]] = {
    "setup": command_setup,
    "send": command_send,
    "launch": command_launch,
    "shutdown": command_shutdown,
    "retrieve": command_retrieve,
    "remove": command_remove,
}
# What this script is executed as by the launcher, with the number of a descriptor.
ROLES = {"template": run_template, "webserver": run_webserver}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="notebooks.py",
        description="A Jupyter Notebook server for every student, on one host.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        text = str(command.__doc__).partition("\n")[0]
        example = f"Example: sudo notebooks.py {name} course.cfg"
        sub = commands.add_parser(name, help=text, description=text, epilog=example)
        sub.add_argument(
            "config",
            nargs="?",
            type=Path,
            default=Path("notebooks.cfg"),
            help="configuration file (%(default)s)",
        )
        sub.add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="say more; -vv also which programs are run",
        )
        if name == "remove":
            sub.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def ensure_standard_streams() -> None:
    """Open /dev/null in the place of those that were closed, as by `>&-`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: all done; 1: some students failed; 2: nothing was changed; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    ensure_standard_streams()
    logging.basicConfig(format="notebooks.py: %(message)s", level=logging.WARNING)
    if len(arguments) == 2 and arguments[0] in ROLES and arguments[1].isdigit():
        ROLES[arguments[0]](socket.socket(fileno=int(arguments[1])))
        return 0
    options = make_parser().parse_args(arguments)
    os.umask(0o022)  # root's may be 077, and students must get at what is theirs
    log.setLevel(
        (logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)]
    )
    try:
        if os.geteuid() != 0:
            raise UsageError(
                f"{options.command} needs root: run `sudo notebooks.py"
                f" {options.command} ...`"
            )
        if options.command == "launch" and not sys.flags.isolated:
            os.execv(sys.executable, script_command(*arguments))
        course = load_course(options.config, getattr(options, "yes", False))
        return COMMANDS[options.command](course)
    except Error as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return error.exit_status
    except OSError as error:
        log.debug("what failed:", exc_info=True)
        hint = "; make room and run the same command again"
        log.error("%s%s", explain(error), hint if error.errno in FULL else "")
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command, run again, finishes the work")
        return 130


if __name__ == "__main__":
    sys.exit(main())
