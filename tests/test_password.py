"""A student's own notebook password: asked for on the page, written into the list."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import socket
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from notebooks import CHANGED, NewPassword, Ready, Site, Webserver
from support import Course, LogInRefused, Notebook, fetch, held, is_ours, wait_until

pytestmark = pytest.mark.root

NEW = 'a "good", new; password'


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


def ask(course: Course, username: str, old: str, new: str, again: str = "") -> str:
    """Fill in the form, and return the page that comes."""
    form = {"username": username, "old": old, "new": new, "again": again or new}
    response = fetch(
        f"{course.url}-password",
        "POST",
        urllib.parse.urlencode(form),
        {"Content-Type": "application/x-www-form-urlencoded"},
        course.context(),
    )
    assert response.status == http.client.OK
    return response.text


def test_a_student_changes_their_own_password(course: Course) -> None:
    username, other = course.students
    old = course.rows()[username]["nb-pass"]
    notebook, others = course.notebook(username), course.server(other)
    notebook.execute("1")
    before = course.server(username)
    page = fetch(f"{course.notebook_url(username)}login", context=course.context()).text
    assert f":{course.port}/-password?username={username}" in page
    form = fetch(f"{course.url}-password?username=%22%3Ea", context=course.context()).text
    assert 'value="&#34;&gt;a"' in form
    answer = ask(course, username, old, NEW)
    assert CHANGED in answer and "<form" not in answer and 'href="/"' in answer
    assert course.rows()[username]["nb-pass"] == NEW
    assert not is_ours(before)
    assert not [x for x in course.processes() if x.username() == username]
    with pytest.raises(LogInRefused):
        Notebook(course.notebook_url(username), course.context()).log_in(old)
    assert notebook.fetch("api/contents").status == http.client.FORBIDDEN
    assert course.notebook(username).execute("6 * 7") == "42"
    assert course.server(other) == others
    course.check("setup")
    assert course.rows()[username]["nb-pass"] == NEW


@pytest.mark.parametrize(
    ("new", "again", "reason"),
    [
        ("another one", "another 0ne", "typed twice in the same way"),
        ("too short", "", "10 to 100 letters"),
        ("long" * 30, "", "10 to 100 letters"),
        ("=HYPERLINK(1)", "", "not begin with ="),
        ("ünïcödé wörds", "", "English keyboard"),
        ("line\nbreaks in it", "", "English keyboard"),
        ("{username}{username}", "", "Your user name"),
        ("{old}", "", "your password already"),
    ],
)
def test_a_bad_new_password_is_refused(
    course: Course, new: str, again: str, reason: str
) -> None:
    username = course.students[1]
    old = course.rows()[username]["nb-pass"]
    before, server = course.user_list.read_bytes(), course.server(username)
    page = ask(course, username, old, new.format(username=username, old=old), again)
    assert reason in page
    assert f'value="{username}"' in page  # nobody has to type it again
    assert page.count(old) == 0
    assert course.user_list.read_bytes() == before
    assert course.server(username) == server


def test_who_does_not_know_the_old_password_changes_nothing(course: Course) -> None:
    username, other = course.students
    before = course.user_list.read_bytes()
    theirs = course.rows()[other]["nb-pass"]
    for name, old in ((username, theirs), (username, ""), ("nobody", ""), ("", "\udcff")):
        page = ask(course, name, old.encode("utf-8", "replace").decode(), "a new password")
        assert "The user name or the old password is wrong." in page
    assert course.user_list.read_bytes() == before


def test_while_the_list_is_in_use_a_student_has_to_wait(course: Course) -> None:
    username = course.students[1]
    old = course.rows()[username]["nb-pass"]
    with held(course):
        page = ask(course, username, old, "a new password")
        assert "try again in a minute" in page
        assert str(course.directory) not in page
    assert course.rows()[username]["nb-pass"] == old
    assert CHANGED in ask(course, username, old, "a new password")
    wait_until(lambda: not course.servers(username), 20, "the end of the old server")


def test_another_course_of_a_student_goes_on(course: Course, tmp_path: Path) -> None:
    username = course.students[0]
    with Course(tmp_path, 1) as other:
        other.write_students([{"username": username, "name": "N", "surname": "S"}])
        other.check("setup")
        other.launch().wait_ready()
        course.notebook(username)
        notebook = other.notebook(username)
        notebook.execute("x = 42")
        before, theirs = course.server(username), other.server(username)
        old = course.rows()[username]["nb-pass"]
        assert CHANGED in ask(course, username, old, "another password")
        assert not is_ours(before)
        assert other.server(username) == theirs
        assert notebook.execute("x") == "42"


def test_who_tries_passwords_does_not_lock_the_list(course: Course) -> None:
    username = course.students[1]
    with held(course):
        page = ask(course, username, "a wrong password", "a new password")
    assert "The user name or the old password is wrong." in page


def test_who_is_no_student_is_not_in_the_log(course: Course) -> None:
    with held(course):
        page = ask(course, "eve\x1b]0;title\a", "", "a new password")
    assert "The user name or the old password is wrong." in page
    assert "eve" not in course.launches[0].output


def test_the_form_answers_after_a_flood_and_a_slow_end(course: Course) -> None:
    username, other = course.students
    notebook = course.notebook(username)
    notebook.execute("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    notebook.execute("import subprocess; sleep = subprocess.Popen(['sleep', '99'])")
    old = course.rows()[username]["nb-pass"]

    pages = []
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        change = pool.submit(ask, course, username, old, "a slow password")
        wait_until(lambda: course.rows()[username]["nb-pass"] != old, 10, "the change")
        tries = [pool.submit(ask, course, other, "", "a new password") for _ in range(45)]
        time.sleep(1)
        course.launches[0].helper("webserver").kill()
        for each in (change, *tries):
            with contextlib.suppress(OSError, http.client.HTTPException):
                pages.append(each.result())
    assert [page for page in pages if "Too many" in page]

    # The launcher is still about the first.
    course.launches[0].helper("webserver")
    wait_until(lambda: answers(course, other), 30, "an answer of another webserver")


def answers(course: Course, username: str) -> bool:
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        return "is wrong" in ask(course, username, "", "a new password")
    return False


def test_a_webserver_that_was_taken_over_gets_one_try_at_a_time(tmp_path: Path) -> None:
    tries = []

    async def change(wish: NewPassword) -> None:
        tries.append(wish.old)
        await asyncio.sleep(60)

    def site() -> Site:
        raise AssertionError("nobody starts it")

    async def talk() -> None:
        with socket.socket() as listener:
            webserver = Webserver(
                course=tmp_path, listener=listener, site=site, change=change
            )
            texts: Any = (1, {}, [], None, "first", "second")
            for text in texts:
                webserver.handle(NewPassword("ada", text, "new"))
            webserver.handle(Ready())
            await asyncio.sleep(0)

    asyncio.run(talk())
    assert tries == ["first"]
