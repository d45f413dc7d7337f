"""Homes: where hosts really have them, packed by remove, and unpacked by setup."""

import contextlib
import grp
import os
import pwd
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import notebooks
from conftest import CourseMaker
from support import Course, made_account, run_as
from test_accounts import DEEP, exists

pytestmark = pytest.mark.root


def shell(username: str, script: str) -> str:
    done = run_as(username, "sh", "-euc", script)
    assert done.returncode == 0, done
    return done.stdout


def contents(directory: Path) -> dict[str, tuple[int, str, bytes]]:
    """Return mode, owner and content of all that is in a directory, by relative path."""
    found = {}
    for path in directory.rglob("*"):
        info = path.lstat()
        data = link = b""
        if path.is_symlink():
            link = os.readlink(path).encode()
        elif path.is_file():
            with path.open("rb") as file:
                data = file.read(1000) + str(info.st_size).encode()
        name = str(path.relative_to(directory))
        found[name] = info.st_mode, pwd.getpwuid(info.st_uid).pw_name, data + link
    return found


@contextlib.contextmanager
def kept(*names: str) -> Iterator[None]:
    """Restore files of the host at the end."""
    old = {name: Path(name).read_bytes() for name in names}
    try:
        yield
    finally:
        for name, data in old.items():
            Path(name).write_bytes(data)


# ---------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------


@pytest.fixture
def packed(make_course: CourseMaker) -> Course:
    """A course of two students with work in and outside of the tutorial directory."""
    course = make_course(2, archive_dir="archives")
    course.check("setup")
    for username in course.students:
        script = """
            echo in >course/notes; mkdir -p project/deep; echo out >project/deep/file
            chmod 640 project/deep/file; ln -s /etc/shadow link; mkfifo pipe
            truncate -s 1T sparse; echo changed >.bashrc; echo x >'a b
c'; chmod 700 sparse; mkdir closed; echo closed >closed/x; chmod 0 closed"""
        shell(username, script)
    return course


def test_a_course_moves_to_another_host_with_its_directory(packed: Course) -> None:
    before = {x: contents(packed.home(x)) for x in packed.students}
    uids = {packed.home(x).stat().st_uid for x in packed.students}
    passwords = packed.rows()
    output = packed.check("remove", "--yes")
    assert f"Each home is packed into {packed.directory}/archives before." in output
    assert not any(map(exists, packed.students))
    archive = packed.directory / "archives" / f"{packed.students[0]}.tar.gz"
    assert (archive.stat().st_mode & 0o777, archive.owner()) == (0o600, "root")

    with contextlib.ExitStack() as stack:
        for uid in uids:  # somebody else has them on the other host
            stack.enter_context(made_account("--uid", str(uid)))
        rows = [
            {**row, "sys-pass": passwords[x]["sys-pass"]} for x, row in passwords.items()
        ]
        packed.write_students(rows[::-1])
        packed.check("setup")
        for username in packed.students:
            assert packed.home(username).stat().st_uid not in uids
            after = contents(packed.home(username))
            closed = {"closed": after.pop("closed"), "closed/x": after.pop("closed/x")}
            assert closed["closed/x"][2] == b"closed\n7"
            del before[username]["closed"], before[username]["closed/x"]
            assert after == before[username]
            assert (packed.home(username) / "sparse").stat().st_blocks == 0
        packed.check("remove", "--yes")
    assert sorted(x.name for x in archive.parent.iterdir()) == sorted(
        name for x in packed.students for name in (f"{x}.tar.gz", f"{x}.tar.gz.~1~")
    )


def test_a_home_that_cannot_be_packed_is_not_deleted(packed: Course) -> None:
    huge, foreign = packed.students
    shell(huge, "head -c 3000000 /dev/urandom >work")
    (packed.home(foreign) / "roots").write_text("closed to the student")
    (packed.home(foreign) / "roots").chmod(0o600)
    packed.configure(archive_limit="2M")
    done = packed.run("remove", "--yes")
    assert done.returncode == 1
    assert f"{huge}: not deleted: the archive would be larger" in done.stderr
    assert f"{foreign}: not deleted: tar could not pack all of the home" in done.stderr
    assert packed.home(huge).joinpath("work").stat().st_size == 3000000
    assert os.listdir(packed.directory / "archives") == []

    packed.check("setup")  # opens the accounts again
    packed.configure(archive_limit="10M")
    (packed.home(foreign) / "roots").unlink()
    packed.check("remove", "--yes")
    with tarfile.open(packed.directory / "archives" / f"{huge}.tar.gz") as archive:
        assert archive.getmember("./work").size == 3000000


def test_whatever_a_student_makes_is_packed(packed: Course) -> None:
    """Directories too deep for a path, closed ones, names of any bytes; and no home."""
    student, homeless = packed.students
    script = "import os; os.mkdir(b'\\xff\\n'); os.chmod(b'\\xff\\n', 0)"
    made = run_as(student, sys.executable, "-c", f"{DEEP}\n{script}")
    assert made.returncode == 0, made
    shutil.rmtree(packed.home(homeless))
    packed.check("remove", "--yes")
    assert not any(map(exists, packed.students))
    archive = packed.directory / "archives" / f"{student}.tar.gz"
    done = subprocess.run(["tar", "-tzf", str(archive)], check=True, capture_output=True)
    assert max(map(len, done.stdout.split(b"\n"))) > 3000 * len("deep/")
    setup = packed.run("setup")  # tar makes no path that is longer than 4,096 bytes
    assert f"{student}: {archive} could not be unpacked" in setup.stderr
    assert setup.stderr.count("\n") == 1 and packed.home(homeless).is_dir()


def test_a_remove_that_was_killed_keeps_the_whole_archive(packed: Course) -> None:
    """A home that is half deleted is neither packed again nor given back."""
    username, other = packed.students
    packed.check("remove", "--yes", "--only", username)
    archive = packed.directory / "archives" / f"{username}.tar.gz"
    whole = archive.read_bytes()
    packed.check("setup")
    home = packed.home(username)
    home.rename(home.with_name(f".{username}-removed"))  # where it is killed
    packed.check("setup")
    assert (home / "project/deep/file").read_text() == "out\n"
    shutil.rmtree(home)
    packed.check("remove", "--yes")
    assert archive.read_bytes() == whole
    assert not [x for x in os.listdir("/home") if username in x or other in x]


def test_a_program_that_its_student_has_stopped_is_ended(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebooks, "STUCK_SECONDS", 1.0)
    course.check("setup")
    identity = notebooks.identity_of(pwd.getpwnam(course.students[0]))
    assert notebooks.run_as(identity, ["true"])
    assert not notebooks.run_as(identity, ["false"])
    with pytest.raises(notebooks.StuckError):
        notebooks.run_as(identity, ["sh", "-c", "kill -STOP $$"])
    assert course.processes() == []
    busy = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    assert notebooks.run_as(identity, [sys.executable, "-c", busy])


def test_an_archive_that_cannot_be_unpacked_makes_no_home(packed: Course) -> None:
    username, other = packed.students
    packed.check("remove", "--yes")
    archive = packed.directory / "archives" / f"{username}.tar.gz"
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    done = packed.run("setup")
    assert done.returncode == 1
    assert f"{username}: {archive} could not be unpacked" in done.stderr
    assert not packed.home(username).exists() and (packed.home(other) / "project").is_dir()
    assert not [name for name in os.listdir("/home") if name.startswith(".")]
    archive.write_bytes(data)
    packed.check("setup")
    assert (packed.home(username) / "course/notes").read_text() == "in\n"


def test_remove_says_how_many_files_no_retrieve_has_copied(course: Course) -> None:
    course.check("setup")
    course.check("send")
    course.check("retrieve")
    worker, idle = course.students
    shell(worker, "mkdir -p project Desktop; touch project/a project/b Desktop/c .hidden")
    output = course.run("remove", stdin=subprocess.DEVNULL).stdout
    assert (
        f"Files that are never retrieved (outside ~/course, or in .git): {worker} (3).\n"
        in output
    )
    assert idle not in output


# ---------------------------------------------------------------------------------------
# Homes that are left over
# ---------------------------------------------------------------------------------------


def test_homes_that_are_left_over_give_their_uids(make_course: CourseMaker) -> None:
    """The list is in another order, and has somebody new at its beginning."""
    course = make_course(4)
    new, *old = course.students
    rows = course.rows()
    course.write_students(rows[x] for x in old)
    course.check("setup")
    for username in old:
        shell(username, "echo mine >diary")
    before = {x: contents(course.home(x)) for x in old}
    passwords = course.rows()
    for username in old:
        subprocess.run(["userdel", username], check=True, stderr=subprocess.DEVNULL)

    course.write_students(
        [{**passwords[old[0]], "username": new}]
        + [{**passwords[x], "sys-pass": ""} for x in reversed(old)]
    )
    output = course.check("setup")
    for username in old:
        assert f"{username}: gets uid {pwd.getpwnam(username).pw_uid}, whose" in output
        assert contents(course.home(username)) == before[username]
        assert shell(username, "cat diary") == "mine\n"
    uids = {pwd.getpwnam(x).pw_uid for x in course.students}
    assert len(uids) == 4
    assert shell(new, "ls") == "course\n"


def test_nobody_gets_the_uid_of_a_home_that_is_somebody_elses(course: Course) -> None:
    username, other = course.students
    with made_account() as account:
        home = Path("/home", username)
        home.mkdir(mode=0o700)
        os.chown(home, account.pw_uid, -1)
        try:
            done = course.run("setup")
            assert done.returncode == 1
            assert f"uid {account.pw_uid}, which owns it, is somebody else's" in done.stderr
            assert not exists(username) and exists(other)
        finally:
            home.rmdir()


# ---------------------------------------------------------------------------------------
# Hosts as they are
# ---------------------------------------------------------------------------------------


def test_the_hosts_choice_of_base_directory_shell_and_skeleton_is_honoured(
    course: Course, tmp_path: Path
) -> None:
    skeleton, base = tmp_path / "skel", Path("/var/homes/students")
    skeleton.mkdir()
    (skeleton / "welcome").write_text("to the host\n")
    with kept("/etc/default/useradd", "/etc/login.defs"):
        with open("/etc/default/useradd", "a") as file:
            file.write(f"\nHOME={base}\nSHELL=/bin/dash\nSKEL={skeleton}\n")
        path = Path("/etc/login.defs")
        text = re.sub(r"(?m)^USERGROUPS_ENAB\s.*\n", "", path.read_text())
        path.write_text(f"{text}USERGROUPS_ENAB no\n")
        for _ in range(2):
            course.check("setup")
            for username in course.students:
                account = pwd.getpwnam(username)
                assert (account.pw_dir, account.pw_shell) == (
                    f"{base}/{username}",
                    "/bin/dash",
                )
                assert grp.getgrgid(account.pw_gid).gr_name == "users"
                assert shell(username, "cat welcome; ls -a . | wc -l") == "to the host\n4\n"
            course.check("send")
            course.check("remove", "--yes")
            assert os.listdir(base) == []
    shutil.rmtree(base.parent)


def test_a_private_group_that_is_left_over_is_taken(course: Course) -> None:
    username, other = course.students
    subprocess.run(["groupadd", username], check=True)
    subprocess.run(["groupadd", "--system", other], check=True)
    try:
        done = course.run("setup")
        assert f"{other}: is the name of a group of the system, or of others" in done.stderr
        assert pwd.getpwnam(username).pw_gid == grp.getgrnam(username).gr_gid
        assert not exists(other)
    finally:
        subprocess.run(["groupdel", other], check=True)
    course.check("setup")


def test_a_group_that_others_are_in_becomes_nobodys_own(course: Course) -> None:
    username, other = course.students
    with made_account() as member, made_account() as primary:
        subprocess.run(["groupadd", "--users", member.pw_name, username], check=True)
        subprocess.run(["groupadd", other], check=True)
        subprocess.run(["usermod", "--gid", other, primary.pw_name], check=True)
        done = course.run("setup")
        for name in course.students:
            assert f"{name}: is the name of a group of the system, or of" in done.stderr
            assert not exists(name)
    subprocess.run(["groupdel", username], check=True)
    subprocess.run(["groupdel", other], check=True)


def test_a_place_in_which_root_can_make_no_home_leaves_no_half_account(
    course: Course, tmp_path: Path
) -> None:
    """As NFS with root_squash; accounts that have a home there are adopted."""
    base = tmp_path / "export"
    base.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    course.check("setup", "--only", course.students[1])
    subprocess.run(["mount", "--bind", base, base], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", base], check=True)
    try:
        with kept("/etc/default/useradd"):
            with open("/etc/default/useradd", "a") as file:
                file.write(f"\nHOME={base}\n")
            done = course.run("setup")
        assert done.returncode == 1
        assert (
            f"{course.students[0]}: {base} lets root make no homes (Read-only"
            in done.stderr
        )
        assert not exists(course.students[0])
        row = course.rows()[course.students[0]]
        assert row["nb-pass"] and not row["sys-pass"]
        assert "1 account" not in done.stdout and "1 kept" in done.stdout
    finally:
        subprocess.run(["umount", base], check=True)


EXTRA = Path("/var/lib/extrausers")


@pytest.fixture
def directory_service(course: Course) -> Iterator[pwd.struct_passwd]:
    """An account and the course's group of a service, which no command here can change."""
    if not EXTRA.is_dir():
        pytest.skip("needs the package libnss-extrausers")
    uid = notebooks.read_login_defs("UID_MAX", 60000) - 1
    with kept("/etc/nsswitch.conf"):
        path = Path("/etc/nsswitch.conf")
        text = re.sub(
            r"(?m)^((passwd|group|shadow):.*)$", r"\1 extrausers", path.read_text()
        )
        path.write_text(text)
        (EXTRA / "passwd").write_text(f"eve:x:{uid}:{uid}:Eve:/home/ldap/eve:/bin/bash\n")
        (EXTRA / "group").write_text(f"eve:x:{uid}:\n{course.group}:x:{uid + 1}:eve\n")
        (EXTRA / "shadow").write_text("eve:*:19000:0:99999:7:::\n")
        yield pwd.struct_passwd(
            ("eve", "x", uid, uid, "Eve", "/home/ldap/eve", "/bin/bash")
        )
        for path in EXTRA.iterdir():
            path.unlink()
        shutil.rmtree("/home/ldap", ignore_errors=True)


def test_an_account_of_a_directory_service_gets_a_home_and_its_group_is_used(
    course: Course, directory_service: pwd.struct_passwd
) -> None:
    with course.user_list.open("a") as file:
        file.write("eve,,\n")
    done = course.run("setup")
    assert done.returncode == 0, done
    assert f"{course.group} is not in /etc/group" in done.stderr
    home = Path("/home/ldap/eve")
    info = home.stat()
    assert (info.st_mode & 0o777, info.st_uid) == (0o700, directory_service.pw_uid)
    assert (home / "course").is_dir() and (home / ".bashrc").is_file()
    course.check("send")
    assert (home / "course/material").is_dir()
    assert all(map(exists, course.students))

    work = home / "course/work"
    work.write_text("mine\n")
    course.check("retrieve")
    done = course.run("remove", "--yes")
    assert done.returncode == 0, done
    assert "eve was not made by setup: it only leaves the course" in done.stdout
    assert work.read_text() == "mine\n" and not any(map(exists, course.students))
