"""Let's Encrypt as the README has it: certbot gets a certificate and renews it.

Pebble stands for Let's Encrypt, and a script for systemd, which no container has: it does
what ExecReload of the README's service says.
"""

import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import CourseMaker, mount
from support import (
    ENVIRONMENT,
    Launch,
    Notebook,
    fetch,
    free_port_range,
    host_called,
    make_certificate,
    recipe,
    run_recipe,
    wait_until,
)

pytestmark = pytest.mark.root

NAME = "lab.example.org"
SYSTEMCTL = """#!/bin/sh -e
[ "$*" = "reload lab101" ]
MAINPID={}
{}
"""

COMPUTE = """
import os, time
while not os.path.exists(os.path.expanduser("~/enough")):
    time.sleep(0.1)
print("computed")
"""


@pytest.fixture
def letsencrypt() -> Iterator[None]:
    """An empty /etc/letsencrypt: certbot sees no certificate and no hook of the machine."""
    path = Path("/etc/letsencrypt")
    path.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "tmpfs", str(path))
    yield
    subprocess.run(["umount", "--no-mtab", str(path)], check=True)


@pytest.fixture
def acme(letsencrypt: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What certbot is told besides: another authority, that asks another port."""
    cert, key = make_certificate(tmp_path)
    ports = range(free_port_range(3), 65536)
    settings = {
        "listenAddress": f"127.0.0.1:{ports[0]}",
        "managementListenAddress": f"127.0.0.1:{ports[1]}",
        "httpPort": ports[2],
        "certificate": str(cert),
        "privateKey": str(key),
    }
    path = tmp_path / "pebble.json"
    path.write_text(json.dumps({"pebble": settings}))
    own = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"}
    with (tmp_path / "pebble.log").open("wb") as log, host_called(NAME):
        process = subprocess.Popen(
            ["/usr/bin/pebble", "-config", str(path)],
            env={**ENVIRONMENT, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            root = f"https://localhost:{ports[1]}/roots/0"
            wait_until(lambda: is_there(root), 20, "pebble")
            yield {
                "options": f"--server https://localhost:{ports[0]}/dir -n --agree-tos"
                f" --register-unsafely-without-email --http-01-port {ports[2]}",
                "root": fetch(root).text,
                "certificate": str(cert),
            }
        finally:
            process.terminate()
            process.wait(20)


def is_there(url: str) -> bool:
    try:
        return fetch(url).status == 200
    except OSError:
        return False


def write_systemctl(directory: Path, launch: Launch) -> None:
    """Write a program that knows one service: the launch that runs."""
    unit = recipe("ExecReload=")
    reload = unit.partition("ExecReload=")[2].partition("\n")[0]
    program = directory / "systemctl"
    program.write_text(SYSTEMCTL.format(launch.pid, reload))
    program.chmod(0o755)


def test_certbot_renews_the_certificate_of_a_notebook_that_computes(
    make_course: CourseMaker, acme: dict[str, str], tmp_path: Path
) -> None:
    path = f"{tmp_path}:{ENVIRONMENT['PATH']}"
    own = {"PATH": path, "REQUESTS_CA_BUNDLE": acme["certificate"]}
    changes = {
        "apt-get install certbot": "true",
        f"-d {NAME}": f"-d {NAME} {acme['options']}",
    }
    run_recipe("certbot certonly", changes, **own)  # there is no service yet

    settings = re.findall(r"(\w+) = (.+)", recipe("cert_file = /etc/letsencrypt"))
    course = make_course(2, **dict(settings))
    course.check("setup")
    launch = course.launch().wait_ready()
    write_systemctl(tmp_path, launch)
    assert f"Ready: https://{NAME}:{course.port}/" in launch.output
    assert "-certificate" not in launch.output

    trusting = ssl.create_default_context(cadata=acme["root"])
    username = course.students[0]
    ports = [course.port, int(course.rows()[username]["port"])]

    def served() -> set[str]:
        for port in ports:
            fetch(f"https://{NAME}:{port}/", context=trusting)
        return {ssl.get_server_certificate((NAME, port)) for port in ports}

    before, server = served(), course.server(username)
    notebook = Notebook(f"https://{NAME}:{ports[1]}/{username}/", trusting)
    notebook.log_in(course.rows()[username]["nb-pass"])
    request = notebook.submit(COMPUTE)

    renew = ["certbot", "renew", "--force-renewal", "--no-random-sleep-on-renew"]
    subprocess.run(
        renew,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**ENVIRONMENT, **own},
    )
    wait_until(lambda: before.isdisjoint(after := served()) and len(after) == 1, 20, "it")
    assert course.server(username) == server
    (course.home(username) / "enough").touch()
    assert notebook.output_of(request) == "computed"
    notebook.resources.close()
