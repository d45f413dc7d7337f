"""A term: what students and teachers wrote is there at its end, whatever was run."""

import contextlib
import functools
import grp
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import notebooks
from conftest import CourseMaker
from support import (
    Course,
    kill_all,
    made_account,
    run_as,
    run_on_terminal,
    start,
    wait_until,
)

pytestmark = pytest.mark.root

WELCOME = "material/welcome.txt"
MINE = "material/welcome (mine 1).txt"


@pytest.fixture
def term(make_course: CourseMaker) -> Course:
    """A course of three students, who have the material."""
    course = make_course(3, keep_changed="yes")
    for path in course.material.iterdir():
        subprocess.run(["rm", "-r", path], check=True)
    (course.material / "data").mkdir()
    (course.material / "data/table.csv").write_text("1,2\n")
    (course.material / "welcome.txt").write_text("welcome\n")
    course.check("setup")
    course.check("send")
    return course


def shell(username: str, script: str) -> str:
    """Run a script in a student's tutorial directory."""
    done = run_as(username, "sh", "-euc", f"cd course; {script}")
    assert done.returncode == 0, done
    return done.stdout


def term_shell(username: str, script: str) -> "subprocess.Popen[str]":
    """Start a script in a student's tutorial directory."""
    account = pwd.getpwnam(username)
    return subprocess.Popen(
        ["sh", "-euc", script],
        cwd=Path(account.pw_dir, "course"),
        stdout=subprocess.PIPE,
        text=True,
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
    )


def read(course: Course, username: str, path: str = WELCOME) -> str:
    return (course.home(username) / "course" / path).read_text()


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, modification time and content of all that is in a directory."""
    found = {}
    for path in directory.rglob("*"):
        info = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = info.st_mode, info.st_mtime_ns, data
    return found


def line_of(output: str, username: str) -> str:
    (line,) = (x for x in output.splitlines() if x.startswith(f"{username}: "))
    return line.removeprefix(f"{username}: ")


# ---------------------------------------------------------------------------------------
# send
# ---------------------------------------------------------------------------------------


def test_what_only_the_student_has_changed_stays_where_it_is(term: Course) -> None:
    working, *others = term.students
    shell(working, f"echo mine >>{WELCOME}")
    before = {name: snapshot(term.home(name)) for name in term.students}
    for _ in range(2):
        output = term.check("send")
        assert line_of(output, working) == (
            "0 new, 0 updated, 1 unchanged, 1 changed there and left alone"
        )
        for name in others:
            assert line_of(output, name) == "0 new, 0 updated, 2 unchanged"
    assert {name: snapshot(term.home(name)) for name in term.students} == before


def test_a_checkout_that_changes_only_times_disturbs_nobody(term: Course) -> None:
    working = term.students[0]
    shell(working, f"echo mine >>{WELCOME}")
    text = (term.material / "welcome.txt").read_text()
    (term.material / "welcome.txt").unlink()
    (term.material / "welcome.txt").write_text(text)
    output = term.check("send")
    assert line_of(output, working).endswith("1 changed there and left alone")
    assert read(term, working) == "welcome\nmine\n"


def test_a_correction_replaces_what_nobody_has_touched_and_keeps_the_rest(
    term: Course,
) -> None:
    working, untouched, saved = term.students
    shell(working, f"echo mine >>{WELCOME}")
    shell(saved, f"cat {WELCOME} >copy; cat copy >{WELCOME}; rm copy")  # saved as it was
    (term.material / "welcome.txt").write_text("corrected\n")
    output = term.check("send")
    assert line_of(output, working) == ("0 new, 1 updated, 1 unchanged, 1 kept as backups")
    for name in (untouched, saved):
        assert line_of(output, name) == "0 new, 1 updated, 1 unchanged"
        assert not (term.home(name) / "course" / MINE).exists()
    assert [read(term, name) for name in term.students] == ["corrected\n"] * 3
    assert read(term, working, MINE) == "welcome\nmine\n"
    assert (term.home(working) / "course" / MINE).owner() == working
    output = term.check("send")
    assert line_of(output, working) == "0 new, 0 updated, 2 unchanged"


def test_a_fresh_file_is_sent_to_who_asks_for_it_and_to_nobody_else(term: Course) -> None:
    asking, other, _ = term.students
    for name in (asking, other):
        shell(name, f"echo broken >{WELCOME}")
    before = snapshot(term.home(other))
    term.check("send", "--reset", "--only", asking)
    assert read(term, asking) == "welcome\n"
    assert read(term, asking, MINE) == "broken\n"
    assert snapshot(term.home(other)) == before


def test_a_late_student_costs_nobody_a_byte(term: Course) -> None:
    working, *_ = term.students
    shell(working, f"echo mine >{WELCOME}; echo own >own")
    before = {name: snapshot(term.home(name)) for name in term.students}
    late = f"{term.group}late"[:30]
    term.write_students([*term.rows().values(), {"username": late}])
    term.students.append(late)
    term.check("setup", "--only", late)
    output = term.check("send", "--only", late)
    assert line_of(output, late) == "2 new, 0 updated, 0 unchanged"
    assert "1 student: " in output
    assert read(term, late) == "welcome\n"
    assert {name: snapshot(term.home(name)) for name in before} == before


def test_a_save_during_a_correction_is_not_lost(term: Course) -> None:
    """A program has opened the file before it is replaced, and writes after that."""
    student = term.students[0]
    script = f"""
        exec 3<>{WELCOME}; touch material/.~welcome.txt; echo opened
        while [ "$(cat {WELCOME})" = welcome ]; do sleep 0.1; done
        echo 'what was typed' >&3; rm material/.~welcome.txt
    """
    with term_shell(student, script) as process:
        assert process.stdout and process.stdout.readline() == "opened\n"
        (term.material / "welcome.txt").write_text("corrected\n")
        output = term.check("send")
        assert process.wait(20) == 0
    assert line_of(output, student).endswith("1 kept as backups")
    assert read(term, student) == "corrected\n"
    assert read(term, student, MINE) == "what was typed\n"


NONSENSE = {
    "deleted": "rm {0}",
    "no JSON": "echo nonsense >{0}",
    "a list": "echo '[1, 2]' >{0}",
    "of another form": 'echo \'{{"welcome.txt": 7, "data/table.csv": [[], 1]}}\' >{0}',
    "nested": "head -c 1000000 /dev/zero | tr '\\0' '[' >{0}",
    "endless": "truncate -s 1T {0}",
    "a FIFO": "rm {0}; mkfifo {0}",
    "a link": "rm {0}; ln -s /etc/shadow {0}",
    "a directory": "rm {0}; mkdir {0}",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_without_a_record_a_file_counts_as_changed(term: Course, kind: str) -> None:
    """Whatever a student makes of the record costs nobody anything."""
    working, *others = term.students
    shell(working, f"echo mine >{WELCOME}")
    shell(working, NONSENSE[kind].format(f"material/{notebooks.RECORD_NAME}"))
    (term.material / "welcome.txt").write_text("corrected\n")
    shadow = Path("/etc/shadow").read_bytes()
    output = term.check("send", timeout=30)
    assert read(term, working) == "corrected\n"
    assert read(term, working, MINE) == "mine\n"
    for name in others:
        assert line_of(output, name) == "0 new, 1 updated, 1 unchanged"
    assert Path("/etc/shadow").read_bytes() == shadow


def test_a_configuration_of_2012_replaces_but_not_unawares(term: Course) -> None:
    working, *_ = term.students
    text = term.config.read_text().replace("keep_changed = yes\n", "")
    term.config.write_text(text)
    shell(working, f"echo mine >{WELCOME}")
    named = f"{working} has changed what is replaced for good: 'welcome.txt'"
    told = f"{working} had changed what was replaced for good: 'welcome.txt'"
    with run_on_terminal("send", term.config) as terminal:
        terminal.expect_exact(named)
        terminal.expect_exact("Replace the changed files of 1 student?")
        terminal.sendline("no")
        terminal.expect_exact("nothing was copied")
        terminal.expect_exact(terminal.delimiter)
    assert terminal.exitstatus == 2
    assert read(term, working) == "mine\n"
    done = term.run("send", stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and told in done.stderr
    assert read(term, working) == "welcome\n"
    assert not (term.home(working) / "course" / MINE).exists()


def test_nothing_is_copied_where_there_is_no_room_for_all_of_it(term: Course) -> None:
    student, *others = term.students
    account = pwd.getpwnam(student)
    options = f"size=300k,mode=0700,uid={account.pw_uid},gid={account.pw_gid}"
    mount = ["mount", "--no-mtab", "-t", "tmpfs", "-o", options, "tmpfs", account.pw_dir]
    subprocess.run(mount, check=True)
    try:
        (term.material / "large").write_bytes(bytes(1 << 20))
        before = {name: snapshot(term.home(name)) for name in term.students}
        done = term.run("send", "--only", student)
        assert done.returncode == 2
        assert " kB are missing" in done.stderr
        assert f"{account.pw_dir} to send 1.0 MB; nothing was copied" in done.stderr
        assert {name: snapshot(term.home(name)) for name in term.students} == before

        # A file system of their own keeps nobody else from the material.
        done = term.run("send")
        assert done.returncode == 1 and f"{student}: No space left" in done.stderr
        for name in others:
            assert (term.home(name) / "course/material/large").stat().st_size == 1 << 20
    finally:
        subprocess.run(["umount", "--no-mtab", account.pw_dir], check=True)


def test_nothing_is_copied_where_homes_have_no_room_together(term: Course) -> None:
    """Each of them would fit alone."""
    mount = ["mount", "--no-mtab", "-t", "tmpfs", "-o", "size=2m,mode=0755", "tmpfs"]
    moved = [Path(pwd.getpwnam(name).pw_dir) for name in term.students]
    shelf = Path("/home/shelf")
    shelf.mkdir()
    subprocess.run([*mount, shelf], check=True)
    try:
        for home in moved:
            subprocess.run(["cp", "-a", home, shelf], check=True)
            subprocess.run(
                ["mount", "--no-mtab", "--bind", shelf / home.name, home], check=True
            )
        (term.material / "large").write_bytes(bytes(1 << 20))
        done = term.run("send")
        assert done.returncode == 2 and "to send 3.0 MB; nothing was copied" in done.stderr
        assert not any((home / "course/material/large").exists() for home in moved)
    finally:
        for path in (*moved, shelf):
            subprocess.run(["umount", "--no-mtab", path], check=False)
        shelf.rmdir()


@pytest.mark.parametrize("way", ["a file", "a directory"])
def test_a_students_link_on_the_way_gets_nothing_of_the_teachers(
    term: Course, way: str
) -> None:
    student, other, _ = term.students
    secret = Path("/var/teacher")
    secret.mkdir(mode=0o700)
    (secret / "key").write_text("the teacher's")
    target = term.home(student) / "course"
    try:
        shell(student, f"mkdir d; ln -s {secret}/key best; ln -s {secret} d/away")
        name = "best" if way == "a file" else "d/away/key"
        (term.material / "shown").symlink_to(target / name)
        done = term.run("send")
        assert done.returncode == 0 and "(is somebody else's link)" in done.stderr
        assert not (term.home(other) / "course/material/shown").exists()
        shell(student, "rm -r best d; echo mine >best; mkdir d; ln -s ../best d/best")
        (term.material / "shown").unlink()
        (term.material / "shown").symlink_to(target / "best")
        term.check("send")
        assert (term.home(other) / "course/material/shown").read_text() == "mine\n"
    finally:
        shutil.rmtree(secret)


def test_terabytes_of_nothing_are_not_read(term: Course) -> None:
    """Of a student's, behind a link of the material, or as a copy with a forged record."""
    student, other, _ = term.students
    shell(student, f"truncate -s 4T huge; truncate -s 4T {WELCOME}")
    record = {"welcome.txt": ["0" * 64, [4 << 40, 1, 1], [4 << 40, 1, 1]]}
    shell(student, f"echo '{json.dumps(record)}' >material/{notebooks.RECORD_NAME}")
    (term.material / "huge").symlink_to(term.home(student) / "course/huge")
    done = term.run("send", timeout=30)
    assert "(is somebody else's, and has holes)" in done.stderr
    assert read(term, other) == "welcome\n"
    done = term.run("retrieve", timeout=30)
    assert done.stdout.endswith(f"1 failed: {student}.\n")
    assert "more than retrieve_limit" in done.stderr


def test_a_storage_that_all_may_read_does_not_open_students_work(term: Course) -> None:
    student, other, _ = term.students
    term.storage.mkdir(mode=0o755)
    shell(student, "umask 0; mkdir open; echo x >open/a")
    term.check("retrieve")
    assert not (term.storage / student).stat().st_mode & 0o007
    for path in (term.storage / student).rglob("*"):
        assert not path.stat().st_mode & 0o022, path


def test_what_editors_and_git_leave_is_neither_sent_nor_retrieved(term: Course) -> None:
    student = term.students[0]
    for name in (".git/config", ".ipynb_checkpoints/solution.ipynb", "data/.~lock.csv"):
        path = term.material / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not for students")
    (term.material / "notes.bak").write_text("sent")
    term.check("send")
    found = {path.name for path in (term.home(student) / "course").rglob("*")}
    assert found == {
        *("material", "data", "table.csv", "welcome.txt", "notes.bak"),
        notebooks.RECORD_NAME,
    }
    shell(student, "mkdir .ipynb_checkpoints __pycache__; touch __pycache__/x.pyc answer")
    term.check("retrieve")
    found = {path.name for path in (term.storage / student).rglob("*")}
    assert "answer" in found and not found & {".ipynb_checkpoints", "__pycache__", "x.pyc"}
    term.configure(ignore="*.bak")
    (term.material / "notes.bak").write_text("changed")
    output = term.check("send", "--only", student)
    assert "3 new, 0 updated" in line_of(output, student)  # what .git and its like are


# ---------------------------------------------------------------------------------------
# Some students alone
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["setup", "send", "launch", "shutdown", "retrieve"])
def test_an_unknown_name_is_refused_before_anything_is_done(
    term: Course, command: str
) -> None:
    done = term.run(command, "--only", f"{term.students[0]},nobody-here")
    assert done.returncode == 2
    assert f"--only nobody-here: is not in {term.user_list}" in done.stderr
    assert done.stdout == ""


def test_one_who_leaves_is_removed_without_a_word_about_the_others(term: Course) -> None:
    leaver, *others = term.students
    rows = term.rows()
    term.write_students(rows[name] for name in (leaver, others[0]))
    done = term.run("remove", "--yes", "--only", leaver)
    assert done.returncode == 0 and done.stderr == ""
    assert "1 account deleted, 0 left." in done.stdout
    assert {x.pw_name for x in pwd.getpwall()} & {*term.students} == {*others}
    assert term.rows()[others[0]]["nb-pass"]


def test_one_students_notebook_is_shut_down_and_the_others_run_on(term: Course) -> None:
    one, *others = term.students
    launch = term.launch().wait_ready()
    launch.stop()
    term.check("shutdown", "--only", one)
    assert not term.servers(one)
    assert all(term.servers(name) for name in others)
    launch = term.launch("--only", f"{one},{others[0]}").wait_ready()
    assert "2 of 2 notebook servers run." in launch.output
    assert launch.output.count("adopted") == 1


# ---------------------------------------------------------------------------------------
# retrieve
# ---------------------------------------------------------------------------------------


def test_marks_in_the_storage_stay_as_long_as_the_student_changes_nothing(
    term: Course,
) -> None:
    marked, working, _ = term.students
    term.check("retrieve")
    for name in (marked, working):
        (term.storage / name / WELCOME).write_text("well done\n")
    shell(working, f"echo more >>{WELCOME}")
    for number in (1, 2):
        output = term.check("retrieve")
        assert line_of(output, marked) == (
            "0 new, 0 updated, 1 unchanged, 1 changed there and left alone"
        )
        assert (term.storage / marked / WELCOME).read_text() == "well done\n"
        assert ("1 kept as backups" in line_of(output, working)) == (number == 1)
    assert (term.storage / working / WELCOME).read_text() == "welcome\nmore\n"
    assert (term.storage / working / f"{WELCOME}.~1~").read_text() == "well done\n"


@contextlib.contextmanager
def saved_without_pause(course: Course, username: str, text: str) -> Iterator[None]:
    """Have Jupyter save a notebook again and again."""
    cell = {"cell_type": "raw", "metadata": {}, "source": text, "id": "a"}
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    model = {"type": "notebook", "format": "json", "content": content}
    ended, saved = threading.Event(), threading.Event()
    notebook = course.notebook(username)

    def save() -> None:
        while not ended.is_set():
            notebook.api("PUT", "contents/course/material/large.ipynb", model)
            saved.set()

    thread = threading.Thread(target=save)
    thread.start()
    try:
        assert saved.wait(30)
        yield
    finally:
        ended.set()
        thread.join()


def test_a_notebook_that_is_being_saved_is_retrieved_whole(term: Course) -> None:
    student = term.students[0]
    term.launch().wait_ready()
    text = "0123456789" * 500_000
    with saved_without_pause(term, student, text):
        for _ in range(15):
            term.check("retrieve", "--only", student)
            stored = json.loads(
                (term.storage / student / "material/large.ipynb").read_text()
            )
            assert "".join(stored["cells"][0]["source"]) == text
    assert not list((term.storage / student).rglob(".~*"))


RESTLESS = """
import os, time
fd = os.open("course/restless", os.O_RDWR | os.O_CREAT, 0o600)
os.write(fd, bytes(1 << 22))
print(flush=True)
while True:
    os.pwrite(fd, os.urandom(8), 0)
    os.utime(fd, (1, 1))  # as if it were at rest for long
"""


def test_a_file_that_never_comes_to_rest_holds_up_nobody_for_long(term: Course) -> None:
    student, other, _ = term.students
    account = pwd.getpwnam(student)
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", RESTLESS],
        stdout=subprocess.PIPE,
        cwd=account.pw_dir,
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
    )
    try:
        assert process.stdout and process.stdout.readline()
        term.check("retrieve", timeout=notebooks.PATIENCE_SECONDS + 30)
    finally:
        process.kill()
        process.communicate()
    assert (term.storage / student / "restless").stat().st_size == 1 << 22
    assert (term.storage / other / WELCOME).exists()


def test_what_is_retrieved_is_for_all_who_may_read_the_storage(term: Course) -> None:
    staff = f"{term.group}x"[:30]
    subprocess.run(["groupadd", staff], check=True)
    term.storage.mkdir()
    os.chown(term.storage, 0, grp.getgrnam(staff).gr_gid)
    os.chmod(term.storage, 0o2770)
    try:
        student = term.students[0]
        for number in range(2):
            shell(student, f"echo {number} >answer; chmod 600 answer")
            term.check("retrieve")
            for path in (term.storage / student).rglob("*"):
                info = path.stat()
                assert path.group() == staff
                wanted = 0o070 if path.is_dir() else 0o060
                assert info.st_mode & wanted == wanted, path
    finally:
        subprocess.run(["groupdel", staff], check=True)


def test_what_is_as_the_teacher_sent_it_does_not_count_against_the_limit(
    term: Course,
) -> None:
    """However often; and neither a forged record nor a file of that size helps."""
    honest, forger, copying = term.students
    (term.material / "data/large").write_bytes(os.urandom(4 << 20))
    term.check("send")
    shell(honest, "head -c 900k /dev/urandom >own")
    shell(forger, "rm material/data/large; head -c 4M /dev/urandom >material/data/large")
    shell(copying, "cp material/data/large again")
    record = term.home(forger) / "course/material" / notebooks.RECORD_NAME
    forged = json.loads(record.read_text())
    stamp = notebooks.stamp_of((record.parent / "data/large").stat())
    forged["data/large"][1:] = [stamp, stamp]
    record.write_text(json.dumps(forged))

    term.configure(retrieve_limit="1M")
    left_out = {forger: "material/data/large", copying: "again"}
    for _ in range(2):
        done = term.run("retrieve")
        assert done.returncode == 1
        for name, path in left_out.items():
            text = f"{name}: more than retrieve_limit: '{path}' is left out\n"
            assert text in done.stderr
            assert not (term.storage / name / path).exists()
        assert honest not in done.stderr
    for name in (honest, copying):
        large = (term.storage / name / "material/data/large").read_bytes()
        assert large == (term.material / "data/large").read_bytes()
    assert (term.storage / honest / "own").stat().st_size == 900 << 10
    for name in (honest, forger, copying):
        shell(name, "rm -f again")
    shell(forger, "rm material/data/large")
    description = term.run("remove", stdin=subprocess.DEVNULL).stdout
    assert "not retrieved" not in description


def test_a_file_that_grows_while_it_is_waited_for_counts_with_its_size(
    term: Course,
) -> None:
    student, *_ = term.students
    term.configure(retrieve_limit="1M")
    shell(student, "touch growing .~growing")
    process = start("retrieve", "--only", student, config=term.config)
    try:
        wait_until((term.storage / student).exists, 20, "the beginning")
        shell(student, "sleep 0.5; truncate -s 100M growing; rm .~growing")
    finally:
        _, errors = process.communicate()
    assert f"{student}: more than retrieve_limit: 'growing' is left out" in errors
    assert not (term.storage / student / "growing").exists()


@pytest.fixture
def staff() -> Iterator[tuple[str, str, str]]:
    """A group, and a teacher and an assistant who are in it."""
    group = f"nbg{os.urandom(2).hex()}"
    subprocess.run(["groupadd", group], check=True)
    with made_account("--groups", group) as one, made_account("--groups", group) as two:
        yield group, one.pw_name, two.pw_name
    subprocess.run(["groupdel", group], check=True)


# How a directory is made for a group: all that it needs; a default ACL besides; ACLs.
SHARED = {
    "setgid": "chgrp {0} .; chmod 2770 .",
    "a default ACL": "chgrp {0} .; chmod 2770 .; setfacl -d -m g:{0}:rwX .",
    "ACLs alone": "chmod 700 .; setfacl -m g:{0}:rwX .; setfacl -d -m g:{0}:rwX .",
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_one_of_the_staff_retrieves_is_for_all_of_them(
    term: Course, staff: tuple[str, str, str], kind: str
) -> None:
    """Each may retrieve in turn, read and change all of it, and nobody else may."""
    if "setfacl" in SHARED[kind] and not shutil.which("setfacl"):
        pytest.skip("needs setfacl")
    group, *people = staff
    student, other, _ = term.students
    storage = Path("/var", group)  # where its owners can get at it
    storage.mkdir()
    script = ["sh", "-euc", SHARED[kind].format(group)]
    subprocess.run(script, cwd=storage, check=True)
    term.configure(storage_dir=storage)
    shell(student, "umask 77; mkdir private; echo 0 >private/answer; echo 0 >answer")

    for number, person in enumerate([*people, *people], 1):
        uid = str(pwd.getpwnam(person).pw_uid)
        shell(student, f"echo {number} >answer; echo {number} >private/answer{number}")
        done = term.run("retrieve", env={"SUDO_UID": uid})
        assert (done.returncode, done.stderr) == (0, "")
        assert line_of(done.stdout, student).startswith(("1 new, 1 upd", "5 new, 0"))
        for reader in people:
            find = f"find {storage}/{student} -mindepth 1"
            test = f"{find} ( ! -readable -o ! -writable -o -type d ! -executable )"
            done = run_as(reader, *test.split(), check=True)
            assert (done.stdout, done.stderr) == ("", "")
        run_as(person, "sh", "-c", f"echo mark >>{storage}/{student}/answer", check=True)
        denied = run_as(other, "ls", storage)
        assert "Permission denied" in denied.stderr

    stored = storage / student
    kept = [stored / f"answer.~{number}~" for number in range(1, 4)]
    assert [path.read_text() for path in kept] == [f"{i}\nmark\n" for i in range(1, 4)]
    assert len(list((stored / "private").iterdir())) == 5
    subprocess.run(["rm", "-r", storage], check=True)


@contextlib.contextmanager
def mounted_stick(directory: Path, image: Path, uid: int) -> Iterator[None]:
    """Mount an exFAT file system, made at first: in user space, which any kernel can."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    if not image.exists():
        image.touch()
        os.truncate(image, 16 << 20)
        run(["mkfs.exfat", image])
    try:
        device = run(["losetup", "--find", "--show", image]).stdout.strip()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs loop devices: {error.stderr}")
    try:
        run(["mount.exfat-fuse", "-o", f"allow_other,uid={uid}", device, directory])
        yield
        run(["umount", "--no-mtab", directory])
    finally:
        subprocess.run(["umount", "--no-mtab", directory], capture_output=True)
        run(["losetup", "--detach", device])


# Names that the stick holds as they are, and others.
HELD = ["A.txt", "data/x", "Untitled 1.ipynb", "été", ".hidden", "n" * 250]
OTHERS = [
    "a.txt",
    "Data/x",
    'what: is "this"?.txt',
    "aux.txt",
    "new\nline",
    "?",
    "\udcff.b",
]


def contents(directory: Path) -> dict[str, str]:
    found = {path: path for path in directory.rglob("*") if path.is_file()}
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in found
        if path.name != notebooks.RECORD_NAME
    }


def test_a_stick_holds_every_file_under_a_name_that_stays(
    term: Course, tmp_path: Path
) -> None:
    for program in ("mkfs.exfat", "mount.exfat-fuse"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    student, other, _ = term.students
    home = term.home(student) / "course"
    subprocess.run(["rm", "-r", home / "material"], check=True)
    for name in [*HELD, *OTHERS]:
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(ascii(name))
    (home / "link?").symlink_to("a.txt")
    subprocess.run(["chown", "-R", student, home], check=True)

    with made_account() as owner:
        stick = Path("/var", term.group)
        stick.mkdir()
        term.configure(storage_dir=stick / "storage", owner=owner.pw_name)
        mount = functools.partial(mounted_stick, stick, tmp_path / "image", owner.pw_uid)
        stored = stick / "storage" / student
        with mount():
            done = term.run("retrieve")
            assert done.returncode == 0
            (told,) = (x for x in done.stderr.splitlines() if "cannot hold" in x)
            assert f"{student}: " in told and told.endswith(" ...")
            before = contents(stored)
            texts = [*map(ascii, [*HELD, *OTHERS])]
            assert sorted(before.values()) == sorted(texts)
            assert {name: before.get(name) for name in HELD if name[0] not in "Ad"} == {
                name: ascii(name) for name in HELD if name[0] not in "Ad"
            }
            assert not before.keys() & {*OTHERS[2:]}

        for _ in range(2):  # taken out and put back, as well
            with mount():
                output = term.run("retrieve").stdout
                assert line_of(output, student).startswith(
                    f"0 new, 0 updated, {len(texts)} unchanged"
                )
                assert contents(stored) == before

        (renamed,) = (name for name in before if name.startswith("what_"))
        shell(student, f"rm A.txt; echo changed >'{OTHERS[2]}'")
        with mount():
            assert "0 new, 1 updated" in line_of(term.run("retrieve").stdout, student)
            kept = {renamed: "changed\n", f"{renamed}.~1~": before[renamed]}
            assert contents(stored) == before | kept
        stick.rmdir()


def test_an_ordinary_storage_keeps_every_name(term: Course) -> None:
    student = term.students[0]
    home = term.home(student) / "course"
    for name in [*HELD, *OTHERS, "end. ", "AUX.TXT", "CON", "end"]:
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(ascii(name))
    subprocess.run(["chown", "-R", student, home], check=True)
    for _ in range(2):
        done = term.run("retrieve")
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(term.storage / student) == contents(home)
    assert "unchanged" in line_of(done.stdout, student)


# ---------------------------------------------------------------------------------------
# setup
# ---------------------------------------------------------------------------------------

# Stands for a module that judges passwords, of which none comes with every Debian.
REFUSING = """\
#!/bin/sh
[ "$PAM_USER" != "$(cat /etc/refused-user)" ]
"""


def test_a_password_that_pam_refuses_is_one_students_failure(
    make_course: CourseMaker, tmp_path: Path
) -> None:
    script, refused_user = Path("/etc/refuse"), Path("/etc/refused-user")
    script.write_text(REFUSING)
    script.chmod(0o755)
    rules = Path("/etc/pam.d/common-password")
    before = rules.read_text()
    rule = f"password requisite pam_exec.so {script}\n"
    course = make_course(3)
    weak, *others = course.students
    refused_user.write_text(weak)
    try:
        rules.write_text(rule + before)
        done = course.run("setup")
        assert done.returncode == 1
        assert f"{weak}: the sys-pass in line 2 of the list is refused: " in done.stderr
        assert "password not changed" in done.stderr
        assert notebooks.read_shadow(weak)[1] == "!"
        assert all(notebooks.read_shadow(name)[1].startswith("$") for name in others)
        assert all(map(Path.is_dir, map(course.home, course.students)))
        refused_user.write_text("")  # as with another password
        assert course.run("setup").returncode == 0
        assert notebooks.read_shadow(weak)[1].startswith("$")
    finally:
        rules.write_text(before)
        script.unlink()
        refused_user.unlink()


# ---------------------------------------------------------------------------------------
# The material: links, and what is for one student alone
# ---------------------------------------------------------------------------------------


def not_sent(course: Course, *options: str, **keywords: Any) -> dict[str, str]:
    """Send; return why paths of the material were not sent, as the teacher is told once."""
    done = course.run("send", *options, **keywords)
    assert done.returncode == 0, done
    assert "skipped" not in done.stdout
    assert done.stderr.count("not sent: ") == (1 if "not sent" in done.stderr else 0)
    found = re.findall(r"'([^']*)' \(([^)]*)\)", done.stderr)
    return {os.path.relpath(path, course.material): reason for path, reason in found}


def test_what_links_in_the_material_lead_to_is_sent(term: Course, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner/large.csv").write_text("3,4\n")
    (elsewhere / "notes.pdf").write_text("notes")
    (elsewhere / "inner/again.pdf").symlink_to("../notes.pdf")
    (term.material / "more").symlink_to(elsewhere / "inner")
    (term.material / "notes.pdf").symlink_to(elsewhere / "notes.pdf")
    (term.material / "chain").symlink_to("more")
    (term.material / "data/welcome.txt").symlink_to("../welcome.txt")
    for _ in range(2):
        assert not_sent(term) == {}
        for name in term.students:
            material = term.home(name) / "course/material"
            assert read(term, name, "material/more/large.csv") == "3,4\n"
            assert read(term, name, "material/more/again.pdf") == "notes"
            assert read(term, name, "material/notes.pdf") == "notes"
            assert read(term, name, "material/chain/large.csv") == "3,4\n"
            assert read(term, name, "material/data/welcome.txt") == "welcome\n"
            assert not any(path.is_symlink() for path in material.rglob("*"))
            assert all(path.owner() == name for path in material.rglob("*"))
    assert line_of(term.check("send"), term.students[0]).endswith("8 unchanged")


def test_a_link_may_lead_to_another_file_system(term: Course, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (term.material / "mounted").mkdir()
    (term.material / "linked").symlink_to(disk)
    for place in (disk, term.material / "mounted"):
        mount = ["mount", "--no-mtab", "-t", "tmpfs", "tmpfs"]
        subprocess.run([*mount, place], check=True)
    try:
        (disk / "deeper").mkdir()
        (disk / "deeper/large").write_text("large")
        assert not_sent(term) == {"mounted": "is another file system"}
        assert read(term, term.students[0], "material/linked/deeper/large") == "large"
    finally:
        for place in (disk, term.material / "mounted"):
            subprocess.run(["umount", "--no-mtab", place], check=True)


def test_what_cannot_be_sent_is_named_once_and_fails_nobody(term: Course) -> None:
    material = term.material
    (material / "dangling").symlink_to("nowhere")
    (material / "ping").symlink_to("pong")
    (material / "pong").symlink_to("ping")
    (material / "self").symlink_to(".")
    assert not_sent(term) == {
        "dangling": "leads to nothing",
        "ping": "Too many levels of symbolic links",
        "pong": "Too many levels of symbolic links",
        "self": "leads to a directory that it is in",
    }
    for name in ("dangling", "ping", "pong", "self"):
        (material / name).unlink()

    os.mkfifo(material / "fifo")
    os.mknod(material / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    (material / "device").symlink_to("zero")
    (material / "data/up").symlink_to("../data")
    reasons = {"fifo": "is no file", "zero": "is no file"}
    reasons |= {"device": "leads to no file"}
    reasons |= {"data/up": "leads to a directory that it is in"}
    assert not_sent(term, timeout=30) == reasons
    for number in range(20):
        os.mkfifo(material / f"another{number}")
    done = term.run("send")
    assert "and 19 more" in done.stderr and done.stderr.count("another") == 5
    assert read(term, term.students[2]) == "welcome\n"


def test_what_the_teacher_cannot_read_is_named_and_not_sent(term: Course) -> None:
    with made_account() as teacher:
        subprocess.run(["chown", "-R", teacher.pw_name, term.directory], check=True)
        closed = term.material / "closed"
        closed.write_text("closed")
        closed.chmod(0)
        os.chown(closed, 0, 0)
        (term.material / "solution").symlink_to("closed")
        (term.material / "shadow").symlink_to("/etc/shadow")
        private = term.directory / "private"
        private.mkdir(mode=0o700)
        (private / "notes").write_text("notes")
        (term.material / "notes").symlink_to(private)
        subprocess.run(["chown", "-R", teacher.pw_name, private], check=True)
        for path in ("solution", "shadow", "notes"):
            os.chown(term.material / path, teacher.pw_uid, -1, follow_symlinks=False)
        for parent in term.directory.parents[:-2]:  # pytest's are private
            parent.chmod(0o755)
        told = not_sent(term, env={"SUDO_UID": str(teacher.pw_uid)})
        assert told == dict.fromkeys(("closed", "solution", "shadow"), "Permission denied")
        sent = term.home(term.students[0]) / "course/material"
        assert not {"closed", "solution", "shadow"} & {*os.listdir(sent)}
        assert (sent / "notes/notes").read_text() == "notes"
        subprocess.run(["chown", "-R", "root", term.directory], check=True)


def test_somebody_elses_link_does_not_give_away_what_only_the_teacher_may_read(
    term: Course, tmp_path: Path
) -> None:
    secret, theirs = tmp_path / "id_rsa", tmp_path / "theirs"
    secret.write_text("secret")
    with made_account() as assistant:
        theirs.write_text("theirs")
        for path in ("key", "own"):
            (term.material / path).symlink_to({"key": secret, "own": theirs}[path])
            os.chown(term.material / path, assistant.pw_uid, -1, follow_symlinks=False)
        os.chown(theirs, assistant.pw_uid, -1)
        assert not_sent(term) == {"key": "is somebody else's link"}
    assert read(term, term.students[0], "material/own") == "theirs"
    assert not (term.home(term.students[0]) / "course/material/key").exists()


PRIVATE = {
    "up": "..",
    "deep": "../../..",
    "root": "/",
    "list": "../students.csv",
    "settings": "../notebooks.cfg",
    "certificate": "../notebooks.pem",
    "work": "../kept/storage",
    "theirs": "../kept/storage/{0}/material",
    "above": "../kept",
}


def test_no_link_leads_to_what_is_not_for_students(term: Course) -> None:
    (term.directory / "kept").mkdir()
    term.configure(storage_dir="kept/storage")
    term.check("retrieve")
    (term.directory / "notebooks.pem").write_text("key")
    (term.directory / "common").mkdir()
    (term.directory / "common/notes").write_text("notes")
    (term.directory / "common/back").symlink_to("../students.csv")
    (term.directory / "common/around").symlink_to("../kept/storage")
    (term.material / "common").symlink_to("../common")
    private = "leads to what is not for students"
    inner = {"common/back": private, "common/around": private}
    for name, target in PRIVATE.items():
        (term.material / name).symlink_to(target.format(term.students[1]))
        upwards = target.strip("./") == ""
        reason = "leads to a directory that it is in" if upwards else private
        assert not_sent(term, "--only", term.students[0]) == {name: reason, **inner}
        (term.material / name).unlink()

    sent = term.home(term.students[0]) / "course/material"
    found = {str(path.relative_to(sent)) for path in sent.rglob("*")}
    files = {"data", "data/table.csv", "welcome.txt", "common", "common/notes"}
    assert found == {*files, notebooks.RECORD_NAME}


def test_links_behind_links_come_to_an_end(term: Course) -> None:
    """Directories that all lead to each other have endlessly many paths."""
    for number in range(6):
        part = term.material / f"part{number}"
        part.mkdir()
        (part / "text").write_text(str(number))
        if number:
            (term.material / f"part{number - 1}/next").symlink_to(f"../{part.name}")
    deep = "part0/next/next/next/next/next"
    assert not_sent(term) == {deep: "lies behind too many links"}
    sent = term.home(term.students[0]) / "course/material"
    assert (sent / "part0/next/next/next/next/text").read_text() == "4"
    assert (sent / "part5/text").read_text() == "5"


@pytest.fixture
def feedback(term: Course) -> Course:
    """A course whose first two students have feedback of their own."""
    for name in term.students[:2]:
        path = term.directory / "feedback" / name / "ps1"
        path.mkdir(parents=True)
        (path / "ps1.html").write_text(f"the score of {name}")
    term.configure(material_dir="feedback/{username}/ps1")
    return term


def test_each_student_gets_a_directory_of_their_own(feedback: Course) -> None:
    *graded, missing = feedback.students
    for _ in range(2):
        done = feedback.run("send")
        assert done.returncode == 0
        assert done.stderr.count("is sent nothing") == 1
        assert f"{missing} is sent nothing: " in done.stderr
        assert "No such file or directory" in done.stderr
        for name in graded:
            sent = feedback.home(name) / "course/ps1"
            assert os.listdir(sent) != [] and sent.owner() == name
            assert (sent / "ps1.html").read_text() == f"the score of {name}"
            others = {*graded} - {name}
            found = subprocess.run(
                ["grep", "-rlE", f"score of ({'|'.join(others)})", feedback.home(name)],
                capture_output=True,
            )
            assert found.stdout == b""
        assert os.listdir(feedback.home(missing) / "course") == ["material"]
    assert line_of(done.stdout, graded[0]) == "0 new, 0 updated, 1 unchanged"
    assert feedback.run("send", "--only", missing).returncode == 0


def test_the_last_part_may_be_the_students_name(feedback: Course) -> None:
    feedback.configure(material_dir="feedback/{username}")
    name = feedback.students[0]
    feedback.run("send")
    assert read(feedback, name, f"{name}/ps1/ps1.html") == f"the score of {name}"
    feedback.launch().wait_ready()
    notebook = feedback.notebook(name)
    content = notebook.api("GET", f"contents/course/{name}")["content"]
    assert [each["name"] for each in content] == ["ps1"]
    assert f"/tree/course/{name}" in notebook.fetch("").headers["Location"]


def test_nobody_is_led_to_somebody_elses_directory(feedback: Course) -> None:
    first, second, third = feedback.students
    directory = feedback.directory / "feedback"
    (directory / third).symlink_to(second)
    (directory / first / "ps1/other").symlink_to(f"../../{second}/ps1")
    (directory / first / "ps1/one.html").symlink_to(f"../../{second}/ps1/ps1.html")
    (directory / first / "ps1/everybody").symlink_to("../..")
    (directory / first / "ps1/again.html").symlink_to("ps1.html")
    done = feedback.run("send")
    assert done.returncode == 0
    assert f"{third} is sent nothing: " in done.stderr
    assert "is a link or a file, not a directory: not followed" in done.stderr
    assert done.stderr.count("(leads to what is not for students)") == 2
    assert done.stderr.count("(leads to a directory that it is in)") == 1
    sent = feedback.home(first) / "course/ps1"
    assert {path.name for path in sent.iterdir()} == {
        *("ps1.html", "again.html", notebooks.RECORD_NAME),
    }
    assert not (feedback.home(third) / "course/ps1").exists()


def test_material_of_each_student_must_not_hold_what_is_private(feedback: Course) -> None:
    name = feedback.students[1]
    feedback.configure(storage_dir=f"feedback/{name}/ps1/storage")
    done = feedback.run("send")
    assert done.returncode == 2 and "which is not for students" in done.stderr
    feedback.configure(storage_dir="storage", material_dir="{username}")
    (feedback.directory / name).symlink_to(".")
    done = feedback.run("send")
    assert done.returncode == 2 and "which is not for students" in done.stderr
    (feedback.directory / name).unlink()
    done = feedback.run("send")
    assert done.returncode == 0 and done.stderr.count("is sent nothing") == 3


def test_material_of_each_student_must_be_somewhere(feedback: Course) -> None:
    feedback.configure(material_dir="feedbak/{username}/ps1")
    done = feedback.run("send")
    assert done.returncode == 2
    assert f"[Setup] material_dir: '{feedback.directory}/feedbak': " in done.stderr


# ---------------------------------------------------------------------------------------
# Shared data
# ---------------------------------------------------------------------------------------


@pytest.fixture
def shared(term: Course) -> Iterator[Path]:
    """A directory of the host's that the course shares."""
    directory = Path(f"/var/{term.group}/shared/data")
    directory.mkdir(parents=True)
    (directory / "large.csv").write_text("5,6\n")
    term.configure(shared_dir=directory)
    yield directory
    subprocess.run(["rm", "-rf", f"/var/{term.group}"], check=True)


def test_shared_data_is_a_link_in_each_home_and_no_copy(term: Course, shared: Path) -> None:
    before = snapshot(shared)
    output = term.check("send")
    for name in term.students:
        link = term.home(name) / "course/data"
        assert os.readlink(link) == str(shared)
        assert link.lstat().st_uid == pwd.getpwnam(name).pw_uid
        assert shell(name, "cat data/large.csv") == "5,6\n"
        assert "backups" not in line_of(output, name)
    links = [(term.home(name) / "course/data").lstat() for name in term.students]
    term.check("send")
    assert links == [(term.home(name) / "course/data").lstat() for name in term.students]

    output = term.check("retrieve")
    assert "skipped" not in output
    assert not os.path.lexists(term.storage / term.students[0] / "data")
    shell(term.students[0], "ln -s /etc/passwd other")
    assert "1 skipped" in line_of(term.check("retrieve"), term.students[0])

    term.check("remove", "--yes")
    assert snapshot(shared) == before


def test_the_link_to_shared_data_destroys_nothing_of_that_name(
    term: Course, shared: Path
) -> None:
    directory, file, link = term.students
    shell(directory, "mkdir data; echo mine >data/answer")
    shell(file, "echo mine >data; echo older >'data (mine 1)'")
    shell(link, "ln -s /etc/shadow data")
    output = term.check("send")
    for name in term.students:
        assert os.readlink(term.home(name) / "course/data") == str(shared)
        assert line_of(output, name).endswith("1 kept as backups")
    assert read(term, directory, "data (mine 1)/answer") == "mine\n"
    assert read(term, file, "data (mine 1)") == "older\n"
    assert read(term, file, "data (mine 2)") == "mine\n"
    assert os.readlink(term.home(link) / "course/data (mine 1)") == "/etc/shadow"
    term.check("retrieve")
    assert (term.storage / directory / "data (mine 1)/answer").read_text() == "mine\n"
    assert (term.storage / file / "data (mine 2)").read_text() == "mine\n"


def test_shared_data_that_students_cannot_read_or_can_change_is_refused(
    term: Course, shared: Path
) -> None:
    named = f"{term.config}: [Setup] shared_dir = {shared}:"
    for path, mode in ((shared, 0o711), (shared.parent, 0o700)):
        path.chmod(mode)
        done = term.run("send")
        assert done.returncode == 2 and done.stdout == ""
        assert f"{named} {path} is missing or closed to {term.students[0]}" in done.stderr
        path.chmod(0o755)

    shared.chmod(0o777)
    done = term.run("send")
    assert done.returncode == 2
    assert f"{named} can be changed by {term.students[0]}" in done.stderr
    shared.chmod(0o750)
    shutil.chown(shared, group=term.group)
    assert term.run("send").returncode == 0  # all students are in that group

    term.configure(shared_dir=shared.parent / "nowhere")
    assert "nowhere is missing or closed" in term.run("send").stderr
    term.configure(shared_dir=term.directory)
    assert "which is not for students" in term.run("send").stderr
    term.configure(shared_dir="/srv/material")
    assert "must have another last part than material_dir" in term.run("send").stderr
    assert not os.path.lexists(term.home(term.students[1]) / "course/nowhere")


# ---------------------------------------------------------------------------------------
# Kernels that are not here
# ---------------------------------------------------------------------------------------


def write_notebook(path: Path, metadata: object) -> None:
    content = {"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))


def missing_kernels(course: Course) -> dict[str, str]:
    """Send; return which files the teacher is told of for each kernel."""
    done = course.run("send", timeout=30)
    assert done.returncode == 0, done
    pattern = r"(?:kernel '(.+)', not installed,|no kernel) is named by (.+)"
    return dict(re.findall(pattern, done.stderr))


def test_notebooks_whose_kernel_is_not_here_are_told_once_and_sent_unchanged(
    term: Course,
) -> None:
    material = term.material
    names = {"conda": "conda-env-teaching-py", "again": "conda-env-teaching-py"}
    names |= {"julia": "julia-1.9", "here": "python3"}
    for stem, kernel in names.items():
        write_notebook(material / f"{stem}.ipynb", {"kernelspec": {"name": kernel}})
    write_notebook(material / "data/none.ipynb", {})
    assert missing_kernels(term) == {
        "conda-env-teaching-py": f"'{material}/again.ipynb', '{material}/conda.ipynb'",
        "julia-1.9": f"'{material}/julia.ipynb'",
        "": f"'{material}/data/none.ipynb'",
    }
    for name in term.students:
        for stem in names:
            sent = term.home(name) / f"course/material/{stem}.ipynb"
            assert sent.read_bytes() == (material / f"{stem}.ipynb").read_bytes()

    kernels = Path("/usr/local/share/jupyter/kernels/julia-1.9")
    kernels.mkdir(parents=True)
    try:
        (kernels / "kernel.json").write_text("{}")
        assert set(missing_kernels(term)) == {"conda-env-teaching-py", ""}
    finally:
        shutil.rmtree("/usr/local/share/jupyter/kernels")


def test_notebooks_that_are_broken_or_huge_are_sent_without_a_word(term: Course) -> None:
    material = term.material
    odd: list[object] = [None, [], {"kernelspec": None}, {"kernelspec": 7}]
    for number, metadata in enumerate(odd):
        write_notebook(material / f"odd{number}.ipynb", metadata)
    (material / "list.ipynb").write_text("[]")
    (material / "empty.ipynb").write_text("")
    (material / "bytes.ipynb").write_bytes(b"\xff\xfe\x00")
    (material / "nested.ipynb").write_text("[" * 1_000_000)
    with (material / "huge.ipynb").open("wb") as file:
        file.truncate(notebooks.MAX_NOTEBOOK_BYTES + 10)
    assert missing_kernels(term) == {}
    sent = term.home(term.students[0]) / "course/material"
    assert len(list(sent.glob("*.ipynb"))) == 9


def test_thousands_of_notebooks_are_told_in_a_line(term: Course) -> None:
    for number in range(10_000):
        path = term.material / f"n{number:04}.ipynb"
        write_notebook(path, {"kernelspec": {"name": "elsewhere"}})
    done = term.run("send", "--only", term.students[0])
    assert done.returncode == 0
    first = ", ".join(f"'{term.material}/n000{number}.ipynb'" for number in range(5))
    told = "kernel 'elsewhere', not installed, is named by"
    assert done.stderr == f"notebooks.py: {told} {first} and 9995 more\n"


def test_a_file_system_of_its_own_for_sockets_stays_mounted(
    make_course: CourseMaker,
) -> None:
    """`shutdown` could not remove its root, and failed."""
    course, place = make_course(1), str(notebooks.RUNTIME_DIR)
    course.check("setup")
    notebooks.RUNTIME_DIR.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", "mode=0755", "tmpfs"]
    subprocess.run(["mount", "--no-mtab", *options, place], check=True)
    try:
        for _ in range(2):
            launch = course.launch().wait_ready()
            assert course.notebook(course.students[0]).execute("6 * 7") == "42"
            launch.stop()
            course.check("shutdown")
            assert os.listdir(place) == []
        course.check("remove", "--yes")
    finally:
        kill_all(course.processes, "the server")
        subprocess.run(["umount", "--no-mtab", place], check=True)
