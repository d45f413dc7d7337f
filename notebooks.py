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
(`students.csv`). There is no other state but the last uid that was given out: the CSV file
is the user database, passwd and group say which accounts exist and which are whose course's
(by a mark in their GECOS field), the process table and the listening sockets say what runs.

In this file a *student* is a row of the list, an *account* an entry of passwd, and a
*member* both together. Whatever happens in a student's home happens with that student's
ids, and root follows no path there; only `remove` deletes as root, after it has ended all
that the student runs. A *worker*, a process for one member, does whatever a student could
hold up; it is given up when it shows no sign of life.

`launch` consists of these processes:

launcher   root     holds all ports, has servers started and watches them; it waits on
                    sockets and never reads from the network
template   root     has imported Jupyter once; forks one notebook server per request and
                    never sees a password or anything else of a student's
webserver  nobody   the landing page on the base port; looks whether a gateway is there
server     student  one Jupyter Notebook server per student, on a port of its own

Template and webserver are the launcher's helpers: this script, executed afresh with one end
of a channel. Each ends when the other end is gone. SIGHUP has the launcher read
configuration and list again; `setup` and `remove` send it. SIGTERM and Ctrl-C end the
launcher and its helpers; the servers run on. These are all messages between our processes:

message      from      to        descriptors        says
Ready        helper    launcher  -                  it can do its work from now on
ForkRequest  launcher  template  end of a channel   fork: an order comes through that
ServerOrder  launcher  fork      listening socket,  run this student's server
                                 end of a pipe
Forked       fork      launcher  pidfd of the fork  it has taken the order
Exited       template  launcher  -                  a fork's pid and its exit code
Trial        fork      template  -                  how all extensions have started
Site         launcher  webserver listening socket   what the landing page shows
Certificate  launcher  server    -                  new connections see this one
NewPassword  webserver launcher  -                  what a student wishes; it comes back
                                                    with the answer
SignOfLife   worker    command   -                  it is not stuck
Done         worker    command   -                  what the work returned
Failed       worker,   command,  -                  why the work, or the fork, could not be
             template  launcher                     done

`Certificate`, `Language` and `Gateway` are parts of a Site and a ServerOrder, too; of a
gateway, from which kernels may come, only the servers are told the token.

One start of a server, in the order of time, from left to right and back:

launcher                          template              fork (root, then the student)
1 Server.tend        is wanted
2 Server.start       has a slot
3 Server.start_once  has an order
4 Template.fork   --ForkRequest-> 5 fork_on_request --> take_order
                  --ServerOrder (through the new channel)-> .
                  <-Forked, or Failed from the template --- .
                                                        6 become_server  drops privileges
                                                        7 make_app       builds Jupyter
                                                        8 serve          prints its address
9 watch_start     <-the address, through the pipe---------- .
                                                          move_output_to_log
  Server.wait_for_end  <-Exited-- report_exits

A server is wanted at launch, or when somebody connects to its port, on which the launcher
listens while no server runs. A template that dies before it has forked closes the new
channel: `Template.fork` raises, `Server.start` reports it, `Template.run` starts another
template, and the next visit starts the server. A fork needs its template no more.
"""

import argparse
import array
import asyncio
import base64
import bisect
import codecs
import collections
import configparser
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import grp
import hashlib
import hmac
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import pwd
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import site
import socket
import ssl
import stat
import string
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NewType, NoReturn, TypeVar, dataclass_transform

CURE = "run the notebooks.py that `sudo make install` puts into /usr/local/bin"
if Path(__file__).resolve().parent == Path(sys.executable).parent.resolve():
    CURE = "run `sudo make install` again (was Python upgraded?)"  # it is that one
try:
    import pexpect
    import psutil
    import setproctitle
    from pexpect import fdpexpect
except ImportError as missing:
    print(f"notebooks.py: {sys.executable} lacks {missing.name}; {CURE}", file=sys.stderr)
    sys.exit(2)

__version__ = "1.0.0"

log = logging.getLogger("notebooks")

Value = TypeVar("Value")


# == Errors, and words for people ==========================================================
#
# Whatever can be foreseen to go wrong is an `Error`, whose message says what to do. Only
# `main` ends the program with one; a bug keeps its traceback.


class Error(Exception):
    """Something that can be foreseen went wrong; the message says what to do."""

    exit_status = 1


class Interrupted(Error):
    """The teacher ended it before it had done anything that stays."""

    exit_status = 130


class UsageError(Error):
    """The command line, the configuration or the list is wrong; nothing was changed."""

    exit_status = 2


class BusyError(UsageError):
    """Another notebooks.py works with the list."""


class StuckError(Error):
    """A student holds one of our processes up, in the kernel."""


def printable(text: str) -> str:
    """Return text that others made, without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def explain(error: Exception) -> str:
    """Return an error's message; for an OSError, without "[Errno N]"."""
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    name = f": {str(error.filename)[:500]!r}" if error.filename is not None else ""
    return f"{error.strerror or str(error) or type(error).__name__}{name}"


def explain_exit(code: int) -> str:
    """Say how a process ended, by its exit status or the negative of a signal."""
    if code >= 0:
        return f"ended with exit status {code}"
    return f"was ended by signal {-code} ({signal.strsignal(-code)})"


class PrintableFormatter(logging.Formatter):
    """Leaves out of each line what would steer a terminal: students wrote some of it."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def say(text: str) -> None:
    """Print a line for the teacher, above the status line if there is one."""
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            from tqdm import tqdm

            tqdm.write(text)
        else:
            print(text)
    flush_output()


def flush_output() -> None:
    """Flush what was printed; where nobody reads any more, write to nowhere from now on."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null_fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_fd, stream.fileno())
            os.close(null_fd)


def progress(steps: Iterable[Value], total: int, label: str) -> Iterable[Value]:
    """Pass steps on, with a bar if this is a terminal."""
    if not sys.stderr.isatty() or log.isEnabledFor(logging.DEBUG):
        return steps
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would forbid to fork workers
    return tqdm(steps, label, total, leave=False, unit="student", file=sys.stderr)


@functools.cache
def full_host_name() -> str:
    """Return this host's name, for which DNS is asked but once: it may not answer."""
    return socket.getfqdn()


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the right form."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def format_bytes(count: int) -> str:
    """Return a number of bytes as people read it, such as 1.5 GB; `1G` is 1.0 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word closest to a misspelt one."""
    words = {each.lower(): each for each in known}
    for close in difflib.get_close_matches(word.lower(), words, 1):
        return f"did you mean `{words[close]}`?"
    return "known are " + ", ".join(words.values())


def confirm(question: str, otherwise: str) -> None:
    """Ask the teacher; raises UsageError, unless the answer is yes."""
    if not sys.stdin.isatty():
        raise UsageError(f"{otherwise}: without a terminal this needs --yes")

    answer = ""
    try:
        answer = input(f"{question} [yes/no] ")
    except (EOFError, KeyboardInterrupt) as error:
        say("")  # the prompt's line has no end yet
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {otherwise}") from None

    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError(otherwise)


# == Tools: programs and files =============================================================
#
# System programs do what they do best. A file that we write is complete at any moment.

# Where programs are looked for, and those without which setup and remove do not begin.
PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNT_PROGRAMS = (
    *("useradd", "usermod", "userdel", "groupadd", "groupdel", "gpasswd", "chpasswd"),
    *("find", "ipcrm"),
)
DELETE_SECONDS = 300.0  # for a home with millions of files
HEARTBEAT_SECONDS = 1.0
STUCK_SECONDS = 20.0  # without a sign of life
STUCK = (
    "something of theirs does not answer, such as a FUSE file system; end all they run"
    " (notebooks.py shutdown --everything --only NAME), and try again"
)
# Arguments: the new file, the one beside it, and what more the script needs.
WRITE_FILE = 'umask 077; set -C; {} && exit; rm -f -- "$1"; exit 1'
REPLACE_FILE = 'cat >"$1" && chown "$3" -- "$1" && sync -- "$1" && mv -T -- "$1" "$2"'
TRY_FILE = ': >"$1" && rm -- "$1"'
LOCK_DIR = Path("/run")  # of root's files, which no student can open and lock
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # what ends us: Ctrl-C and kill(1)


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
    """Run a system program; return what it printed, or raise Error with its last words."""
    log.debug("running %s", shlex.join(argv))
    program = shutil.which(argv[0], path=PROGRAM_PATH)
    if not program:
        raise Error(f"the program {argv[0]} is not installed on this machine")

    # Ctrl-C must leave no account database half written or locked. So it waits for the
    # program's end, and the program's own session keeps it, and any signal to our process
    # group, from the program. If we are killed, our pipe breaks: the program inherits that
    # SIGPIPE is ignored, or a useradd would die of its next word.
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
            restore_signals=False,
        )

    if done.returncode:
        words = done.stderr.strip() or f"exit status {done.returncode}"
        lines = [line.removeprefix(f"{argv[0]}: ") for line in words.splitlines()]
        lines = list(dict.fromkeys(lines))  # PAM says what is wrong at each try
        raise Error(f"{argv[0]}: {' / '.join(lines[-4:])}{lock_holders()}")
    return done.stdout


def lock_holders() -> str:
    """Say which processes keep account files locked, such as a chfn(1) that was stopped.

    Source: lckpwdf(3), and shadow's own files, which hold a pid.
    """
    holders = ""
    for path in Path("/etc").glob("*.lock"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid = int(path.read_text().strip("\0\n "))
            name = printable(Path(f"/proc/{pid}/comm").read_text().strip())
            # To kill one that works might leave half a file.
            is_stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
            hint = f"`kill -KILL {pid}` ends it" if is_stopped else "wait for its end"
            holders += f"; pid {pid} ({name}) holds {path}: {hint}"
    return holders


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(what: str, wait: bool) -> Iterator[None]:
    """Hold a lock of this host against other notebooks.py; raises BusyError."""
    fd = os.open(LOCK_DIR / f"{what}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with closing(fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(
                "another notebooks.py works with it; wait until that is done"
            ) from None
        yield


def host_locked() -> contextlib.AbstractContextManager[None]:
    """Wait until no other course's command changes accounts, and keep others waiting."""
    return locked("notebooks", wait=True)


@uninterrupted()
def write_beside(path: Path, script: str, data: bytes, *arguments: str) -> None:
    """Have a shell make a new file beside one, of mode 0600, and do something with it.

    A student who can read a directory can block every writer in it for ever: getdents(2)
    locks it while it fills memory that may be mapped from a FUSE file system. So a shell
    writes, and we wait for it, but not for long. Raises: OSError, with the shell's words.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    command = ["sh", "-c", WRITE_FILE.format(script), "sh", str(temporary), str(path)]
    with (
        closing(os.memfd_create("data")) as data_fd,
        closing(os.memfd_create("words")) as words_fd,
    ):
        os.write(data_fd, data)
        os.lseek(data_fd, 0, os.SEEK_SET)
        root, streams = identity_of(pwd.getpwuid(0)), {"stdin": data_fd, "stderr": words_fd}

        try:
            if run_as(root, [*command, *arguments], STUCK_SECONDS, **streams):
                return

            words = os.pread(words_fd, 1000, 0).decode(errors="replace")
            reason = words.strip().rpartition(": ")[2] or "the shell was killed"
        except StuckError:
            place = shlex.quote(str(path.parent))
            reason = (
                "somebody keeps its directory locked, as students can whom it lets in:"
                f" `chmod go-r {place}`, end what they run (notebooks.py shutdown"
                " --everything), and try again"
            )

    numbers = {os.strerror(number): number for number in errno.errorcode}
    raise OSError(numbers.get(reason, errno.EIO), reason, str(path))


def replace_private_file(path: Path, data: bytes, uid: int, gid: int) -> None:
    """Replace a file by one of mode 0600; raises OSError."""
    write_beside(path, REPLACE_FILE, data, f"{uid}:{gid}")


# == Tools: messages =======================================================================
#
# Our processes talk by sending dataclasses over pairs of sockets that keep records apart.
# The table of all messages is in this module's docstring. A new one is a subclass of
# `Message`, beside its sender or receiver, and a line in the table.

MAX_MESSAGE_BYTES = 1 << 20
MAX_MESSAGE_DESCRIPTORS = 4
TAG = "@message"  # no student has this user name
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>


@dataclass_transform(frozen_default=True)
class Message:
    """What a process tells another, as JSON; each subclass becomes a (frozen) dataclass."""

    def __init_subclass__(cls, frozen: bool = True) -> None:
        dataclasses.dataclass(frozen=frozen)(cls)


def decode_message(data: bytes) -> Message:
    """Return the message again; raises ValueError for anything else."""
    kinds = {kind.__name__: kind for kind in Message.__subclasses__()}

    def as_message(fields: dict[str, Any]) -> Any:
        kind = kinds.get(fields.pop(TAG, ""))
        return kind(**fields) if kind else fields

    try:
        message = json.loads(data, object_hook=as_message)
    except (ValueError, TypeError, RecursionError):
        message = None
    if not isinstance(message, Message):
        raise ValueError("it does not send messages")
    return message


class Channel(socket.socket):
    """One end of a connection between two of our processes: unix(7), SOCK_SEQPACKET."""

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            # A long list of students is one message. In a container the usual 200 kB do.
            with contextlib.suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, MAX_MESSAGE_BYTES)
        ours, theirs = (cls(fileno=end.detach()) for end in ends)
        return ours, theirs

    def send_message(
        self, message: Message, fds: Sequence[int] = (), wait: bool = True
    ) -> None:
        """Send a message with descriptors; raises OSError if the other side takes none."""
        # Not socket.send_fds, which ignores its flags up to Python 3.11.
        # Each message is an object of its fields and its class's name.
        data = json.dumps(
            message, default=lambda part: {TAG: type(part).__name__, **vars(part)}
        ).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self.sendmsg([data], [rights] if fds else [], 0 if wait else socket.MSG_DONTWAIT)

    def receive_message(self) -> tuple[Message, list[int]]:
        """Receive a message; raises EOFError at the end, and ValueError for nonsense."""
        # Not socket.recv_fds: in Python 3.11 it ignores its flags, and what it returns is
        # inherited by programs.
        size = MAX_MESSAGE_DESCRIPTORS * 4
        try:
            data, ancillary, _, _ = self.recvmsg(
                MAX_MESSAGE_BYTES, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            data, ancillary = b"", []
        fds = array.array("i")
        for _, _, content in ancillary:  # descriptors: we asked unix(7) for nothing else
            fds.frombytes(content)

        try:
            if not data:
                raise EOFError
            return decode_message(data), fds.tolist()
        except (EOFError, ValueError):
            for fd in fds:  # nobody will know of them
                os.close(fd)
            raise

    async def messages(self) -> collections.abc.AsyncIterator[Message]:
        """Yield what comes until the other side is gone; raises ValueError for nonsense."""
        with contextlib.suppress(EOFError):
            while True:
                await wait_readable(self.fileno())
                message, fds = self.receive_message()
                for fd in fds:  # or a helper that was taken over could fill our table
                    os.close(fd)
                yield message


def is_readable(fd: int, seconds: float = 0) -> bool:
    """Wait until a descriptor can be read, and say whether that has come."""
    poll = select.poll()  # select(2) knows no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


async def wait_readable(fd: int, seconds: float | None = None) -> None:
    """Wait until a descriptor can be read, or raise TimeoutError."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), seconds)
    finally:
        loop.remove_reader(fd)


class Strangers:
    """The connections of those who have not logged in, of which there may be so many.

    When there are more, the oldest ends, of the address from which most have come.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.sources: dict[socket.socket, str] = {}  # the oldest first

    def admit(self, connection: socket.socket, address: str) -> None:
        source = ipaddress.ip_address(address.partition("%")[0])
        if source.version == 6:  # one host has all addresses that begin alike
            prefix = ipaddress.ip_network((source, 64), strict=False)
            source = source.ipv4_mapped or prefix.network_address

        self.sources[connection] = str(source)
        if len(self.sources) <= self.most:
            return

        self.sources = {x: y for x, y in self.sources.items() if x.fileno() >= 0}
        if len(self.sources) > self.most:
            crowd, _ = collections.Counter(self.sources.values()).most_common(1)[0]
            oldest = next(x for x, y in self.sources.items() if y == crowd)
            self.forget(oldest)
            with contextlib.suppress(OSError):  # it has just ended
                # Its reader finds the end of the stream, and closes it. TLS is not ended:
                # that would change the SSLSocket under its reader.
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)

    def forget(self, connection: socket.socket) -> None:
        self.sources.pop(connection, None)


async def end_tasks(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    """Cancel tasks until they have ended: `wait_for` of Python 3.11 may swallow it."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=0.5)
        for task in done:
            if not task.cancelled():
                task.exception()  # or asyncio complains that nobody has looked at it


# == Tools: processes of our own ===========================================================
#
# `Process` is any process, held by a descriptor. `Child` is one that we have started, with
# a channel to it: workers, the template and the webserver are children. Each of our forks
# goes through `fork_process`.

MAX_RESTART_DELAY_SECONDS = 60.0
M_MMAP_THRESHOLD = -3  # <malloc.h>


class Process:
    """A process, held by a descriptor whatever becomes of its pid: pidfd_open(2)."""

    def __init__(self, pid: int, pid_fd: int | None = None) -> None:
        """Raises: ProcessLookupError if there is none."""
        self.pid = pid
        self.pid_fd = os.pidfd_open(pid) if pid_fd is None else pid_fd

    def close(self) -> None:
        """Let go of it; a second time, after Ctrl-C, does nothing."""
        pid_fd, self.pid_fd = self.pid_fd, -1
        if pid_fd >= 0:
            os.close(pid_fd)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pid_fd, number)


def fork_process(function: Callable[[], object], keep: Collection[int] = ()) -> int:
    """Fork; the child, which holds only `keep`, calls the function and never returns."""
    # A lock that another thread holds at this moment would never be released.
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a process that has several threads must not fork")

    flush_output()  # or both of us print it
    pid = os.fork()
    if pid:
        return pid

    status = 1
    try:
        kept = [2, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
        for fd, next_fd in itertools.pairwise(kept):
            os.closerange(fd + 1, next_fd)
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        status = Interrupted.exit_status
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            flush_output()
        finally:  # nothing may return to what the parent does
            os._exit(status)


class Child(Process):
    """A process that we have started, and our end of a channel to it."""

    popen: "subprocess.Popen[bytes] | None" = None  # of one that was executed

    def __init__(self, pid: int, channel: Channel) -> None:
        super().__init__(pid)
        self.channel = channel

    @classmethod
    def fork(cls, function: Callable[[Channel], object]) -> "Child":
        """Have a fork of this process call a function with its end of the channel."""
        ours, theirs = Channel.pair()
        with theirs:
            pid = fork_process(lambda: function(theirs), {theirs.fileno()})
        return cls(pid, ours)

    @classmethod
    def execute(cls, role: str, home: Path, course: Path) -> "Child":
        """Execute this script afresh, in a role that `main` knows, for a course."""
        language = os.environ.get("LANG", "C.UTF-8")

        ours, theirs = Channel.pair()
        with theirs:
            popen = subprocess.Popen(
                script_command(role, str(theirs.fileno()), str(course)),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": PROGRAM_PATH, "HOME": str(home), "LANG": language},
                start_new_session=True,  # Ctrl-C is for the launcher alone
            )
        child = cls(popen.pid, ours)
        child.popen = popen
        return child

    def reap(self) -> int:
        """Wait for the end; return the exit status, or the negative of a signal."""
        # Ctrl-C may come while we wait, but not between reaping and forgetting the child:
        # `stop` would wait for it once more.
        os.waitid(os.P_PIDFD, self.pid_fd, os.WEXITED | os.WNOWAIT)
        with uninterrupted():
            if self.popen:
                code = self.popen.wait()
            else:
                code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.close()
            self.channel.close()
        return code

    def stop(self, seconds: float, number: int = 0) -> int | None:
        """End the child: by closing its channel, by a signal, in the end by SIGKILL.

        Returns: as `reap` does, or None for one that is stuck in the kernel: it ends when
        it can, and nobody waits for that.
        """
        self.channel.close()
        if self.pid_fd < 0:  # it was reaped
            return None
        self.send_signal(number)

        if not is_readable(self.pid_fd, seconds):
            self.send_signal(signal.SIGKILL)
        if is_readable(self.pid_fd, 1):
            return self.reap()

        self.close()
        return None


def script_command(*arguments: str) -> list[str]:
    """Return the command line that executes this script for as long as a course lasts.

    `-I` ignores PYTHON* variables and the current directory. Going through runpy frees the
    9 MB syntax tree that CPython keeps for a script given by name. Paths through no links
    name this version of the installation, whatever `make upgrade` puts in its place.
    """
    run = (
        "import runpy, sys; del sys.argv[0];"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    # The last link of the interpreter stays: it makes the environment.
    directory, name = os.path.split(sys.executable)
    python = os.path.join(os.path.realpath(directory), name)
    return [python, "-I", "-c", run, os.path.realpath(__file__), *arguments]


def restart_delay(last: float, started: float) -> float:
    """Return the seconds to wait before something that has ended starts again.

    They double while it keeps ending; what has run for long begins with the shortest.
    """
    has_run_long = time.monotonic() - started > MAX_RESTART_DELAY_SECONDS
    return 1.0 if has_run_long else min(max(1.0, 2 * last), MAX_RESTART_DELAY_SECONDS)


def release_memory() -> None:
    """Give back the 8 MB that compiling and importing have used: malloc_trim(3).

    From now on each large block, as of a kernel's output, is given back when it is free.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # only the GNU C library has these
        ctypes.CDLL(None).malloc_trim(0)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)


# == Tools: classes on top of others' ======================================================
#
# Jupyter and Tornado are imported in template processes and the webserver alone. So our
# class names the class that it extends, which becomes its base there.

Upstream: Any = object  # their class, which comes after ours in the order of bases


def with_upstream(ours: Any, **values: object) -> Any:
    """Return our class on top of the one that it names as its `upstream`."""
    module, _, name = ours.upstream.rpartition(".")
    bases = ours, getattr(importlib.import_module(module), name)
    return types.new_class(ours.__name__, bases, exec_body=lambda body: body.update(values))


# == The accounts of this host =============================================================
#
# What passwd(5), shadow(5), group(5) and login.defs(5) say, and who may do what.

# The GECOS subfield "other" of the accounts that setup made: only root can change it
# (chfn(1)), so it is the mark by which `remove` knows what it may delete. After an @ it
# names the configuration files of the courses that have the account, its owner's first.
# That of version 1.0.0 names none.
MARK = "notebooks.py"
UID_FILE = Path("/var/lib/misc/notebooks.uid")  # the last one that setup has given out
USERNAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")  # 32: LOGIN_NAME_MAX of utmp(5)


def read_login_defs(key: str, default: int, base: int = 0) -> int:
    """Return a number from login.defs(5)."""
    with contextlib.suppress(OSError, ValueError):
        text = Path("/etc/login.defs").read_text(errors="replace")
        for number in re.findall(rf"^\s*{key}\s+(\w+)", text, re.MULTILINE):
            return int(number, base)
    return default


def find_account(key: str | int) -> pwd.struct_passwd | None:
    # While it makes a KeyError, Python 3.11 loses a Ctrl-C.
    with contextlib.suppress(KeyError), uninterrupted():
        return pwd.getpwnam(key) if isinstance(key, str) else pwd.getpwuid(key)
    return None


def useradd_defaults() -> dict[str, str]:
    """Return the defaults of new accounts, such as HOME and SKEL: useradd(8), -D."""
    lines = run_program(["useradd", "-D"]).splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def is_local_group(group: str) -> bool:
    """Say whether a group is in group(5), and not that of a directory service."""
    lines = Path("/etc/group").read_text().splitlines()
    return any(line.startswith(f"{group}:") for line in lines)


def group_members(group: str) -> set[str]:
    """Return the names that group(5) lists for a group, none if there is no group."""
    with contextlib.suppress(KeyError):
        return set(grp.getgrnam(group).gr_mem)
    return set()


def ordinary_groups(username: str) -> set[str]:
    """Return the groups that list a user, but for those of the system: group(5)."""
    low = read_login_defs("GID_MIN", 1000)
    return {x.gr_name for x in grp.getgrall() if username in x.gr_mem and x.gr_gid >= low}


def invoking_account() -> pwd.struct_passwd:
    """Return the account of the user who called sudo, else that of this process."""
    try:
        return pwd.getpwuid(int(os.environ["SUDO_UID"]))
    except (KeyError, ValueError):
        return pwd.getpwuid(os.getuid())


def is_ordinary(username: str) -> bool:
    """Say whether the name is free or that of a person, not of root or a service."""
    account = find_account(username)
    low, high = read_login_defs("UID_MIN", 1000), read_login_defs("UID_MAX", 60000)
    # Above are people again, of a directory service, after `nobody` and systemd's own.
    return account is None or low <= account.pw_uid <= high or account.pw_uid > 65535


class CourseMark(NamedTuple):
    """What a mark says of one course: its configuration file, and its directory's inode."""

    path: Path
    inode: int


def read_mark(account: pwd.struct_passwd) -> tuple[str, list[CourseMark]]:
    """Return the GECOS subfield "other" up to an @, and the courses after it: passwd(5)."""
    mark, _, text = ",".join(account.pw_gecos.split(",")[4:]).partition("@")
    courses = re.findall(r"([^;#]+)#(\d+)", text)
    return mark, [
        CourseMark(Path(os.fsdecode(urllib.parse.unquote_to_bytes(path))), int(inode))
        for path, inode in courses
    ]


def make_mark(courses: Iterable[CourseMark]) -> str:
    """Return a mark that names courses, without what passwd(5) and chfn(1) forbid."""
    named = (f"{urllib.parse.quote(bytes(x.path))}#{x.inode}" for x in courses)
    return f"{MARK}@{';'.join(named)}"


def is_ours(account: pwd.struct_passwd | None) -> bool:
    """Say whether setup made this account, for whatever course: it bears our mark."""
    return (
        account is not None
        and read_mark(account)[0] == MARK
        and is_ordinary(account.pw_name)
        and account.pw_uid != invoking_account().pw_uid
    )


def login_umask(account: pwd.struct_passwd) -> int:
    """Return the umask that a log-in gives, or a stricter one: pam_umask(8), usergroups.

    What an open home lets others look into stays closed to them.
    """
    umask, others = read_login_defs("UMASK", 0o022, base=8), 0o077
    with contextlib.suppress(KeyError):
        if grp.getgrgid(account.pw_gid).gr_name == account.pw_name:
            umask, others = umask & 0o707 | umask >> 3 & 0o070, 0o007

    return umask | others if os.stat(account.pw_dir).st_mode & others else umask


def is_home_of(account: pwd.struct_passwd) -> bool:
    """Say whether an account's home is there, a directory, and theirs."""
    try:
        info = os.stat(account.pw_dir)  # in a directory of root's: a link is root's
    except (FileNotFoundError, NotADirectoryError):  # nothing else says that it is absent
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == account.pw_uid


def read_shadow(username: str) -> list[str]:
    """Return the fields of an account, if it has any: shadow(5)."""
    rows = (line.split(":") for line in Path("/etc/shadow").read_text().splitlines())
    return next((row for row in rows if row[0] == username), [])


def is_expired(username: str) -> bool:
    """Say whether `end_account` has closed this account."""
    return read_shadow(username)[7:8] == ["1"]


class Identity(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]


def identity_of(account: pwd.struct_passwd) -> Identity:
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    return Identity(account.pw_uid, account.pw_gid, tuple(groups))


@contextlib.contextmanager
def acting_as(identity: Identity) -> Iterator[None]:
    """Use the effective ids of a user for the system calls within.

    Ids belong to the whole process, which must have one thread. Real and saved ids stay 0.
    So the user can neither signal nor trace us, and FUSE, which serves only callers whose
    ids are all the mounter's, refuses us instead of blocking. Source: credentials(7).
    """
    if identity.uid == os.geteuid():
        yield
        return

    groups = os.getgroups()
    try:
        # The uid comes last: only root may change the others.
        os.setgroups(identity.groups)
        os.setegid(identity.gid)
        os.seteuid(identity.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def drop_privileges(identity: Identity) -> None:
    """Become a user for good, or raise RuntimeError: then the process must end."""
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)

    # Odd securebits or capabilities could have let something of root's survive.
    with contextlib.suppress(PermissionError):
        os.setresuid(0, 0, 0)
    ids = {*os.getresuid(), identity.uid}, {*os.getresgid(), identity.gid}
    groups = set(os.getgroups())
    if ids != ({identity.uid}, {identity.gid}) or groups != set(identity.groups):
        raise RuntimeError(f"still has ids {ids} and groups {groups}")


def run_as(
    identity: Identity,
    argv: Sequence[str],
    seconds: float = math.inf,
    max_bytes: int = -1,
    **streams: int,
) -> bool:
    """Run a program with a user's ids, and say if it succeeded; Ctrl-C ends it.

    It belongs to that user: so it holds nothing but its streams, and is ended when they
    have stopped it. What it says is not kept: students can make that as long as they like.
    max_bytes: what it may write into a file. Raises: StuckError.
    """
    log.debug("running %s", shlex.join(argv))
    null = subprocess.DEVNULL

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))

    process = subprocess.Popen(
        argv,
        stdin=streams.get("stdin", null),
        stdout=streams.get("stdout", null),
        stderr=streams.get("stderr", null),
        user=identity.uid,
        group=identity.gid,
        extra_groups=identity.groups,
        cwd="/",
        env={"PATH": PROGRAM_PATH, "LC_ALL": "C.UTF-8"},
        start_new_session=True,
        preexec_fn=limit if max_bytes >= 0 else None,
    )

    computed, started = 0.0, time.monotonic()
    moved = started
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(HEARTBEAT_SECONDS) == 0

            if computed != (computed := cpu_seconds(process.pid)):
                moved = time.monotonic()
            if time.monotonic() > min(moved + STUCK_SECONDS, started + seconds):
                raise StuckError(f"{shlex.join(argv[:2])}: {STUCK}")
    finally:
        if process.poll() is None:  # stuck, or we were interrupted
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                process.wait(1)


def cpu_seconds(pid: int) -> float:
    """Return what a process and its children have computed, or have waited for a disk."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system + times.iowait
    return total


def delete_tree(path: Path) -> None:
    """Delete a directory, even while others fill it, but nothing mounted; raises Error."""
    if not os.path.lexists(path):
        return

    deadline = time.monotonic() + DELETE_SECONDS
    uid = 0  # of the last directory
    with closing(os.open(path, DIRECTORY_FLAGS)) as top_fd:
        device = os.fstat(top_fd).st_dev
        waiting = empty_directory(top_fd, top_fd)
        while waiting and time.monotonic() < deadline:
            name = secrets.token_hex()
            with contextlib.suppress(OSError):
                # It fails for a mount, which may be of the same device (mount --bind).
                os.rename(waiting.pop(), name, src_dir_fd=top_fd, dst_dir_fd=top_fd)
                with closing(os.open(name, DIRECTORY_FLAGS, dir_fd=top_fd)) as fd:
                    info = os.fstat(fd)
                    if info.st_dev == device:
                        uid = info.st_uid or uid
                        waiting += empty_directory(fd, top_fd)
                        os.rmdir(name, dir_fd=top_fd)

    with contextlib.suppress(OSError):
        path.rmdir()
    if os.path.lexists(path):
        friend = find_account(uid) if waiting and uid else None
        why = f"; {friend.pw_name} goes on to make directories there" if friend else ""
        raise Error(f"not everything in {path} could be deleted{why}")


def empty_directory(fd: int, top_fd: int) -> list[str]:
    """Delete a directory's files; return the names of its directories, moved to the top.

    There no path is long. A mount cannot be moved.
    """
    # From now on nobody, not even who has it open, creates anything in it.
    os.fchown(fd, 0, 0)
    os.fchmod(fd, 0o700)

    directories = []
    with os.scandir(fd) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # what stays is noticed at the end
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=fd)
                    continue
                name = entry.name if fd == top_fd else secrets.token_hex()
                os.rename(entry.name, name, src_dir_fd=fd, dst_dir_fd=top_fd)
                directories.append(name)
    return directories


# == Configuration =========================================================================
#
# A key of `notebooks.cfg` is a field of `Config`, with its section, its parser and its
# default: a new key needs a line there, a line in the README, and a use. A parser raises
# ValueError with what would be right. All that is wrong is told at once.
#
# The section [Environment] has no keys but variables, of any name.

MAX_CONFIG_CHARACTERS = 1 << 16
ENVIRONMENT = "Environment"
# What the servers set themselves, and what leads them to code and configuration.
OWN_VARIABLES = re.compile(
    r"HOME|USER|LOGNAME|SHELL|ENV|BASH_ENV|PROMPT_COMMAND|NOTEBOOKS_PATH|JUPYTER\w*"
)
CERTIFICATE_NAME = "notebooks.pem"
# What editors, Jupyter and version control leave, which is nobody's work.
IGNORE = ".git .svn .ipynb_checkpoints __pycache__ .DS_Store ._* Thumbs.db .~* *.swp .nfs*"


def parse_path(text: str) -> Path:
    """Read a path; `parse_value` makes it absolute."""
    if not text:
        raise ValueError("needs a path")
    if text == "~" or text.startswith("~/"):
        return Path(invoking_account().pw_dir, text[2:])
    return Path(text)


def optional(parse: Callable[[str], Value]) -> Callable[[str], Value | None]:
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


def parse_memory(text: str) -> int:
    """Read a size, or a share of this host's memory such as 25 %; nothing is no limit."""
    share = re.fullmatch(r"(\d{1,3})\s*%", text, re.ASCII)
    total = psutil.virtual_memory().total
    with contextlib.suppress(ValueError):
        size = total * int(share[1]) // 100 if share else parse_size(text or "0")
        if not text or MIN_MEMORY <= size <= total:
            return size
    raise ValueError("must be a size from 100M to all that this host has, or such as 25 %")


def parse_cores(text: str) -> float:
    """Read a number of processors, such as 1.5; nothing is no limit."""
    if text and not re.fullmatch(r"\d{1,4}(\.\d{1,2})?", text, re.ASCII):
        raise ValueError("must be a number of processors such as 2 or 0.5")
    return float(text or 0)


def matching(pattern: str, right: str) -> Callable[[str], str]:
    """Return a parser of what a regular expression matches, or of nothing."""

    def parse(text: str) -> str:
        if text and not re.fullmatch(pattern, text):
            raise ValueError(f"must be {right}")
        return text

    return parse


def parse_owner(text: str) -> str:
    if text and not find_account(text):
        raise ValueError("is not a user of this machine")
    return text


def parse_address(text: str) -> str:
    """Read a host name or address, in which {username} may stand for the student's."""
    if "{username}" in text and not text.startswith("{username}."):
        raise ValueError("must have {username}. at its beginning, if at all")
    name, literal = r"(?a:[\w-]+(\.[\w-]+)*(:\d+)?)", r"\[?[\da-fA-F.]*:[\da-fA-F.:]+\]?"
    if text and not re.fullmatch(f"{name}|{literal}", text.replace("{username}", "u")):
        raise ValueError(
            "must be a host name alone, such as `lab.example.org`, and with other letters"
            " than a-z as browsers write it: `xn--...`"
        )
    if text.count(":") == 1:
        raise ValueError("must not have a port: that is the key `port`")
    return f"[{text}]" if ":" in text and not text.startswith("[") else text


def parse_patterns(text: str) -> tuple[str, ...]:
    """Read file name patterns with blanks between: fnmatch(3)."""
    if "/" in text:
        raise ValueError("must be patterns of names, such as `*.bak`, without directories")
    return tuple(text.split())


def parse_language(text: str) -> str:
    languages = sorted(["en", *find_catalogs()])
    if text.lower() in languages:
        return text.lower()
    if len(languages) > 1:
        raise ValueError(f"must be one of {', '.join(languages)}")
    raise ValueError(
        f"must be en: translations are neither in {LOCALES[0]} nor in {LOCALES[1]};"
        " `sudo make install` puts them there"
    )


parse_group = matching(
    USERNAME.pattern, "a group name: lower-case letters, digits, - and _"
)
parse_gateway = matching(
    r"https?://([^\s/?#@:\[\]]+|\[[\da-fA-F:]+\])(:[1-9]\d{0,4})?(/[^\s?#]*)?",
    "an address such as `https://gateway.example.org:8888`",
)
parse_profile = matching(
    r"(?!\.\.?$)[\w.-]+", "the name of an IPython profile, such as `course`"
)


def setting(section: str, parse: Callable[[str], Any], default: str = "") -> Any:
    """Return a field that a key of the configuration file sets."""
    details = {"section": section, "parse": parse, "default": default}
    return dataclasses.field(metadata=details)


@dataclasses.dataclass(frozen=True)
class Config:
    """What `notebooks.cfg` says, checked; paths are absolute, those in a home pure."""

    path: Path
    user_list: Path = setting("Setup", parse_path, "students.csv")
    tutorial_dir: PurePath = setting("Setup", parse_home_path, "course")
    material_dir: Path = setting("Setup", parse_path, "material")
    shared_dir: Path | None = setting("Setup", optional(parse_path))
    password_length: int = setting("Setup", whole_number(8, 128), "12")
    group: str = setting("Setup", parse_group, "students")
    keep_changed: bool = setting("Setup", parse_bool, "no")
    ignore: tuple[str, ...] = setting("Setup", parse_patterns, IGNORE)
    profile: str = setting("Setup", parse_profile)
    cert_file: Path | None = setting("Launch", optional(parse_path))
    key_file: Path | None = setting("Launch", optional(parse_path))
    server_address: str = setting("Launch", parse_address)
    web_title: str = setting("Launch", str, "Notebooks")
    language: str = setting("Launch", parse_language, "en")
    root_dir: PurePath | None = setting("Launch", optional(parse_home_path))
    launch_dir: PurePath | None = setting("Launch", optional(parse_home_path))
    start_page: str = setting("Launch", matching("tree|lab", "tree or lab"), "tree")
    port: int = setting("Launch", whole_number(1, 65535), "8888")
    list_students: bool = setting("Launch", parse_bool, "yes")
    on_demand: bool = setting("Launch", parse_bool, "no")
    idle_minutes: int = setting("Launch", whole_number(0, 100000), "0")
    idle_kernel_minutes: int = setting("Launch", whole_number(0, 100000), "0")
    busy_minutes: int = setting("Launch", whole_number(0, 100000), "0")
    debugger: bool = setting("Launch", parse_bool, "no")
    tcp_kernels: bool = setting("Launch", parse_bool, "yes")
    own_packages: bool = setting("Launch", parse_bool, "yes")
    gateway_url: str = setting("Launch", parse_gateway)
    gateway_token_file: Path | None = setting("Launch", optional(parse_path))
    gateway_kernel: tuple[str, ...] = setting("Launch", parse_patterns)
    gateway_ca: Path | None = setting("Launch", optional(parse_path))
    storage_dir: Path = setting("Shutdown", parse_path, "storage")
    owner: str = setting("Shutdown", parse_owner)
    retrieve_limit: int = setting("Shutdown", parse_size, "1G")
    archive_dir: Path | None = setting("Shutdown", optional(parse_path))
    archive_limit: int = setting("Shutdown", parse_size, "10G")
    memory: int = setting("Limits", parse_memory)
    cpu: float = setting("Limits", parse_cores)
    processes: int = setting("Limits", whole_number(50, 1000000), "1000")
    disk: int = setting("Limits", parse_size, "0")
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, username: str) -> "Config":
        """Return what it says for one student: {username} in `material_dir` is the name."""
        own = str(self.material_dir).replace("{username}", username)
        return dataclasses.replace(self, material_dir=Path(own))

    def limits_of(self, student: "Student") -> "Limits":
        """Return the limits of one student: their row of the list, or those for all."""
        own = {name: getattr(student, name) for name in Limits._fields}
        return Limits(
            *(parse_limit(x, own[x]) if own[x] else getattr(self, x) for x in own)
        )

    @property
    def material_base(self) -> Path:
        """The last directory on the way to the material that is the same for everybody."""
        parts = self.material_dir.parts
        return Path(*itertools.takewhile(lambda part: "{username}" not in part, parts))

    @property
    def material_name(self) -> PurePath:  # relative to the home
        return self.tutorial_dir / self.material_dir.name

    @property
    def start_dir(self) -> PurePath:  # relative to the home
        return self.launch_dir or self.material_name

    def is_wanted(self, path: Path) -> bool:
        """Say whether `send` and `retrieve` copy files of this name."""
        return not any(fnmatch.fnmatchcase(path.name, each) for each in self.ignore)

    @property
    def profile_dir(self) -> Path:
        """Where the invoking user has the IPython profile, or would have it."""
        return Path(invoking_account().pw_dir, ".ipython", f"profile_{self.profile}")

    @property
    def private_paths(self) -> list[Path]:
        secret = self.cert_file, self.key_file, self.gateway_token_file
        paths = (self.path, self.user_list, self.storage_dir, self.archive_dir, *secret)
        own = self.path.with_name(CERTIFICATE_NAME)
        return [Path(os.path.realpath(x)) for x in (*paths, own) if x]

    @property
    def storage_owner(self) -> pwd.struct_passwd:
        return pwd.getpwnam(self.owner) if self.owner else invoking_account()


class Limits(NamedTuple):
    """What a student may use; 0 is no limit, but for processes."""

    memory: int  # bytes
    cpu: float  # processors
    processes: int  # and threads
    disk: int  # bytes


def parse_limit(name: str, text: str) -> Any:
    """Read a cell of the list as the key of this name; raises ValueError."""
    return config_keys()[name]["parse"](text) if text else 0


def config_keys() -> dict[str, Mapping[str, Any]]:
    return {x.name: x.metadata for x in dataclasses.fields(Config) if x.metadata}


class IniParser(configparser.ConfigParser):
    """Reads keys without regard to case, and the names of variables as they are."""

    def optionxform(self, optionstr: str) -> str:
        # While a file is read, the last section is the one that is being read.
        is_variable = self.sections()[-1:] == [ENVIRONMENT]
        return optionstr if is_variable else optionstr.lower()


def read_ini(path: Path) -> configparser.ConfigParser:
    """Read an INI file; raises UsageError for one that is not there or is none."""
    parser = IniParser(interpolation=None)
    try:
        # Another course's may lie where a student can put a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8-sig") as file:
            text = file.read(MAX_CONFIG_CHARACTERS)
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
    section_of = {key: str(each["section"]) for key, each in config_keys().items()}
    sections = [*dict.fromkeys(section_of.values()), ENVIRONMENT]

    # configparser gives the keys of [DEFAULT] to all sections, but does not list it.
    default = ["DEFAULT"] if parser.defaults() else []

    for section in [*default, *parser.sections()]:
        if section not in sections:
            yield f"[{section}]: unknown section; {nearest(section, sections)}"
            continue
        for key in parser[section]:
            if key not in section_of:
                keys = [each for each in section_of if section_of[each] == section]
                yield f"[{section}] {key}: unknown key; {nearest(key, keys)}"
            elif section_of[key] != section:
                yield f"[{section}] {key}: belongs in section [{section_of[key]}]"


def parse_value(text: str, parse: Callable[[str], Any], base: Path) -> Any:
    """Return what a key's text means, or raise ValueError with what would be right."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        raise ValueError("must be without quotation marks")
    value = parse(text)
    if isinstance(value, Path):
        return Path(os.path.normpath(base / value))
    return value


def without_comment(text: str) -> str:
    return re.sub(r"(^|\s+)[#;].*", "", text)


def pop_variables(parser: configparser.ConfigParser) -> tuple[dict[str, str], list[str]]:
    """Take [Environment] out; return it and what is wrong, without values: secrets."""
    variables, problems = {}, []

    for name, text in parser.items(ENVIRONMENT) if parser.has_section(ENVIRONMENT) else ():
        try:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError("must be a name of letters, digits and _")
            if OWN_VARIABLES.fullmatch(name):
                raise ValueError("is set by notebooks.py, for each student's server")
            variables[name] = parse_value(without_comment(text), str, Path())
        except ValueError as error:
            problems.append(f"[{ENVIRONMENT}] {name}: {error}")

    parser.remove_section(ENVIRONMENT)
    return variables, problems


def read_config(path: Path) -> tuple[Config, list[str]]:
    """Return what the file says, with defaults for wrong keys, and all that is wrong."""
    parser = read_ini(path)
    base = path.absolute().parent
    values: dict[str, Any] = {"path": Path(os.path.realpath(path.parent), path.name)}
    values["environment"], problems = pop_variables(parser)
    problems += unknown_keys(parser)

    for key, option in config_keys().items():
        section, parse = option["section"], option["parse"]
        text = parser.get(section, key, fallback=option["default"]).strip()
        if parse is not str:  # a title may be `Physics #1`
            text = without_comment(text)
        try:
            values[key] = parse_value(text, parse, base)
        except ValueError as error:
            problems.append(f"[{section}] {key} = {text}: {error}")
            values[key] = parse_value(option["default"], parse, base)

    config = Config(**values)
    problems += contradictions(config)
    return config, [f"{path}: {problem}" for problem in problems]


def contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with several keys together, or with what they name."""
    if config.key_file and not config.cert_file:
        yield "[Launch] key_file: is of no use without cert_file"
    if config.root_dir and not config.start_dir.is_relative_to(config.root_dir):
        yield (
            f"[Launch] root_dir = {config.root_dir}: notebooks start in"
            f" {config.start_dir}, which must lie in it; set `launch_dir`, too"
        )

    for word in {*re.findall(r"\{[^{}]*\}", str(config.material_dir))} - {"{username}"}:
        yield f"[Setup] material_dir: has {word} in it; only {{username}} has a meaning"

    with contextlib.suppress(KeyError):  # a group that setup will make
        low = read_login_defs("GID_MIN", 1000)
        if config.group and grp.getgrnam(config.group).gr_gid < low:
            yield (
                f"[Setup] group = {config.group}: is a group of the system, with rights"
                " that are not for students; choose a name of your own"
            )


def exposed(config: Config, usernames: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with what students are given, such as what is not for them."""
    names = filter(USERNAME.fullmatch, usernames)
    given = {config.of(name).material_dir: "material_dir" for name in names}
    if config.shared_dir:
        if config.shared_dir.name in [directory.name for directory in given]:
            yield "[Setup] shared_dir: must have another last part than material_dir"
        given[config.shared_dir] = "shared_dir"

    for directory, key in given.items():
        for path in config.private_paths:
            if path.is_relative_to(os.path.realpath(directory)):
                yield (
                    f"[Setup] {key} = {directory}: {path} lies in it, which is not for"
                    " students; make a directory with what is for them alone"
                )


# == The list of students ==================================================================
#
# `CsvDocument` is a CSV file of raw cells and knows nothing of students. `Roster` is what a
# document says of students, with the lock of its file, and changes to it. A list is taken
# as other programs export it, under their names for our columns and in their encodings.

# In the order of the fields of `Student`.
COLUMNS = (
    *("username", "name", "surname", "sys-pass", "nb-pass", "port", "email"),
    *("memory", "cpu", "processes", "disk"),
)
MAX_PASSWORD_LENGTH = 200  # what chpasswd(8) surely takes
MIN_MEMORY = 100 << 20  # with less no kernel starts
# Letters and digits that cannot be taken for one another on paper.
PASSWORD_ALPHABET = "".join(set(string.ascii_letters + string.digits) - set("0O1lI"))
PASSWORD_GROUP = 4  # letters and digits that are read aloud together

# What our columns are called elsewhere, without blanks. A `whole` name stands for that part
# of it which has no column: French `nom` is the family name, Catalan the first.
ALIASES = {
    "username": r"user(name)?|(sis)?login(id|name)?|account(name)?|anmeldename|identifiant"
    r"|benutzer(name)?|kennung|nomd.utilisateur|(nombrede)?usuario|nomeutente"
    r"|gebruikersnaam|логин|имяпользователя|ユーザー?名",
    "name": r"(first|given|fore)names?|vornamen?|rufname|pr[ée]nom|nombres?|nome|voornaam"
    r"|förnamn|fornavn|etunimi|imię|jméno|meno|utónév|ime|prenume|adı?|имя|ім.я|име|όνομα|名",
    "surname": r"(sur|last|family)names?|(nach|familien|zu)name|apellidos?|cogno(me|ms)"
    r"|sobrenome|apelido|achternaam|efternamn|e[tf]ternavn|sukunimi|nazwisko|příjmení"
    r"|priezvisko|vezetéknév|prezime|nume|soyadı?|фамилия|прізвище|επώνυμο|姓",
    "whole": r"name|student|(full|display)name|nom(brecompleto|complet)?|фио|氏名|姓名",
    "email": r"(student)?e?mail(add?ress?e?)?|(adressed?e?)?(mail|courriel)|epost(adress)?"
    r"|(direcciónde)?correo(electrónico)?|indirizzoemail|endereçodeemail|adresemail"
    r"|(адрес)?(электронн(ая|ой))?почт[аы]|メールアドレス",
    "sys-pass": "syspass",
    "nb-pass": "nbpass",
    "(password)": r"pass|passwor[dt]|kennwort|motdepasse|contraseña|senha|wachtwoord"
    r"|lösenord|passord|adgangskode|hasło|heslo|jelszó|lozinka|parola|пароль|パスワード|密码",
}
# Rows of the books of marks of Canvas and Google Classroom.
NO_STUDENTS = {"", "points possible", "class average", "date", "points"}

# What words are made of in languages, with the code page that spreadsheets there write; the
# first of those that fit best is taken. One byte is è here and č there: its place tells.
WESTERN = r"([a-zàáâäçéêëíîïòóôößúü]|\Bè(?![aeiou])|æ\B|ñ(?=[aeioáéó])|[ãõ](?=[eo])|[ìù]$)+"
ALPHABETS = (
    ("cp1252", WESTERN),
    ("cp1254", "[a-zçğıi\u0307öşüâîû]+"),
    ("cp1252", r"([a-zåäöéüáíóúýþø]|\Bð|æ\B)+"),
    ("cp1250", "[a-ząćęłńóśźżüöä]+"),
    ("cp1250", "[a-záäčďéěíľňóôŕřšťúůýžöü]+"),
    ("cp1257", "[a-zäõöüšž]+"),
    ("cp1250", "[a-záéíóöőúüű]+"),
    ("cp1250", "[a-zčćđšžöü]+"),
    ("cp1250", "[a-zăâîşţáéóöőü]+"),
    ("cp1257", "[a-ząčęėįšųūžāēģīķļņ]+"),
    ("cp932", "[ぁ-ヿ一-鿿々〆]+"),
    ("cp949", "[가-힣]+"),
    ("cp1255", "[א-ת]+"),
    ("cp1251", "[а-яѐ-џґ]+"),
    ("cp1253", "[ά-ώΐΰ]+"),
    ("cp1256", "[ء-ي]+"),
    ("cp874", "[ก-๎]+"),
    ("gb18030", "[一-鿿]+"),
    ("big5", "[一-鿿]+"),
    ("mac_roman", "[a-zàáâäçèéêëîïíñòóôößúü]+"),
)
WORD = re.compile(r"[^\0-@\[-`{-\x7f\xa0«»°§‘’“”„–—…\u3000]+")

# Names by which hosts give rights, as to an account's private group.
PRIVILEGED = (
    *("admin", "wheel", "sudo", "docker", "lxd", "libvirt", "kvm", "git", "postgres"),
    *("mysql", "jupyter", "ubuntu", "debian", "vagrant", "ansible", "backup", "operator"),
)
# Letters in user names; what is not here loses its accent.
LETTERS = "äöüßæøœłđðþıабвгдежзиклмнопрстуфхцчшщыэюяіїєґђјљњћџ"
PLAIN_LETTERS = (
    "ae oe ue ss ae o oe l d d th i a b v g d e zh z i k l m n o p r s t u f kh ts ch sh"
    " shch y e yu ya i yi ye g dj j lj nj c dz"
)


@dataclasses.dataclass
class Record:
    """A record of a CSV file: where it begins, its raw cells and its line end."""

    line: int
    cells: list[str]
    end: str


class CsvDocument:
    """A CSV file, held as it was written: only the cells that are set change.

    Raw cells keep their quotes and blanks. So columns of the teacher's own, quoting, line
    ends, byte-order mark and encoding stay as they are. Source: RFC 4180, with comma,
    semicolon or tab as the delimiter.
    """

    def __init__(self, data: bytes) -> None:
        """Raises: ValueError for what cannot be read as CSV at all."""
        if data.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
            raise ValueError("is a workbook; save it as CSV, and name that")
        self.bom, self.encoding, text = decode_text(data)
        # Excel names the separator in a line above the header.
        excel = re.match(r'"?sep=([,;|\t])"?(\r\n|\n|\r)', text)
        self.preamble = excel[0] if excel else ""
        text = text.removeprefix(self.preamble)
        if not text.strip() or "\0" in text:
            raise ValueError("needs a header line that names `username`")

        self.delimiter = excel[1] if excel else find_delimiter(text.splitlines()[0])
        self.records = list(split_records(text, self.delimiter, 2 if excel else 1))
        self.header = [unquote(cell).lower() for cell in self.records[0].cells]
        self.rows = [each for each in self.records[1:] if any(map(unquote, each.cells))]

    def values(self, row: Record) -> dict[str, str]:
        return dict(zip(self.header, map(unquote, row.cells), strict=False))

    def set_value(self, row: Record, column: str, value: str) -> None:
        """Set a cell, in a new column if there is none of that name."""
        if self.values(row).get(column, "") == value:
            return
        if column not in self.header:
            self.header.append(column)
            self.records[0].cells.append(column)

        i = self.header.index(column)
        row.cells += [""] * (i + 1 - len(row.cells))  # a row may end early
        if row.cells[i].startswith('"') or re.search(rf'["{self.delimiter}\r\n]', value):
            value = '"' + value.replace('"', '""') + '"'
        row.cells[i] = value

    def encode(self) -> bytes:
        text = "".join(self.delimiter.join(x.cells) + x.end for x in self.records)
        return self.bom + (self.preamble + text).encode(self.encoding)


def find_delimiter(line: str) -> str:
    """Return what separates the cells of a header: most of our columns, or most cells."""

    def value(delimiter: str) -> tuple[int, int, bool]:
        titles = [cell.strip(' "').lower() for cell in line.split(delimiter)]
        known = {*read_header(titles)} & {*COLUMNS}
        # A comma is rather in a title, such as `Name, Vorname`.
        return len(known), len(titles), delimiter != "," and len(titles) > 1

    return max(",;\t", key=value)


def decode_text(data: bytes) -> tuple[bytes, str, str]:
    """Return byte-order mark, encoding (else guessed) and text, or ValueError."""
    marks = {
        codecs.BOM_UTF8: "utf-8",
        codecs.BOM_UTF16_LE: "utf-16-le",
        codecs.BOM_UTF16_BE: "utf-16-be",
    }
    bom = next(filter(data.startswith, marks), b"")
    encodings = [marks[bom]] if bom else [guess_encoding(data), "cp1252", "latin-1"]

    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return bom, encoding, data.removeprefix(bom).decode(encoding)
    raise ValueError(f"is no {encodings[0].upper()} text; save it again")


def guess_encoding(data: bytes) -> str:
    """Return the encoding in which a text without a mark has the likeliest words."""
    if data.count(0) > len(data) / 20:  # half of each ASCII character in UTF-16
        return f"utf-16-{'le' if data[1::2].count(0) > data[::2].count(0) else 'be'}"
    with contextlib.suppress(UnicodeDecodeError):
        data.decode()
        return "utf-8"

    # Charset-normalizer cannot tell French from Czech in short lists.
    lines = [line for line in data.splitlines() if not line.isascii()]
    sample = b"\n".join(lines[:1000])
    return max(ALPHABETS, key=lambda each: share_of_words(sample, *each))[0]


def share_of_words(data: bytes, encoding: str, alphabet: str) -> float:
    """Return how much of the words that are not ASCII is of these letters."""
    with contextlib.suppress(UnicodeDecodeError):
        words = [x for x in WORD.findall(data.decode(encoding)) if not x.isascii()]
        words = [x for x in words if any(map(str.isalpha, x))]
        usual = [x for x in words if x in (x.lower(), x.title(), x.upper())]
        fitting = [x for x in usual if re.fullmatch(alphabet, x.lower())]
        return len("".join(fitting)) / len("".join(words)) if words else 1
    return 0


def unquote(cell: str) -> str:
    """Return what a raw cell says, without blanks at its ends."""
    if cell.startswith('"'):
        cell = cell[1:-1].replace('""', '"')
    return cell.strip()


def split_records(text: str, delimiter: str, line: int) -> Iterator[Record]:
    """Cut CSV text into records of raw cells; raises ValueError for a stray quote."""
    cell = rf'("(?:[^"]|"")*"|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)'
    pattern = re.compile(rf"{cell}([{delimiter}]|\r\n|\n|\r|\Z)")
    position, record = 0, Record(line, [], "")

    # After a last delimiter there is one more cell, which is empty.
    while position < len(text) or record.cells:
        match = pattern.match(text, position)
        if not match:
            raise ValueError(f"line {line}: a quotation mark is not closed, or in a cell")
        position = match.end()
        line += len(re.findall(r"\r\n|\n|\r", match[0]))
        record.cells.append(match[1])
        if match[2] != delimiter:
            record.end = match[2]
            yield record
            record = Record(line, [], "")


def find_column(title: str, ours: Collection[str]) -> str:
    """Return which of our columns one is, after what other programs call it.

    A second one, beside one that is exactly ours, is none.
    """
    if title in ours:
        return title
    plain = unicodedata.normalize("NFKC", title).lower()
    plain = re.sub(r"\[.*?\]|\(s\)|[\s_:.-]", "", plain)  # `Last Name [Required]`
    found = (each for each in ALIASES if re.fullmatch(ALIASES[each], plain))
    column = next(found, title)
    return f"({title})" if column in ours and title not in COLUMNS else column


def read_header(titles: Sequence[str]) -> list[str]:
    """Return which of our columns each one is, or its title."""
    ours = {*titles} & {*COLUMNS}
    if "name" in ours:
        ours.add("whole")  # nothing else is
    if "surname" not in ours:
        ours.discard("name")  # it may be the whole one
    header = [find_column(title, ours) for title in titles]
    missing = [each for each in ("name", "surname") if each not in header]
    return [[*missing, "(whole)"][0] if each == "whole" else each for each in header]


def make_username(*texts: str) -> str:
    """Return a user name of the letters of an e-mail address, or else of a name."""
    letters = str.maketrans(dict(zip(LETTERS, PLAIN_LETTERS.split(), strict=True)))
    for text in texts:
        plain = text.partition("@")[0].partition("+")[0]
        for form in ("NFC", "NFKD"):
            plain = unicodedata.normalize(form, plain).lower().translate(letters)
        plain = plain.encode("ascii", "ignore").decode().replace("'", "")
        name = re.sub("[^a-z0-9_-]+", ".", plain).strip(".-_")
        if name:
            return f"{'s' if name[0].isdigit() else ''}{name}"[:32].rstrip(".-_")
    return "student"


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
    email: str = ""
    memory: str = ""
    cpu: str = ""
    processes: str = ""
    disk: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.name} {self.surname}".strip()

    @property
    def wish(self) -> str:
        """The user name that suits a student who has none."""
        last, _, first = self.full_name.partition(",")
        return make_username(self.email, f"{first} {last}")


def student_problems(student: Student) -> Iterator[str]:
    username = student.username
    if not any((username, student.email, student.full_name)):
        yield "the username is missing, and e-mail address and name, to make it of"
    elif username and not USERNAME.fullmatch(username):
        yield (
            f"{username!r} cannot be a username: use at most 32 lower-case letters,"
            " digits, - _ and . that begin with a letter or _;"
            f" {make_username(username)!r} could be"
        )
    elif not is_ordinary(username):
        yield f"{username!r} is a system account and cannot be a student"

    for column, text in (("sys-pass", student.sys_pass), ("nb-pass", student.nb_pass)):
        if len(text) > MAX_PASSWORD_LENGTH:
            yield f"the {column} is longer than {MAX_PASSWORD_LENGTH} characters"
        if not text.isprintable():
            yield f"the {column} has a line break or another unprintable character"

    if student.port and not re.fullmatch(r"[0-9]{1,5}", student.port):
        yield f"the port {student.port!r} is not a number; leave it empty for any"

    yield from limit_problems(student)


def limit_problems(student: Student) -> Iterator[str]:
    for column in Limits._fields:
        try:
            parse_limit(column, getattr(student, column))
        except ValueError as error:
            yield f"{column} = {getattr(student, column)!r}: {error}"


class Roster:
    """The students of a course and their file, which is only changed within `locked`."""

    def __init__(self, path: Path) -> None:
        """Raises: UsageError for a file that cannot be read as CSV at all."""
        self.path = Path(os.path.realpath(path))
        self.changes: dict[str, dict[str, str]] = {}
        self.made: dict[Student, str] = {}  # user names, of what rows were without
        self.load()

    def load(self) -> None:
        try:
            self.data = self.path.read_bytes()
            self.document = CsvDocument(self.data)
        except OSError as error:
            raise UsageError(
                f"{self.path}: the list of students cannot be read: {error.strerror}"
            ) from None
        except ValueError as error:
            raise UsageError(f"{self.path}: {error}") from None

        self.read_columns()
        self.rows: dict[str, Record] = {}
        for row in self.document.rows:
            self.name_row(row, self.made.get(self.student_of(row), ""))

    def read_columns(self) -> None:
        """Find our columns, and leave out rows that are no students."""
        document = self.document
        self.titles = document.header
        document.header = read_header(self.titles)

        # Others' user names of which none can be one, such as e-mail addresses, are what
        # ours are made of.
        logins = [document.values(row).get("username", "") for row in document.rows]
        is_source = any(logins) and not any(map(USERNAME.fullmatch, logins))
        if is_source and "username" not in self.titles:
            now = {"username": "email", "email": "(email)"}
            document.header = [now.get(each, each) for each in document.header]

        who = [{x.username, x.email, x.full_name.lower()} for x in self.students]
        rows = zip(document.rows, who, strict=True)
        document.rows = [row for row, each in rows if each == {""} or each - NO_STUDENTS]

    def problems(self) -> Iterator[str]:
        titles = self.titles
        header = self.document.header[: len(titles)]
        where = f"{self.path}: line {self.document.records[0].line}"
        if not {*header} & {"username", "email", "name", "surname"}:
            found = ", ".join(f"`{printable(name)}`" for name in titles)
            yield (
                f"{where}: must name the columns, such as username,name,surname"
                f", with commas, semicolons or tabs between; found {found}, no `username`"
            )
            return

        for name in COLUMNS:
            if header.count(name) > 1:
                last = titles[::-1][header[::-1].index(name)]
                both = printable(f"`{titles[header.index(name)]}`, `{last}`")
                yield f"{where}: the header has more than one column `{name}`: {both}"

        first_lines: dict[str, int] = {}
        for row, student in zip(self.document.rows, self.students, strict=True):
            where = f"{self.path}: line {row.line}"
            if any(map(unquote, row.cells[len(header) :])):
                yield (
                    f"{where}: has more cells than the header has columns; put text that"
                    " contains the separator in quotation marks"
                )
            for problem in student_problems(student):
                yield f"{where}: {problem}"

            first = first_lines.setdefault(student.username or str(row.line), row.line)
            if first != row.line:
                yield f"{where}: the name {student.username!r} is on line {first} too"

    @property
    def students(self) -> list[Student]:
        return [self.student_of(row) for row in self.document.rows]

    def student_of(self, row: Record) -> Student:
        values = self.document.values(row)
        return Student(row.line, *(values.get(name, "") for name in COLUMNS))

    def update(self, username: str, **values: str) -> None:
        """Set cells of a student's row (sys_pass for the column `sys-pass`)."""
        self.changes.setdefault(username, {}).update(values)
        row = self.rows.get(username)
        if row:  # else the teacher has deleted it meanwhile
            for key, value in values.items():
                self.document.set_value(row, key.replace("_", "-"), value)

    def name_row(self, row: Record, username: str) -> None:
        """Give a row this user name, unless it has one."""
        student = self.student_of(row)
        if username and not student.username:
            self.made[student] = username
            self.document.set_value(row, "username", username)
        self.rows[student.username or username] = row

    def notes(self) -> Iterator[str]:
        """Yield what the teacher has to know of how the list was understood."""
        document, students = self.document, self.students
        if not document.bom and document.encoding != "utf-8":
            names = (x.full_name for x in students if not x.full_name.isascii())
            yield (
                f"was read as {document.encoding}, as in {next(names, 'its header')!r}; if"
                " that is wrong, save it as `CSV UTF-8`"
            )

        for title, column in zip(self.titles, document.header, strict=False):
            if column == "(password)" and not all(x.nb_pass for x in students):
                yield f"the column `{printable(title)}` is not used; is it for `nb-pass`?"

    def warn_of_editors(self) -> None:
        """Tell who has the list open: what a spreadsheet saves lacks what we wrote."""
        for name in (f".~lock.{self.path.name}#", f"~${self.path.name}"):
            path = self.path.with_name(name)
            with contextlib.suppress(OSError):
                fields = path.read_text(errors="replace")[:500].split(",")
                who = printable(" on ".join(fields[1:3])) or "who has it does not say"
                log.warning(
                    "%s is open in a spreadsheet (%s): close it there without saving, or"
                    " passwords may be lost; if nobody has it open, delete %s",
                    *(self.path, who, path),
                )

    def check_writable(self) -> None:
        """Raises: UsageError if the list could not be written when it has to be."""
        self.warn_of_editors()
        try:
            write_beside(self.path, TRY_FILE, b"")
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written: {error.strerror}; nothing was done"
            ) from None

    @property
    def lock_name(self) -> str:
        """What its lock is called: the list itself may be readable after an upload."""
        return f"notebooks-{hashlib.sha256(bytes(self.path)).hexdigest()[:16]}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the list against other notebooks.py, and read it again; raises BusyError."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.lock_name, wait=False))
            except BusyError as error:
                raise BusyError(f"{self.path}: {error}") from None

            self.close_to_others()
            self.load()
            problems = list(self.problems())
            if problems:
                raise UsageError("\n".join(problems))
            yield

    def close_to_others(self) -> None:
        """Have nobody else read it from now on: it has passwords."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & 0o077:
            log.info("%s was open to others (mode %o): closed now", self.path, mode)
            with contextlib.suppress(PermissionError):  # a file system without modes
                self.path.chmod(mode & 0o700)

    def save(self) -> None:
        """Replace the file, if it differs, by a private one of the same owner."""
        # An editor or a spreadsheet does not ask for our lock.
        if self.path.read_bytes() != self.data:
            log.warning("%s was changed meanwhile: what is new there is kept", self.path)
            changes = self.changes
            self.load()
            for username, values in changes.items():
                self.update(username, **values)

        data = self.document.encode()
        info = self.path.stat()
        if data == self.data and stat.S_IMODE(info.st_mode) == 0o600:
            return
        replace_private_file(self.path, data, info.st_uid, info.st_gid)
        self.data = data


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says besides the command and the file."""

    yes: bool = False  # do not ask
    reset: bool = False  # send what has not changed, too
    everything: bool = False  # shut down what is not Jupyter's, too
    only: frozenset[str] | None = None  # user names; None: all


@dataclasses.dataclass(frozen=True)
class Course:
    config: Config
    roster: Roster
    options: Options

    @property
    def students(self) -> list[Student]:
        """The students of the list whom the command is for."""
        only = self.options.only
        return [x for x in self.roster.students if only is None or x.username in only]


def load_course(path: Path, options: Options = Options()) -> Course:
    """Read both files; raises UsageError with everything that is wrong in either."""
    config, problems = read_config(path)
    try:
        roster = Roster(config.user_list)
    except UsageError as error:
        raise UsageError("\n".join([*problems, str(error)])) from None

    names = list(filter(None, roster.rows))
    problems += roster.problems()
    problems += [f"{config.path}: {each}" for each in exposed(config, names)]

    if config.group and config.group in roster.rows:
        problems.append(f"{path}: [Setup] group = {config.group}: is a student's name")
    for name in sorted((options.only or frozenset()).difference(names)):
        problems.append(f"--only {name}: is not in {roster.path}; {nearest(name, names)}")

    if problems:
        raise UsageError("\n".join(problems))
    if not roster.rows:
        raise UsageError(f"{roster.path}: there is no student in it")
    return Course(config, roster, options)


# == Members, and the accounts that setup makes ============================================
#
# A member is looked up once, and again after the teacher was asked. Each `ensure_` function
# does only what is missing: a setup that was interrupted is finished by the next one.
#
# Several courses may have an account: its mark names them. The first is its *owner*, which
# gives the system password, and hands the account over to the next when it is removed. The
# last one's `remove` deletes the account.


@dataclasses.dataclass(frozen=True)
class Member:
    """A student who has an account."""

    student: Student
    account: pwd.struct_passwd
    identity: Identity

    @property
    def username(self) -> str:
        return self.student.username

    @property
    def uid(self) -> int:
        return self.account.pw_uid

    @property
    def home(self) -> Path:
        return Path(self.account.pw_dir)


def find_members(students: Iterable[Student]) -> list[Member]:
    accounts = [(each, find_account(each.username)) for each in students]
    return [Member(each, acc, identity_of(acc)) for each, acc in accounts if acc]


def mark_of(config: Config) -> CourseMark:
    return CourseMark(config.path, config.path.parent.stat().st_ino)


class Claims:
    """The courses that an account's mark names, its owner first, as one of them sees it."""

    def __init__(self, account: pwd.struct_passwd, config: Config) -> None:
        self.marks = read_mark(account)[1] if is_ours(account) else []
        self.is_member = account.pw_name in group_members(config.group)
        has_moved = self.is_member and mark_of(config) not in self.marks
        self.places = {mark: find_course(mark, config, has_moved) for mark in self.marks}
        self.gone = [x for x in self.marks if not self.places[x]]
        found = [(mark, place) for mark, place in self.places.items() if place]
        self.mine = [mark for mark, place in found if is_same_course(place, config)]
        self.groups = ordinary_groups(account.pw_name) - {config.group}

    @property
    def valid(self) -> list[CourseMark]:
        """The courses that count, the owner first.

        One that is gone does if the account is in a group that may be its: it is elsewhere
        now, or not mounted.
        """
        return [x for x in self.marks if self.groups or x not in self.gone]

    @property
    def others(self) -> list[str]:
        """What says that other courses have the account: their files, or groups."""
        if not self.marks:  # version 1.0.0 left nothing but the group
            return [f"group {group}" for group in self.groups]
        groups = " or ".join(self.groups)
        hint = f" (gone; if for good, delete the group {groups}; if it is here, run setup)"
        others = [x for x in self.valid if x not in self.mine]
        return [f"{x.path}{hint if x in self.gone else ''}" for x in others]


def find_course(mark: CourseMark, config: Config, has_moved: bool) -> Path | None:
    """Return where the configuration file of a course is now, or None if that is unknown.

    A directory keeps its inode when it is moved. So another course is told from one that
    was at its path; and this one is known at another path, if it may have moved: two file
    systems have the same inodes, too.
    """
    try:
        found = mark.path.is_file() and mark.path.parent.stat().st_ino == mark.inode
    except OSError:  # a disk that does not answer
        found = True
    if found:
        return mark.path
    if has_moved and mark.inode == mark_of(config).inode:
        return config.path.with_name(mark.path.name)
    return None


def is_same_course(path: Path, config: Config) -> bool:
    """Say whether a configuration file is of this course: it names the same list."""
    with contextlib.suppress(OSError, UsageError):
        return path == config.path or os.path.samefile(
            read_config(path)[0].user_list, config.user_list
        )
    return False


def is_owned(account: pwd.struct_passwd | None, config: Config) -> bool:
    """Say whether this course owns an account: it made it, or nobody else has it now."""
    if account is None or not is_ours(account):
        return False
    claims = Claims(account, config)
    return not claims.valid or claims.valid[0] in claims.mine


def reason_to_stay(member: Member, config: Config) -> str:
    """Return why remove does not delete an account; nothing if it does."""
    if not is_ours(member.account):
        return "was not made by setup"
    others = Claims(member.account, config).others
    return f"is in {', '.join(others)}, too" if others else ""


def check_group(course: Course) -> None:
    """Refuse a group that another course has; raises UsageError."""
    config = course.config
    for account in filter(None, map(find_account, group_members(config.group))):
        claims = Claims(account, config)
        # For who is not in this list, a course that has moved was here.
        is_known = account.pw_name in course.roster.rows
        others = [x for x in claims.marks if not is_known or x not in claims.gone]
        if others and not claims.mine:
            raise UsageError(
                f"{config.path}: [Setup] group = {config.group}: is the group of the course"
                f" {others[0].path}, as of {account.pw_name}; give this course its own"
            )


def warn_of_strays(course: Course) -> None:
    """Name members of the group who have an account of the course, but no row."""
    if course.options.only is not None:  # the teacher does not think of all now
        return
    for student in course.students:
        if not student.username:
            log.warning("line %d has no username yet: setup makes one", student.line)
    for name in sorted(group_members(course.config.group)):
        if name not in course.roster.rows and is_owned(find_account(name), course.config):
            log.warning(
                "%s has an account that setup made, but no row in %s; to remove it,"
                " put the row back",
                *(name, course.roster.path),
            )


def is_account_of(student: Student, username: str, config: Config) -> bool:
    """Say whether an earlier setup of this course has made it for somebody of that name."""
    account = find_account(username)
    if account is None or not is_owned(account, config):
        return False
    is_namesake = account.pw_gecos.split(",")[0] == gecos_name(student)
    return is_namesake and username in group_members(config.group)


def ensure_account(student: Student, config: Config) -> str:
    """Make the account unless it exists; return what was done: new, adopted or kept.

    The home is made by `ensure_home`: useradd's own is open to all for a moment. Raises:
    Error if useradd refuses, or a home directory of that name is left over.
    """
    account = find_account(student.username)
    if account is None:
        add_account(student, config)
        return "new"

    if is_ours(account):
        if is_expired(student.username):  # a remove that failed has closed it
            run_program(["usermod", "--expiredate", "", "--", student.username])
        join_course(account, config)

    if is_local_group(config.group) and student.username not in group_members(config.group):
        run_program(["gpasswd", "--add", student.username, config.group])
        if not is_owned(find_account(student.username), config):
            return "adopted"
    return "kept"


def join_course(account: pwd.struct_passwd, config: Config) -> None:
    """Have an account's mark name this course, perhaps in place of one that is gone."""
    claims = Claims(account, config)
    if any(claims.places[mark] == mark.path for mark in claims.mine[:1]):
        return

    # It may be this one that is gone, or one that does not count any more.
    gone = claims.gone if claims.is_member or not claims.groups else []
    marks = claims.marks.copy()
    for mark in [*claims.mine, *gone][:1]:
        log.warning("%s: taken over from %s, which is gone", account.pw_name, mark.path)
        marks[marks.index(mark)] = mark_of(config)
    set_mark(account, dict.fromkeys([*marks, mark_of(config)]))


def leave_course(member: Member, config: Config, roster: Roster) -> None:
    """Undo what setup did for a member whose account stays."""
    roster.update(member.username, nb_pass="", port="")
    account = find_account(member.username) or member.account
    claims = Claims(account, config)
    if claims.marks and not claims.mine:
        return  # this is a copy of a course: another one, with no part in its group

    others = [mark for mark in claims.marks if mark not in claims.mine]
    if others:
        set_mark(account, others)
    if is_local_group(config.group) and member.username in group_members(config.group):
        run_program(["gpasswd", "--delete", member.username, config.group])


def set_mark(account: pwd.struct_passwd, courses: Iterable[CourseMark]) -> None:
    comment = ",".join([*account.pw_gecos.split(",")[:4], make_mark(courses)])
    run_program(["usermod", "--comment", comment, "--", account.pw_name])


def gecos_name(student: Student) -> str:
    return re.sub(r'[,:=\\"]', " ", printable(student.full_name))


def add_account(student: Student, config: Config) -> None:
    """Make an account that bears our mark, without a home; raises Error.

    Source: useradd(8) for the base directory, and login.defs(5) for the private group.
    """
    defaults = useradd_defaults()
    home = Path(defaults["HOME"], student.username)
    check_home_place(home.parent)
    options = ["--groups", config.group] if is_local_group(config.group) else []
    options += [*uid_options(home), *gid_options(student.username)]
    # Debian's /bin/sh has no history and no completion; another choice is the host's.
    shell = defaults["SHELL"] if defaults["SHELL"] not in ("", "/bin/sh") else "/bin/bash"

    try:
        run_program(
            ["useradd", "--no-create-home", "--home-dir", str(home), *options]
            # No subordinate ids (subuid(5)): what runs under them is hard to find.
            + ["--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0"]
            + ["--shell", shell]
            + ["--comment", f"{gecos_name(student)},,,,{make_mark([mark_of(config)])}"]
            + ["--", student.username]
        )
    except Error:
        # A setup that was killed may have called a useradd that has just ended.
        if not is_ours(find_account(student.username)):
            raise
    account = find_account(student.username)
    if account and is_home_of(account):  # others may have the gid of a home left over
        command = ["chgrp", "--recursive", "--no-dereference", "--", str(account.pw_gid)]
        run_as(identity_of(account), [*command, str(home)])


def uid_options(home: Path) -> list[str]:
    """Return useradd's options for the uid of an account with this home.

    A home that is left over, as when the system was installed again, gives its uid, which
    no other account gets. Raises: Error if that is somebody else's.
    """
    uids = range(read_login_defs("UID_MIN", 1000), read_login_defs("UID_MAX", 60000) + 1)
    if os.path.lexists(home):
        info = home.stat()
        if info.st_uid in uids and not find_account(info.st_uid) and home.is_dir():
            say(f"{home.name}: gets uid {info.st_uid}, whose home {home} is left over")
            return ["--uid", str(info.st_uid)]
        raise Error(
            f"{home} exists without an account, and uid {info.st_uid}, which owns it, is"
            f" somebody else's: move it to OLD, run setup, then `chown -R {home.name}: OLD"
            f" && mv {home} NEW && mv OLD {home}`"
        )

    used = {account.pw_uid for account in pwd.getpwall()}
    for path in home.parent.iterdir():
        with contextlib.suppress(OSError):  # their home may be a file system of their own
            used.add(path.lstat().st_uid)
    return ["--uid", str(new_uid(uids, used))]


def new_uid(uids: Sequence[int], used: Collection[int]) -> int:
    """Return a uid that nobody had before, and remember that it was given out.

    What somebody with that uid has left, such as a program with its setuid bit in the home
    of a friend, would be as the new one. Raises: Error.
    """
    mark = max((uid for uid in used if uid in uids), default=0)  # as useradd does
    with contextlib.suppress(FileNotFoundError, ValueError):
        mark = int(UID_FILE.read_text())
    free = (uid for uid in [*uids[bisect.bisect(uids, mark) :], *uids] if uid not in used)
    uid = next((uid for uid in free if not find_account(uid)), None)
    if uid is None:
        raise Error("all uids of this host are used: see UID_MAX in /etc/login.defs")
    if uid < mark:
        log.warning("uid %d: somebody may have had it before; raise UID_MAX", uid)

    UID_FILE.parent.mkdir(parents=True, exist_ok=True)
    replace_private_file(UID_FILE, str(max(uid, mark)).encode(), 0, 0)
    return uid


def gid_options(username: str) -> list[str]:
    """Return useradd's options for a private group that is left over; raises Error."""
    try:
        group = grp.getgrnam(username)
    except KeyError:
        return []
    users = [account for account in pwd.getpwall() if account.pw_gid == group.gr_gid]
    if group.gr_gid < read_login_defs("GID_MIN", 1000) or group.gr_mem or users:
        raise Error("is the name of a group of the system, or of others; take another")
    return ["--gid", str(group.gr_gid)]


def check_home_place(directory: Path) -> None:
    """Make sure that root can make homes in a directory; raises Error."""
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        probe = tempfile.mkdtemp(prefix=".", dir=directory)
        try:
            # Nobody has this uid: a student could put something into it.
            os.chown(probe, read_login_defs("UID_MAX", 60000), -1)
        finally:
            os.rmdir(probe)
    except OSError as error:
        raise Error(
            f"{directory} lets root make no homes ({error.strerror}). On NFS with"
            " root_squash make the account and its home on the file server: setup adopts"
            " accounts that exist"
        ) from None


def remove_empty_group(group: str) -> bool:
    """Delete the group when nobody is in it: groupdel refuses a primary one."""
    with contextlib.suppress(Error):  # there is none, perhaps
        if group and not group_members(group):
            run_program(["groupdel", "--", group])
            return True
    return False


# == Workers: something for each member ====================================================
#
# Effective ids belong to a whole process, so what is done with the ids of several members
# at once takes several processes. And a student can make one of our processes sleep in the
# kernel for ever: it may want a directory that the student's FUSE file system keeps locked.
# So a worker shows a sign of life each second; one that shows none for long is given up,
# and the others go on.
#
# A step for one member returns a value or raises; `Outcome` collects what went wrong.


class SignOfLife(Message):
    """The worker is not stuck."""


class Done(Message):
    """What the work returned: what JSON can express, or a message."""

    value: Any


class Failed(Message):
    """The error in which the work ended; a StuckError if the worker was given up."""

    reason: str
    is_stuck: bool = False


class Worker:
    """A child that does something for one member."""

    def __init__(self, function: Callable[[Member], Any], member: Member) -> None:
        self.member = member
        self.silence = 0.0  # seconds, as far as we were there to listen
        self.answer: Message | None = None
        self.child = Child.fork(lambda channel: work(channel, function, member))

    def is_finished(self, seconds: float) -> bool:
        """Take what it has sent in these seconds; say if it has ended, or is stuck."""
        self.silence += seconds
        while is_readable(self.child.channel.fileno()):
            self.silence = 0.0
            try:
                message, _ = self.child.channel.receive_message()
            except (EOFError, ValueError):
                ended = explain_exit(self.child.reap())
                text = f"its process ended unexpectedly: it {ended}"
                self.answer = self.answer or Failed(text)
                return True
            if not isinstance(message, SignOfLife):
                self.answer = message

        if self.silence < STUCK_SECONDS:
            return False
        self.answer = Failed(STUCK, is_stuck=True)
        self.child.stop(0, signal.SIGKILL)
        return True

    def result(self) -> Any:
        """Return what the work returned, or raise the Error in which it ended."""
        if isinstance(self.answer, Failed):
            raise (StuckError if self.answer.is_stuck else Error)(self.answer.reason)
        assert isinstance(self.answer, Done)
        return self.answer.value


def work(channel: Channel, function: Callable[[Member], Any], member: Member) -> None:
    """Do the work, with a sign of life each second; at first interrupts are held back."""

    def handle_interrupt(*_: object) -> NoReturn:
        for number in INTERRUPTS:  # a second one must not interrupt the cleaning up
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    def handle_alarm(*_: object) -> None:
        # A command that is suspended reads nothing for a while, and loses nothing.
        with contextlib.suppress(BlockingIOError):
            try:
                channel.send_message(SignOfLife(), wait=False)
            except BrokenPipeError:  # the command was killed
                handle_interrupt()

    for number in INTERRUPTS:
        signal.signal(number, handle_interrupt)
    signal.signal(signal.SIGALRM, handle_alarm)
    signal.setitimer(signal.ITIMER_REAL, HEARTBEAT_SECONDS, HEARTBEAT_SECONDS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)

    answer: Message
    try:
        answer = Done(function(member))
    except (Error, OSError) as error:
        answer = Failed(explain(error), isinstance(error, StuckError))

    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(BrokenPipeError):  # the command was killed
        try:
            channel.send_message(answer)
        except OSError as error:  # too long
            channel.send_message(Failed(explain(error)))


def run_workers(
    function: Callable[[Member], Any], members: Iterable[Member]
) -> Iterator[Worker]:
    """Do something for several members at once; yield each worker when it has ended."""
    waiting = list(members)[::-1]
    workers: list[Worker] = []
    looked = time.monotonic()
    try:
        while waiting or workers:
            while waiting and len(workers) < (os.cpu_count() or 1):
                with uninterrupted():  # until the child is ready to clean up
                    workers.append(Worker(function, waiting.pop()))
            channels = [worker.child.channel for worker in workers]
            select.select(channels, [], [], HEARTBEAT_SECONDS)

            # A long time may be that of our caller, or Ctrl-Z has suspended us and the
            # workers, too: it counts as a short one.
            now = time.monotonic()
            seconds, looked = min(now - looked, 2 * HEARTBEAT_SECONDS), now
            for worker in list(workers):
                if worker.is_finished(seconds):
                    workers.remove(worker)
                    yield worker
    finally:
        # We were interrupted. The others clean up, such as half a copied file.
        for worker in workers:
            worker.child.stop(1, signal.SIGTERM)


class Outcome:
    """Collects what a command did for each student, and says it.

    A line per student goes to standard output unless that is a terminal, which shows a bar;
    failures always go to standard error.
    """

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def done(self, username: str, text: str) -> None:
        if not sys.stdout.isatty() or log.isEnabledFor(logging.INFO):
            say(f"{username}: {text}")

    def failed(self, username: str, reason: str) -> None:
        earlier = self.failures.get(username)
        self.failures[username] = f"{earlier}; {reason}" if earlier else reason

    @contextlib.contextmanager
    def step(self, username: str) -> Iterator[None]:
        """Collect the error in which a step for a student ends."""
        try:
            yield
        except (Error, OSError) as error:
            self.failed(username, explain(error))

    def each(
        self, function: Callable[[Member], Value], members: Sequence[Member], label: str
    ) -> Iterator[tuple[Member, Value]]:
        """Have workers do something; yield whom it worked for, and collect the failures."""
        workers = run_workers(function, members)
        for worker in progress(workers, len(members), label):
            with self.step(worker.member.username):
                yield worker.member, worker.result()

    def members(self, students: Sequence[Student]) -> list[Member]:
        """Return those who have an account; the others fail."""
        members = find_members(students)
        present = {member.username for member in members}
        for student in students:
            if student.username not in present:
                label = student.username or f"line {student.line}"
                self.failed(label, "has no account; run setup first")
        return members

    def report(self) -> None:
        for username, reason in self.failures.items():
            log.error("%s: %s", username, reason)

    def finish(self, text: str) -> int:
        self.report()
        if self.failures:
            text += f" {len(self.failures)} failed: {', '.join(self.failures)}."
        say(text)
        return 1 if self.failures else 0


# == Copying trees =========================================================================
#
# One recursive copy serves `send`, `retrieve` and the IPython profile. It reads with the
# ids of one user and writes with those of another, so nobody gains anything by putting a
# link, a FIFO or somebody else's file in its way.
#
# It replaces files and destroys no work. A record beside the copies tells what was copied
# last. So a file that nobody has touched since is simply replaced; where only the copy was
# changed it stays; where both were, the copy is kept under another name.

MAX_ENTRIES = 100_000  # of a directory of a student's that is tidied up
MAX_FOLLOWED = 1000  # links of the material
MAX_PATH_LINKS = 40  # as in the kernel
MAX_LINKS = 5  # one behind the other; directories that lead to each other have no end
MAX_DEPTH = 100  # directories; each level of a copy holds three descriptors
ENTRY_BYTES = 4096  # what any file or directory counts for: it costs the owner an inode
PART_PREFIX = ".notebooks-part-"  # of files that are not whole yet
RECORD_NAME = ".notebooks-record.json"
MAX_RECORD_BYTES = 1 << 24  # of 80,000 files; a longer one counts as none
MAX_NAME_BYTES = 255  # of a file in most file systems
MAX_SHOWN_PATH = 500  # characters, of which a student can make 25,000
MAX_NAMED = 5  # files that a message names
COPY_CHUNK_BYTES = 1 << 24
LARGE_BYTES = 1 << 27
READ_BYTES = 1 << 18

# For how long nobody must have written to a file before it is copied, how long a save may
# take, and how long all files of a student are waited for.
SETTLE_SECONDS = 0.1
SAVE_SECONDS = 30.0
PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.02

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a FIFO, or a file with a lease on it (fcntl(2)), would hold us up.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
TEMPORARY_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What copy_file_range(2) says where it does not work, and a full disk (write(2)).
NOT_SHARED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# What names have that some file systems cannot hold, such as vfat, exfat and a share of
# Windows: characters, an end, a word; and what Python makes of bytes that are no UTF-8.
AWKWARD = re.compile(
    r'(?i)[\0-\x1f\x7f\udc80-\udcff"*:<>?\\|]|[. ]+\Z'
    r"|\A(con|prn|aux|nul|com\d|lpt\d)(?= *(\.|\Z))"
)

# What is kept of a copy that was changed, in a home and in the storage. The first opens as
# what it is: Jupyter hides names that end in ~.
MY_COPY = "{stem} (mine {number}){suffix}"
KEPT_COPY = "{stem}{suffix}.~{number}~"


class Change(enum.Enum):
    """What a file of the source is to the destination."""

    NEW = enum.auto()
    UNCHANGED = enum.auto()
    UPDATED = enum.auto()  # nobody has touched the copy
    KEPT = enum.auto()  # only the copy has changed: it stays
    CONFLICT = enum.auto()  # both have changed, or nobody knows
    BLOCKED = enum.auto()  # by a directory in its place


class CopyReport(Message, frozen=False):
    """What a copy did, in numbers of files, and the first things that went wrong."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    kept: int = 0
    skipped: int = 0
    backups: int = 0
    overwritten: int = 0  # changed copies, of which none was kept
    renamed: int = 0  # for a storage that cannot hold each name
    named: str = ""  # the first of those that were overwritten or renamed
    over_limit: str = ""
    copied_bytes: int = 0
    failed: int = 0
    first_failure: str = ""

    def add(self, other: "CopyReport") -> None:
        for name, value in vars(other).items():
            if isinstance(value, int):
                vars(self)[name] += value

    def fail(self, path: Path, error: OSError) -> None:
        self.failed += 1
        name = str(path)[:MAX_SHOWN_PATH]
        self.first_failure = self.first_failure or f"{name!r}: {error.strerror}"

    def name(self, kind: str, path: Path, text: str = "") -> None:
        """Count a file in a field, and name the first few."""
        vars(self)[kind] += 1
        number = vars(self)[kind]
        if number <= MAX_NAMED:
            comma = ", " if self.named else ""
            self.named += f"{comma}{str(path)[:MAX_SHOWN_PATH]!r}{text}"
        elif number == MAX_NAMED + 1:
            self.named += " ..."

    @property
    def problem(self) -> str:
        """What the teacher has to know besides the numbers."""
        problems = []
        if self.failed:
            problems.append(f"{self.failed} not copied, first {self.first_failure}")
        if self.over_limit:
            problems.append(f"more than retrieve_limit: {self.over_limit!r} is left out")
        return "; ".join(problems)

    def __str__(self) -> str:
        others = {
            "changed there and left alone": self.kept,
            "kept as backups": self.backups,
            "skipped (links and other special files)": self.skipped,
        }
        text = f"{self.new} new, {self.updated} updated, {self.unchanged} unchanged"
        return text + "".join(f", {others[x]} {x}" for x in others if others[x])


# A trusted directory, and the parts of a path below it, which are no links.
Place = tuple[Path, Iterable[str]]
# Of a dry run: every open below it fails with ENOTDIR.
NOWHERE: Place = Path(os.devnull), ()
# Size, modification and change time: a file that keeps all three has kept its content. No
# user can set the last one. Source: inode(7).
Stamp = tuple[int, int, int]
# Of files by device, inode and stamp.
Digests = dict[tuple[int, int, Stamp], str]
# Sizes and digests of the teacher's files, which cost nothing, by their paths.
Originals = dict[Path, tuple[int, str]]


def stamp_of(info: os.stat_result) -> Stamp:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def has_holes(info: os.stat_result) -> bool:
    """Say whether a large file has much less on the disk than it is long."""
    return info.st_size > LARGE_BYTES and info.st_blocks * 512 < info.st_size // 2


class Copied(NamedTuple):
    """What was copied to a path: its SHA-256 digest, and both files' stamps since."""

    digest: str
    source: Stamp
    destination: Stamp

    def is_in(self, fd: int, info: os.stat_result, stamp: Stamp) -> bool:
        """Say whether a file still has the content that it had with a stamp of these."""
        if stamp_of(info) == stamp:
            return True
        # A student could have us read terabytes of nothing.
        if info.st_size != stamp[0] or has_holes(info):
            return False
        return digest_file(fd, info.st_size) == self.digest


class CopyRecord:
    """What was copied into a directory, kept in a file there by the directory's owner.

    A student may delete or forge it: then the student's own files count as changed, or as
    unchanged, and nobody else's.
    """

    def __init__(self, directory_fd: int) -> None:
        """Read the file; one that is missing or nonsense counts as empty."""
        self.copied: dict[str, Any] = {}
        with (
            contextlib.suppress(OSError, ValueError, RecursionError),
            closing(os.open(RECORD_NAME, FILE_FLAGS, dir_fd=directory_fd)) as fd,
        ):
            copied = json.loads(os.pread(fd, MAX_RECORD_BYTES, 0))
            self.copied = copied if isinstance(copied, dict) else {}
        self.saved = self.copied.copy()

    def get(self, path: Path) -> Copied | None:
        try:
            digest, (a, b, c), (x, y, z) = self.copied[str(path)]
            return Copied(digest, (a, b, c), (x, y, z))
        except (LookupError, TypeError, ValueError):
            return None

    def save(self, directory_fd: int, writer: Identity, mode: int) -> None:
        """Write the file, whole at any time, if anything is new in it; raises OSError."""
        if self.copied == self.saved:
            return

        with temporary_file(directory_fd, writer) as (fd, temporary):
            with open(fd, "w", closefd=False) as file:
                json.dump(self.copied, file)
            with contextlib.suppress(PermissionError):  # a file system without modes
                os.fchmod(fd, mode)
            os.rename(
                temporary, RECORD_NAME, src_dir_fd=directory_fd, dst_dir_fd=directory_fd
            )


@contextlib.contextmanager
def temporary_file(
    directory_fd: int, writer: Identity, name: str = ""
) -> Iterator[tuple[int, str]]:
    """Make a file that is to be renamed when it is whole; else it is deleted at the end."""
    name = name or PART_PREFIX + secrets.token_hex(8)
    with acting_as(writer):
        fd = os.open(name, TEMPORARY_FLAGS, 0o600, dir_fd=directory_fd)
    try:
        with closing(fd):
            yield fd, name
    finally:
        with acting_as(writer), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory_fd)


def real_path(fd: int) -> Path:
    """Return where an open file or directory is, without links: proc(5)."""
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def resolve(name: str, directory_fd: int, makers: set[int]) -> int:
    """Open a path, which opens no file yet (O_PATH), and add who made the links on it.

    Source: path_resolution(7). Raises: OSError.
    """
    flags = os.O_PATH | os.O_CLOEXEC
    fd, parts, links = os.open(".", flags, dir_fd=directory_fd), [name], 0
    try:
        while parts:
            inner_fd = os.open(parts.pop() or ".", flags | os.O_NOFOLLOW, dir_fd=fd)
            info = os.fstat(inner_fd)

            if stat.S_ISLNK(info.st_mode):
                with closing(inner_fd):
                    text = os.readlink("", dir_fd=inner_fd)
                makers.add(info.st_uid)
                parts += text.split("/")[::-1]
                links += 1
                if links > MAX_PATH_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if not text.startswith("/"):
                    continue
                inner_fd = os.open("/", flags)

            os.close(fd)
            fd = inner_fd
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_directory(place: Place, identity: Identity, create: bool = False) -> int:
    """Return a descriptor of a directory.

    Runs as: `identity`, with which missing directories are made too. Raises: Error that
    names the directory which is missing, a link or not accessible.
    """
    path, parts = place
    with acting_as(identity):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for part in parts:
                path = path / part
                with closing(fd) as parent_fd:
                    if create:
                        with contextlib.suppress(FileExistsError):
                            os.mkdir(part, 0o700, dir_fd=parent_fd)
                    fd = os.open(part, DIRECTORY_FLAGS, dir_fd=parent_fd)

        except NotADirectoryError:
            raise Error(
                f"{str(path)!r} is a link or a file, not a directory: not followed"
            ) from None
        except OSError as error:
            raise Error(f"{str(path)!r}: {error.strerror}") from None
    return fd


def copy_data(source_fd: int, destination_fd: int, size: int) -> int:
    """Copy up to `size` bytes in the kernel and return how many there were."""
    copied, count = 0, 1
    while count and copied < size:
        wanted = min(size - copied, COPY_CHUNK_BYTES)

        try:  # it shares extents where it can
            count = os.copy_file_range(source_fd, destination_fd, wanted)
        except OSError as error:
            if error.errno not in NOT_SHARED:
                raise
            count = os.sendfile(destination_fd, source_fd, None, wanted)  # any file
        copied += count
    return copied


def digest_file(fd: int, size: int = sys.maxsize) -> str:
    """Return the SHA-256 digest of a file that may grow; its position stays where it is."""
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(fd, min(size - offset, READ_BYTES), offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def portable_name(name: str) -> str:
    """Return a name that stands for this one alone, and that any storage can hold."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    stem, suffix = os.path.splitext(AWKWARD.sub(lambda found: f"{found[1] or ''}_", name))
    raw = os.fsencode(stem)[:180] + os.fsencode(f"-{digest}") + os.fsencode(suffix)[:20]
    return raw.decode(errors="ignore").rstrip(". ")  # half a character is no UTF-8


def is_there(name: str, directory_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):  # NOWHERE
        return False
    return True


def can_hold(name: str, directory_fd: int, writer: Identity) -> bool:
    """Ask a file system whether it has place for a name, and takes no other for it."""
    alias = name.rstrip(". ").swapcase()
    with contextlib.suppress(OSError):
        if not AWKWARD.search(name):
            return not is_there(name, directory_fd)  # where A is a, it may be
        differs = alias == name or is_there(alias, directory_fd)
        with temporary_file(directory_fd, writer, name):
            return differs or not is_there(alias, directory_fd)
    return False


def free_name(pattern: str, name: str, directory_fd: int) -> str:
    """Return the first free name after a pattern of {stem}, {suffix} and {number}."""
    if len(os.fsencode(name)) > MAX_NAME_BYTES - 20:
        # Names that begin alike must not share their copies: to count up all of the
        # others' would take time by the square of their number.
        name = portable_name(name)
    stem, suffix = os.path.splitext(name)

    fill = functools.partial(pattern.format, stem=stem, suffix=suffix)
    names = (fill(number=number) for number in itertools.count(1))
    return next(each for each in names if not is_there(each, directory_fd))


def is_being_saved(name: str, directory_fd: int) -> bool:
    """Say whether Jupyter writes a file at this moment: it has a copy beside it then.

    Source: jupyter_server.services.contents.fileio, atomic_writing.
    """
    try:
        info = os.stat(f".~{name}", dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return False
    return time.time() - info.st_ctime < SAVE_SECONDS  # else a crash has left it


@dataclasses.dataclass(frozen=True)
class Item:
    """A file or directory on its way: opened for reading, and where it goes."""

    path: Path  # below the source
    name: str  # in the directory that it goes into
    fd: int
    info: os.stat_result
    source_fd: int  # of the directory that it is in
    destination_fd: int  # of the directory that it goes into


@dataclasses.dataclass
class TreeCopy:
    """A recursive copy that reads as one user and writes as another.

    It walks by descriptors, never by paths, so that nobody who moves, links or replaces
    something meanwhile can lead it elsewhere. Only regular files and directories of the
    source's own file system are copied, and what links lead to where they are followed: in
    a teacher's source, never in a student's. A file is written beside its destination and
    renamed over it: there is never half a file, and a link there is replaced.
    """

    reader: Identity
    writer: Identity
    keep_as: str = ""  # what changed copies are kept as: see `free_name`; empty: they go
    keep_all: bool = False  # a storage: keeps what nobody has changed, too, under any name
    limit: int = sys.maxsize  # in bytes; each file counts ENTRY_BYTES at least
    wanted: Callable[[Path], bool] = lambda path: True  # of relative paths
    recorded: bool = True  # with a record of what was copied
    reset: bool = False  # replace changed copies even if the source has not changed
    mode: int = 0  # what group and others may do besides what the source lets them
    dry_run: bool = False  # only count
    digests: Digests = dataclasses.field(default_factory=dict)  # those that are known
    originals: Originals = dataclasses.field(default_factory=dict)
    report: CopyReport = dataclasses.field(default_factory=CopyReport)
    patience: float = PATIENCE_SECONDS
    needed_bytes: int = 0
    uncounted: Path | None = None  # where our own link is
    follows: bool = False  # links of the source, but to none of these
    forbidden: Sequence[Path] = ()
    followed: dict[Path, Path] = dataclasses.field(default_factory=dict)  # links, and where

    def run(self, source: Place, destination: Place) -> CopyReport:
        """Copy one directory into another, made if it is missing; raises Error."""
        with (
            closing(open_directory(source, self.reader)) as source_fd,
            closing(self.open_destination(destination)) as destination_fd,
        ):
            self.followed[Path()] = real_path(source_fd)
            with acting_as(self.writer), contextlib.suppress(PermissionError):
                self.record = CopyRecord(destination_fd)
                if self.mode and not self.dry_run:
                    mode = os.fstat(destination_fd).st_mode
                    os.fchmod(destination_fd, stat.S_IMODE(mode) | self.mode)

            try:
                self.copy_directory(source_fd, destination_fd, Path())
            finally:
                if self.recorded and not self.dry_run:
                    mode = 0o600 | self.mode & 0o066
                    with acting_as(self.writer), contextlib.suppress(IsADirectoryError):
                        self.record.save(destination_fd, self.writer, mode)
        return self.report

    def open_destination(self, destination: Place) -> int:
        try:
            return open_directory(destination, self.writer, not self.dry_run)
        except Error:
            if not self.dry_run:
                raise
            return os.open(NOWHERE[0], os.O_PATH | os.O_CLOEXEC)

    def charge(self, size: int, path: Path) -> bool:
        """Take from the limit, or remember the first path for which it does not do."""
        if size > self.limit:
            self.report.over_limit = self.report.over_limit or str(path)[:MAX_SHOWN_PATH]
            return False
        self.limit -= size
        return True

    def copy_directory(self, source_fd: int, destination_fd: int, path: Path) -> None:
        names = set() if self.dry_run else self.tidy_up(destination_fd)

        with os.scandir(source_fd) as entries:
            for entry in entries:
                inner = path / entry.name
                ours = entry.name.startswith((PART_PREFIX, RECORD_NAME))
                if ours or not self.wanted(inner):
                    continue
                if not self.charge(ENTRY_BYTES, path / "..."):
                    return
                try:
                    self.copy_entry(entry, source_fd, destination_fd, inner, names)
                except OSError as error:
                    # With a full disk the others would fail, too.
                    if error.errno in FULL:
                        raise Error(f"{error.strerror}; {self.report}") from None
                    self.leave_out(inner, error)

    def tidy_up(self, directory_fd: int) -> set[str]:
        """Remove what a copy that was killed has left, and return what else is there."""
        names, count = set(), None if self.keep_all else MAX_ENTRIES
        with acting_as(self.writer), os.scandir(directory_fd) as entries:
            for entry in itertools.islice(entries, count):
                names.add(entry.name)
                if entry.name.startswith(PART_PREFIX):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.name, dir_fd=directory_fd)
        return names

    def stored_name(self, path: Path, directory_fd: int, names: set[str]) -> str:
        """Return the name that a file has in the storage, the same one each time.

        Where A is a, the one that came first keeps its name: the storage tells that.
        """
        if not self.keep_all or path.name in names:
            return path.name

        other = portable_name(path.name)
        with acting_as(self.writer):
            # A dry run does not ask: the file is new under either name.
            is_new = not is_there(other, directory_fd)
            if is_new and (self.dry_run or can_hold(path.name, directory_fd, self.writer)):
                return path.name
        self.report.name("renamed", path, f" is {other!r}")
        return other

    def copy_entry(
        self,
        entry: "os.DirEntry[str]",
        source_fd: int,
        destination_fd: int,
        path: Path,
        names: set[str],
    ) -> None:
        """Copy one entry of a directory, if it is something that is copied."""
        with closing(self.open_entry(entry, source_fd, path)) as fd:
            name = self.stored_name(path, destination_fd, names)
            item = Item(path, name, fd, os.fstat(fd), source_fd, destination_fd)
            mode = item.info.st_mode
            near = path in self.followed or item.info.st_dev == os.fstat(source_fd).st_dev

            if stat.S_ISDIR(mode) and near and len(path.parts) <= MAX_DEPTH:
                self.enter_directory(item)
            elif not stat.S_ISREG(mode):
                raise OSError(0, "lies too deep" if near else "is another file system")
            else:
                self.copy_file(item)

    def open_entry(self, entry: "os.DirEntry[str]", source_fd: int, path: Path) -> int:
        """Open an entry, or what a link leads to; raises OSError with why not."""
        is_link = self.follows and entry.is_symlink()
        is_file = entry.is_file(follow_symlinks=False)
        if not (is_link or is_file or entry.is_dir(follow_symlinks=False)):
            raise OSError(0, "is no file")  # to open a device may have effects
        with acting_as(self.reader):
            if is_link:
                return self.follow_link(path, source_fd)
            return os.open(entry.name, FILE_FLAGS, dir_fd=source_fd)

    def follow_link(self, path: Path, source_fd: int) -> int:
        """Open what a link leads to; raises OSError with why not. Runs as: the reader."""
        self.followed[path] = real_path(source_fd)
        makers: set[int] = set()
        with closing(resolve(path.name, source_fd, makers)) as fd:
            info, reason = os.fstat(fd), self.forbids(path, real_path(fd))
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
                reason = "leads to no file"
            # A link's maker may have fewer rights than the reader, but for their own files.
            if makers - {0, self.reader.uid, info.st_uid}:
                reason = "is somebody else's link"

            if len(self.followed) > MAX_FOLLOWED:
                reason = "is one of too many links"
            if reason:
                raise OSError(0, reason)
            return os.open(f"/proc/self/fd/{fd}", FILE_FLAGS & ~os.O_NOFOLLOW)

    def forbids(self, path: Path, target: Path) -> str:
        """Return why a link must not be followed to a target, if it must not."""
        above = [self.followed[x] for x in (path, *path.parents) if x in self.followed]
        if any(each.is_relative_to(target) for each in above):
            return "leads to a directory that it is in"
        if len(above) > MAX_LINKS:
            return "lies behind too many links"
        for each in self.forbidden:
            inside = target.is_relative_to(each) and not target.is_relative_to(above[-1])
            if inside or each.is_relative_to(target):
                return "leads to what is not for students"
        return ""

    def leave_out(self, path: Path, error: OSError) -> None:
        """Count what is never copied, and what could not be."""
        if error.errno:
            self.report.fail(path, error)
        elif path != self.uncounted:
            self.report.skipped += 1

    def enter_directory(self, item: Item) -> None:
        with acting_as(self.writer):
            inner_fd = self.open_inner(item)
        with closing(inner_fd):
            if not self.dry_run:
                mode = item.info.st_mode & 0o755 | self.mode
                # At once, or a colleague could not go on where we were interrupted. It may
                # be theirs. Without its first three bits nobody could copy into it again.
                with acting_as(self.writer), contextlib.suppress(PermissionError):
                    os.fchmod(inner_fd, mode | 0o700)
            self.copy_directory(item.fd, inner_fd, item.path)

    def open_inner(self, item: Item) -> int:
        """Open a directory, or make it; what else has that name is moved aside."""
        name, directory_fd = item.name, item.destination_fd
        try:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=directory_fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.dry_run:
                return os.open(NOWHERE[0], os.O_PATH | os.O_CLOEXEC)
            if isinstance(error, NotADirectoryError):  # links too
                self.move_aside(item)
        os.mkdir(name, 0o700, dir_fd=directory_fd)
        return os.open(name, DIRECTORY_FLAGS, dir_fd=directory_fd)

    def move_aside(self, item: Item) -> None:
        """Rename what is in the place of an item, to a name that is free."""
        fd = item.destination_fd
        name = free_name(self.keep_as or MY_COPY, item.name, fd)
        os.rename(item.name, name, src_dir_fd=fd, dst_dir_fd=fd)
        self.report.backups += 1

    def compare(self, item: Item) -> Change:
        """Say what a file is to the destination. Runs as: the writer."""
        try:
            old_fd = os.open(item.name, FILE_FLAGS, dir_fd=item.destination_fd)
        except (FileNotFoundError, NotADirectoryError):
            return Change.NEW
        except OSError:  # a link, or unreadable
            return Change.CONFLICT

        with closing(old_fd):
            old = os.fstat(old_fd)
            if not stat.S_ISREG(old.st_mode):
                return Change.BLOCKED if stat.S_ISDIR(old.st_mode) else Change.CONFLICT
            change = self.compare_content(item, old_fd, old)
            return Change.CONFLICT if self.keep_all and change is Change.UPDATED else change

    def compare_content(self, item: Item, old_fd: int, old: os.stat_result) -> Change:
        """Compare with a regular file, by stamps where the record has both."""
        copied = self.record.get(item.path)
        if copied and (stamp_of(item.info), stamp_of(old)) == copied[1:]:
            return Change.UNCHANGED
        if old.st_size == item.info.st_size:
            digest = self.digest_of(item.info, item.fd)
            if digest == digest_file(old_fd, old.st_size):
                self.remember(item, digest, stamp_of(old))
                return Change.UNCHANGED

        # They differ: which has changed since the one was copied?
        if copied is None:
            return Change.CONFLICT
        if copied.is_in(old_fd, old, copied.destination):
            return Change.UPDATED
        if self.reset or not copied.is_in(item.fd, item.info, copied.source):
            return Change.CONFLICT
        return Change.KEPT

    def remember(self, item: Item, digest: str, destination: Stamp) -> None:
        copied = Copied(digest, stamp_of(item.info), destination)
        self.record.copied[str(item.path)] = copied

    def copy_file(self, item: Item) -> None:
        """Copy a file unless the destination has it; again, if it changes meanwhile."""
        change, charged = None, ENTRY_BYTES
        while change is None:
            started = time.monotonic()
            item = dataclasses.replace(item, info=self.wait_settled(item))
            # Not before: it may have grown while we waited.
            if not self.dry_run:
                size = 0 if self.is_original(item) else max(item.info.st_size, ENTRY_BYTES)
                if not self.charge(size - charged, item.path):
                    return
                charged = size
            change = self.copy_once(item)
            if change is None:  # a student could have us copy it for ever
                self.patience -= max(time.monotonic() - started, POLL_SECONDS)

        if change is Change.CONFLICT and not self.keep_as:
            self.report.name("overwritten", item.path)
        is_update = change in (Change.CONFLICT, Change.BLOCKED)
        vars(self.report)["updated" if is_update else change.name.lower()] += 1

    def is_original(self, item: Item) -> bool:
        """Say whether a file is as the teacher has it: that costs nothing of the limit."""
        size, digest = self.originals.get(item.path, (-1, ""))
        if size != item.info.st_size:
            return False
        copied = self.record.get(item.path)  # ours, not the student's
        if copied and copied.source == stamp_of(item.info):
            return copied.digest == digest
        return self.digest_of(item.info, item.fd) == digest

    def wait_settled(self, item: Item) -> os.stat_result:
        """Wait until nobody writes to a file, but not for ever; return what it is then.

        Jupyter empties a notebook before it writes it. Runs as: the reader.
        """
        saved = False

        with acting_as(self.reader):
            while True:
                info = os.fstat(item.fd)
                age = time.time() - info.st_mtime
                if self.patience <= 0 or not 0 <= age < SAVE_SECONDS:
                    return info

                if is_being_saved(item.path.name, item.source_fd):
                    saved = True
                elif saved or age > SETTLE_SECONDS:
                    return info  # a save that began since is noticed after the copy
                self.patience -= POLL_SECONDS
                time.sleep(POLL_SECONDS)

    def copy_once(self, item: Item) -> Change | None:
        """As the writer, whose quota counts, copy a file unless the destination has it.

        Returns: None if the file was written to meanwhile, and nothing has been done.
        """
        with acting_as(self.writer):
            change = self.compare(item)
            if change in (Change.UNCHANGED, Change.KEPT):
                return change

            self.needed_bytes += item.info.st_size
            is_done = self.dry_run or self.write_file(item, change)
            return change if is_done else None

    def write_file(self, item: Item, change: Change) -> bool:
        """Write a file under another name, then rename it to its own; return if it did."""
        info = item.info
        with temporary_file(item.destination_fd, self.writer) as (new_fd, temporary):
            os.lseek(item.fd, 0, os.SEEK_SET)
            copied = copy_data(item.fd, new_fd, info.st_size)
            if stamp_of(os.fstat(item.fd)) != stamp_of(info) and self.patience > 0:
                return False

            with contextlib.suppress(PermissionError):  # a file system without modes
                os.utime(new_fd, ns=(info.st_mtime_ns, info.st_mtime_ns))
                os.fchmod(new_fd, info.st_mode & 0o755 | 0o600 | self.mode & 0o066)
            self.replace(item, change, temporary)

            self.report.copied_bytes += copied
            digest = self.digest_of(info, new_fd)
            self.remember(item, digest, stamp_of(os.fstat(new_fd)))
        return True

    def replace(self, item: Item, change: Change, temporary: str) -> None:
        """Rename a file that is whole to the name of an item, over what has that name."""
        fd, link = item.destination_fd, ""
        if change is Change.BLOCKED or change is Change.CONFLICT and self.keep_as:
            self.move_aside(item)
        elif change is Change.UPDATED:
            # Somebody may begin to save it at this moment: it has another name until then.
            link = free_name(MY_COPY, item.name, fd)
            with contextlib.suppress(OSError):  # a file system without links
                os.link(
                    item.name, link, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False
                )

        os.rename(temporary, item.name, src_dir_fd=fd, dst_dir_fd=fd)
        if link:
            self.drop_untouched(item, link)

    def drop_untouched(self, item: Item, link: str) -> None:
        """Delete the copy that was replaced, if it still has the content that was sent."""
        copied = self.record.get(item.path)
        with contextlib.suppress(OSError):
            with closing(os.open(link, FILE_FLAGS, dir_fd=item.destination_fd)) as old_fd:
                old = os.fstat(old_fd)
                untouched = copied and copied.is_in(old_fd, old, copied.destination)
            if untouched and not is_being_saved(item.name, item.destination_fd):
                os.unlink(link, dir_fd=item.destination_fd)
            else:
                self.report.backups += 1

    def digest_of(self, info: os.stat_result, fd: int) -> str:
        """Return the digest of a source, which is that of its copy."""
        key = info.st_dev, info.st_ino, stamp_of(info)
        if key not in self.digests:
            self.digests[key] = digest_file(fd, info.st_size)
        return self.digests[key]


# == Homes, and their archives =============================================================
#
# A home is made from the skeleton directory, and from the archive that an earlier `remove`
# has packed: so a course moves to another host. tar(1) runs as the student: it can read
# what is theirs, and write nowhere else.

ARCHIVE_NAME = "{}.tar.gz"


def ensure_home(account: pwd.struct_passwd, config: Config) -> None:
    """Make an account's home, private and whole from its first moment; from its archive.

    A home that exists is left as it is. Source: useradd(8), the skeleton directory. Raises:
    Error if that is somebody else's.
    """
    home = Path(account.pw_dir)
    if is_home_of(account) or not is_ours(account) and os.path.lexists(home):
        return
    if os.path.lexists(home):
        raise Error(f"{home} is not theirs; move it away, and run setup again")

    # It is built beside its place, of which a setup that was killed leaves a part.
    check_home_place(home.parent)
    unfinished = home.with_name(f".{home.name}-new")
    skeleton = useradd_defaults()["SKEL"]
    delete_tree(unfinished)
    unfinished.mkdir(mode=0o700)
    options = ["--recursive", "--no-dereference", "--"]
    owner = f"{account.pw_uid}:{account.pw_gid}"
    try:
        if not is_ours(account) or not unpack_home(account, config, unfinished):
            # It is still root's: a student could have cp(1) write through a link in it.
            if os.path.isdir(skeleton):
                run_program(["cp", *options, f"{skeleton}/.", str(unfinished)])
            run_program(["chown", *options, owner, str(unfinished)])
        unfinished.rename(home)
    except BaseException:
        delete_tree(unfinished)
        raise


def unpack_home(account: pwd.struct_passwd, config: Config, home: Path) -> bool:
    """Unpack what `archive_home` has packed; return if there is any. Raises: Error."""
    if not config.archive_dir:
        return False
    archive = config.archive_dir / ARCHIVE_NAME.format(account.pw_name)
    try:
        with acting_as(identity_of(config.storage_owner)):
            fd = os.open(archive, FILE_FLAGS)
    except FileNotFoundError:
        return False

    command = ["tar", "--extract", "--gzip", "--preserve-permissions", "--file=-"]
    with closing(fd):
        os.chown(home, account.pw_uid, account.pw_gid)
        packed = time.strftime("%Y-%m-%d", time.localtime(os.fstat(fd).st_mtime))
        if not run_as(identity_of(account), [*command, f"--directory={home}"], stdin=fd):
            raise Error(f"{archive} could not be unpacked; see `tar -tzf`, and the room")
    say(f"{account.pw_name}: has their home of {packed} again, from {archive}")
    return True


def archive_home(config: Config, member: Member) -> bool:
    """Pack the home of a member who runs nothing any more, and check the archive.

    Returns: whether there is a home. Runs as: tar(1) as the member, who can read what is
    theirs; the archive is written as the owner of the storage. Raises: Error if not all
    was packed.
    """
    assert config.archive_dir
    if not os.path.lexists(member.home) and os.path.isdir(member.home.parent):
        return False
    if config.archive_dir.is_relative_to(member.home):
        raise Error("archive_dir lies in their home; set another")
    writer, name = identity_of(config.storage_owner), ARCHIVE_NAME.format(member.username)
    temporary = PART_PREFIX + name  # the same one as that of a remove that was killed

    with acting_as(writer):
        config.archive_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (config.archive_dir / temporary).unlink(missing_ok=True)
        directory_fd = os.open(config.archive_dir, os.O_RDONLY | os.O_CLOEXEC)

    with (
        closing(directory_fd),
        temporary_file(directory_fd, writer, temporary) as (fd, _),
    ):
        pack_home(member, fd, config.archive_limit)
        with acting_as(writer):
            with contextlib.suppress(FileNotFoundError):
                kept = free_name(KEPT_COPY, name, directory_fd)
                os.rename(name, kept, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            os.fsync(directory_fd)
    return True


def pack_home(member: Member, fd: int, max_bytes: int) -> None:
    """Write the archive of a home into a file, and read it again; raises Error."""
    # Directories that they have closed are theirs, and their end is near.
    run_as(member.identity, ["chmod", "--recursive", "u+rwX", "--", str(member.home)])

    pack = ["tar", "--create", "--gzip", "--sparse", "--one-file-system", "--file=-"]
    pack += [f"--directory={member.home}", "."]

    if not run_as(member.identity, pack, max_bytes=max_bytes, stdout=fd):
        if os.fstat(fd).st_size >= max_bytes:
            raise Error("not deleted: the archive would be larger than archive_limit")
        raise Error(
            "not deleted: tar could not pack all of the home, for want of room, or for"
            f" files of others (find {member.home} ! -user {member.username})"
        )
    os.fsync(fd)
    os.lseek(fd, 0, os.SEEK_SET)

    if not run_as(member.identity, ["tar", "--list", "--gzip", "--file=-"], stdin=fd):
        raise Error("not deleted: the archive cannot be read again; is the disk broken?")


# == Runtime directories ===================================================================
#
# Servers and kernels keep their connection files and sockets in a private directory of
# their student's, below one of root's that is gone when nobody has one in it. The paths are
# short: that of a kernel's unix socket must fit into 107 bytes (unix(7)). They are not in
# /run, which is small: the whole system fails when a student has filled it.

RUNTIME_DIR = Path("/var/lib/notebooks")
CONFIG_DIR = RUNTIME_DIR / "config"  # root's, where servers look for configuration
CONTROL_DIR = RUNTIME_DIR / "control"  # root's, with a socket of each server, by its port
TEMPLATE_HOME = RUNTIME_DIR / "template"  # HOME of the helpers: nobody makes it
# Shells read it, for /etc/profile sets PATH once more in those of a log-in.
PATH_SCRIPT = CONFIG_DIR / "path.sh"
ADD_PATH = (
    'case ":$PATH:" in *":$NOTEBOOKS_PATH:"*) ;; *) PATH=$NOTEBOOKS_PATH:$PATH ;; esac\n'
)


def runtime_dir_of(account: pwd.struct_passwd) -> Path:
    return RUNTIME_DIR / str(account.pw_uid)


def ensure_config_dir() -> None:
    """Make root's directories. Who may list the upper one could lock it, so nobody may."""
    CONFIG_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    CONTROL_DIR.mkdir(mode=0o700, exist_ok=True)
    RUNTIME_DIR.chmod(0o711)
    # Without this file jupyter_core takes the directory for one of IPython 3's.
    (CONFIG_DIR / "migrated").touch(mode=0o644)
    if not PATH_SCRIPT.exists():
        PATH_SCRIPT.write_text(ADD_PATH)


def ensure_runtime_dir(account: pwd.struct_passwd) -> None:
    ensure_config_dir()
    directory = runtime_dir_of(account)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if os.lstat(directory).st_uid != account.pw_uid:
        os.chown(directory, account.pw_uid, account.pw_gid, follow_symlinks=False)


def clear_runtime_dir(member: Member) -> None:
    """Remove, with the member's ids, what their servers and kernels have left."""
    ensure_runtime_dir(member.account)  # a launch that was killed may have left it to root
    directory = runtime_dir_of(member.account)
    with acting_as(member.identity):
        directory.chmod(0o700)  # its owner may have closed it
        with os.scandir(directory) as entries:
            for entry in itertools.islice(entries, MAX_ENTRIES):
                with contextlib.suppress(OSError):  # a directory: not a kernel's
                    os.unlink(entry.path)
    with contextlib.suppress(OSError):  # not empty
        directory.rmdir()


def bind_control_socket(port: int) -> socket.socket:
    """Return the socket through which root alone tells a server what is new."""
    path = CONTROL_DIR / str(port)
    path.unlink(missing_ok=True)  # of an earlier server
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.bind(str(path))
    control.listen()
    control.setblocking(False)
    return control


def ensure_rehearsal_home() -> Path:
    """Make an empty home for the template process that calls this."""
    ensure_config_dir()
    home = TEMPLATE_HOME.with_name(f"{TEMPLATE_HOME.name}-{os.getpid()}")
    shutil.rmtree(home, ignore_errors=True)  # of an earlier process of this pid
    home.mkdir(mode=0o700)
    return home


def clear_rehearsal_homes() -> None:
    """Remove the homes of template processes that were killed while they rehearsed."""
    for home in RUNTIME_DIR.glob(f"{TEMPLATE_HOME.name}-*"):
        pid = home.name.rpartition("-")[2]
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(home, ignore_errors=True)


def clear_empty_runtime_dir() -> None:
    """Remove RUNTIME_DIR once no student has a directory in it."""
    clear_rehearsal_homes()
    with contextlib.suppress(OSError):  # a launch may put something in at this moment
        if {*os.listdir(RUNTIME_DIR)} <= {CONFIG_DIR.name, CONTROL_DIR.name}:
            shutil.rmtree(CONTROL_DIR, ignore_errors=True)
            shutil.rmtree(CONFIG_DIR)
            RUNTIME_DIR.rmdir()


# == Limits ================================================================================
#
# What each student may use of this host. systemd has all that a user runs in one *slice*,
# notebooks as well as ssh, for which Linux counts memory, processors and processes: cgroups
# version 2. A server enters it, in a *scope* of its own, before it builds anything; what it
# starts stays there. The limits are those of the slice, until the host is restarted: launch
# sets them again. Elsewhere there is RLIMIT_NPROC alone.

SYSTEMD_DIR = Path("/run/systemd/system")  # it is there if systemd runs: sd_booted(3)
CGROUP_DIR = Path("/sys/fs/cgroup")
STUDENTS_SLICE = "user.slice"  # of all users
# Where systemd keeps properties until the host is restarted, and those that we set.
CONTROL_FILES = "/run/systemd/system.control"
PROPERTIES = (
    "MemoryMax",
    "MemoryMin",
    "MemorySwapMax",
    "CPUQuota",
    "CPUWeight",
    "TasksMax",
)
NO_LIMIT = (1 << 64) - 1  # org.freedesktop.systemd1(5)
SCOPE_SECONDS = 10.0  # in which systemd must have moved a process
TEACHERS_WEIGHT = 10000  # of the processors, where each student has 100: the most there is
RESERVED_BYTES = 256 << 20  # for root's log-in
HOSTS_SHARE = 0.1  # of memory and processes, which students leave to the host
HOSTS_BYTES = 512 << 20  # which the host has at least, or else half of its memory

FULL_SHARE = 0.9  # of the memory, where a cell is interrupted
USAGE_SECONDS = 1.0  # between two looks at what a student uses
QUIET_SECONDS = 60.0  # after which something is told again

Call = tuple[str, str, tuple[object, ...]]  # method, signature, arguments


class Usage(NamedTuple):
    """What all processes of a student use, and have been refused."""

    memory: int  # bytes, without what the cache of files can give back
    memory_limit: int  # bytes; 0: none
    processes: int
    process_limit: int
    killed: int  # processes for want of memory, since the slice is there
    refused: int  # times that no process could be started


def has_slices() -> bool:
    """Say whether systemd runs this host, with cgroups version 2, and can be asked."""
    if not SYSTEMD_DIR.exists() or not Path("/run/dbus/system_bus_socket").exists():
        return False
    with contextlib.suppress(OSError):  # version 1
        controllers = CGROUP_DIR.joinpath("cgroup.controllers").read_text().split()
        return {"cpu", "memory", "pids"} <= {*controllers}
    return False


def slice_of(uid: int) -> str:
    return f"user-{uid}.slice"


def read_counts(path: Path) -> dict[str, int]:
    """Read a file of cgroups: a number, `max` for none, or lines of names and numbers."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {
        row[0] if len(row) > 1 else "": int(row[-1].replace("max", "0")) for row in rows
    }


def read_usage(uid: int) -> Usage | None:
    """Return what a student uses, if they run anything in a slice."""
    path = CGROUP_DIR / STUDENTS_SLICE / slice_of(uid)
    try:
        names = ("memory.current", "memory.max", "pids.current", "pids.max")
        used, limit, processes, process_limit = (read_counts(path / x)[""] for x in names)
        parts = read_counts(path / "memory.stat")
        killed = read_counts(path / "memory.events")["oom_kill"]
        # Before Linux 6.11 they are counted where the process is, not where the limit is.
        events = [path / "pids.events", *path.glob("*/pids.events")]
        refused = sum(read_counts(each)["max"] for each in events)
    except (OSError, KeyError):
        return None

    cache = parts["active_file"] + parts["inactive_file"]
    return Usage(used - cache, limit, processes, process_limit, killed, refused)


def is_full(usage: Usage) -> bool:
    return 0 < usage.memory_limit * FULL_SHARE < usage.memory


def news_of(now: Usage, before: Usage) -> Iterator[tuple[str, str]]:
    """Yield what happens to a student at their limits, for the teacher: kind and words."""
    limit = format_bytes(now.memory_limit)
    if now.killed > before.killed:
        yield (
            "killed",
            f"the system has ended a process, for all {limit} of memory were full",
        )
    if is_full(now):
        yield "full", f"{format_bytes(now.memory)} of {limit} of memory are used"
    if now.refused > before.refused:
        yield (
            "refused",
            f"has all {now.process_limit} processes and threads that are allowed",
        )


def call_systemd(calls: Iterable[Call]) -> None:
    """Call methods of systemd's manager: org.freedesktop.systemd1(5); raises Error."""
    import jeepney  # type: ignore[import-untyped]
    from jeepney.io.blocking import open_dbus_connection  # type: ignore[import-untyped]

    names = "/org/freedesktop/systemd1", "org.freedesktop.systemd1"
    manager = jeepney.DBusAddress(*names, f"{names[1]}.Manager")

    try:
        with open_dbus_connection(bus="SYSTEM") as connection:
            for method, signature, arguments in calls:
                message = jeepney.new_method_call(manager, method, signature, arguments)
                answer = connection.send_and_get_reply(message, timeout=SCOPE_SECONDS)

                if answer.header.message_type is jeepney.MessageType.error:
                    raise Error(f"systemd: {method}: {' '.join(map(str, answer.body))}")
    except OSError as error:
        raise Error(f"systemd does not answer: {explain(error)}") from None


def properties_call(unit: str, **properties: int) -> Call:
    """Return the call that sets properties of a unit until the host is restarted."""
    values = [(name, ("t", value)) for name, value in properties.items()]
    return "SetUnitProperties", "sba(sv)", (unit, True, values)


def limits_call(uid: int, limits: Limits) -> Call:
    """Return the call that sets a student's limits.

    There is no MemoryHigh: a kernel above it would crawl on for ever. Nor is there swap for
    who has a limit: what exceeds it has to end at once.
    """
    return properties_call(
        slice_of(uid),
        MemoryMax=limits.memory or NO_LIMIT,
        MemorySwapMax=0 if limits.memory else NO_LIMIT,
        CPUQuotaPerSecUSec=int(limits.cpu * 1e6) or NO_LIMIT,
        CPUWeight=100,  # as by default; but only who has a weight is counted
        TasksMax=limits.processes,
    )


def hosts_memory(total: int) -> int:
    """Return how many bytes of a host's memory students leave to it."""
    return max(int(total * HOSTS_SHARE), min(HOSTS_BYTES, total // 2))


def host_calls() -> Iterator[Call]:
    """Yield the calls that leave the host, its teachers and root enough to go on."""
    memory = psutil.virtual_memory().total
    threads = int(Path("/proc/sys/kernel/threads-max").read_text())

    for file, name, value in (
        ("memory.max", "MemoryMax", memory - hosts_memory(memory)),
        ("memory.min", "MemoryMin", RESERVED_BYTES),
        ("pids.max", "TasksMax", int(threads * (1 - HOSTS_SHARE))),
    ):
        path = CGROUP_DIR / STUDENTS_SLICE / file
        # What the administrator has set stays.
        if not path.exists() or not read_counts(path)[""]:
            yield properties_call(STUDENTS_SLICE, **{name: value})

    yield properties_call(slice_of(0), MemoryMin=RESERVED_BYTES)
    for uid in {0, invoking_account().pw_uid}:
        yield properties_call(slice_of(uid), CPUWeight=TEACHERS_WEIGHT)


def enter_scope(account: pwd.struct_passwd) -> None:
    """Move this process into the student's slice. Runs as: root; raises Error."""
    # By the number of the process: an older scope is there while an old kernel runs.
    pid = os.getpid()
    scope = f"notebooks-{account.pw_name}-{pid}.scope"
    properties = [
        ("PIDs", ("au", [pid])),
        ("Slice", ("s", slice_of(account.pw_uid))),
        # Else it would end the server when the system has ended a kernel.
        ("OOMPolicy", ("s", "continue")),
        ("Description", ("s", f"Notebooks of {account.pw_name}")),
    ]
    call_systemd(
        [("StartTransientUnit", "ssa(sv)a(sa(sv))", (scope, "fail", properties, []))]
    )

    deadline = time.monotonic() + SCOPE_SECONDS
    while scope not in Path("/proc/self/cgroup").read_text():
        if time.monotonic() > deadline:
            raise Error("systemd does not move the server into its slice")
        time.sleep(0.01)


def check_limits(course: Course) -> None:
    """Raises: UsageError for a limit that this host cannot keep."""
    config = course.config
    if has_slices():
        every = [config.limits_of(each).memory for each in course.roster.students]
        total = psutil.virtual_memory().total
        if sum(every) > total:
            say(
                f"All students together may use {format_bytes(sum(every))} of memory, this"
                f" host has {format_bytes(total)}: when that is full, kernels end, the"
                " largest first."
            )
        return

    for student in course.students:
        limits = config.limits_of(student)
        if limits.memory or limits.cpu:
            raise UsageError(
                f"{student.username}: limits of memory and cpu need systemd, D-Bus and"
                " cgroups version 2 (stat -f -c %T /sys/fs/cgroup says cgroup2fs); leave"
                " [Limits] and its columns empty on this host"
            )
    say("Nothing limits memory and processors: that needs systemd and cgroups version 2.")


def may_limit(account: pwd.struct_passwd, config: Config) -> bool:
    """Say whether this course sets an account's limits: if not, its owner does."""
    return not is_ours(account) or is_owned(account, config)


def limits_by_uid(config: Config, members: Iterable[Member]) -> dict[int, Limits]:
    """Return the limits that this course sets."""
    limits, foreign = {}, []
    for member in members:
        own = config.limits_of(member.student)
        if may_limit(member.account, config):
            limits[member.uid] = own
        elif own.memory or own.cpu or own.disk:
            foreign.append(member.username)

    if foreign:
        names = ", ".join(foreign)
        log.warning("what they may use is set by the owner of their account: %s", names)
    return limits


def set_limits(limits: Mapping[int, Limits]) -> None:
    """Set the limits of students, by uid, also of those who run something; raises Error."""
    if has_slices() and limits:
        calls = itertools.starmap(limits_call, limits.items())
        call_systemd([*host_calls(), *calls])


def set_quota(account: pwd.struct_passwd, limit: int) -> None:
    """Limit what a student has on the file system of the home, in bytes; raises Error."""
    blocks = str(limit // 1024)
    place = os.path.realpath(account.pw_dir)

    while not os.path.ismount(place):
        place = os.path.dirname(place)

    try:
        run_program(
            ["setquota", "-u", "--", account.pw_name, blocks, blocks, "0", "0", place]
        )
    except Error as error:
        raise Error(
            f"no limit of disk: {error}; install the package quota, mount {place} with the"
            f" option usrquota, and run `quotacheck -cum {place}; quotaon {place}`"
        ) from None


def forget_user(account: pwd.struct_passwd) -> None:
    """Have systemd end what it runs for an account that runs nothing, and forget limits."""
    if not SYSTEMD_DIR.exists():
        return

    units = f"user@{account.pw_uid}.service", f"user-runtime-dir@{account.pw_uid}.service"
    for command in (
        ["loginctl", "disable-linger", account.pw_name],
        ["systemctl", "stop", *units],
        ["systemctl", "reset-failed", *units],
    ):
        with contextlib.suppress(Error):  # there is nothing of it
            run_program(command)
    forget_limits(slice_of(account.pw_uid))


def forget_limits(*units: str) -> None:
    """Take back what we have set of units, until systemd reads its files again."""
    # Not with `systemctl revert`, which deletes what the administrator has made, too.
    for unit, name in itertools.product(units, PROPERTIES):
        Path(f"{CONTROL_FILES}/{unit}.d/50-{name}.conf").unlink(missing_ok=True)
    for unit in units:
        with contextlib.suppress(OSError):
            Path(f"{CONTROL_FILES}/{unit}.d").rmdir()


def forget_host() -> None:
    """Forget removed accounts' limits, and those of the host if no account is left."""
    if SYSTEMD_DIR.exists():
        if not any(map(is_ours, pwd.getpwall())):
            teachers = {0, invoking_account().pw_uid}
            forget_limits(STUDENTS_SLICE, *map(slice_of, teachers))
        run_program(["systemctl", "daemon-reload"])


# == Ending processes, and accounts ========================================================
#
# `shutdown` ends Jupyter's processes of a student and their descendants, and spares what
# else the student runs. `remove` ends everything, and then nothing can come back. Students
# may fork without end, stop whatever has their uid, and keep root waiting when it looks at
# them.

SERVER_TITLE = "notebooks.py: notebook server of "  # what ps shows, and NAME in FILE.cfg
SERVER_NAME = SERVER_TITLE[:15]  # as much of it as `read_name` returns
TEMPLATE_TITLE = "notebooks.py: template process"  # also of a fork, at first
LAUNCHER_TITLE = "notebooks.py: launcher of "  # the configuration file
LAUNCHER_NAME = LAUNCHER_TITLE[:15]
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
KILL_SECONDS = 10.0  # how long processes that keep forking are fought
MAX_ARGV_BYTES = 1 << 14
MAX_MOUNTS = 10_000  # of one student's, one over the other
MAX_ARGUMENTS = 4000  # of a program: far from what execve(2) takes

# Matches a NUL-separated command line that starts Jupyter, directly or as a Python script
# or module. Our own servers are recognized by their title, and kernels of other languages
# by CONNECTION_FILE.
JUPYTER = re.compile(
    r"(([^\0]*/)?python[\d.]*\0(-[^\0]*\0)*)?([^\0]*/)?"
    r"(jupyter[-\0](notebook|lab|server|nbclassic|kernel)|notebook|jupyterlab"
    r"|jupyter_server|nbclassic|ipykernel|ipykernel_launcher)(\0|\Z)"
)
CONNECTION_FILE = re.compile(rf"{re.escape(str(RUNTIME_DIR))}/\d+/kernel-.*\.json")

# Where keyctl(2) is, by processor: <asm/unistd.h>. Of <linux/keyctl.h>:
KEYCTL_JOIN_SESSION_KEYRING = 1
KEYCTL_CLEAR = 7
USER_KEYRINGS = (-4, -5)  # the user's, and that of sessions without one of their own
SYS_KEYCTL = {"x86_64": 250, "i386": 288, "arm": 311, "powerpc64le": 271, "s390x": 280}
SYS_KEYCTL |= {"mips64el": 5241, "aarch64": 219, "riscv64": 219, "loongarch64": 219}

# Where every user may have files, and System V objects (sysvipc(7), ipcrm(1)).
PUBLIC_DIRS = (
    *("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock"),
    *("/var/spool/cron/atjobs", "/var/crash"),
)
MAIL_DIRS = ("/var/mail", "/var/spool/mail")
IPC_KINDS = {"shm": "--shmem-id", "msg": "--queue-id", "sem": "--semaphore-id"}


def keyctl_number() -> int | None:
    """Return the number of the system call keyctl(2) for this interpreter, if known."""
    multiarch = str(sysconfig.get_config_var("MULTIARCH") or "")
    return SYS_KEYCTL.get(multiarch.partition("-")[0])


def read_argv(pid: int) -> list[str]:
    """Return the beginning of a command line, which may be gigabytes long: proc(5)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb", 0) as file:
        data = file.read(MAX_ARGV_BYTES)
        return data.rstrip(b"\0").decode(errors="replace").split("\0")
    return []


def read_name(pid: int) -> str:
    """Return the first 15 bytes of a process's title, which take no lock on its memory."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_bytes()[:-1].decode(errors="replace")
    return ""


def is_jupyter(argv: Sequence[str]) -> bool:
    line = "\0".join(argv)
    return (
        line.startswith(SERVER_TITLE)
        or JUPYTER.match(line) is not None
        or any(map(CONNECTION_FILE.fullmatch, argv))
    )


class Status(NamedTuple):
    """Whose a process is, by its real uid and in every way, and if it is alive."""

    uid: int
    alive: bool
    owners: frozenset[int]


def read_status(pid: int) -> Status:
    """Return what proc(5) says in /proc/PID/status; raises ProcessLookupError.

    A process whose first thread is dead may have others that live.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None

    # Not by psutil: its patterns match a name that a process gave itself (`Uid: 0`).
    fields = dict(re.findall(r"^(State|Uid|Threads):\t(.+)", text, re.MULTILINE))
    uid, *others = map(int, fields["Uid"].split())
    alive = fields["State"][0] not in "ZX" or int(fields["Threads"]) > 1
    # Root acts as others for a moment; a setuid program of a friend's does so for good.
    owners = {uid} if 0 in others else {uid, *others}
    return Status(uid, alive, frozenset(owners))


def processes_by_uid(uids: Iterable[int]) -> dict[int, list[psutil.Process]]:
    """Return the processes that each uid owns, without dead ones."""
    found: dict[int, list[psutil.Process]] = {uid: [] for uid in uids}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            status = read_status(pid)
            for uid in status.owners & found.keys() if status.alive else ():
                found[uid].append(psutil.Process(pid))
    return found


def server_course(pid: int) -> str:
    """Return the configuration file of the course whose server this is, by its title."""
    title = " ".join(read_argv(pid))
    return title.partition(" in ")[2] if title.startswith(SERVER_TITLE) else ""


def is_starting(pid: int, course: Path | None) -> bool:
    """Say whether it is a server of this or any course that is still root's.

    It is a fork of a template, which is the launcher's child.
    """
    is_fork = read_name(pid) in (SERVER_NAME, TEMPLATE_TITLE[:15])
    if not is_fork or read_status(pid)[:2] != (0, True):
        return False

    template = psutil.Process(pid).ppid()
    launcher = " ".join(read_argv(psutil.Process(template).ppid()))
    is_others = launcher.startswith(LAUNCHER_TITLE) and not launcher.endswith(f"{course}")
    return read_name(template) != LAUNCHER_NAME and not (course and is_others)


def wait_for_starts(course: Path | None = None) -> None:
    """Wait until each server that is starting is its student's; raises StuckError.

    Until then nothing tells whose it is, and who looks for the student's would miss it.
    """
    deadline = time.monotonic() + STUCK_SECONDS
    starting = psutil.pids()

    def still(pid: int) -> bool:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            return is_starting(pid, course)
        return False

    while starting := list(filter(still, starting)):
        if time.monotonic() > deadline:
            raise StuckError(f"pid {starting[0]} does not go on: end it, and try again")
        time.sleep(0.02)


def find_roots(
    processes: Iterable[psutil.Process], others: Collection[str] = ()
) -> tuple[list[int], list[int]]:
    """Return the pids of notebook servers and kernels, and of other courses' servers.

    Where a student has some of those, only our servers are roots: kernels are found by
    their server. To read a command line takes a lock on the process's memory, which a
    student can keep for ever, as in an mmap(2) of a file in their own FUSE file system.
    """
    deadline = time.monotonic() + STUCK_SECONDS
    servers: dict[int, str] = {}

    for process in processes:
        if time.monotonic() > deadline:
            raise StuckError(STUCK)
        if is_jupyter(read_argv(process.pid)):
            servers[process.pid] = server_course(process.pid)

    spared = [pid for pid, course in servers.items() if course in others]
    roots = [pid for pid in servers if pid not in spared and (servers[pid] or not spared)]
    return roots, spared


def family_of(
    processes: Iterable[psutil.Process], known: set[int], spared: Collection[int] = ()
) -> list[psutil.Process]:
    """Return those of one user's processes that are known, and their relatives.

    Relatives are descendants of a known process, and processes in a session that it leads.
    An ssh login or tmux leads its own session and is spared. Pids that are found join
    `known`, so they are recognized after their parent has died.
    """
    relatives: dict[psutil.Process, set[int]] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            pid = process.pid
            relatives[process] = {pid, process.ppid(), os.getsid(pid)}
            # A server that has just started, when the roots had been looked for.
            if read_name(pid) == SERVER_NAME and pid not in spared:
                known.add(pid)

    # Each round finds one more generation.
    found: set[psutil.Process] = set()
    while new := {each for each in relatives if relatives[each] & known} - found:
        found |= new
        known |= {process.pid for process in new}
    return sorted(found, key=lambda process: process.pid)


def signal_process(pid: int, uid: int, number: int) -> None:
    """Send a signal to a process if it runs under that uid, and to no other."""
    with (
        contextlib.suppress(ProcessLookupError),
        contextlib.closing(Process(pid)) as process,
    ):
        if uid in read_status(pid).owners:
            process.send_signal(number)


def kill_everything(account: pwd.struct_passwd) -> None:
    """Kill all processes of a user, even those that fork all the time; raises Error."""
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


def forget_keys(identity: Identity) -> None:
    """Clear the keyrings of a uid: keyctl(2), KEYCTL_CLEAR. They outlive its processes."""

    def become_the_user_and_clear() -> None:
        drop_privileges(identity)
        for keyring in USER_KEYRINGS:
            ctypes.CDLL(None).syscall(keyctl_number(), KEYCTL_CLEAR, keyring, 0, 0, 0)

    if keyctl_number() is not None:
        os.waitpid(fork_process(become_the_user_and_clear), 0)


def kill_all_at_once(identity: Identity) -> bool:
    """Let the kernel kill all processes of a user in one step, and say if it did.

    A child becomes the user: kill(2) with pid -1 then spares only the caller.
    """

    def become_the_user_and_kill() -> None:
        drop_privileges(identity)
        os.kill(-1, signal.SIGKILL)

    pid = fork_process(become_the_user_and_kill)
    _, wait_status = os.waitpid(pid, os.WUNTRACED)
    # The user's processes may stop or kill the child before it comes to that. They cannot
    # take anything from it: without an exec it is not dumpable (prctl(2)).
    if os.WIFSTOPPED(wait_status):
        os.kill(pid, signal.SIGKILL)
        _, wait_status = os.waitpid(pid, 0)
    return wait_status == 0


def look_for_jupyter(
    config: Config, members: Sequence[Member], outcome: Outcome
) -> tuple[dict[int, set[int]], dict[int, list[int]], list[Member]]:
    """Return Jupyter's pids by uid, other courses' servers, and who hides theirs."""
    running = processes_by_uid({member.uid for member in members})
    busy = [member for member in members if running[member.uid]]
    known: dict[int, set[int]] = {member.uid: set() for member in members}
    spared: dict[int, list[int]] = {}
    hidden = []

    def find(member: Member) -> tuple[list[int], list[int]]:
        return find_roots(running[member.uid], Claims(member.account, config).others)

    for worker in run_workers(find, busy):
        member = worker.member
        with outcome.step(member.username):
            try:
                roots, spared[member.uid] = worker.result()
                known[member.uid] |= set(roots)
            except StuckError:
                hidden.append(member)
    return known, spared, hidden


def stop_jupyter(
    config: Config, members: Sequence[Member], outcome: Outcome
) -> list[Member]:
    """End the Jupyter processes of all these members at once, but not other courses'.

    If a student's processes cannot be inspected, all of them are killed when this course
    alone has the account. Returns: the members for whom Jupyter runs no more.
    """
    known, spared, hidden = look_for_jupyter(config, members, outcome)
    left = end_families(known, {*itertools.chain(*spared.values())})
    for member in members:
        if left[member.uid]:
            count = counted(len(left[member.uid]), "process")
            outcome.failed(member.username, f"{count} could not be ended")

    for member in hidden:
        with outcome.step(member.username):
            if reason_to_stay(member, config):
                raise StuckError(STUCK)
            kill_everything(member.account)
    return [
        x for x in members if not spared.get(x.uid) and x.username not in outcome.failures
    ]


def end_everything(members: Sequence[Member], outcome: Outcome) -> list[Member]:
    """Kill all that members run, in other courses too; return whose processes are gone."""
    for member in members:
        with outcome.step(member.username):
            if member.uid == invoking_account().pw_uid:
                raise Error("is your own account: nothing was ended")
            kill_everything(member.account)
    return [member for member in members if member.username not in outcome.failures]


def end_families(
    known: dict[int, set[int]], spared: Collection[int] = ()
) -> dict[int, list[psutil.Process]]:
    """End processes that are known, by the uid they run under, and their families.

    They get SIGTERM, a grace period, then SIGKILL for as long as new ones appear. Returns:
    for each uid those that are left: none, unless its processes keep forking.
    """
    terminated: set[psutil.Process] = set()
    start = 0.0
    while True:
        running = processes_by_uid(known)
        families = {uid: family_of(running[uid], known[uid], spared) for uid in known}
        start = start or time.monotonic()  # not before: a look may take long
        seconds = time.monotonic() - start
        if not any(families.values()) or seconds > GRACE_SECONDS * 2:
            return families

        for uid, processes in families.items():
            for process in processes:
                # A second SIGTERM might interrupt what the first has them save.
                if seconds > GRACE_SECONDS:
                    signal_process(process.pid, uid, signal.SIGKILL)
                elif process not in terminated:
                    signal_process(process.pid, uid, signal.SIGTERM)
                    terminated.add(process)
        time.sleep(0.1)


def run_worker(function: Callable[[Member], object], member: Member) -> None:
    """Have a worker do what the friends of a student could hold up; raises Error."""
    for worker in run_workers(function, [member]):
        try:
            worker.result()
        except StuckError:
            raise Error(
                "somebody keeps a directory there locked, as others can who may open it:"
                " end what they run (notebooks.py shutdown --everything), then remove again"
            ) from None


def end_account(member: Member) -> None:
    """End all that one of our accounts runs, for good; raises Error if that fails."""
    account = member.account
    # Closed first, so that neither ssh nor cron start anything new, and then killed: so
    # nothing is mounted again.
    run_program(["usermod", "--expiredate", "1", "--", account.pw_name])
    Path("/var/spool/cron/crontabs", account.pw_name).unlink(missing_ok=True)
    with contextlib.suppress(StuckError):  # it may be another student's
        wait_for_starts()
    kill_everything(account)
    forget_user(account)
    forget_keys(identity_of(account))
    unmount_own(account)

    # Friends could mount something again in what is open to all.
    run_worker(close_directories, member)
    unmount_own(account)


def close_directories(member: Member) -> None:
    account = member.account
    with contextlib.suppress(FileNotFoundError):
        runtime_dir_of(account).chmod(0o700)
    if is_home_of(account):
        os.chmod(account.pw_dir, 0o700)


def unmount_own(account: pwd.struct_passwd) -> None:
    """Take away what was mounted with FUSE over the files of an account that runs nothing.

    What lies below would stay, under the name of the mount. Raises: Error for what only
    root can have mounted: userdel would empty it.
    """
    home = Path(account.pw_dir)
    places = home, home.with_name(f".{home.name}-removed"), runtime_dir_of(account)

    for _ in range(MAX_MOUNTS):
        mounts = [(Path(x.mountpoint), x) for x in psutil.disk_partitions(all=True)]
        inside = [x for path, x in mounts if any(map(path.is_relative_to, places))]
        if not inside:
            return

        # With the outermost goes what is mounted in it.
        mount = min(inside, key=lambda each: len(each.mountpoint))
        is_roots = "user_id=0" in mount.opts.split(",")
        if is_roots or not mount.fstype.startswith("fuse"):
            where = repr(mount.mountpoint)
            raise Error(f"something is mounted at {where}; umount it, then remove again")
        options = ["--lazy", "--no-canonicalize", "--internal-only"]
        run_program(["umount", *options, "--", mount.mountpoint])
    raise Error("too much is mounted in their home; restart this host, then remove again")


def delete_directories(member: Member) -> None:
    """Delete the home of one of our accounts that was ended, and its runtime directory.

    Runs as: root, since others may own what lies in the home.
    """
    account, home = member.account, member.home
    delete_tree(runtime_dir_of(account))

    # A home that is half deleted must not look like one: it would be packed, or kept.
    doomed = home.with_name(f".{home.name}-removed")
    for left_over in (doomed, home.with_name(f".{home.name}-new")):
        delete_tree(left_over)
    if is_home_of(account) and not home.is_symlink():
        home.rename(doomed)
        delete_tree(doomed)


def remove_account(member: Member) -> None:
    """Delete one of our accounts that was ended, and its home.

    Nothing of the account's runs any more. Raises: Error; what is left can be removed by
    the same call again.
    """
    account = member.account
    run_worker(delete_directories, member)
    clear_empty_runtime_dir()
    for directory in MAIL_DIRS:
        Path(directory, account.pw_name).unlink(missing_ok=True)

    try:
        run_program(["userdel", "--", account.pw_name])
    except Error:
        # A remove that was killed may have called a userdel that has just ended.
        if find_account(account.pw_name):
            raise

    if os.path.lexists(account.pw_dir):
        raise Error(f"the account is gone, but {account.pw_dir} was not theirs and stays")


def delete_public_files(uids: Collection[int]) -> None:
    """Delete these users' public files and IPC objects: others may get their uids."""
    if not uids:
        return

    owned = " -o ".join(f"-uid {uid}" for uid in uids).split()
    for directory in PUBLIC_DIRS:
        command = ["find", directory, "-xdev", "(", *owned, ")", "-delete"]
        with contextlib.suppress(Error):  # it fails at a directory that has files of others
            run_as(Identity(0, 0, ()), command, DELETE_SECONDS)

    doomed: list[str] = []
    for kind, option in IPC_KINDS.items():
        lines = Path("/proc/sysvipc", kind).read_text().splitlines()
        names = lines[0].split()
        for line in lines[1:]:
            row = dict(zip(names, map(int, line.split()), strict=False))
            if row["uid"] in uids or row["cuid"] in uids:
                doomed += [option, line.split()[1]]
    for i in range(0, len(doomed), MAX_ARGUMENTS):
        with contextlib.suppress(Error):  # one of them has gone meanwhile
            run_program(["ipcrm", *doomed[i : i + MAX_ARGUMENTS]])


# == Certificate ===========================================================================
#
# TLS everywhere. Without a certificate of the teacher's, `launch` makes an authority of the
# course, which signs one certificate for this host's names and addresses. Nobody ever has
# the authority's key again. So students can install it: it vouches for this host alone.
# What browsers do not trust opens no WebSocket in Safari, and on no iPad at all.

CERTIFICATE_DAYS = 820  # Apple takes 825 of an authority that a user has installed
CERTIFICATE_WARNING_DAYS = 30
RENEWAL_DAYS = 14  # before its end, our own is replaced
CERTIFICATE_LOOK_SECONDS = 24 * 3600.0  # between two looks at a certificate in use

PRIVATE_KEY = re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]+-----")

# Arguments: days, the authority's name, what it may sign, what the certificate is for. The
# keys are in the memory of these programs, in pipes and in what is printed: the server's
# key, its certificate and the authority's certificate. Source: openssl-req(1ssl).
MAKE_CERTIFICATE = r"""
set -eu
make() { openssl req -x509 -sha256 -days "$days" "$@"; }
days=$1
key=$(openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256)
authority=$(printf '%s\n' "$key" | make -key /dev/stdin -subj "$2" \
    -addext basicConstraints=critical,CA:TRUE,pathlen:0 \
    -addext keyUsage=critical,keyCertSign -addext "nameConstraints=critical,$3")
printf '%s\n' "$authority" | {
    printf '%s\n' "$key" | make -CA /dev/fd/3 -CAkey /dev/stdin 3<&4 \
        -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout - \
        -subj "/CN=notebooks" -addext basicConstraints=critical,CA:FALSE \
        -addext keyUsage=critical,digitalSignature -addext extendedKeyUsage=serverAuth \
        -addext "$4"
} 4<&0
printf '%s\n' "$authority"
"""


class Certificate(Message):
    """A certificate chain and its key, in PEM format; it is served from now on."""

    path: str  # of the chain, for people
    pem: str

    @property
    def chain(self) -> list[bytes]:
        """The certificates in DER format, the server's first."""
        block = r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----"
        found = re.findall(block, self.pem, re.DOTALL)
        return [ssl.PEM_cert_to_DER_cert(each) for each in found]

    @property
    def authority(self) -> bytes | None:
        """The certificate of the course's own authority in DER format, if it has one."""
        return self.chain[-1] if self.names and len(self.chain) > 1 else None

    @property
    def names(self) -> list[str]:
        """What our own certificate is for, as its first line has it; nothing for others."""
        kind, _, names = self.pem.partition("\n")[0].partition("=")
        return names.split(",") if kind == "subjectAltName" else []

    def context(self) -> ssl.SSLContext:
        """Return a TLS server's context; raises OSError or ValueError."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        with closing(os.memfd_create("certificate")) as fd:
            os.write(fd, self.pem.encode("latin-1"))
            # An empty passphrase, or OpenSSL would ask for one on the terminal.
            context.load_cert_chain(f"/proc/self/fd/{fd}", password=lambda: b"")
        return context

    def end(self) -> datetime.datetime:
        """Return when it ends: openssl-x509(1ssl)."""
        command = ["openssl", "x509", "-noout", "-enddate", "-dateopt", "iso_8601"]
        end = run_program(command, self.pem).strip().partition("=")[2]
        return datetime.datetime.fromisoformat(end)


def days_until(end: datetime.datetime) -> float:
    return (end - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def read_certificate(cert_file: Path, key_file: Path) -> Certificate:
    """Read a chain and its key, and see that they are of use; raises UsageError."""
    try:
        pem, key_text = (path.read_text("latin-1") for path in (cert_file, key_file))
    except OSError as error:
        raise UsageError(
            f"{error.filename}: the certificate or its key cannot be read:"
            f" {error.strerror}; see the keys cert_file and key_file"
        ) from None

    if key_file != cert_file:  # either may hold more than it has to
        pem = "\n".join([PRIVATE_KEY.sub("", pem), *PRIVATE_KEY.findall(key_text)])
    certificate = Certificate(str(cert_file), pem)

    try:
        certificate.context()
    except (OSError, ValueError) as error:
        fault = certificate_fault(pem, key_file, error)
        raise UsageError(f"{cert_file}: {fault}") from None
    return certificate


def certificate_fault(pem: str, key_file: Path, error: Exception) -> str:
    """Say why OpenSSL refused a certificate or its key."""
    reason = getattr(error, "reason", None) or ""
    if "BEGIN CERTIFICATE" not in pem:
        return "there is no certificate in it (PEM format)"
    if "PRIVATE KEY" not in pem:
        return f"there is no key in {key_file} (PEM format); see key_file"
    if "ENCRYPTED" in pem:
        return f"the key in {key_file} has a passphrase; remove that"
    if reason.endswith("_MISMATCH") or reason == "NO_CERTIFICATE_ASSIGNED":
        return f"the key in {key_file} is another certificate's"
    return f"cannot be used for TLS: {reason or error}"


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 fingerprint that browsers show."""
    return hashlib.sha256(der).digest().hex(":").upper()


def stable_ipv6_addresses() -> Iterator[str]:
    """Yield this host's IPv6 addresses but link-local ones and those that change.

    Any router of the network gives addresses; each would have students trust another
    certificate. Source: /proc/net/if_inet6 (scope in column 4, flags in 5; 0x80 is
    IFA_F_PERMANENT).
    """
    with contextlib.suppress(OSError):  # there is no such file without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, _, _, scope, flags, *_ = line.split()
            if scope == "00" and int(flags, 16) & 0x80:
                yield str(ipaddress.IPv6Address(int(number, 16)))


def host_names(config: Config) -> list[str]:
    """Return this host's names and addresses, as `subjectAltName` wants them."""
    entries = itertools.chain(*psutil.net_if_addrs().values())
    addresses = {each.address for each in entries if each.family == socket.AF_INET}
    addresses |= {"127.0.0.1", "::1", *stable_ipv6_addresses()}
    names = {socket.gethostname(), full_host_name(), "localhost"}

    address = config.server_address.strip("[]").replace("{username}", "*")
    if address:
        try:
            addresses.add(str(ipaddress.ip_address(address)))
        except ValueError:
            names |= {address, address.removeprefix("*.")}
    return [
        *(f"DNS:{name}" for name in sorted(names)),
        *(f"IP:{address}" for address in sorted(addresses)),
    ]


def make_certificate(path: Path, names: Sequence[str]) -> None:
    """Write an authority's certificate for names; their certificate and key before it.

    The names are in the first line. Source: RFC 5280, 4.2.1.10 for name constraints.
    """
    permitted = []
    for name in names:
        kind, _, value = name.partition(":")
        mask = ":".join(["ffff"] * 8) if ":" in value else "255.255.255.255"
        value = f"{value}/{mask}" if kind == "IP" else value.removeprefix("*.")
        permitted.append(f"permitted;{kind}:{value}")

    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())
    host = host[:34]  # for a common name has 64 characters: RFC 5280, A.1
    title = f"/CN=Notebooks on {host} since {time.strftime('%Y-%m-%d')}"
    constraints = ",".join(dict.fromkeys(permitted))

    extension = f"subjectAltName={','.join(names)}"
    arguments = [str(CERTIFICATE_DAYS), title, constraints, extension]
    pem = run_program(["sh", "-c", MAKE_CERTIFICATE, "sh", *arguments])
    replace_private_file(path, f"{extension}\n{pem}".encode(), 0, 0)


def ensure_certificate(config: Config, names: Sequence[str] = ()) -> Certificate:
    """Return the configured certificate, or our own for these or all names; UsageError."""
    if not config.cert_file:
        return ensure_own_certificate(config, names or host_names(config))

    certificate = read_certificate(config.cert_file, config.key_file or config.cert_file)
    days = days_until(certificate.end())
    if days < 0:
        raise UsageError(f"{config.cert_file}: the certificate has expired; renew it")
    if days < CERTIFICATE_WARNING_DAYS:
        log.warning("%s: the certificate expires in %d days", config.cert_file, days)
    return certificate


def ensure_own_certificate(config: Config, names: Sequence[str]) -> Certificate:
    """Return our own certificate, or raise UsageError if somebody else's is there."""
    path = config.path.with_name(CERTIFICATE_NAME)
    if not path.exists():
        make_certificate(path, names)
        return read_certificate(path, path)

    try:
        certificate = read_certificate(path, path)
    except UsageError as error:
        raise UsageError(f"{error}; delete it, and a new one is made") from None
    if not certificate.names:
        raise UsageError(
            f"{path}: was not made by notebooks.py; move it away, or name it in the"
            " key cert_file"
        )

    if not certificate.authority:
        log.warning(
            "%s: is of an earlier version, and no iPad opens notebooks with it; delete it,"
            " and run launch again, for one that students can trust",
            path,
        )
    return renew_certificate(certificate, names)


def renew_certificate(certificate: Certificate, names: Sequence[str]) -> Certificate:
    """Return our own certificate, or a new one if it lacks names or is about to end."""
    # Addresses that the host has lost do no harm; a name that it has gained is missed.
    missing = [x.partition(":")[2] for x in names if x not in certificate.names]
    days = days_until(certificate.end())
    again = f"students who trust it have to install the new one, from /{TRUST_PATH}"
    if missing or days < RENEWAL_DAYS:
        path, why = Path(certificate.path), ", ".join(missing) or "its age"
        log.warning("%s: made anew for %s; %s", path, why, again)
        make_certificate(path, names)
        return read_certificate(path, path)

    if days < CERTIFICATE_WARNING_DAYS:
        left = days - RENEWAL_DAYS
        log.warning("%s: is made anew in %d days; then %s", certificate.path, left, again)
    return certificate


# == Pages =================================================================================
#
# What people see before they are in their notebook: the pages of the webserver, and the
# log-in and log-out pages of notebook servers. They are templates of Jinja, which escapes
# what it is given. They need no file and no network, and work without JavaScript. Their
# measure is WCAG 2.1 AA: tests/test_accessibility.py.
#
# What they say stands in English where they say it: as `_("...")` in templates, and as
# `Phrase("...")` in Python. Catalogs of gettext have the other languages, such as
# locale/de.po. The launcher reads that of the course and sends it to the webserver and the
# servers: they may not be able to read where it is.

MAX_SHOWN_NAME = 100  # characters
# No user name begins with a hyphen.
PASSWORD_PATH, TRUST_PATH, SOCKET_PATH = "-password", "-certificate", "-socket"
AUTHORITY_PATHS = ("-certificate.crt", "certificate")

# Where catalogs are: beside this file in a checkout, else where `make install` puts them.
LOCALES = (
    Path(__file__).resolve().with_name("locale"),
    Path(sys.prefix, "share/notebooks/locale"),
)
Phrase = NewType("Phrase", str)  # in English

STYLE = """
body { font: 1.1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 40rem;
       padding: 1rem; color: #222; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; } a { color: inherit; }
form { display: flex; gap: .5rem; flex-wrap: wrap; align-items: end; margin: 1.5rem 0; }
label { flex: 100 1 12rem; } .column label { flex-basis: 100%; }
input, button { font: inherit; padding: .5rem .8rem; border: 1px solid #767676;
                border-radius: .4rem; }
input { width: 100%; box-sizing: border-box; color: inherit; background: inherit; }
button { flex: 1 0 auto; background: #a8470b; border-color: #a8470b; color: #fff; }
ul { list-style: none; padding: 0; } :root { color-scheme: light dark; }
li a { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem;
       padding: .6rem .2rem; border-bottom: 1px solid #ddd; text-decoration: none; }
li a:hover, li a:focus { background: #f6efe8; } code { color: #595959; }
:focus-visible { outline: .2rem solid #a8470b; outline-offset: .1rem; }
.message { border-inline-start: .3rem solid #a8470b; padding: .3rem .8rem; }
summary { cursor: pointer; padding: .4rem 0; } [hidden] { display: none; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #191919; } li a { border-color: #444; }
  li a:hover, li a:focus { background: #2c2620; } code { color: #b0b0b0; }
  :focus-visible { outline-color: #f0a070; } }
"""

# The list of students follows what is typed. And the page tries a WebSocket before a
# notebook needs one: what fails is told, and why, as far as `SocketHandler` knows.
SCRIPT = r"""
"use strict";
for (const link of document.querySelectorAll("[data-any-host]"))
  link.hostname = location.hostname;

const list = document.getElementById("students");
if (list) {
  const form = document.querySelector("form"), field = form.elements.username;
  const plain = text => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const shown = () => [...list.children].filter(row => !row.hidden);
  field.oninput = () => {
    const words = plain(field.value.trim()).split(/\s+/);
    for (const row of list.children)
      row.hidden = words.some(word => !plain(row.textContent).includes(word));
    document.getElementById("found").textContent =
      words[0] && `${shown().length} / ${list.children.length}`;
  };
  form.onsubmit = event => {
    if (shown().length === 1) {
      event.preventDefault();
      location.assign(shown()[0].querySelector("a").href);
    }
  };
}

const trouble = document.getElementById("trouble"), go = document.getElementById("go");
let isKnown = false;
async function tell(isOpen, address) {
  if (isKnown) return;
  isKnown = true;
  if (isOpen) {
    const attributes = "path=/; max-age=43200; secure; samesite=lax";
    document.cookie = `__Host-notebooks-socket=1; ${attributes}`;
    if (go) location.replace(go.href);
    return;
  }
  address.searchParams.set("failed", trouble.dataset.student);
  const answer = await fetch(address).then(each => each.text(), () => "");
  const isNetwork = answer === "network", past = isNetwork ? ", .certificate" : "";
  for (const words of document.querySelectorAll(`#checking${past}`)) words.remove();
  trouble.hidden = false;
}
if (trouble) {
  const address = new URL(trouble.dataset.socket, location);
  address.searchParams.set("try", Math.random().toString(36).slice(2));
  const socket = new WebSocket(address.href.replace(/^http/, "ws"));
  socket.onopen = () => { tell(true, address); socket.close(); };
  socket.onerror = socket.onclose = () => tell(false, address);
  setTimeout(tell, 10000, false, address);
}
"""

TEMPLATES = {
    "course.html": """<!DOCTYPE html>
<html lang="{{ language }}">
<head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style }}</style>{% block head %}{% endblock %}</head>
<body><main>
<h1 dir="auto">{{ title }}</h1>
{% for text in messages %}<p class="message" role="alert">{{ text }}</p>
{% endfor %}
{% block body %}{% endblock %}
{% if socket %}<div id="trouble" class="message" role="alert" hidden
 data-socket="{{ socket }}" data-student="{{ username }}">
{% if trust %}<p class="certificate">{{ _("Perhaps your browser does not trust the"
 " certificate of this host: then notebooks open, and say “Connecting” for ever.") }}
<a href="{{ trust }}" {{ any_host }}>{{ _("Have your device trust this host") }}</a></p>
{% endif %}<p>{% if trust %}<span class="certificate">{{ _("Done already?") }}</span>
{% endif %}{{ _("The network blocks connections that notebooks need. Try another one, or"
 " tell your teacher: WebSockets to this host, TCP ports {ports}.", ports=ports) }}</p>
</div>{% endif %}
</main><script>{{ script }}</script></body>
</html>
""",
    "landing.html": """{% extends "course.html" %}{% block body %}
<form action="{{ action }}" method="get">
{% if query is not none %}<input type="hidden" name="query" value="{{ query }}">{% endif %}
<label>{{ _("User name or name") if students else _("User name") }}
<input name="username" required autocapitalize="none" autocomplete="username"
 spellcheck="false"></label>
<button>{{ _("Open my notebook") }}</button></form>
{% if students %}<p id="found" role="status"></p>
<ul id="students">
{% for username, name, _ in students %}<li><a href="{{ link }}{{ username }}">
<bdi>{{ name or username }}</bdi>{% if name %} <code>{{ username }}</code>{% endif %}
</a></li>
{% endfor %}</ul>{% endif %}
{% endblock %}""",
    "wait.html": """{% extends "course.html" %}{% block head %}{% if target %}<noscript>
<meta http-equiv="refresh" content="0; url={{ target }}"></noscript>{% endif %}
{% endblock %}{% block body %}{% if target %}
<p id="checking" role="status">{{ _("Your browser is being tried out.") }}</p>
<p><a id="go" href="{{ target }}">{{ _("Go on to the notebook") }}</a></p>{% endif %}
{% endblock %}""",
    "password.html": """{% extends "course.html" %}{% block body %}
{% if is_changed %}<p><a href="/">{{ _("To the page of the course") }}</a></p>
{% else %}<p>{{ _("Save your work first: a new password ends your notebook and its"
 " kernels, wherever they are open. The new one needs ten characters at least.") }}</p>
<form class="column" method="post">
<label>{{ _("User name") }}<input name="username" value="{{ username }}" required
 autocapitalize="none" autocomplete="username" spellcheck="false"></label>
{% for name, use, label in [
 ("old", "current", _("Old notebook password")),
 ("new", "new", _("New password")),
 ("again", "new", _("New password once more")),
] %}<label>{{ label }}<input name="{{ name }}" type="password" required
 autocomplete="{{ use }}-password"></label>
{% endfor %}<button>{{ _("Change the password") }}</button></form>{% endif %}
{% endblock %}""",
    "trust.html": """{% extends "course.html" %}{% block body %}
<h2>{{ _("Have your device trust this host") }}</h2>
<p>{{ _("With this certificate your device trusts {names}, and nothing else: nobody has the"
 " key with which it could vouch for other hosts.", names=names) }}</p>
<p><a href="/{{ file }}">{{ _("Get the certificate") }}</a></p>
<p>{{ _("Your teacher can tell you its fingerprint (SHA-256), which must be the same:") }}
<code>{{ fingerprint }}</code></p>
{% for label, steps, is_own in systems %}<details{% if is_own %} open{% endif %}>
<summary>{{ label }}</summary><p>{{ steps }}</p></details>
{% endfor %}<p>{{ _("Then close the browser, and open it again.") }}
<a href="/">{{ _("To the page of the course") }}</a></p>
{% endblock %}""",
    # Of Jupyter's: the page that it renders as log-in and as log-out.
    "login.html": """{% extends "course.html" %}
{% set is_out = message and message.info %}
{% set is_leaving = message and message.question %}
{% block body %}
{% if message and message.error %}<p class="message" role="alert">
{{ _("That was not the password of this notebook. Is the Caps Lock key on? Is the name"
 " below yours?") }}</p>
{% endif %}<h2>
{{ _("You have logged out of the notebook of") if is_out else _("Notebook of") }}
{% if order.name %}<bdi>{{ order.name }}</bdi>, {% endif %}<code>{{ order.username }}</code>
</h2>
{% if is_out %}<p><a href="{{ base_url }}login">{{ _("Log in again") }}</a></p>
{% elif is_leaving %}<form action="{{ base_url }}logout" method="post">
{{ xsrf_form_html() | safe }}<button>{{ _("Log out") }}</button></form>
{% else %}<form action="{{ base_url }}login?next={{ next }}" method="post">
{{ xsrf_form_html() | safe }}
<input name="username" value="{{ order.username }}" autocomplete="username" hidden>
<label>{{ _("Notebook password") }}<input name="password" type="password" required autofocus
 autocomplete="current-password"></label>
<button>{{ _("Log in") }}</button></form>
<p>{{ _("Type the password of your notebook, not that of your account.") }}
<a href="{{ order.page_url }}-password?username={{ order.username }}"
 {{ any_host }}>{{ _("Change the password") }}</a></p>{% endif %}
<p><a href="{{ order.page_url }}" {{ any_host }}>
{{ _("To the page of the course") if is_out or is_leaving
 else _("Not yours? Find your own.") }}</a></p>
{% endblock %}""",
}
TEMPLATES["logout.html"] = TEMPLATES["login.html"]

# With a certificate that devices know: they let nobody click a wrong one away, and know no
# plain http on this host, on all its ports, for so many seconds. Source: RFC 6797.
HSTS = "Strict-Transport-Security", f"max-age={7 * 24 * 3600}"

# What the page of the certificate tells first to whom: by the browser's own words.
SYSTEMS = (
    (
        "iPad, iPhone",
        "iPad|iPhone|Macintosh.*Safari",  # an iPad says it is a Mac
        Phrase(
            "Allow the download. In Settings, tap Profile Downloaded and install it; then"
            " switch it on in General > About > Certificate Trust Settings."
        ),
    ),
    (
        "Mac",
        "Macintosh",
        Phrase(
            "Open the file: Keychain Access adds it. Open the certificate there, then"
            " Trust, and choose Always Trust. Firefox needs its own steps."
        ),
    ),
    (
        "Android",
        "Android",
        Phrase(
            "In Settings, search for “CA certificate”, tap Install anyway, and choose the"
            " file."
        ),
    ),
    (
        "Windows",
        "Windows",
        Phrase(
            "Open the file, then Install Certificate, Current User, and place it in the"
            " store Trusted Root Certification Authorities. Firefox needs its own steps."
        ),
    ),
    (
        "Chromebook, Linux",
        "CrOS|Linux(?!.*Android)",
        Phrase(
            "In Chrome's Settings, search for certificates: under Authorities, or Custom,"
            " import the file, and trust it for identifying websites."
        ),
    ),
    (
        "Firefox",
        "Firefox",
        Phrase(
            "In Settings, search for certificates: View Certificates, Authorities, Import;"
            " choose the file, and trust it to identify websites."
        ),
    ),
)


class Language(Message):
    """What the pages say in a language, by what they say in English."""

    name: str = "en"
    phrases: dict[str, str] = dataclasses.field(default_factory=dict)

    def say(self, phrase: Phrase, **values: object) -> str:
        """Return a phrase in this language, or in English if it lacks that one."""
        return self.phrases.get(phrase, phrase).format(**values)


def find_catalogs() -> dict[str, Path]:
    """Return the catalogs by their languages, all of one directory."""
    for directory in LOCALES:
        if catalogs := {path.stem: path for path in directory.glob("*.po")}:
            return catalogs
    return {}


def fields_of(text: str) -> list[str]:
    """Return what is filled into a phrase, in order; raises ValueError for lone braces."""
    parts = string.Formatter().parse(text)
    return sorted(field for _, field, *_ in parts if field is not None)


def read_language(name: str) -> Language:
    """Return a language that the configuration can name.

    Raises: OSError; Error for a catalog with which pages would fail.
    """
    if name == "en":
        return Language()
    from babel.messages import pofile  # here, so that other commands start at once

    path = find_catalogs()[name]
    try:
        with open(path, "rb") as file:
            catalog: Iterable[Any] = pofile.read_po(file, abort_invalid=True)
        phrases = {x.id: x.string for x in catalog if x.id and x.string and not x.fuzzy}
        for phrase, said in phrases.items():
            if fields_of(said) != fields_of(phrase):
                raise ValueError(f"the placeholders of {phrase!r} are others in {said!r}")
    except (pofile.PoFileError, ValueError, LookupError) as error:
        raise Error(f"{path}: {error}") from None
    return Language(name, phrases)


class SharedBytecode(Upstream):  # type: ignore[misc]
    """Has what was compiled at the rehearsal of a start, for the templates of forks."""

    upstream = "jinja2.BytecodeCache"
    compiled: dict[str, bytes] = {}  # of this process

    def load_bytecode(self, bucket: Any) -> None:
        if bucket.key in self.compiled:
            bucket.bytecode_from_string(self.compiled[bucket.key])

    def dump_bytecode(self, bucket: Any) -> None:
        self.compiled[bucket.key] = bucket.bytecode_to_string()


def add_pages(environment: Any, language: Language, **values: object) -> None:
    """Give an environment of Jinja's our pages, in a language, before its own."""
    from jinja2 import ChoiceLoader, DictLoader
    from markupsafe import Markup

    own = [environment.loader] if environment.loader else []
    environment.loader = ChoiceLoader([DictLoader(TEMPLATES), *own])
    environment.bytecode_cache = with_upstream(SharedBytecode)()
    environment.globals |= {
        "_": language.say,
        "language": language.name,
        "style": Markup(STYLE),
        "script": Markup(SCRIPT),
        "messages": (),
        **values,
    }


def content_security_policy() -> str:
    """Return a policy that allows these pages' style, script and forms alone."""
    # Browsers hold a form's redirect against form-action too, hence any https address.
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (STYLE, SCRIPT)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}';"
        " connect-src 'self' wss:; form-action https:; base-uri 'none';"
        " frame-ancestors 'none'"
    )


class SocketHandler(Upstream):  # type: ignore[misc]
    """Lets a page try if its browser opens a WebSocket to this port, and say if not.

    A request for one that has come without `Upgrade`, or whose answer got lost, was
    changed on its way: by a filter or proxy. One that never came was not sent, as by
    Safari to a certificate that it does not trust, or held back.
    """

    upstream = "tornado.websocket.WebSocketHandler"
    come: "collections.deque[str]"  # numbers of tries
    max_message_size = 125  # bytes, which a control frame may have: RFC 6455, 5.5

    def report(self, username: str, kind: str) -> None:
        """Take what fails in somebody's browser."""

    async def get(self) -> None:
        number = self.get_query_argument("try", "")[:20]
        username = self.get_query_argument("failed", None)
        if username is None:
            self.come.append(number)
            await super().get()
        else:
            kind = "network" if number in self.come else "certificate"
            self.report(username, kind)
            self.finish(kind)

    def check_origin(self, origin: str) -> bool:
        return True  # behind a proxy it may be another; and it does nothing

    def open(self) -> None:
        self.close()

    def on_message(self, message: object) -> None:
        """Ignore it: strangers send some, and an error would be in the teacher's log."""


# == Launch 1: kernels, terminals and packages of a student ================================
#
# What a student's server adds to Jupyter's managers of kernels and terminals, and to tabs'
# connections: see `with_upstream`.

CULL_SECONDS = 60  # between two looks at what is idle
FIRST_BYTES = LAST_BYTES = 2 << 20  # of a kernel's output, while its tab does not read
PIECE_BYTES = 1 << 16  # of text that is kept or left out as one
OUT_OF_MEMORY = (
    "The kernel was killed, most likely because the machine had no memory left. What it had"
    " computed is gone; run your cells again, with less data.\n"
)
MEMORY_LIMIT = (
    "\nThe kernel of {} was ended: all your notebooks together may use {} of memory, which"
    " was full. What it had computed is gone; run your cells again, with less data.\n"
)
ALMOST_FULL = (
    "\nThe cell of {} was interrupted, before its kernel had to end: your notebooks"
    " use {} of {} of memory. Variables are still there: delete large ones (del x), or shut"
    " down kernels that you do not need.\n"
)
PROCESS_LIMIT = (
    "\nYou have started all {} processes and threads that you may have: programs start no"
    " others until some of them end.\n"
)
KERNEL_ENDED = "The kernel was ended: it {}. Run your cells again."
TRY_AGAIN = 1012  # has a tab ask about its kernel when its WebSocket is closed: RFC 6455

KERNEL_SECONDS = 120.0  # in which a kernel must open its sockets; Java's is slow to start
KERNEL_LOOK_SECONDS = 1.0  # between two looks at a kernel that has not answered
KERNEL_PORTS = 5  # of a kernel that serves TCP
SILENT = "it does not answer"

# What `python -c` runs in the place of a Python kernel's module: it hides debugpy, and no
# file in the working directory stands in for a module meanwhile.
KERNEL_WITHOUT_DEBUGGER = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy;"
    " sys.modules['debugpy.server'] = None;"
    " runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)

# Starts a kernel so that it ends before its server when memory is full: choom(1).
CHOOM = "/usr/bin/choom", "-n", "500", "--"

# Programs of the course, and those that look for their files beside the course's Python.
COURSE_BIN = Path(sys.executable).parent
COURSE_ALONE = ("jupyter-lab", "jupyter-notebook", "jupyter-server", "notebooks.py")


class Gateway(Message):
    """Where kernels run that do not run on this host; without a url all are here."""

    url: str = ""
    token: str = ""  # the webserver does not know it
    kernels: Sequence[str] = ()  # patterns of names; without any, all kernels are there
    authority: str = ""  # in PEM format; empty: those that this host trusts

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.authority or None)


class ServerOrder(Message):
    """All that a student's server is told; the password is a hash in Jupyter's format.

    The defaults are for the rehearsal of a start.
    """

    username: str = "rehearsal"
    name: str = ""
    title: str = ""
    page_url: str = ""
    any_host: bool = True  # of the page, as of the notebook
    language: Language = Language()
    ports: str = ""  # for people
    course: str = ""  # its configuration file, for ps
    port: int = 0
    url: str = ""
    password: str = "-"
    cookie_secret: str = "00"  # in hex
    root_dir: str = "."
    start_dir: str = "."
    start_page: str = "tree"
    profile: str = ""
    idle_seconds: int = 0
    idle_kernel_seconds: int = 0
    busy_minutes: int = 0
    processes: int = 1000
    has_slice: bool = False
    debugger: bool = False
    tcp_kernels: bool = False
    own_packages: bool = False
    certificate: Certificate = Certificate("", "")
    gateway: Gateway = Gateway()
    # It may hold secrets.
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def own_environment(home: Path) -> Path:
    """Return where a student's own packages are; another Python has another place."""
    return home / ".local/share/notebooks" / f"python{sysconfig.get_python_version()}"


def ensure_own_environment(place: Path) -> Path:
    """Make or mend an environment on top of the course's, and return its Python.

    pip puts packages there, which go before the course's. It is what `python -m venv`
    makes, in a hundredth of the time. Runs as: the student.
    """
    programs, python = place / "bin", os.path.realpath(sys.executable)
    library = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    for directory in (programs, library):
        directory.mkdir(parents=True, exist_ok=True)

    for link in (programs / "python", programs / "python3"):
        if os.path.realpath(link) != python:
            link.unlink(missing_ok=True)
            link.symlink_to(python)

    # A directory that is only named there would have its own .pth files left out.
    course = filter(os.path.isdir, site.getsitepackages())
    lines = "".join(f"import site; site.addsitedir({x!r})\n" for x in course)
    home = f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n"
    for path, text in ((place / "pyvenv.cfg", home), (library / "course.pth", lines)):
        if not path.exists() or path.read_text(errors="replace") != text:
            path.write_text(text)

    ensure_own_programs(programs)
    return programs / "python"


def ensure_own_programs(programs: Path) -> None:
    """Have the course's programs, such as pip, run in a student's own environment."""
    for program in COURSE_BIN.iterdir():
        own = programs / program.name
        # One that pip has put there stays.
        if os.access(own, os.X_OK) or program.name in COURSE_ALONE or program.is_dir():
            continue
        with program.open("rb") as file:
            if file.readline(512).startswith(b"#!%b/python" % bytes(COURSE_BIN)):
                own.write_bytes(b"#!%b/python\n%b" % (bytes(programs), file.read()))
                own.chmod(0o755)


def student_python(order: ServerOrder) -> str:
    """Return the Python of a student's kernels and terminals."""
    if order.own_packages:
        try:
            return str(ensure_own_environment(own_environment(Path.home())))
        except OSError as error:  # as on a full disk
            log.warning("there are no packages of your own: %s", explain(error))
    return sys.executable


def server_environment(
    account: pwd.struct_passwd, given: Mapping[str, str], own_packages: bool = True
) -> dict[str, str]:
    """Return the whole environment of a student's server, kernels and terminals."""
    own = own_environment(Path(account.pw_dir))
    path = f"{own}/bin:{COURSE_BIN}" if own_packages else str(COURSE_BIN)
    data = f"{account.pw_dir}/.local", own, sys.prefix

    return {
        "LANG": "C.UTF-8",
        **given,
        "HOME": account.pw_dir,
        "USER": account.pw_name,
        "LOGNAME": account.pw_name,
        "SHELL": account.pw_shell,
        "PATH": f"{path}:{given.get('PATH', '/usr/local/bin:/usr/bin:/bin')}",
        "JUPYTER_RUNTIME_DIR": str(runtime_dir_of(account)),
        "JUPYTER_PATH": ":".join(f"{each}/share/jupyter" for each in data),
        # With these shells heed PATH_SCRIPT, also those that a student starts: bash at a
        # prompt and before a script, sh when it is interactive.
        "NOTEBOOKS_PATH": path,
        "PROMPT_COMMAND": f". {PATH_SCRIPT}",
        "BASH_ENV": str(PATH_SCRIPT),
        **({} if account.pw_shell.endswith("/bash") else {"ENV": str(PATH_SCRIPT)}),
    }


class StudentKernelSpecs(Upstream):  # type: ignore[misc]
    """A finder of kernels, of which those of Python have the student's own packages."""

    upstream = "jupyter_client.kernelspec.KernelSpecManager"
    order: ServerOrder

    def get_kernel_spec(self, kernel_name: str) -> Any:
        order, spec = self.order, super().get_kernel_spec(kernel_name)
        exists = Path.home().joinpath(".ipython", f"profile_{order.profile}").is_dir()
        profile = order.profile if exists else ""
        spec.argv = student_argv(spec.argv, profile, order.debugger)
        program = COURSE_BIN / spec.argv[0]  # or the latter, if that is a path
        if program.parent == COURSE_BIN and program.name.startswith("python"):
            spec.argv[0] = student_python(order)
        if not order.debugger:  # JupyterLab greys out its button
            spec.metadata = {**spec.metadata, "debugger": False}
        if os.path.exists(CHOOM[0]) and shutil.which(spec.argv[0]):
            spec.argv = [*CHOOM, *spec.argv]
        return spec


def student_argv(argv: Sequence[str], profile: str, debugger: bool) -> list[str]:
    """Return how a kernel is started: one of Python's with a profile, without debugger."""
    words = list(argv)
    if profile and "ipykernel_launcher" in words:
        words.append(f"--profile={profile}")
    for i, pair in enumerate(itertools.pairwise(argv)):
        if not debugger and pair in [("-m", "ipykernel_launcher"), ("-m", "ipykernel")]:
            words[i : i + 2] = "-c", KERNEL_WITHOUT_DEBUGGER.format(module=pair[1])
    return words


def kernel_transports(spec: Any, tcp_kernels: bool) -> list[str]:
    """Return the transports to try with a kernel that has not come up yet, in order.

    One that ends may have ended for another reason, such as a full disk: ipc has two tries.
    """
    wish, is_python = spec.metadata.get("transport"), "ipykernel" in " ".join(spec.argv)
    if not tcp_kernels or wish == "ipc" or (is_python and wish != "tcp"):
        return ["ipc", "ipc"]
    return ["tcp"] if wish == "tcp" else ["ipc", "ipc", "tcp"]


def bound_transport(kernel: Any) -> str:
    """Return what a kernel listens on: `ipc`, `tcp`, or nothing yet."""
    if kernel.transport == "ipc" and os.path.exists(f"{kernel.ip}-{kernel.shell_port}"):
        return "ipc"
    ports = 0
    with contextlib.suppress(AttributeError, psutil.Error):  # not local, or ended
        process = psutil.Process(kernel.provisioner.pid)
        for each in (process, *process.children(recursive=True)):
            connections = each.net_connections("tcp")
            ports += sum(x.status == psutil.CONN_LISTEN for x in connections)
    return "tcp" if ports >= KERNEL_PORTS else ""


async def hear_kernel(kernel: Any, is_last: bool, seconds: float = KERNEL_SECONDS) -> str:
    """Wait until a kernel answers; return nothing, or why it never will.

    One that listens where it should is left alone, however long it takes.
    is_last: nothing else will be tried, so nobody looks through all processes for ports.
    """
    answered = asyncio.Event()
    stream = kernel.connect_shell()
    stream.on_recv(lambda _: answered.set())
    kernel.session.send(stream, "kernel_info_request")
    kernel.stop_restarter()  # it would hide an end
    deadline = time.monotonic() + seconds
    answer = asyncio.ensure_future(answered.wait())

    try:
        while not (await asyncio.wait([answer], timeout=KERNEL_LOOK_SECONDS))[0]:
            if not await kernel.is_alive():
                return "it ended"
            is_late = time.monotonic() > deadline
            bound = bound_transport(kernel) if is_late or not is_last else ""
            if is_late and bound == kernel.transport:
                break
            # JeroMQ, the library of kernels in Java, opens ports for unix sockets.
            if is_late or bound not in ("", kernel.transport):
                return SILENT
        return ""
    finally:
        answer.cancel()
        stream.close()
        kernel.start_restarter()


class PlainError(Upstream):  # type: ignore[misc]
    """An error of which front ends show the text alone."""

    upstream = "tornado.web.HTTPError"

    def __str__(self) -> str:
        return self.log_message or ""


class StudentKernels(Upstream):  # type: ignore[misc]
    """A manager of kernels that ends none with work in it, and tells tabs of each end.

    They start in the start directory if nobody names another, as in plain Jupyter. The
    first of each name is heard out, and with the transport that it took all others start.
    """

    upstream = "jupyter_server.services.kernels.kernelmanager.AsyncMappingKernelManager"
    order: ServerOrder
    start_path: str
    transports: dict[str, str]  # by the names of kernels
    notebooks: dict[str, str]  # file names, by the ids of kernels
    watch: "asyncio.Task[None] | None" = None
    killed = 0  # processes, of which has been told
    bound = 0.0  # bytes, above which a kernel is interrupted again
    last_refused = -QUIET_SECONDS  # when a process was

    async def start_kernel(self, **options: Any) -> str:
        options["path"] = options.get("path") or self.start_path
        name = options.get("kernel_name") or self.default_kernel_name
        spec = self.kernel_spec_manager.get_kernel_spec(name)
        known, tried = name in self.transports, self.transports_to_try(name, spec)
        reason = silent = ""

        for i, transport in enumerate(tried):
            if transport == silent:
                continue
            try:
                kernel_id = str(await super().start_kernel(transport=transport, **options))
            except OSError as error:
                raise self.kernel_error(spec, explain(error)) from None
            if not known:
                kernel, is_last = self.get_kernel(kernel_id), i == len(tried) - 1
                reason = await hear_kernel(kernel, is_last)
            if not reason:
                path = options.get("env", {}).get("JPY_SESSION_NAME", "a notebook")
                self.notebooks[kernel_id] = os.path.basename(path)
                return self.keep_kernel(kernel_id, name, transport)
            silent = transport if reason == SILENT else ""
            await self.shutdown_kernel(kernel_id, now=True)
        raise self.kernel_error(spec, reason)

    def transports_to_try(self, name: str, spec: Any) -> list[str]:
        if name in self.transports:
            return [self.transports[name]]
        return kernel_transports(spec, self.order.tcp_kernels)

    def keep_kernel(self, kernel_id: str, name: str, transport: str) -> str:
        self.transports[name] = transport
        if not self.watch:
            self.watch = asyncio.get_running_loop().create_task(self.watch_usage())
        died = functools.partial(self.tell_of_death, kernel_id)
        self.add_restart_callback(kernel_id, died)
        return kernel_id

    def kernel_error(self, spec: Any, reason: str) -> Any:
        hint = "" if self.order.tcp_kernels else "; perhaps it needs TCP (tcp_kernels = no)"
        text = f"The kernel {spec.display_name} cannot be started: {reason}{hint}."
        return with_upstream(PlainError)(500, f"{text} What it said is in ~/{SERVER_LOG}.")

    def pre_start_kernel(self, kernel_name: str | None, kwargs: Any) -> Any:
        transport = kwargs.pop("transport")
        kernel, *others = super().pre_start_kernel(kernel_name, kwargs)
        kernel.transport = transport
        # Where the kernel has CurveZMQ, too. Over unix sockets it would only take time.
        encrypted = transport == "tcp" and importlib.import_module("zmq").has("curve")
        kernel.transport_encryption = "auto" if encrypted else "disabled"
        return kernel, *others

    async def restart_kernel(self, *ids: Any, **options: Any) -> Any:
        student_python(self.order)  # they may have deleted it
        return await super().restart_kernel(*ids, **options)

    def waiting_for(self, kernel_id: str) -> Any:
        """Return what Jupyter knows of messages that wait for a tab to come back."""
        return self._kernel_buffers.get(kernel_id, {})

    def tabs_of(self, kernel_id: str) -> list[Any]:
        every = self.parent.kernel_websocket_connection_class._open_sockets
        return [tab for tab in every if tab.kernel_id == kernel_id]

    def tell_of_death(self, kernel_id: str) -> None:
        """Say why a kernel died that neither we nor the student have ended."""
        process = getattr(self.get_kernel(kernel_id).provisioner, "process", None)
        if not process or process.poll() != -signal.SIGKILL:
            return

        usage, text = read_usage(os.getuid()), OUT_OF_MEMORY
        if usage and usage.memory_limit and usage.killed > self.killed:
            self.killed, limit = usage.killed, format_bytes(usage.memory_limit)
            text = MEMORY_LIMIT.format(self.notebooks.get(kernel_id), limit)
        self.tell(kernel_id, text)

    def tell(self, kernel_id: str, text: str) -> None:
        """Show text in the tabs of a kernel, below its cell; if it has none, in all."""
        every = self.parent.kernel_websocket_connection_class._open_sockets
        for tab in self.tabs_of(kernel_id) or every:
            tab.show(text)
        if waiting := self.waiting_for(kernel_id):
            waiting["buffer"].append(("iopub", waiting["buffer"].stream_parts(text)))

    async def watch_usage(self) -> None:
        """Look what the student uses, for as long as this server is in a slice."""
        before = read_usage(os.getuid())
        while before:
            await asyncio.sleep(USAGE_SECONDS)
            usage = read_usage(os.getuid()) or before
            try:
                await self.heed(usage, before)
            except Exception:  # such as a tab or a kernel that has just gone
                self.log.exception("the limits could not be told")
            before = usage

    async def heed(self, usage: Usage, before: Usage) -> None:
        """Interrupt the largest kernel before the system kills it, and say why."""
        is_refused = usage.refused > before.refused
        if not is_full(usage):
            self.bound = 0.0
        if not is_full(usage) and not is_refused:
            return

        # Only now, for it takes a look at all processes of the host.
        sizes = {x: memory_of(self.get_kernel(x)) for x in self.list_kernel_ids()}
        largest = max(sizes, key=sizes.__getitem__, default="")
        if not sizes.get(largest):  # there is none, or none of this host
            return

        if is_refused:
            if time.monotonic() - self.last_refused > QUIET_SECONDS:
                self.tell(largest, PROCESS_LIMIT.format(usage.process_limit))
            self.last_refused = time.monotonic()
        # What is there already may stay: again only if there is more.
        if is_full(usage) and usage.memory > self.bound:
            self.bound = usage.memory + usage.memory_limit * (1 - FULL_SHARE) / 4
            amounts = map(format_bytes, (usage.memory, usage.memory_limit))
            self.tell(largest, ALMOST_FULL.format(self.notebooks.get(largest), *amounts))
            await self.interrupt_kernel(largest)

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """End a kernel that is not used, or computes for nobody. Called once a minute."""
        kernel, tabs = self.get_kernel(kernel_id), self.tabs_of(kernel_id)
        model = self.kernel_model(kernel_id)
        state, buffer = model["execution_state"], self.waiting_for(kernel_id).get("buffer")
        if state == "busy" and not model["connections"]:
            kernel.minutes_in_vain = getattr(kernel, "minutes_in_vain", -1) + 1
        else:
            kernel.minutes_in_vain = -1

        if 0 < self.order.busy_minutes <= kernel.minutes_in_vain:
            minutes = counted(self.order.busy_minutes, "minute")
            words = f"computed for {minutes} while no tab was open"
            await self.shutdown_kernel(kernel_id)
        elif not (buffer and (buffer.first_bytes or buffer.left_out)):
            words = f"was not used for {counted(self.cull_idle_timeout // 60, 'minute')}"
            await super().cull_kernel_if_idle(kernel_id)

        if kernel_id not in self and state != "dead":
            self.tell_end(model, words, tabs)

    def tell_end(self, model: dict[str, Any], words: str, tabs: list[Any]) -> None:
        """Have the tabs of a kernel that is gone ask about it, and then say why."""
        model |= {"execution_state": "dead", "connections": 0}
        model["reason"] = KERNEL_ENDED.format(words)
        with contextlib.suppress(OSError):  # a full disk
            end_file(model["id"]).write_text(json.dumps(model))
        for tab in tabs:
            tab.websocket_handler.close(TRY_AGAIN)

    def kernel_model(self, kernel_id: str) -> Any:
        if kernel_id not in self:
            with contextlib.suppress(OSError, ValueError):
                return json.loads(end_file(kernel_id).read_text())
            # Had an earlier server ended in order, it would have removed this file.
            left = end_file(kernel_id).with_name(f"kernel-{kernel_id}.json")
            with contextlib.suppress(OSError, ValueError, KeyError):
                name = json.loads(left.read_text())["kernel_name"]
                reason = KERNEL_ENDED.format("lost its notebook server")
                dead = {"execution_state": "dead", "connections": 0, "reason": reason}
                return {"id": kernel_id, "name": name, **dead}
        return super().kernel_model(kernel_id)


class StudentTerminals(Upstream):  # type: ignore[misc]
    """A manager of terminals that ends them only if nothing runs, and says so."""

    upstream = "jupyter_server_terminals.terminalmanager.TerminalManager"
    order: ServerOrder

    def create(self, **options: Any) -> Any:
        """Make a terminal, such as that which a tab asks for again by its name."""
        student_python(self.order)
        model = super().create(**options)
        words = end_file(f"terminal-{model['name']}")
        with contextlib.suppress(OSError, ValueError):
            self.terminals[model["name"]].read_buffer.append(words.read_text())
            words.unlink()
        return model

    def is_used(self, terminal: Any) -> bool:
        """Say whether it has a tab, or anything but its shell runs in its session."""
        leader = terminal.ptyproc.pid
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if pid != leader and os.getsid(pid) == leader:
                    return True
        return bool(terminal.clients)

    async def _cull_inactive_terminal(self, name: str) -> None:
        terminal = self.terminals.get(name)
        if terminal and not self.is_used(terminal):
            await super()._cull_inactive_terminal(name)
            if not terminal.ptyproc.isalive():
                minutes = counted(self.cull_inactive_timeout // 60, "minute")
                words = f"The terminal that was here was not used for {minutes}, and ended."
                end_file(f"terminal-{name}").write_text(f"[{words}]\r\n")


class OutputBuffer:
    """A kernel's messages that wait for a tab; of output, the first and last megabytes.

    A message is a channel's name and the parts that came through ZMQ. What ends a cell
    (replies, status) is always kept. Long text is cut into pieces. The first piece of a
    cell's output that is left out keeps its place, for a note of how much that was.
    """

    def __init__(self, session: Any):
        self.session = session  # signs what it makes
        self.parent = b"{}"  # the header of the request to which the last message belongs
        # Channel, such a header, and the parts, or text and name of a stream; by number.
        self.messages: dict[int, tuple[str, bytes, list[bytes] | tuple[str, str]]] = {}
        self.count = self.first_bytes = self.last_bytes = 0
        self.last: collections.deque[tuple[int, int]] = collections.deque()
        self.notes: dict[bytes, int] = {}
        self.left_out: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[tuple[str, list[bytes]]]:
        for number, (channel, parent, parts) in list(self.messages.items()):
            if size := self.left_out[number]:
                text = f"{format_bytes(size)} of output left out, for nobody was reading"
                parts = f"\n[... {text} ...]\n", "stderr"
            if isinstance(parts, tuple):
                parts = self.stream_parts(*parts, parent)
            yield channel, parts

    def stream_parts(self, text: str, name: str = "stderr", parent: bytes = b"") -> Any:
        """Return a message that shows text in the output of a cell, or of the last one."""
        content, header = {"name": name, "text": text}, json.loads(parent or self.parent)
        message = self.session.msg("stream", content, parent=header)
        return self.session.serialize(message)

    def append(self, message: tuple[str, list[bytes]]) -> None:
        channel, parts = message
        _, (_, header, parent, _, content, *_) = self.session.feed_identities(parts)
        kind, size = json.loads(header)["msg_type"], sum(map(len, parts))
        if channel == "iopub":
            self.parent = parent

        if channel != "iopub" or kind == "status":
            self.add(0, channel, parent, parts)
        elif kind == "stream" and size > PIECE_BYTES:
            stream = json.loads(content)
            for i in range(0, len(stream["text"]), PIECE_BYTES):
                piece = stream["text"][i : i + PIECE_BYTES]
                self.add(len(piece), channel, parent, (piece, stream["name"]))
        else:
            self.add(size, channel, parent, parts)

    def add(self, size: int, *message: Any) -> None:
        """Keep a message, and leave out as much as the size of its output needs."""
        self.count += 1
        self.messages[self.count] = message
        if not self.last and self.first_bytes + size <= FIRST_BYTES:
            self.first_bytes += size
        elif size:
            self.last.append((self.count, size))
            self.last_bytes += size

        while self.last_bytes > LAST_BYTES:
            number, size = self.last.popleft()
            self.last_bytes -= size
            note = self.notes.setdefault(self.messages[number][1], number)
            self.left_out[note] += size
            if note != number:
                del self.messages[number]
            else:  # its text goes
                self.messages[number] = *self.messages[number][:2], []


class StudentTab(Upstream):  # type: ignore[misc]
    """A tab's connection to its kernel: as Jupyter's, but it keeps little for the tab.

    While the tab does not read, messages wait in `unread`. When the connection ends, they
    stay for the next one of this tab, in place of Jupyter's list without end.
    """

    upstream = (
        "jupyter_server.services.kernels.connection.channels.ZMQChannelsWebsocketConnection"
    )

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.unread = OutputBuffer(self.session)

    @property
    def waiting(self) -> Any:
        """What Jupyter knows of messages that wait for this tab."""
        waiting = self.multi_kernel_manager.waiting_for(self.kernel_id)
        return waiting if waiting.get("session_key") == self.session_key else {}

    @property
    def socket(self) -> Any:
        socket = getattr(self.websocket_handler.ws_connection, "stream", None)
        return socket if socket and not socket.closed() else None

    def connect(self) -> Any:
        if self.waiting:
            self.unread, self.waiting["buffer"] = self.waiting["buffer"], []
        connected = super().connect()
        if connected:
            connected.add_done_callback(self.pass_on)
        return connected

    def disconnect(self) -> None:
        super().disconnect()
        self.waiting["buffer"] = self.unread

    def show(self, text: str) -> None:
        """Show text below the cell that was run last."""
        self.handle_outgoing_message(self.channels["iopub"], self.unread.stream_parts(text))

    def handle_outgoing_message(self, stream: Any, outgoing_msg: list[bytes]) -> None:
        _, parts = self.session.feed_identities(outgoing_msg)
        if stream.channel == "iopub":
            self.unread.parent = parts[2]

        socket = self.socket
        if socket and not self.unread and not socket.writing():
            super().handle_outgoing_message(stream, outgoing_msg)
            return
        unknown = dict.fromkeys(("header", "parent_header", "content"))
        if not self._limit_rate(stream.channel, unknown, parts[1:]):
            if socket and not self.unread:  # an empty write is done after those before it
                socket.write(b"").add_done_callback(self.pass_on)
            self.unread.append((stream.channel, outgoing_msg))

    def pass_on(self, _: object) -> None:
        """Send what waits: at once, so the limit of rates would leave out its end."""
        if self.socket:
            unread, self.unread = self.unread, OutputBuffer(self.session)
            self.unread.parent = unread.parent
            self.limit_rate, limited = False, self.limit_rate
            for channel, parts in unread:
                super().handle_outgoing_message(self.channels[channel], parts)
            self.limit_rate = limited


def memory_of(kernel: Any) -> int:
    """Return the bytes of a kernel and what it has started."""
    total = 0
    with contextlib.suppress(AttributeError, psutil.Error):  # not local, or ended
        process = psutil.Process(kernel.provisioner.pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    return total


def end_file(name: str) -> Path:
    """Return where the end of a kernel or terminal is told, also by the next server."""
    return Path(os.environ["JUPYTER_RUNTIME_DIR"], f"ended-{name}")


# == Launch 2: kernels on a gateway ========================================================
#
# Kernels may run elsewhere, behind a Jupyter Enterprise Gateway or Kernel Gateway, whose
# token reaches everybody's kernels. So only a student's server has the token: it runs no
# student's code, asks for nothing but kernels that it has started itself, by addresses
# that contain nothing of a student's, and says whose kernels they are.

GATEWAY_SECONDS = 4.0  # between two looks; and in which it must have taken a connection
GATEWAY_ANSWER_SECONDS = 6.0  # to a question that needs no work
GATEWAY_PATIENCE_SECONDS = 2.0  # of a page, and of a server that ends
GATEWAY_BYTES = 100 << 20  # of a message; Tornado has no more room
KEEPALIVE = (  # of a connection: tcp(7)
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
)
# Gateways put it into templates of YAML, and students choose names of directories.
SAFE_DIRECTORY = re.compile(r"[\w/.,+@ -]{1,4000}")
CLUSTER_AWAY = (
    "\nThe cluster where this kernel runs does not answer. What you run now waits for it;"
    " your files and terminals work meanwhile.\n"
)
CLUSTER_BACK = "\nThe cluster answers again.\n"


def read_token(path: Path) -> str:
    token = path.read_text("utf-8-sig", "replace").strip()
    if path.stat().st_mode & 0o077:
        cure = f"chmod 600 {shlex.quote(str(path))}"
        raise ValueError(f"others can read the token; run `{cure}`")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("must be one line, the token of the gateway")
    return token


def read_gateway(config: Config) -> Gateway:
    """Return what the configuration says of the gateway; raises UsageError."""
    url, patterns = config.gateway_url.rstrip("/"), config.gateway_kernel
    path, authority = config.gateway_token_file, config.gateway_ca
    key, token, pem = "gateway_url", "", ""

    try:
        if not url and any((path, authority, patterns)):
            raise ValueError("is missing; without it, no other key of a gateway counts")
        if path:
            key = f"gateway_token_file = {path}"
            token = read_token(path)
        if authority:
            key = f"gateway_ca = {authority}"
            # Only comments are not ASCII; and an empty file is not to mean all authorities.
            pem = authority.read_text("ascii", "ignore") or "-"
        gateway = Gateway(url, token, patterns, pem)
        gateway.context()
    except ssl.SSLError:
        raise UsageError(
            f"{config.path}: [Launch] {key}: there is no certificate in it (PEM format)"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(f"{config.path}: [Launch] {key}: {reason}") from None
    return gateway


def use_gateway(app: Any, gateway: Gateway) -> None:
    """Tell Jupyter's client of the gateway; not by configuration, which others can see."""
    client, near = app.gateway_config, app.kernel_websocket_connection_class
    client.url, client.auth_token = gateway.url, gateway.token
    client.connect_timeout = GATEWAY_SECONDS
    client.request_timeout = float(os.environ.get("KERNEL_LAUNCH_TIMEOUT", "40")) + 2
    client.init_connection_args()
    # The token is for this address alone; and Jupyter forgets its `ca_certs`.
    client._connection_args |= {"follow_redirects": False, "ssl_options": gateway.context()}

    far = with_upstream(RemoteTab)
    app.web_app.settings["kernel_websocket_connection_class"] = lambda parent, **options: (
        far if hasattr(parent, "kernel_url") else near
    )(parent=parent, **options)


def kernel_managers(gateway: Gateway) -> tuple[Any, Any]:
    """Return the classes of a server's managers: of kernels, and of what there is."""
    if gateway.url:
        return RemoteKernels, RemoteKernelSpecs
    return StudentKernels, StudentKernelSpecs


def gateway_fault(error: Exception) -> str:
    """Say for people why the gateway has not done what it was asked."""
    code = getattr(error.__cause__ or error, "code", 0)
    if not 400 <= code < 502:  # or a proxy has said so
        return "the cluster does not answer; try again later"
    return printable(f"the cluster answers {' / '.join(map(str, error.args))}")[:500]


async def ask_gateway(url: str) -> Any:
    """Return what the gateway answers at once; Jupyter's own request takes its time."""
    from jupyter_server.gateway.gateway_client import GatewayClient
    from tornado.httpclient import AsyncHTTPClient

    client: Any = GatewayClient.instance()
    options = {**client.load_connection_args(), "request_timeout": GATEWAY_ANSWER_SECONDS}
    return json.loads((await AsyncHTTPClient().fetch(url, **options)).body)


class RemoteKernelSpecs(StudentKernelSpecs):
    """A finder of kernels here and on the gateway; how those start is not for students."""

    remote: dict[str, Any]
    next_look = 0.0
    look: "asyncio.Task[None] | None" = None

    def is_remote(self, name: str) -> bool:
        patterns = self.order.gateway.kernels
        return not patterns or any(fnmatch.fnmatchcase(name, each) for each in patterns)

    def get_kernel_spec(self, kernel_name: str) -> Any:
        if not self.is_remote(kernel_name):
            return super().get_kernel_spec(kernel_name)
        if kernel_name in self.remote:
            return self.remote[kernel_name]
        raise importlib.import_module("jupyter_client.kernelspec").NoSuchKernel(kernel_name)

    async def get_all_specs(self) -> dict[str, Any]:
        if time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + 6 * GATEWAY_ANSWER_SECONDS
            self.look = asyncio.create_task(self.take_specs())
        if self.look:
            await asyncio.wait([self.look], timeout=GATEWAY_PATIENCE_SECONDS)
        found = super().get_all_specs() if self.order.gateway.kernels else {}
        far = {"resource_dir": os.devnull}
        return found | {
            name: far | {"spec": x.to_dict()} for name, x in self.remote.items()
        }

    async def take_specs(self) -> None:
        from jupyter_client.kernelspec import KernelSpec

        url = f"{self.order.gateway.url}/api/kernelspecs?user={self.order.username}"
        kept = "display_name", "language", "interrupt_mode"

        try:
            answer = await ask_gateway(url)
            self.remote = {
                name: KernelSpec(
                    resource_dir=os.devnull,  # or its icons were files of this host
                    **{x: y for x, y in each["spec"].items() if x in kept},
                )
                for name, each in answer["kernelspecs"].items()
                if self.is_remote(name)
            }
            if not self.order.gateway.kernels:
                self.parent.kernel_manager.default_kernel_name = answer["default"]
        except Exception as error:  # whatever it answers, there are other kernels
            self.log.warning("kernels of the gateway: %s", gateway_fault(error))
            self.next_look = time.monotonic() + GATEWAY_ANSWER_SECONDS


class RemoteKernels(StudentKernels):
    """A manager of kernels, of which some, or all, run on the gateway."""

    tabs: set[Any]  # of those
    is_away = False
    look: "asyncio.Task[None] | None" = None

    def is_remote(self, kernel_id: str) -> bool:
        return hasattr(self._kernels.get(kernel_id), "kernel_url")

    async def start_kernel(self, **options: Any) -> str:
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_server.gateway.managers import GatewayKernelManager as Kernel

        name = options.get("kernel_name") or self.default_kernel_name
        if not self.kernel_spec_manager.is_remote(name):
            return await super().start_kernel(**options)

        account = pwd.getpwuid(os.getuid())
        directory = self.cwd_for_path(options.get("path") or self.start_path)
        is_safe = SAFE_DIRECTORY.fullmatch(directory)
        identity = {
            "KERNEL_USERNAME": account.pw_name,
            "KERNEL_UID": str(account.pw_uid),
            "KERNEL_GID": str(account.pw_gid),
            "KERNEL_WORKING_DIR": directory if is_safe else account.pw_dir,
        }

        kernel: Any = Kernel(parent=self, log=self.log)  # type: ignore[no-untyped-call]
        try:  # without `kernel_id`, which could be somebody else's
            await kernel.start_kernel(kernel_name=name, env=identity)
        except Exception as error:
            text = f"The kernel {name} cannot be started: {gateway_fault(error)}."
            raise with_upstream(PlainError)(503, text) from None

        kernel_id = str(kernel.kernel_id)
        kernel.ready.set_result(None)
        spec = self.kernel_spec_manager.remote.get(name) or KernelSpec()
        kernel.kernel_name, kernel._kernel_spec = name, spec
        self._kernels[kernel_id], self._kernel_connections[kernel_id] = kernel, 0
        self.initialize_culler()
        if not self.look:
            self.look = asyncio.create_task(self.watch_gateway())
        return kernel_id

    async def shutdown_kernel(self, kernel_id: str, **options: Any) -> None:
        if self.is_remote(kernel_id):
            await self.get_kernel(kernel_id).shutdown_kernel()
            self.remove_kernel(kernel_id)
        else:
            await super().shutdown_kernel(kernel_id, **options)

    async def restart_kernel(self, kernel_id: str, **options: Any) -> None:
        if self.is_remote(kernel_id):
            await self.get_kernel(kernel_id).restart_kernel()
        else:
            await super().restart_kernel(kernel_id, **options)

    async def shutdown_all(self, now: bool = False) -> None:
        """End all kernels with this server, which waits for no gateway."""
        remote = [*filter(self.is_remote, self.list_kernel_ids())]
        ends = asyncio.gather(*map(self.shutdown_kernel, remote), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ends, GATEWAY_PATIENCE_SECONDS)
        for kernel_id in remote:
            self.remove_kernel(kernel_id)
        await super().shutdown_all(now=now)

    def tabs_of(self, kernel_id: str) -> list[Any]:
        far = [tab for tab in self.tabs if tab.kernel_id == kernel_id]
        return far or super().tabs_of(kernel_id)

    async def watch_gateway(self) -> NoReturn:
        """Look at this student's kernels there, and tell tabs when it does not answer."""
        while True:
            await asyncio.sleep(GATEWAY_SECONDS)
            was_away, fault = self.is_away, ""
            try:
                for kernel_id in filter(self.is_remote, self.list_kernel_ids()):
                    await self.look_at(kernel_id)
            except Exception as error:
                fault = gateway_fault(error)

            self.is_away = fault != ""
            if was_away != self.is_away:
                self.log.warning("the gateway: %s", fault or "it answers again")
                for tab in self.tabs:  # one may be closing, or have sent a wrong header
                    with contextlib.suppress(Exception):
                        tab.show(CLUSTER_AWAY if self.is_away else CLUSTER_BACK)

    async def look_at(self, kernel_id: str) -> None:
        """Take what the gateway says of a kernel, also that it is no more."""
        kernel, known = self.get_kernel(kernel_id), self.kernel_model(kernel_id)
        try:
            await kernel.refresh_model(await ask_gateway(kernel.kernel_url))
        except Exception as error:
            answer = getattr(error, "response", None)
            # A proxy says 404 while the gateway is restarted.
            if not answer or b"Kernel does not exist" not in answer.body:
                raise
            tabs = self.tabs_of(kernel_id)
            if self.remove_kernel(kernel_id):
                self.tell_end(known, "is not on the cluster any more", tabs)


class RemoteTab(Upstream):  # type: ignore[misc]
    """A tab's connection to a kernel on the gateway, made again whenever it is lost.

    What comes is passed on only as fast as the tab reads it. Jupyter's own gives up after a
    minute, takes no message of 10 MB, and none of bytes.
    """

    upstream = (
        "jupyter_server.services.kernels.connection.base.BaseKernelWebsocketConnection"
    )
    gateway: Any = None
    task: "asyncio.Task[None] | None" = None
    is_closed = False

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.kernel_ws_protocol = ""  # that of gateways
        self.cell: dict[str, Any] = {}  # the header of the last request to run one
        self.unsent: list[str | bytes] = []  # while it is away

    async def connect(self) -> None:
        self.multi_kernel_manager.tabs.add(self)
        self.multi_kernel_manager.notify_connect(self.kernel_id)
        self.task = asyncio.create_task(self.keep_connected())

    def disconnect(self) -> None:
        """Leave the gateway, once it has what the tab has sent."""
        self.is_closed = True
        if self.task:
            self.multi_kernel_manager.tabs.discard(self)
            self.multi_kernel_manager.notify_disconnect(self.kernel_id)
        if self.gateway:
            self.gateway.close()

    async def keep_connected(self) -> None:
        from jupyter_server.gateway.gateway_client import GatewayClient
        from tornado import httpclient, websocket

        client: Any = GatewayClient.instance()
        session = urllib.parse.quote(self.session_id, safe="")
        url = f"{self.kernel_manager.kernel_url}/channels?session_id={session}"

        while not self.is_closed:
            arguments = client.load_connection_args()
            request = httpclient.HTTPRequest(f"ws{url.removeprefix('http')}", **arguments)
            try:
                self.gateway = await websocket.websocket_connect(
                    request, max_message_size=GATEWAY_BYTES
                )
                for option in KEEPALIVE:  # the host there may be gone
                    self.gateway.protocol.stream.socket.setsockopt(*option)
                await self.pass_on(self.gateway)
            except Exception as error:  # it is away, or the tab is
                self.log.debug("kernel %s: %s", self.kernel_id, explain(error))
            finally:
                if self.gateway:
                    self.gateway.close()
                self.gateway = None
            await asyncio.sleep(1)

    async def pass_on(self, gateway: Any) -> None:
        unsent, self.unsent = self.unsent, []
        for message in unsent:
            await gateway.write_message(message, isinstance(message, bytes))
        while not self.is_closed and (message := await gateway.read_message()) is not None:
            await self.websocket_handler.write_message(message, isinstance(message, bytes))

    def handle_incoming_message(self, message: str | bytes) -> None:
        if isinstance(message, str) and '"execute_request"' in message:
            self.cell = json.loads(message)["header"]
            if self.multi_kernel_manager.is_away:
                self.show(CLUSTER_AWAY)
        if self.gateway:
            self.gateway.write_message(message, isinstance(message, bytes))
        elif sum(map(len, self.unsent)) < PIECE_BYTES * 16:
            self.unsent.append(message)

    def show(self, text: str) -> None:
        """Show text below the cell that was run last."""
        content = {"name": "stderr", "text": text}
        message = self.session.msg("stream", content, parent=self.cell)
        if self.websocket_handler.ws_connection:
            text = json.dumps({**message, "channel": "iopub"}, default=str)
            self.websocket_handler.write_message(text)


# == Launch 3: the notebook server of a student ============================================
#
# All of this runs in a fork of the template process, which becomes the student before it
# reads anything of theirs. The fork holds the certificate's key. The student cannot trace
# it or read its memory, since it changed its ids without an exec; so no code of the
# student's may ever run in it: no configuration, no extension, no template.

SERVER_LOG = ".notebooks.log"  # in the student's home
IDLE_CONNECTION_SECONDS = 60.0  # of a notebook server; WebSockets do not count
STRANGER_BYTES = 1 << 14  # of a request's body, from somebody who has not logged in
STRANGER_SECONDS = 20.0  # in which it must have come
MAX_STRANGERS = 100  # connections of those who have not logged in
SESSION_DAYS = 30  # until a browser forgets a log-in, as Tornado has it
NEVER_SECONDS = 100 * 365 * 24 * 3600
OOM_SCORE = "300"  # in their disfavour when memory runs out: proc(5), oom_score_adj

# What the menu *Save and export as* offers.
EXPORTS = (
    *("asciidoc", "html", "latex", "markdown", "notebook", "pdf", "python", "rst"),
    *("script", "slides", "webpdf"),
)
EXPORT_SECONDS = 120.0

# It asks whether to fetch news, of which `news_url` leaves none.
NEWS_PLUGIN = "@jupyterlab/apputils-extension:announcements"

# A terminal that nobody gave a directory is in the home, where the server is.
TERMINAL_SHELL = "/bin/sh", "-c", '[ . -ef "$HOME" ] && cd "$0" 2>/dev/null; exec "$@"'


class OldHome:
    """All that keeps a path in the template's HOME in memory: each fork gets its own HOME.

    Many a package works out such a path when it is imported, and keeps it in a variable of
    a module, an attribute of a class, the default of a parameter or of a trait.
    """

    def __init__(self, home: str) -> None:
        from traitlets import TraitType

        self.home = home
        self.places: list[tuple[Any, str]] = []
        kinds = (types.ModuleType, type, types.FunctionType, TraitType)
        for owner in gc.get_objects():
            if not issubclass(type(owner), kinds):  # isinstance would wake lazy objects
                continue
            kept = dict(vars(owner))
            if type(owner) is types.FunctionType:
                kept |= {"__defaults__": owner.__defaults__}
                kept |= {"__kwdefaults__": owner.__kwdefaults__}
            for name, value in kept.items():
                if self.moved(value, "") != value:
                    self.places.append((owner, name))

    def move(self, home: str) -> None:
        """Have everybody keep a path in another home instead."""
        for owner, name in self.places:
            value = getattr(owner, name)
            moved = self.moved(value, home)
            if isinstance(value, list):  # others may have it, too
                value[:] = moved
            elif isinstance(value, dict):
                value.update(moved)
            else:
                setattr(owner, name, moved)

    def moved(self, value: Any, home: str, depth: int = 3) -> Any:
        """Return a value with the paths that are in it in another home."""
        kind = type(value)
        if kind is str:
            return value.replace(self.home, home)
        if kind is bytes:
            return value.replace(os.fsencode(self.home), os.fsencode(home))
        if issubclass(kind, PurePath):
            return kind(str(value).replace(self.home, home))
        if kind in (list, tuple) and depth:
            return kind(self.moved(each, home, depth - 1) for each in value)
        if kind is dict and depth:
            return {key: self.moved(each, home, depth - 1) for key, each in value.items()}
        return value


def hash_password(password: str) -> str:
    """Return a salted hash as jupyter_server.auth.security checks it."""
    # One round is enough for 70 random bits that never touch a disk.
    salt = secrets.token_hex(8)
    digest = hashlib.sha256(password.encode() + salt.encode()).hexdigest()
    return f"sha256:{salt}:{digest}"


def make_cookie_secret(username: str, password: str) -> str:
    """Return what signs a server's cookies, in hex: the same as long as the password is.

    So an open tab goes on with a server that was started again, and a new password ends
    all sessions. Only who knows the password can work it out.
    """
    return hmac.digest(password.encode(), f"cookies of {username}".encode(), "sha256").hex()


def server_settings(order: ServerOrder, account: pwd.struct_passwd) -> Any:
    """Return the traitlets configuration of a student's server."""
    from traitlets.config import Config as Settings

    home = Path(account.pw_dir)
    config_dir = home / ".jupyter"
    # A student may have removed either, and before `send` one may not be there.
    root_dir = home / order.root_dir if os.path.isdir(home / order.root_dir) else home
    start_dir = home / order.start_dir
    start_path = os.path.relpath(start_dir, root_dir)

    kernels, specs = kernel_managers(order.gateway)
    start_url = f"/{order.start_page}"
    exists = os.path.isdir(start_dir) and start_path != "."
    if exists:
        start_url = (
            f"{start_url.removesuffix('/tree')}/tree/{urllib.parse.quote(start_path)}"
        )

    # JupyterLab's scripts read it, hence the name, and that it is not HttpOnly.
    xsrf = {"path": f"/{order.username}/", "secure": True, "samesite": "Lax"}

    # These would follow JUPYTER_CONFIG_DIR, which is root's while the server starts.
    lab = {
        "user_settings_dir": str(config_dir / "lab/user-settings"),
        "workspaces_dir": str(config_dir / "lab/workspaces"),
    }

    return Settings(
        ServerApp={
            "base_url": f"/{order.username}/",
            "port": order.port,
            "custom_display_url": order.url,
            "certfile": order.certificate.path,  # for the address; it is served already
            "default_url": start_url,
            "root_dir": str(root_dir),
            # Not that of ContentsManager, which would run another event loop to check it.
            "preferred_dir": str(start_dir if exists else root_dir),
            "open_browser": False,
            "allow_remote_access": True,
            "cookie_secret": bytes.fromhex(order.cookie_secret),
            "tornado_settings": {
                "xsrf_cookie_kwargs": xsrf,
                "headers": dict([] if order.certificate.names else [HSTS]),
            },
            "identity_provider_class": with_upstream(StudentIdentity, xsrf=xsrf),
            "terminado_settings": {
                "shell_command": [*TERMINAL_SHELL, str(start_dir), account.pw_shell, "-l"]
            },
            "kernel_manager_class": with_upstream(
                kernels,
                order=order,
                start_path=start_path,
                transports={},
                notebooks={},
                tabs=set(),
            ),
            "kernel_spec_manager_class": with_upstream(specs, order=order, remote={}),
            "kernel_websocket_connection_class": with_upstream(StudentTab),
            "shutdown_no_activity_timeout": order.idle_seconds,
        },
        IdentityProvider={
            "token": "",
            "cookie_name": f"__Secure-notebooks-{order.port}",
            "cookie_options": {"samesite": "Lax"},
            "logout_handler_class": with_upstream(LogoutHandler),
        },
        PasswordIdentityProvider={
            "hashed_password": order.password,
            "password_required": True,
            "allow_password_change": False,
        },
        # Over TCP any local user can connect to a kernel's IOPub port and read it.
        KernelManager={"transport": "ipc"},
        MappingKernelManager={
            # The look at idle kernels is also that at busy ones.
            "cull_idle_timeout": order.idle_kernel_seconds
            or (order.busy_minutes and NEVER_SECONDS),
            "cull_interval": CULL_SECONDS,
            "cull_connected": True,
        },
        TerminalsExtensionApp={
            "terminal_manager_class": with_upstream(StudentTerminals, order=order)
        },
        TerminalManager={
            "cull_inactive_timeout": order.idle_seconds,
            "cull_interval": CULL_SECONDS,
        },
        # Which notebooks are trusted is only remembered while the server runs: SQLite would
        # run what a database in the home says, and to find the directory nbformat executes
        # the configuration there.
        NotebookNotary={
            "data_dir": "",
            "db_file": ":memory:",
            "secret": secrets.token_bytes(64),
        },
        # For the same reason: jupyter-collaboration's.
        BaseFileIdManager={"db_path": ":memory:"},
        SQLiteYStore={"db_path": ":memory:"},
        # Where jupyter_lsp looks for node_modules; else it would ask npm at each start.
        LanguageServerManager={
            "node_roots": [start_dir, f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib"]
        },
        TemplateExporter={"extra_template_basedirs": []},  # not the current directory
        LabApp={**lab, "extension_manager": "readonly", "news_url": None},
        JupyterNotebookApp=lab,
        LabServerApp=lab,
        # What jupyter-resource-usage shows, which calls it with what is used.
        ResourceUseDisplay={"mem_limit": lambda **used: memory_limit()}
        if order.has_slice
        else {},
    )


def memory_limit() -> int:
    """Return how many bytes the student of this process may use, or the host has."""
    usage = read_usage(os.getuid())
    return (usage and usage.memory_limit) or psutil.virtual_memory().total


class StudentIdentity(Upstream):  # type: ignore[misc]
    """The password of a notebook; each session has its token against forged requests.

    Cookies know no port: any page of this host can set some, also one of another student's
    port. So the token that counts is not the one that a browser sends, but the session's.
    No page of plain http can set a cookie whose name begins with `__Secure-` (RFC 6265bis,
    4.1.3.1). `__Host-` would want the path `/`: what others show on their ports, through
    jupyter-server-proxy, would then get the cookie.
    """

    upstream = "jupyter_server.auth.identity.PasswordIdentityProvider"
    xsrf: dict[str, Any]  # attributes of the token's cookie

    async def get_user(self, handler: Any) -> Any:
        user = await super().get_user(handler)
        if user:
            self.set_token(handler, user)
        return user

    def set_login_cookie(self, handler: Any, user: Any) -> None:
        super().set_login_cookie(handler, user)
        self.set_token(handler, user)

    def clear_login_cookie(self, handler: Any) -> None:
        # Theirs has no `secure`, without which browsers let nobody touch a `__Secure-` one.
        name = self.get_cookie_name(handler)
        handler.clear_cookie(name, path=self.xsrf["path"], secure=True)

    def set_token(self, handler: Any, user: Any) -> None:
        """Have the request and the browser know the token of a session, and no other."""
        # Each log-in makes a user name up. Tornado reads hexadecimal digits as a token.
        secret = handler.settings["cookie_secret"]
        token = hmac.digest(secret, f"token of {user.username}".encode(), "sha256").hex()
        if handler.get_cookie("_xsrf") != token:
            handler.request.cookies["_xsrf"] = token
            handler.set_cookie("_xsrf", token, expires_days=SESSION_DAYS, **self.xsrf)

        # Two courses of one student share this cookie, and a page on another port may put
        # one before it: a tab sends what it finds. Its script alone can send this header.
        headers = handler.request.headers
        if headers.get("Sec-Fetch-Site") == "same-origin" and "X-XSRFToken" in headers:
            headers["X-XSRFToken"] = token


class LogoutHandler(Upstream):  # type: ignore[misc]
    """Logs out for pages of this notebook, such as JupyterLab's menu; asks all others."""

    upstream = "jupyter_server.auth.logout.LogoutHandler"

    def get(self) -> None:
        # No script can write these: Fetch Metadata Request Headers, W3C. A picture in a
        # notebook, which somebody else may have written, is no document.
        headers = self.request.headers
        kind = headers.get("Sec-Fetch-Site"), headers.get("Sec-Fetch-Dest")
        if kind == ("same-origin", "document") or not self.current_user:
            super().get()
        else:
            message = {"question": self.current_user.username}
            self.write(self.render_template("logout.html", message=message))

    def post(self) -> None:
        super().get()


def export_handlers(base_url: str) -> list[tuple[str, type]]:
    """Return handlers that run nbconvert, for *Save and export as*, as the student."""
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
            # The address alone must not do: another site could link to it.
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
    """Convert a notebook; return name and content of the result, or raise Error."""
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
        except TimeoutError:
            process.kill()
            raise Error(f"it took more than {EXPORT_SECONDS:.0f} seconds") from None

        names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
        if process.returncode or not names:
            lines = words.decode(errors="replace").strip().splitlines() or ["no output"]
            raise Error(lines[-1])

        if len(names) == 1:
            return names[0], Path(output_dir, names[0]).read_bytes()
        # Pictures lie beside the text that shows them.
        zipped = await asyncio.to_thread(shutil.make_archive, output_dir, "zip", output_dir)
        return f"{Path(source).stem}.zip", Path(zipped).read_bytes()


def leave_session_keyring() -> None:
    """Join a new session keyring: the launcher's may hold the teacher's keys."""
    number = keyctl_number()
    if number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None, 0, 0, 0) < 0
    if failed and ctypes.get_errno() != errno.ENOSYS:  # a kernel without keys
        raise OSError(ctypes.get_errno(), "keyctl: cannot join a session keyring")


def become_server(
    old_home: OldHome,
    said_before: str,
    without: Collection[str],
    order: ServerOrder,
    fds: Sequence[int],
) -> None:
    """Become the student for good, and serve until SIGTERM. Step 6 of a start."""
    listener_fd, output_fd = fds
    with closing(output_fd), closing(os.open(os.devnull, os.O_RDONLY)) as null_fd:
        for fd, standard in ((null_fd, 0), (output_fd, 1), (output_fd, 2)):
            os.dup2(fd, standard)

    # Nothing of the student's is read before the ids are dropped, and nothing can be done
    # with root's afterwards.
    account = pwd.getpwnam(order.username)
    control = bind_control_socket(order.port)
    if order.has_slice:
        enter_scope(account)  # at once: memory is counted where it was first touched
    else:
        resource.setrlimit(resource.RLIMIT_NPROC, (order.processes, order.processes))
    with contextlib.suppress(OSError):  # in a container it may be higher already
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    setproctitle.setproctitle(f"{SERVER_TITLE}{order.username} in {order.course}")
    # Neither the launcher's terminal nor its Ctrl-C are for this process.
    os.setsid()
    drop_privileges(identity_of(account))
    leave_session_keyring()

    os.environ.clear()
    os.environ.update(server_environment(account, order.environment, order.own_packages))
    time.tzset()
    os.umask(login_umask(account))
    os.chdir("/")
    old_home.move(account.pw_dir)
    said = StartOutput(said_before)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        app = make_app(order, account, without)
    os.chdir(account.pw_dir)  # not the start directory, which the student may replace
    serve(app, order.certificate, [socket.socket(fileno=listener_fd), control], said)


def make_app(
    order: ServerOrder, account: pwd.struct_passwd, without: Collection[str] = ()
) -> Any:
    """Return the application; nothing in the home was executed. Step 7 of a start."""
    from jupyter_server.serverapp import ServerApp
    from markupsafe import Markup

    # Root's while Jupyter looks for Python to execute. Terminals and kernels must not
    # inherit it.
    os.environ["JUPYTER_CONFIG_DIR"] = str(CONFIG_DIR)
    settings = server_settings(order, account)
    settings.ServerApp.jpserver_extensions = dict.fromkeys(without, False)
    app: Any = ServerApp(config=settings)
    # The templates of nbconvert are Python in disguise, and are looked up in the home: they
    # would run in this process, which holds the host's key.
    app.default_services = [x for x in app.default_services if x != "nbconvert"]
    app.no_browser_open_file = True
    app.initialize(argv=[], new_httpserver=False)

    if order.gateway.url:
        use_gateway(app, order.gateway)
    # Jupyter forgets to say so, and takes a server for idle that has terminals alone.
    for each in app.extension_manager.extension_apps.get("jupyter_server_terminals", ()):
        each.terminals_available = hasattr(each, "terminal_manager")
    config_dir = Path(account.pw_dir, ".jupyter", app.config_manager.config_dir_name)
    app.config_manager.write_config_dir = str(config_dir)
    app.config_manager.read_config_path = [
        str(config_dir),
        *app.config_manager.read_config_path,
    ]
    sockets = with_upstream(SocketHandler, come=collections.deque([], MAX_TRIED))
    handlers = [*export_handlers(app.base_url), (f"{app.base_url}{SOCKET_PATH}", sockets)]
    app.web_app.add_handlers(".*$", handlers)

    # Those of Jupyter know neither student nor course.
    add_pages(
        app.web_app.settings["jinja2_env"],
        order.language,
        order=order,
        title=order.title,
        username=order.username,
        any_host=Markup("data-any-host" if order.any_host else ""),
        socket=f"{app.base_url}{SOCKET_PATH}",
        trust=f"{order.page_url}{TRUST_PATH}" if order.certificate.authority else "",
        ports=order.ports,
    )
    app.web_app.settings["page_config_hook"] = without_news

    del os.environ["JUPYTER_CONFIG_DIR"]
    return app


def without_news(_: object, page_config: dict[str, Any]) -> dict[str, Any]:
    """Return what JupyterLab's pages are told, without the plugin that asks for news."""
    disabled = [*page_config.get("disabledExtensions", []), NEWS_PLUGIN]
    return {**page_config, "disabledExtensions": disabled}


class StartOutput(io.StringIO):
    """What is said at a start: the launcher hears it, and the log begins with it."""

    is_over = False

    def __init__(self, before: str) -> None:
        super().__init__()
        super().write(before)

    def write(self, text: str) -> int:
        os.write(2, text.encode(errors="replace"))
        return len(text) if self.is_over else super().write(text)


def serve(
    app: Any,
    certificate: Certificate,
    listeners: Sequence[socket.socket],
    said: StartOutput,
) -> None:
    """Run the application on its listening socket, until SIGTERM or for long idle.

    Step 8 of a start. `app.start` prints the address, for which `watch_start` waits in the
    launcher, and then runs the event loop, whose first callback leaves the pipe. The
    whole protocol of a start rests on this order: what is printed before goes to the
    launcher, as the reason if the start fails, and all of it to the log in the end.
    """
    server = with_upstream(NotebookHTTPServer, secret=app.cookie_secret)(
        app.web_app,
        ssl_options=certificate.context(),
        max_body_size=app.max_body_size,
        max_buffer_size=app.max_buffer_size,
        idle_connection_timeout=IDLE_CONNECTION_SECONDS,
    )
    server.strangers = Strangers(MAX_STRANGERS)

    listener, control = listeners
    listener.setblocking(False)
    server.add_sockets([listener])
    app.io_loop.add_callback(take_certificates, server, control)
    app.io_loop.add_callback(move_output_to_log, said)
    app.start()


class NotebookHTTPServer(Upstream):  # type: ignore[misc]
    """Takes short requests alone of those who have not logged in, and not for long."""

    upstream = "tornado.httpserver.HTTPServer"
    secret: bytes  # which signs the cookie of a session
    strangers: Strangers

    def handle_stream(self, stream: Any, address: tuple[Any, ...]) -> None:
        self.strangers.admit(stream.socket, address[0])
        super().handle_stream(stream, address)

    def _handle_connection(self, connection: socket.socket, address: Any) -> None:
        with contextlib.suppress(ConnectionResetError):  # else a traceback in the log
            super()._handle_connection(connection, address)

    def start_request(self, server_conn: Any, request_conn: Any) -> Any:
        delegate = super().start_request(server_conn, request_conn)
        received = delegate.headers_received

        def headers_received(start_line: Any, headers: Any) -> Any:
            if self.has_session(headers.get("Cookie", "")):
                self.strangers.forget(server_conn.stream.socket)
            else:
                request_conn.set_max_body_size(STRANGER_BYTES)
                request_conn.set_body_timeout(STRANGER_SECONDS)
            return received(start_line, headers)

        delegate.headers_received = headers_received
        return delegate

    def has_session(self, cookies: str) -> bool:
        """Say whether any of these cookies is one of ours, in a header of a request."""
        from tornado import httputil, web

        return any(
            web.decode_signed_value(self.secret, name, value)
            for name, value in httputil.parse_cookie(cookies).items()
        )


async def take_certificates(server: Any, control: socket.socket) -> NoReturn:
    """Serve new connections with each certificate that the launcher sends."""
    while True:
        await wait_readable(control.fileno())
        with contextlib.suppress(OSError, EOFError, ValueError):  # it was killed
            connection, _ = control.accept()
            with Channel(fileno=connection.detach()) as channel:
                await wait_readable(channel.fileno(), ANSWER_SECONDS)
                message, _ = channel.receive_message()
                if isinstance(message, Certificate):
                    server.ssl_options = message.context()


def move_output_to_log(said: StartOutput) -> None:
    """Leave the launcher's pipe for a log in the home. Runs as: the student."""
    # Nothing is flushed: the launcher may have closed the pipe already (EPIPE).
    log_fd = null_fd = os.open(os.devnull, os.O_RDWR)
    # A FIFO or a link in its place neither blocks nor leads away.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        fd = os.open(Path.home() / SERVER_LOG, flags, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.truncate(fd, 0)
            os.write(fd, said.getvalue().encode(errors="replace"))
            log_fd = fd
    said.is_over = True

    for fd, target in ((null_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(fd, target)


# == Launch 4: templates ===================================================================
#
# A template is a process that has imported, once, what its forks need. `Template` is the
# launcher's side: it asks for forks and hears of their ends. `run_template` is the process:
# all that is special to servers in it is what it imports and the function that its forks
# become, so that others can use it, too.
#
# The order for a fork goes through a channel of its own. So the template never knows a
# student's secrets, and no other student's server can have them in its memory.

START_SECONDS = 60.0  # for a fork to answer, and again for a server to name its address
ANSWER_SECONDS = 5.0  # in which the launcher must have said what it has to say
STOP_SECONDS = 1.5  # in which a helper must have ended
EXIT_REPORT_SECONDS = 1.0  # in which a template has reported an end that we see
TRIAL_SECONDS = 60  # in which all extensions must have started

# Extensions that may start again in a process that has rehearsed their start.
REHEARSED = ("jupyter_server_terminals", "jupyterlab", "notebook", "notebook_shim")

# What a running server would import by and by; the last brings most of it. Importing them
# before `rehearse_start` allocates anything keeps 1 MB more shared. tests/test_server.py
# fails if one is missing.
SERVER_MODULES = (
    *("anyio._backends._asyncio", "babel.dates", "ipykernel.kernelspec"),
    *("jeepney.io.blocking", "jupyter_core.migrate", "notebook.app"),
    "tornado.simple_httpclient",
)


class Trial(Message):
    """Which extensions there are, what they import, and what went wrong with them."""

    extensions: list[str]
    useless: list[str]  # of these
    modules: list[str]
    failures: list[str]


class Ready(Message):
    """A helper can do its work from now on."""


class ForkRequest(Message):
    """Fork; the fork takes its order from the channel that comes with this."""


class Forked(Message):
    """A fork has taken its order; comes with a pidfd of it."""

    pid: int


class Exited(Message):
    """A fork has ended; the code is its exit status, or the negative of a signal."""

    pid: int
    code: int


@dataclasses.dataclass(kw_only=True)
class Helper:
    """Keeps a process of the launcher's running: this script, executed afresh."""

    role: str
    course: Path  # its configuration file, for those who look at `ps`
    proven: bool = False  # it has been ready once: if it ends it is started again
    child: Child | None = None
    # Set as long as a process can do its work.
    ready: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def greet(self) -> None:
        """Tell the process what it has to know, at its start or when that changes."""

    def handle(self, message: Message) -> None:
        """Take what the process says."""

    async def run(self) -> None:
        """Keep the process running; raises Error or OSError if it never was ready."""
        delay = 0.0
        while True:
            started = time.monotonic()
            reason, detail = "ended", ""
            try:
                detail = await self.run_once()
            except OSError as error:  # too little memory, or too many processes
                if not self.proven:
                    raise
                reason = f"could not be started: {explain(error)}"

            if not self.proven:
                raise Error(f"the {self.role} cannot start; what it said is above")
            delay = restart_delay(delay, started)
            log.error(
                "the %s %s; starting it again in %.0f s%s",
                *(self.role, reason, delay, detail),
            )
            await asyncio.sleep(delay)

    async def run_once(self) -> str:
        """Start the process and hear it out; return what is to be said of its end."""
        self.child = child = Child.execute(self.role, TEMPLATE_HOME, self.course)

        nonsense = ""
        try:
            self.greet()
            async for message in child.channel.messages():
                if isinstance(message, Ready):
                    self.proven = True
                    self.ready.set()
                self.handle(message)
        except ValueError as error:
            nonsense = f" ({error})"
        finally:
            self.ready.clear()
            self.child = None
            code = child.stop(STOP_SECONDS)
            clear_rehearsal_homes()

        return nonsense or (f" (it {explain_exit(code)})" if code else "")

    def tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message; a helper that cannot take it at once hangs, and is ended."""
        if self.child is None:  # it is about to be started again
            return
        try:
            self.child.channel.send_message(message, fds, wait=False)
        except OSError as error:
            log.error("the %s does not listen: %s", self.role, explain(error))
            self.child.send_signal(signal.SIGKILL)  # run_once sees its end


class Fork(Process):
    """A process that a template has forked, and may yet report the exit code of."""

    report: "asyncio.Future[int] | None" = None

    async def wait(self) -> int | None:
        """Wait for the end; return the exit code, or None if it is not reported."""
        await wait_readable(self.pid_fd)
        if self.report is None:
            return None
        # The report is on its way: the process is not reaped without it.
        await asyncio.wait([self.report], timeout=EXIT_REPORT_SECONDS)
        return self.report.result() if self.report.done() else None


def end_unwanted_fork(channel: Channel) -> None:
    """End a fork that has taken its order while nobody waited any more; no other can."""
    channel.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(EOFError, ValueError):
        answer, received = channel.receive_message()
        if isinstance(answer, Forked):
            with contextlib.closing(Fork(answer.pid, *received)) as fork:
                fork.send_signal(signal.SIGKILL)


@dataclasses.dataclass(kw_only=True)
class Template(Helper):
    """The launcher's side of a template process: asks for forks, hears of their ends."""

    reports: "dict[int, asyncio.Future[int]]" = dataclasses.field(default_factory=dict)

    async def fork(self, order: Message, fds: Sequence[int]) -> Fork:
        """Have a fork take an order; raises Error or OSError. Step 4 of a start."""
        ours, theirs = Channel.pair()
        with ours:
            with theirs:
                self.tell(ForkRequest(), [theirs.fileno()])
            try:
                ours.send_message(order, fds)  # it waits in the channel for the fork
                await wait_readable(ours.fileno(), START_SECONDS)
                answer, received = ours.receive_message()
            except (EOFError, ConnectionError):
                raise Error("the template process ended before it started it") from None
            except TimeoutError:
                raise Error("the template process does not answer") from None
            finally:
                end_unwanted_fork(ours)

        match answer:
            case Forked(pid):
                (pid_fd,) = received
                fork = Fork(pid, pid_fd)
                fork.report = self.reports[pid] = asyncio.Future()
                return fork
            case Failed(reason):
                raise Error(reason)
        raise Error(f"the template process answered {type(answer).__name__}")

    def handle(self, message: Message) -> None:
        if isinstance(message, Ready):
            self.reports.clear()  # nobody will report the forks of an earlier process
        elif isinstance(message, Exited) and message.pid in self.reports:
            self.reports.pop(message.pid).set_result(message.code)


def run_template(channel: Channel, preload: Callable[[], Callable[..., None]]) -> None:
    """Fork a process for each request; report the exit code of each fork that ends.

    preload: imports what forks need, and returns what a fork does with an order and its
    descriptors. Runs as: root, one thread, no event loop. Ends when the launcher is gone.
    """
    setproctitle.setproctitle(TEMPLATE_TITLE)
    # SIGCHLD wakes the poll below: `set_wakeup_fd` writes a byte for each signal.
    wakeup_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    become = preload()
    with contextlib.suppress(OSError):  # the launcher is gone: seen below
        channel.send_message(Ready())

    while True:
        ready, _, _ = select.select([channel.fileno(), wakeup_fd], [], [])

        if wakeup_fd in ready:  # before a pid can be given out again
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup_fd, 4096)
            report_exits(channel)

        if channel.fileno() in ready:
            try:
                _, (fd,) = channel.receive_message()
            except EOFError:
                return
            fork_on_request(fd, become)


def report_exits(channel: Channel) -> None:
    """Reap the forks that have ended, and report them."""
    with contextlib.suppress(ChildProcessError):  # there is none any more
        for pid, wait_status in iter(lambda: os.waitpid(-1, os.WNOHANG), (0, 0)):
            code = os.waitstatus_to_exitcode(wait_status)
            with contextlib.suppress(OSError):  # the launcher is gone
                channel.send_message(Exited(pid, code))


def fork_on_request(fd: int, become: Callable[..., None]) -> None:
    """Fork a process that takes its order from a channel: step 5 of a start."""
    with Channel(fileno=fd) as channel:
        try:
            fork_process(lambda: take_order(channel, become), {fd})
        except OSError as error:
            with contextlib.suppress(OSError):
                channel.send_message(Failed(f"cannot fork: {error.strerror}"))
                # Closing before the order is read would reset the socket and lose this
                # answer. recv(1) drops the record without keeping its secrets.
                channel.recv(1)


def take_order(channel: Channel, become: Callable[..., None]) -> None:
    """Receive an order, and become what it says. Runs as: root, in the fork."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with channel:
        try:
            order, fds = channel.receive_message()
            with contextlib.closing(Process(os.getpid())) as myself:
                channel.send_message(Forked(os.getpid()), [myself.pid_fd])
        except (EOFError, ConnectionError):  # the launcher does not want it any more
            return
    become(order, fds)


def preload_server() -> Callable[..., None]:
    """Import what servers need, so that forks share it; return what a fork does."""
    home = ensure_rehearsal_home()
    os.environ["HOME"] = str(home)  # become_server sets the whole environment again
    search_installation_only()
    said = io.StringIO()  # by packages, for the students' logs: it is not the teacher's
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for module in SERVER_MODULES:
            importlib.import_module(module)
        # The first context makes OpenSSL load its tables: 2 MB that are then shared.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

        # An extension may start but once in a process: in each fork, not in the template.
        trial = try_extensions(home)
        for failure in trial.failures:
            log.warning("an extension fails, for all students: %s", failure)
        for module in trial.modules:
            with contextlib.suppress(Exception):  # as in the trial
                importlib.import_module(module)
        logging.disable(logging.CRITICAL)  # till the end of the rehearsal
        rehearse_start(home, without=trial.extensions)

    become = functools.partial(
        become_server, OldHome(str(home)), said.getvalue(), trial.useless
    )
    shutil.rmtree(home)
    release_memory()
    gc.freeze()  # a collection writes into each object, and unshares its page
    return become


def try_extensions(home: Path) -> Trial:
    """Have a fork start all extensions; return what it tells."""
    child = Child.fork(lambda channel: report_trial(channel, home))
    with contextlib.suppress(EOFError):
        trial, _ = child.channel.receive_message()
        child.reap()
        assert isinstance(trial, Trial)
        return trial
    raise SystemExit(
        "notebooks.py: with an extension, servers do not start"
        f" ({explain_exit(child.reap())}): `jupyter server extension list` names them all"
    )


def report_trial(channel: Channel, home: Path) -> None:
    """Start all extensions, and tell the template what that has shown."""
    setproctitle.setproctitle("notebooks.py: extensions")  # no server, for `is_starting`
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TRIAL_SECONDS)
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null_fd, fd)
    failures = []

    def note_failure(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            name = record.getMessage().partition(" | ")[0]
            *_, line = traceback.format_exception_only(record.exc_info[1])
            failures.append(f"{name}: {line.strip()}")
        return True

    logging.getLogger("ServerApp").addFilter(note_failure)
    known = {*sys.modules}
    app = rehearse_start(home)
    extensions = [name for name in app.jpserver_extensions if name not in REHEARSED]
    modules = [name for name in sys.modules if name not in known]

    # Where there are no language servers, each start would look for them in vain.
    manager = getattr(app, "language_server_manager", None)
    if manager:
        manager.initialize()
    useless = ["jupyter_lsp"] if manager and not manager.language_servers else []
    channel.send_message(Trial(extensions, useless, modules, failures))


def search_installation_only() -> None:
    """Have Jupyter find kernels in the home, and nothing else.

    Templates are Python in disguise: they would run in the server. Pages and scripts of
    extensions are shown to anybody, without a log-in.
    """
    from jupyter_core import paths

    find = paths.jupyter_path

    def jupyter_path(*names: str) -> list[str]:
        found = find(*names)
        if names[:1] == ("kernels",):
            return found
        return [path for path in found if not Path(path).is_relative_to(Path.home())]

    paths.jupyter_path = jupyter_path  # before anybody imports it by its name


def rehearse_start(home: Path, without: Collection[str] = ()) -> Any:
    """Initialize a server that nobody uses, without some extensions; return it.

    What Jupyter works out and keeps in its modules at a first start, for a first page and
    for a first notebook is then shared by all forks: each starts in half the CPU time and
    with 6 MB less of private memory, and a lesson costs 11 MB less.
    """
    import nbformat
    from jupyter_server.gateway.gateway_client import GatewayClient
    from tornado.ioloop import IOLoop

    account = pwd.struct_passwd(("", "", 0, 0, "", str(home), "/bin/sh"))
    order = ServerOrder()
    app = make_app(order, account, without)
    app.io_loop.run_sync(functools.partial(rehearse_visit, app))

    # To validate a notebook compiles the schema of its version.
    notebook = {"cells": [], "metadata": {}, "nbformat": 4}
    for minor in range(nbformat.current_nbformat_minor + 1):
        nbformat.validate({**notebook, "nbformat_minor": minor})

    # A fork must find things as if nothing had happened.
    logging.disable(logging.NOTSET)
    for number in (*INTERRUPTS, signal.SIGUSR1):  # Jupyter handles these
        signal.signal(number, signal.SIG_DFL)
    GatewayClient.clear_instance()
    IOLoop.current().close()
    asyncio.set_event_loop(None)
    return app


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


# == Launch 5: the landing page ============================================================
#
# The page on the base port leads every student to their own notebook. `Webserver` is the
# launcher's side of it; `run_webserver` is the process, which is `nobody` and knows no
# password but those that are typed there, for the launcher to change. It shows the
# students' names to anybody, if it is told them.

WEBSERVER_TITLE = "notebooks.py: webserver"
PAGE_SECONDS = 10.0  # in which a visitor must have made a request
VISIT_SECONDS = 2.0  # for which the page waits for a notebook server
TLS_HANDSHAKE = b"\x16"  # the first byte of a connection that opens one: RFC 8446
COMMON = "user-redirect"  # begins addresses for everybody, as JupyterHub's do
WHO = (
    "__Secure-notebooks-student"  # a cookie: whose notebook was opened last in this browser
)
WHO_SECONDS = 180 * 24 * 3600
QUERY_CHARACTERS = "/?:@!$&'()*+,;=%-._~[]"  # which stay as they are

MAX_VISITORS = 1000  # connections: several for each student of a class
MAX_WISHES = 30  # for a new password, which wait for their turn
MAX_TRIED = 1000  # sockets whose numbers are known
TRIED = "__Host-notebooks-socket"  # a cookie of the page's script: WebSockets come through


STARTING = Phrase("Your notebook is being started. This page goes on to it by itself.")
NOT_STARTED = Phrase(
    "Your notebook could not be started: tell your teacher. This page tries again."
)
CHANGED = Phrase(
    "Your password is changed. Log in with the new one: then open tabs can save. They run"
    " code once they are loaded again."
)
CROWDED = Phrase("Too many want a new password just now: try again in a minute.")


class Site(Message):
    """What the landing page shows to anybody (user name, name, port), and all ports."""

    language: Language
    title: str
    address: str
    port: int
    certificate: Certificate
    gateway: Gateway
    shown: list[tuple[str, str, int]]
    ports: dict[str, int]
    failed: list[str]  # of whom a server could not be started
    notice: str  # the last day of the certificate, if that is near


class NewPassword(Message):
    """What a student wishes, and the launcher's answer."""

    username: str
    old: str
    new: str
    answer: Phrase = Phrase("")


@dataclasses.dataclass(kw_only=True)
class Webserver(Helper):
    """The launcher's side of the webserver."""

    role: str = "webserver"
    listener: socket.socket
    site: Callable[[], Site]  # what the page has to show now
    change: Callable[[NewPassword], Any]
    task: "asyncio.Task[None] | None" = None  # changes a password

    def greet(self) -> None:
        self.tell(self.site(), [self.listener.fileno()])

    def handle(self, message: Message) -> None:
        # Strangers talk to it, and may have taken it over: one wish at a time, of text.
        is_busy = self.task is not None and not self.task.done()
        is_text = {str} == {*map(type, vars(message).values())}
        if isinstance(message, NewPassword) and is_text:
            if is_busy:  # with what an earlier webserver has asked
                self.tell(NewPassword(message.username, "", "", CROWDED))
            else:
                self.task = asyncio.get_running_loop().create_task(self.change(message))


async def is_answered(port: int) -> bool:
    """Say whether a notebook server answers within VISIT_SECONDS; that may start it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    visit = asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        _, writer = await asyncio.wait_for(visit, VISIT_SECONDS)
    except OSError:  # TimeoutError too
        return False
    writer.close()
    return True


def find_target(
    path: str, asked: str | None, query: str, remembered: str = ""
) -> tuple[str, str]:
    """Return the user name that a request means, and what is wanted of their server.

    The form asks for a name in the query; all else names it in the path, but for an
    address for everybody, which leads on who has answered it before.
    """
    if not path and asked is not None:
        return asked.strip().lower(), ""
    username, _, rest = path.partition("/")
    if username == COMMON:
        username = remembered if asked is None else asked.strip()
    return username.lower(), urllib.parse.quote(rest) + (f"?{query}" if query else "")


def ports_of(ports: Collection[int]) -> str:
    """Return the ports that a firewall must let in, for people."""
    return f"{min(ports)}-{max(ports)}"


class PageHandler(Upstream):  # type: ignore[misc]
    """A page of the webserver's, and what all its pages have in common."""

    upstream = "tornado.web.RequestHandler"

    @property
    def site(self) -> Site:
        site: Site = self.settings["site"]
        return site

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", content_security_policy())
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")
        if not self.site.certificate.names:
            self.set_header(*HSTS)
        self.clear_header("Server")

    def prepare(self) -> None:
        if self.request.protocol == "http":
            address = f"{visited_host(self.request)}:{self.site.port}"
            self.redirect(f"https://{address}{self.request.uri}", status=307)

    def say(self, phrase: Phrase, **values: object) -> str:
        return self.site.language.say(phrase, **values)

    async def show(self, template: str, *messages: str, **values: object) -> None:
        """Finish with a page; the messages are said above all."""
        page, site = self.settings["pages"].get_template(template), self.site
        if site.notice:
            ends = Phrase("The certificate of this page ends on {date}: tell your teacher.")
            messages = (self.say(ends, date=site.notice), *messages)
        has_authority = site.certificate.authority is not None

        # Nobody waits for it: a visitor who has left is no error for the log.
        self.finish(
            page.render(
                title=site.title,
                messages=[*filter(None, messages)],
                trust=f"/{TRUST_PATH}" if has_authority else "",
                ports=ports_of([site.port, *site.ports.values()]),
                **values,
            )
        )


class LandingHandler(PageHandler):
    """The page with the students, and the way to the notebook of each."""

    async def get(self, path: str) -> None:
        """Show the page, or lead /USERNAME/anything to the student's server."""
        nobody = Phrase("Nobody here has this user name.")
        who = Phrase("Who are you? The address leads to your own notebook.")
        asked = self.get_query_argument("username", None)
        query, common = self.request.query, path.partition("/")[0] == COMMON

        if common and asked is not None:  # the query is the form's, which has kept this one
            query = self.get_query_argument("query", "")
        quoted = urllib.parse.quote(query, QUERY_CHARACTERS)
        username, target = find_target(path, asked, quoted, self.get_cookie(WHO) or "")

        if username in self.site.ports:
            await self.lead(username, target)
        elif asked is not None or path and not common:
            self.set_status(404)
            await self.show_students(self.say(nobody), path, query if common else None)
        elif common:
            await self.show_students(self.say(who), path, query)
        else:
            await self.show_students("", path, None)

    async def show_students(self, message: str, path: str, query: str | None) -> None:
        """Show who has a notebook.

        query: that of an address for everybody, to whose path the answer is added.
        """
        action, link = "/", "/"
        if query is not None:
            action = urllib.parse.quote(f"/{path}")
            link = f"{action}?{urllib.parse.urlencode({'query': query, 'username': ''})}"

        await self.show(
            "landing.html",
            message,
            action=action,
            link=link,
            query=query,
            students=self.site.shown,
            socket=f"/{SOCKET_PATH}",
        )

    async def lead(self, username: str, target: str) -> None:
        """Lead to a student's server, once it runs and their browser was tried."""
        site = self.site
        if not await is_answered(site.ports[username]):
            self.set_status(503)
            has_failed = username in site.failed
            self.set_header("Refresh", "5" if has_failed else "1")  # the same address again
            await self.show("wait.html", self.say(NOT_STARTED if has_failed else STARTING))
            return

        host = site.address.replace("{username}", username)
        host = f"{host or visited_host(self.request)}:{site.ports[username]}"
        options: Any = {"httponly": True, "secure": True, "samesite": "Lax"}
        options |= {"path": f"/{COMMON}", "max_age": WHO_SECONDS}
        self.set_cookie(WHO, username, **options)
        address = f"https://{host}/{username}/{target}"
        is_browser = "text/html" in self.request.headers.get("Accept", "")

        if is_browser and not self.get_cookie(TRIED):
            await self.show(
                "wait.html",
                target=address,
                username=username,
                socket=f"/{SOCKET_PATH}",
            )
        else:
            self.redirect(address)


class AuthorityHandler(PageHandler):
    """The certificate of the course's authority, which devices offer to install."""

    async def get(self, path: str) -> None:
        authority = self.site.certificate.authority
        if path in self.site.ports:  # a student has this name
            self.redirect(f"/{path}/")
        elif not authority:
            self.redirect("/")
        else:
            self.set_header("Content-Type", "application/x-x509-ca-cert")
            self.finish(authority)


class TrustHandler(PageHandler):
    """The page that tells how a device comes to trust the course's authority."""

    async def get(self) -> None:
        certificate, browser = self.site.certificate, self.request.headers.get("User-Agent")
        if not certificate.authority:
            self.redirect("/")
            return

        systems = [
            (label, self.say(steps), re.search(pattern, browser or "") is not None)
            for label, pattern, steps in SYSTEMS
        ]
        systems.sort(key=lambda system: not system[2])

        await self.show(
            "trust.html",
            names=", ".join(name.partition(":")[2] for name in certificate.names),
            file=AUTHORITY_PATHS[0],
            fingerprint=fingerprint(certificate.authority),
            systems=systems,
        )


class PasswordHandler(PageHandler):
    """The form in which a student changes their password."""

    async def get(self, answer: Phrase | None = None) -> None:
        username = self.get_argument("username", "")
        is_changed = answer == CHANGED
        message = self.say(answer) if answer else ""
        await self.show("password.html", message, username=username, is_changed=is_changed)

    async def post(self) -> None:
        names = ("username", "old", "new", "again")
        username, old, new, again = (self.get_body_argument(x, "") for x in names)
        new *= new == again  # none is refused
        await self.get(await self.settings["ask"](NewPassword(username, old, new)))


class PageSocketHandler(SocketHandler):
    """The page's, which tells the teacher once whose browser opens none."""

    told: set[tuple[str, str]]

    def report(self, username: str, kind: str) -> None:
        # Strangers can ask for this, with any name.
        if username in self.settings["site"].ports and (username, kind) not in self.told:
            self.told.add((username, kind))
            log.warning(
                "%s: their browser opens no WebSocket, so no notebook connects: it may be"
                " the %s; see Network and certificate in the README",
                *(username, kind),
            )


def visited_host(request: Any) -> str:
    """Return the host name that the visitor used, without the port."""
    host: str = request.host_name
    plain = re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", host)
    return host if plain else socket.gethostname()  # not by the DNS, which may be slow


async def serve_connection(
    server: Any, strangers: Strangers, connection: socket.socket, address: tuple[Any, ...]
) -> None:
    """Serve a connection of HTTP, with TLS or without: its first byte tells."""
    from tornado import iostream

    strangers.admit(connection, address[0])
    stream: iostream.IOStream

    try:
        connection.setblocking(False)
        await wait_readable(connection.fileno(), PAGE_SECONDS)
        if connection.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
            strangers.forget(connection)
            connection = server.request_callback.settings["context"].wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
            strangers.admit(connection, address[0])
            stream = iostream.SSLIOStream(connection)
        else:
            stream = iostream.IOStream(connection)

        server.handle_stream(stream, address)
    except OSError:  # TimeoutError too
        connection.close()


async def why_silent(gateway: Gateway) -> str:
    """Return why a gateway does not answer; nothing if it does, or there is none."""
    from tornado import httpclient

    if not gateway.url:
        return ""
    try:
        # Any answer will do, without a body: a stranger there could send 100 MB.
        await httpclient.AsyncHTTPClient().fetch(
            f"{gateway.url}/api/swagger.json",  # needs no token
            method="HEAD",
            raise_error=False,
            follow_redirects=False,
            request_timeout=GATEWAY_ANSWER_SECONDS,
            ssl_options=gateway.context(),
        )
    except ssl.SSLError as error:
        hint = "if it has an authority of your own, name that in gateway_ca"
        return f"{explain(error)}; {hint}"
    except Exception as error:  # whatever it is, there was no answer
        return explain(error)
    return ""


async def watch_gateway(gateway_now: Callable[[], Gateway]) -> NoReturn:
    """Tell the teacher once when the gateway does not answer, and when it does again."""
    away = ""  # the address
    while True:
        await asyncio.sleep(GATEWAY_SECONDS)
        gateway = gateway_now()
        fault = await why_silent(gateway)

        if fault and away != gateway.url:
            log.warning("the gateway %s, and all kernels on it: %s", gateway.url, fault)
        elif away and away == gateway.url and not fault:
            log.warning("the gateway %s answers again", gateway.url)
        away = gateway.url if fault else ""


async def serve_page(channel: Channel, site: Site, listener: socket.socket) -> None:
    """Serve the base port until the launcher is gone: TLS, or a redirect to it."""
    import jinja2
    from tornado import httpserver, netutil, web

    turn, answers = asyncio.Lock(), asyncio.Queue[NewPassword]()
    places = asyncio.Semaphore(MAX_WISHES)

    async def ask(wish: NewPassword) -> Phrase:
        if places.locked():
            return CROWDED
        async with places, turn:
            channel.send_message(wish, wait=False)
            while (back := await answers.get()).username != wish.username:
                pass  # an earlier webserver has asked for that
            return back.answer

    tried: Any = {"come": collections.deque([], MAX_TRIED), "told": set()}
    handlers = [
        (f"/{PASSWORD_PATH}", with_upstream(PasswordHandler)),
        (f"/{TRUST_PATH}", with_upstream(TrustHandler)),
        (f"/({'|'.join(AUTHORITY_PATHS)})$", with_upstream(AuthorityHandler)),
        (f"/{SOCKET_PATH}", with_upstream(PageSocketHandler, **tried)),
        (r"/(.*)", with_upstream(LandingHandler)),
    ]
    # Each look at a notebook that is being started is answered with 503.
    application = web.Application(handlers, ask=ask, log_function=lambda handler: None)

    def take(site: Site) -> None:
        pages = jinja2.Environment(autoescape=True)
        add_pages(pages, site.language)
        context = site.certificate.context()
        application.settings.update(site=site, pages=pages, context=context)

    take(site)
    server = httpserver.HTTPServer(
        application,
        idle_connection_timeout=PAGE_SECONDS,
        body_timeout=PAGE_SECONDS,
        max_header_size=16384,
        max_body_size=1024,
    )

    listener.setblocking(False)
    # Ends connections that ask, and ask again, and never read an answer: tcp(7).
    listener.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PAGE_SECONDS * 1000)
    )
    visit = functools.partial(serve_connection, server, Strangers(MAX_VISITORS))
    tasks = set[asyncio.Task[None]]()

    def accept(connection: socket.socket, address: tuple[Any, ...]) -> None:
        task = asyncio.get_running_loop().create_task(visit(connection, address))
        tasks.add(task)  # or it might be collected
        task.add_done_callback(tasks.discard)

    netutil.add_accept_handler(listener, accept)
    watch = asyncio.create_task(watch_gateway(lambda: application.settings["site"].gateway))
    with contextlib.suppress(OSError):  # the launcher is gone: seen below
        channel.send_message(Ready())

    async for message in channel.messages():  # until the launcher is gone
        if isinstance(message, NewPassword):
            answers.put_nowait(message)
        elif isinstance(message, Site):
            take(message)
    watch.cancel()


def run_webserver(channel: Channel) -> None:
    """Serve the landing page. Runs as: nobody, once it has its title."""
    setproctitle.setproctitle(WEBSERVER_TITLE)
    logging.getLogger("tornado").setLevel(logging.ERROR)  # not each bad request
    # Nor each visit to a server that starts or fails: its address is a stranger's text.
    logging.getLogger("tornado.access").disabled = True
    try:
        site, (fd,) = channel.receive_message()
    except EOFError:
        return
    assert isinstance(site, Site)

    # Without an exec, other processes of nobody's can neither trace nor read this one.
    nobody = pwd.getpwnam("nobody")
    drop_privileges(Identity(nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid,)))
    release_memory()
    listener = socket.socket(fileno=fd)
    asyncio.run(serve_page(channel, site, listener))


# == Launch 6: ports =======================================================================
#
# The launcher holds every student's port for as long as it runs, whether a server runs or
# not. So no student can ever take a port of the course and collect its visitors' cookies
# and passwords.

MAX_LOOKED_DESCRIPTORS = 1000  # of each process, or it takes long
MAX_NAMESAKES = 20  # of a user's processes
SYS_PIDFD_GETFD = 438  # the same on all architectures


def assign_ports(students: Sequence[Student], base: int) -> dict[str, int]:
    """Give each student their own port of base+1 ... base+N, else the lowest free one."""
    wanted = {each.username: int(each.port or 0) for each in students}
    uses = collections.Counter(wanted.values())
    ports = range(base + 1, base + len(students) + 1)
    kept = {x: port for x, port in wanted.items() if port in ports and uses[port] == 1}
    free = iter(sorted({*ports} - {*kept.values()}))
    return {name: kept.get(name) or next(free) for name in wanted}


def bind_port(port: int) -> socket.socket:
    """Return a socket that listens on a port in both families.

    It listens at once: a port that is bound and does not listen, or is held in one family
    only, can be taken by any user. Raises: OSError (EADDRINUSE).
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=1024)


# (pid, descriptor) pairs per listening TCP port.
Listeners = dict[int, list[tuple[int, int]]]


def find_listeners(name: str = "") -> Listeners:
    """Return who listens on which TCP port, of processes of that name if it is given.

    Students can give it to theirs: only a few of each user's are looked at. Source:
    proc(5), /proc/net/tcp.
    """
    ports = {}
    for path in Path("/proc/net").glob("tcp*"):
        for line in path.read_text().splitlines()[1:]:
            fields = line.split()
            address, state, inode = fields[1], fields[3], fields[9]
            if state == "0A":  # TCP_LISTEN
                ports[f"socket:[{inode}]"] = int(address.rpartition(":")[2], 16)

    listeners: Listeners = {}
    namesakes: collections.Counter[int] = collections.Counter()
    for pid in psutil.pids():
        if name:
            if read_name(pid) != name:
                continue
            with contextlib.suppress(ProcessLookupError):
                uid = read_status(pid)[0]
                namesakes[uid] += 1
                if namesakes[uid] > MAX_NAMESAKES:
                    continue

        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in itertools.islice(entries, MAX_LOOKED_DESCRIPTORS):
                with contextlib.suppress(OSError):
                    port = ports.get(os.readlink(entry.path))
                    if port:
                        listeners.setdefault(port, []).append((pid, int(entry.name)))
    return listeners


def describe_holder(port: int) -> str:
    """Name what holds a port."""
    for pid, _ in find_listeners().get(port, ()):
        with contextlib.suppress(ProcessLookupError, KeyError):
            user = pwd.getpwuid(read_status(pid)[0]).pw_name
            return f"{printable(read_name(pid))} (pid {pid}, user {user})"
    return f"a process that cannot be named (`ss -tanp | grep {port}` may)"


def find_launcher(port: int) -> tuple[int, Path] | None:
    """Return pid and configuration file of the `launch` of root's that has a base port."""
    for pid, _ in find_listeners(LAUNCHER_NAME).get(port, ()):
        with contextlib.suppress(ProcessLookupError):
            # Root's first: a student could hold up who reads their command line.
            title = " ".join(read_argv(pid)) if read_status(pid)[0] == 0 else ""
            if title.startswith(LAUNCHER_TITLE):
                return pid, Path(title.removeprefix(LAUNCHER_TITLE))
    return None


def launcher_of(config: Config) -> int:
    """Return the pid of the `launch` of this course, or 0."""
    found = find_launcher(config.port)
    return found[0] if found and is_same_course(found[1], config) else 0


def reload_launcher(config: Config) -> None:
    """Have a `launch` that runs read its configuration and list again."""
    launcher = launcher_of(config)
    if launcher:
        signal_process(launcher, 0, signal.SIGHUP)
        say(f"The launch that runs (pid {launcher}) has been told.")


def bind_base_port(config: Config) -> socket.socket:
    """Return the web page's socket; raises UsageError that names who holds the port."""
    port = config.port
    try:
        return bind_port(port)
    except OSError as error:
        found = find_launcher(port)
        if found and is_same_course(found[1], config):
            raise UsageError(
                f"launch runs already (pid {found[0]}); end that, or leave it: `setup`"
                " brings new students into it"
            ) from None

        reason = os.strerror(error.errno or 0)
        holder = f"the launch of {found[1]}" if found else describe_holder(port)
        raise UsageError(
            f"port {port}: {reason}: {holder}; end that, or set another `port`"
        ) from None


def take_listener(
    listeners: Listeners, port: int, uid: int, others: Collection[str]
) -> tuple[socket.socket, Fork] | None:
    """Duplicate the listening socket out of a student's server that still runs.

    A socket that root made tells that the server is ours: a student's own socket belongs to
    the student. The title tells if it is one of these other courses'. Source:
    pidfd_getfd(2), not in Python's os yet.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for pid, number in listeners.get(port, ()):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            process = stack.enter_context(contextlib.closing(Process(pid)))
            if read_status(pid)[0] != uid:
                continue

            fd = libc.syscall(SYS_PIDFD_GETFD, process.pid_fd, number, 0)
            if fd < 0:
                continue

            listener = stack.enter_context(socket.socket(fileno=fd))
            is_ours = os.fstat(fd).st_uid == 0 and server_course(pid) not in others
            if is_ours and listener.getsockname()[1] == port:
                stack.pop_all()  # both stay open
                return listener, Fork(pid, process.pid_fd)
    return None


def ensure_capacity(course: Course) -> None:
    """Allow the descriptors that all servers need: two each, more at the start.

    Our helpers and servers get as many: on the network as the system allows. Root may raise
    the hard limit too, unless something confines it (RLIMIT_NOFILE). Raises: UsageError if
    there are too few of them, or of ports.
    """
    config, count = course.config, len(course.roster.students)
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


# == Launch 7: the launcher ================================================================
#
# A `Server` is the launcher's view of one student's server, from its port to its end. When
# its process does not run, the launcher listens in its place, and a connection has it
# started: one mechanism serves start on demand, recovery from a crash and idle servers.
# `Launcher` owns all servers and both helpers, and obeys signals.

RELOAD_SECONDS = 3  # for a reload, after a command that has changed accounts
SLOT_SECONDS = 5.0  # for which a slow start keeps others waiting
MEMORY_SECONDS = 5  # between two looks at what all processes hold
GUESS_SECONDS = 1.0  # for each try of a password, one at a time for all
# Every encoding of a list has these characters; no spreadsheet takes them for a formula.
GOOD_PASSWORD = re.compile(r"(?![=+@-])[!-~][ -~]{8,98}[!-~]")


class ServerState(enum.Enum):
    """What a student's server does; the status line shows the names."""

    RUNNING = "running"
    STARTING = "starting"
    STOPPED = "stopped"
    FAILED = "failed"  # at its last start


@dataclasses.dataclass
class StartContext:
    """What all servers share when they start; a reload changes the first four."""

    config: Config
    certificate: Certificate
    language: Language
    gateway: Gateway
    template: Template
    slots: asyncio.Semaphore  # of those that start at once
    ports: str = ""  # for people
    tell: Callable[[], None] = lambda: None  # the page that something has changed
    has_limits: bool = False  # of memory and processors, by slices


@dataclasses.dataclass
class Server:
    """A student's server: nobody else closes its socket or writes these fields."""

    member: Member
    port: int
    listener: socket.socket
    process: Fork | None = None
    state: ServerState = ServerState.STOPPED
    has_failed: bool = False  # at its last start, whatever it does now
    # The first start is over, not wanted, or takes long.
    settled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    @classmethod
    def open(
        cls, member: Member, ports: dict[str, int], config: Config, listeners: Listeners
    ) -> "Server":
        """Adopt the student's server, or bind their port or another; raises Error."""
        username, student = member.username, member.student
        if not student.nb_pass:
            raise Error("has no nb-pass; run setup first")

        port = ports[username]
        others = Claims(member.account, config).others
        for candidate in {port, int(student.port or port)}:
            adopted = take_listener(listeners, candidate, member.uid, others)
            if adopted:
                listener, process = adopted
                log.info("%s: adopted, pid %d", username, process.pid)
                return cls(member, candidate, listener, process, ServerState.RUNNING)

        try:
            return cls(member, port, bind_port(port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Error(f"port {port}: {error.strerror}") from None

        for other in range(config.port + len(ports) + 1, 65536):
            with contextlib.suppress(OSError):
                server = cls(member, other, bind_port(other))
                log.warning(
                    "%s: port %d is held by %s; using %d: let it through the firewall",
                    *(username, port, describe_holder(port), other),
                )
                return server
        raise Error("no port is free")

    @property
    def username(self) -> str:
        return self.member.username

    def update(self, member: Member) -> None:
        """Take what the list says now, which counts from the next start."""
        self.member = member

    def start_tending(self, context: StartContext) -> None:
        self.task = asyncio.get_running_loop().create_task(self.tend(context))

    def close(self) -> None:
        """Give up the port, and the hold of a process that was ended."""
        self.listener.close()
        if self.process:
            self.process.close()

    async def tend(self, context: StartContext) -> None:
        """Start the server whenever it is wanted, and wait for its end, again and again.

        Step 1 of a start. It is wanted at launch, unless on_demand, and whenever somebody
        connects to its port.
        """
        wanted, delay = not context.config.on_demand, 0.0
        started = time.monotonic()
        while True:
            if not self.process:
                if not wanted:
                    self.settled.set()
                    await wait_readable(self.listener.fileno())
                await self.start(context)
                started = time.monotonic()  # not before: a start that fails may take long
            wanted = False
            self.settled.set()

            if self.process:
                await self.wait_for_end(self.process)
            delay = restart_delay(delay, started)
            await asyncio.sleep(delay)

    async def wait_for_end(self, process: Fork) -> None:
        """Wait until the server has ended, and say why if it was not idle or told to."""
        code = await process.wait()
        process.close()
        self.process = None
        self.state = ServerState.STOPPED
        if code and not is_expired(self.username):  # or it is `remove` that has ended it
            log.warning(
                "%s: the server %s; its log is ~%s/%s",
                *(self.username, explain_exit(code), self.username, SERVER_LOG),
            )
        log.info("%s: stopped", self.username)

    async def start(self, context: StartContext) -> None:
        """Start the server, and report if that fails.

        Step 2 of a start. As many start at once as there are cores. One that takes long,
        for its student may have stopped it, does not hold others up for more than
        SLOT_SECONDS.
        """
        self.state = ServerState.STARTING
        await context.slots.acquire()
        with contextlib.ExitStack() as slot:

            def give_up_slot() -> None:
                slot.close()
                self.settled.set()

            slot.callback(context.slots.release)
            loop = asyncio.get_running_loop()
            slot.callback(loop.call_later(SLOT_SECONDS, give_up_slot).cancel)
            try:
                self.process = await self.start_once(context)
            except Exception as error:  # whatever it is, it is this student's alone
                foreseen = isinstance(error, (Error, OSError))
                text = explain(error)
                log.error("%s: %s", self.username, text, exc_info=not foreseen)
                self.has_failed, self.state = True, ServerState.FAILED
                context.tell()
            else:
                self.has_failed, self.state = False, ServerState.RUNNING
                log.info(
                    "%s: started, port %d, pid %d",
                    *(self.username, self.port, self.process.pid),
                )

    async def start_once(self, context: StartContext) -> Fork:
        """Have a server forked, and watch it until it is ready. Step 3 of a start."""
        await context.template.ready.wait()  # which may take: what counts is what is then
        account = await self.find_account()
        ensure_runtime_dir(account)
        order = server_order(context, self)

        # Not a terminal, of which students can use up the host's: pty(7).
        output_fd, write_fd = os.pipe()
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, output_fd)
            with closing(write_fd):
                fds = [self.listener.fileno(), write_fd]
                process = await context.template.fork(order, fds)

            failed.pop_all()  # `watch_start` closes the pipe
            failed.callback(process.close)
            failed.callback(process.send_signal, signal.SIGKILL)
            await watch_start(output_fd, order.url)
            failed.pop_all()
        if order.certificate != context.certificate:  # it has come meanwhile
            self.hand_over(context.certificate)
        return process

    def hand_over(self, certificate: Certificate) -> bool:
        """Give the process another certificate; one of an earlier version takes none."""
        try:
            with Channel(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
                channel.setblocking(False)  # its student may have stopped it
                channel.connect(str(CONTROL_DIR / str(self.port)))
                channel.send_message(certificate, wait=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning(
                "%s: keeps the old certificate until its next start: %s",
                *(self.username, explain(error)),
            )
        return True

    async def find_account(self) -> pwd.struct_passwd:
        """Return the account as it is now, perhaps months after launch; raises Error.

        Nothing is said of one that `remove` has closed: at its end we are told who left.
        """
        username, uid = self.username, self.member.uid
        patience = RELOAD_SECONDS
        while True:
            account = find_account(username)
            if account and account.pw_uid == uid and not is_expired(username):
                break
            if not patience:
                raise Error("the account does not exist, or is closed; run setup")

            await asyncio.sleep(1)
            with contextlib.suppress(BusyError), locked("notebooks", wait=False):
                patience -= 1

        if not os.path.isdir(account.pw_dir):
            raise Error(f"{account.pw_dir} is missing; run setup")
        return account


def alphabetic(name: str) -> tuple[str, str]:
    """Return what sorts names as people expect: Änne before Uwe, de Vries beside Devi."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(x for x in letters if not unicodedata.combining(x)), name


def visible_address(config: Config, prefix: str = "") -> str:
    """Return the host name of the web page or, with a prefix, of a student's server."""
    if config.server_address:
        return config.server_address.replace("{username}.", prefix)
    name = full_host_name()
    return socket.gethostname() if name.startswith("localhost") else name


def server_order(context: StartContext, server: Server) -> ServerOrder:
    """Return what a student's server is told; each has secrets of its own."""
    config, certificate = context.config, context.certificate
    host = visible_address(config, f"{server.username}.")
    password = server.member.student.nb_pass
    kept = {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}

    return ServerOrder(
        username=server.username,
        name=server.member.student.full_name[:MAX_SHOWN_NAME] * config.list_students,
        title=config.web_title,
        page_url=f"https://{visible_address(config)}:{config.port}/",
        any_host=not config.server_address,
        language=context.language,
        ports=context.ports,
        course=str(config.path),
        port=server.port,
        url=f"https://{host}:{server.port}/{server.username}/",
        password=hash_password(password),
        cookie_secret=make_cookie_secret(server.username, password),
        root_dir=str(config.root_dir or "."),
        start_dir=str(config.of(server.username).start_dir),
        start_page=config.start_page or "tree",
        profile=config.profile,
        idle_seconds=config.idle_minutes * 60,
        idle_kernel_seconds=(config.idle_kernel_minutes or config.idle_minutes) * 60,
        busy_minutes=config.busy_minutes,
        processes=config.limits_of(server.member.student).processes,
        has_slice=context.has_limits,
        debugger=config.debugger,
        tcp_kernels=config.tcp_kernels,
        certificate=certificate,
        gateway=context.gateway,
        own_packages=config.own_packages,
        environment={**kept, **config.environment},
    )


async def watch_start(output_fd: int, url: str) -> None:
    """Wait until a server names its address in its output, which is then closed.

    Step 9 of a start. The address is the last that a server prints there: see `serve`.
    Raises: Error with the last lines of its output.
    """
    spawn = fdpexpect.fdspawn(
        output_fd, encoding="utf-8", codec_errors="replace", searchwindowsize=2000
    )
    outcomes: list[Any] = [re.compile(re.escape(url)), pexpect.EOF, pexpect.TIMEOUT]
    outcome = await spawn.expect(outcomes, timeout=START_SECONDS, async_=True)

    if outcome != 1 and spawn.async_pw_transport:  # on EOF asyncio has closed it
        spawn.async_pw_transport[1].close()
    if outcome:
        reason = ("it ended", f"no address within {START_SECONDS:.0f} s")[outcome - 1]
        lines = [line.strip() for line in (spawn.before or "").splitlines()]
        words = " / ".join([line for line in lines if line][-3:]) or "it said nothing"
        raise Error(f"the server did not start, {reason}: {printable(words)[-500:]}")


def is_password_of(roster: Roster, username: str, password: str) -> bool:
    """Say whether it is the notebook password, in a time that does not tell how much."""
    passwords = {each.username: each.nb_pass for each in roster.students}
    known = passwords.get(username, "").encode()
    given = password.encode(errors="replace")
    return known != b"" and hmac.compare_digest(known, given)


class Refusal(Error):
    """A student gets no new password; the phrase tells them why."""

    def __init__(self, phrase: Phrase) -> None:
        super().__init__(phrase)
        self.phrase = phrase


def check_new_password(wish: NewPassword) -> None:
    """Raise a Refusal of a password that will not do."""
    if not wish.new:
        raise Refusal(Phrase("The new password must be typed twice in the same way."))
    if wish.new == wish.old:
        raise Refusal(Phrase("That is your password already: think of a new one."))
    if wish.username in wish.new:
        raise Refusal(Phrase("Your user name must not be in the new password."))
    if not GOOD_PASSWORD.fullmatch(wish.new):
        raise Refusal(
            Phrase(
                "The new password must have 10 to 100 letters, digits and signs of an"
                " English keyboard, and not begin with = + - or @."
            )
        )


class Launcher:
    """Owns the servers of a course and both helpers; reloads, and shows the status."""

    def __init__(
        self,
        course: Course,
        certificate: Certificate,
        gateway: Gateway,
        base_listener: socket.socket,
    ) -> None:
        config, path = course.config, course.config.path
        template = Template(role="template", course=path)
        slots = asyncio.Semaphore(os.cpu_count() or 1)
        language = read_language(config.language)
        self.context = StartContext(config, certificate, language, gateway, template, slots)
        self.options = course.options
        self.servers: dict[str, Server] = {}
        self.web = Webserver(
            course=path, listener=base_listener, site=self.site, change=self.change_password
        )
        self.reload_wanted = asyncio.Event()
        self.end = certificate.end()
        self.context.tell = self.web.greet
        self.context.has_limits = has_slices()
        self.announced = False
        self.limits: dict[int, Limits] = {}  # which systemd knows, by uid
        self.left: set[str] = set()  # who had a server, and left
        self.memory = 0  # of all students, in bytes

    def open_servers(self, course: Course) -> None:
        """Hold a port for each member who can have a server; the list is locked."""
        outcome = Outcome()
        ports = assign_ports(course.roster.students, course.config.port)
        listeners = find_listeners(SERVER_NAME)
        servers = []

        # About those whom `remove` took away, only their number is said.
        rows = [x for x in course.students if x.nb_pass or x.username not in self.left]
        for member in outcome.members(rows):
            with outcome.step(member.username):
                server = self.servers.get(member.username) or Server.open(
                    member, ports, course.config, listeners
                )
                server.update(member)
                servers.append(server)
                course.roster.update(member.username, port=str(server.port))

        self.servers = {server.username: server for server in servers}
        self.context.ports = ports_of([course.config.port, *(x.port for x in servers)])
        outcome.report()

    def save_ports(self, roster: Roster) -> None:
        """Write the ports into the list, which is locked."""
        try:
            roster.save()
        except OSError as error:
            log.warning("the ports could not be written: %s", explain(error))

    def site(self) -> Site:
        """Return what the web page is told; passwords are not part of that."""
        config = self.context.config
        rows = [
            (each.username, each.member.student.full_name[:MAX_SHOWN_NAME], each.port)
            for each in self.servers.values()
        ]
        rows.sort(key=lambda row: alphabetic(row[1] or row[0]))  # by what is shown

        return Site(
            language=self.context.language,
            title=config.web_title,
            address=config.server_address,
            port=config.port,
            certificate=self.context.certificate,
            gateway=dataclasses.replace(self.context.gateway, token=""),
            shown=rows if config.list_students else [],
            ports={username: port for username, _, port in rows},
            failed=[x.username for x in self.servers.values() if x.has_failed],
            notice=f"{self.end:%Y-%m-%d}" if days_until(self.end) < RENEWAL_DAYS else "",
        )

    async def run(self) -> int:
        """Serve until SIGTERM or Ctrl-C, and leave the notebook servers running."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in INTERRUPTS:
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload_wanted.set)
        # `command_launch` has blocked it: until now it would have ended us.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

        extra = [self.show_status(), self.watch_certificate(), self.watch_usage()]
        status = [loop.create_task(each) for each in extra]
        work: list[Any] = [
            *(stop.wait(), self.run_servers()),
            *(self.context.template.run(), self.web.run()),
        ]
        tasks = [loop.create_task(each) for each in work]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

        # All at once, or a server that is starting would report the template's end.
        tending = [server.task for server in self.servers.values() if server.task]
        await end_tasks([*status, *tasks, *tending])
        running = self.count(ServerState.RUNNING)
        say(f"The web page has ended. Notebook servers that run on: {running}.")
        for task in done:
            task.result()  # raises what went wrong in it
        return 0 if self.announced else Interrupted.exit_status

    async def run_servers(self) -> NoReturn:
        """Start what has to run from the beginning, tell the teacher, then reload."""
        await asyncio.gather(self.context.template.ready.wait(), self.web.ready.wait())
        servers = list(self.servers.values())
        for server in servers:
            server.start_tending(self.context)
        await asyncio.gather(*(server.settled.wait() for server in servers))

        running, config = self.count(ServerState.RUNNING), self.context.config
        late = self.count(ServerState.STARTING)
        text = f"{running} of {len(servers)} notebook servers run"
        say(f"{text}, {late} still starting." if late else f"{text}.")
        say(f"The firewall must let in TCP ports {self.context.ports}.")
        self.say_fingerprints()
        say(f"Ready: https://{visible_address(config)}:{config.port}/")
        self.announced = True
        release_memory()

        while True:
            await self.reload_wanted.wait()
            self.reload_wanted.clear()
            await self.reload()

    def say_fingerprints(self) -> None:
        """Tell what browsers show of the certificate, and its page of the authority."""
        certificate, config = self.context.certificate, self.context.config
        served = fingerprint(certificate.chain[0])
        say(f"Fingerprint of the certificate (SHA-256): {served}")
        if certificate.authority:
            page = f"https://{visible_address(config)}:{config.port}/{TRUST_PATH}"
            digest = fingerprint(certificate.authority)
            say(f"Fingerprint of its authority, to compare on {page}: {digest}")

    def count(self, state: ServerState) -> int:
        return sum(server.state is state for server in self.servers.values())

    def limit(self) -> None:
        """Set the limits that have changed; raises Error if one cannot be kept."""
        config = self.context.config
        members = [server.member for server in self.servers.values()]
        limits = limits_by_uid(config, members)

        try:
            set_limits(dict(limits.items() - self.limits.items()))
        except Error as error:
            if any(each.memory or each.cpu for each in limits.values()):
                raise
            log.warning("nothing limits memory and processors: %s", error)
            self.context.has_limits = False
        self.limits = limits

    async def watch_usage(self) -> None:
        """Tell the teacher once of each student who has come to a limit."""
        known: dict[int, Usage] = {}
        last_told: dict[tuple[str, str], float] = {}
        while self.context.has_limits:
            used, now = 0, time.monotonic()
            for server in list(self.servers.values()):
                uid, name = server.member.uid, server.username
                usage = read_usage(uid)
                if not usage:
                    continue

                used += usage.memory
                for kind, words in news_of(usage, known.get(uid, usage)):
                    if now - last_told.get((name, kind), -QUIET_SECONDS) >= QUIET_SECONDS:
                        log.warning("%s: %s", name, words)
                    last_told[name, kind] = now
                known[uid] = usage

            self.memory = used
            # A look takes half a millisecond for each student.
            await asyncio.sleep(max(USAGE_SECONDS, len(self.servers) / 50))

    def hand_over(self, certificate: Certificate) -> None:
        """Serve with a certificate from now on, on all ports."""
        self.context.certificate, self.end = certificate, certificate.end()
        running = [server for server in self.servers.values() if server.process]
        kept = [each.username for each in running if not each.hand_over(certificate)]
        if kept:
            log.warning(
                "these notebooks keep their certificate until shutdown: %s", ", ".join(kept)
            )

    async def watch_certificate(self) -> NoReturn:
        """Look once a day if the certificate is another, or ends soon."""
        while True:
            await asyncio.sleep(CERTIFICATE_LOOK_SECONDS)
            try:
                # An address that the host gains in a lesson is no reason for a new one,
                # which students would have to install.
                context = self.context
                look = functools.partial(
                    ensure_certificate, context.config, context.certificate.names
                )
                certificate = await asyncio.to_thread(look)
                if certificate != self.context.certificate:
                    self.hand_over(certificate)
                    self.say_fingerprints()
                    self.web.greet()
            except (Error, OSError) as error:
                log.error("the certificate: %s", explain(error))

    async def show_status(self) -> None:
        """Keep a line on the terminal up to date, if this is one."""
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        if not self.context.has_limits:
            threading.Thread(target=self.watch_memory, daemon=True).start()
        status = tqdm(bar_format="{desc}", file=sys.stderr, leave=False)
        with logging_redirect_tqdm(), status as line:
            while True:
                counts = [f"{self.count(state)} {state.value}" for state in ServerState]
                text = (
                    f"{', '.join(counts)}; students hold {format_bytes(self.memory)};"
                    f" load {os.getloadavg()[0]:.1f}"
                )
                line.set_description_str(text[: shutil.get_terminal_size().columns - 1])
                await asyncio.sleep(1)

    def watch_memory(self) -> None:
        """Sum up, in a thread that a student may hold up, what their processes hold."""
        while True:
            uids = [server.member.uid for server in list(self.servers.values())]

            total = 0
            for process in itertools.chain(*processes_by_uid(uids).values()):
                with contextlib.suppress(OSError, psutil.Error):
                    total += process.memory_full_info().pss
            self.memory = total
            time.sleep(MEMORY_SECONDS)

    async def reload(self) -> None:
        """Read the configuration and the list again; servers that run stay untouched.

        If either is bad all goes on as before, except for those who have left.
        """
        try:
            # A student may block all who look into the course's directory, or write there.
            course = await asyncio.to_thread(load_course, self.context.config.path)
            if course.config.port != self.context.config.port:
                log.warning("another `port` counts from the next launch on")
            config = dataclasses.replace(course.config, port=self.context.config.port)
            course = dataclasses.replace(course, config=config, options=self.options)
            gateway = await asyncio.to_thread(read_gateway, config)
            certificate = await asyncio.to_thread(ensure_certificate, config)
            language = await asyncio.to_thread(read_language, config.language)
            ensure_capacity(course)
            with course.roster.locked():
                gone = self.servers_not_in(course.roster)
                await self.close_servers(gone)
                self.open_servers(course)
                await asyncio.to_thread(self.save_ports, course.roster)
        except BusyError:  # the setup that has told us still holds the list
            self.reload_wanted.set()
            await asyncio.sleep(1)
            return
        except (Error, OSError) as error:
            for line in explain(error).splitlines():
                log.error("not reloaded: %s", line)
            # close_servers may have run before the failure: those students are dropped from
            # the page.
            self.web.greet()
            return

        self.context.config, self.context.language = config, language
        self.context.gateway = gateway
        if certificate != self.context.certificate:
            self.hand_over(certificate)
            self.say_fingerprints()
        new = [server for server in self.servers.values() if not server.task]
        try:
            await asyncio.to_thread(self.limit)
        except Error as error:
            log.error("the limits are those from before: %s", error)
        for server in new:
            server.start_tending(self.context)
        self.web.greet()
        say(f"Reloaded: {counted(len(new), 'student')} came, {len(gone)} left.")

    async def change_password(self, wish: NewPassword) -> None:
        """Give a student a new password, end what the old one has opened, and answer."""
        await asyncio.sleep(GUESS_SECONDS)

        try:
            server = await self.write_password(wish)
            log.info("%s: has a new password", wish.username)
            while server.state is ServerState.STARTING:  # meanwhile, with the old one
                await asyncio.sleep(0.1)
            if server.process:
                uid, pid = server.member.uid, server.process.pid
                every = processes_by_uid([uid])[uid]
                # Of other courses.
                spared = {x.pid for x in every if read_name(x.pid) == SERVER_NAME} - {pid}
                await asyncio.to_thread(end_families, {uid: {pid}}, spared)
            answer = CHANGED

        except Refusal as refusal:
            answer = refusal.phrase
        except Exception as error:  # whatever it is, the student must have an answer
            log.warning("%s: no new password: %s", wish.username, explain(error))
            answer = Phrase("Not changed: try again in a minute, or ask your teacher.")

        self.web.tell(NewPassword(wish.username, "", "", answer))

    async def write_password(self, wish: NewPassword) -> Server:
        """Write a new password into the list, if the old one is right.

        Returns: the server, which has the old one. Raises: Refusal, Error or OSError.
        """
        wrong = Phrase("The user name or the old password is wrong.")
        server, username = self.servers.get(wish.username), wish.username
        if not server:  # no log shows what a stranger has typed
            raise Refusal(wrong)
        roster = Roster(self.context.config.user_list)
        # Before it is locked, or who tries passwords would stop commands of the teacher's.
        if not is_password_of(roster, username, wish.old):
            raise Refusal(wrong)
        check_new_password(wish)

        with roster.locked():
            if not is_password_of(roster, username, wish.old):  # it has been read again
                raise Refusal(wrong)
            if server.state is ServerState.STARTING:
                raise Refusal(
                    Phrase("Your notebook is just being started: try again in a minute.")
                )

            roster.update(username, nb_pass=wish.new)
            await asyncio.to_thread(roster.save)
            student = next(each for each in roster.students if each.username == username)
            server.update(dataclasses.replace(server.member, student=student))
        return server

    def servers_not_in(self, roster: Roster) -> list[Server]:
        """Return the servers of those who are no longer students."""
        members = [each for each in find_members(roster.students) if each.student.nb_pass]
        uids = {member.username: member.uid for member in members}
        return [x for x in self.servers.values() if uids.get(x.username) != x.member.uid]

    async def close_servers(self, servers: Sequence[Server]) -> None:
        """End the servers and kernels of students who left, and give up their ports."""
        for server in servers:
            del self.servers[server.username]
            self.left.add(server.username)
        await end_tasks([server.task for server in servers if server.task])
        # At once, since each look goes through all processes of the host.
        known = {x.member.uid: {x.process.pid} for x in servers if x.process}
        await asyncio.to_thread(end_families, known)
        for server in servers:
            server.close()


# == The commands ==========================================================================
#
# In the order of the usage line, each with the steps for one member that its workers take.
# A command returns its exit status.

MAX_NOTEBOOK_BYTES = 1 << 24  # of longer ones the kernel is not looked for
PROFILE_FILES = re.compile(r"startup|(startup/)?[^/]+\.py")  # of an IPython profile


def is_closed(path: Path, need: int = os.R_OK) -> bool:
    """Say whether we may not read a file, or enter a directory and read it."""
    need |= os.X_OK if os.path.isdir(path) else 0
    return not os.access(path, need, effective_ids=True)


def first_closed_step(paths: Iterable[Path]) -> Path | None:
    """Return the first directory or file, on the way to these, that is closed to us."""
    steps = ((x, x == path) for path in paths for x in (*reversed(path.parents), path))
    closed = (x for x, is_last in steps if is_closed(x, os.R_OK if is_last else 0))
    return next(closed, None)


def check_reachable() -> None:
    """Refuse to go on with software that students cannot execute and read.

    Their kernels run with this interpreter and its libraries. Raises: UsageError.
    """
    specs = map(importlib.util.find_spec, ("notebook", "ipykernel", "zmq"))
    origins = [str(spec.origin) for spec in filter(None, specs)]
    if len(origins) < 3:
        raise UsageError(f"{sys.executable} has no Jupyter Notebook; {CURE}")

    # A link and what it leads to may lie in different directories.
    targets = [sys.executable, os.__file__, shutil.__file__, *origins]
    paths = [Path(each) for each in (*targets, *map(os.path.realpath, targets))]
    packages_dir = Path(origins[0]).parent.parent
    entries = list(packages_dir.iterdir())
    with acting_as(identity_of(pwd.getpwnam("nobody"))):
        closed = first_closed_step(paths)
        packages = {re.split("[-.]", x.name)[0] for x in entries if is_closed(x)}
    if closed:
        raise UsageError(
            f"students cannot execute {sys.executable}: {closed} is closed to them;"
            " install notebooks.py where everyone may read, as `sudo make install` does"
            " (into /opt/notebooks), and run that"
        )

    if packages:  # installed with a private umask
        place = packages_dir if sys.prefix == sys.base_prefix else Path(sys.prefix)
        log.warning(
            "students cannot read the packages %s: run `chmod -R go+rX %s`",
            *(", ".join(sorted(packages)), shlex.quote(str(place))),
        )


def warn_of_readers(config: Config) -> None:
    """Say which directories students can keep locked: see `write_beside`."""
    student = identity_of(pwd.getpwnam("nobody"))
    gids = [each.gr_gid for each in grp.getgrall() if each.gr_name == config.group]
    student = student._replace(groups=(*student.groups, *gids))
    places = [config.path.parent, config.user_list.parent, config.storage_dir]
    places += filter(None, [config.archive_dir])

    for place in sorted({Path(os.path.realpath(each)) for each in places}):
        with acting_as(student):
            is_closed_to_them = first_closed_step([place]) is not None
        if is_closed_to_them:
            continue
        is_own = len(place.parts) > 2  # not /etc, nor /srv
        cure = f"`chmod go-r {shlex.quote(str(place))}`" if is_own else "use one of its own"
        log.warning(
            "students can read %s, and keep who writes there waiting for ever: %s",
            *(place, cure),
        )


def command_setup(course: Course) -> int:
    """Make what is missing: group, accounts, passwords, directories, profiles.

    Passwords are in the list before an account has them, and which accounts have none yet
    can be seen: a setup that was interrupted anywhere is finished by the next one.
    """
    check_reachable()
    check_programs()
    config, roster = course.config, course.roster
    warn_of_readers(config)
    roster.check_writable()
    check_group(course)
    for note in roster.notes():
        log.warning("%s: %s", roster.path, note)
    if config.profile and not config.profile_dir.is_dir():
        log.warning("there is no %s to copy", config.profile_dir)

    outcome = Outcome()
    counts = {"new": 0, "adopted": 0, "kept": 0}
    with host_locked(), roster.locked():
        make_usernames(course)
        warn_of_strays(course)
        made = prepare_passwords(course)
        if config.group:
            run_program(["groupadd", "--force", "--", config.group])
            if not is_local_group(config.group):
                text = "group %s is not in /etc/group: nobody is put into it"
                log.warning(text, config.group)
        done = ensure_accounts(course, outcome)
        members = outcome.members([*done])
        furnish = functools.partial(furnish_home, config)
        ensure_limits(config, members, outcome)
        for member, _ in outcome.each(furnish, members, "homes"):
            counts[done[member.student]] += 1
            outcome.done(member.username, done[member.student])
        for username in made:
            # Somebody else may make this account, with a password of their own.
            if not find_account(username):
                roster.update(username, sys_pass="")
        roster.save()  # if it was changed meanwhile, the passwords are not lost

    reload_launcher(config)
    renewed = sum(made.values())
    passwords = f"; {renewed} got new system passwords" if renewed else ""
    return outcome.finish(
        f"{counted(counts['new'], 'account')} made, {counts['adopted']} adopted,"
        f" {counts['kept']} kept{passwords}. The passwords are in {roster.path}."
    )


def make_password(length: int) -> str:
    """Return so many letters and digits, in groups such as Kq7m-x3Tf-9ZpW.

    Each of the kinds that password policies ask for is there: pam_pwquality(8), minclass.
    """
    kinds = (str.islower, str.isupper, str.isdigit)
    letters = ""
    while not all(any(map(is_kind, letters)) for is_kind in kinds):
        letters = "".join(secrets.choice(PASSWORD_ALPHABET) for _ in range(length))
    groups = range(0, length, PASSWORD_GROUP)
    return "-".join(letters[i : i + PASSWORD_GROUP] for i in groups)


def taken_names() -> set[str]:
    """Return the names of groups, since an account has one, and of homes left over."""
    base = useradd_defaults()["HOME"]
    homes = os.listdir(base) if os.path.isdir(base) else []
    return {*homes, *PRIVILEGED, *(group.gr_name for group in grp.getgrall())}


def free_username(wish: str, taken: Collection[str]) -> str:
    """Return a name that nobody has in the list or on this host."""
    others = (f"{wish[:28]}-{number}" for number in itertools.count(2))
    names = (x for x in itertools.chain([wish], others) if x not in taken)
    return next(x for x in names if not find_account(x))


def make_usernames(course: Course) -> None:
    """Write a user name into each row that has none, and say which."""
    roster = course.roster
    if course.options.only is not None or "" not in roster.rows:
        return
    wishes = collections.Counter(student.wish for student in roster.students)
    taken = {*roster.rows, course.config.group, *taken_names()}

    made = []
    for row, student in zip(roster.document.rows, roster.students, strict=True):
        if student.username:
            continue
        username = student.wish
        # A newly exported list lacks the names of accounts that are there already.
        if wishes[username] > 1 or not is_account_of(student, username, course.config):
            username = free_username(username, taken)
        taken.add(username)
        roster.name_row(row, username)
        name = printable(student.full_name or student.email)
        made.append(f"line {student.line}: made the user name {username} for {name}")

    roster.save()
    for text in made:
        say(text)


def prepare_passwords(course: Course) -> dict[str, bool]:
    """Fill empty password cells; return whose, and if an account has lost its old one."""
    config, roster, made = course.config, course.roster, {}
    for student in course.students:
        if not student.nb_pass:
            roster.update(student.username, nb_pass=make_password(config.password_length))

        account = find_account(student.username)
        if not student.sys_pass and (account is None or is_owned(account, config)):
            if account:  # nobody knows its password any more
                run_program(["usermod", "--password", "!", "--", student.username])
            made[student.username] = account is not None
            roster.update(student.username, sys_pass=make_password(config.password_length))

    roster.save()
    return made


def set_missing_password(student: Student, config: Config) -> None:
    """Give one of our accounts that has no system password the one in the list.

    Raises: Error if PAM refuses it, with its words.
    """
    # `!` before a password is something else: somebody has locked that account.
    is_missing = read_shadow(student.username)[1:2] == ["!"]
    if is_missing and is_owned(find_account(student.username), config):
        try:
            run_program(["chpasswd"], f"{student.username}:{student.sys_pass}\n")
        except Error as error:
            where = f"line {student.line} of the list"
            raise Error(f"the sys-pass in {where} is refused: {error}") from None


def ensure_accounts(course: Course, outcome: Outcome) -> dict[Student, str]:
    """Make the accounts, with passwords; return what was done for whom."""
    config, students, done = course.config, course.students, {}
    for student in progress(students, len(students), "accounts"):
        try:
            with outcome.step(student.username):
                done[student] = ensure_account(student, config)
        finally:
            # One that was made before an interruption gets its password, too.
            with uninterrupted(), outcome.step(student.username):
                set_missing_password(student, config)
    return done


def ensure_limits(config: Config, members: Sequence[Member], outcome: Outcome) -> None:
    """Set limits of these members, also of those who run something."""
    limits = limits_by_uid(config, members)
    try:
        set_limits(limits)
    except Error as error:
        log.warning("the limits are not set: %s", error)

    for member in members:
        with outcome.step(member.username):
            own = limits.get(member.uid)
            if own and (own.disk or config.disk):
                set_quota(member.account, own.disk)


def furnish_home(config: Config, member: Member) -> None:
    """Make the home and the tutorial directory in it, and copy the IPython profile."""
    ensure_home(member.account, config)
    tutorial = member.home, config.tutorial_dir.parts
    os.close(open_directory(tutorial, member.identity, create=True))

    source = config.profile_dir
    if config.profile and source.is_dir():
        reader = identity_of(invoking_account())
        copy = TreeCopy(reader, member.identity, recorded=False)
        copy.wanted = lambda path: PROFILE_FILES.fullmatch(str(path)) is not None
        problem = copy.run((source, ()), (member.home, source.parts[-2:])).problem
        if problem:
            raise Error(f"the IPython profile: {problem}")


def command_send(course: Course) -> int:
    """Copy the material into each account; `keep_changed` says what becomes of changes."""
    looks, told = look_at_material(course)
    for what, names in told.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        log.warning("%s %s%s", what, ", ".join(sorted(names)[:MAX_NAMED]), more)
    shared_dir = course.config.shared_dir
    if shared_dir:
        check_shared(shared_dir, course)
    with course.roster.locked():
        plan_send(course, looks)

    def send(member: Member) -> CopyReport:
        report = send_to(course, looks, member).report
        if shared_dir:
            report.backups += link_shared(shared_dir, course.config, member)
        return report

    return copy_for_all(course, "send", send)


def check_shared(directory: Path, course: Course) -> None:
    """Refuse a directory that students cannot read, or can write to: raises UsageError."""
    for member in find_members(course.students):
        with acting_as(member.identity):
            real = Path(os.path.realpath(directory))
            closed = first_closed_step([directory, real])
            writable = any(
                os.access(x, os.W_OK, effective_ids=True)
                and (x == real or not x.stat().st_mode & stat.S_ISVTX)
                for x in (real, *real.parents)
            )

        if closed or writable and is_ours(member.account):
            raise UsageError(
                f"{course.config.path}: [Setup] shared_dir = {directory}:"
                f" {f'{closed} is missing or closed to' if closed else 'can be changed by'}"
                f" {member.username}; let students read it, and no more (chmod a+rX,go-w)"
            )


def link_shared(shared_dir: Path, config: Config, member: Member) -> int:
    """Make the link to the shared directory; return how many things it moved aside."""
    name, kept = shared_dir.name, 0
    tutorial = member.home, config.tutorial_dir.parts

    with (
        closing(open_directory(tutorial, member.identity, create=True)) as fd,
        acting_as(member.identity),
    ):
        with contextlib.suppress(OSError):
            if os.readlink(name, dir_fd=fd) == str(shared_dir):
                return 0
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, free_name(MY_COPY, name, fd), src_dir_fd=fd, dst_dir_fd=fd)
            kept = 1
        os.symlink(shared_dir, name, dir_fd=fd)
    return kept


@dataclasses.dataclass
class MaterialLook(TreeCopy):
    """A dry run that leads nowhere, for what is the same for all students."""

    directory: Path = Path()
    left_out: set[Path] = dataclasses.field(default_factory=set)
    told: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of which paths

    def tell(self, what: str, path: Path, reason: str = "") -> None:
        name = str(self.directory / path)[:MAX_SHOWN_PATH]
        self.told.setdefault(what, []).append(f"{name!r}{reason}")

    def copy_file(self, item: Item) -> None:
        if has_holes(item.info) and item.info.st_uid not in (0, self.reader.uid):
            self.leave_out(item.path, OSError(0, "is somebody else's, and has holes"))
            return
        digest = self.digest_of(item.info, item.fd)  # kept, for the copies
        self.originals[self.directory.name / item.path] = item.info.st_size, digest

        if item.path.suffix == ".ipynb":
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                notebook = json.loads(os.pread(item.fd, MAX_NOTEBOOK_BYTES, 0))
                spec = notebook.get("metadata", {}).get("kernelspec", {})
                kernel = str(spec.get("name") or "")[:MAX_SHOWN_PATH]
                if kernel not in installed_kernels():
                    named = f"kernel {kernel!r}, not installed," if kernel else "no kernel"
                    self.tell(f"{named} is named by", item.path)

    def leave_out(self, path: Path, error: OSError) -> None:
        reason = "leads to nothing" if error.errno == errno.ENOENT else error.strerror
        self.tell("not sent:", path, f" ({reason})")
        self.left_out.add(path)


Looks = dict[Path, MaterialLook]  # by the directories that are sent


@functools.cache
def installed_kernels() -> set[str]:
    """Return the names of the kernels that everybody has: jupyter_client.kernelspec."""
    roots = map(Path, (sys.prefix, "/usr/local", "/usr"))
    files = "share/jupyter/kernels/*/kernel.json"
    return {"python3"} | {x.parent.name.lower() for root in roots for x in root.glob(files)}


def look_at_material(course: Course) -> tuple[Looks, dict[str, list[str]]]:
    """Look through each directory to be sent; return what was seen, and what to tell.

    Raises: UsageError if the material cannot be read.
    """
    config, base = course.config, course.config.material_base
    reader = identity_of(invoking_account())
    private = config.private_paths
    if base != config.material_dir:  # one student's material is beside the others'
        private.append(Path(os.path.realpath(base)))

    looks: Looks = {}
    told: dict[str, list[str]] = {}
    usernames = [student.username for student in course.students if student.username]
    names = {config.of(username).material_dir: username for username in usernames}

    for own, username in names.items():
        look = MaterialLook(reader, reader, dry_run=True, recorded=False, follows=True)
        look.wanted, look.forbidden = config.is_wanted, private
        look.directory, look.told = own, told
        try:
            look.run((base, own.relative_to(base).parts), NOWHERE)
            looks[own] = look
        except Error as error:
            if own == base or not base.is_dir():
                where = f"{config.path}: [Setup] material_dir"
                raise UsageError(f"{where}: {error}") from None
            told[f"{username} is sent nothing:"] = [str(error)]
    return looks, told


def send_to(
    course: Course, looks: Looks, member: Member, dry_run: bool = False
) -> TreeCopy:
    """Copy a member's material into their home; return the copy, which has the report."""
    config, base = course.config.of(member.username), course.config.material_base
    copy = TreeCopy(
        identity_of(invoking_account()),
        member.identity,
        keep_as=MY_COPY if config.keep_changed else "",
        # Without `keep_changed` there is no mercy, as in 2012.
        reset=course.options.reset or not config.keep_changed,
        dry_run=dry_run,
        follows=True,
    )

    look = looks.get(config.material_dir)
    if look:
        copy.wanted = lambda path: look.wanted(path) and path not in look.left_out
        copy.digests, copy.forbidden = look.digests, look.forbidden
        material = base, config.material_dir.relative_to(base).parts
        copy.run(material, (member.home, config.material_name.parts))
    return copy


def check_room(
    needed: Mapping[int, int],
    free: Mapping[int, tuple[int, Path]],
    homes: Mapping[int, int],
) -> None:
    """Refuse to send more than file systems, by device, have room for: UsageError."""
    for device, (free_bytes, home) in free.items():
        missing = needed[device] - free_bytes
        # A file system of one student's own must not keep the others from the material.
        if missing > 0 and (homes[device] > 1 or len(free) == 1):
            raise UsageError(
                f"{format_bytes(missing)} are missing in the file system of {home} to send"
                f" {format_bytes(needed[device])}; nothing was copied"
            )


def plan_send(course: Course, looks: Looks) -> None:
    """Make sure that there is room, and that nobody's work is replaced unawares.

    Raises: UsageError; nothing was copied.
    """

    def plan(member: Member) -> tuple[int, int, int, CopyReport]:
        copy = send_to(course, looks, member, dry_run=True)
        # Of one descriptor: a student may mount something on their home at any moment.
        with closing(open_directory((member.home, ()), member.identity)) as fd:
            space, device = os.fstatvfs(fd), os.fstat(fd).st_dev
        return device, space.f_bavail * space.f_frsize, copy.needed_bytes, copy.report

    needed: dict[int, int] = collections.Counter()
    homes: dict[int, int] = collections.Counter()
    free: dict[int, tuple[int, Path]] = {}
    replaced = {}
    outcome = Outcome()  # what fails now fails again when it is done
    for member, found in outcome.each(plan, find_members(course.students), "look"):
        device, free_bytes, needed_bytes, report = found
        needed[device] += needed_bytes
        homes[device] += 1
        free[device] = free_bytes, member.home
        if report.overwritten:
            replaced[member.username] = report.named

    check_room(needed, free, homes)
    if replaced and sys.stdin.isatty() and not course.options.yes:
        for username, named in replaced.items():
            log.warning("%s has changed what is replaced for good: %s", username, named)
        whose = f"{counted(len(replaced), 'student')}? (keep_changed = yes keeps copies)"
        confirm(f"Replace the changed files of {whose}", "nothing was copied")


def copy_for_all(course: Course, label: str, copy: Callable[[Member], CopyReport]) -> int:
    outcome, total = Outcome(), CopyReport()
    with course.roster.locked():
        members = outcome.members(course.students)
        if not members:
            raise UsageError(f"{course.roster.path}: nobody has an account; run setup")
        for member, report in outcome.each(copy, members, label):
            outcome.done(member.username, str(report))
            if report.overwritten:
                text = "%s had changed what was replaced for good: %s"
                log.warning(text, member.username, report.named)
            if report.renamed:
                text = "%s: the storage cannot hold each name as it is: %s"
                log.warning(text, member.username, report.named)

            if report.problem:
                outcome.failed(member.username, report.problem)
            total.add(report)

    return outcome.finish(
        f"{counted(len(members), 'student')}: {total};"
        f" {format_bytes(total.copied_bytes)} copied."
    )


def command_launch(course: Course) -> int:
    """Start the servers and serve the web page until SIGTERM or Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until it is handled
    setproctitle.setproctitle(f"{LAUNCHER_TITLE}{course.config.path}")
    if not sys.stderr.isatty():
        log.setLevel(min(log.level, logging.INFO))  # a line per event
    check_reachable()
    config, roster = course.config, course.roster
    roster.warn_of_editors()
    warn_of_readers(config)
    if not any(member.student.nb_pass for member in find_members(course.students)):
        raise UsageError(f"{roster.path}: nobody has an account and a password; run setup")
    if keyctl_number() is None:
        log.warning(
            "on this processor students' processes keep the session keyring of this"
            " launch: start it where it holds no keys, as `keyctl session - ...` does"
        )

    if config.debugger:
        log.warning(
            "debugger = yes: who debugs a notebook opens a TCP port of 127.0.0.1 without a"
            " password, through which any account of this host can run code as they"
        )

    gateway = read_gateway(config)
    if gateway.url.startswith("http:"):
        log.warning(
            "gateway_url is not https: the token goes in plain text to whoever answers"
            " there, such as a student of this host while the gateway is down"
        )
    ensure_capacity(course)
    check_limits(course)
    certificate = ensure_certificate(config)
    launcher = Launcher(course, certificate, gateway, bind_base_port(config))
    with roster.locked():
        launcher.open_servers(course)
        launcher.save_ports(roster)
    launcher.hand_over(certificate)  # to those that were adopted
    launcher.limit()
    return asyncio.run(launcher.run())


def command_shutdown(course: Course) -> int:
    """End the notebook servers, kernels and terminals of all students at once."""
    warn_of_strays(course)
    outcome = Outcome()
    members = find_members(course.students)
    with outcome.step("a server that is starting"):
        wait_for_starts(course.config.path)
    if course.options.everything:
        ended = end_everything(members, outcome)
    else:
        ended = stop_jupyter(course.config, members, outcome)

    # What has left its session, on purpose or not, belongs to no kernel any more.
    running = processes_by_uid({x.uid for x in ended} - {invoking_account().pw_uid})
    for member, _ in outcome.each(clear_runtime_dir, ended, "shutdown"):
        others = running.get(member.uid)
        rest = f"; still runs {counted(len(others), 'other process')}" if others else ""
        outcome.done(member.username, f"shut down{rest}")
    clear_empty_runtime_dir()

    busy = ", ".join(x.username for x in ended if running.get(x.uid))
    if busy:
        log.warning("%s: other programs run on; shutdown --everything ends them", busy)
    launcher = launcher_of(course.config)
    if launcher:
        log.warning(
            "launch still runs (pid %d) and starts servers again when they are visited;"
            " end it with Ctrl-C or SIGTERM",
            launcher,
        )
    return outcome.finish(
        f"The notebooks of {counted(len(members), 'student')} are shut down."
    )


def command_retrieve(course: Course) -> int:
    """Copy the students' work into the storage; nothing there is lost."""
    config = course.config
    owner = config.storage_owner

    try:
        with acting_as(identity_of(owner)):
            config.storage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{config.path}: [Shutdown] storage_dir: {config.storage_dir} cannot be"
            f" made by its owner {owner.pw_name}: {error.strerror}"
        ) from None
    looks: Looks = {}
    with contextlib.suppress(UsageError):  # the material may be gone by now
        looks, _ = look_at_material(course)
    retrieve = functools.partial(retrieve_from, config, looks)
    return copy_for_all(course, "retrieve", retrieve)


def retrieve_from(
    config: Config, looks: Looks, member: Member, dry_run: bool = False
) -> CopyReport:
    """Copy one member's tutorial directory into the storage, or count what that is."""
    if config.storage_dir.is_relative_to(member.home / config.tutorial_dir):
        raise Error("storage_dir lies in what is to be retrieved; set another")

    # All who may read the storage may read what comes into it, such as the group of a
    # setgid directory.
    mode = 0
    with contextlib.suppress(OSError):  # it is not there yet: a dry run
        mode = os.stat(config.storage_dir).st_mode & 0o2070
    own = config.of(member.username).material_dir
    copy = TreeCopy(
        member.identity,
        identity_of(config.storage_owner),
        originals=looks[own].originals if own in looks else {},
        keep_as=KEPT_COPY,
        keep_all=True,
        limit=config.retrieve_limit,
        # A teacher's git in the storage would run what a student's .git/config says.
        wanted=lambda path: config.is_wanted(path) and path.name.lower() != ".git",
        mode=mode,
        dry_run=dry_run,
        uncounted=Path(config.shared_dir.name) if config.shared_dir else None,
    )
    tutorial = member.home, config.tutorial_dir.parts
    return copy.run(tutorial, (config.storage_dir, (member.username,)))


def command_remove(course: Course) -> int:
    """Delete the accounts that setup made, after asking."""
    check_programs()
    config, roster = course.config, course.roster
    roster.check_writable()
    warn_of_strays(course)
    reasons = ask_before_removal(course, find_members(course.students))

    outcome = Outcome()
    with host_locked(), roster.locked():
        # What has changed since the question: fewer may be deleted, but no others.
        members = [x for x in find_members(roster.students) if x.username in reasons]
        others = [member for member in members if reasons[member.username]]
        doomed = [x for x in members if x not in others and may_go(x, config)]
        deleted = delete_accounts(doomed, course, outcome)
        leave_members(others, course, outcome)
        with outcome.step("systemd"):
            forget_host()

    reload_launcher(config)
    group = f", group {config.group} deleted" if remove_empty_group(config.group) else ""
    return outcome.finish(
        f"{counted(deleted, 'account')} deleted, {len(others)} left{group}."
    )


def ask_before_removal(course: Course, members: Sequence[Member]) -> dict[str, str]:
    """Say what remove will do, and ask; return why each account stays, if it does."""
    reasons = {x.username: reason_to_stay(x, course.config) for x in members}
    doomed = {x.username: x for x in members if not reasons[x.username]}
    for username in filter(reasons.get, reasons):
        files = f"~{username}/{course.config.tutorial_dir}"
        say(f"{username} {reasons[username]}: it only leaves the course; {files} stays.")

    here = {user.name for user in psutil.users()}.intersection(doomed)
    if here:
        say(f"Logged in at this moment: {', '.join(sorted(here))}.")
    if members:
        describe_homes(course.config, list(doomed.values()))

    if doomed and not course.options.yes:
        accounts = counted(len(doomed), "account")
        question = f"Delete {accounts} and everything in their homes?"
        confirm(question, "nothing was deleted")
    return reasons


def may_go(member: Member, config: Config) -> bool:
    """Say whether an account that was to be deleted, when remove asked, still is."""
    reason = reason_to_stay(member, config)
    if reason:
        log.warning("%s %s by now: left as it is", member.username, reason)
    return not reason


def leave_members(members: Sequence[Member], course: Course, outcome: Outcome) -> None:
    config, roster = course.config, course.roster
    stop_jupyter(config, [x for x in members if is_ours(x.account)], outcome)
    for member in members:
        with outcome.step(member.username):
            reason = reason_to_stay(member, config) or "was somebody else's"
            outcome.done(member.username, f"{reason}; the account stays")
            if may_limit(member.account, config):
                forget_limits(slice_of(member.uid))
            leave_course(member, config, roster)
    roster.save()


def delete_accounts(members: Sequence[Member], course: Course, outcome: Outcome) -> int:
    """End all that these members run, delete their accounts, and return how many."""
    ended = []
    for member in members:
        with outcome.step(member.username):
            end_account(member)
            ended.append(member)
    packed = dict.fromkeys(ended, True)
    if course.config.archive_dir:
        pack = functools.partial(archive_home, course.config)
        packed = dict(outcome.each(pack, ended, "archives"))
        ended = list(packed)
    delete_public_files([member.uid for member in ended])

    deleted = 0
    for member in progress(ended, len(ended), "remove"):
        # First, so that no row has the password of an account that is gone.
        course.roster.update(member.username, sys_pass="", nb_pass="", port="")
        course.roster.save()
        with outcome.step(member.username):
            if not packed[member] and is_home_of(member.account):
                raise Error("not deleted: their home is there again; run remove again")
            remove_account(member)
            outcome.done(member.username, "account and home deleted")
            deleted += 1
    return deleted


@dataclasses.dataclass
class HomeLook(TreeCopy):
    """A dry run that leads nowhere, for what is in a home."""

    tutorial_dir: PurePath = PurePath()
    size: int = 0
    outside: int = 0  # files that no retrieve copies

    def copy_file(self, item: Item) -> None:
        self.size += item.info.st_blocks * 512
        # What is hidden belongs to programs.
        is_work = not item.path.parts[0].startswith(".")
        is_git = ".git" in map(str.lower, item.path.parts)
        self.outside += is_work and (
            is_git or not item.path.is_relative_to(self.tutorial_dir)
        )


def look_at_home(config: Config, member: Member) -> tuple[int, int, bool, str]:
    """Look at a home as its owner can see it.

    Returns: its bytes, the number of files that no retrieve copies, whether it has work
    that was not retrieved, and why some of it could not be looked at.
    """
    look = HomeLook(member.identity, member.identity, dry_run=True, recorded=False)
    look.tutorial_dir, look.limit = config.tutorial_dir, MAX_ENTRIES * ENTRY_BYTES
    look.run((member.home, ()), NOWHERE)

    try:
        work = retrieve_from(config, {}, member, dry_run=True)
    except Error as error:
        return look.size, look.outside, False, str(error)
    has_work = bool(work.new or work.updated or work.over_limit)
    return look.size, look.outside, has_work, work.first_failure


def describe_homes(config: Config, members: Sequence[Member]) -> None:
    looks, size, unretrieved, outside = Outcome(), 0, [], []
    look = functools.partial(look_at_home, config)
    for member, (used, files, has_work, problem) in looks.each(look, members, "homes"):
        size += used
        if has_work:
            unretrieved.append(member.username)
        if files:
            outside.append(f"{member.username} ({files})")
        if problem:
            looks.failed(member.username, problem)

    accounts = counted(len(members), "account")
    say(f"{accounts} that setup made, with {format_bytes(size)}, will be deleted.")
    if unretrieved:
        say(f"Work that was not retrieved: {', '.join(sorted(unretrieved))}.")
    if config.archive_dir and members:
        say(f"Each home is packed into {config.archive_dir} before.")
    elif outside:
        where = f"outside ~/{config.tutorial_dir}, or in .git"
        say(f"Files that are never retrieved ({where}): {', '.join(sorted(outside))}.")
    for username, reason in looks.failures.items():
        say(f"{username}: their work could not be looked at: {reason}")


# == The command line ======================================================================

COMMANDS: dict[str, Callable[[Course], int]] = {
    "setup": command_setup,
    "send": command_send,
    "launch": command_launch,
    "shutdown": command_shutdown,
    "retrieve": command_retrieve,
    "remove": command_remove,
}
# What this script is executed as by the launcher, with the number of a descriptor.
ROLES: dict[str, Callable[[Channel], None]] = {
    "template": lambda channel: run_template(channel, preload_server),
    "webserver": run_webserver,
}


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
        sub.set_defaults(yes=False, reset=False, everything=False)
        text = "configuration file (%(default)s)"
        sub.add_argument("config", nargs="?", type=Path, default="notebooks.cfg", help=text)
        text = "say more; -vv also which programs are run"
        sub.add_argument("-v", "--verbose", action="count", default=0, help=text)

        text = "some students alone, by their user names"
        sub.add_argument("--only", type=parse_names, metavar="NAME[,NAME...]", help=text)
        if name in ("send", "remove"):
            sub.add_argument("--yes", action="store_true", help="do not ask")
        if name == "shutdown":
            text = "end all that they run, also by ssh and in other courses"
            sub.add_argument("--everything", action="store_true", help=text)
        if name == "send":
            text = "replace changed files even if the material has not changed"
            sub.add_argument("--reset", action="store_true", help=text)
    return parser


def parse_names(text: str) -> frozenset[str]:
    return frozenset(re.split(r"[,\s]+", text)) - {""}


def ensure_standard_streams() -> None:
    """Open /dev/null in the place of those that were closed, as by `>&-`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def run_command(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    os.umask(0o022)  # root's may be 077, and students must get at what is theirs
    log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)])
    if os.geteuid() != 0:
        raise UsageError(
            f"{options.command} needs root: run `sudo notebooks.py {options.command} ...`"
        )

    # It runs for weeks, in a process that is as small as it can be.
    if options.command == "launch" and not sys.flags.isolated:
        command = script_command(*arguments)
        os.execv(command[0], command)
    fields = [field.name for field in dataclasses.fields(Options)]
    wanted = Options(**{name: getattr(options, name) for name in fields})
    return COMMANDS[options.command](load_course(options.config, wanted))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: all done; 1: some students failed; 2: nothing was changed; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    ensure_standard_streams()
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("notebooks.py: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if len(arguments) == 3 and arguments[0] in ROLES and arguments[1].isdigit():
        ROLES[arguments[0]](Channel(fileno=int(arguments[1])))
        return 0

    try:
        return run_command(arguments)
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
        return Interrupted.exit_status


if __name__ == "__main__":
    sys.exit(main())
