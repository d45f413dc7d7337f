"""What the tests share: commands run for real, a course, a Jupyter client, a browser.

Everything that is started here is also ended here, and each wait has a deadline.
"""

import contextlib
import csv
import ctypes
import functools
import grp
import http.client
import http.cookies
import importlib.util
import itertools
import json
import multiprocessing
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.parse
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pexpect
import psutil
import pytest
import websocket
from selenium.common.exceptions import (
    WebDriverException,
)
from selenium.webdriver import chrome, webkitgtk
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.common.options import ArgOptions
from selenium.webdriver.remote.command import Command
from selenium.webdriver.remote.remote_connection import RemoteConnection
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

import notebooks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks.py"
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
READY = "Ready: https://"
CHROMIUM = "/usr/bin/chromium"
CHROMEDRIVER = "/usr/bin/chromedriver"
FIREFOX = "/usr/bin/firefox-esr"
MINIBROWSER = f"/usr/lib/{os.uname().machine}-linux-gnu/webkit2gtk-4.1/MiniBrowser"
WEBKIT_DRIVER = "/usr/bin/WebKitWebDriver"
XVFB = "/usr/bin/Xvfb"
WINDOW_MANAGER = "/usr/bin/ratpoison"  # gives windows the focus
CERTUTIL = "/usr/bin/certutil"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
CODE_CELL = ".jp-CodeCell"
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]  # axe-core's names of them
SECTIONS = {
    "Setup": "user_list tutorial_dir material_dir shared_dir password_length group"
    " keep_changed ignore profile",
    "Launch": "cert_file key_file server_address web_title language root_dir launch_dir"
    " start_page port list_students on_demand idle_minutes idle_kernel_minutes debugger"
    " tcp_kernels own_packages busy_minutes gateway_url gateway_token_file gateway_kernel"
    " gateway_ca",
    "Shutdown": "storage_dir owner retrieve_limit archive_dir archive_limit",
    "Limits": "memory cpu processes disk",
}
CA_CONFIGURATION = """\
[ca]
default_ca = tests
[tests]
database = {0}/database
new_certs_dir = {0}
rand_serial = yes
default_md = sha256
copy_extensions = copy
policy = any
[any]
commonName = supplied
"""

FIREFOX_PREFERENCES = (  # any free port, and nothing of the net
    '"marionette.port", 0',
    '"app.normandy.enabled", false',
    '"services.settings.server", "data:,"',
    '"datareporting.policy.dataSubmissionEnabled", false',
    '"toolkit.telemetry.server", ""',
    '"browser.startup.page", 0',
    '"browser.shell.checkDefaultBrowser", false',
    '"security.dialog_enable_delay", 0',
)
MARIONETTE_COMMANDS = {
    Command.NEW_SESSION: "WebDriver:NewSession",
    Command.QUIT: "Marionette:Quit",
    Command.SET_TIMEOUTS: "WebDriver:SetTimeouts",
    Command.GET: "WebDriver:Navigate",
    Command.GET_CURRENT_URL: "WebDriver:GetCurrentURL",
    Command.GET_TITLE: "WebDriver:GetTitle",
    Command.FIND_ELEMENT: "WebDriver:FindElement",
    Command.FIND_ELEMENTS: "WebDriver:FindElements",
    Command.FIND_CHILD_ELEMENT: "WebDriver:FindElement",
    Command.FIND_CHILD_ELEMENTS: "WebDriver:FindElements",
    Command.GET_SHADOW_ROOT: "WebDriver:GetShadowRoot",
    Command.FIND_ELEMENTS_FROM_SHADOW_ROOT: "WebDriver:FindElementsFromShadowRoot",
    Command.CLICK_ELEMENT: "WebDriver:ElementClick",
    Command.CLEAR_ELEMENT: "WebDriver:ElementClear",
    Command.SEND_KEYS_TO_ELEMENT: "WebDriver:ElementSendKeys",
    Command.GET_ELEMENT_TEXT: "WebDriver:GetElementText",
    Command.GET_ELEMENT_RECT: "WebDriver:GetElementRect",
    Command.W3C_EXECUTE_SCRIPT: "WebDriver:ExecuteScript",
    Command.W3C_EXECUTE_SCRIPT_ASYNC: "WebDriver:ExecuteAsyncScript",
    Command.W3C_ACTIONS: "WebDriver:PerformActions",
    Command.W3C_CLEAR_ACTIONS: "WebDriver:ReleaseActions",
    Command.W3C_GET_CURRENT_WINDOW_HANDLE: "WebDriver:GetWindowHandle",
    Command.W3C_GET_WINDOW_HANDLES: "WebDriver:GetWindowHandles",
    Command.SWITCH_TO_WINDOW: "WebDriver:SwitchToWindow",
    Command.SCREENSHOT: "WebDriver:TakeScreenshot",
}

Value = TypeVar("Value")

# ---------------------------------------------------------------------------------------
# Waiting, running, ending
# ---------------------------------------------------------------------------------------


def wait_until(predicate: Callable[[], Value], seconds: float, what: str) -> Value:
    """Return the predicate's first true value.

    Raises: TimeoutError that says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} seconds: {what}")
        time.sleep(0.05)
    return value


def command_line(
    arguments: tuple[object, ...], script: Path, python: str = ""
) -> list[str]:
    return [python or sys.executable, str(script), *map(str, arguments)]


def run(
    *arguments: object,
    script: Path = NOTEBOOKS,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run notebooks.py; `options` (input, user, extra_groups, cwd) are Popen's."""
    return subprocess.run(
        command_line(arguments, script),
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **(env or {})},
        timeout=timeout,
        **options,
    )


def start(command: str, *options: str, config: Path) -> "subprocess.Popen[str]":
    """Start notebooks.py in a process group of its own; the caller waits for it.

    It is a copy, which is not measured: coverage's own files suffer from a signal.
    """
    script = Path(shutil.copy(NOTEBOOKS, config.parent))
    arguments = (command, *options, config)
    return subprocess.Popen(
        command_line(arguments, script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def interrupt(process: "subprocess.Popen[str]", signum: int) -> str:
    """Send a signal to what `start` started; return its standard error.

    Meanwhile orphans are ours, to wait for: a useradd that was killed holds its lock
    while it is a zombie, and not every machine's first process is quick to reap.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        os.killpg(process.pid, signum)
        _, errors = process.communicate()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-process.pid, 0)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return errors


def run_on_terminal(
    *arguments: object, script: Path = NOTEBOOKS, timeout: float = 120.0
) -> "pexpect.spawn[str]":
    """Start notebooks.py on a terminal of its own; the caller closes it."""
    python, *rest = command_line(arguments, script)
    environment: Any = {**ENVIRONMENT, "TERM": "xterm"}
    return pexpect.spawn(python, rest, env=environment, timeout=timeout, encoding="utf-8")


def wait_for_read(terminal: "pexpect.spawn[str]") -> None:
    """Wait until the program sleeps in a call that reads its standard input.

    A Ctrl-C between the prompt and the read of Python's input() is noticed only after
    the next line. The first argument of the call is the descriptor: proc(5), syscall.
    """
    path = Path(f"/proc/{terminal.pid}/syscall")
    wait_until(lambda: path.read_text().split()[1:2] == ["0x0"], 10, "a read")


def run_as(
    username: str, *command: object, timeout: float = 60.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program in a student's home, with what a log-in of theirs has."""
    account = pwd.getpwnam(username)
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=os.getgrouplist(username, account.pw_gid),
        cwd=account.pw_dir if os.path.isdir(account.pw_dir) else "/",
        env={**ENVIRONMENT, "HOME": account.pw_dir, "USER": username},
        timeout=timeout,
        **options,
    )


@contextlib.contextmanager
def python_of(username: str, script: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a Python script as a user, from the line on that it prints."""
    account = pwd.getpwnam(username)
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", script],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd=account.pw_dir,
        env={"HOME": account.pw_dir, "PATH": os.defpath},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def made_account(*options: str) -> Iterator[pwd.struct_passwd]:
    """Yield an account, with a home, that setup did not make."""
    username = f"nbo{secrets.token_hex(2)}"
    subprocess.run(["useradd", "--create-home", *options, username], check=True)
    try:
        yield pwd.getpwnam(username)
    finally:
        kill_all(lambda: processes_of([username]), f"all processes of {username}")
        command = ["userdel", "--force", "--remove", username]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def in_child(function: Callable[[], Value]) -> Value:
    """Return what a function returns in a fork of this process, which it may change.

    Raises: EOFError if it raised (its traceback is on standard error), or never ended.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(function()))
    process.start()
    theirs.close()
    with ours:
        try:
            if not ours.poll(300):
                process.kill()
            value: Value = ours.recv()
        finally:
            process.join()
    return value


def memory_of(process: psutil.Process) -> Iterator[bytes]:
    """Yield the memory of a process, each mapping in one piece."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if rights.startswith("rw") and "[v" not in line:
                start, end = (int(number, 16) for number in span.split("-"))
                memory.seek(start)
                with contextlib.suppress(OSError):
                    yield memory.read(end - start)


def is_ours(process: psutil.Process) -> bool:
    """Say whether it runs in the tests' mount namespace: a zombie no longer does."""
    try:
        theirs = os.stat(f"/proc/{process.pid}/ns/mnt")
    except OSError:  # it has ended meanwhile
        return False
    return os.path.samestat(theirs, os.stat("/proc/self/ns/mnt"))


def processes_of(usernames: Collection[str]) -> list[psutil.Process]:
    """Return what runs under the uids of these accounts, if the tests started it."""
    uids = set()
    for username in usernames:
        with contextlib.suppress(KeyError):
            uids.add(pwd.getpwnam(username).pw_uid)
    return [
        process
        for process in psutil.process_iter(["uids"])
        if process.info["uids"] and uids & {*process.info["uids"]} and is_ours(process)
    ]


def title_of(process: psutil.Process) -> str:
    """Return what ps shows of a process, or nothing if it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def kill_all(find: Callable[[], list[psutil.Process]], what: str) -> None:
    """Kill what `find` returns until it finds nothing more."""

    def nothing_left() -> bool:
        found = find()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not found

    wait_until(nothing_left, 20, f"the end of {what}")


def make_certificate(
    directory: Path,
    name: str = "cert",
    days: int = 365,
    key: str = "ec",
    passphrase: str = "",
) -> tuple[Path, Path]:
    """Write a certificate for localhost, valid for these days (-1: until yesterday).

    It is made as a CA does it, since `openssl x509` knows dates only from 3.4 on, which
    refuses negative days.

    Returns: the files of the certificate and of its key (`ec` or `rsa`).
    """
    cert_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
    size = {"ec": "ec_paramgen_curve:P-256", "rsa": "rsa_keygen_bits:2048"}[key]
    hide = f"-passout pass:{passphrase}" if passphrase else "-nodes"
    now = time.time()
    first, last = (
        time.strftime("%Y%m%d%H%M%SZ", time.gmtime(now + each * 24 * 3600))
        for each in (-2, days)
    )
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "database").touch()
        Path(scratch, "ca.cnf").write_text(CA_CONFIGURATION.format(scratch))
        for command in (
            f"req -new -newkey {key} -pkeyopt {size} {hide} -subj /CN=localhost"
            f" -addext subjectAltName=DNS:localhost -keyout {key_file}"
            f" -out {scratch}/request",
            f"ca -config {scratch}/ca.cnf -batch -selfsign -in {scratch}/request"
            f" -keyfile {key_file} -passin pass:{passphrase} -startdate {first}"
            f" -enddate {last} -notext -out {cert_file}",
        ):
            subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return cert_file, key_file


def recipe(words: str) -> str:
    """Return the literal block of README.rst that contains these words."""
    text = (ROOT / "README.rst").read_text()
    blocks = re.findall(r"::\n\n((?: {4}.*\n|\n)+)", text)
    (block,) = (textwrap.dedent(each) for each in blocks if words in each)
    return block


def replaced(text: str, changes: Mapping[str, object]) -> str:
    """Return a text with each key, which must be there, replaced by its value."""
    for old, new in changes.items():
        assert old in text, f"not there: {old}"
        text = text.replace(old, str(new))
    return text


def run_recipe(words: str, changes: Mapping[str, object], **env: str) -> str:
    """Run what README.rst shows with a prompt, as root, and return what it prints."""
    lines = re.findall(r"(?m)^(?:\$| ) (.*)", recipe(words))
    script = replaced("\n".join(lines).replace("sudo ", ""), changes)
    done = subprocess.run(
        ["sh", "-euc", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **env},
        timeout=60,
    )
    assert done.returncode == 0, f"{script}: {done}"
    return done.stdout


# A file system of a student's own, in namespaces of theirs (FUSE). It has one file; what is
# written to it is never answered, and with the argument `silent` what is read, too.
OWN_FILE_SYSTEM = """
import ctypes, mmap, os, struct, sys
device, point = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)
ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1"}
ids["gid_map"] = f"0 {os.getgid()} 1"
if libc.unshare(0x10020000):  # CLONE_NEWUSER, CLONE_NEWNS
    sys.exit("cannot have namespaces")
for name, text in ids.items():
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
fuse = os.open(device, os.O_RDWR)
os.mkdir(point)
options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"x", point.encode(), b"fuse", 0, options):
    sys.exit("cannot mount")

def attributes(node):
    mode = 0o40700 if node == 1 else 0o100600
    numbers = node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    return struct.pack("<6Q10I", *numbers)

def answer(opcode, node, opened):
    match opcode:
        case 1:  # LOOKUP
            return struct.pack("<4Q2I", 2, 0, 3600, 3600, 0, 0) + attributes(2)
        case 3:  # GETATTR
            return struct.pack("<QII", 3600, 0, 0) + attributes(node)
        case 14:  # OPEN: the second one with DIRECT_IO and KEEP_CACHE
            return struct.pack("<QII", opened, 3 * (opened > 1), 0)
        case 15 if "silent" not in sys.argv:  # READ
            return bytes(4096)
        case 26:  # INIT
            sizes = 7, 31, 65536, 0, 16, 12, 65536, 1, 1, *[0] * 9
            return struct.pack("<4I2H2I2H8I", *sizes)

if os.fork() == 0:
    opened = 0
    while True:
        request = os.read(fuse, 1 << 20)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        opened += opcode == 14
        data = answer(opcode, node, opened)
        if opcode not in (2, 36) and (data or opcode not in (15, 16)):
            # Nothing is said to FORGET and INTERRUPT, to WRITE and a silent READ.
            header = 16 + len(data or b""), -38 * (data is None), unique
            os.write(fuse, struct.pack("<IiQ", *header) + (data or b""))
os.close(fuse)
"""


@contextlib.contextmanager
def own_file_system(
    username: str, code: str, point: Path, *arguments: str
) -> Iterator["subprocess.Popen[str]"]:
    """Have a student mount it at `point` and run code, which prints a line as it begins."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        device = Path(directory, "fuse")
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
        for path in (Path(directory), device):
            path.chmod(0o777)

        program = ["/usr/bin/python3", "-c", OWN_FILE_SYSTEM + code]
        with subprocess.Popen(
            [*program, str(device), str(point), *arguments],
            user=username,
            group=username,
            extra_groups=[],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout
                if not process.stdout.readline():
                    pytest.skip("needs FUSE in user namespaces")
                yield process
            finally:
                process.kill()


@contextlib.contextmanager
def host_called(name: str) -> Iterator[None]:
    """Let this host have a name, in the private /etc."""
    path = Path("/etc/hosts")
    before = path.read_text()
    path.write_text(f"127.0.0.1 localhost {name}\n{before}")
    try:
        yield
    finally:
        path.write_text(before)


def claim(what: str, candidates: Iterable[range]) -> range:
    """Return the first of these that no test run on this machine has, and have it.

    The claim is an address that is no file, and ends with this process: unix(7), abstract.
    Raises: OSError if there is none.
    """
    for numbers in candidates:
        address = socket.socket(socket.AF_UNIX)
        try:
            address.bind(f"\0notebooks-tests-{what}-{numbers[0]}")
        except OSError:
            address.close()
        else:
            address.detach()
            return numbers
    raise OSError(f"accounts, processes or other test runs have all {what}")


def claim_ports() -> range:
    return claim("ports", (range(x, x + 1000) for x in range(11000, 32000, 1000)))


@functools.cache
def port_ranges() -> Iterator[range]:
    """Return an iterator over ranges of ports of this test run, in turn and endlessly.

    A course may open its ports late: until then another must not have them. They lie
    below those that the kernel gives to outgoing connections, and above 10080, the last
    that browsers refuse: https://fetch.spec.whatwg.org/#bad-port.
    """
    ports = claim_ports()
    return itertools.cycle(ports[i : i + 40] for i in range(0, 1000, 40))


def free_port_range(count: int) -> int:
    """Return the first of `count` successive ports that nobody has, in any family."""
    # A large course of the benchmark has a range of its own.
    ranges = port_ranges() if count <= 40 else iter([claim_ports()])
    for ports in itertools.islice(ranges, 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in ports[:count]:
                server = socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
                )
                stack.enter_context(server)
            return ports[0]
    raise OSError(f"no {count} free ports in a row")


# ---------------------------------------------------------------------------------------
# A course
# ---------------------------------------------------------------------------------------


class Launch:
    """A running `notebooks.py launch`, its output in a file."""

    def __init__(
        self,
        config: Path,
        *options: object,
        script: Path = NOTEBOOKS,
        env: Mapping[str, str] | None = None,
        python: str = "",
    ):
        self.log = config.with_name(f"launch-{secrets.token_hex(4)}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command_line(("launch", *options, config), script, python),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **(env or {})},
            )
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    def helper(self, role: str) -> psutil.Process:
        """Return the launcher's own process of that title, which runs by now."""

        def find() -> list[psutil.Process]:
            children = psutil.Process(self.pid).children()
            return [x for x in children if title_of(x) == f"notebooks.py: {role}"]

        (helper,) = wait_until(find, 20, f"the {role}")
        return helper

    def wait_ready(self, seconds: float = 90.0) -> "Launch":
        def is_ready() -> bool:
            status = self.process.poll()
            assert status is None, f"launch ended with {status}:\n{self.output}"
            return READY in self.output

        try:
            wait_until(is_ready, seconds, READY)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.output}") from None
        return self

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 10.0) -> int:
        """Return the exit status of a launch that was sent the signal."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class Course:
    """A directory with configuration, students and material; an end of all it made.

    No account exists before `run("setup")`. The user names, the group and the ports are
    nobody else's. Settings are keys of notebooks.cfg.
    """

    def __init__(self, directory: Path, students: int = 2, **settings: object):
        name = f"nbt{secrets.token_hex(2)}"
        self.directory = directory
        self.config = directory / "notebooks.cfg"
        self.user_list = directory / "students.csv"
        self.material = directory / "material"
        self.storage = directory / "storage"
        self.group = str(settings.get("group", f"{name}s"))
        self.students = [f"{name}{i}" for i in range(1, students + 1)]
        self.port = free_port_range(students + 4)
        self.settings: dict[str, object] = {}
        self.launches: list[Launch] = []
        self.resources = contextlib.ExitStack()
        shutil.copytree(ROOT / "material", self.material)
        self.write_students(
            {"username": username, "name": f"Name{i}", "surname": f"Surname{i}"}
            for i, username in enumerate(self.students, 1)
        )
        defaults = {"tutorial_dir": "course", "group": self.group, "port": self.port}
        self.configure(**{**defaults, **settings})

    def __enter__(self) -> "Course":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        notebooks.UID_FILE.unlink(missing_ok=True)  # or a long run uses up our numbers

    def configure(self, **settings: object) -> None:
        """Write the configuration with these settings added to the earlier ones."""
        self.settings |= settings
        left = dict(self.settings)
        lines = []
        for section, keys in SECTIONS.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {left.pop(key)}" for key in keys.split() if key in left]
        assert not left, f"no such keys: {left}"
        self.config.write_text("\n".join([*lines, ""]))

    def write_students(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Write the user list; the first row's keys are its columns."""
        rows = list(rows)
        with self.user_list.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def rows(self) -> dict[str, dict[str, str]]:
        """Return the students' rows by username."""
        with self.user_list.open(newline="", encoding="utf-8-sig") as file:
            return {row["username"]: row for row in csv.DictReader(file)}

    def run(
        self, command: str, *options: object, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        return run(command, *options, self.config, **keywords)

    def check(self, command: str, *options: object, **keywords: Any) -> str:
        """Run a command that must succeed, and return its standard output."""
        done = self.run(command, *options, **keywords)
        assert done.returncode == 0, f"{command}: {done}"
        return done.stdout

    def launch(self, *options: object, **keywords: Any) -> Launch:
        """Start `launch`; it is not ready yet."""
        self.launches.append(Launch(self.config, *options, **keywords))
        return self.launches[-1]

    def home(self, username: str) -> Path:
        return Path(pwd.getpwnam(username).pw_dir)

    @property
    def url(self) -> str:
        """The landing page's address."""
        return f"https://localhost:{self.port}/"

    def notebook_url(self, username: str) -> str:
        return f"https://localhost:{self.rows()[username]['port']}/{username}/"

    def context(self) -> ssl.SSLContext:
        """Return what trusts the certificate that `launch` made, and no other."""
        return tls_context(self.directory / "notebooks.pem")

    def notebook(self, username: str) -> "Notebook":
        """Return a client that has logged in to this student's notebook."""
        notebook = Notebook(self.notebook_url(username), self.context())
        notebook.log_in(self.rows()[username]["nb-pass"])
        return self.resources.enter_context(notebook)

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.students)

    def servers(self, username: str) -> list[psutil.Process]:
        """Return the processes that ps shows as this student's notebook server."""
        title = f"notebooks.py: notebook server of {username} in {self.config}"
        return [
            process for process in processes_of([username]) if title_of(process) == title
        ]

    def server(self, username: str) -> psutil.Process:
        """Return the one notebook server of this student."""
        (server,) = self.servers(username)
        return server

    def close(self) -> None:
        self.resources.close()
        for launch in self.launches:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed then
                launch.stop()
        kill_all(self.processes, f"all processes of {self.students}")
        entries = {entry.pw_name for entry in pwd.getpwall()}
        for username in entries & {*self.students}:
            subprocess.run(
                ["userdel", "--force", "--remove", username],
                check=True,
                stderr=subprocess.DEVNULL,  # it misses a mail spool
            )
        if self.group in {entry.gr_name for entry in grp.getgrall()}:
            subprocess.run(["groupdel", self.group], check=True)


# ---------------------------------------------------------------------------------------
# A client of web pages and of Jupyter servers
# ---------------------------------------------------------------------------------------


class Response(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def tls_context(certificate: Path | None = None) -> ssl.SSLContext:
    """Return what trusts this certificate only, or any if none is named."""
    if certificate:
        return ssl.create_default_context(cafile=certificate)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def fetch(
    url: str,
    method: str = "GET",
    body: str | bytes | None = None,
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
    timeout: float = 30.0,
) -> Response:
    """Make one request; redirects are returned, not followed."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.netloc, timeout=timeout, context=context or tls_context()
        )
    with contextlib.closing(connection):
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        data = body.encode() if isinstance(body, str) else body
        connection.request(method, target, data, dict(headers or {}))
        with connection.getresponse() as answer:
            return Response(answer.status, answer.headers, answer.read())


class LogInRefused(Exception):
    """The server did not take the password."""


class ExecutionError(Exception):
    """The code raised; the message is the traceback."""


class Notebook:
    """A browser's side of one Jupyter server, as far as tests need it."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None):
        self.url = url
        self.context = context or tls_context()
        self.cookies = http.cookies.SimpleCookie()
        self.resources = contextlib.ExitStack()
        self.kernel_id = ""
        self.session_id = uuid.uuid4().hex  # of the tab
        self.kernel_channels: websocket.WebSocket | None = None
        self.seconds = 60.0  # in which a kernel must have answered

    def __enter__(self) -> "Notebook":
        return self

    def __exit__(self, *exception: object) -> None:
        self.resources.close()

    def cookie_header(self) -> str:
        return "; ".join(f"{x.key}={x.coded_value}" for x in self.cookies.values())

    def fetch(
        self,
        path: str,
        method: str = "GET",
        body: str | bytes | None = None,
        content_type: str = "application/json",
    ) -> Response:
        """Make a request with the cookies so far, and keep those that come back."""
        headers = {"Cookie": self.cookie_header()}
        if method != "GET" and "_xsrf" in self.cookies:
            headers["X-XSRFToken"] = self.cookies["_xsrf"].value
        if body is not None:
            headers["Content-Type"] = content_type
        url = urllib.parse.urljoin(self.url, path)
        response = fetch(url, method, body, headers, self.context, self.seconds)
        for cookie in response.headers.get_all("Set-Cookie", []):
            self.cookies.load(cookie)
        return response

    def log_in(self, password: str) -> None:
        """Log in as the form does.

        Raises: LogInRefused.
        """
        self.fetch("login")
        form = {"_xsrf": self.cookies["_xsrf"].value, "password": password}
        response = self.fetch(
            "login",
            "POST",
            urllib.parse.urlencode(form),
            "application/x-www-form-urlencoded",
        )
        if response.status != http.client.FOUND:
            raise LogInRefused(f"{self.url}: {response.status}")

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Make a call of the REST API, such as `contents/welcome.ipynb`."""
        data = None if body is None else json.dumps(body)
        response = self.fetch(f"api/{path}", method, data)
        assert response.status < 400, f"{method} {path}: {response}"
        return response.json if response.body else None

    def open_websocket(self, path: str) -> websocket.WebSocket:
        url = urllib.parse.urljoin(self.url.replace("http", "ws", 1), path)
        channel = websocket.create_connection(
            url,
            timeout=self.seconds,
            cookie=self.cookie_header(),
            sslopt={"context": self.context},
        )
        self.resources.callback(
            channel.shutdown
        )  # which `close` leaves out if it was told to
        self.resources.callback(channel.close, timeout=1)
        return channel

    def start_kernel(self, **specification: str) -> None:
        """Start a kernel (name=, path=) for the code that follows."""
        self.kernel_id = self.api("POST", "kernels", specification)["id"]
        self.open_tab()

    def open_tab(self) -> None:
        """Connect to the kernel, always as the same tab."""
        path = f"api/kernels/{self.kernel_id}/channels?session_id={self.session_id}"
        self.kernel_channels = self.open_websocket(path)

    def close_tab(self) -> None:
        """Leave the kernel, and wait until its server knows."""
        assert self.kernel_channels
        self.kernel_channels.close(timeout=1)
        path = f"kernels/{self.kernel_id}?no_track_activity=1"
        wait_until(lambda: self.api("GET", path)["connections"] == 0, 20, "no connection")

    def submit(self, code: str) -> str:
        """Have the kernel run code, and return the id of the request."""
        if self.kernel_channels is None:
            self.start_kernel()
        channels = self.kernel_channels
        assert channels is not None
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "session": uuid.uuid4().hex,
            "username": "",
            "version": "5.3",
        }
        request = {"channel": "shell", "header": header, "parent_header": {}}
        content = {"code": code, "silent": False, "allow_stdin": False}
        channels.send(json.dumps({**request, "metadata": {}, "content": content}))
        return header["msg_id"]

    def execute(self, code: str) -> str:
        """Return what a cell with this code would show, without the last line end.

        Raises: ExecutionError.
        """
        return self.output_of(self.submit(code))

    def output_of(self, request: str, until: str = "") -> str:
        """Return what a submitted cell shows until it ends, or shows these words."""
        assert self.kernel_channels
        output: list[str] = []
        while not until or until not in "".join(output[-2:]):
            message = json.loads(self.kernel_channels.recv())
            content = message["content"]
            parent = message["parent_header"] or {}  # xeus says null
            if parent.get("msg_id") != request:
                continue
            match message["msg_type"]:
                case "stream":
                    output.append(content["text"])
                case "execute_result" | "display_data":
                    output.append(content["data"].get("text/plain", "") + "\n")
                case "error":
                    raise ExecutionError("\n".join(content["traceback"]))
                case "status" if content["execution_state"] == "idle":
                    break
        return "".join(output).removesuffix("\n")

    def execute_in_terminal(self, command: str) -> str:
        """Return what a command prints in a new terminal of the server's."""
        name = self.api("POST", "terminals")["name"]
        channel = self.open_websocket(f"terminals/websocket/{name}")
        # The shell computes the marks, so that they are not found in the echoed line.
        typed = f"echo begin-$((6*7)); {command}; echo end-$((6*7))\r"
        channel.send(json.dumps(["stdin", typed]))
        shown = ""
        while "end-42" not in shown:
            kind, *texts = json.loads(channel.recv())
            if kind == "stdout":
                shown += texts[0]
        text = shown.replace("\r\n", "\n").partition("begin-42\n")[2]
        return text.partition("end-42")[0].removesuffix("\n")


# ---------------------------------------------------------------------------------------
# A browser
# ---------------------------------------------------------------------------------------


def held(course: Course) -> contextlib.AbstractContextManager[None]:
    """Work with a course's list as another notebooks.py would."""
    return notebooks.locked(notebooks.Roster(course.user_list).lock_name, wait=False)


def environment_has(process: psutil.Process, name: str, value: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(name) == value
    return False


class Browser:
    """A browser in a home of its own, which leaves no file and no process.

    Selenium drives each of them, so that a test reads the same for all. Unless it is
    lenient, it warns of certificates that it does not know.
    """

    programs: tuple[str, ...] = ()

    def __init__(self, width: int = 1280, height: int = 900, lenient: bool = False):
        self.width, self.height, self.lenient = width, height, lenient
        self.home = Path()
        self.resources = contextlib.ExitStack()

    def __enter__(self) -> "Browser":
        with self.resources as stack:
            directory = tempfile.TemporaryDirectory(prefix="nbt-", dir="/tmp")
            self.home = Path(stack.enter_context(directory))
            stack.callback(kill_all, self.processes, type(self).__name__)
            self.start()
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.resources:
            self.driver.quit()

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "HOME": str(self.home), "TMPDIR": str(self.home)}

    def processes(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter()
            if environment_has(process, "TMPDIR", str(self.home))
        ]

    def connect(self) -> WebDriver:
        """Start the browser, and return what drives it."""
        raise NotImplementedError

    def start(self) -> None:
        self.driver = self.connect()
        self.driver.set_page_load_timeout(60)

    def restart(self) -> None:
        """End the browser and start it again in the same home."""
        self.driver.quit()
        self.start()

    def trust(self, *certificates: Path) -> None:
        """Let the browser trust these authorities: it is started again."""
        self.driver.quit()
        for path in certificates:
            self.add_authority(path)
        self.start()

    def add_authority(self, certificate: Path) -> None:
        raise NotImplementedError

    def visit(self, url: str) -> None:
        """Open a page, or the warning that stands before it."""
        self.driver.get(url)

    def warns(self) -> bool:
        """Say whether there is a warning of a certificate in the page's place."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Leave the warning for the page, as users do."""
        raise NotImplementedError


class Chromium(Browser):
    programs = CHROMIUM, CHROMEDRIVER, CERTUTIL

    def connect(self) -> WebDriver:
        options = chrome.options.Options()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--window-size={self.width},{self.height}",
            f"--user-data-dir={self.home}/profile",
            *["--ignore-certificate-errors"] * self.lenient,
        ):
            options.add_argument(argument)
        service = chrome.service.Service(CHROMEDRIVER, env=self.environment)
        driver = chrome.webdriver.WebDriver(options, service)
        if self.width < 500:  # no window is narrower; a phone's page is
            phone = {"width": self.width, "height": self.height}
            phone |= {"deviceScaleFactor": 1, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        return driver

    def add_authority(self, certificate: Path) -> None:
        add_to_nss(self.home / ".pki/nssdb", certificate)

    def warns(self) -> bool:
        """Say so of a warning that lets nobody pass, too."""
        return self.driver.title == "Privacy error"

    def go_on(self) -> None:
        use(self.driver, "#details-button", "", WebElement.click)
        use(self.driver, "#proceed-link", "", WebElement.click)


class Firefox(Browser):
    programs = FIREFOX, CERTUTIL

    def connect(self) -> WebDriver:
        profile = self.home / "profile"
        profile.mkdir(exist_ok=True)
        lines = [f"user_pref({name});" for name in FIREFOX_PREFERENCES]
        (profile / "user.js").write_text("\n".join(lines))
        port_file = profile / "MarionetteActivePort"
        port_file.unlink(missing_ok=True)
        size = f"--width {self.width} --height {self.height}"
        process = subprocess.Popen(
            [FIREFOX, "--headless", "--marionette", *size.split(), "--profile", profile],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        wait_until(lambda: port_file.exists() and port_file.read_text(), 60, "Firefox")
        options = ArgOptions()
        options.accept_insecure_certs = self.lenient
        return WebDriver(Marionette(int(port_file.read_text()), process), options=options)

    def add_authority(self, certificate: Path) -> None:
        add_to_nss(self.home / "profile", certificate)

    def warns(self) -> bool:
        address = self.driver.execute_script("return document.documentURI")
        return str(address).startswith("about:certerror")

    def go_on(self) -> None:
        """The buttons are in a tree of their own; a click too soon does nothing."""

        def gone() -> bool:
            with contextlib.suppress(WebDriverException):
                card = self.driver.find_element(By.CSS_SELECTOR, "net-error-card")
                for name in ("exception-button", "advanced-button"):
                    for button in card.shadow_root.find_elements(By.ID, name):
                        button.click()
                        time.sleep(0.5)
                        return not self.warns()
            return not self.warns()

        wait_until(gone, 30, "the page behind the warning")


class Marionette(RemoteConnection):
    """Selenium's way to Firefox's own server: Debian has no geckodriver to stand between.

    Source: Firefox Source Docs, Marionette, Protocol.
    """

    def __init__(self, port: int, process: "subprocess.Popen[bytes]"):
        self.process, self.number = process, 0
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.file = self.connection.makefile("rb")
        self.receive()  # it says who it is

    def receive(self) -> Any:
        digits = b""
        while (byte := self.file.read(1)) != b":":
            assert byte, "Firefox has ended"
            digits += byte
        return json.loads(self.file.read(int(digits)))

    def execute(self, command: str, params: Any) -> Any:
        """Return what Selenium wants to know: the value, or the error and a status."""
        params = {key: params[key] for key in params or {} if key != "sessionId"}
        match command:
            case Command.NEW_SESSION:
                params = params["capabilities"]["alwaysMatch"]
            case Command.FIND_CHILD_ELEMENT | Command.FIND_CHILD_ELEMENTS:
                params["element"] = params.pop("id")
            case Command.FIND_ELEMENTS_FROM_SHADOW_ROOT:
                params["shadowRoot"] = params.pop("shadowId")
            case Command.SCREENSHOT:
                params["full"] = False
            case Command.QUIT:
                params = {"flags": ["eAttemptQuit"]}
        self.number += 1
        message = json.dumps([0, self.number, MARIONETTE_COMMANDS[command], params])
        self.connection.sendall(f"{len(message)}:{message}".encode())
        _, number, error, value = self.receive()
        assert number == self.number
        if error and error["error"] != "insecure certificate":  # its warning is a page
            return {"status": 500, "value": json.dumps({"value": error})}
        if isinstance(value, dict) and [*value] == ["value"]:
            value = value["value"]
        return {"status": 0, "value": value}

    def close(self) -> None:
        self.file.close()
        self.connection.close()
        self.process.wait(30)


class WebKit(Browser):
    """WebKitGTK's small browser, which needs a display; Safari is its cousin."""

    programs = MINIBROWSER, WEBKIT_DRIVER, XVFB, WINDOW_MANAGER

    def __enter__(self) -> "Browser":
        self.display = ""
        return super().__enter__()

    def connect(self) -> WebDriver:
        if not self.display:
            self.display = self.open_display()
        options = webkitgtk.options.Options()
        options.binary_location = MINIBROWSER
        for argument in ("--automation", f"--geometry={self.width}x{self.height}"):
            options.add_argument(argument)
        options.accept_insecure_certs = self.lenient
        environment = {**self.environment, "DISPLAY": self.display}
        service = webkitgtk.service.Service(WEBKIT_DRIVER, env=environment)
        with warnings.catch_warnings():  # of Selenium itself, about how it calls itself
            warnings.simplefilter("ignore", DeprecationWarning)
            return webkitgtk.webdriver.WebDriver(options, service)

    def open_display(self) -> str:
        size = f"{self.width}x{self.height}x24"
        options = f"-displayfd 1 -screen 0 {size} -nolisten tcp".split()
        server = subprocess.Popen(
            [XVFB, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        self.resources.enter_context(server)
        self.resources.callback(server.terminate)
        assert server.stdout
        display = f":{server.stdout.readline().decode().strip()}"
        environment = {**self.environment, "DISPLAY": display}
        manager = subprocess.Popen([WINDOW_MANAGER], env=environment)
        self.resources.enter_context(manager)
        self.resources.callback(manager.terminate)
        return display

    def add_authority(self, certificate: Path) -> None:
        """It trusts whom the host trusts: in the tests that is their own copy of /etc."""
        before = AUTHORITIES.read_text()
        self.resources.callback(AUTHORITIES.write_text, before)
        AUTHORITIES.write_text(before + certificate_text(certificate))

    def visit(self, url: str) -> None:
        self.url = url
        super().visit(url)

    def warns(self) -> bool:
        """The warning is the window's own: the page stays empty, whatever its address."""
        return str(self.driver.execute_script("return document.URL")) == "about:blank"

    def go_on(self) -> None:
        self.lenient = True  # the button is out of the driver's reach
        self.restart()
        self.visit(self.url)


BROWSERS = Chromium, Firefox, WebKit


def add_to_nss(database: Path, certificate: Path) -> None:
    """Let Chromium or Firefox trust an authority; the file has the certificate."""
    if not (database / "cert9.db").exists():
        database.mkdir(parents=True, exist_ok=True)
        command = [CERTUTIL, "-N", "-d", f"sql:{database}", "--empty-password"]
        subprocess.run(command, check=True)
    command = [CERTUTIL, "-A", "-a", "-d", f"sql:{database}", "-t", "C,,"]
    command += ["-n", str(certificate)]
    subprocess.run(command, input=certificate_text(certificate), text=True, check=True)


def certificate_text(path: Path) -> str:
    """Return the first certificate in a file, without the key."""
    command = ["openssl", "x509", "-in", str(path)]
    return subprocess.check_output(command, text=True)


def axe_violations(browser: WebDriver) -> list[str]:
    """Return where axe-core says that the page fails WCAG 2.1, levels A and AA."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec and spec.origin, "axe-core is missing: see the Makefile"
    browser.execute_script(Path(spec.origin).with_name("axe.min.js").read_text())
    found = browser.execute_async_script(
        "axe.run({runOnly: arguments[0]}).then(arguments[1])", WCAG
    )
    return [
        f"{violation['id']}: {node['html']}: {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def emulate(browser: WebDriver, width: int, scheme: str) -> None:
    """Show a page of Chromium's at this width, in the colours of `light` or `dark`."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[WebDriver]:
    """Yield a Chromium to which all certificates are the same."""
    with Chromium(width, height, lenient=True) as browser:
        yield browser.driver


def use(
    browser: WebDriver,
    selector: str,
    text: str = "",
    action: Callable[[WebElement], object] = lambda element: None,
    seconds: float = 60.0,
) -> None:
    """Do something with the first element of a CSS selector that shows the text.

    It is looked for until it is there; the page may be drawing it anew meanwhile.
    """

    def done() -> bool:
        with contextlib.suppress(WebDriverException):
            for element in browser.find_elements(By.CSS_SELECTOR, selector):
                if text in element.text and element.is_displayed():
                    action(element)
                    return True
        return False

    wait_until(done, seconds, f"{selector} with {text!r} in {browser.title!r}")


def write(*keys: str) -> Callable[[WebElement], None]:
    return lambda element: element.send_keys(*keys)


def log_in(browser: WebDriver, course: Course, username: str) -> None:
    password = course.rows()[username]["nb-pass"]
    use(browser, "input[type=password]", "", write(password, Keys.ENTER))


def run_cell(browser: WebDriver) -> Callable[[WebElement], None]:
    """Click into a cell until it has the focus, and press Shift + Enter.

    A page that is still being drawn takes the focus from the editor again.
    """

    def edits(editor: WebElement) -> bool:
        editor.click()
        with contextlib.suppress(TimeoutError):
            use(browser, f"{CODE_CELL}.jp-mod-active .cm-focused", seconds=3)
            return True
        return False

    def run(editor: WebElement) -> None:
        wait_until(lambda: edits(editor), 60, "a cell with the focus")
        keys = ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER)
        keys.key_up(Keys.SHIFT).perform()

    return run


def computes(browser: WebDriver, code: str, output: str) -> bool:
    """Run a cell and say whether it shows this; a key may be lost while it is drawn."""
    use(browser, f"{CODE_CELL} .cm-content", code, run_cell(browser))
    with contextlib.suppress(TimeoutError):
        use(browser, f"{CODE_CELL} .jp-OutputArea-output", output, seconds=15)
        return True
    return False


def switch_to(browser: WebDriver, part: str) -> bool:
    """Go to the window whose address has this part, if there is one."""
    for handle in browser.window_handles:
        browser.switch_to.window(handle)
        if part in browser.current_url:
            return True
    return False


def save(browser: WebDriver) -> None:
    keys = ActionChains(browser).key_down(Keys.CONTROL).send_keys("s")
    keys.key_up(Keys.CONTROL).perform()


def saved_outputs(notebook: Path) -> list[object]:
    """Return the text results in a notebook file; none while it is being written."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except json.JSONDecodeError:
        return []
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return ["".join(output["data"]["text/plain"]) for output in outputs]
