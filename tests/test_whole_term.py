"""A whole term on twenty students: at its end the teacher has all that they wrote."""

import json
import tarfile
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from conftest import CourseMaker
from support import CODE_CELL, Course, log_in, run_as, use
from test_accounts import exists, members
from test_term import line_of, snapshot

pytestmark = pytest.mark.root

COPY = "intro (mine 1).ipynb"
MARK = ("9 of 10", "the task")


def notebook_text(*sources: str) -> str:
    cells: list[dict[str, object]] = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "source": source,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for i, source in enumerate(sources)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel}
    return json.dumps(
        {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    )


class Term:
    """A course, and all that its students have written: by student, path and text."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.written: dict[str, dict[str, set[str]]] = {}

    def write(self, username: str, path: str, text: str) -> None:
        """Have a student save a file, given relative to the home."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1"'
        done = run_as(username, "sh", "-c", script, "sh", path, input=text)
        assert done.returncode == 0, done
        self.written.setdefault(username, {}).setdefault(path, set()).add(text)

    def work(self, *usernames: str, week: str) -> None:
        """Have students solve the week's notebook, and write files of their own."""
        for username in usernames:
            answer = notebook_text("# the task", f"# by {username}, {week}")
            self.write(username, f"course/{week}/intro.ipynb", answer)
            self.write(username, f"course/{week}/notes of {username}.md", f"# {week}\n")
            self.write(username, f"project/{week}.py", f"print('{username}')\n")

    def material(self, week: str, **files: str) -> None:
        directory = self.course.directory / week
        directory.mkdir(exist_ok=True)
        for name, text in files.items():
            (directory / name.replace("_", ".")).write_text(text)
        self.course.configure(material_dir=week)

    def homes(self, *usernames: str) -> dict[str, dict[str, tuple[int, int, bytes]]]:
        return {name: snapshot(self.course.home(name)) for name in usernames}

    def missing(self) -> list[str]:
        """Return what students wrote and the teacher has nowhere."""
        missing = []
        for username, files in self.written.items():
            archive_file = self.course.directory / "archives" / f"{username}.tar.gz"
            files_stored = filter(Path.is_file, self.course.storage.rglob("*"))
            # What the teacher has marked is the student's, but for the mark.
            stored = {x.read_text().replace(*MARK) for x in files_stored}
            with tarfile.open(archive_file) as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    file = archive.extractfile(member)
                    assert file
                    stored.add(file.read().decode())
            missing += [
                f"{username}: {path}"
                for path, texts in files.items()
                if not texts <= stored
            ]
        return missing


@pytest.fixture
def term(make_course: CourseMaker) -> Term:
    """Twenty students, who have the material of the first week."""
    settings = {"keep_changed": "yes", "archive_dir": "archives", "on_demand": "yes"}
    term = Term(make_course(20, **settings))
    term.material("week1", intro_ipynb=notebook_text("# the task"), data_csv="1,2\n")
    term.course.check("setup")
    term.course.check("send")
    return term


def test_a_correction_in_the_second_week(term: Term, browser: WebDriver) -> None:
    """Nobody has lost a byte, ten have a copy, and each copy opens as a notebook."""
    course = term.course
    working = course.students[::2]
    term.work(*working, week="week1")
    before = term.homes(*course.students)
    term.material("week1", intro_ipynb=notebook_text("# the corrected task"))
    course.check("send")

    for username in course.students:
        directory = course.home(username) / "course/week1"
        corrected = (course.material.with_name("week1") / "intro.ipynb").read_text()
        assert (directory / "intro.ipynb").read_text() == corrected
        after = snapshot(course.home(username))
        copies = [str(directory / COPY)] if username in working else []
        assert [*after.keys() - before[username].keys()] == copies
        changed = {
            path for path in before[username] if after[path] != before[username][path]
        }
        assert {Path(path).name for path in changed} <= {
            *("intro.ipynb", ".notebooks-record.json", "week1")
        }
        if username in working:
            old = before[username][str(directory / "intro.ipynb")]
            assert after[str(directory / COPY)] == old

    course.launch().wait_ready()
    for username in working:
        browser.get(f"{course.notebook_url(username)}notebooks/course/week1/{COPY}")
        log_in(browser, course, username)
        use(browser, f"{CODE_CELL} .cm-content", f"# by {username}, week1")


def test_a_term_loses_nothing(term: Term, make_course: CourseMaker) -> None:
    course = term.course
    early, leaver, both = course.students[:10], course.students[3], course.students[4]
    term.work(*early, week="week1")

    # A late student: nobody else's home has changed by a byte.
    before = term.homes(*course.students)
    late = f"{course.group}x"
    course.write_students([*course.rows().values(), {"username": late}])
    course.check("setup", "--only", late)
    course.check("send", "--only", late)
    assert term.homes(*course.students) == before
    course.students.append(late)
    term.work(late, week="week1")

    # The week is collected and marked; then one goes on, and the others' marks stay.
    course.check("retrieve")
    marks = [course.storage / x / "week1/intro.ipynb" for x in early]
    for marked in marks:
        marked.write_text(marked.read_text().replace("the task", "9 of 10"))
    term.write(early[0], "course/week1/intro.ipynb", notebook_text("# a second thought"))
    course.check("retrieve")
    assert all("9 of 10" in path.read_text() for path in marks[1:])
    assert "9 of 10" in marks[0].with_name("intro.ipynb.~1~").read_text()
    assert "second thought" in marks[0].read_text()

    # One leaves. The others have a second course, some a second week, with a correction.
    course.check("remove", "--only", leaver, "--yes")
    rows = course.rows()
    del rows[leaver]
    course.write_students(rows.values())
    course.students.remove(leaver)
    second = make_course(2, tutorial_dir="second")
    second.students[0] = both
    second.write_students({"username": x} for x in second.students)
    second.check("setup")
    second.check("send")

    term.material("week2", intro_ipynb=notebook_text("# the second task"))
    course.check("send")
    term.work(*course.students[5:15], week="week2")
    term.material("week2", intro_ipynb=notebook_text("# the second task, corrected"))
    output = course.check("send")
    for username in course.students:
        kept = "1 kept as backups" in line_of(output, username)
        assert kept == (username in course.students[5:15])
    second.check("retrieve")
    second.check("remove", "--yes")
    assert exists(both) and both in members(course.group)

    # The end; and somebody's new beginning elsewhere.
    course.check("shutdown")
    course.check("retrieve")
    course.check("remove", "--yes")
    assert not any(map(exists, [*course.students, leaver, *second.students]))
    assert term.missing() == []
    assert len(term.written) == 17

    # As on another machine: everybody goes on where they were.
    course.check("setup")
    for username in course.students:
        for path, texts in term.written.get(username, {}).items():
            file = course.home(username) / path
            copies = [x for x in (file, file.with_name(COPY)) if x.exists()]
            assert any(x.read_text() in texts for x in copies), file
