"""The README's way on to JupyterHub, with a real one: `make bench` installs it."""

import contextlib
import http.cookiejar
import json
import os
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import support
from conftest import CourseMaker
from support import ENVIRONMENT, Course, fetch, recipe, replaced, wait_until

BENCH_PREFIX = Path(os.environ.get("BENCH_PREFIX", "/opt/notebooks-bench"))
HUB = BENCH_PREFIX / "bin/jupyterhub"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not HUB.exists(), reason=f"needs {HUB} (make bench)"),
]


@contextlib.contextmanager
def running_hub(course: Course) -> Iterator[str]:
    """Yield the address of a JupyterHub that the README configures, at ports of ours."""
    changes = {"/root/lab101": course.directory}
    port = support.free_port_range(4)
    text = replaced(recipe("class CourseList"), changes)
    text += f"""
c.JupyterHub.bind_url = "https://127.0.0.1:{port}"
c.JupyterHub.hub_port = {port + 1}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{port + 2}"
"""
    config = course.directory / "jupyterhub_config.py"
    config.write_text(text)
    environment = {**ENVIRONMENT, "PATH": f"{HUB.parent}:{ENVIRONMENT['PATH']}"}
    with (course.directory / "hub.log").open("wb") as log:
        process = subprocess.Popen(
            [HUB, "--config", config],
            env=environment,
            cwd=course.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    url = f"https://localhost:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return fetch(f"{url}/hub/health").status == 200
        return False

    try:
        wait_until(answers, 30, "JupyterHub")
        yield url
    finally:
        process.terminate()
        process.wait(30)

        def remains() -> list[psutil.Process]:
            every = [x for x in psutil.process_iter() if support.is_ours(x)]
            return [x for x in every if f"127.0.0.1:{port + 1}" in support.title_of(x)]

        support.kill_all(lambda: remains() + support.processes_of(course.students), "all")


class Visitor:
    """A browser's side of a JupyterHub."""

    def __init__(self, url: str, username: str):
        self.url, self.username = url, username
        self.cookies = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=support.tls_context()),
            urllib.request.HTTPCookieProcessor(self.cookies),
        )

    def open(self, path: str, **form: str) -> tuple[str, str]:
        """Return the address at which a request ends, and what is there."""
        data = urllib.parse.urlencode(form).encode() if form else None
        return self.send(path, data)

    def send(self, path: str, data: bytes | None, **headers: str) -> tuple[str, str]:
        request = urllib.request.Request(self.url + path, data, headers)
        with self.opener.open(request, timeout=60) as answer:
            return answer.url, answer.read().decode()

    def token(self, path: str) -> str:
        """Return what stands against forged requests below a path."""
        values = [x.value for x in self.cookies if x.name == "_xsrf" and x.path == path]
        return str(values[0])

    def log_in(self, password: str) -> bool:
        self.open("/hub/login")
        form = {"username": self.username, "password": password}
        form["_xsrf"] = self.token("/hub/")
        try:
            return "/hub/login" not in self.open("/hub/login?next=/hub/home", **form)[0]
        except urllib.error.HTTPError as error:
            assert error.code == 403
            return False


def test_students_of_the_list_find_their_files(make_course: CourseMaker) -> None:
    course = make_course(2)
    course.check("setup")
    course.check("send")
    course.launch().wait_ready()  # makes the certificate
    course.launches[0].stop()
    course.check("shutdown")
    first, second = course.students
    with running_hub(course) as url:
        visitor = Visitor(url, first)
        assert not visitor.log_in("wrong") and not visitor.log_in("")
        assert not visitor.log_in(course.rows()[second]["nb-pass"])
        assert not Visitor(url, "root").log_in("")
        assert visitor.log_in(course.rows()[first]["nb-pass"])
        wait_until(lambda: "/user/" in visitor.open("/hub/spawn")[0], 60, "the server")
        api = f"/user/{first}/api"
        wait_until(lambda: visitor.open(f"/user/{first}/lab")[0].endswith("lab"), 60, "lab")
        found = json.loads(visitor.open(f"{api}/contents/course/material")[1])
        assert "welcome.ipynb" in {x["name"] for x in found["content"]}

        token = visitor.token(f"/user/{first}/")
        visitor.send(f"{api}/kernels", b"{}", **{"X-XSRFToken": token})
        assert not support.processes_of([second])
        kernels = [
            x for x in support.processes_of([first]) if "ipykernel" in str(x.cmdline())
        ]
        connection = Path(kernels[0].cmdline()[-1])
        assert json.loads(connection.read_text())["transport"] == "ipc"
