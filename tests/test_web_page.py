"""The web page: what it shows, where it leads, and what it lets nobody do."""

import base64
import contextlib
import hashlib
import html.parser
import http.client
import pwd
import re
import socket
import ssl
import struct
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
import psutil
import pytest

import notebooks
from conftest import CourseMaker
from support import Course, Response, fetch, tls_context, wait_until

HOSTILE = '<script>alert("1")</script> & Zoë'
TITLE = "<i>R&D</i> {style} 100%"
TAGS = "html head meta title style body main h1 p form label input button ul li a bdi code"
TAGS += " div script span"
WHO = "__Secure-notebooks-student"  # the page's cookie
# The students' names. In paths {bo} and {zoe} stand for their user names.
NAMES = {"bo": "", "zoe": HOSTILE}


class Page(html.parser.HTMLParser):
    """The elements of a page: tag, attributes, and the text up to the next tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = tag, attributes, (text + data).rstrip()

    def texts(self, tag: str) -> list[str]:
        return [text for name, _, text in self.elements if name == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def check_page(text: str, policy: str) -> Page:
    """Check what holds for each page, whatever is in the list, and return it."""
    page = Page(text)
    assert page.texts("title") == page.texts("h1") == [TITLE]
    assert {tag for tag, _, _ in page.elements} <= {*TAGS.split()}
    for _, attributes, _ in page.elements:
        assert not [name for name in attributes if name.startswith(("on", "style"))]
        assert not {*attributes} & {"src", "srcset", "http-equiv"}
        assert re.match("/[^/]|/$", attributes.get("href") or "/")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.attributes("meta")
    )
    (style,) = re.findall("<style>(.*)</style>", text, re.DOTALL)
    (script,) = re.findall("<script>(.*)</script>", text, re.DOTALL)
    assert "@import" not in style and "url(" not in style
    style_digest, script_digest = (
        base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()
        for each in (style, script)
    )
    assert dict(part.split(maxsplit=1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "style-src": f"'sha256-{style_digest}'",
        "script-src": f"'sha256-{script_digest}'",
        "connect-src": "'self' wss:",
        "form-action": "https:",  # where the form's redirect leads is another origin
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    (form,), (field,) = page.attributes("form"), page.attributes("input")
    assert (form["action"], form["method"], field["name"]) == ("/", "get", "username")
    return page


def landing_page(students: Sequence[tuple[str, str, int]], *messages: str) -> Page:
    environment = jinja2.Environment(autoescape=True)
    notebooks.add_pages(environment, notebooks.Language())
    text = environment.get_template("landing.html").render(
        title=TITLE,
        students=students,
        messages=messages,
        action="/",
        link="/",
        query=None,
    )
    return check_page(text, notebooks.content_security_policy())


def test_names_titles_and_problems_are_shown_and_do_nothing() -> None:
    students = [(username, name, 8889) for username, name in NAMES.items()]
    page = landing_page(students, f"There is no {HOSTILE}")
    assert page.texts("p") == [f"There is no {HOSTILE}", ""]
    assert [each["href"] for each in page.attributes("a")] == ["/bo", "/zoe"]
    assert page.texts("bdi") == ["bo", HOSTILE]
    assert page.texts("code") == ["zoe"]


def test_a_page_without_a_list_has_the_form_alone() -> None:
    page = landing_page([])
    assert not page.attributes("ul") and not page.attributes("p")


# ---------------------------------------------------------------------------------------
# The webserver of `launch`
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A course that is launched; its servers start at a visit."""
    directory = tmp_path_factory.mktemp("visited")
    with Course(directory, web_title=TITLE, on_demand="yes") as course:
        rows = zip(course.students, NAMES.values())
        course.write_students(
            {"username": username, "name": name} for username, name in rows
        )
        course.check("setup")
        course.launch().wait_ready()
        yield course


def visit(
    course: Course,
    path: str = "/",
    host: str = "localhost",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Ask the web page over TLS, with {zoe} and {bo} in the path as the students."""
    url = f"https://{host}:{course.port}{path.format_map(names(course))}"
    return fetch(url, headers=headers, context=course.context())


def student_links(page: Page) -> list[str]:
    """Return where the page leads, but for the page of its certificate."""
    links = [str(each["href"]) for each in page.attributes("a")]
    assert links.pop() == "/-certificate"
    return links


def names(course: Course) -> dict[str, str]:
    return dict(zip(NAMES, course.students))


def send_raw(course: Course, data: bytes, secure: bool = True) -> Response:
    """Return the answer to a request as it stands."""
    with contextlib.ExitStack() as stack:
        connection = socket.create_connection(("localhost", course.port), timeout=30)
        stack.enter_context(connection)
        if secure:
            context = tls_context()
            connection = stack.enter_context(context.wrap_socket(connection))
        connection.sendall(data)
        answer = stack.enter_context(http.client.HTTPResponse(connection))
        answer.begin()
        return Response(answer.status, answer.headers, answer.read())


@pytest.mark.root
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_the_page_lists_the_students_over_tls(visited: Course, host: str) -> None:
    response = visit(visited, host=host)
    assert response.status == 200
    page = check_page(response.text, response.headers["Content-Security-Policy"])
    bo, zoe = visited.students
    assert student_links(page) == [f"/{zoe}", f"/{bo}"]
    assert page.texts("bdi") == [HOSTILE, bo]  # in the order of what is shown
    assert response.headers["Content-Type"] == "text/html; charset=UTF-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "Set-Cookie" not in response.headers
    for row in visited.rows().values():
        assert row["nb-pass"] not in response.text


@pytest.mark.root
@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/{zoe}", "/{zoe}/"),
        ("/{zoe}/", "/{zoe}/"),
        ("/{bo}?x=1", "/{bo}/?x=1"),
        ("/{zoe}/notebooks/week%201/a.ipynb?x=%26&y", None),
        ("/{zoe}/tree/%C3%9Cbung%0D%0AX:%20y", "/{zoe}/tree/%C3%9Cbung%0D%0AX%3A%20y"),
        ("/{zoe}/a%3Fb%23c%25", None),
        ("/{zoe}//evil.example/?next=https://evil.example/", None),
        ("/?username={zoe}", "/{zoe}/"),
        ("/?username=+{zoe}%20&x=1", "/{zoe}/"),
    ],
)
def test_the_page_leads_to_the_notebook(
    visited: Course, path: str, target: str | None
) -> None:
    response = visit(visited, path)
    username = names(visited)["bo" if "{bo}" in path else "zoe"]
    address = f"https://localhost:{visited.rows()[username]['port']}"
    assert response.status in (302, 303, 307)
    assert response.headers["Location"] == address + (target or path).format_map(
        names(visited)
    )
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.root
def test_an_address_for_everybody_leads_each_to_their_own(visited: Course) -> None:
    """It asks who they are, and asks no more in that browser."""
    target, query = "/notebooks/course/w%201.ipynb", "?x=%26&y"
    bo, zoe = visited.students
    response = visit(visited, f"/user-redirect{target}{query}")
    assert (response.status, "Set-Cookie" in response.headers) == (200, False)
    page = Page(response.text)
    (form,), (hidden, field) = page.attributes("form"), page.attributes("input")
    fields = {
        str(hidden["name"]): str(hidden["value"]),
        str(field["name"]): f" {zoe.upper()}",
    }
    assert f"/user-redirect{target}" == form["action"]

    own = {
        username: f"{visited.notebook_url(username).removesuffix('/')}{target}{query}"
        for username in visited.students
    }
    answer = visit(visited, f"{form['action']}?{urllib.parse.urlencode(fields)}")
    assert answer.headers["Location"] == own[zoe]
    cookie = answer.headers["Set-Cookie"]
    for part in ("HttpOnly", "Secure", "SameSite=Lax", "Path=/user-redirect;"):
        assert part in f"{cookie};"
    links = [visit(visited, x).headers["Location"] for x in student_links(page)]
    assert links == [own[zoe], own[bo]]

    headers = {"Cookie": cookie.partition(";")[0]}
    again = visit(visited, f"/user-redirect{target}{query}", headers=headers)
    assert again.headers["Location"] == own[zoe]
    # Who picks somebody else on the page is that from then on.
    assert f"={bo};" in visit(visited, "/{bo}", headers=headers).headers["Set-Cookie"]


@pytest.mark.root
@pytest.mark.parametrize("name", ["nobody", "{zoe}/../{bo}", "//evil.example", "", "<b>"])
def test_an_address_for_everybody_leads_nowhere_else(visited: Course, name: str) -> None:
    name = name.format_map(names(visited))
    response = visit(visited, "/user-redirect/tree", headers={"Cookie": f"{WHO}={name}"})
    assert response.status == 200 and "Location" not in response.headers
    query = urllib.parse.urlencode({"username": name, "query": "a=\r\nX: y"})
    response = visit(visited, f"/user-redirect/tree?{query}")
    assert response.status == 404 and "Location" not in response.headers
    page = Page(response.text)
    assert page.texts("p")[0] == "Nobody here has this user name."
    assert "Set-Cookie" not in response.headers


@pytest.mark.root
@pytest.mark.parametrize(
    "path", ["//evil.example/", "/\\evil.example", "/@evil.example", ""]
)
def test_the_rest_of_an_address_for_everybody_stays_a_path(
    visited: Course, path: str
) -> None:
    username = visited.students[0]
    headers = {"Cookie": f"{WHO}={username}"}
    location = visit(visited, f"/user-redirect{path}", headers=headers).headers["Location"]
    assert location.startswith(visited.notebook_url(username))
    query = urllib.parse.urlencode({"username": username, "query": "a=\r\nX: y#z"})
    response = visit(visited, f"/user-redirect/tree?{query}")
    url = f"{visited.notebook_url(username)}tree?a=%0D%0AX:%20y%23z"
    assert response.headers["Location"] == url and "X" not in response.headers


@pytest.mark.root
def test_the_form_leads_to_the_notebook_without_javascript(visited: Course) -> None:
    page = Page(visit(visited).text)
    (form,), (field,) = page.attributes("form"), page.attributes("input")
    username = visited.students[0]
    query = urllib.parse.urlencode({str(field["name"]): username.upper()})
    response = visit(visited, f"{form['action']}?{query}")
    notebook = response.headers["Location"]
    assert notebook == visited.notebook_url(username)
    answer = fetch(f"{notebook}login", context=visited.context())
    assert answer.status == 200 and 'type="password"' in answer.text


@pytest.mark.root
@pytest.mark.parametrize(
    ("host", "visited_as"),
    [
        ("[::1]", "[::1]"),
        ("[::1]:1", "[::1]"),
        ("[2001:DB8::1]:8888", "[2001:db8::1]"),
        ("192.0.2.1:8888", "192.0.2.1"),
        ("Lab.Example.org", "lab.example.org"),
        ("lab-1.example.org:443", "lab-1.example.org"),
    ],
)
@pytest.mark.parametrize("secure", [True, False], ids=["https", "http"])
def test_a_redirect_stays_on_the_name_that_was_visited(
    visited: Course, host: str, visited_as: str, secure: bool
) -> None:
    username = visited.students[0]
    request = f"GET /{username} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    address = send_raw(visited, request, secure).headers["Location"]
    if secure:
        port = visited.rows()[username]["port"]
        assert address == f"https://{visited_as}:{port}/{username}/"
    else:
        assert address == f"https://{visited_as}:{visited.port}/{username}"


@pytest.mark.root
@pytest.mark.parametrize(
    "headers",
    [
        "",
        "Host:\r\n",
        "Host: evil.example/\r\n",
        "Host: evil.example/?\r\n",
        "Host: evil.example#\r\n",
        "Host: localhost@evil.example\r\n",
        "Host: localhost:1@evil.example\r\n",
        "Host: localhost:8888:evil.example\r\n",
        "Host: [::1]@evil.example\r\n",
        "Host: [evil.example]\r\n",
        "Host: [::1\r\n",
        "Host: evil.example\\\r\n",
        "Host: <script>\r\n",
        "Host: evil example\r\n",
        "Host: evil.ex\xe4mple\r\n",
        "Host: localhost\r\nHost: evil.example\r\n",
        "Host: localhost, evil.example\r\n",
        f"Host: {'a' * 70000}\r\n",
    ],
)
@pytest.mark.parametrize("secure", [True, False], ids=["https", "http"])
def test_a_hostile_host_header_leads_nowhere(
    visited: Course, headers: str, secure: bool
) -> None:
    username = visited.students[0]
    request = f"GET /{username} HTTP/1.1\r\n{headers}\r\n".encode("latin-1")
    try:
        response = send_raw(visited, request, secure)
    except (ConnectionError, ssl.SSLEOFError):
        return  # it was hung up on
    if response.status >= 400:
        assert "Location" not in response.headers
        return
    address = urllib.parse.urlsplit(response.headers["Location"])
    assert address.hostname in (socket.gethostname().lower(), "localhost", "127.0.0.1")
    assert "@" not in address.netloc and "evil" not in response.headers["Location"]


@pytest.mark.root
@pytest.mark.parametrize("path", ["/", "/{zoe}/tree?a=b", "/?username={zoe}"])
def test_plain_http_is_led_to_tls(visited: Course, path: str) -> None:
    target = f"localhost:{visited.port}{path.format_map(names(visited))}"
    response = fetch(f"http://{target}")
    assert response.status == 307
    assert response.headers["Location"] == f"https://{target}"
    assert HOSTILE not in response.text


@pytest.mark.root
@pytest.mark.parametrize(
    "target", ["@evil.example/", "http://evil.example/", "//evil.example/", ".evil"]
)
def test_plain_http_is_led_nowhere_else(visited: Course, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    response = send_raw(visited, request, secure=False)
    if response.status < 400:
        page = f"https://localhost:{visited.port}/"
        assert response.headers["Location"].startswith(page)


@pytest.mark.root
@pytest.mark.parametrize(
    "path",
    [
        *("/nobody", "/nobody/tree?x=1", "/root", "/favicon.ico", "//evil.example/"),
        *("/../../etc/passwd", "/%3Cscript%3Ealert(1)%3C/script%3E", "/?username="),
        *("/?username=%3Cscript%3E", "/?username={zoe}%2F..%2F{bo}"),
        "/Your%20password%20has%20expired:%20write%20to%20evil.example",
    ],
)
def test_a_page_that_is_not_there_says_so(visited: Course, path: str) -> None:
    """And repeats nothing of what was asked for: anybody can make a link."""
    response = visit(visited, path)
    assert response.status == 404
    page = check_page(response.text, response.headers["Content-Security-Policy"])
    assert page.texts("p")[0] == "Nobody here has this user name."
    shown = response.text.partition("<script")[0]
    assert not re.search("evil|expired|passwd|favicon", shown)
    assert len(student_links(page)) == len(NAMES)


@pytest.mark.root
@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/", 405), ("GET", "/%ff", 400)]
)
def test_a_bad_request_is_refused_without_details(
    visited: Course, method: str, path: str, status: int
) -> None:
    url = f"https://localhost:{visited.port}{path}"
    response = fetch(url, method, context=visited.context())
    assert response.status == status
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "Traceback" not in response.text


@pytest.mark.root
def test_silent_clients_and_garbage_hold_nobody_up(visited: Course) -> None:
    with contextlib.ExitStack() as stack:
        for data in (b"", b"\0", b"GE", b"\x16", b"\x16\x03\x01" + bytes(99)) * 20:
            client = socket.create_connection(("localhost", visited.port))
            stack.enter_context(client)
            client.sendall(data)
        assert visit(visited).status == 200
        assert fetch(f"http://localhost:{visited.port}/").status == 307
    assert visit(visited).status == 200


@pytest.mark.root
def test_who_asks_and_asks_and_never_reads_is_hung_up_on(visited: Course) -> None:
    """Or such connections would stay for ever: a kernel keeps them alive by itself."""
    webserver = visited.launches[-1].helper("webserver")
    before, request = webserver.num_fds(), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", visited.port))
            secure = stack.enter_context(tls_context().wrap_socket(client))
            secure.settimeout(0.5)
            with contextlib.suppress(OSError):
                while True:
                    secure.send(request * 20)
        assert webserver.num_fds() > before
        seconds = 4 * notebooks.PAGE_SECONDS
        wait_until(lambda: webserver.num_fds() <= before, seconds, "all hung up on")


@pytest.mark.root
def test_visitors_who_leave_at_once_write_nothing_into_the_log(visited: Course) -> None:
    request, launch = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", visited.launches[-1]
    for _ in range(50):
        client = socket.create_connection(("localhost", visited.port))
        # It is reset, and does not wait for what was sent: socket(7).
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with tls_context().wrap_socket(client) as secure:
            secure.sendall(request * 20)
    assert visit(visited).status == 200
    assert "Traceback" not in launch.output, launch.output


@pytest.mark.root
def test_a_dns_that_does_not_answer_holds_no_visitor_up(visited: Course) -> None:
    """Anybody can name a host that is none, for which ours is said."""
    files = Path("/etc/hosts"), Path("/etc/resolv.conf")
    before = [path.read_text() for path in files]
    try:
        files[0].write_text("127.0.0.1 localhost\n")
        files[1].write_text("nameserver 192.0.2.53\n")
        start = time.monotonic()
        for _ in range(3):
            request = b"GET / HTTP/1.1\r\nHost: a!b\r\n\r\n"
            assert send_raw(visited, request, secure=False).status == 307
        assert time.monotonic() - start < 3
    finally:
        for path, text in zip(files, before, strict=True):
            path.write_text(text)


@pytest.mark.root
def test_visitors_of_a_server_that_hangs_write_nothing_into_the_log(
    visited: Course,
) -> None:
    """What they ask for could steer the teacher's terminal: byte 9B begins a sequence."""
    username, launch = visited.students[0], visited.launches[-1]
    fetch(f"{visited.notebook_url(username)}login", context=visited.context())  # starts it
    server, before = visited.server(username), launch.output
    server.suspend()
    try:
        for path in (b"/", b"/\x9b31mYou%20have%20mail"):
            request = b"GET /%s%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert send_raw(visited, request % (username.encode(), path)).status == 503
    finally:
        server.resume()
    assert "503" not in launch.output.removeprefix(before)
    assert "mail" not in launch.output and "\x9b" not in launch.output


@pytest.mark.root
def test_the_webserver_is_nobody(visited: Course) -> None:
    nobody = pwd.getpwnam("nobody")
    children = psutil.Process(visited.launches[-1].pid).children()
    (webserver,) = (each for each in children if "webserver" in each.cmdline()[0])
    assert {*webserver.uids()} == {nobody.pw_uid}
    assert {*webserver.gids()} == {nobody.pw_gid}


@pytest.mark.root
def test_a_private_page_names_nobody(make_course: CourseMaker) -> None:
    course = make_course(
        1,
        web_title=TITLE,
        on_demand="yes",
        list_students="no",
        server_address="{username}.lab.example.org",
    )
    (username,) = course.students
    course.check("setup")
    launch = course.launch().wait_ready()
    for path in ("/", "/nobody"):
        response = visit(course, path)
        page = check_page(response.text, response.headers["Content-Security-Policy"])
        assert not student_links(page)
        assert username not in response.text and "Surname" not in response.text
    address = f"https://{username}.lab.example.org:{course.rows()[username]['port']}"
    for path in (f"/{username}/tree", f"/?username={username}"):
        location = visit(course, path).headers["Location"]
        assert location == f"{address}/{username}/" + "tree" * path.endswith("tree")
    assert f"Ready: https://lab.example.org:{course.port}/" in launch.output


def test_names_are_sorted_as_people_expect() -> None:
    names = ["Uwe", "Änne", "anton", "Zoë", "Ödön", "Oda", "de Vries", "Devi"]
    assert sorted(names, key=notebooks.alphabetic) == [
        *("Änne", "anton", "de Vries", "Devi", "Oda", "Ödön", "Uwe", "Zoë")
    ]


@pytest.mark.parametrize(
    ("path", "asked", "query", "target"),
    [
        ("", " Jmueller ", "username=Jmueller", ("jmueller", "")),
        ("Jmueller", None, "", ("jmueller", "")),
        ("ada/tree/A b", None, "x=1", ("ada", "tree/A%20b?x=1")),
        ("ada", "zoe", "username=zoe", ("ada", "?username=zoe")),
        ("", None, "", ("", "")),
    ],
)
def test_a_user_name_is_found_however_a_phone_writes_it(
    path: str, asked: str | None, query: str, target: tuple[str, str]
) -> None:
    assert notebooks.find_target(path, asked, query) == target
