"""What the other tests rely on: an account of theirs never reaches the machine."""

import grp
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import conftest
from support import Course, claim, in_child, is_ours, run_as, wait_until

pytestmark = pytest.mark.root


def machine(path: str) -> Path:
    """Return a path as it is outside of the tests' mount namespace."""
    return Path(f"/proc/self/fd/{conftest.MACHINE_ROOT}") / path.lstrip("/")


def add_account(username: str, *options: str) -> None:
    subprocess.run(["useradd", "--create-home", *options, username], check=True)


def test_an_account_of_a_test_does_not_reach_the_machine(course: Course) -> None:
    username = course.students[0]
    files = ["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow", "/etc/subuid"]
    before = [machine(path).read_bytes() for path in files]
    add_account(username)
    assert course.home(username).is_dir()
    assert [machine(path).read_bytes() for path in files] == before
    assert not machine(f"/home/{username}").exists()


def start_course_of_the_machine(directory: Path) -> int:
    """Make this process see a machine with a course; return the uid of its student."""
    conftest.unshare_mounts()
    conftest.mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(directory))
    shutil.copytree("/etc", directory / "etc", symlinks=True)
    for name in ("etc", "home", "var"):
        directory.joinpath(name).mkdir(exist_ok=True)
        conftest.mount("--bind", str(directory / name), f"/{name}")
    uid = next(conftest.unused_ids())[0]  # these would be the tests' if it were free
    subprocess.run(["groupadd", "students"], check=True)
    add_account("ada", "--uid", str(uid), "--groups", "students")
    Path("/var/lib/notebooks").mkdir(parents=True)
    return uid


def test_a_course_of_the_machine_does_not_exist_for_the_tests(tmp_path: Path) -> None:
    def look() -> tuple[set[str], set[str], int, int]:
        theirs = start_course_of_the_machine(tmp_path)
        assert theirs not in {ids[0] for ids in conftest.unused_ids()}
        conftest.enter_private_host()
        assert not any(map(os.path.lexists, ("/home/ada", "/var/lib/notebooks")))
        accounts = {entry.pw_name for entry in pwd.getpwall()}
        groups = {entry.gr_name for entry in grp.getgrall()}
        add_account("ada")
        return accounts, groups, theirs, pwd.getpwnam("ada").pw_uid

    accounts, groups, theirs, ours = in_child(look)
    assert {"root", "daemon", "nobody"} <= accounts and "ada" not in accounts
    assert {"root", "sudo", "nogroup"} <= groups and not {"ada", "students"} & groups
    assert ours // 1000 != theirs // 1000


def test_what_a_test_run_has_claimed_no_other_gets_until_it_ends() -> None:
    what, numbers = f"tries-{secrets.token_hex(4)}", [range(10), range(10, 20)]

    def claim_all() -> list[range]:
        claimed = [claim(what, numbers) for _ in numbers]
        with pytest.raises(OSError, match=what):
            claim(what, numbers)
        return claimed

    for _ in range(2):
        assert in_child(claim_all) == numbers


def test_signals_that_are_ignored_here_reach_the_programs_that_tests_start() -> None:
    """As in a test run that a script has started with nohup, and in the background."""
    signals = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

    def ends_of_programs() -> list[int]:
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        conftest.heed_signals()
        return [
            subprocess.run(["sh", "-c", f"kill -{signum:d} $$"]).returncode
            for signum in signals
        ]

    assert in_child(ends_of_programs) == [-signum for signum in signals]


def test_all_files_of_a_home_are_on_one_device(course: Course) -> None:
    username = course.students[0]
    add_account(username)
    home = course.home(username)
    run_as(username, "touch", "file")
    assert {os.lstat(path).st_dev for path in (home, *home.iterdir())} == {
        os.stat("/home").st_dev
    }


def test_a_course_ends_what_its_students_run_and_deletes_them(tmp_path: Path) -> None:
    with Course(tmp_path) as course:
        username = course.students[0]
        add_account(username)
        script = "exec >&- 2>&-; trap '' TERM; while :; do sleep 10 & sleep 0.01; done"
        run_as(username, "setsid", "--fork", "sh", "-c", script)
        wait_until(lambda: len(course.processes()) > 5, 10, "processes of a student")
        home, running = course.home(username), course.processes()
    with pytest.raises(KeyError):
        pwd.getpwnam(username)
    assert not home.exists()
    assert not [process for process in running if is_ours(process)]
