"""The README's recipes for nginx and Caddy, between students and their notebooks.

Here proxy and notebooks are on one host, so the proxy's ports are other ones: these, the
addresses and the certificates are replaced in the recipes, and nothing else.
"""

import base64
import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import websocket
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By

from support import (
    ENVIRONMENT,
    Course,
    Notebook,
    fetch,
    free_port_range,
    host_called,
    make_certificate,
    recipe,
    replaced,
    run_recipe,
    tls_context,
    wait_until,
)

pytestmark = pytest.mark.root

NAME = "lab.example.org"
UPLOAD = 20 << 20

NGINX_AROUND = """
daemon off; user root; pid {0}/pid; error_log {0}/error.log;
events {{ }}
http {{
  access_log off; client_body_temp_path {0}; proxy_temp_path {0};
  fastcgi_temp_path {0}; uwsgi_temp_path {0}; scgi_temp_path {0};
  map $server_port $port_behind {{ {1} }}
  include {0}/notebooks.conf;
}}
"""
# Caddy shall ask no authority of the Internet for the certificate.
CADDY_AROUND = """
{
    admin off
    local_certs
    skip_install_trust
    auto_https disable_redirects
}
"""


@dataclass
class Proxy:
    """Forwards each port of a course, which is its own with a shift."""

    kind: str
    course: Course
    first: int

    def outside(self, url: str) -> str:
        """Return where the proxy offers an address of the course."""
        for port in range(self.course.port, self.course.port + 3):
            own = port - self.course.port + self.first
            url = url.replace(f"https://{NAME}:{port}/", f"https://{NAME}:{own}/")
        return url

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.first}/"

    def notebook_url(self, username: str) -> str:
        port = self.course.rows()[username]["port"]
        return self.outside(f"https://{NAME}:{port}/{username}/")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    directory = tmp_path_factory.mktemp("course")
    with host_called(NAME), Course(directory, 2, server_address=NAME) as course:
        course.check("setup")
        course.launch().wait_ready()
        behind = f"https://127.0.0.1:{course.port}/"
        said = run_recipe("curl -k", {"https://192.0.2.7:8888/": behind})
        digest = said.splitlines()[0].partition("=")[2]
        output = course.launches[0].output
        assert f"https://{NAME}:{course.port}/-certificate: {digest}" in output
        yield course


def nginx_command(course: Course, first: int, directory: Path) -> list[str]:
    cert, key = make_certificate(directory)
    live = "/etc/letsencrypt/live/lab.example.org"
    changes = {
        "8888-8918": f"{first}-{first + 2}",
        f"{live}/fullchain.pem": cert,
        f"{live}/privkey.pem": key,
        "192.0.2.7:$server_port": "127.0.0.1:$port_behind",
    }
    (directory / "notebooks.conf").write_text(replaced(recipe("proxy_pass"), changes))
    pairs = " ".join(f"{first + i} {course.port + i};" for i in range(3))
    path = directory / "nginx.conf"
    path.write_text(NGINX_AROUND.format(directory, pairs))
    return ["/usr/sbin/nginx", "-c", str(path)]


def caddy_command(course: Course, first: int, directory: Path) -> list[str]:
    path = directory / "Caddyfile"
    snippet = replaced(recipe("reverse_proxy"), {"192.0.2.7": "127.0.0.1"})
    path.write_text(CADDY_AROUND + snippet)
    changes = {
        "8888 8918": f"{first} {first + 2}",
        "$port $port": f"$port $((port + {course.port - first}))",
        "/etc/caddy/Caddyfile": path,
    }
    run_recipe("import notebook %s", changes)
    return ["/usr/bin/caddy", "run", "--config", str(path)]


@contextlib.contextmanager
def running(kind: str, course: Course, directory: Path) -> Iterator[Proxy]:
    """Yield a proxy that answers, whatever it answers."""
    proxy = Proxy(kind, course, free_port_range(3))
    command_for = {"nginx": nginx_command, "caddy": caddy_command}[kind]
    command = command_for(course, proxy.first, directory)
    own = {"HOME": str(directory), "XDG_DATA_HOME": str(directory)}
    log = directory / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**ENVIRONMENT, **own}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: answers(proxy.url), 20, kind)
        yield proxy
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log.read_text()}") from None
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return fetch(url).status > 0
    return False


KINDS = ["nginx", "caddy"]


@pytest.fixture(scope="module", params=KINDS)
def proxy(
    request: pytest.FixtureRequest,
    course: Course,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Proxy]:
    directory = tmp_path_factory.mktemp(request.param)
    with running(request.param, course, directory) as proxy:
        yield proxy


@pytest.fixture
def notebook(proxy: Proxy) -> Iterator[Notebook]:
    """A notebook to which a student has come by the page."""
    username = proxy.course.students[0]
    assert f'href="/{username}"' in fetch(proxy.url).text
    url = fetch(f"{proxy.url}{username}").headers["Location"]
    url = proxy.outside(url)
    assert url == proxy.notebook_url(username)
    with Notebook(url) as notebook:
        notebook.log_in(proxy.course.rows()[username]["nb-pass"])
        yield notebook


def test_kernels_and_terminals_run_behind_a_proxy(notebook: Notebook) -> None:
    assert notebook.execute("sum(range(101))") == "5050"
    assert notebook.execute_in_terminal("echo $((6*7))") == "42"


def test_large_files_go_through_a_proxy(notebook: Notebook) -> None:
    data = os.urandom(UPLOAD)
    content = base64.b64encode(data).decode()
    notebook.api(
        "PUT", "contents/big", {"type": "file", "format": "base64", "content": content}
    )
    token = notebook.cookies["_xsrf"].value
    assert notebook.fetch(f"files/big?download=1&_xsrf={token}").body == data


def test_plain_http_is_redirected_by_nginx(proxy: Proxy) -> None:
    if proxy.kind == "nginx":
        response = fetch(f"{proxy.url.replace('https', 'http')}x?y", "POST")
        assert (response.status, response.headers["Location"]) == (307, f"{proxy.url}x?y")


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_talks_to_the_host_behind_it_alone(
    course: Course, tmp_path: Path, kind: str
) -> None:
    """Another one, which has taken its address, gets no password."""
    trusted = Path("/etc/ssl/notebooks.pem")
    before = trusted.read_text()
    other, _ = make_certificate(tmp_path, "other")
    trusted.write_text(other.read_text())
    try:
        with running(kind, course, tmp_path) as proxy:
            assert fetch(proxy.url).status == 502
    finally:
        trusted.write_text(before)


def test_the_check_of_websockets_is_content_with_a_proxy(
    proxy: Proxy, browser: WebDriver
) -> None:
    for url in (proxy.url, proxy.notebook_url(proxy.course.students[1])):
        address = f"{url.replace('https', 'wss')}-socket?try=behind"
        context = {"context": tls_context()}
        socket = websocket.create_connection(address, timeout=20, sslopt=context)
        socket.shutdown()  # type: ignore[no-untyped-call]

    browser.get(proxy.url)
    wait_until(lambda: browser.get_cookie("__Host-notebooks-socket"), 20, "the answer")
    assert not browser.find_element(By.ID, "trouble").is_displayed()
    assert "opens no WebSocket" not in proxy.course.launches[0].output
