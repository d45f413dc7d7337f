"""What students and strangers do to the host, to root's commands and to the teacher."""

import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import logging
import os
import platform
import pwd
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

import notebooks
from conftest import CourseMaker, mount
from support import (
    ROOT,
    Course,
    fetch,
    own_file_system,
    processes_of,
    python_of,
    wait_until,
)

pytestmark = pytest.mark.root


AsStudent = Callable[[str, str], subprocess.Popen[bytes]]


@pytest.fixture
def open_course() -> Iterator[Course]:
    """A course in a directory that students can read; each pytest closes its own to them.

    Not where the tests have an overlay, which locks less.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        with Course(Path(directory), 2, on_demand="yes") as course:
            course.directory.chmod(0o755)
            yield course


@pytest.fixture
def as_student() -> Iterator[AsStudent]:
    """A function that runs Python code as a student, until the test ends."""
    processes = []

    def run(username: str, code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["/usr/bin/python3", "-c", code],
            user=username,
            group=username,
            extra_groups=[],
            cwd="/",
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def test_no_text_of_ours_has_root_run_a_program_as_a_student() -> None:
    """It could take root's terminal before it ends: pidfd_getfd(2)."""
    for name in ("notebooks.py", "README.rst", "CONTRIBUTING.rst"):
        text = (ROOT / name).read_text()
        assert not re.search(r"\b(su|runuser|sudo -u|setpriv)\b[^\n]*(NAME|USERNAME)", text)


def test_shutdown_ends_everything_if_it_is_told_to(
    make_course: CourseMaker, as_student: AsStudent
) -> None:
    """Also what has stopped itself, hides as something else, or forks all the time."""
    course = make_course(2)
    course.check("setup")
    first, other = course.students
    bomb = (
        "import os\nwhile True:\n    if os.fork() == 0: os.setsid()\n    else: os._exit(0)"
    )
    sleeps = [as_student(first, "import time; time.sleep(999)") for _ in range(3)]
    sleeps[0].send_signal(signal.SIGSTOP)
    as_student(first, bomb)
    spared = as_student(other, "import time; time.sleep(999)")
    said = course.check("shutdown", "--everything", "--only", first)
    assert f"{first}: shut down" in said
    uid = pwd.getpwnam(first).pw_uid
    assert not notebooks.processes_by_uid([uid])[uid]
    assert spared.poll() is None


def test_shutdown_tells_who_runs_on_beside_jupyter(make_course: CourseMaker) -> None:
    """Such as what a cell has put into a session of its own."""
    course = make_course(2)
    course.check("setup")
    course.launch().wait_ready().stop()
    first, other = course.students
    code = "import os; [os.system('setsid -f sleep 999') for i in range(2)]"
    assert course.notebook(first).execute(code) == "[0, 0]"
    course.notebook(other).execute("6 * 7")
    done = course.run("shutdown")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert f"{first}: shut down; still runs 2 other processes" in lines
    assert f"{other}: shut down" in lines
    hint = f"{first}: other programs run on; shutdown --everything ends them"
    assert done.stderr.count(hint) == done.stderr.count("--everything") == 1
    assert len(processes_of([first])) == 2
    done = course.run("shutdown", "--everything")
    assert f"{first}: shut down" in done.stdout.splitlines() and not done.stderr
    wait_until(lambda: not processes_of([first]), 10, "their end")


def test_shutdown_never_ends_the_teacher(
    make_course: CourseMaker, as_student: AsStudent
) -> None:
    course = make_course(1)
    (username,) = course.students
    course.check("setup")
    mine = as_student(username, "import time; time.sleep(999)")
    account = pwd.getpwnam(username)
    environment = {**os.environ, "SUDO_UID": str(account.pw_uid)}
    done = course.run("shutdown", "--everything", env=environment)
    assert done.returncode == 1 and "is your own account" in done.stderr
    assert mine.poll() is None


def test_who_keeps_the_account_files_locked_is_named(make_course: CourseMaker) -> None:
    course = make_course(1)
    lock = Path("/etc/passwd.lock")
    holder = subprocess.Popen(["sleep", "999"])
    lock.write_text(f"{holder.pid}\0")
    try:
        busy = course.run("setup", timeout=120)
        holder.send_signal(signal.SIGSTOP)
        done = course.run("setup", timeout=120)
    finally:
        lock.unlink()
        holder.kill()
        holder.wait()
    assert done.returncode == busy.returncode == 1
    holds = f"pid {holder.pid} (sleep) holds {lock}: "
    assert f"{holds}wait for its end" in busy.stderr
    assert f"{holds}`kill -KILL {holder.pid}` ends it" in done.stderr
    course.check("setup")


def test_a_student_cannot_hold_the_lock_of_a_list_that_was_uploaded(
    open_course: Course, as_student: AsStudent
) -> None:
    course = open_course
    course.check("setup")
    username = course.students[0]
    course.user_list.chmod(0o644)
    code = (
        "import fcntl, time; f = open({!r}); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(99)"
    )
    holder = as_student(username, code.format(str(course.user_list)))
    wait_until(lambda: psutil.Process(holder.pid).open_files(), 10, "the student's lock")
    course.check("send")
    assert course.user_list.stat().st_mode & 0o777 == 0o600
    for path in Path("/run").glob("notebooks*.lock"):
        assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == 0


def test_git_finds_no_configuration_in_the_storage(make_course: CourseMaker) -> None:
    course = make_course(1, ignore="")
    course.check("setup")
    (username,) = course.students
    work, bait = course.home(username) / "course", course.directory / "bait"
    for name in (".git", "sub/.git", "other/.GIT"):
        subprocess.run(["git", "init", "-q", work / name.rpartition("/")[0]], check=True)
        config = work / name / "config"
        config.parent.mkdir(exist_ok=True)
        config.write_text(f"[core]\n\tfsmonitor = touch {bait}\n")
    (work / "kept.txt").write_text("kept")
    subprocess.run(["chown", "-R", f"{username}:", work], check=True)
    course.check("retrieve")
    storage = course.storage / username
    assert (storage / "kept.txt").exists()
    assert not [path for path in storage.rglob("*") if path.name.lower() == ".git"]
    for directory in (storage, storage / "sub", storage / "other"):
        subprocess.run(["git", "status"], cwd=directory, capture_output=True)
    assert not bait.exists()
    said = course.check("remove", "--yes")  # what it deletes was nowhere kept
    assert re.search(rf"never retrieved \(.* in \.git\): {username} \(\d+\)", said)


def test_what_strangers_write_steers_no_terminal(make_course: CourseMaker) -> None:
    course = make_course(1, on_demand="yes")
    course.check("setup")
    launch = course.launch().wait_ready()
    (username,) = course.students
    home = course.home(username)
    home.rename(home.with_name("gone"))  # so that its page is a 503
    request = f"GET /{username}/\x9b31m HTTP/1.0\r\n\r\n"
    with socket.create_connection(("localhost", course.port)) as plain:
        context = course.context()
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(request.encode("latin-1"))
            assert b" 503 " in tls.recv(1000)
    home.with_name("gone").rename(home)
    wait_until(lambda: "is missing" in launch.output, 20, "the failed start")
    assert not [each for each in launch.output if not each.isprintable() and each != "\n"]
    record = logging.LogRecord("x", 40, "", 1, "a\x1b]0;b\a\x9b\nc", (), None)
    formatter = notebooks.PrintableFormatter("%(message)s")
    assert formatter.format(record) == "a?]0;b??\nc"


def test_thousands_of_objects_are_deleted_by_few_programs(
    make_course: CourseMaker, as_student: AsStudent
) -> None:
    course = make_course(1)
    course.check("setup")
    (username,) = course.students
    code = "import ctypes\nfor _ in range(9000): ctypes.CDLL(None).semget(0, 1, 0o1600)"
    as_student(username, code).wait(60)
    uid = pwd.getpwnam(username).pw_uid

    def count() -> int:
        lines = Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
        return sum(int(line.split()[4]) == uid for line in lines)

    assert count() == 9000
    started = time.monotonic()
    course.check("remove", "--yes")
    assert count() == 0 and time.monotonic() - started < 60


def test_a_stranger_fills_no_memory_of_a_server(make_course: CourseMaker) -> None:
    """By log-ins whose bodies never end; who is logged in may send as much as ever."""
    course = make_course(1)
    course.check("setup")
    course.launch().wait_ready()
    (username,) = course.students
    notebook = course.notebook(username)
    server = course.server(username)
    before = server.memory_full_info().uss
    port = int(course.rows()[username]["port"])
    stolen = "username-localhost=2|1:0|10:1|1:x|1:y|ab"
    for cookie, kind in itertools.product(
        ("", f"Cookie: {stolen}\r\n"),
        ("Content-Length: 400000000", "Transfer-Encoding: chunked"),
    ):
        with (
            socket.create_connection(("localhost", port)) as plain,
            course.context().wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            head = f"POST /{username}/login HTTP/1.1\r\nHost: localhost\r\n{cookie}{kind}"
            tls.sendall(f"{head}\r\n\r\n".encode())
            chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
            with contextlib.suppress(OSError):
                for _ in range(100):
                    tls.sendall(chunk)
    assert server.memory_full_info().uss - before < 30 << 20
    content = "x" * (20 << 20)
    model = {"type": "file", "format": "text", "content": content}
    notebook.api("PUT", "contents/large.txt", model)


def test_a_server_starts_when_there_is_no_terminal_left(make_course: CourseMaker) -> None:
    course = make_course(1, on_demand="yes")
    course.check("setup")
    course.launch().wait_ready()
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,max=1", "devpts", "/dev/pts")
    last = os.openpty()
    try:
        with pytest.raises(OSError):
            os.openpty()
        assert course.notebook(course.students[0]).execute("6 * 7") == "42"
    finally:
        for fd in last:
            os.close(fd)
        subprocess.run(["umount", "--no-mtab", "/dev/pts"], check=True)


def test_nobody_gets_the_uid_that_another_student_had(make_course: CourseMaker) -> None:
    course = make_course(3)
    course.check("setup")
    first = {pwd.getpwnam(username).pw_uid for username in course.students}
    course.check("remove", "--yes")
    course.check("setup")
    second = {pwd.getpwnam(username).pw_uid for username in course.students}
    assert len(first | second) == 6 and min(second) > max(first)
    course.check("remove", "--yes", "--only", course.students[0])
    course.check("setup")
    assert pwd.getpwnam(course.students[0]).pw_uid > max(second)


def test_remove_ends_what_has_a_uid_by_a_setuid_program(
    make_course: CourseMaker, as_student: AsStudent
) -> None:
    """A friend's process that is the removed student in its effective uid alone."""
    course = make_course(2)
    course.check("setup")
    gone, friend = course.students
    uid = pwd.getpwnam(gone).pw_uid
    program = course.home(friend) / "sleep"
    shutil.copy("/usr/bin/sleep", program)
    os.chown(program, uid, -1)
    program.chmod(0o4755)
    code = f"import os; os.execv({str(program)!r}, ['sleep', '999'])"
    process = as_student(friend, code)
    wait_until(lambda: psutil.Process(process.pid).uids().effective == uid, 10, "its uid")
    spared = as_student(friend, "import time; time.sleep(999)")
    course.check("remove", "--yes", "--only", gone)
    assert process.wait(10) == -signal.SIGKILL
    assert spared.poll() is None


KEYS = """
import ctypes; libc = ctypes.CDLL(None); word = ctypes.c_char_p(b'secret')
libc.syscall(250, 1, 0); libc.syscall(250, 8, -4, -3)  # a session, with theirs
number = libc.syscall(248, b'user', b'mine', word, 6, -4)
assert number > 0
assert libc.syscall(250, 5, number, 0x3f3f3f3f) == 0  # visible for all
"""


def test_remove_leaves_no_keys(make_course: CourseMaker, as_student: AsStudent) -> None:
    course = make_course(1)
    course.check("setup")
    (username,) = course.students
    uid = pwd.getpwnam(username).pw_uid
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86_64")
    assert as_student(username, KEYS).wait() == 0

    def keys() -> list[str]:
        lines = Path("/proc/keys").read_text().splitlines()
        return [line for line in lines if line.split()[5] == str(uid) and "mine" in line]

    assert keys()
    course.check("remove", "--yes")
    wait_until(lambda: not keys(), 10, "the end of its key")


MOUNT = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
for place in {places!r}:
    for _ in range(2):
        fd = os.open("/tmp/fuse-{uid}", os.O_RDWR)
        options = f"fd={{fd}},rootmode=40000,user_id={uid},group_id={uid}".encode()
        if libc.mount(b"mine", place.encode(), b"fuse", 6, options):
            sys.exit(os.strerror(ctypes.get_errno()))
os.setresuid({uid}, {uid}, {uid})
print("mounted", flush=True)
time.sleep(999)  # and answers nothing
"""


def test_remove_takes_away_what_a_student_has_mounted(make_course: CourseMaker) -> None:
    """Over the home, twice, in it and over the runtime directory; with all its files."""
    course = make_course(2)
    course.check("setup")
    course.launch().wait_ready()
    gone, other = course.students
    account = pwd.getpwnam(gone)
    uid, home = account.pw_uid, Path(account.pw_dir)
    home.joinpath("secret").write_text("mine")
    runtime = notebooks.RUNTIME_DIR / str(uid)
    device = Path(f"/tmp/fuse-{uid}")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    code = MOUNT.format(uid=uid, places=[f"{home}/course", str(home), str(runtime)])
    try:
        with python_of("root", code):
            started = time.monotonic()
            done = course.run("remove", "--yes", "--only", gone, timeout=120)
        assert f"{gone}: account and home deleted" in done.stdout, done
        assert time.monotonic() - started < 60
    finally:
        device.unlink()
        for place in (home, home, home / "course", runtime, runtime):
            subprocess.run(["umount", "-l", place], capture_output=True)
    assert not home.exists() and not runtime.exists()
    assert not [x for x in home.parent.iterdir() if gone in x.name]
    assert course.notebook(other).execute("6 * 7") == "42"


def test_remove_leaves_what_root_has_mounted_in_a_home(make_course: CourseMaker) -> None:
    """Also with FUSE, as a colleague's files by sshfs."""
    course = make_course(1)
    course.check("setup")
    (username,) = course.students
    place, device = course.home(username) / "course", Path(f"/tmp/fuse-{username}")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    fd = os.open(device, os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    assert ctypes.CDLL(None).mount(b"root's", bytes(place), b"fuse", 6, options) == 0
    try:
        done = course.run("remove", "--yes", timeout=120)
        assert done.returncode == 1
        assert f"{username}: something is mounted at {str(place)!r}" in done.stderr
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        os.close(fd)
        device.unlink()
    course.check("remove", "--yes")


# To read a directory into memory that is a file of FUSE is to wait, with the directory
# locked, for what is in that file.
HOLD_DIRECTORY = """
file = os.open(f"{point}/file", os.O_RDWR)
memory = mmap.mmap(file, 4096)
directory = os.open(sys.argv[3], os.O_RDONLY | os.O_DIRECTORY)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print("holding", flush=True)
libc.syscall(217, directory, ctypes.c_void_p(address), 4096)
"""


@contextlib.contextmanager
def directory_held(
    course: Course, username: str, held: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Have a student keep a directory locked: the course's, which is open to all."""
    arguments = course.home(username) / "point", str(held or course.directory), "silent"
    with own_file_system(username, HOLD_DIRECTORY, *arguments) as holder:
        try:
            call = Path(f"/proc/{holder.pid}/syscall")
            wait_until(lambda: call.read_text().startswith("217 "), 10, "the lock")
            yield holder
        finally:
            course.check("shutdown", "--everything", "--only", username)


def test_a_student_who_locks_the_directory_of_the_course_stops_nobody(
    open_course: Course,
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86_64")
    course = open_course
    course.check("setup")
    launch = course.launch().wait_ready()
    hostile, other = course.students
    old = course.rows()[other]["nb-pass"]
    with directory_held(course, hostile):
        page = f"{course.url}-password"
        form = {"username": other, "old": old, "new": "Long-And-New-17"}
        body = urllib.parse.urlencode({**form, "again": form["new"]})
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        ask = functools.partial(fetch, page, "POST", body, headers, course.context())
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(ask)
            time.sleep(3)
            assert not answer.done()
            assert fetch(course.url, context=course.context()).status == 200
            with course.notebook(other) as notebook:
                assert notebook.execute("6 * 7") == "42"
            assert not answer.done()
            refused = answer.result()
        assert "Not changed: try again in a minute" in refused.text
        started = time.monotonic()
        done = course.run("setup", timeout=120)
        assert time.monotonic() - started < 60 and done.returncode
        cure = f"`chmod go-r {course.directory}`"
        assert "keep who writes there waiting" in done.stderr and cure in done.stderr
        assert "somebody keeps its directory locked" in done.stderr
    course.check("setup")
    assert course.rows()[other]["nb-pass"] == old
    course.directory.chmod(0o711)
    assert "keep who writes" not in course.run("setup").stderr
    launch.stop()


FILL = """
import contextlib, fcntl, itertools, os, sys
fds = [os.open(place, os.O_RDONLY) for place in {places!r}]
for fd in list(fds):
    os.mkdir("own", dir_fd=fd)
    fds.append(os.open("own", os.O_RDONLY, dir_fd=fd))
os.chdir(fds[-1])
locked = [open(file, "r+") for file in {locked!r}]
for file in locked:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("filling", flush=True)
for i in itertools.count():
    for place in [*fds, *{places!r}, "."]:
        name, fd = f"file{{i % 300}}", place if isinstance(place, int) else None
        with contextlib.suppress(OSError):
            os.chmod(place, 0o777)
        with contextlib.suppress(OSError):
            path = name if fd is not None else f"{{place}}/{{name}}"
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
"""


def fill_code(places: Iterable[Path], locked: Iterable[Path] = ()) -> str:
    """Return code that creates files all the time in directories that are open to all.

    By path, by descriptor and in the working directory; and in directories of its user's in
    there, which it opens as often as somebody closes them.
    """
    return FILL.format(places=[*map(str, places)], locked=[*map(str, locked)])


def make_open_directory(path: Path, username: str, mode: int = 0o777) -> Path:
    path.mkdir(parents=True)
    shutil.chown(path, username)
    path.chmod(mode)
    return path


def test_remove_deletes_what_a_friend_fills_all_the_time(make_course: CourseMaker) -> None:
    """Also what an earlier remove has left, and in the runtime directory."""
    course = make_course(2)
    course.check("setup")
    gone, friend = course.students
    home, uid = course.home(gone), pwd.getpwnam(gone).pw_uid
    runtime = notebooks.RUNTIME_DIR / str(uid)
    left_over = home.with_name(f".{gone}-removed")
    home.chmod(0o777)
    notebooks.ensure_config_dir()
    places = [home, make_open_directory(runtime, gone)]
    for place in home / "a", home / "a/b", home / "a/b/c", runtime / "a", left_over / "a":
        places.append(make_open_directory(place, gone))
    places.append(make_open_directory(home / "setgid", gone, 0o2777))
    places.append(make_open_directory(home / "acl", gone, 0o700))
    subprocess.run(["setfacl", "-m", f"u:{friend}:rwx", places[-1]], check=True)
    kept = course.home(friend) / "kept"
    kept.write_text("kept")
    home.joinpath("a/link").symlink_to(course.home(friend))
    try:
        with python_of(friend, fill_code(places)) as filler:
            done = course.run("remove", "--yes", "--only", gone)
            assert f"{gone}: account and home deleted" in done.stdout, done
            assert filler.poll() is None
        assert not runtime.exists()
        assert not [each for each in home.parent.iterdir() if gone in each.name]
        assert kept.read_text() == "kept"
        assert course.home(friend).owner() == friend
    finally:
        for place in home, runtime, left_over:
            shutil.rmtree(place, ignore_errors=True)


PREPARE = """
import ctypes, os, pathlib, shutil
os.umask(0)
home, publics = pathlib.Path({home!r}), {publics!r}
home.chmod(0o777)
for place in {places!r}:
    os.mkdir(place)
git = home / "course" / "welcome" / ".git"
git.mkdir(parents=True)
(git / "config").write_text("[core]\\n\\tfsmonitor = true\\n")
(home / "locked").write_text("mine")
shutil.copy("/usr/bin/sleep", home / "sleep")
(home / "sleep").chmod(0o4755)
for public in publics:
    if public == "/dev/mqueue":
        pathlib.Path("/dev/mqueue/{uid}-mine").touch()
        continue
    (pathlib.Path(public) / "{uid}-mine").write_text("mine")
    (pathlib.Path(public) / "{uid}-directory").mkdir()
    (pathlib.Path(public) / "{uid}-directory" / "mine").write_text("mine")
libc = ctypes.CDLL(None)
for _ in range(10000):
    assert libc.semget(0, 1, 0o1600) >= 0 and libc.msgget(0, 0o1600) >= 0
os.chdir(home / "a")
for _ in range(1000):
    os.mkdir("d")
    os.chdir("d")
"""

# Forks and leaves its session without end, in at most a hundred processes.
BOMB = """
import os, random, resource, signal, time
resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
end = time.monotonic() + 200
while time.monotonic() < end:
    try:
        pid = os.fork()
    except OSError:
        time.sleep(0.01)
        continue
    if pid == 0:
        os.setsid()
        random.seed()
    elif random.random() < 0.5:
        os._exit(0)
"""

STOP = """
import os, signal
for _ in range(3): os.fork()
os.setsid() if os.getpid() != os.getsid(0) else None
while True: os.kill(os.getpid(), signal.SIGSTOP)
"""


class Visitor(threading.Thread):
    """Looks at pages all the time, and notes what does not answer soon."""

    def __init__(self, urls: Iterable[str], context: ssl.SSLContext) -> None:
        super().__init__()
        self.urls, self.context = list(urls), context
        self.faults: list[str] = []
        self.visits = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            for url in self.urls:
                started = time.monotonic()
                try:
                    status = fetch(url, context=self.context).status
                except OSError as error:
                    self.faults.append(f"{url}: {error!r}")
                    continue
                seconds = time.monotonic() - started
                if status != 200 or seconds > 5:
                    self.faults.append(f"{url}: {status} after {seconds:.1f} s")
                self.visits += 1

    def __enter__(self) -> "Visitor":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.join()


def left_of(uid: int, places: Iterable[Path]) -> list[str]:
    """Return what there is of a user: processes, files, mounts, keys and IPC objects."""
    left = [str(each) for each in notebooks.processes_by_uid([uid])[uid]]
    command = ["find", *map(str, places), "-xdev", "-uid", str(uid)]
    left += subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    mounts = Path("/proc/mounts").read_text().splitlines()
    left += [line for line in mounts if f"user_id={uid}," in line]
    for kind in ("shm", "msg", "sem"):
        head, *lines = Path("/proc/sysvipc", kind).read_text().splitlines()
        i = head.split().index("uid")
        left += [line for line in lines if str(uid) in line.split()[i : i + 4 : 2]]
    keys = Path("/proc/keys").read_text().splitlines()
    return left + [line for line in keys if line.split()[5] == str(uid)]


def test_remove_withstands_all_attacks_at_once(
    make_course: CourseMaker, as_student: AsStudent
) -> None:
    """And the others' servers answer all the while."""
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86_64")
    course = make_course(4)
    course.check("setup")
    course.launch().wait_ready()
    gone, friend, *_ = course.students
    account, home = pwd.getpwnam(gone), course.home(gone)
    uid, runtime = account.pw_uid, notebooks.RUNTIME_DIR / str(account.pw_uid)
    publics = ["/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/dev/mqueue"]
    publics = [public for public in publics if os.access(public, os.W_OK)]
    open_places = [home / "a", home / "a/b", home / "a/b/c", runtime / "a"]
    device = Path(f"/tmp/fuse-{uid}")
    urls = [f"{course.notebook_url(x)}login" for x in course.students[1:]]
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))

    try:
        code = PREPARE.format(
            home=str(home), uid=uid, places=[*map(str, open_places)], publics=publics
        )
        assert as_student(gone, code).wait(60) == 0
        assert as_student(gone, KEYS).wait(10) == 0
        runtime.chmod(0o777)
        course.notebook(gone).execute("import os; os.system('setsid -f sleep 999')")
        code = f"import os; os.execv('{home}/sleep', ['sleep', '999'])"
        disguised = as_student(friend, code)
        wait_until(lambda: psutil.Process(disguised.pid).uids().effective == uid, 10, "it")
        deep = home / "a" / "/".join("d" * 1000)
        filled = [home, runtime, *open_places, deep]

        places = [f"{home}/course", str(home), str(runtime)]
        with (
            python_of(friend, fill_code(filled, [home / "locked"])) as filler,
            python_of("root", MOUNT.format(uid=uid, places=places)) as mounter,
        ):
            for code in (STOP, BOMB):
                as_student(gone, code)
            wait_until(lambda: len(processes_of([gone])) > 50, 20, "many processes")
            with Visitor(urls, course.context()) as visitor:
                started = time.monotonic()
                done = course.run("remove", "--yes", "--only", gone)
                seconds = time.monotonic() - started
            assert mounter.wait(10) == -signal.SIGKILL and filler.poll() is None

        assert f"{gone}: account and home deleted" in done.stdout, done
        assert done.returncode == 0 and seconds < 60
        assert disguised.wait(10) == -signal.SIGKILL
        searched = [home.parent, *map(Path, publics), notebooks.RUNTIME_DIR]
        with contextlib.suppress(TimeoutError):  # the kernel deletes keys when it has time
            wait_until(lambda: not left_of(uid, searched), 10, "their end")
        assert left_of(uid, searched) == []
        assert visitor.visits > 3 and visitor.faults == []
    finally:
        everything = ["/bin/kill", "-KILL", "--", "-1"]
        subprocess.run(everything, user=uid, stderr=subprocess.DEVNULL)
        notebooks.delete_public_files([uid])
        device.unlink()
        for place in (home, home, home / "course", runtime, runtime):
            subprocess.run(["umount", "-l", place], capture_output=True)


def test_who_makes_directories_faster_than_they_are_deleted_is_named(
    make_course: CourseMaker, as_student: AsStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = make_course(2)
    course.check("setup")
    gone, friend = course.students
    place = course.home(gone).with_name(f".{gone}-removed")
    place.mkdir()
    place.chmod(0o777)
    code = "import os\nwhile True: os.mkdir('x'); os.chdir('x')"
    process = as_student(friend, f"import os; os.chdir({str(place)!r})\n{code}")
    wait_until(lambda: [*place.iterdir()], 10, "its first directory")
    monkeypatch.setattr(notebooks, "DELETE_SECONDS", 3)
    with pytest.raises(notebooks.Error, match=f"; {friend} goes on to make directories"):
        notebooks.delete_tree(place)
    process.kill()
    process.wait()
    course.check("remove", "--yes", "--only", gone)
    assert not place.exists()


@pytest.mark.parametrize("place", [".", "a/b"])
def test_remove_gives_up_what_a_friend_keeps_locked(
    open_course: Course, place: str
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86_64")
    course = open_course
    course.check("setup")
    gone, friend = course.students
    home = course.directory / gone
    shutil.copytree(course.home(gone), home, symlinks=True)
    shutil.chown(home, gone)
    subprocess.run(["usermod", "--home", home, gone], check=True)
    home.chmod(0o777)
    make_open_directory(home / "a/b", gone)
    with directory_held(course, friend, home / place):
        started = time.monotonic()
        done = course.run("remove", "--yes", "--only", gone, timeout=120)
        assert f"{gone}: somebody keeps a directory there locked" in done.stderr, done
        assert time.monotonic() - started < 60
    course.check("remove", "--yes", "--only", gone)
    assert not [each for each in home.parent.iterdir() if gone in each.name]


def test_delete_tree_leaves_what_is_mounted_from_the_same_device(tmp_path: Path) -> None:
    kept, tree = tmp_path / "kept", tmp_path / "tree"
    kept.mkdir()
    kept.joinpath("file").write_text("kept")
    mode = kept.stat().st_mode
    places = [tree / "mounted", tree / "a/mounted"]
    for place in places:
        place.mkdir(parents=True)
        subprocess.run(["mount", "--no-mtab", "--bind", kept, place], check=True)
    try:
        with pytest.raises(notebooks.Error, match="not everything"):
            notebooks.delete_tree(tree)
        assert kept.joinpath("file").read_text() == "kept" and kept.stat().st_mode == mode
    finally:
        for place in tree.glob("**/mounted"):
            subprocess.run(["umount", "--no-mtab", "--lazy", place], check=True)
    notebooks.delete_tree(tree)
