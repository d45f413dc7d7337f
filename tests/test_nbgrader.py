"""A task, its solutions, their grades and the feedback, by the real nbgrader."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from conftest import CourseMaker
from support import ENVIRONMENT, Course, run_as

NBGRADER_PREFIX = Path(os.environ.get("NBGRADER_PREFIX", "/opt/notebooks-nbgrader"))
NBGRADER = NBGRADER_PREFIX / "bin/nbgrader"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not NBGRADER.exists(), reason=f"needs {NBGRADER} (make test)"),
]

SOLUTION = """\
def square(number):
    ### BEGIN SOLUTION
    return number * number
    ### END SOLUTION
"""
# What a student does in the browser: they write into the cell, and save.
SOLVE = """\
import json, sys
path, answer = sys.argv[1:]
with open(path) as file:
    notebook = json.load(file)
assert "SOLUTION" not in str(notebook)
notebook["cells"][0]["source"] = answer
with open(path, "w") as file:
    json.dump(notebook, file)
"""
ANSWERS = (
    "def square(number):\n    return number ** 2  # mine-{}",
    "def square(number):\n    return number + 2  # mine-{}",
)


def graded_cell(identity: str, source: str, **options: object) -> dict[str, object]:
    settings = {"schema_version": 3, "grade_id": identity, "task": False}
    settings |= {"grade": False, "solution": False, "locked": False, **options}
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": identity,
        "metadata": {"nbgrader": settings},
        "outputs": [],
        "source": source,
    }


def write_task(path: Path) -> None:
    """Write a notebook with a cell to be filled, and one that gives seven points."""
    check = "assert square(3) == 9"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {
        "cells": [
            graded_cell("square", SOLUTION, solution=True),
            graded_cell("check", check, grade=True, locked=True, points=7),
        ],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def nbgrader(course: Course, command: str) -> str:
    """Run nbgrader in the course's directory; return what it said."""
    done = subprocess.run(
        [NBGRADER, command, "ps1"],
        cwd=course.directory,
        env={
            **ENVIRONMENT,
            "HOME": str(course.directory),
            "PATH": f"{NBGRADER.parent}:{ENVIRONMENT['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_task_is_sent_solved_collected_graded_and_comes_back_with_a_score(
    make_course: CourseMaker,
) -> None:
    course = make_course(2, storage_dir="submitted", keep_changed="yes")
    course.check("setup")
    write_task(course.directory / "source/ps1/ps1.ipynb")
    nbgrader(course, "generate_assignment")
    course.configure(material_dir="release/ps1")
    assert course.run("send").stderr == ""

    for name, answer in zip(course.students, ANSWERS, strict=True):
        path, text = "course/ps1/ps1.ipynb", answer.format(name)
        done = run_as(name, "/usr/bin/python3", "-c", SOLVE, path, text)
        assert done.returncode == 0, done
    course.check("retrieve")
    assert (course.directory / "submitted" / course.students[0] / "ps1").is_dir()

    said = nbgrader(course, "autograde")
    nbgrader(course, "generate_feedback")
    assert "record" not in said  # nor does ours, beside the copies, count as an assignment
    graded = {*os.listdir(course.directory / "autograded")}
    assert graded == {*course.students}

    course.configure(material_dir="feedback/{username}/ps1")
    done = course.run("send")
    assert done.returncode == 0 and done.stderr == ""
    for name, score in zip(course.students, ("7.0", "0.0"), strict=True):
        home = course.home(name) / "course/ps1"
        feedback = (home / "ps1.html").read_text()
        assert re.findall(r"Score: (\d+\.\d) / 7\.0", feedback)[0] == score
        assert set(re.findall(r"mine-(\w+)", feedback)) == {name}
        assert f"mine-{name}" in (home / "ps1.ipynb").read_text()
        found = subprocess.run(["grep", "-rhoE", r"mine-\w+", course.home(name)], stdout=-1)
        assert {*found.stdout.decode().split()} == {f"mine-{name}"}
