"""Acting as a student for a moment, and becoming one for good."""

import contextlib
import ctypes
import multiprocessing
import os
import pwd
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import notebooks
from notebooks import Identity, acting_as, drop_privileges, identity_of
from support import ENVIRONMENT, NOTEBOOKS, Course, in_child, run_as

EXTRA_GROUPS = (4, 27, 54321)  # of the process that takes another identity
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 4  # <linux/prctl.h>, <securebits.h>


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 1) as course:
        course.check("setup")
        yield course


@pytest.fixture(scope="module")
def student(course: Course) -> str:
    return course.students[0]


@pytest.fixture(scope="module")
def identity(student: str) -> Identity:
    """The ids of a student, who is in the course's group besides their own."""
    identity = identity_of(pwd.getpwnam(student))
    assert len({*identity.groups}) == 2
    return identity


@contextlib.contextmanager
def for_good(identity: Identity) -> Iterator[None]:
    drop_privileges(identity)
    yield


def process_ids() -> tuple[tuple[int, ...], tuple[int, ...], set[int]]:
    return os.getresuid(), os.getresgid(), {*os.getgroups()}


def result_of(function: Callable[[], object]) -> object:
    """Return what a function returns, or the type of what it raises."""
    try:
        return function()
    except Exception as error:
        return type(error)


@pytest.mark.root
def test_acting_as_takes_only_the_effective_ids_and_all_groups(
    identity: Identity,
) -> None:
    def act() -> object:
        os.setgroups(EXTRA_GROUPS)
        with acting_as(identity):
            during = process_ids()
        return during, process_ids()

    uid, gid, groups = identity
    assert in_child(act) == (
        ((0, uid, 0), (0, gid, 0), {*groups}),
        ((0, 0, 0), (0, 0, 0), {*EXTRA_GROUPS}),
    )


@pytest.mark.root
def test_acting_as_ends_with_an_error_too(identity: Identity) -> None:
    def act() -> object:
        os.setgroups(EXTRA_GROUPS)
        with contextlib.suppress(ZeroDivisionError), acting_as(identity):
            raise ZeroDivisionError
        return process_ids()

    assert in_child(act) == ((0, 0, 0), (0, 0, 0), {*EXTRA_GROUPS})


@pytest.mark.root
@pytest.mark.parametrize("become", [acting_as, for_good])
def test_what_only_another_group_of_roots_may_read_stays_closed(
    become: Callable[[Identity], contextlib.AbstractContextManager[None]],
    identity: Identity,
    course: Course,
) -> None:
    """A forgotten setgroups shows only if the process has groups to lose."""
    path = Path("/home", f"{course.group}-secret")
    path.write_text("secret")
    os.chmod(path, 0o640)

    def read() -> object:
        os.setgroups(EXTRA_GROUPS)
        with become(identity):
            return result_of(path.read_text)

    os.chown(path, 0, EXTRA_GROUPS[-1])
    assert in_child(read) is PermissionError
    os.chown(path, 0, identity.groups[-1])
    assert in_child(read) == "secret"
    path.unlink()


@contextlib.contextmanager
def process_that_acts_as(identity: Identity) -> Iterator[int]:
    """Yield the pid of a process that has the student's effective ids."""
    ours, theirs = multiprocessing.Pipe()

    def act() -> None:
        with acting_as(identity):
            theirs.send(os.getpid())
            theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("enough")
        process.join()


@pytest.mark.root
@pytest.mark.parametrize("command", ["kill -0", "ls /proc/{}/fd", "cat /proc/{}/maps"])
def test_a_student_cannot_touch_the_process_that_acts_as_them(
    command: str, student: str, identity: Identity
) -> None:
    script = command if "{}" in command else f"{command} {{}}"
    with process_that_acts_as(identity) as pid:
        refused = run_as(student, "sh", "-c", script.format(pid))
    assert refused.returncode != 0
    assert "ermi" in refused.stderr  # Permission denied, Operation not permitted
    assert run_as(student, "sh", "-c", script.format("$$")).returncode == 0


@pytest.mark.root
def test_drop_privileges_leaves_nothing_of_roots(identity: Identity) -> None:
    def drop() -> object:
        os.setgroups(EXTRA_GROUPS)
        drop_privileges(identity)
        attempts = [
            result_of(lambda: os.setresuid(0, 0, 0)),
            result_of(lambda: os.setresgid(0, 0, 0)),
            result_of(lambda: os.setgroups([0])),
            result_of(lambda: os.kill(os.getppid(), 0)),
        ]
        return process_ids(), attempts

    uid, gid, groups = identity
    assert in_child(drop) == (
        ((uid, uid, uid), (gid, gid, gid), {*groups}),
        [PermissionError] * 4,
    )


@pytest.mark.root
def test_drop_privileges_notices_that_root_can_be_regained(identity: Identity) -> None:
    """With this bit, capabilities survive the change of ids: capabilities(7)."""

    def drop() -> object:
        libc = ctypes.CDLL(None)
        assert libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
        return result_of(lambda: drop_privileges(identity))

    assert in_child(drop) is RuntimeError


def test_the_groups_of_an_identity_are_those_of_a_log_in() -> None:
    account = pwd.getpwuid(os.getuid())
    done = subprocess.run(
        ["id", "-G", account.pw_name], capture_output=True, text=True, check=True
    )
    identity = identity_of(account)
    assert {*identity.groups} == {*map(int, done.stdout.split())}
    assert identity[:2] == (account.pw_uid, account.pw_gid)


def test_an_ordinary_user_acts_as_themselves_without_any_change() -> None:
    before = process_ids()
    with acting_as(identity_of(pwd.getpwuid(os.geteuid()))):
        assert process_ids() == before


@pytest.mark.root
@pytest.mark.parametrize("command", ["setup", "launch"])
def test_an_interpreter_that_students_cannot_execute_is_refused(
    command: str, tmp_path: Path
) -> None:
    """The first directory in the way is named, and nothing has been changed."""
    with (
        tempfile.TemporaryDirectory(dir="/home") as directory,  # students can enter it
        Course(tmp_path, 1) as course,
    ):
        os.chmod(directory, 0o755)
        closed = Path(directory, "closed")
        venv.create(closed / "venv", symlinks=True)
        os.chmod(closed, 0o700)
        (libraries,) = closed.glob("venv/lib/*/site-packages")
        (libraries / "ours.pth").write_text(sysconfig.get_path("purelib"))
        before = course.user_list.read_bytes()
        done = subprocess.run(
            [closed / "venv/bin/python", NOTEBOOKS, command, course.config],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert done.returncode == 2
        assert f": {closed} is closed to them" in done.stderr
        assert "as `sudo make install` does" in done.stderr
        assert course.user_list.read_bytes() == before
        assert notebooks.find_account(course.students[0]) is None
