"""Whatever a kernel says, its server stays small, and a tab sees how it began and ended."""

import re
import time
from collections.abc import Iterator

import psutil
import pytest
from websocket import WebSocketTimeoutException

from support import Course, Notebook, title_of, wait_until

pytestmark = pytest.mark.root

MB = 1 << 20
LINES = """
from time import sleep
sleep(3)
print("the beginning")
for _ in range(400): print("x" * 1000000); sleep(0.02)
print("the end")
"""
PICTURES = """
from time import sleep
from IPython.display import display
print("the beginning")
for _ in range(3500): display({"text/plain": "x" * 100000}, raw=True); sleep(0.002)
print("the end")
"""
LEFT_OUT = re.compile(r"\[\.\.\. ([\d.]+) MB of output left out, for nobody was reading")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 1) as course:
        course.check("setup")
        course.check("send")
        course.launch().wait_ready()
        yield course


@pytest.fixture
def notebook(course: Course) -> Notebook:
    notebook = course.notebook(course.students[0])
    notebook.execute("1")
    return notebook


def private_bytes(server: psutil.Process) -> int:
    return int(server.memory_full_info().uss)


def wait_for_kernel(notebook: Notebook, state: str) -> None:
    def is_there() -> bool:
        return bool(notebook.api("GET", path)["execution_state"] == state)

    path = f"kernels/{notebook.kernel_id}"
    wait_until(is_there, 60, f"a kernel that is {state}")


def check_output(output: str) -> None:
    assert output.startswith("the beginning") and output.endswith("the end")
    (size,) = LEFT_OUT.findall(output)
    assert float(size) > 300
    for kept in LEFT_OUT.split(output)[::2]:
        assert MB < len(kept) < 3 * MB


def test_a_closed_tab_gets_the_first_and_the_last_of_a_flood(
    course: Course, notebook: Notebook
) -> None:
    server = course.server(course.students[0])
    before = private_bytes(server)
    request = notebook.submit(LINES)
    wait_for_kernel(notebook, "busy")
    notebook.close_tab()
    wait_for_kernel(notebook, "idle")
    assert private_bytes(server) - before < 60 * MB
    notebook.open_tab()
    check_output(notebook.output_of(request))
    assert notebook.execute("6 * 7") == "42"


def test_a_tab_that_does_not_read_gets_the_first_and_the_last_of_a_flood(
    course: Course, notebook: Notebook
) -> None:
    server = course.server(course.students[0])
    before = private_bytes(server)
    request = notebook.submit(PICTURES)
    wait_for_kernel(notebook, "busy")
    wait_for_kernel(notebook, "idle")
    assert private_bytes(server) - before < 60 * MB
    output = notebook.output_of(request)
    assert LEFT_OUT.search(output) and output.endswith("the end")
    assert notebook.execute("6 * 7") == "42"


def kernels(course: Course) -> list[psutil.Process]:
    children = course.server(course.students[0]).children()
    return [child for child in children if "ipykernel_launcher" in title_of(child)]


@pytest.mark.parametrize("tab", ["open", "closed"])
def test_a_tab_is_told_that_memory_ran_out(
    course: Course, notebook: Notebook, tab: str
) -> None:
    """What the system does then is a SIGKILL."""
    before = kernels(course)
    request = notebook.submit("import os, time; time.sleep(1); os.kill(os.getpid(), 9)")
    if tab == "closed":
        wait_for_kernel(notebook, "busy")
        notebook.close_tab()
        wait_until(lambda: set(kernels(course)) - set(before), 30, "another kernel")
        notebook.open_tab()
    assert "no memory left" in notebook.output_of(request, until="no memory left")


def test_a_tab_is_told_nothing_when_its_student_restarts_the_kernel(
    notebook: Notebook,
) -> None:
    """Also a kernel that has to be killed for that."""
    assert notebook.kernel_channels
    notebook.submit("import signal; signal.pthread_sigmask(0, range(1, 32))")
    notebook.api("POST", f"kernels/{notebook.kernel_id}/restart")
    notebook.kernel_channels.settimeout(5)
    shown, deadline = "", time.monotonic() + 60
    while '"42"' not in shown:
        assert time.monotonic() < deadline
        try:
            shown = str(notebook.kernel_channels.recv())
        except WebSocketTimeoutException:
            notebook.submit("6 * 7")  # one that comes during a restart is lost
        assert "no memory left" not in shown
