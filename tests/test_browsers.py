"""The whole way of a student, from the warning to the log-out, in three browsers."""

import contextlib
import http.server
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webelement import WebElement

import notebooks
from support import (
    BROWSERS,
    Browser,
    Course,
    Firefox,
    computes,
    fetch,
    log_in,
    save,
    saved_outputs,
    use,
    wait_until,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A course with a student for each browser; servers start at a visit."""
    directory = tmp_path_factory.mktemp("browsers")
    settings = {"web_title": "Physics", "on_demand": "yes"}
    with Course(directory, len(BROWSERS), **settings) as course:
        for command in ("setup", "send"):
            course.check(command)
        course.launch().wait_ready()
        yield course


def test_a_student_comes_from_the_warning_to_a_saved_result_and_leaves(
    course: Course, any_browser: Browser
) -> None:
    number = BROWSERS.index(type(any_browser))
    username = course.students[number]
    any_browser.visit(course.url)
    assert any_browser.warns()
    any_browser.go_on()
    browser = any_browser.driver
    use(browser, "h1", "Physics")
    use(browser, "li a", f"Name{number + 1} Surname{number + 1}", WebElement.click)
    if isinstance(any_browser, Firefox):  # the notebook has a port of its own
        wait_until(any_browser.warns, 30, "the warning")
        any_browser.go_on()
    log_in(browser, course, username)

    use(browser, ".jp-DirListing-item", "welcome.ipynb")
    browser.get(course.notebook_url(username) + "notebooks/course/material/welcome.ipynb")
    use(browser, ".jp-Notebook-ExecutionIndicator[data-status=idle]")
    wait_until(lambda: computes(browser, "sum(range(1, 101))", "5050"), 60, "5050")
    save(browser)
    notebook = course.home(username) / "course/material/welcome.ipynb"
    saved = wait_until(lambda: saved_outputs(notebook), 30, "the saved notebook")
    assert saved == ["5050"]

    browser.get(course.notebook_url(username) + "logout")
    use(browser, "button", "Log out", WebElement.click)
    use(browser, "h2", "You have logged out of the notebook of")
    browser.get(course.notebook_url(username))
    use(browser, "input[type=password]")


def test_nobody_who_trusts_the_authority_of_the_course_is_warned(
    course: Course, any_browser: Browser, tmp_path: Path
) -> None:
    authority = fetch(f"{course.url}certificate", context=course.context()).body
    path = tmp_path / "authority.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(authority))
    any_browser.trust(path)
    any_browser.visit(course.url)
    assert not any_browser.warns()
    browser = any_browser.driver
    use(browser, "li a", "Name1 Surname1", WebElement.click)
    use(browser, "input[type=password]")
    assert not browser.find_element("id", "trouble").is_displayed()


@pytest.fixture
def forged(course: Course, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Addresses of hosts that have certificates of what a course leaves behind.

    One is signed with the key of the notebooks' certificate, which is no authority's. The
    other is of an authority like ours, but for a host that it does not cover.
    """
    ours = course.directory / "notebooks.pem"
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-nodes",
        "-days",
        "9",
        "-keyout",
        "-",
    ]
    new += ["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=forged", "-CA", str(ours)]
    new += ["-CAkey", str(ours), "-addext", "subjectAltName=DNS:localhost"]
    new += ["-addext", "extendedKeyUsage=serverAuth"]
    elsewhere = ["sh", "-c", notebooks.MAKE_CERTIFICATE, "sh", "9", "/CN=elsewhere"]
    elsewhere += ["permitted;DNS:example.org", "subjectAltName=DNS:localhost"]
    commands = {"key": new, "name": elsewhere}
    with contextlib.ExitStack() as stack:
        addresses = {}
        for kind, command in commands.items():
            path = tmp_path / f"{kind}.pem"
            made = subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout
            path.write_text(made + (ours.read_text() if kind == "key" else ""))
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(path)
            server = http.server.HTTPServer(("", 0), http.server.SimpleHTTPRequestHandler)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            addresses[kind] = f"https://localhost:{server.server_port}/"
        yield addresses


def test_no_browser_takes_what_was_forged_with_what_is_left_behind(
    course: Course, forged: dict[str, str], any_browser: Browser, tmp_path: Path
) -> None:
    blocks = re.findall(
        "(?s)-----BEGIN CERT.*?END CERT.*?-----",
        "".join(
            path.read_text()
            for path in (course.directory / "notebooks.pem", tmp_path / "name.pem")
        ),
    )
    authorities = [tmp_path / "ours.pem", tmp_path / "elsewhere.pem"]
    for path, block in zip(authorities, blocks[1::2], strict=True):
        path.write_text(block)
    any_browser.trust(*authorities)
    for kind, address in forged.items():
        any_browser.visit(address)
        assert any_browser.warns(), (kind, any_browser.driver.title)
    any_browser.visit(course.url)
    assert not any_browser.warns()
