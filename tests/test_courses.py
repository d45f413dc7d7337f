"""Several courses on one host, with students in common."""

import itertools
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

import notebooks
from conftest import CourseMaker
from support import Course, run, run_as, start, wait_until
from test_accounts import exists, members, password_works, shadow_line, snapshot

pytestmark = pytest.mark.root

Two = tuple[Course, Course]


@pytest.fixture
def two(make_course: CourseMaker) -> Two:
    """Two courses of two students each, of whom the second and the first are one."""
    first, second = make_course(2), make_course(2, tutorial_dir="other")
    shared = first.students[1]
    second.students[0] = shared
    second.write_students({"username": x} for x in second.students)
    return first, second


def marked(username: str) -> list[Path]:
    mark, courses = notebooks.read_mark(pwd.getpwnam(username))
    assert mark == notebooks.MARK
    return [each.path for each in courses]


def works(username: str, directory: str) -> Path:
    """Have a student save something."""
    run_as(username, "sh", "-c", f"echo mine >{directory}/mine", check=True)
    return Path(pwd.getpwnam(username).pw_dir, directory, "mine")


def accounts_and_homes() -> dict[str, object]:
    found = snapshot().items()
    return {path: x for path, x in found if not path.startswith("/var/lib/notebooks")}


def orders() -> list[str]:
    """Return the orders of setups (A, B) and removes (a, b), and some with one again."""
    words = {"".join(x) for x in itertools.permutations("AaBb")}
    words = {x for x in words if all(x.index(y) < x.index(y.lower()) for y in "AB")}
    return sorted({*words, "ABaAb", "ABbBa", "ABAab"})


@pytest.mark.parametrize("order", orders())
def test_two_courses_in_any_order_lose_nothing_and_leave_nothing(
    two: Two, order: str
) -> None:
    courses = dict(zip("AB", two, strict=True))
    before = accounts_and_homes()
    there: set[str] = set()
    work: dict[str, list[Path]] = {"A": [], "B": []}

    for letter in order:
        course = courses[letter.upper()]
        others = {x for name in there - {letter.upper()} for x in courses[name].students}
        shadows = {username: shadow_line(username) for username in others}
        if letter.isupper():
            there.add(letter)
            course.check("setup")
            directory = str(course.settings["tutorial_dir"])
            work[letter] = [works(username, directory) for username in course.students]
            assert members(course.group) == {*course.students}
        else:
            there.discard(letter.upper())
            output = course.check("remove", "--yes")
            for username in others & {*course.students}:
                other = courses[next(iter(there))]
                assert f"{username}: is in {other.config}, too; the account stays" in output

        assert {x: shadow_line(x) for x in others} == shadows
        assert {x for each in two for x in each.students if exists(x)} == {
            x for name in there for x in courses[name].students
        }
        assert all(path.read_text() == "mine\n" for x in there for path in work[x])
        for name in there:
            assert all(courses[name].config in marked(x) for x in courses[name].students)

    while there:  # the courses that were set up again
        courses[there.pop()].check("remove", "--yes")
    assert accounts_and_homes() == before


def test_the_second_course_gives_a_notebook_password_and_no_system_password(
    two: Two,
) -> None:
    first, second = two
    first.check("setup")
    assert "1 account made, 1 adopted, 0 kept" in second.check("setup")
    shared = second.students[0]
    row = second.rows()[shared]
    assert row["nb-pass"] and not row["sys-pass"]
    assert password_works(shared, first.rows()[shared]["sys-pass"])
    assert "0 accounts made, 0 adopted, 2 kept" in second.check("setup")
    assert marked(shared) == [first.config, second.config]


def test_no_command_speaks_of_another_courses_students_or_launch(two: Two) -> None:
    first, second = two
    first.check("setup")
    second.configure(port=first.port)
    launch = first.launch().wait_ready()
    for command in ("setup", "send", "retrieve", "shutdown", "remove --yes"):
        done = second.run(*command.split())
        assert done.returncode == 0, done
        assert "no row" not in done.stderr and "launch" not in done.stdout + done.stderr
    assert "Reloaded" not in launch.output

    second.check("setup")
    done = second.run("launch")
    assert done.returncode == 2
    assert f"{first.port}: Address already in use: the launch of {first.config}" in (
        done.stderr
    )
    assert "has been told" in first.check("setup")


def test_shutdown_ends_no_server_or_kernel_of_another_course(two: Two) -> None:
    first, second = two
    shared = first.students[1]
    for course in two:
        course.check("setup")
        course.check("send")
        course.launch().wait_ready()
    kernels = [course.notebook(shared) for course in two]
    assert [kernel.execute("kept = 42; kept") for kernel in kernels] == ["42", "42"]
    assert len(first.servers(shared)) == len(second.servers(shared)) == 1

    second.launches[0].stop()
    second.check("shutdown")
    assert first.servers(shared) and not second.servers(shared)
    assert kernels[0].execute("kept") == "42"
    first.launches[0].stop()
    first.check("shutdown")
    wait_until(lambda: not first.processes(), 5, "the end of all")


def test_a_launch_does_not_adopt_another_courses_server(two: Two) -> None:
    first, second = two
    shared = first.students[1]
    for course in two:
        course.check("setup")
    second.launch().wait_ready()
    second.launches[0].stop()
    port = int(second.rows()[shared]["port"])
    first.configure(port=port - 2)  # theirs is the second
    launch = first.launch().wait_ready()
    assert f"{shared}: port {port} is held by notebooks.py: n" in launch.output
    assert first.servers(shared) and second.servers(shared)


def test_two_courses_cannot_have_the_same_group(two: Two) -> None:
    first, second = two
    first.check("setup")
    before = snapshot()
    second.configure(group=first.group)
    done = second.run("setup")
    assert done.returncode == 2
    assert f"is the group of the course {first.config}" in done.stderr
    assert snapshot() == before


def test_a_second_configuration_for_the_same_list_is_the_same_course(
    course: Course,
) -> None:
    course.check("setup")
    feedback = course.config.with_name("feedback.cfg")
    feedback.write_text(course.config.read_text())
    assert run("setup", feedback).returncode == 0
    assert marked(course.students[0]) == [course.config]
    done = run("remove", "--yes", feedback)
    assert done.returncode == 0 and not any(map(exists, course.students)), done


def test_the_limits_of_an_account_are_those_of_the_course_that_owns_it(two: Two) -> None:
    first, second = two
    first.configure(processes="300")
    second.configure(processes="400", memory="1G")
    for each in two:
        each.check("setup")
    shared, alone = second.students

    def limits(course: Course) -> dict[int, int]:
        config, _ = notebooks.read_config(course.config)
        students = notebooks.Roster(config.user_list).students
        found = notebooks.limits_by_uid(config, notebooks.find_members(students))
        return {uid: each.processes for uid, each in found.items()}

    uids = {name: pwd.getpwnam(name).pw_uid for name in (*first.students, alone)}
    assert limits(first) == {uids[name]: 300 for name in first.students}
    assert limits(second) == {uids[alone]: 400}
    assert f"owner of their account: {shared}\n" in second.run("setup").stderr

    first.check("remove", "--yes")
    assert limits(second) == {uids[shared]: 400, uids[alone]: 400}


def move(course: Course) -> Path:
    """Give the course another directory; return the old configuration file."""
    old, directory = course.config, course.directory.with_name("moved")
    course.directory.rename(directory)
    course.directory, course.config = directory, directory / old.name
    course.user_list = directory / "students.csv"
    return old


def test_a_course_that_was_moved_keeps_its_accounts(two: Two) -> None:
    first, second = two
    first.check("setup")
    second.check("setup")
    shared = first.students[1]
    shadow = shadow_line(shared)
    old = move(first)

    second.check("setup")
    assert marked(shared) == [old, second.config]
    assert not second.rows()[shared]["sys-pass"] and shadow_line(shared) == shadow
    done = first.run("setup")
    for username in first.students:
        assert f"{username}: taken over from {old}, which is gone" in done.stderr
    assert marked(shared) == [first.config, second.config]
    assert shadow_line(shared) == shadow
    second.check("remove", "--yes")
    assert exists(shared)
    first.check("remove", "--yes")
    assert not any(map(exists, first.students))


def test_a_course_that_was_moved_is_removed_without_a_setup(course: Course) -> None:
    course.check("setup")
    move(course)
    course.check("remove", "--yes")
    assert not any(map(exists, course.students))


def test_a_course_whose_directory_is_not_mounted_loses_nothing(two: Two) -> None:
    first, second = two
    first.check("setup")
    work = works(first.students[1], "course")
    first.directory.rename(first.directory.with_name("elsewhere"))
    second.check("setup")
    assert not second.rows()[second.students[0]]["sys-pass"]
    output = second.check("remove", "--yes")
    assert f"{second.students[0]} is in {first.config} (gone; if for good, delete the" in (
        output
    )
    assert work.read_text() == "mine\n"
    first.directory.with_name("elsewhere").rename(first.directory)
    first.check("remove", "--yes")
    assert not any(map(exists, (*first.students, *second.students)))


def test_marks_of_version_1_0_0_are_taken_over_by_the_first_setup(two: Two) -> None:
    first, second = two
    shared = first.students[1]
    for course in two:
        course.check("setup")
    for username in {*first.students, *second.students}:
        subprocess.run(["usermod", "--comment", ",,,,notebooks.py", username], check=True)

    output = second.check("remove", "--yes")
    assert f"{shared} is in group {first.group}, too: it only leaves" in output
    assert exists(shared) and not exists(second.students[1])
    first.check("setup")
    assert [marked(x) for x in first.students] == [[first.config], [first.config]]
    first.check("remove", "--yes")
    assert not any(map(exists, first.students))


def test_any_path_can_be_in_a_mark(make_course: CourseMaker) -> None:
    course = make_course(1)
    directory = Path("/var/a;:,=%Ü")
    shutil.copytree(course.directory, directory)
    course.config, course.user_list = directory / "x.cfg", directory / "students.csv"
    (directory / "notebooks.cfg").rename(course.config)
    course.check("setup")
    (username,) = course.students
    assert marked(username) == [course.config]
    subprocess.run(["chfn", "--work-phone", "555", username], check=True)
    assert "555" in pwd.getpwnam(username).pw_gecos
    assert marked(username) == [course.config]
    course.check("remove", "--yes")
    assert not exists(username)


def test_a_course_that_moved_and_one_in_its_old_place_are_two(two: Two) -> None:
    """Both have the default group, and a student in common."""
    first, second = two
    first.check("setup")
    work = works(first.students[1], "course")
    old = move(first)
    shutil.copytree(second.directory, old.parent)
    second.config, second.user_list = old, old.parent / "students.csv"
    second.configure(group=first.group)
    done = second.run("setup")
    assert done.returncode == 2 and f"is the group of the course {old}" in done.stderr

    second.configure(group=f"{first.group}y"[:30])
    second.check("setup")
    assert not second.rows()[second.students[0]]["sys-pass"]
    second.check("remove", "--yes")
    assert work.read_text() == "mine\n"
    first.check("setup")
    assert marked(first.students[1]) == [first.config]
    first.check("remove", "--yes")
    assert not any(map(exists, (*first.students, *second.students)))


def test_a_copy_of_a_course_has_no_part_in_its_group(course: Course) -> None:
    course.check("setup")
    copy = shutil.copytree(course.directory, course.directory.with_name("copy"))
    done = run("remove", "--yes", copy / "notebooks.cfg")
    assert done.returncode == 0 and "0 accounts deleted, 2 left." in done.stdout
    assert members(course.group) == {*course.students}


def test_one_configuration_that_two_courses_link_to_is_not_one_course(two: Two) -> None:
    first, second = two
    for course in two:
        (course.directory / "course.cfg").symlink_to(first.config)
        course.config = course.directory / "course.cfg"
        course.settings["tutorial_dir"] = "course"
    first.check("setup")
    done = second.run("setup")
    assert done.returncode == 2 and "is the group of the course" in done.stderr


def test_what_a_student_puts_in_the_place_of_a_course_holds_nobody_up(two: Two) -> None:
    first, second = two
    first.check("setup")
    second.check("setup")
    first.config.unlink()
    os.mkfifo(first.config)
    assert second.run("setup", timeout=30).returncode == 0
    assert second.run("remove", "--yes", timeout=30).returncode == 0


def test_two_setups_at_once_both_finish(two: Two) -> None:
    commands = [start("setup", config=course.config) for course in two]
    outputs = [command.communicate(timeout=60) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], outputs
    for course in two:
        assert members(course.group) == {*course.students}
        assert all(map(exists, course.students))
    shared = two[0].students[1]
    assert {*marked(shared)} == {course.config for course in two}
    passwords = [course.rows()[shared].get("sys-pass") or "" for course in two]
    assert sorted(map(bool, passwords)) == [False, True]
    assert password_works(shared, max(passwords))


def give_disk(course: Course) -> None:
    """Put a file system of its own in the place of a course's directory."""
    old = shutil.copytree(course.directory, f"{course.directory}-old")
    command = ["mount", "--no-mtab", "-t", "tmpfs", "-o", "mode=0755", "tmpfs"]
    subprocess.run([*command, str(course.directory)], check=True)
    shutil.copytree(old, course.directory, dirs_exist_ok=True)


def test_roots_of_two_disks_have_one_inode_and_are_two_courses(two: Two) -> None:
    """The second one took the first one's mark for its own, and deleted its students."""
    first, second = two
    for course in two:
        give_disk(course)
    assert first.directory.stat().st_ino == second.directory.stat().st_ino
    first.check("setup")
    second.check("setup")
    work, shared = works(first.students[1], "course"), first.students[1]
    shadow = shadow_line(shared)
    second.check("remove", "--yes")
    assert work.read_text() == "mine\n" and shadow_line(shared) == shadow

    elsewhere = first.directory.with_name("elsewhere")
    elsewhere.mkdir()
    subprocess.run(["mount", "--move", first.directory, elsewhere], check=True)
    second.check("setup")
    assert not second.rows()[shared]["sys-pass"] and shadow_line(shared) == shadow
    second.check("remove", "--yes")
    assert work.read_text() == "mine\n"

    old, first.directory = first.config, elsewhere
    first.config = elsewhere / "notebooks.cfg"
    first.user_list = elsewhere / "students.csv"
    assert f"{shared}: taken over from {old}" in first.run("setup").stderr
    first.check("remove", "--yes")
    assert not exists(shared)
