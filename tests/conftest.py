"""The ground that the tests stand on: accounts that are real but not the machine's.

As root, the test run enters a mount namespace of its own, where /etc, /home, /run,
/usr/local and /var are overlays: useradd, chpasswd and userdel work there as always, and
nothing remains. People and courses of the machine do not exist there. That does not isolate
processes, ports and /tmp: tests end what they start, and their accounts have numbers that
nobody else has. All that runs in the namespace was started by the tests, so what is left
in it at the end is a failure. So several test runs at a time do not disturb each other.
"""

import atexit
import contextlib
import ctypes
import grp
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from selenium.webdriver.remote.webdriver import WebDriver

import notebooks
import support

CLONE_NEWNS = 0x00020000  # <linux/sched.h>
FIRST_PERSON = 1000  # the system's own are below, and NOBODY: Debian's policy, 9.2.2
NOBODY = 65534
IS_ROOT = os.geteuid() == 0
# The lock of accounts is in /run, and kernels of all environments are in /usr/local.
COVERED = ("etc", "home", "run", "usr/local", "var")
MACHINE_ROOT = os.open("/", os.O_PATH | os.O_DIRECTORY)  # in the machine's namespace


def mount(*arguments: str) -> None:
    subprocess.run(["mount", "--no-mtab", *arguments], check=True)


def unshare_mounts() -> None:
    """Give this process, and all that it starts, a mount namespace: unshare(2)."""
    if threading.active_count() > 1:  # only the calling thread would enter it
        raise RuntimeError("there are threads already")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    mount("--make-rprivate", "/")


def hide_homes(upper: Path) -> None:
    """Cover what is in /home, unless this test run lies in it, by whiteouts.

    Source: the kernel's overlayfs.rst, whiteouts and opaque directories.
    """
    needed = [support.ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    for home in Path("/home").iterdir():
        if not any(path.is_relative_to(home) for path in needed):
            os.mknod(upper / home.name, stat.S_IFCHR, os.makedev(0, 0))


def mount_overlay(directory: Path, upper: Path) -> None:
    """Let what is written below a directory go to another one, of a tmpfs, instead.

    Source: mount(8), the kernel's overlayfs.rst. `xino` keeps one device number for all
    files of an overlay, as on any ordinary file system.
    """
    work = upper.with_name(f"{upper.name}-work")
    work.mkdir()
    shutil.copystat(directory, upper)
    layers = f"lowerdir={directory},upperdir={upper},workdir={work},xino=on"
    mount("-t", "overlay", "-o", layers, "overlay", str(directory))


def mount_overlays() -> None:
    """Let nothing that is written to the covered directories reach the machine."""
    mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/mnt")
    for name in COVERED:
        upper = Path("/mnt", name)
        upper.mkdir(parents=True)
        if name == "home":
            hide_homes(upper)
        mount_overlay(Path("/", name), upper)
    subprocess.run(["umount", "--no-mtab", "--lazy", "/mnt"], check=True)


def is_person(number: int) -> bool:
    """Say whether it is the uid or gid of a person, or of a group of people."""
    return FIRST_PERSON <= number != NOBODY


def delete_entries(path: Path, names: set[str]) -> None:
    """Delete the lines of these names from a file like /etc/passwd."""
    if path.exists():
        encoded = {os.fsencode(name) for name in names}
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.split(b":")[0] not in encoded]
        path.write_bytes(b"".join(kept))


def hide_people() -> None:
    """Take the machine's people, their groups and its course out of the overlays.

    Source: passwd(5), shadow(5), subuid(5), group(5), gshadow(5).
    """
    people = {entry.pw_name for entry in pwd.getpwall() if is_person(entry.pw_uid)}
    groups = {entry.gr_name for entry in grp.getgrall() if is_person(entry.gr_gid)}
    for name in ("passwd", "shadow", "subuid", "subgid"):
        delete_entries(Path("/etc", name), people)
    for name in ("group", "gshadow"):
        delete_entries(Path("/etc", name), groups)
    runtime_directory = Path("/var/lib/notebooks")
    if runtime_directory.exists():
        shutil.rmtree(runtime_directory)


def unused_ids() -> Iterator[range]:
    """Yield numbers that no account, group or process of the machine has, by the thousand.

    Processes, files in /tmp and shared memory are the machine's: `remove` would end and
    delete those of anybody who has the number of a student.
    """
    used = {entry.pw_uid for entry in pwd.getpwall()}
    used |= {entry.gr_gid for entry in grp.getgrall()}
    for process in psutil.process_iter(["uids", "gids"]):
        used |= {*process.info["uids"], *process.info["gids"]}
    for first in range(10000, 60000, 1000):
        if used.isdisjoint(range(first, first + 1000)):
            yield range(first, first + 1000)


def choose_uids(ids: range) -> None:
    """Let useradd and groupadd take these numbers: login.defs(5)."""
    path = Path("/etc/login.defs")
    text = re.sub(r"(?m)^[ \t#]*[UG]ID_(MIN|MAX)\b.*\n", "", path.read_text())
    for kind in ("UID", "GID"):
        text += f"{kind}_MIN {ids[0]}\n{kind}_MAX {ids[-1]}\n"
    path.write_text(text)


def enter_private_host() -> None:
    """Give this process, and all that it starts, a host without people and courses."""
    ids = support.claim("ids", unused_ids())  # while the machine's people can be seen
    unshare_mounts()
    mount_overlays()
    hide_people()
    choose_uids(ids)


def heed_signals() -> None:
    """Let programs that this process starts get the signals that it was told to ignore.

    A script starts what is followed by `&` with SIGINT and SIGQUIT ignored, and nohup
    adds SIGHUP. Programs inherit that, and which signals are blocked, but they never
    inherit a handler: execve(2). So this process goes on to ignore them by a handler
    that does nothing, but for SIGINT, which ends the test run as usual.
    """
    for signum in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def measure_processes() -> None:
    """Have coverage started in each notebooks.py, if it runs here.

    Coverage hands its configuration to processes in an environment variable, which
    notebooks.py, rightly, does not pass on to those that it starts. So a .pth file,
    which is read in isolated mode too, gives it to each process that executes this
    checkout's script, and to no other; `patch = _exit` saves what a fork measured.
    Each test run has a file of its own, which says nothing when the run was killed.
    """
    variable = "COVERAGE_PROCESS_CONFIG"
    configuration = os.environ.pop(variable, None)
    if not configuration:
        return
    pid = os.getpid()
    path = Path(sysconfig.get_path("purelib"), f"notebooks_coverage_{pid}.pth")
    path.write_text(
        f"import os, sys; {str(support.NOTEBOOKS)!r} in sys.orig_argv and"
        f" os.path.exists('/proc/{pid}') and"
        f" (os.environ.update({variable}={configuration!r}),"
        f" __import__('coverage').process_startup(), os.environ.pop({variable!r}))\n"
    )
    atexit.register(path.unlink, missing_ok=True)


def pytest_configure() -> None:
    """Prepare the ground; touch nothing if it cannot be prepared."""
    heed_signals()
    if IS_ROOT:
        try:
            enter_private_host()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            pytest.exit(f"The tests need a mount namespace of their own: {error}", 3)
        measure_processes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not IS_ROOT:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root: real accounts"))


def leftover_processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and support.is_ours(process)
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not IS_ROOT:
        return
    try:
        support.wait_until(lambda: not leftover_processes(), 5, "all processes to end")
    except TimeoutError:
        left = leftover_processes()
        print("\nERROR: the tests left processes:", *left, sep="\n    ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        support.kill_all(leftover_processes, "what the tests left")


@pytest.fixture(autouse=True)
def lock_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who is not root locks files of their own."""
    if not IS_ROOT:
        monkeypatch.setattr(notebooks, "LOCK_DIR", tmp_path)


CourseMaker = Callable[..., support.Course]


@pytest.fixture
def make_course(tmp_path: Path) -> Iterator[CourseMaker]:
    """A function that makes courses: `make_course(3, on_demand="yes")`."""
    with contextlib.ExitStack() as stack:

        def make(students: int = 2, **settings: object) -> support.Course:
            directory = tmp_path / f"course-{os.urandom(2).hex()}"
            directory.mkdir()
            return stack.enter_context(support.Course(directory, students, **settings))

        yield make


@pytest.fixture
def course(make_course: CourseMaker) -> support.Course:
    """A course of two students."""
    return make_course()


@pytest.fixture
def launch(course: support.Course) -> support.Launch:
    """The one launch of a course that a module's tests share."""
    (launch,) = course.launches
    return launch


def need_programs(kind: type[support.Browser]) -> None:
    for program in kind.programs:
        if not os.access(program, os.X_OK):
            pytest.skip(f"needs {program}")


@pytest.fixture
def browser() -> Iterator[WebDriver]:
    """A Chromium of 1280 x 900; `support.chromium` makes others."""
    need_programs(support.Chromium)
    with support.chromium() as driver:
        yield driver


@pytest.fixture(params=support.BROWSERS, ids=lambda kind: kind.__name__)
def any_browser(request: pytest.FixtureRequest) -> Iterator[support.Browser]:
    """Each of the browsers in turn, which warns of certificates."""
    need_programs(request.param)
    with request.param() as browser:
        yield browser
