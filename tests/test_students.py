"""The list of students: what a spreadsheet wrote is understood, and stays as it was."""

import contextlib
import csv
import io
import itertools
import os
import pwd
import random
import re
import stat
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from coverage import Coverage

import notebooks
from support import Course, held, in_child

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
    before = students.document
    with students.locked():
        students.path.chmod(0o644)  # a file that is right already would be left alone
        students.document = before
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
    columns = ["größe", *chance.sample(notebooks.COLUMNS[:7][1:], chance.randrange(7))]
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
# What other programs export
# ---------------------------------------------------------------------------------------

ADA = ("ada", "Ada Lovelace")
EXPORTS = {
    "Moodle": (
        "username,firstname,lastname,email,password\nada,Ada,Lovelace,a@b.c,x\n",
        ADA,
    ),
    "Moodle, German": (
        "Vorname;Nachname;ID-Nummer;E-Mail-Adresse\nAda;Lovelace;1;ada@x.org\n",
        ("", "Ada Lovelace"),
    ),
    "Moodle, French": (
        "Prénom,Nom,Adresse de courriel,username\nAda,Lovelace,a@b.c,ada\n",
        ADA,
    ),
    "Moodle, Spanish": ("Nombre,Apellido(s),Username\nAda,Lovelace,ada\n", ADA),
    "Moodle, Russian": (
        "Имя,Фамилия,Адрес электронной почты\nАда,Лавлейс,a@b.c\n",
        ("", "Ада Лавлейс"),
    ),
    "Canvas": (
        "Student,ID,SIS User ID,SIS Login ID,Section\n    Points Possible,,,,\n"
        '"Lovelace, Ada",7,1,ada,A\n',
        ("ada", "Lovelace, Ada"),
    ),
    "Canvas, users": (
        "user_id,login_id,password,first_name,last_name,full_name,sortable_name,email\n"
        "1,ada,,Ada,Lovelace,Ada Lovelace,x,a@b.c\n",
        ADA,
    ),
    "ILIAS": ("Anmeldename;Nachname;Vorname;E-Mail\nada;Lovelace;Ada;a@b.c\n", ADA),
    "Google Classroom": (
        "Last Name,First Name,Email Address,Task 1\nDate,,,2026\nPoints,,,9\n"
        "Lovelace,Ada,ada@x.org,7\n",
        ("", "Ada Lovelace"),
    ),
    "Google Workspace": (
        "First Name [Required],Last Name [Required],Email Address [Required],"
        "Password [Required]\nAda,Lovelace,ada@x.org,****\n",
        ("", "Ada Lovelace"),
    ),
    "Excel, German": (
        'sep=;\r\n"Name";Vorname;User-Name\r\nLovelace;Ada;ada\r\n',
        ADA,
    ),
    "Excel, Catalan": ("Nom;Cognoms;login\nAda;Lovelace;ada\n", ADA),
    "Excel, Polish": ("Imię;Nazwisko;Login\nAda;Lovelace;ada\n", ADA),
    "Excel, Japanese": ("姓,名,ユーザー名\nLovelace,Ada,ada\n", ADA),
    "whole names": ("username;Nom complet\nada;Ada Lovelace\n", ADA),
    "our own beside others": (
        "username,login,name,firstname,surname,lastname\nada,x,Ada,y,Lovelace,z\n",
        ADA,
    ),
    "logins that are e-mail addresses": (
        "SIS Login ID,Email,first name,surname\nada@x.org,other@x.org,Ada,Lovelace\n",
        ("", "Ada Lovelace"),
    ),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_is_understood_and_stays_as_it_was(tmp_path: Path, export: str) -> None:
    text, expected = EXPORTS[export]
    students = read(tmp_path, text)
    (student,) = students.students
    assert (student.username, student.full_name) == expected
    assert student.username or student.wish in ("ada", "a")
    assert save(students) == text.encode()


def test_a_password_is_written_where_another_program_has_the_user_name(
    tmp_path: Path,
) -> None:
    text = "sep=;\r\nLogin;NB Pass;Vorname\r\nada;;Ada\r\n"
    students = read(tmp_path, text)
    students.update("ada", nb_pass="abc")
    assert save(students).decode() == text.replace("ada;;", "ada;abc;")


def test_two_columns_of_one_meaning_are_both_named(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "Anmeldename;Login;name\nada;bo;Ada\n")
    assert problem.endswith("more than one column `username`: `anmeldename`, `login`")


def test_problems_below_excels_own_line_have_the_right_numbers(tmp_path: Path) -> None:
    first, second = problems_of(tmp_path, "sep=;\nusername\nroot\ndaemon\n")
    assert first.startswith("line 3: ") and second.startswith("line 4: ")


# ---------------------------------------------------------------------------------------
# Encodings
# ---------------------------------------------------------------------------------------

NAMES = {
    "cp1252": [
        "Jürgen Weiß, Änne Löwe, Özgür Groß",
        "Jérôme Lefèvre, Zoë Côté, François Bréville",
        "Íñigo Núñez, Begoña Peña, Ángel Ibáñez",
        "João Simões, Conceição Guimarães, Inês Assunção",
        "Åsa Sjöström, Søren Kjær, Frøydis Ødegård",
        "Niccolò Nardò, Noè Cantù, Mario Forlì",
    ],
    "cp1250": [
        "Łukasz Wójcik, Małgorzata Dąbrowska, Grażyna Świątek",
        "Jiří Dvořák, Tomáš Růžička, Kateřina Němcová",
        "László Kőszegi, Erzsébet Fűzesi, György Szabó",
        "Željko Jurić, Ivana Kovačić, Anđela Šarić",
    ],
    "cp1251": [
        "Иван Щукин, Юлия Царёва, Пётр Жуков",
        "Їжакевич Євген, Наталія Ґалаґан, Ігор Бойко",
    ],
    "cp932": [
        "山田 太郎, 鈴木 花子, 高橋 さくら",
        "サトウ ケン, タカハシ サクラ, モリ アンナ",
    ],
    "cp1253": ["Γιώργος Παπαδόπουλος, Ελένη Δημητρίου, Κώστας Ψαρός"],
    "cp1254": ["Ayşe Yılmaz, Çağlar Şahin, İbrahim Doğan"],
    "cp949": ["김 민수, 이 영희, 박 철수"],
    "gb18030": ["王 小明, 李 芳, 张 伟, 陈 静"],
    "cp1256": ["محمد علي, فاطمة حسن, أحمد خالد"],
    "mac_roman": ["Jürgen Weiß, Änne Löwe, Jérôme Lefèvre"],
    "utf-16-le": ["Jürgen Weiß, Иван Щукин, 山田 太郎"],
    "utf-16-be": ["Jürgen Weiß, Иван Щукин, 山田 太郎"],
}


@pytest.mark.parametrize(
    ("encoding", "names"), [(each, x) for each, all in NAMES.items() for x in all]
)
@pytest.mark.parametrize("times", [1, 10])
def test_the_encoding_of_a_short_list_is_guessed_and_kept(
    tmp_path: Path, encoding: str, names: str, times: int
) -> None:
    rows = names.split(", ") * times
    text = "username;name\r\n" + "".join(f"s{i};{x}\r\n" for i, x in enumerate(rows))
    students = read(tmp_path, text.encode(encoding))
    assert [each.name for each in students.students] == rows
    students.update("s1", nb_pass="abc")
    assert save(students).decode(encoding).startswith("username;name;nb-pass\r\n")
    (note,) = students.notes()
    assert f"was read as {encoding}, as in {rows[0]!r}" in note and "UTF-8" in note


def test_no_list_in_utf_8_is_guessed_at(tmp_path: Path) -> None:
    assert read(tmp_path, b"username;name\nada;5 \x80\n").students[0].name == "5 €"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        students = read(tmp_path, "username,name,nb-pass\nada,Łukasz,x\n".encode(encoding))
        assert not [*students.notes()]


def test_a_large_list_is_read_and_a_hostile_cell_is_nothing_else(tmp_path: Path) -> None:
    long = "a" * 5_000_000
    text = f'username;name;own\nada;Jürgen\x1b[2J;{long}\nbo;"é\0;{long}\n'
    with pytest.raises(notebooks.UsageError):
        read(tmp_path, text.encode("cp1252"))
    text = text.replace('"é\0', "é")
    students = read(tmp_path, text.encode("cp1252"))
    assert [x.name for x in students.students] == ["Jürgen\x1b[2J", "é"]
    (note,) = students.notes()
    assert "\x1b" not in note
    many = "username;name\n" + "".join(f"s{i};Jörg {long[:90]}\n" for i in range(100_000))
    assert len(read_anything(tmp_path, many.encode("cp1252")).students) == 100_000


# ---------------------------------------------------------------------------------------
# User names
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "username"),
    [
        ("Ada.Lovelace@uni.edu", "ada.lovelace"),
        ("ada+course@uni.edu", "ada"),
        ("12345@uni.edu", "s12345"),
        ("Jürgen Weiß", "juergen.weiss"),
        ("Søren  Łukasz-Æbelø", "soren.lukasz-aebelo"),
        ("René O’Neil", "rene.oneil"),
        ("René O'Neil", "rene.oneil"),
        ("Пётр Щукин", "petr.shchukin"),
        ("Їжакевич Юлія", "yizhakevich.yuliya"),
        ("İbrahim Yılmaz", "ibrahim.yilmaz"),
        ("Jos\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}", "jose"),
        ("山田太郎", "student"),
        ("-._@x", "student"),
        ("a" * 40, "a" * 32),
        ("$(reboot)\n\0x", "reboot.x"),
    ],
)
def test_a_user_name_is_made_of_plain_letters(text: str, username: str) -> None:
    assert notebooks.make_username(text) == username
    assert notebooks.USERNAME.fullmatch(username)


@pytest.mark.parametrize(
    ("given", "possible"),
    [("Ada.Lovelace@uni.edu", "ada.lovelace"), ("12345", "s12345"), ("Ärzu", "aerzu")],
)
def test_what_cannot_be_a_user_name_is_refused_with_one_that_could(
    tmp_path: Path, given: str, possible: str
) -> None:
    (problem,) = problems_of(tmp_path, f"username\nbo\n{given}\n")
    assert problem.startswith(f"line 3: {given!r} cannot be a username")
    assert problem.endswith(f"; {possible!r} could be")


@pytest.fixture
def stem(course: Course) -> str:
    """What user names in this test may begin with; the test's accounts are deleted."""
    name = course.students[0][:-1]
    course.students = [f"{name}{x}" for x in ("a", "b", "c", "a-2", "a-3", ".y")]
    return name


@pytest.mark.root
def test_setup_makes_the_user_names_that_are_missing_and_says_so(
    course: Course, stem: str
) -> None:
    """Case 18: an export with e-mail addresses only; and one of another person."""
    course.user_list.write_text(
        f"Email Address,Name\n{stem}a@x.org,Zoë\n{stem.upper()}A@y.org,Bo\n"
        f",{stem} Ÿ\n{stem}b@x.org,\n"
    )
    subprocess.run(["useradd", f"{stem}b"], check=True)  # somebody else
    course.students.append(f"{stem}b-2")
    said = course.check("setup")
    names = [f"{stem}a", f"{stem}a-2", f"{stem}.y", f"{stem}b-2"]
    assert [*course.rows()] == names
    assert [line for line in said.splitlines() if line.startswith("line ")] == [
        f"line 2: made the user name {stem}a for Zoë",
        f"line 3: made the user name {stem}a-2 for Bo",
        f"line 4: made the user name {stem}.y for {stem} Ÿ",
        f"line 5: made the user name {stem}b-2 for {stem}b@x.org",
    ]
    assert "4 accounts made, 0 adopted" in said
    assert f"{stem}b" not in notebooks.group_members(course.group)
    before = course.user_list.read_bytes()
    assert "4 kept" in course.check("setup")
    assert course.user_list.read_bytes() == before


@pytest.mark.root
def test_a_list_that_is_exported_anew_finds_its_accounts_again(
    course: Course, stem: str
) -> None:
    text = f"email,name\n{stem}a@x.org,Ada\n{stem}b@x.org,Bo\n"
    course.user_list.write_text(text)
    course.check("setup")
    course.user_list.write_text(f"{text}{stem}c@x.org,Cy\n")
    assert "1 account made, 0 adopted, 2 kept" in course.check("setup")
    # Nobody of another name gets the account.
    course.user_list.write_text(text.replace("Ada", "Eve"))
    course.check("setup")
    assert [*course.rows()] == [f"{stem}a-2", f"{stem}b"]


@pytest.mark.root
def test_rows_without_user_names_keep_no_command_from_the_others(
    course: Course, stem: str
) -> None:
    rows = [{"username": f"{stem}a", "name": "Ada"}, {"username": "", "name": "Bo"}]
    course.write_students(rows)
    course.check("setup", "--only", f"{stem}a")
    assert [*course.rows()] == [f"{stem}a", ""]
    done = course.run("send")
    assert done.returncode == 1
    assert "line 3: has no account; run setup first" in done.stderr
    assert (course.home(f"{stem}a") / "course").is_dir() and "1 student: " in done.stdout
    course.check("send", "--only", f"{stem}a")
    done = course.run("shutdown")
    assert done.returncode == 0 and "line 3 has no username yet" in done.stderr
    lock = course.directory / ".~lock.students.csv#"
    lock.write_text(",eve,laptop,25.11.2026 18:00,file:///x;")
    launch = course.launch().wait_ready()
    assert "line 3: has no account; run setup first" in launch.output
    assert "open in a spreadsheet (eve on laptop)" in launch.output
    assert launch.stop() == 0


@pytest.mark.root
def test_names_and_passwords_survive_a_stale_save_during_setup(course: Course) -> None:
    course.user_list.write_text("name\nAda\nAda\n")
    stale = course.user_list.read_bytes()
    students = notebooks.Roster(course.user_list)
    with students.locked():
        for row, username in zip(students.document.rows, ("ada", "ada-2"), strict=True):
            students.name_row(row, username)
        students.save()
        course.user_list.write_bytes(stale)
        students.update("ada-2", nb_pass="secret")
        students.save()
    assert [*course.rows()] == ["ada", "ada-2"]
    assert course.rows()["ada-2"]["nb-pass"] == "secret"


@pytest.mark.root
def test_what_setup_has_assumed_is_told(course: Course, stem: str) -> None:
    """Cases 14, 17 and 22: a spreadsheet's encoding, and passwords that are not used."""
    text = f"sep=;\nИмя;Фамилия;Login;Пароль\nЮлия;Щукина;{stem}a;x\n"
    course.user_list.write_bytes(text.encode("cp1251"))
    done = course.run("setup")
    assert done.returncode == 0
    assert "was read as cp1251, as in 'Юлия Щукина'" in done.stderr
    assert "the column `пароль` is not used" in done.stderr and "`nb-pass`" in done.stderr
    assert pwd.getpwnam(f"{stem}a").pw_gecos.startswith("Юлия Щукина,")
    now = course.user_list.read_bytes().decode("cp1251").splitlines()
    assert now[0] == "sep=;" and now[2].startswith(f"Юлия;Щукина;{stem}a;x;")
    assert "`пароль`" not in course.run("setup").stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "content", "who"),
    [
        (
            ".~lock.students.csv#",
            ",eve,laptop,25.11.2026 18:00,file:///x;",
            "eve on laptop",
        ),
        (".~lock.students.csv#", "", ""),
        ("~$students.csv", "\x03Eve  ", ""),
    ],
)
def test_a_list_that_a_spreadsheet_has_open_is_told(
    course: Course, name: str, content: str, who: str
) -> None:
    lock = course.directory / name
    lock.write_text(content)
    for command in (["setup"], ["remove", "--yes"]):
        done = course.run(*command)
        assert done.returncode == 0
        assert f"is open in a spreadsheet ({who}" in done.stderr
        assert f"delete {lock}" in done.stderr
    lock.unlink()
    assert "spreadsheet" not in course.run("setup").stderr


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


def test_all_unusable_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    unusable = {
        "root": "system account",
        "daemon": "system account",
        "nobody": "system account",
        "zoe": "on line 2",
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
        ("who,what\nzoe,Zoë\n", 1, "found `who`, `what`, no `username`"),
        ("username,note\nzoe,\n,x\n", 3, "the username is missing"),
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
        (b"sep=;\n", "needs a header line"),
        (b"\xd0\xcf\x11\xe0\0\0\0\0", "is a workbook"),
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
    """Save a list until Ctrl-C comes at some moment; return the type of what is raised.

    Not measured: interrupted within coverage, it would wait for coverage's lock for ever.
    """
    measurement = Coverage.current()
    if measurement:
        measurement.stop()
    seconds = random.uniform(0.01, 0.04)
    students = notebooks.Roster(path)
    try:
        with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -INT {os.getpid()}"]):
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
    with held(course):
        done = course.run(*command.split(), timeout=30)
    assert done.returncode == 2
    assert "another notebooks.py works with it" in done.stderr
    assert course.user_list.read_bytes() == original
    assert bool(notebooks.find_account(course.students[0])) == (command != "setup")


@pytest.mark.parametrize(
    "text",
    [
        '"Nachname, Vorname";E-Mail\n"Lovelace, Ada";ada@x.de\n',
        "Name, Vorname;E-Mail\nLovelace, Ada;ada@x.de\n",
        "Name (Familie, Vorname, Titel);Benutzername;E-Mail\nx;ada;ada@x.de\n",
    ],
)
def test_a_separator_within_a_title_separates_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "students.csv"
    path.write_text(text)
    roster = notebooks.Roster(path)
    assert not [*roster.problems()]
    (student,) = roster.students
    assert student.email == "ada@x.de"
    assert "ada" in (student.username, student.wish)


def test_no_user_name_is_made_by_which_hosts_give_rights(course: Course) -> None:
    course.write_students([{"email": "wheel@example.org", "name": "Wheel"}])
    assert "made the user name wheel-2 for Wheel" in course.check("setup")
    course.check("remove", "--yes")
