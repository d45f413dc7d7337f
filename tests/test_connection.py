"""Every device connects to its notebook, or its student and teacher are told why not."""

import contextlib
import hashlib
import re
import ssl
import struct
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By

import notebooks
from conftest import CourseMaker
from support import Course, Response, fetch, free_port_range, make_certificate, wait_until

pytestmark = pytest.mark.root

BROWSER = {"Accept": "text/html,application/xhtml+xml"}
AGENTS = {
    "iPad, iPhone": "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) Version/18.1"
    " Mobile/15E148 Safari/604.1",
    "Android": "Mozilla/5.0 (Linux; Android 15; Pixel 8) Chrome/131.0 Mobile Safari/537.36",
    "Windows": "Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/131.0 Safari/537.36",
    "Chromebook, Linux": "Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) Chrome/131.0 Safari",
}
MACINTOSH = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Version/18.1 Safari/605.1.15"


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 2, web_title="Physics") as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


def visit(course: Course, path: str, **headers: str) -> Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return fetch(f"{course.url}{path}", headers=given, context=course.context())


# ---------------------------------------------------------------------------------------
# A certificate that devices can trust
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["certificate", "-certificate.crt"])
def test_the_page_hands_out_the_certificate_of_its_authority(
    course: Course, path: str
) -> None:
    response = visit(course, path)
    assert response.headers["Content-Type"] == "application/x-x509-ca-cert"
    authority = ssl.DER_cert_to_PEM_cert(response.body)
    assert authority in (course.directory / "notebooks.pem").read_text()
    context = ssl.create_default_context(cadata=authority)
    assert fetch(course.url, context=context).status == 200
    assert fetch(course.notebook_url(course.students[0]), context=context).status == 302
    digest = hashlib.sha256(response.body).hexdigest().upper()
    shown = visit(course, "-certificate").text.replace(":", "")
    assert digest in shown
    assert digest in course.launches[0].output.replace(":", "")


@pytest.mark.parametrize("system", AGENTS)
def test_a_device_is_shown_its_own_steps_first(course: Course, system: str) -> None:
    text = visit(course, "-certificate", User_Agent=AGENTS[system]).text
    assert re.findall(r"<details open>\s*<summary>(.*?)<", text) == [system]
    assert re.findall(r"<summary>(.*?)<", text)[0] == system
    assert text.count("<details") == len(notebooks.SYSTEMS)


def test_an_ipad_that_says_it_is_a_mac_finds_its_steps(course: Course) -> None:
    text = visit(course, "-certificate", User_Agent=MACINTOSH).text
    shown = re.findall(r"<details open>\s*<summary>(.*?)<", text)
    assert shown == ["iPad, iPhone", "Mac"]


def test_a_student_may_be_called_certificate(make_course: CourseMaker) -> None:
    course = make_course(1, on_demand="yes")
    name = "certificate"
    assert notebooks.find_account(name) is None
    course.write_students([{"username": name}])
    course.students[:] = [name]
    course.check("setup")
    course.launch().wait_ready()
    assert visit(course, name).headers["Location"] == f"/{name}/"
    assert visit(course, f"{name}/").headers["Location"] == course.notebook_url(name)
    assert visit(course, "-certificate.crt").headers["Content-Type"].endswith("ca-cert")
    course.check("remove", "--yes")


def test_who_has_a_trusted_certificate_is_told_nothing_of_it(
    make_course: CourseMaker, tmp_path: Path
) -> None:
    cert, key = make_certificate(tmp_path, days=10)
    course = make_course(1, on_demand="yes", cert_file=cert, key_file=key)
    course.check("setup")
    launch = course.launch().wait_ready()
    context = ssl.create_default_context(cafile=cert)
    text = fetch(course.url, context=context).text
    assert "-certificate" not in text.partition("<script")[0]
    for path in ("certificate", "-certificate", "-certificate.crt"):
        response = fetch(f"{course.url}{path}", context=context)
        assert response.headers["Location"] == "/"
    # What ends soon is said before browsers say it.
    assert "the certificate expires in 9 days" in launch.output
    assert "The certificate of this page ends on 20" in text


# ---------------------------------------------------------------------------------------
# Told why
# ---------------------------------------------------------------------------------------


def test_a_browser_is_tried_before_it_is_led_on(course: Course) -> None:
    username = course.students[0]
    notebook = course.notebook_url(username)
    first = visit(course, f"{username}/tree/x", **BROWSER)
    assert first.status == 200 and f'href="{notebook}tree/x"' in first.text
    assert f'<noscript>\n<meta http-equiv="refresh" content="0; url={notebook}tree/x">' in (
        first.text
    )
    again = visit(
        course, f"{username}/tree/x", Cookie="__Host-notebooks-socket=1", **BROWSER
    )
    assert again.headers["Location"] == f"{notebook}tree/x"


@pytest.mark.parametrize("where", ["page", "notebook"])
def test_it_is_known_why_a_socket_does_not_open(course: Course, where: str) -> None:
    username = course.students[1]
    url = course.url if where == "page" else course.notebook_url(username)
    address, sslopt = f"{url}-socket", {"context": course.context()}

    socket = websocket.create_connection(
        address.replace("https", "wss") + "?try=opened", timeout=20, sslopt=sslopt
    )
    with contextlib.suppress(websocket.WebSocketException):
        assert socket.recv() == ""
    socket.shutdown()  # type: ignore[no-untyped-call]
    # A filter has taken `Upgrade` out of the request.
    assert fetch(f"{address}?try=filtered", context=course.context()).status == 400
    for number, kind in (("filtered", "network"), ("never", "certificate")):
        query = f"?try={number}&failed={username}"
        assert fetch(f"{address}{query}", context=course.context()).text == kind


def test_the_teacher_is_told_once_whose_browser_opens_no_socket(course: Course) -> None:
    username, launch = course.students[0], course.launches[0]
    for _ in range(3):
        for name in (username, "nobody", "\x1b]0;title\a"):
            visit(course, f"-socket?try=1&failed={urllib.parse.quote(name)}")
    words = f"{username}: their browser opens no WebSocket"
    wait_until(lambda: words in launch.output, 10, "a line for the teacher")
    assert launch.output.count(words) == 1
    assert "nobody: their" not in launch.output and "\x1b" not in launch.output


@pytest.mark.parametrize("where", ["page", "notebook"])
def test_what_strangers_send_through_a_socket_fills_no_log_and_no_memory(
    course: Course, where: str
) -> None:
    username, launch = course.students[0], course.launches[0]
    is_page = where == "page"
    url = course.url if is_page else course.notebook_url(username)
    server = launch.helper("webserver") if is_page else course.server(username)
    address, sslopt = f"{url}-socket".replace("https", "wss"), {"context": course.context()}
    before = server.memory_info().rss

    for data in (b"", b"x", bytes(9_000_000)):  # the last is not the whole message
        client = websocket.create_connection(address, timeout=20, sslopt=sslopt)
        assert client.sock
        size = max(len(data), 9_500_000 * (len(data) > 1))
        with contextlib.suppress(OSError, websocket.WebSocketException):
            client.sock.sendall(
                struct.pack("!BBQI", 0x82, 0xFF, size, 0) + data  # masked by zeros
            )
            client.recv()
            client.recv()  # till it is hung up on
        client.shutdown()  # type: ignore[no-untyped-call]
        assert server.memory_info().rss - before < 5_000_000

    assert fetch(url, context=course.context()).status in (200, 302)  # it has done all
    log = (course.home(username) / notebooks.SERVER_LOG).read_text()
    assert "Traceback" not in launch.output and "Traceback" not in log


NGINX = """
daemon off; user root; pid {directory}/pid; error_log {directory}/error.log;
events {{ }}
http {{
  access_log off; client_body_temp_path {directory}; proxy_temp_path {directory};
  fastcgi_temp_path {directory}; uwsgi_temp_path {directory}; scgi_temp_path {directory};
  server {{
    listen {port} ssl; ssl_certificate {cert}; ssl_certificate_key {key};
    location / {{ proxy_pass {page}; proxy_set_header Host $http_host; }}
  }}
}}
"""


@pytest.fixture
def filtered(course: Course, tmp_path: Path) -> Iterator[str]:
    """The page's address behind a proxy that passes no `Upgrade` on."""
    cert, key = make_certificate(tmp_path)
    port, configuration = free_port_range(1), tmp_path / "nginx.conf"
    configuration.write_text(
        NGINX.format(directory=tmp_path, port=port, cert=cert, key=key, page=course.url)
    )
    process = subprocess.Popen(["/usr/sbin/nginx", "-c", str(configuration)])
    url = f"https://localhost:{port}/"
    try:
        wait_until(lambda: answers(url), 20, "the proxy")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return fetch(url).status == 200
    return False


def test_a_network_without_websockets_is_named_and_does_not_stop_anybody(
    course: Course, filtered: str, browser: WebDriver
) -> None:
    browser.get(filtered)
    wait_until(lambda: browser.find_element(By.ID, "trouble").is_displayed(), 20, "words")
    shown = browser.find_element(By.ID, "trouble").text
    ports = f"{course.port}-{course.port + 2}"
    assert "The network blocks" in shown and ports in shown
    assert "certificate" not in shown and "Done already" not in shown
    username = course.students[1]
    browser.get(f"{filtered}{username}")
    wait_until(lambda: browser.find_element(By.ID, "trouble").is_displayed(), 20, "words")
    assert not browser.find_elements(By.ID, "checking")
    words = f"{username}: their browser opens no WebSocket"
    wait_until(lambda: words in course.launches[0].output, 10, "a line for the teacher")
    browser.find_element(By.ID, "go").click()
    wait_until(lambda: "/login" in browser.current_url, 20, "the log-in page")


def test_a_server_that_cannot_be_started_is_told_to_its_student(
    make_course: CourseMaker,
) -> None:
    course = make_course(2, on_demand="yes")
    course.check("setup")
    launch = course.launch().wait_ready()
    username, other = course.students
    home = course.home(username)
    home.rename(home.with_name("elsewhere"))
    assert visit(course, username).status == 503
    failed = "Your notebook could not be started: tell your teacher."
    wait_until(lambda: failed in visit(course, username).text, 20, "the reason")
    assert "is missing; run setup" in launch.output and "503" not in launch.output
    home.with_name("elsewhere").rename(home)
    wait_until(lambda: visit(course, username).status == 302, 90, "a server")
    assert visit(course, other).status in (302, 503)
    assert failed not in visit(course, other).text


# ---------------------------------------------------------------------------------------
# Pages for everybody
# ---------------------------------------------------------------------------------------


def test_a_list_of_hundreds_can_be_searched(
    make_course: CourseMaker, browser: WebDriver
) -> None:
    course = make_course(1, on_demand="yes")
    (username,) = course.students
    rows = [{"username": username, "name": "Änne", "surname": "Übermuth"}]
    course.write_students(rows)
    course.check("setup")
    course.launch().wait_ready()
    browser.get(course.url)
    browser.execute_script(
        "const list = document.getElementById('students'), one = list.children[0];"
        "for (let i = 0; i < 299; i++) { const other = one.cloneNode(true);"
        " other.querySelector('bdi').textContent = 'Nobody ' + i; list.append(other); }"
    )
    field = browser.find_element(By.NAME, "username")
    field.send_keys("ub  anne")
    shown = [x for x in browser.find_elements(By.CSS_SELECTOR, "li") if x.is_displayed()]
    assert [x.text.splitlines()[0] for x in shown] == ["Änne Übermuth"]
    assert browser.find_element(By.ID, "found").text == "1 / 300"
    field.submit()
    wait_until(lambda: "/login" in browser.current_url, 30, "the log-in page")
