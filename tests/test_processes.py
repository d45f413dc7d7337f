"""The processes of students: which are Jupyter's, and how they end."""

import contextlib
import multiprocessing
import os
import pwd
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import notebooks
from conftest import CourseMaker
from notebooks import GRACE_SECONDS, Error, Member, Outcome, Student, run_workers
from support import (
    ENVIRONMENT,
    ROOT,
    Course,
    in_child,
    made_account,
    processes_of,
    wait_until,
)

PYTHON = "/usr/bin/python3"
# Programs of these names do what their standard input says, so that the command lines,
# which are all that tells Jupyter's processes, are like those of the real programs.
PROGRAM = "import sys; exec(sys.stdin.read())"
NAMES = "jupyter jupyter-notebook ipykernel_launcher.py notebook.py R new pip"
JUPYTER = {
    "a server": [PYTHON, "./jupyter-notebook", "--no-browser"],
    "a server, by its module": [PYTHON, "-m", "notebook"],
    "a server, by the umbrella command": [PYTHON, "jupyter", "lab", "--port=8888"],
    "a kernel": [PYTHON, "-m", "ipykernel_launcher", "-f", "k.json"],
    "a kernel of ours": ["R", "R", f"{notebooks.RUNTIME_DIR}/1000/kernel-1.json"],
}
OTHERS = {
    "an editor": ["vim", "jupyter-notebook"],
    "a pager": ["less", "ipykernel_launcher.py"],
    "a terminal multiplexer": ["tmux", "new", "jupyter lab"],
    "an installer": [PYTHON, "pip", "install", "ipykernel"],
}
WAIT = "print(flush=True); import time; time.sleep(300)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"
POLITE = f"""
import signal
from pathlib import Path
def end(*_):
    Path.home().joinpath("saved").touch()
    raise SystemExit
signal.signal(signal.SIGTERM, end)
{WAIT}
"""
# A child, one in a session of its own, and one that another parent has left behind.
FAMILY = f"""
import subprocess
subprocess.Popen(["sleep", "300"])
subprocess.Popen(["sleep", "300"], start_new_session=True)
subprocess.run("sleep 300 &", shell=True)
{WAIT}
"""
FORKING = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(flush=True)
while True:
    if os.fork():
        os._exit(0)
"""
KILLING = """
import os, signal
print(flush=True)
while True:
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 3) as course:
        course.check("setup")
        yield course


@pytest.fixture(scope="module")
def programs() -> Iterator[str]:
    """A directory with the programs, which everybody can execute."""
    with tempfile.TemporaryDirectory(dir="/home") as directory:
        os.chmod(directory, 0o755)
        for name in NAMES.split():
            Path(directory, name).write_text(PROGRAM)
        yield directory


@pytest.fixture
def uids(course: Course) -> list[int]:
    return [pwd.getpwnam(username).pw_uid for username in course.students]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(programs: str) -> Iterator[Start]:
    """A function that starts a program as some user, in a session of its own."""
    started = []

    def start_program(
        username: str, command: list[str], script: str = WAIT
    ) -> subprocess.Popen[str]:
        account = pwd.getpwnam(username)
        process = subprocess.Popen(
            command,
            executable=PYTHON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            cwd=programs,
            env={**ENVIRONMENT, "HOME": account.pw_dir},
            start_new_session=True,
        )
        started.append(process)
        assert process.stdin and process.stdout
        process.stdin.write(script)
        process.stdin.close()
        assert process.stdout.readline(), f"{command} failed"
        return process

    yield start_program
    for process in started:
        if process.returncode is None:  # else its number may be another group's by now
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()


def find_jupyter(uid: int) -> list[psutil.Process]:
    processes = notebooks.processes_by_uid([uid])[uid]
    return notebooks.family_of(processes, {*notebooks.find_roots(processes)[0]})


def stop_jupyter(
    usernames: list[str], path: Path = ROOT / "notebooks.cfg"
) -> dict[str, str]:
    outcome = Outcome()
    rows = [Student(i, name, "", "", "", "", "") for i, name in enumerate(usernames)]
    config, _ = notebooks.read_config(path)
    notebooks.stop_jupyter(config, notebooks.find_members(rows), outcome)
    return outcome.failures


def runs(process: subprocess.Popen[str]) -> bool:
    return process.poll() is None


def all_end(process: subprocess.Popen[str]) -> bool:
    """Say whether it ends with all that it forked: nobody holds its output open then.

    The process table would not do: who forks all the time is never where one looks.
    """
    assert process.stdout
    return bool(select.select([process.stdout], [], [], 10)[0])


@pytest.mark.root
def test_jupyter_is_told_from_what_only_speaks_of_it(
    course: Course, start: Start, uids: list[int]
) -> None:
    username, uid = course.students[0], uids[0]
    started = {
        name: start(username, command) for name, command in (JUPYTER | OTHERS).items()
    }
    found = {process.pid for process in find_jupyter(uid)}
    assert {name for name in started if started[name].pid in found} == {*JUPYTER}


@pytest.mark.root
def test_the_family_of_a_kernel_is_jupyters_and_no_other_session(
    course: Course, start: Start, uids: list[int]
) -> None:
    username, uid = course.students[0], uids[0]
    kernel = start(username, JUPYTER["a kernel"], FAMILY)
    login = start(username, OTHERS["an editor"], FAMILY)
    wait_until(lambda: len(processes_of([username])) == 8, 10, "two families")
    found = find_jupyter(uid)
    assert len(found) == 4
    assert kernel.pid in {process.pid for process in found}
    assert stop_jupyter([username]) == {}
    assert len(processes_of([username])) == 4
    assert runs(login)


@pytest.mark.root
def test_shutdown_ends_jupyter_of_the_listed_students_and_nothing_else(
    course: Course, start: Start, uids: list[int]
) -> None:
    """Not launched by us, and also what nobody waits for any more."""
    listed, other = course.students[:2], course.students[2]
    servers = [start(name, JUPYTER["a server"], POLITE) for name in listed]
    others = [start(listed[0], OTHERS["a terminal multiplexer"])]
    others += [start(other, JUPYTER["a server"]), start("root", JUPYTER["a server"])]
    rows = course.rows()
    course.write_students(rows[name] for name in listed)
    try:
        output = course.check("shutdown")
    finally:
        course.write_students(rows.values())
    assert not any(map(runs, servers))
    assert all(map(runs, others))
    assert all(course.home(name).joinpath("saved").exists() for name in listed)
    *lines, summary = output.splitlines()
    left = notebooks.counted(len(processes_of(listed[:1])), "other process")
    ended = [f"{name}: shut down" for name in listed]
    assert sorted(lines) == [f"{ended[0]}; still runs {left}", ended[1]]
    assert summary == "The notebooks of 2 students are shut down."


@pytest.mark.root
def test_what_ignores_sigterm_is_killed_after_one_grace_period_for_all(
    course: Course, start: Start
) -> None:
    stubborn = [start(x, JUPYTER["a kernel"], STUBBORN) for x in course.students]
    begin = time.monotonic()
    assert stop_jupyter(course.students) == {}
    seconds = time.monotonic() - begin
    assert [process.wait() for process in stubborn] == [-signal.SIGKILL] * 3
    assert GRACE_SECONDS <= seconds < 2 * GRACE_SECONDS


@pytest.mark.root
def test_who_cannot_be_looked_at_loses_all_unless_the_account_is_their_own(
    course: Course, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own: setup did not make it. What ps shows as our server always ends."""
    monkeypatch.setattr(notebooks, "STUCK_SECONDS", -1.0)
    student = course.students[0]
    with made_account() as account:
        person = account.pw_name
        ours, theirs = (start(x, OTHERS["an editor"]) for x in (student, person))
        name = notebooks.SERVER_TITLE[:15]
        script = f"open('/proc/self/comm', 'w').write({name!r}); {WAIT}"
        server = start(person, OTHERS["an editor"], script)
        ended = stop_jupyter([student, person], course.config)
        assert ended == {person: notebooks.STUCK}
        assert server.wait(5) == -signal.SIGTERM
        assert ours.wait(5) == -signal.SIGKILL
        assert runs(theirs)


@pytest.mark.root
@pytest.mark.parametrize("script", [FORKING, KILLING], ids=["forking", "killing"])
def test_everything_of_a_student_is_killed_whatever_it_does(
    course: Course, start: Start, script: str
) -> None:
    username, other = course.students[:2]
    account = pwd.getpwnam(username)
    bystanders = [start(name, OTHERS["an editor"]) for name in (other, "root")]
    for _ in range(5):
        process = start(username, OTHERS["an editor"], script)
        notebooks.kill_everything(account)
        assert all_end(process)
    assert all(map(runs, bystanders))


@pytest.mark.root
def test_remove_deletes_an_account_whose_processes_keep_forking(
    make_course: CourseMaker, start: Start
) -> None:
    course = make_course(2)
    course.check("setup")
    username, other = course.students
    process = start(username, OTHERS["an editor"], FORKING)
    course.check("remove", "--yes")
    assert all_end(process)
    assert not {username, other} & {entry.pw_name for entry in pwd.getpwall()}


@pytest.mark.root
def test_a_signal_reaches_only_processes_of_the_expected_user(
    course: Course, start: Start, uids: list[int]
) -> None:
    """A pid may have become another user's since it was looked up."""
    process = start(course.students[0], OTHERS["an editor"])
    notebooks.signal_process(process.pid, uids[1], signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    notebooks.signal_process(process.pid, uids[0], signal.SIGKILL)
    assert process.wait(5) == -signal.SIGKILL


# ---------------------------------------------------------------------------------------
# Work for several students at once
# ---------------------------------------------------------------------------------------


def students(count: int) -> list[Student]:
    return [Student(i, f"student{i}", "", "", "", "", "") for i in range(1, count + 1)]


def for_each_student(
    work: Callable[[Student], object], students: Iterable[Student]
) -> Generator[tuple[Student, Any], None, None]:
    """Have workers do something; yield what comes of it, which may be an Error."""
    root = pwd.getpwuid(0)
    members = [Member(each, root, notebooks.identity_of(root)) for each in students]
    workers = run_workers(lambda member: work(member.student), members)
    with contextlib.closing(workers):  # type: ignore[type-var]
        for worker in workers:
            try:
                result = worker.result()
            except Error as error:
                result = error
            yield worker.member.student, result


def test_each_student_has_a_process_of_their_own() -> None:
    def work(student: Student) -> tuple[str, int]:
        return student.username, os.getpid()

    results = dict(for_each_student(work, students(5)))
    names, pids = zip(*results.values())
    assert [student.username for student in results] == [*names]
    assert {*names} == {f"student{i}" for i in range(1, 6)}
    assert len({*pids, os.getpid()}) == 6


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two processors")
def test_several_students_are_worked_on_at_once() -> None:
    both = multiprocessing.get_context("fork").Barrier(2)

    def meet(student: Student) -> int:
        return both.wait(20)

    assert {result for _, result in for_each_student(meet, students(2))} == {0, 1}


def fail(student: Student) -> str:
    match student.line:
        case 1:
            raise Error("a reason")
        case 2:
            raise FileNotFoundError(2, "No such file", "a\nb")
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_student_who_fails_does_not_stop_the_others() -> None:
    results = {
        student.line: str(result) for student, result in for_each_student(fail, students(4))
    }
    assert results.pop(3).startswith("its process ended unexpectedly")
    assert results == {1: "a reason", 2: r"No such file: 'a\nb'", 4: "done"}


def test_no_reason_is_lost_when_two_things_fail() -> None:
    outcome = Outcome()
    for reason in ("the first reason", "the second"):
        with outcome.step("ada"):
            raise Error(reason)
    assert outcome.failures == {"ada": "the first reason; the second"}


def test_who_is_interrupted_ends_the_work_with_its_cleaning_up(tmp_path: Path) -> None:
    def work(student: Student) -> None:
        if student.line == 1:
            wait_until(tmp_path.joinpath("2").exists, 20, "the other's start")
            return
        tmp_path.joinpath("2").write_text(str(os.getpid()))
        try:
            time.sleep(300)
        finally:
            tmp_path.joinpath("clean").touch()

    results = for_each_student(work, students(2))
    assert isinstance(results, Generator)
    next(results)
    results.close()
    assert tmp_path.joinpath("clean").exists()
    assert not psutil.pid_exists(int(tmp_path.joinpath("2").read_text()))


def test_a_child_that_ends_while_we_are_interrupted_is_waited_for_once() -> None:
    """On one processor the child has ended before we hear of the signal."""

    def interrupt_us(channel: notebooks.Channel) -> None:
        channel.recv(1)
        os.kill(os.getppid(), signal.SIGINT)

    def wait_for_children() -> int:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        interrupted = 0
        for _ in range(100):
            child = notebooks.Child.fork(interrupt_us)
            try:
                child.channel.send(b"x")
                child.reap()
                time.sleep(60)
            except KeyboardInterrupt:
                interrupted += 1
            assert child.stop(10) in (0, None)
        return interrupted

    assert in_child(wait_for_children) == 100


def test_who_gives_no_sign_of_life_is_given_up_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that waits in the kernel for a FUSE file system that never answers."""
    monkeypatch.setattr(notebooks, "STUCK_SECONDS", 2.0)

    def work(student: Student) -> int:
        if student.line == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3)  # longer than that, but alive
        return student.line

    results = {x.line: str(result) for x, result in for_each_student(work, students(3))}
    assert results == {1: notebooks.STUCK, 2: "2", 3: "3"}


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two processors")
def test_nobody_is_given_up_because_the_caller_takes_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebooks, "STUCK_SECONDS", 2.0)
    results = {}
    for student, result in for_each_student(
        lambda student: time.sleep(5 * (student.line - 1)), students(2)
    ):
        results[student.line] = result
        time.sleep(3)
    assert results == {1: None, 2: None}


def test_nobody_is_given_up_because_the_command_was_suspended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Ctrl-Z, which suspends the workers, too, for longer than what counts as stuck."""
    monkeypatch.setattr(notebooks, "STUCK_SECONDS", 4.5)

    def work_suspended() -> list[str]:
        os.setpgid(0, 0)
        resume = f"sleep 1; kill -STOP -{os.getpid()}; sleep 5; kill -CONT -{os.getpid()}"
        with subprocess.Popen(["setsid", "sh", "-c", resume]):
            work = for_each_student(lambda _: time.sleep(3), students(2))
            return [str(result) for _, result in work]

    for _ in range(3):
        assert in_child(work_suspended) == ["None", "None"]


def test_a_worker_holds_no_lock_and_nothing_else_that_is_open(tmp_path: Path) -> None:
    with tmp_path.joinpath("list").open("w"):

        def work(student: Student) -> list[str]:
            links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            return [os.readlink(link) for link in links if os.path.exists(link)]

        ((_, found),) = for_each_student(work, students(1))
    assert isinstance(found, list) and found
    assert not [target for target in found if target.startswith(str(tmp_path))]


# Makes /proc/self/cmdline a gigabyte long: prctl(2), PR_SET_MM_MAP. It holds no memory.
LONG_COMMAND_LINE = """
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
size, no_reserve = 1 << 30, 0x4000
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
start = libc.mmap(None, ctypes.c_size_t(size), 3, flags, -1, ctypes.c_long(0))
libc.sbrk.restype = ctypes.c_void_p
stat = [0, 0, 0] + open("/proc/self/stat").read().rpartition(")")[2].split()
code = [int(stat[i]) for i in (26, 27, 45, 46, 47)] + [libc.sbrk(0), int(stat[28])]
values = code + [start, start + size, int(stat[50]), int(stat[51]), 0]
fields = (ctypes.c_ulong * 13)(*values)
ctypes.cast(fields, ctypes.POINTER(ctypes.c_uint))[24] = 0
ctypes.cast(fields, ctypes.POINTER(ctypes.c_uint))[25] = 0xFFFFFFFF  # exe_fd: none
if libc.prctl(35, 14, ctypes.addressof(fields), 13 * 8, 0):
    raise OSError(ctypes.get_errno(), "prctl")
print(flush=True)
time.sleep(300)
"""


@pytest.mark.root
def test_a_command_line_of_a_gigabyte_costs_shutdown_nothing(
    course: Course, start: Start
) -> None:
    process = start(course.students[0], OTHERS["an editor"], LONG_COMMAND_LINE)
    with open(f"/proc/{process.pid}/cmdline", "rb") as file:
        assert len(file.read(1 << 20)) == 1 << 20
    assert sum(map(len, notebooks.read_argv(process.pid))) <= notebooks.MAX_ARGV_BYTES
    kernel = start(course.students[1], JUPYTER["a kernel"])
    begin = time.monotonic()
    assert stop_jupyter(course.students) == {}
    assert time.monotonic() - begin < GRACE_SECONDS
    assert not runs(kernel) and runs(process)
