"""What teachers do wrong, and what happens around them: clear words, nothing lost."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import notebooks
from conftest import CourseMaker
from support import (
    ENVIRONMENT,
    NOTEBOOKS,
    Course,
    made_account,
    run,
    run_as,
    title_of,
    wait_until,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A course after setup; tests leave its accounts."""
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        course.check("setup")
        yield course


def shell(course: Course, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line with $nb for notebooks.py."""
    environment = {**ENVIRONMENT, "nb": f"{sys.executable} {NOTEBOOKS}"}
    return subprocess.run(
        ["sh", "-c", line], cwd=course.directory, env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [("material_dir", "."), ("material_dir", "/"), ("storage_dir", "material/storage")],
)
def test_material_that_is_not_for_students_is_not_sent(
    ready: Course, setting: str, value: str
) -> None:
    ready.configure(material_dir="material", storage_dir="storage")
    ready.configure(**{setting: value})
    try:
        done = ready.run("send")
    finally:
        ready.configure(material_dir="material", storage_dir="storage")
    assert done.returncode == 2
    assert "[Setup] material_dir = " in done.stderr
    assert "which is not for students" in done.stderr
    assert not os.listdir(ready.home(ready.students[0]) / "course")


def test_storage_within_a_tutorial_directory_is_not_copied_into_itself(
    ready: Course,
) -> None:
    """As that of a teacher who is in the list, too."""
    first, second = ready.students
    storage = ready.home(first) / "course/storage"
    ready.configure(storage_dir=storage, owner=first)
    done = ready.run("retrieve")
    ready.configure(storage_dir="storage", owner="")
    assert done.returncode == 1
    assert f"{first}: storage_dir lies in what is to be retrieved" in done.stderr
    assert os.listdir(storage) == [second]
    subprocess.run(["rm", "-r", storage], check=True)


def test_nothing_can_be_sent_or_retrieved_before_setup(course: Course) -> None:
    for command in ("send", "retrieve", "launch"):
        done = course.run(command)
        assert done.returncode == 2
        assert "nobody has an account" in done.stderr and "run setup" in done.stderr


def test_remove_before_setup_keeps_what_the_teacher_typed(course: Course) -> None:
    typed = {"username": course.students[0], "sys-pass": "mine", "nb-pass": "too"}
    course.write_students([{**typed, "port": "22150"}])
    before = course.user_list.read_bytes()
    done = course.run("remove")  # nothing to ask
    assert done.returncode == 0
    assert "0 accounts deleted" in done.stdout
    assert course.user_list.read_bytes() == before


def test_what_is_added_to_the_list_meanwhile_is_kept(course: Course) -> None:
    students = notebooks.Roster(course.user_list)
    with students.locked():
        students.update(course.students[0], nb_pass="secret")
        with course.user_list.open("a") as file:
            file.write("late,Late,Comer\n")
        students.save()
        students.update(course.students[1], nb_pass="other")
        students.save()
    rows = course.rows()
    assert [*rows] == [*course.students, "late"]
    assert [row["nb-pass"] or "" for row in rows.values()][:2] == ["secret", "other"]
    assert rows["late"]["surname"] == "Comer"


def test_a_row_that_is_deleted_meanwhile_stays_deleted(course: Course) -> None:
    students = notebooks.Roster(course.user_list)
    stays, gone = course.students
    with students.locked():
        course.write_students([{"username": stays}])
        students.update(stays, nb_pass="secret")
        students.save()
        students.update(gone, sys_pass="", nb_pass="", port="")
        students.save()
    assert [*course.rows()] == [stays]
    assert course.rows()[stays]["nb-pass"] == "secret"


def test_an_account_whose_row_is_gone_is_named(make_course: CourseMaker) -> None:
    course = make_course(2)
    course.check("setup")
    gone, stays = course.students
    rows = course.rows()
    course.write_students([rows[stays]])
    for command in (["setup"], ["shutdown"], ["remove", "--yes"]):
        done = course.run(*command)
        assert done.returncode == 0
        assert f"{gone} has an account that setup made, but no row" in done.stderr
    course.write_students(rows.values())
    course.check("remove", "--yes")


def test_a_fresh_export_of_the_list_is_seen_to_change_passwords(course: Course) -> None:
    course.check("setup")
    course.write_students({"username": username} for username in course.students)
    assert "; 2 got new system passwords." in course.check("setup")


def test_a_home_that_is_somebody_elses_is_left_and_said(course: Course) -> None:
    course.check("setup")
    username, other = course.students
    home = course.home(username)
    subprocess.run(["chown", "root:", home], check=True)
    (home / "of-root").touch()
    done = course.run("setup")
    assert done.returncode == 1
    assert f"{username}: {home} is not theirs; move it away" in done.stderr
    done = course.run("remove", "--yes")
    assert done.returncode == 1
    assert f"{username}: the account is gone, but {home} was not theirs" in done.stderr
    assert (home / "of-root").exists()
    subprocess.run(["rm", "-r", home], check=True)


def test_a_home_is_whole_after_a_full_disk_and_a_second_setup(course: Course) -> None:
    options = "size=40k,mode=0755"
    mount = ["mount", "--no-mtab", "-t", "tmpfs", "-o", options, "tmpfs", "/home"]
    subprocess.run(mount, check=True)
    try:
        Path("/home/filling").write_bytes(bytes(32 << 10))
        done = course.run("setup")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        Path("/home/filling").unlink()
        course.check("setup")
        for username in course.students:
            found = {path.name for path in course.home(username).iterdir()}
            assert found == {*os.listdir("/etc/skel"), "course"}
            assert course.home(username).owner() == username
        assert not [name for name in os.listdir("/home") if name.startswith(".")]
        course.check("remove", "--yes")
    finally:
        subprocess.run(["umount", "--no-mtab", "/home"], check=True)


def test_a_full_disk_below_etc_makes_and_deletes_nothing_by_half(
    course: Course, tmp_path: Path
) -> None:
    """The same commands finish when there is room again."""
    copy, size = tmp_path / "etc", "size=64M,mode=0755"
    subprocess.run(["cp", "-a", "/etc", copy], check=True)
    mount = ["mount", "--no-mtab", "-t", "tmpfs", "-o", size, "tmpfs", "/etc"]
    subprocess.run(mount, check=True)
    filling = Path("/etc/filling")
    try:
        subprocess.run(["cp", "-a", f"{copy}/.", "/etc"], check=True)
        before = Path("/etc/passwd").read_text(), Path("/etc/shadow").read_text()
        fill_disk(filling)
        assert course.run("setup").returncode == 1
        after = Path("/etc/passwd").read_text(), Path("/etc/shadow").read_text()
        assert after == before
        filling.unlink()
        course.check("setup")
        fill_disk(filling)
        done = course.run("remove", "--yes")
        assert done.returncode == 1
        assert "2 failed" in done.stdout
        assert all(course.home(username).is_dir() for username in course.students)
        filling.unlink()
        course.check("remove", "--yes")
        assert Path("/etc/passwd").read_text() == before[0]
        assert Path("/etc/shadow").read_text() == before[1]
    finally:
        subprocess.run(["umount", "--no-mtab", "/etc"], check=True)


def fill_disk(path: Path) -> None:
    """Leave not a byte to write."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_a_program_that_is_missing_is_named_before_anything_is_done(
    course: Course,
) -> None:
    with made_account() as account:
        program = Path("/usr/sbin/userdel")
        hidden = run_as(account.pw_name, "mktemp", check=True).stdout.strip()
        os.chmod(hidden, 0o600)
        subprocess.run(["mount", "--no-mtab", "--bind", hidden, program], check=True)
        try:
            done = course.run("setup")
        finally:
            subprocess.run(["umount", "--no-mtab", program], check=True)
    assert done.returncode == 2
    assert "the program userdel is not installed" in done.stderr


def test_the_reader_of_a_pipe_may_go_and_streams_may_be_closed(course: Course) -> None:
    assert shell(course, "$nb setup | head -n 0; exit 0").stderr == ""
    assert all(map(course.home, course.students))
    assert shell(course, "$nb setup >&-").returncode == 0
    done = shell(course, "$nb remove <&-")
    assert done.returncode == 2 and "needs --yes" in done.stderr
    assert shell(course, "$nb send >&- 2>&- <&-").returncode == 0


@pytest.mark.parametrize("title", ["launcher", "template process", "webserver"])
def test_ctrl_c_before_launch_is_ready_ends_it_without_a_word_too_much(
    ready: Course, title: str
) -> None:
    launch = ready.launch()

    def is_there() -> bool:
        family = [psutil.Process(launch.pid), *psutil.Process(launch.pid).children()]
        return any(title_of(x).startswith(f"notebooks.py: {title}") for x in family)

    wait_until(is_there, 20, title)
    assert launch.stop(signal.SIGINT) == 130
    assert "Traceback" not in launch.output


def test_a_password_that_is_too_long_is_refused_before_anything_is_done(
    course: Course,
) -> None:
    row = {"username": course.students[0], "sys-pass": "x" * 600}
    course.write_students([row])
    done = course.run("setup")
    assert done.returncode == 2
    assert "line 2: the sys-pass is longer than 200 characters" in done.stderr
    with pytest.raises(KeyError):
        pwd.getpwnam(course.students[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[Setup]\ntutorial_dir = 'course'\n", "must be without quotation marks"),
        ("[Launch]\nkey_file = x.key\n", "is of no use without cert_file"),
        ("[Setup]\ngroup = sudo\n", "is a group of the system"),
        ("[Setup]\ngroup = zoe\n", "[Setup] group = zoe: is a student's name"),
        ("[Setup]\nmaterial_dir = a\0b\n", "is not a text file"),
    ],
)
def test_a_configuration_that_would_do_harm_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "notebooks.cfg").write_text(text)
    (tmp_path / "students.csv").write_text("username\nzoe\n")
    done = run("setup", tmp_path / "notebooks.cfg")
    assert done.returncode == 2
    assert words in done.stderr
