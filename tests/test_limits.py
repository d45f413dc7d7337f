"""Limits of single students, as far as a host without systemd keeps them: see test-vm."""

from pathlib import Path

import psutil
import pytest

import notebooks
from conftest import CourseMaker
from support import Course

TOTAL = psutil.virtual_memory().total
WRONG = {
    "memory": ("2 apples", "10M", "0 %", "120 %", "-1G", "99999T", "²G"),
    "cpu": ("two", "-1", "1,5", "1.234", "1e3", "٣"),
    "processes": ("0", "49", "many", "-5", "1.5"),
    "disk": ("big", "-1", "50 %"),
}
RIGHT = {
    ("memory", "2G"): 2 << 30,
    ("memory", "25 %"): TOTAL // 4,
    ("memory", "50%"): TOTAL // 2,
    ("memory", ""): 0,
    ("cpu", "1.5"): 1.5,
    ("cpu", ""): 0.0,
    ("processes", "50"): 50,
    ("disk", "500M"): 500 << 20,
}
PAIRS = [(key, text) for key, texts in WRONG.items() for text in texts]

needs_no_slices = pytest.mark.skipif(notebooks.has_slices(), reason="systemd is here")


@pytest.mark.parametrize(("key", "text"), RIGHT)
def test_a_limit_is_understood(key: str, text: str) -> None:
    assert notebooks.parse_limit(key, text) == RIGHT[key, text]


@pytest.mark.parametrize(("key", "text"), PAIRS)
def test_a_limit_that_makes_no_sense_is_refused_with_what_is_right(
    tmp_path: Path, key: str, text: str
) -> None:
    config = tmp_path / "notebooks.cfg"
    config.write_text(f"[Limits]\n{key} = {text}\n", encoding="utf-8")
    _, problems = notebooks.read_config(config)
    assert len(problems) == 1 and f"{key} = {text}: must be" in problems[0]
    students = tmp_path / "students.csv"
    students.write_text(f'username,{key}\nada,"{text}"\n', encoding="utf-8")
    (problem,) = notebooks.Roster(students).problems()
    assert f"line 2: {key} = {text!r}: must be" in problem


def test_the_row_of_a_student_goes_before_the_limits_for_all(tmp_path: Path) -> None:
    config, students = tmp_path / "notebooks.cfg", tmp_path / "students.csv"
    config.write_text("[Limits]\nmemory = 1G\ncpu = 2\nprocesses = 300\n")
    students.write_text("username;Memory;CPU;processes\nada;;;\nbob;2G;0.5;\nemmy;;;60\n")
    course, _ = notebooks.read_config(config)
    found = [course.limits_of(each) for each in notebooks.Roster(students).students]
    gib = 1 << 30
    expected = [(gib, 2, 300, 0), (2 * gib, 0.5, 300, 0), (gib, 2, 60, 0)]
    assert found == [notebooks.Limits(*each) for each in expected]


def test_students_leave_a_tenth_of_the_memory_or_half_a_gigabyte_to_the_host() -> None:
    gib = 1 << 30
    found = [notebooks.hosts_memory(int(x * gib)) for x in (0.5, 1, 2, 8, 64)]
    assert found == [gib // 4, gib // 2, gib // 2, int(0.8 * gib), int(6.4 * gib)]


@pytest.mark.root
@needs_no_slices
@pytest.mark.parametrize("place", ["cfg", "list"])
@pytest.mark.parametrize(("key", "value"), [("memory", "1G"), ("cpu", "2")])
def test_a_limit_that_cannot_be_kept_is_an_error_at_launch(
    make_course: CourseMaker, place: str, key: str, value: str
) -> None:
    course = make_course(2)
    course.check("setup")
    if place == "list":
        rows = [*course.rows().values()]
        rows[1] = {**rows[1], key: value}
        course.write_students([{key: "", **row} for row in rows])
    else:
        course.configure(**{key: value})
    done = course.run("launch")
    assert done.returncode == 2
    assert "limits of memory and cpu need systemd" in done.stderr
    assert not course.processes()


def limit_of_processes(course: Course, username: str) -> str:
    limits = Path(f"/proc/{course.server(username).pid}/limits").read_text()
    (line,) = [x for x in limits.splitlines() if x.startswith("Max processes")]
    return line.split()[3]


@pytest.mark.root
@needs_no_slices
def test_a_student_may_have_as_many_processes_as_their_row_says(
    make_course: CourseMaker,
) -> None:
    course = make_course(2)
    course.check("setup")
    first, second = course.students
    rows = [*course.rows().values()]
    course.write_students([{**rows[0], "processes": "80"}, {**rows[1], "processes": ""}])
    course.launch().wait_ready()
    assert limit_of_processes(course, first) == "80"
    assert limit_of_processes(course, second) == "1000"
    notebook = course.notebook(first)
    code = (
        "import subprocess, threading\n"
        "children = []\n"
        "try:\n"
        "    for _ in range(100): children.append(subprocess.Popen(['sleep', '99']))\n"
        "except OSError as error: print(error.strerror)\n"
        "for child in children: child.kill(); child.wait()"
    )
    assert "Resource temporarily unavailable" in notebook.execute(code)
    assert notebook.execute("6 * 7") == "42"


@pytest.mark.root
@needs_no_slices
def test_a_disk_without_quotas_is_told_with_what_gives_it_some(
    make_course: CourseMaker,
) -> None:
    course = make_course(1)
    course.configure(disk="1G")
    done = course.run("setup")
    assert done.returncode == 1
    assert (
        "no limit of disk: " in done.stderr and "install the package quota" in done.stderr
    )
    course.configure(disk="0")
    course.check("setup")


def test_news_are_told_of_what_has_changed_alone() -> None:
    base = notebooks.Usage(10, 100, 3, 50, 0, 0)
    changes = (
        {"memory": 95},
        {"killed": 1},
        {"refused": 2},
        {"memory": 95, "memory_limit": 0},
        {"memory": 80},
    )
    found = [
        [kind for kind, _ in notebooks.news_of(base._replace(**each), base)]
        for each in changes
    ]
    assert found == [["full"], ["killed"], ["refused"], [], []]
