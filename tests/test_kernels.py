"""Kernels: what of them other accounts can reach."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from conftest import CourseMaker
from support import Course, ExecutionError, Launch, Notebook

pytestmark = pytest.mark.root

DEBUG = {"initialize": {"adapterID": "debugpy", "clientID": "t"}, "attach": {}}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


@pytest.fixture
def notebook(course: Course) -> Iterator[Notebook]:
    notebook = course.notebook(course.students[0])
    yield notebook
    if notebook.kernel_id:
        notebook.api("DELETE", f"kernels/{notebook.kernel_id}")


def ask(notebook: Notebook, kind: str, content: object) -> Any:
    """Return what a kernel answers to a message on its control channel."""
    channels = notebook.kernel_channels
    assert channels
    header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": "t"}
    header |= {"username": "", "version": "5.3"}
    message = {"channel": "control", "header": header, "parent_header": {}}
    channels.send(json.dumps({**message, "metadata": {}, "content": content}))
    while True:
        answer = json.loads(channels.recv())
        ours = answer["parent_header"].get("msg_id") == header["msg_id"]
        if ours and answer["channel"] == "control":
            return answer["content"]


def debug(notebook: Notebook) -> list[Any]:
    """Return what a kernel answers when a front end switches its debugger on."""
    requests = [
        {"type": "request", "seq": i, "command": command, "arguments": DEBUG[command]}
        for i, command in enumerate(DEBUG, 1)
    ]
    return [ask(notebook, "debug_request", request) for request in requests]


def ports_of(course: Course) -> set[int]:
    """Return the TCP ports on which all but the students' servers listen."""
    servers = {x.pid for name in course.students for x in course.servers(name)}
    return {
        connection.laddr.port
        for process in course.processes()
        if process.pid not in servers
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_no_debugger_of_a_kernel_listens_on_tcp(course: Course, notebook: Notebook) -> None:
    notebook.start_kernel()
    ports = ports_of(course)
    assert len(ports) == 1  # of ipykernel's, which takes output of forks with a secret
    assert not any(answer.get("success") for answer in debug(notebook))
    assert ports_of(course) == ports


def test_no_front_end_is_offered_a_debugger(course: Course, notebook: Notebook) -> None:
    specs = notebook.api("GET", "kernelspecs")["kernelspecs"]
    assert not any(x["spec"]["metadata"].get("debugger") for x in specs.values())
    notebook.start_kernel()
    info = ask(notebook, "kernel_info_request", {})
    assert info["status"] == "ok" and "debugger" not in info["supported_features"]


def test_a_kernel_without_debugger_is_otherwise_the_same(
    course: Course, notebook: Notebook
) -> None:
    """Programs know a notebook by the name of ipykernel's launcher."""
    notebook.start_kernel()
    code = (
        "import sys, os; print(os.path.basename(sys.argv[0]), __name__, sys.path.count(''))"
    )
    assert notebook.execute(code) == "ipykernel_launcher.py __main__ 1"
    notebook.api(
        "PUT", "contents/runpy.py", {"type": "file", "format": "text", "content": "1/0"}
    )
    notebook.api("DELETE", f"kernels/{notebook.kernel_id}")
    notebook.start_kernel()
    assert notebook.execute("print('up')") == "up"
    notebook.api("DELETE", "contents/runpy.py")
    with pytest.raises(ExecutionError, match="debugpy"):
        notebook.execute("import debugpy; debugpy.listen(0)")


def test_a_teacher_can_have_the_debugger(make_course: CourseMaker) -> None:
    course = make_course(1, debugger="yes")
    course.check("setup")
    launch: Launch = course.launch().wait_ready()
    assert "debugger = yes" in launch.output
    notebook = course.notebook(course.students[0])
    specs = notebook.api("GET", "kernelspecs")["kernelspecs"]
    assert specs["python3"]["spec"]["metadata"]["debugger"]
    notebook.start_kernel()
    ports = ports_of(course)
    assert all(answer["success"] for answer in debug(notebook))
    assert ports_of(course) > ports
