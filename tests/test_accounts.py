"""The accounts that setup makes and remove deletes, and those that both leave alone."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import notebooks
from conftest import CourseMaker
from support import (
    Course,
    interrupt,
    made_account,
    run_as,
    run_on_terminal,
    start,
    wait_for_read,
    wait_until,
)

pytestmark = pytest.mark.root

MARKED = f",,,,{notebooks.MARK}"
DEEP = """
import os
for _ in range(3000):
    os.mkdir("deep")
    os.chdir("deep")
"""


def snapshot() -> dict[str, object]:
    """Return all that accounts consist of, but for the backup files of useradd."""
    found: dict[str, object] = {}
    for top in ("/etc", "/home", "/var/mail", "/var/spool", "/var/lib/notebooks"):
        for directory, names, files in os.walk(top):
            for name in (*names, *files):
                path = Path(directory, name)
                info = path.lstat()
                facts = (info.st_mode, info.st_uid, info.st_gid)
                content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
                if not name.endswith("-") and name != ".pwd.lock":
                    found[str(path)] = (*facts, content)
    return found


def shadow_line(username: str) -> str:
    lines = Path("/etc/shadow").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{username}:"))
    return line


def password_works(username: str, password: str) -> bool:
    """Say whether a log-in with this password would succeed: crypt(3)."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    known = shadow_line(username).split(":")[1].encode()
    return known.startswith(b"$") and crypt(password.encode(), known) == known


def assert_passwords_work(course: Course) -> None:
    for username, row in course.rows().items():
        assert row["nb-pass"]
        assert password_works(username, row["sys-pass"])
        assert not password_works(username, row["nb-pass"])


def members(group: str) -> set[str]:
    return {*grp.getgrnam(group).gr_mem}


def exists(username: str) -> bool:
    return notebooks.find_account(username) is not None


def add_student(course: Course, username: str) -> None:
    """Add a row with nothing but a username."""
    with course.user_list.open("a") as file:
        file.write(f"{username}\n")


@pytest.fixture(scope="module")
def teacher() -> Iterator[pwd.struct_passwd]:
    """A user who calls sudo."""
    with made_account() as account:
        yield account


@pytest.fixture(scope="module")
def sudo(teacher: pwd.struct_passwd) -> dict[str, str]:
    """What sudo adds to the environment."""
    return {"SUDO_UID": str(teacher.pw_uid)}


# ---------------------------------------------------------------------------------------
# setup
# ---------------------------------------------------------------------------------------


def test_a_new_account_is_private_marked_and_in_the_group(course: Course) -> None:
    output = course.check("setup")
    for i, username in enumerate(course.students, 1):
        account = pwd.getpwnam(username)
        home = Path(account.pw_dir).stat()
        assert account.pw_dir == f"/home/{username}"
        assert account.pw_shell == "/bin/bash"
        mark = f"{notebooks.MARK}@{course.config}#{course.directory.stat().st_ino}"
        assert account.pw_gecos == f"Name{i} Surname{i},,,,{mark}"
        assert grp.getgrgid(account.pw_gid).gr_name == username
        assert (home.st_mode, home.st_uid) == (stat.S_IFDIR | 0o700, account.pw_uid)
        assert course.home(username).joinpath("course").owner() == username
        assert f"{username}: new\n" in output
    assert members(course.group) == {*course.students}
    assert "2 accounts made, 0 adopted, 0 kept" in output


def test_a_new_home_has_all_that_the_skeleton_has(make_course: CourseMaker) -> None:
    skeleton = Path("/etc/skel")
    private, link = skeleton / "private/file", skeleton / "link"
    private.parent.mkdir()
    private.write_text("text")
    private.chmod(0o600)
    link.symlink_to("/etc/shadow")
    try:
        course = make_course(1)
        course.check("setup")
        home = course.home(course.students[0])
        assert home.joinpath("private/file").read_text() == "text"
        assert os.readlink(home / "link") == "/etc/shadow"
        names = {str(path.relative_to(home)) for path in home.rglob("*")}
        wanted = {str(path.relative_to(skeleton)) for path in skeleton.rglob("*")}
        assert names == {*wanted, "course"}
        uid = home.stat().st_uid
        assert {path.lstat().st_uid for path in home.rglob("*")} == {uid}
    finally:
        shutil.rmtree(private.parent)
        link.unlink()
    assert Path("/etc/shadow").stat().st_uid == 0


def test_the_passwords_of_the_list_work_and_are_easy_to_read(
    make_course: CourseMaker,
) -> None:
    course = make_course(3, password_length=20)
    course.check("setup")
    assert_passwords_work(course)
    assert stat.S_IMODE(course.user_list.stat().st_mode) == 0o600
    rows = course.rows().values()
    passwords = [row[column] for row in rows for column in ("sys-pass", "nb-pass")]
    assert len({*passwords}) == 6
    assert not {*"0O1lI"} & {*"".join(passwords)}
    for groups in (password.split("-") for password in passwords):
        assert [*map(len, groups)] == [4, 4, 4, 4, 4] and "".join(groups).isalnum()


def test_passwords_have_what_policies_ask_for() -> None:
    """Lower and upper case, digits and something else, however short they are."""
    for length in (8, 9, 12, 128) * 100:
        password = notebooks.make_password(length)
        assert sum(map(str.isalnum, password)) == length
        assert re.search("[a-z]", password) and re.search("[A-Z]", password)
        assert re.search("[0-9]", password) and "-" in password


def test_setup_again_changes_nothing(course: Course) -> None:
    course.check("setup")
    before = snapshot(), course.user_list.read_bytes()
    assert "0 accounts made, 0 adopted, 2 kept" in course.check("setup")
    assert (snapshot(), course.user_list.read_bytes()) == before


def test_setup_again_does_only_what_is_missing(make_course: CourseMaker) -> None:
    """A new row, a deleted and a locked account, a changed and a lost password."""
    course = make_course(5)
    deleted, changed, forgotten, locked, new = course.students
    rows = course.rows()
    course.write_students(rows[x] for x in (deleted, changed, forgotten, locked))
    course.check("setup")
    before = course.rows()
    subprocess.run(["userdel", "--remove", deleted], check=True, capture_output=True)
    subprocess.run(["chpasswd"], input=f"{changed}:their own", text=True, check=True)
    subprocess.run(["usermod", "--lock", locked], check=True)
    before[forgotten]["sys-pass"] = ""
    course.write_students([*before.values(), {**before[deleted], **rows[new]}])
    cells = course.rows()
    cells[new] |= {"sys-pass": "", "nb-pass": "as the teacher wished"}
    course.write_students(cells.values())
    assert "2 accounts made, 0 adopted, 3 kept" in course.check("setup")
    after = course.rows()
    assert after[new]["nb-pass"] == "as the teacher wished"
    assert {name: after[name] for name in (deleted, changed, locked)} == {
        name: before[name] for name in (deleted, changed, locked)
    }
    assert after[forgotten]["nb-pass"] == before[forgotten]["nb-pass"]
    assert password_works(changed, "their own")
    assert shadow_line(locked).split(":")[1].startswith("!$")
    for username in (deleted, forgotten, new):
        assert password_works(username, after[username]["sys-pass"])


def test_a_home_that_is_gone_is_made_again(course: Course) -> None:
    """As when useradd was killed between the account and its home."""
    course.check("setup")
    username = course.students[0]
    subprocess.run(["rm", "-r", course.home(username)], check=True)
    course.check("setup")
    home = course.home(username)
    assert (home.owner(), home.group()) == (username, username)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert home.joinpath("course").owner() == username


def descendants(pid: int) -> Iterator[int]:
    """Yield a process and those below it, fast enough to miss none."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from descendants(int(child))


def test_no_command_line_shows_a_password_and_no_home_is_ever_open(
    make_course: CourseMaker,
) -> None:
    course = make_course(4)
    homes = [Path("/home", username) for username in course.students]
    texts: set[bytes] = set()
    modes: set[int] = set()
    process = start("setup", config=course.config)
    while process.poll() is None:
        for pid in descendants(process.pid):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    texts.add(Path(f"/proc/{pid}/{name}").read_bytes())
        for home in homes:
            with contextlib.suppress(FileNotFoundError):
                modes.add(stat.S_IMODE(home.stat().st_mode))
    process.communicate()
    assert process.returncode == 0
    seen = b"\n".join(texts)
    assert b"useradd\0" in seen and b"chpasswd\0" in seen
    for row in course.rows().values():
        assert row["sys-pass"].encode() not in seen
        assert row["nb-pass"].encode() not in seen
    assert 0o700 in modes and not any(mode & 0o077 for mode in modes)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_setup_is_finished_by_the_next_one(
    make_course: CourseMaker, signum: signal.Signals, done: int
) -> None:
    """As Ctrl-C does, or the end of power, to setup and to what it has started."""
    course = make_course(4)
    process = start("setup", config=course.config)
    try:
        wait_until(lambda: "nb-pass" in course.user_list.read_text(), 20, "passwords")
        if done:
            wait_until(lambda: exists(course.students[done - 1]), 20, "an account")
    finally:
        errors = interrupt(process, signum)
    promised = course.rows()
    made = [username for username in course.students if exists(username)]
    assert len(made) >= done
    if signum == signal.SIGINT:
        assert process.returncode == 130 and "interrupted" in errors, errors
        assert all(password_works(x, promised[x]["sys-pass"]) for x in made)
    course.check("setup")
    assert course.rows() == promised
    assert_passwords_work(course)
    assert all(course.home(x).joinpath("course").is_dir() for x in course.students)


def test_what_is_in_the_way_of_one_account_does_not_stop_the_others(
    make_course: CourseMaker,
) -> None:
    """A home that somebody left behind is not given to a new student."""
    course = make_course(3)
    username = course.students[1]
    home = Path("/home", username)
    home.mkdir(mode=0o700)
    (home / "diary").write_text("private")
    try:
        done = course.run("setup")
        assert done.returncode == 1
        assert f"{username}: {home} exists without an account" in done.stderr
        assert [exists(x) for x in course.students] == [True, False, True]
        assert home.owner() == "root" and os.listdir(home) == ["diary"]
    finally:
        (home / "diary").unlink()
        home.rmdir()
    course.check("setup")
    assert_passwords_work(course)


def test_an_account_that_existed_is_adopted_and_never_deleted(
    make_course: CourseMaker,
) -> None:
    course = make_course(1)
    with made_account("--shell", "/bin/sh") as account:
        username = account.pw_name
        subprocess.run(["chpasswd"], input=f"{username}:own", text=True, check=True)
        home = Path(account.pw_dir)
        home.chmod(0o751)
        run_as(username, "sh", "-c", "echo mine >diary; mkdir .ipython", check=True)
        add_student(course, username)
        before = shadow_line(username), snapshot()
        assert "1 account made, 1 adopted, 0 kept" in course.check("setup")
        assert members(course.group) == {*course.students, username}
        row = course.rows()[username]
        assert row["nb-pass"] and not row["sys-pass"]
        assert shadow_line(username) == before[0]
        output = course.check("remove", "--yes")
        assert f"{username} was not made by setup: it only leaves the course" in output
        assert "1 account deleted, 1 left" in output
        assert pwd.getpwnam(username) == account
        run_as(username, "rmdir", "course", check=True)  # the only thing that we made
        assert (shadow_line(username), snapshot()) == before
        assert set(course.rows()[username].values()) <= {username, "", None}


def test_the_group_is_optional(make_course: CourseMaker) -> None:
    course = make_course(1, group="")
    before = {entry.gr_name for entry in grp.getgrall()}
    course.check("setup")
    assert {entry.gr_name for entry in grp.getgrall()} - before == {*course.students}
    course.check("remove", "--yes")
    assert {entry.gr_name for entry in grp.getgrall()} == before


def test_a_student_who_was_taken_out_of_the_group_comes_back(course: Course) -> None:
    course.check("setup")
    subprocess.run(
        ["gpasswd", "--delete", course.students[0], course.group],
        check=True,
        capture_output=True,
    )
    assert "2 kept" in course.check("setup")
    assert members(course.group) == {*course.students}


def test_students_get_the_code_of_the_ipython_profile_and_nothing_else(
    make_course: CourseMaker, teacher: pwd.struct_passwd, sudo: Mapping[str, str]
) -> None:
    course = make_course(2, profile="course")
    profile = Path(teacher.pw_dir, ".ipython/profile_course")
    wanted = {"ipython_config.py": "c = 1", "startup/00-first.py": "x = 2"}
    files = wanted | {
        "history.sqlite": "private",
        "security/key.py": "private",
        "startup/notes.txt": "private",
        "startup/old/first.py": "old",
        ".hidden/x.py": "private",
    }
    script = 'mkdir -p "${0%/*}" && cat >"$0"'
    for name, text in files.items():
        path = profile / name
        run_as(teacher.pw_name, "sh", "-c", script, path, input=text, check=True)
    run_as(teacher.pw_name, "ln", "-s", "/etc/shadow", profile / "startup/link.py")
    linked, username = course.students
    course.check("setup")  # root has no such profile
    assert not course.home(username).joinpath(".ipython").exists()
    run_as(linked, "mkdir", "-p", "elsewhere", check=True)
    run_as(linked, "ln", "-s", "elsewhere", ".ipython", check=True)
    done = course.run("setup", env=sudo)
    assert done.returncode == 1
    assert f"{linked}: '/home/{linked}/.ipython' is a link" in done.stderr
    assert not os.listdir(course.home(linked) / "elsewhere")
    given = course.home(username) / ".ipython/profile_course"
    found = {
        str(path.relative_to(given)): path.read_text()
        for path in given.rglob("*")
        if not path.is_dir()
    }
    assert found == wanted
    assert {path.owner() for path in given.rglob("*")} == {username}
    subprocess.run(["rm", "-r", profile], check=True)


# ---------------------------------------------------------------------------------------
# remove
# ---------------------------------------------------------------------------------------


def test_remove_leaves_the_machine_as_it_was(make_course: CourseMaker) -> None:
    with made_account() as account:
        run_as(account.pw_name, "sh", "-c", "echo mine >diary", check=True)
        before = snapshot()
        course = make_course(2)
        course.check("setup")
        course.check("send")
        for username in course.students:
            notebooks.ensure_runtime_dir(pwd.getpwnam(username))
        assert snapshot() != before
        output = course.check("remove", "--yes")
        assert snapshot() == before
    assert f"2 accounts deleted, 0 left, group {course.group} deleted." in output
    for i, row in enumerate(course.rows().values(), 1):
        assert (row["name"], row["surname"]) == (f"Name{i}", f"Surname{i}")
        assert not row["sys-pass"] + row["nb-pass"]


def test_remove_before_setup_and_again_does_no_harm(course: Course) -> None:
    before = snapshot()
    for _ in range(2):
        assert "0 accounts deleted" in course.check("remove", "--yes")
    assert snapshot() == before


def test_remove_asks_on_a_terminal_and_needs_yes_without_one(course: Course) -> None:
    course.check("setup")
    before = snapshot(), course.user_list.read_bytes()
    done = course.run("remove", stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "needs --yes" in done.stderr
    for answer in ("no", "", "yess"):
        with run_on_terminal("remove", course.config) as terminal:
            terminal.expect_exact("Delete 2 accounts and everything in their homes?")
            terminal.sendline(answer)
            terminal.expect_exact("nothing was deleted")
            terminal.expect_exact(terminal.delimiter)
        assert terminal.exitstatus == 2
    with run_on_terminal("remove", course.config) as terminal:
        terminal.expect_exact("everything in their homes?")
        wait_for_read(terminal)
        terminal.sendintr()
        terminal.expect_exact("interrupted")
        terminal.expect_exact(terminal.delimiter)
    assert terminal.exitstatus == 130
    assert (snapshot(), course.user_list.read_bytes()) == before
    with run_on_terminal("remove", course.config) as terminal:
        terminal.expect_exact("everything in their homes?")
        terminal.sendline("yes")
        terminal.expect_exact("2 accounts deleted")
        terminal.expect_exact(terminal.delimiter)
    assert terminal.exitstatus == 0
    assert not any(map(exists, course.students))


def test_what_changes_while_remove_asks_saves_students_and_dooms_nobody(
    make_course: CourseMaker,
) -> None:
    """One loses the row, one the mark, and one gets a row."""
    course = make_course(4)
    course.check("setup")
    row, mark, new, other = course.students
    rows = course.rows()
    course.write_students(rows[name] for name in (row, mark, other))
    with run_on_terminal("remove", course.config) as terminal:
        terminal.expect_exact("Delete 3 accounts")
        course.write_students(rows[name] for name in (mark, new, other))
        subprocess.run(["usermod", "--comment", "", mark], check=True)
        terminal.sendline("yes")
        terminal.expect_exact("1 account deleted")
        terminal.expect_exact(terminal.delimiter)
    assert terminal.exitstatus == 0
    assert [exists(name) for name in course.students] == [True, True, True, False]
    kept = course.rows()
    assert kept[new] == rows[new]
    assert kept[mark] == rows[mark]


def test_remove_says_how_much_it_deletes_and_what_was_not_retrieved(
    make_course: CourseMaker,
) -> None:
    course = make_course(3)
    busy, idle, _ = course.students
    course.check("setup")
    course.check("send")
    course.check("retrieve")
    description = course.run("remove", stdin=subprocess.DEVNULL).stdout
    assert "not retrieved" not in description
    script = "head -c 5M /dev/zero >course/work; echo more >>course/material/*.csv"
    run_as(busy, "sh", "-c", script, check=True)
    run_as(idle, "sh", "-c", "echo private >elsewhere", check=True)
    description = course.run("remove", stdin=subprocess.DEVNULL).stdout
    assert "3 accounts that setup made, with 5." in description
    assert f"Work that was not retrieved: {busy}.\n" in description
    course.check("retrieve")
    assert "not retrieved" not in course.check("remove", "--yes")


def test_remove_says_whose_work_cannot_be_looked_at_before_it_asks(
    make_course: CourseMaker,
) -> None:
    course = make_course(4)
    closed, partly, gone, open_to_us = course.students
    course.check("setup")
    course.check("send")
    course.check("retrieve")
    run_as(closed, "chmod", "000", "course", check=True)
    run_as(partly, "mkdir", "-m", "000", "course/secret", check=True)
    run_as(gone, "rm", "-r", "course", check=True)
    done = course.run("remove", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "without a terminal" in done.stderr
    looked = {
        name: reason
        for name, _, reason in (
            line.partition(": their work could not be looked at: ")
            for line in done.stdout.splitlines()
        )
        if reason
    }
    assert looked == {
        closed: f"'{course.home(closed)}/course': Permission denied",
        partly: "'secret': Permission denied",
        gone: f"'{course.home(gone)}/course': No such file or directory",
    }
    assert all(map(exists, course.students))
    course.check("remove", "--yes")
    assert not any(map(exists, course.students))


@pytest.mark.parametrize(
    "comment",
    ["", notebooks.MARK, f",,,{notebooks.MARK}", f"{MARKED},more", f"{MARKED}x"],
)
def test_an_account_without_our_mark_is_never_deleted(course: Course, comment: str) -> None:
    with made_account("--comment", comment) as account:
        add_student(course, account.pw_name)
        assert "0 accounts deleted, 1 left" in course.check("remove", "--yes")
        assert pwd.getpwnam(account.pw_name) == account
        assert Path(account.pw_dir).is_dir()


def test_an_account_with_our_mark_is_deleted_unless_it_is_the_callers(
    course: Course,
) -> None:
    with made_account("--comment", MARKED) as account:
        add_student(course, account.pw_name)
        sudo = {"SUDO_UID": str(account.pw_uid)}
        assert "0 accounts deleted, 1 left" in course.check("remove", "--yes", env=sudo)
        assert pwd.getpwnam(account.pw_name) == account
        assert Path(account.pw_dir).is_dir()
        course.write_students([{"username": account.pw_name}])
        assert "1 account deleted, 0 left" in course.check("remove", "--yes")
        assert not exists(account.pw_name)
        subprocess.run(["useradd", "--create-home", account.pw_name], check=True)


def test_a_student_can_neither_take_nor_give_themselves_the_mark(
    course: Course,
) -> None:
    course.check("setup")
    marked = pwd.getpwnam(course.students[0])
    with made_account() as account:
        for username, mark in ((marked.pw_name, ""), (account.pw_name, notebooks.MARK)):
            assert run_as(username, "chfn", "-o", mark).returncode != 0
        assert pwd.getpwnam(account.pw_name) == account
    assert pwd.getpwnam(marked.pw_name) == marked


def test_a_system_account_in_the_list_is_refused(course: Course) -> None:
    """Even one with our mark: nothing is done to anybody then."""
    course.check("setup")
    with made_account("--system", "--comment", MARKED) as account:
        add_student(course, account.pw_name)
        before = snapshot()
        for command in (["setup"], ["remove", "--yes"]):
            done = course.run(*command)
            assert done.returncode == 2
            assert f"line 4: {account.pw_name!r} is a system account" in done.stderr
        assert snapshot() == before


def test_a_group_that_others_are_in_stays(course: Course) -> None:
    course.check("setup")
    with made_account("--groups", course.group) as account:
        assert "group" not in course.check("remove", "--yes").splitlines()[-1]
        assert members(course.group) == {account.pw_name}


def test_a_group_of_the_system_is_refused(make_course: CourseMaker) -> None:
    """Its members may have rights that are not for students, as with `sudo`."""
    group = f"nbsystem{os.getpid()}"
    subprocess.run(["groupadd", "--system", group], check=True)
    course = make_course(1, group=group)
    done = course.run("setup")
    assert done.returncode == 2
    assert f"[Setup] group = {group}: is a group of the system" in done.stderr
    assert not exists(course.students[0])
    subprocess.run(["groupdel", group], check=True)


def test_a_home_with_a_mount_in_it_is_refused_until_it_is_gone(course: Course) -> None:
    """Deleting would empty what is mounted."""
    course.check("setup")
    username, other = course.students
    target, source = course.home(username) / "mnt x", course.directory / "precious"
    source.mkdir()
    (source / "file").touch()
    run_as(username, "mkdir", target, check=True)
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        done = course.run("remove", "--yes")
        assert done.returncode == 1
        assert f"{username}: something is mounted at {str(target)!r}" in done.stderr
        assert exists(username) and not exists(other)
        assert (source / "file").exists()
    finally:
        subprocess.run(["umount", target], check=True)
    course.check("remove", "--yes")
    assert not exists(username) and not target.parent.exists()
    assert (source / "file").exists()


def test_remove_deletes_what_a_vandal_left(make_course: CourseMaker) -> None:
    """Nested and closed directories, links to elsewhere, a link as course directory."""
    before = snapshot()
    course = make_course(1)
    course.check("setup")
    (username,) = course.students
    home = course.home(username)
    precious = course.directory / "precious"
    precious.mkdir()
    (precious / "file").touch()
    os.chmod(precious, 0o777)
    script = f"""
        rmdir course; ln -s {precious} course; ln -s {precious}/file link
        mkdir closed; echo x >closed/file; chmod 0 closed; mkfifo pipe
        touch "$(printf 'a\\nb \\033[31m \\377')"; mkdir -p .local; chmod 0 .
    """
    run_as(username, "python3", "-c", DEEP, check=True)
    run_as(username, "sh", "-c", script, check=True)
    crontab = Path("/var/spool/cron/crontabs", username)
    crontab.parent.mkdir(parents=True, exist_ok=True)
    crontab.write_text("* * * * * true\n")
    course.check("remove", "--yes")
    assert not exists(username)
    assert not home.is_symlink() and not home.exists()
    assert not crontab.exists()
    assert os.listdir(precious) == ["file"]
    assert {*snapshot()} - {*before} <= {str(x) for x in crontab.parents}


def test_an_account_without_its_home_is_removed(course: Course) -> None:
    """As when userdel was killed between the home and the account."""
    course.check("setup")
    subprocess.run(["rm", "-r", course.home(course.students[0])], check=True)
    course.check("remove", "--yes")
    assert not any(map(exists, course.students))


def test_remove_deletes_what_lies_where_everyone_may_write(course: Course) -> None:
    """Else it belongs to the next account with that number."""
    course.check("setup")
    username, other = course.students
    directories = [Path(x, course.group) for x in ("/tmp", "/var/tmp", "/dev/shm")]
    with made_account() as account:
        for path in directories:
            run_as(username, "mkdir", "-p", f"{path}1/sub", check=True)
            run_as(account.pw_name, "mkdir", f"{path}2", check=True)
        course.check("remove", "--yes")
        for path in directories:
            assert not Path(f"{path}1").exists()
            Path(f"{path}2").rmdir()


SHARE_MEMORY = """
import ctypes
print(ctypes.CDLL(None).shmget(0x6e62, 4096, 0o1600), flush=True)
"""


def test_remove_deletes_shared_memory(course: Course) -> None:
    course.check("setup")
    done = run_as(course.students[0], sys.executable, "-c", SHARE_MEMORY, check=True)
    number = done.stdout.strip()
    listed = Path("/proc/sysvipc/shm")
    assert number in {line.split()[1] for line in listed.read_text().splitlines()}
    course.check("remove", "--yes")
    assert number not in {line.split()[1] for line in listed.read_text().splitlines()}


def test_students_get_no_subordinate_ids(course: Course) -> None:
    """What runs under them belongs to no account, and would outlive it."""
    course.check("setup")
    for path in map(Path, ("/etc/subuid", "/etc/subgid")):
        assert not [x for x in course.students if f"{x}:" in path.read_text()]


def test_an_account_that_remove_has_closed_is_opened_again(course: Course) -> None:
    course.check("setup")
    username = course.students[0]
    subprocess.run(["usermod", "--expiredate", "1", username], check=True)
    course.check("setup")
    assert shadow_line(username).split(":")[7] == ""
    assert_passwords_work(course)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_remove_is_finished_by_the_next_one(
    make_course: CourseMaker, signum: signal.Signals
) -> None:
    before = snapshot()
    course = make_course(20)
    course.check("setup")
    process = start("remove", "--yes", config=course.config)
    try:
        while exists(course.students[0]):  # without a pause, in which it could end
            assert process.poll() is None
    finally:
        interrupt(process, signum)
    assert process.returncode in (-signum, 130)
    course.check("remove", "--yes")
    assert snapshot() == before
    assert not any(row["sys-pass"] or row["nb-pass"] for row in course.rows().values())
