"""Sessions and their cookies, of which others on the same host would like to have some."""

import contextlib
import http.client
import http.server
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

import notebooks
from conftest import CourseMaker
from support import (
    Course,
    Notebook,
    Response,
    chromium,
    fetch,
    host_called,
    log_in,
    make_certificate,
    use,
    wait_until,
)

pytestmark = pytest.mark.root

FORM = "application/x-www-form-urlencoded"
HOST = "lab.example.org"


class Page(http.server.BaseHTTPRequestHandler):
    """What a student shows on a port of this host, and the cookies that it was sent."""

    body = b""
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Cookie", ""))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        """Keep the terminal clean."""


@contextlib.contextmanager
def page(text: str, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[str]]]:
    """Show a page on a port of this host; yield its address, and the cookies it is sent."""
    seen: list[str] = []
    handler = type("Handler", (Page,), {"body": text.encode(), "seen": seen})
    with http.server.ThreadingHTTPServer(("", 0), handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        scheme = "https" if tls else "http"
        yield f"{scheme}://{HOST}:{server.server_port}/", seen
        server.shutdown()
        thread.join()


@pytest.fixture
def launched(make_course: CourseMaker) -> Iterator[Course]:
    """A course of two students, on a host with a name, whose servers start at a visit."""
    with host_called(HOST):
        course = make_course(2, on_demand="yes", server_address=HOST)
        course.check("setup")
        course.launch().wait_ready()
        yield course


def is_logged_in(notebook: Notebook) -> bool:
    return notebook.fetch("api/contents").status == http.client.OK


def put(notebook: Notebook, token: str, site: str = "") -> Response:
    """Write a file with the cookie of a session, and any token, twice."""
    session = [x for x in notebook.cookies.values() if x.key.startswith("__Secure-")]
    cookie = "; ".join([*(f"{x.key}={x.coded_value}" for x in session), f"_xsrf={token}"])
    headers = {"Cookie": cookie, "X-XSRFToken": token, "Content-Type": "application/json"}
    headers |= {"Sec-Fetch-Site": site} if site else {}
    url = urllib.parse.urljoin(notebook.url, "api/contents/made.txt")
    body = '{"type": "file", "format": "text", "content": ""}'
    return fetch(url, "PUT", body, headers, notebook.context)


def test_a_token_counts_in_its_own_session_alone(launched: Course) -> None:
    """A page on another port may set a cookie with the token that it sends itself."""
    username, other = launched.students
    mine, again, theirs = map(launched.notebook, (username, username, other))
    token = mine.cookies["_xsrf"].value  # at once, from the log-in itself
    assert token != again.cookies["_xsrf"].value
    old = "2|3d5f9b3c|e5a1c3d1d2b3a4958677665544332211|1700000000"  # as Tornado makes them
    for wrong in (
        old,
        "ab" * 16,
        again.cookies["_xsrf"].value,
        theirs.cookies["_xsrf"].value,
    ):
        answer = put(mine, wrong)
        assert answer.status == http.client.FORBIDDEN
        assert f"_xsrf={token};" in answer.headers["Set-Cookie"]  # what the tab sends next
    assert put(mine, token).status == http.client.CREATED


def test_a_tab_finds_its_way_with_the_token_of_another_course(launched: Course) -> None:
    """A student's notebooks of two courses share the cookie, each with its own token."""
    notebook = launched.notebook(launched.students[0])
    for site in ("same-site", "cross-site", "none"):
        assert put(notebook, "ab" * 32, site).status == http.client.FORBIDDEN
    assert put(notebook, "ab" * 32, "same-origin").status == http.client.CREATED
    headers = {"Cookie": notebook.cookie_header(), "Sec-Fetch-Site": "same-origin"}
    form = fetch(f"{notebook.url}logout", "POST", "", headers, notebook.context)
    assert form.status == http.client.FORBIDDEN  # forms can be in others' notebooks


def test_a_picture_in_a_notebook_logs_nobody_out(launched: Course) -> None:
    notebook = launched.notebook(launched.students[0])
    headers = {"Cookie": notebook.cookie_header(), "Sec-Fetch-Site": "same-origin"}
    headers["Sec-Fetch-Dest"] = "image"
    answer = fetch(f"{notebook.url}logout", headers=headers, context=notebook.context)
    assert "Set-Cookie" not in answer.headers and is_logged_in(notebook)


def test_a_link_of_another_page_logs_nobody_out(launched: Course) -> None:
    notebook = launched.notebook(launched.students[0])
    for site in ("", "cross-site", "same-site", "none"):
        headers = {"Cookie": notebook.cookie_header(), "Sec-Fetch-Site": site}
        answer = fetch(f"{notebook.url}logout", headers=headers, context=notebook.context)
        assert "Log out" in answer.text
        assert "Set-Cookie" not in answer.headers and is_logged_in(notebook)
    assert fetch(f"{notebook.url}logout", "POST", "", headers).status >= 400  # no token
    assert is_logged_in(notebook)
    answer = notebook.fetch("logout", "POST", "", FORM)
    assert "You have logged out of the notebook of" in answer.text
    assert not is_logged_in(notebook)


def choose(browser: WebDriver, *words: str) -> None:
    """Choose from a menu of the notebook."""
    for selector, word in zip((".lm-MenuBar-item", ".lm-Menu-item"), words, strict=True):
        use(browser, selector, word, WebElement.click)


def test_who_visits_a_students_page_on_another_port_stays_logged_in(
    launched: Course,
) -> None:
    """Of plain http: it can neither read nor set a cookie of the notebook."""
    username = launched.students[0]
    url = f"https://{HOST}:{launched.rows()[username]['port']}/{username}/"
    name = f"__Secure-notebooks-{launched.rows()[username]['port']}"
    bait = f"<title>bait</title><img src='{url}logout'>"
    with chromium() as browser, page(bait) as (address, seen):
        browser.get(url)
        log_in(browser, launched, username)
        use(browser, ".jp-DirListing")
        cookies = {each["name"]: each for each in browser.get_cookies()}
        assert all(cookies[each]["secure"] for each in ("_xsrf", name))
        assert cookies[name]["httpOnly"] and not cookies["_xsrf"]["httpOnly"]

        browser.get(f"{address}{username}/")
        assert browser.title == "bait"
        assert browser.execute_script("return document.cookie") == ""
        for key in ("_xsrf", name):
            write = f"document.cookie = '{key}=planted; path=/{username}/; max-age=999'"
            browser.execute_script(write)
        assert name not in browser.execute_script("return document.cookie")
        assert not any("_xsrf" in each or name in each for each in seen)

        browser.get(url)
        use(browser, ".jp-DirListing")
        now = {each["name"]: each["value"] for each in browser.get_cookies()}
        assert now[name] == cookies[name]["value"]
        choose(browser, "File", "Log Out")
        use(browser, "h2", "You have logged out of the notebook of")
        browser.get(url)
        use(browser, "input[type=password]")


def test_with_a_configured_certificate_browsers_let_no_warning_be_clicked_away(
    make_course: CourseMaker, tmp_path: Path
) -> None:
    cert_file, key_file = make_certificate(tmp_path)
    course = make_course(1, on_demand="yes", cert_file=cert_file, key_file=key_file)
    course.check("setup")
    course.launch().wait_ready()
    (username,) = course.students
    context = ssl.create_default_context(cafile=cert_file)
    addresses = (course.url, f"{course.notebook_url(username)}login")
    for address in addresses:
        answer = fetch(address, context=context)
        assert answer.headers["Strict-Transport-Security"] == "max-age=604800"


def test_a_certificate_that_no_device_knows_promises_nothing(launched: Course) -> None:
    notebook = launched.notebook(launched.students[0])
    for address in (launched.url, f"{notebook.url}tree"):
        answer = fetch(address, context=launched.context())
        assert "Strict-Transport-Security" not in answer.headers


def connect(port: int, count: int, source: str) -> list[socket.socket]:
    """Open connections that say nothing."""
    made = []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", port), 10, (source, 0)))
    return made


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("whose", ["page", "notebook"])
def test_silent_strangers_leave_room_and_memory(launched: Course, whose: str) -> None:
    """Of the address that opens most connections the oldest end, and of no other."""
    username = launched.students[0]
    notebook = launched.notebook(username)
    notebook.execute("x = 6")
    port, most = launched.port, notebooks.MAX_VISITORS
    process = launched.launches[-1].helper("webserver")
    if whose == "notebook":
        port, most = int(launched.rows()[username]["port"]), notebooks.MAX_STRANGERS
        process = launched.server(username)
    before = process.memory_info().rss
    (early,) = connect(port, 1, "127.0.0.1")
    crowd = connect(port, most + 100, "127.0.0.2")
    try:
        wait_until(lambda: not is_open(crowd[0]), 20, "the end of the first")
        assert is_open(early) and is_open(crowd[-1])
        assert process.num_fds() < most + 60
        assert process.memory_info().rss - before < most * 70_000
        assert fetch(launched.url, context=launched.context()).status == http.client.OK
        assert is_logged_in(launched.notebook(username))
        assert notebook.execute("x * 7") == "42"  # through the channel that was open
    finally:
        for connection in (early, *crowd):
            connection.close()


def test_strangers_who_reset_connections_leave_no_traceback(launched: Course) -> None:
    username = launched.students[0]
    launched.notebook(username)
    ports = launched.port, int(launched.rows()[username]["port"])
    for port in ports * 200:
        (connection,) = connect(port, 1, "127.0.0.1")
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
    assert is_logged_in(launched.notebook(username))
    log = launched.home(username) / notebooks.SERVER_LOG
    assert "Traceback" not in log.read_text()
    assert "Traceback" not in launched.launches[-1].log.read_text()
