"""Kernels: of all languages, and what of them other accounts can reach."""

import asyncio
import json
import os
import pwd
import sys
import tempfile
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from selenium.webdriver.remote.webdriver import WebDriver

import notebooks
from support import Course, ExecutionError, Notebook, log_in, run_as, use, wait_until
from test_server import eavesdrop

pytestmark = pytest.mark.root

KERNELS_PREFIX = Path(os.environ.get("KERNELS_PREFIX", "/opt/notebooks-kernels"))
KERNELS = KERNELS_PREFIX / "share/jupyter/kernels"
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


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A course of one student whose keys for kernels are not the usual ones."""
    directory = tmp_path_factory.mktemp("contrary")
    with Course(directory, 1, debugger="yes", tcp_kernels="no") as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


def test_a_teacher_can_have_the_debugger(contrary: Course) -> None:
    assert "debugger = yes" in contrary.launches[0].output
    notebook = contrary.notebook(contrary.students[0])
    specs = notebook.api("GET", "kernelspecs")["kernelspecs"]
    assert specs["python3"]["spec"]["metadata"]["debugger"]
    notebook.start_kernel()
    ports = ports_of(contrary)
    assert all(answer["success"] for answer in debug(notebook))
    assert ports_of(contrary) > ports
    notebook.api("DELETE", f"kernels/{notebook.kernel_id}")


def write_spec(course: Course, name: str, *argv: str, **metadata: object) -> None:
    """Give the first student a kernel of this name in their home."""
    spec = {"argv": argv, "display_name": name, "language": "x", "metadata": metadata}
    directory = f".local/share/jupyter/kernels/{name}"
    script = 'mkdir -p "$0" && cat >"$0/kernel.json"'
    run_as(course.students[0], "sh", "-c", script, directory, input=json.dumps(spec))


def connection_of(course: Course, notebook: Notebook) -> Any:
    """Return what a kernel's connection file says."""
    uid = pwd.getpwnam(course.students[0]).pw_uid
    name = f"kernel-{notebook.kernel_id}.json"
    return json.loads(Path(notebooks.RUNTIME_DIR, str(uid), name).read_text())


def refusal(notebook: Notebook, name: str) -> str:
    """Return what a front end shows when a notebook's kernel does not start."""
    model = {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": {"name": name}}
    answer = notebook.fetch("api/sessions", "POST", json.dumps(model))
    assert answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
    assert notebook.api("GET", "kernels") == []
    return str(answer.json["message"])


@pytest.fixture(scope="module")
def languages(course: Course) -> None:
    """The first student has the kernels of other languages in their home."""
    if not KERNELS.exists():
        pytest.skip(f"needs {KERNELS} (make test)")
    for source in KERNELS.iterdir():
        spec = json.loads((source / "kernel.json").read_text())
        argv = [word.replace("{resource_dir}", str(source)) for word in spec["argv"]]
        write_spec(course, source.name, *argv, **spec.get("metadata", {}))


@pytest.mark.parametrize(
    ("name", "code", "transport"),
    [
        ("bash", "echo $((6 * 7))", "ipc"),
        ("java", "6 * 7", "tcp"),
        ("deno", "6 * 7", "tcp"),
        ("xpython", "6 * 7", "tcp"),
    ],
)
@pytest.mark.usefixtures("languages")
def test_kernels_of_other_languages_run(
    course: Course, notebook: Notebook, name: str, code: str, transport: str
) -> None:
    # In two minutes another transport is tried: JeroMQ, for Java, takes ports that may be
    # somebody else's in place of unix sockets.
    notebook.seconds = notebooks.KERNEL_SECONDS + 60
    notebook.start_kernel(name=name)
    # Deno gives the result a colour, and may say that it is done before it shows it.
    wait_until(lambda: "42" in notebook.execute(code), 20, "42")
    assert connection_of(course, notebook)["transport"] == transport


@pytest.mark.usefixtures("languages")
def test_how_a_kernel_came_up_is_remembered(course: Course, notebook: Notebook) -> None:
    log = course.home(course.students[0]) / ".notebooks.log"
    starts = []
    for _ in range(2):
        notebook.start_kernel(name="deno")
        notebook.api("DELETE", f"kernels/{notebook.kernel_id}")
        starts.append(log.read_text().count("Kernel started: "))
    notebook.kernel_id = ""
    assert starts[1] == starts[0] + 1


def test_why_a_kernel_does_not_start_is_told(course: Course, notebook: Notebook) -> None:
    write_spec(course, "gone", "/nowhere/gone", "{connection_file}")
    write_spec(course, "ends", "sh", "-c", "echo sorry >&2; exit 1", "{connection_file}")
    write_spec(course, "broken", sys.executable, "-m", "ipykernel_launcher", "--f=/no/x")
    text = refusal(notebook, "gone")
    assert text.startswith("The kernel gone cannot be started: No such file")
    assert "/nowhere/gone" in text
    assert refusal(notebook, "ends").startswith(
        "The kernel ends cannot be started: it ended"
    )
    log = course.home(course.students[0]) / ".notebooks.log"
    assert log.read_text().count("sorry") == 3  # twice, and with TCP
    starts = log.read_text().count("Kernel started: ")
    assert "it ended" in refusal(notebook, "broken")
    assert log.read_text().count("Kernel started: ") == starts + 2  # and not with TCP


def test_a_notebook_shows_why_its_kernel_does_not_start(
    course: Course, notebook: Notebook, browser: WebDriver
) -> None:
    write_spec(course, "gone", "/nowhere/gone", "{connection_file}")
    kernel = {"name": "gone", "display_name": "gone", "language": "x"}
    metadata = {"kernelspec": kernel}
    content = {"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    notebook.api("PUT", "contents/a.ipynb", {"type": "notebook", "content": content})
    browser.get(f"{notebook.url}notebooks/a.ipynb")
    log_in(browser, course, course.students[0])
    use(browser, ".jp-Dialog", "The kernel gone cannot be started: No such file")


def test_a_slow_kernel_is_waited_for(course: Course, notebook: Notebook) -> None:
    """As long as it has opened nothing it may still come."""
    script = 'sleep 5; exec "$0" -m ipykernel_launcher -f "$1"'
    write_spec(course, "slow", "sh", "-c", script, sys.executable, "{connection_file}")
    notebook.start_kernel(name="slow")
    assert notebook.execute("6 * 7") == "42"
    assert connection_of(course, notebook)["transport"] == "ipc"
    log = (course.home(course.students[0]) / ".notebooks.log").read_text()
    assert log.count(f"Kernel started: {notebook.kernel_id}") == 1


def test_a_kernel_that_says_so_uses_tcp_and_is_encrypted(
    course: Course, notebook: Notebook
) -> None:
    argv = (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}")
    write_spec(course, "loud", *argv, transport="tcp", supported_encryption=["curve"])
    notebook.start_kernel(name="loud")
    assert notebook.execute("from time import sleep; 6 * 7") == "42"
    details = connection_of(course, notebook)
    address = "tcp://{ip}:{iopub_port}".format_map(details)
    assert details["curve_publickey"]
    assert eavesdrop(course.students[1], address, notebook) == ""


def test_tcp_can_be_forbidden_to_kernels(contrary: Course) -> None:
    notebook = contrary.notebook(contrary.students[0])
    argv = (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}")
    write_spec(contrary, "loud", *argv, transport="tcp")
    notebook.start_kernel(name="loud")
    assert connection_of(contrary, notebook)["transport"] == "ipc"
    notebook.api("DELETE", f"kernels/{notebook.kernel_id}")
    write_spec(contrary, "ends", "false", "{connection_file}")
    assert "tcp_kernels = no" in refusal(notebook, "ends")


async def heard(*argv: str, is_last: bool) -> str:
    """Return what is said of a kernel that has one second to open its sockets."""
    with tempfile.TemporaryDirectory() as directory:
        kernel: Any = ServerKernelManager(
            transport="ipc", connection_file=f"{directory}/kernel-1.json"
        )
        kernel.kernel_spec.argv = list(argv)
        await kernel.start_kernel()
        try:
            return await notebooks.hear_kernel(kernel, is_last, seconds=1)
        finally:
            assert await kernel.is_alive()
            await kernel.shutdown_kernel(now=True)


def test_only_a_kernel_that_opens_no_socket_is_given_up() -> None:
    for is_last in (False, True):
        assert asyncio.run(heard("sleep", "60", is_last=is_last)) == "it does not answer"
    argv = (sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}")
    busy = "--IPKernelApp.exec_lines=import time; time.sleep(60)"
    assert asyncio.run(heard(*argv, busy, is_last=True)) == ""
