"""Servers that nobody uses end, and come back; what computes is left alone."""

import json

import pytest

from conftest import CourseMaker
from support import fetch, is_ours, wait_until

pytestmark = pytest.mark.root


def test_an_idle_server_ends_and_the_next_visit_brings_it_back(
    make_course: CourseMaker,
) -> None:
    course = make_course(3, idle_minutes=1)
    course.check("setup")
    course.check("send")
    launch = course.launch().wait_ready()
    idle, busy, _ = course.students
    notebook, computing = course.notebook(idle), course.notebook(busy)
    model = {"type": "file", "format": "text", "content": "kept"}
    notebook.api("PUT", "contents/kept.txt", model)
    computing.execute("import time")
    assert computing.kernel_channels
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1"}
    request = {
        "channel": "shell",
        "header": {**header, "username": "", "version": "5.3"},
        "parent_header": {},
        "metadata": {},
        "content": {"code": "while True: time.sleep(1)", "silent": False},
    }
    computing.kernel_channels.send(json.dumps(request))
    ending = [course.server(x) for x in course.students if x != busy]
    wait_until(lambda: not any(map(is_ours, ending)), 240, "the end of idle servers")
    assert [x for x in course.processes() if x.username() != busy] == []
    (kernel,) = computing.api("GET", "kernels")
    assert kernel["execution_state"] == "busy"
    assert f"{idle}: stopped" in launch.output and "Traceback" not in launch.output
    response = fetch(f"{course.url}{idle}", context=course.context())
    assert response.headers["Location"] == course.notebook_url(idle)
    content = course.notebook(idle).api("GET", "contents/kept.txt")["content"]
    assert content == "kept"
