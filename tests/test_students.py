"""The list of students: what a spreadsheet wrote is understood, and stays as it was."""

import contextlib
import csv
import fcntl
import io
import itertools
import os
import random
import re
import stat
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import notebooks
from support import Course, in_child

EXCEL = 'Klasse;Username;name;Notiz\r\n7b;{};Zoë;"sagt ""hallo"";\r\nund geht"\r\n'


def read_anything(directory: Path, data: str | bytes) -> notebooks.Roster:
    path = directory / "students.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return notebooks.Roster(path)


def read(directory: Path, data: str | bytes) -> notebooks.Roster:
    """Return the list that was written as these bytes; nothing is wrong with it."""
    students = read_anything(directory, data)
    assert not [*students.problems()]
    return students


def problems_of(directory: Path, data: str | bytes) -> list[str]:
    """Return what is wrong with a list, without its path."""
    problems = [*read_anything(directory, data).problems()]
    path = f"{directory}/students.csv: "
    assert all(problem.startswith(path) for problem in problems)
    return [problem.removeprefix(path) for problem in problems]


def save(students: notebooks.Roster) -> bytes:
    """Return what the file holds after it was written anew."""
    inode = students.path.stat().st_ino
    students.path.chmod(0o644)  # a file that is right already would be left alone
    held = students.document
    with students.locked():
        students.document = held
        students.save()
    assert students.path.stat().st_ino != inode
    return students.path.read_bytes()


# ---------------------------------------------------------------------------------------
# What spreadsheets write
# ---------------------------------------------------------------------------------------

PLAIN = "username,name,surname\nzoe,Zoë,O’Neil\nbo,Bo,\n"
SHAPES = {
    "comma": PLAIN.encode(),
    "no final line end": PLAIN.rstrip().encode(),
    "tab": PLAIN.replace(",", "\t").encode(),
    "Excel": PLAIN.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig"),
    "Excel for Mac": PLAIN.replace(",", ";").replace("\n", "\r").encode("utf-8-sig"),
    "old Windows": PLAIN.replace(",", ";").replace("\n", "\r\n").encode("cp1252"),
    "Excel's Unicode text": PLAIN.replace(",", "\t").encode("utf-16"),
    "UTF-16, most significant byte first": ("\ufeff" + PLAIN).encode("utf-16-be"),
    "quoted": re.sub("[^,\n]+", r'"\g<0>"', PLAIN).encode(),
    "blanks": PLAIN.replace(",", " , ").encode(),
    "capitals": PLAIN.replace("username,name", "UserName,NAME").encode(),
    "empty lines": PLAIN.replace("\n", "\n\n,,\n").encode(),
    "another order": "surname,name,username\nO’Neil,Zoë,zoe\n,Bo,bo\n".encode(),
    "own columns": "x,surname,y,name,username\n1,O’Neil,,Zoë,zoe\n,,,Bo,bo\n".encode(),
    "short rows": PLAIN.replace("Bo,", "Bo").encode(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_list_is_understood_and_written_as_it_was(tmp_path: Path, shape: str) -> None:
    students = read(tmp_path, SHAPES[shape])
    assert [(each.username, each.full_name) for each in students.students] == [
        ("zoe", "Zoë O’Neil"),
        ("bo", "Bo"),
    ]
    assert save(students) == SHAPES[shape]


def test_only_usernames_are_needed(tmp_path: Path) -> None:
    students = read(tmp_path, "username\nzoe\nbo\n")
    zoe, bo = students.students
    assert zoe == notebooks.Student(2, "zoe", "", "", "", "", "")
    students.update("bo", nb_pass="abc", port="8889")
    assert save(students) == b"username,nb-pass,port\nzoe\nbo,abc,8889\n"


def test_a_name_of_32_characters_is_a_user_name(tmp_path: Path) -> None:
    name = "a2345678901234567890123456789-_2"
    assert len(name) == 32
    assert not problems_of(tmp_path, f"username\n{name}\n_x\na.b\n")


def test_a_quoted_cell_may_have_line_breaks_delimiters_and_quotes(
    tmp_path: Path,
) -> None:
    text = 'username;note;name\nzoe;"a;\r\n""b""\n\n";Zoë\nbo;;"B; o"\nada;;\n'
    students = read(tmp_path, text)
    assert [(each.line, each.name) for each in students.students] == [
        (2, "Zoë"),
        (6, "B; o"),
        (7, ""),
    ]
    students.update("bo", sys_pass='";')
    assert save(students).decode() == text.replace("name\n", "name;sys-pass\n").replace(
        'o"\n', 'o";""";"\n'
    )


# ---------------------------------------------------------------------------------------
# Lists made by chance
# ---------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A list as raw cells with their line ends, and how it is encoded."""

    encoding: str
    delimiter: str
    rows: list[tuple[list[str], str]]

    @property
    def text(self) -> str:
        return "".join(self.delimiter.join(cells) + end for cells, end in self.rows)

    @property
    def data(self) -> bytes:
        mark = "\ufeff" if self.encoding.startswith("utf-16") else ""
        return (mark + self.text).encode(self.encoding)

    @property
    def values(self) -> list[list[str]]:
        """The cells as Python's own reader understands them, without empty rows."""
        rows = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.delimiter)
        stripped = [[cell.strip() for cell in row] for row in rows]
        return [row for row in stripped if any(row)]


def write_cell(value: str, delimiter: str, quoted: bool) -> str:
    if quoted or value.startswith('"') or {*value} & {delimiter, "\r", "\n"}:
        return '"' + value.replace('"', '""') + '"'
    return value


def choose_value(chance: random.Random, delimiter: str) -> str:
    letters = string.ascii_letters + " éß" * 3 + "\"'" + delimiter * 2 + "\r\n"
    return "".join(chance.choices(letters, k=chance.choice((0, 0, 1, 3, 9))))


def write_list(chance: random.Random) -> Written:
    delimiter, newline = chance.choice(",;\t"), chance.choice(("\n", "\r\n", "\r"))
    columns = ["größe", *chance.sample(notebooks.COLUMNS[1:], chance.randrange(7))]
    columns += chance.sample(["Note 1", "", "x"], 2)
    columns.insert(chance.randrange(len(columns)), "username")
    rows = [[write_cell(name, delimiter, chance.random() < 0.3) for name in columns]]
    for i in range(chance.randrange(1, 9)):
        row = []
        for column in columns:
            value = choose_value(chance, delimiter)
            if column == "username":
                value = f"student-{i}"
            elif column == "port":
                value = chance.choice(("", "8889"))
            elif column.endswith("-pass"):
                value = re.sub("[\r\n\t]", "", value)
            row.append(write_cell(value, delimiter, chance.random() < 0.3))
        if chance.random() < 0.2:  # a row may end early
            row = row[: columns.index("username") + 1]
        rows.append(row)
        if chance.random() < 0.1:
            rows.append(chance.choice([[""], ["", ""], [" "]]))
    ends = [newline] * len(rows)
    ends[-1] = chance.choice((newline, ""))
    encodings = ("utf-8", "utf-8-sig", "cp1252", "utf-16-le", "utf-16-be")
    return Written(chance.choice(encodings), delimiter, [*zip(rows, ends)])


def set_cells(written: Written, changes: dict[str, dict[str, str]]) -> None:
    """Change the raw cells of students as the list should: nothing else may change."""
    header = [cell.strip('"') for cell in written.rows[0][0]]
    place = header.index("username")
    for cells, _ in written.rows[1:]:
        username = cells[place].strip('"') if place < len(cells) else ""
        for column, value in changes.get(username, {}).items():
            if column not in header and value:
                header.append(column)
                written.rows[0][0].append(column)
            if column in header:
                i = header.index(column)
                old = cells[i] if i < len(cells) else ""
                if value != old.strip().strip('"').strip():
                    cells += [""] * (i + 1 - len(cells))
                    cells[i] = write_cell(value, written.delimiter, old[:1] == '"')


@pytest.fixture(params=range(100))
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A source of random numbers: always the same ones for a test of that number."""
    return random.Random(request.param)


def test_any_list_is_understood_as_csv_and_written_as_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    written = write_list(chance)
    students = read(tmp_path, written.data)
    header, *rows = written.values
    for row, student in zip(rows, students.students, strict=True):
        values = dict(zip(header, row))
        assert student.username == values["username"]
        assert (student.name, student.surname, student.sys_pass, student.port) == tuple(
            values.get(name, "") for name in ("name", "surname", "sys-pass", "port")
        )
    assert save(students) == written.data


def test_an_update_of_any_list_changes_nothing_but_the_asked_cells(
    tmp_path: Path, chance: random.Random
) -> None:
    written = write_list(chance)
    students = read(tmp_path, written.data)
    names = [student.username for student in students.students]
    values = ("", "", "8889", "aB3", f'a{written.delimiter}"')
    changes = {
        name: {
            column: chance.choice(values)
            for column in chance.sample(("sys-pass", "nb-pass", "port"), 2)
        }
        for name in chance.sample(names, chance.randrange(len(names) + 1))
    }
    # In the order of the rows, as all commands go.
    for name in sorted(changes, key=names.index):
        for column, value in changes[name].items():
            students.update(name, **{column.replace("-", "_"): value})
    changed = save(students)
    set_cells(written, changes)
    assert changed == written.data


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


def test_all_unusable_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    unusable = {
        "root": "system account",
        "daemon": "system account",
        "nobody": "system account",
        "zoe": "on line 2",
        "": "missing",
    } | dict.fromkeys(
        ["Doe", "../x", "7up", "-rf", "a/b", "a:b", "zoë", "$HOME", "a\u200b"]
        + ["a b", "a" * 33, "a" * 40],
        "cannot be a username",
    )
    good = 'name,username\nA,zoe\n"two\nlines",bo\n'
    problems = problems_of(tmp_path, good + "".join(f"B,{name}\n" for name in unusable))
    assert len(problems) == len(unusable)
    for (line, words), problem in zip(enumerate(unusable.values(), 5), problems):
        assert problem.startswith(f"line {line}: ") and words in problem


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("user,name\nzoe,Zoë\n", 1, "found `user`, `name`, no `username`"),
        ("zoe\nbo\n", 1, "no `username`"),
        ("username|name\nzoe|Zoë\n", 1, "commas, semicolons or tabs"),
        ("username,port,port\nzoe,,\n", 1, "more than one column `port`"),
        ("username,name\nzoe,Zoë,1\n", 2, "more cells than the header has columns"),
        ("username,port\nzoe,any\n", 2, "the port 'any' is not a number"),
        ("username,port\nzoe,123456\n", 2, "the port '123456' is not a number"),
        ('username,nb-pass\nzoe,"a\nb"\n', 2, "the nb-pass has a line break"),
        ("username,sys-pass\nzoe,a\x07b\n", 2, "unprintable"),
    ],
)
def test_a_problem_names_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith(f"line {line}: ") and words in problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "needs a header line"),
        (b" \r\n", "needs a header line"),
        (b"PK\x03\x04\0\0username", "is a workbook; save it as CSV"),
        (b'username,name\nbo,"Bo\nzoe,Zo\n', "line 2: a quotation mark is not closed"),
        (b'username,name\nbo,"B"o\n', "line 2: a quotation mark"),
        (b"\xef\xbb\xbfusername,name\nzoe,Zo\xeb\n", "UTF-8"),
        (b"\xff\xfeu\0s\0e", "UTF-16"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(notebooks.UsageError) as refusal:
        read(tmp_path, data)
    assert f"{tmp_path}/students.csv: " in str(refusal.value)
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(notebooks.UsageError, match="list of students cannot be read"):
        notebooks.Roster(tmp_path / name)


# ---------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------


def test_a_list_becomes_private_even_when_nothing_in_it_changes(tmp_path: Path) -> None:
    students = read(tmp_path, PLAIN)
    students.path.chmod(0o664)
    with students.locked():
        students.save()
    assert stat.S_IMODE(students.path.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["students.csv"]


@pytest.mark.root
def test_a_list_keeps_its_owner(tmp_path: Path) -> None:
    students = read(tmp_path, PLAIN)
    os.chown(students.path, 12345, 23456)
    save(students)
    info = students.path.stat()
    assert (info.st_uid, info.st_gid) == (12345, 23456)


def test_a_link_to_a_list_stays_a_link(tmp_path: Path) -> None:
    target = read(tmp_path, PLAIN).path
    link = tmp_path / "link.csv"
    link.symlink_to(target)
    students = notebooks.Roster(link)
    with students.locked():
        students.update("bo", port="8889")
        students.save()
    assert link.is_symlink() and not target.is_symlink()
    assert b"bo,Bo,,8889\n" in target.read_bytes()


def test_a_list_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    first, second = read(tmp_path, PLAIN), notebooks.Roster
    with first.locked():
        for port in ("8889", "8890"):  # each file that is saved holds the lock anew
            with pytest.raises(notebooks.UsageError, match="another notebooks.py"):
                with second(first.path).locked():
                    pass
            first.update("bo", port=port)
            first.save()
    late = second(first.path)
    with late.locked():
        assert late.students[1].port == "8890"


def save_until_interrupted(path: Path) -> str:
    """Save a list until Ctrl-C comes at some moment; return the type of what is raised."""
    seconds = random.uniform(0.01, 0.04)
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -INT {os.getpid()}"]):
        students = notebooks.Roster(path)
        try:
            with students.locked():
                for number in itertools.cycle((8889, 8890)):
                    students.update("bo", port=str(number))
                    students.save()
        except BaseException as error:
            return type(error).__name__
    raise AssertionError


def test_ctrl_c_while_a_list_is_saved_is_that_and_nothing_else(tmp_path: Path) -> None:
    """It used to close the lock a second time, or to delete what had been renamed."""
    path = read(tmp_path, PLAIN).path
    for _ in range(100):
        assert in_child(lambda: save_until_interrupted(path)) == "KeyboardInterrupt"
        assert [each.name for each in tmp_path.iterdir()] == ["students.csv"]
    assert b"bo,Bo,,88" in path.read_bytes()


def test_a_list_is_read_anew_when_it_is_held(tmp_path: Path) -> None:
    students = read(tmp_path, PLAIN)
    students.path.write_text("username\nada\n")
    with students.locked():
        assert [student.username for student in students.students] == ["ada"]
    students.path.write_text("username\nroot\n")
    with pytest.raises(notebooks.UsageError, match="line 2: 'root' is a system"):
        with students.locked():
            pass


@pytest.mark.root
def test_setup_and_remove_leave_a_spreadsheet_as_it_was(course: Course) -> None:
    username = course.students[0]
    text = EXCEL.format(username)
    course.user_list.write_bytes(text.encode("utf-8-sig"))
    course.user_list.chmod(0o640)
    os.chown(course.user_list, 12345, 23456)
    course.check("setup")
    data = course.user_list.read_bytes()
    words = rb"Notiz;nb-pass;sys-pass(\r\n7b;[\s\S]*);[a-zA-Z0-9-]{14};[a-zA-Z0-9-]{14}"
    assert re.sub(words, rb"Notiz\1", data) == text.encode("utf-8-sig")
    course.check("remove", "--yes")
    data = course.user_list.read_bytes()
    assert re.sub(rb"Notiz;nb-pass;sys-pass|;;(?=\r\n\Z)", b"", data) == re.sub(
        rb"Notiz", b"", text.encode("utf-8-sig")
    )
    info = course.user_list.stat()
    assert (info.st_uid, info.st_gid) == (12345, 23456)
    assert stat.S_IMODE(info.st_mode) == 0o600


@contextlib.contextmanager
def full_disk(directory: Path) -> Iterator[Path]:
    """Yield the file that fills a file system mounted on a new directory."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k,mode=0755", "tmpfs"]
    subprocess.run(["mount", "--no-mtab", *options, str(directory)], check=True)
    try:
        yield directory / "filler"
    finally:
        subprocess.run(["umount", "--no-mtab", str(directory)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


@pytest.mark.root
def test_a_full_disk_loses_no_list(course: Course, tmp_path: Path) -> None:
    with full_disk(tmp_path / "disk") as filler:
        original = course.user_list.read_bytes()
        students = filler.with_name("students.csv")
        students.write_bytes(original)
        course.configure(user_list=students)
        fill(filler)
        done = course.run("setup")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("notebooks.py: No space left on device: ")
        assert str(students.parent) in done.stderr
        assert "make room and run the same command again" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert students.read_bytes() == original
        assert {*students.parent.iterdir()} == {students, filler}
        assert not notebooks.find_account(course.students[0])
        filler.unlink()
        course.check("setup")
        full = students.read_bytes()
        assert full != original
        fill(filler)
        done = course.run("remove", "--yes")
        assert done.returncode == 1 and "No space left on device" in done.stderr
        assert students.read_bytes() == full
        filler.unlink()
        course.check("remove", "--yes")
        text = students.read_text()
        assert not any(row["nb-pass"] for row in csv.DictReader(text.splitlines()))


@pytest.mark.root
@pytest.mark.parametrize("command", ["setup", "launch", "remove --yes"])
def test_a_command_does_not_wait_for_a_list_that_is_held(
    course: Course, command: str
) -> None:
    if command != "setup":
        course.check("setup")
    original = course.user_list.read_bytes()
    with course.user_list.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = course.run(*command.split(), timeout=30)
    assert done.returncode == 2
    assert "another notebooks.py works with it" in done.stderr
    assert course.user_list.read_bytes() == original
    assert bool(notebooks.find_account(course.students[0])) == (command != "setup")
