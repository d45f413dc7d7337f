"""What nobody uses ends, comes back, and says so; what works is left alone."""

import contextlib
import json
from collections.abc import Iterator
from http import HTTPStatus

import psutil
import pytest
import websocket

from support import Course, Notebook, fetch, is_ours, title_of, wait_until
from test_gateway import PROGRAM, Gateway, course_with, running_gateway

pytestmark = pytest.mark.root

LOOP = "import time\nwhile True: time.sleep(1)"


class Evening:
    """A course in which each student has left something else, minutes later."""

    def __init__(self, course: Course):
        self.course = course
        (launch,) = course.launches
        self.launch = launch
        self.away, self.idle, self.open, self.in_vain, self.unread, self.busy = (
            course.notebook(username) for username in course.students
        )
        model = {"type": "file", "format": "text", "content": "kept"}
        self.away.api("PUT", "contents/kept.txt", model)
        self.idle.execute("1")
        self.open.submit(LOOP)
        self.in_vain.submit(LOOP)
        self.result = self.unread.submit("import time; time.sleep(3); print('a result')")
        for notebook in (self.in_vain, self.unread):
            wait_until(lambda x=notebook: state_of(x) == "busy", 30, "work")  # type: ignore[misc]
            notebook.close_tab()

        self.busy.execute_in_terminal("(sleep 1000 &)")
        self.busy.resources.close()
        terminals = self.processes(self.busy, "-l")
        self.busy.api("POST", "terminals")
        away, *_ = course.students
        self.ending = [
            course.server(away),
            *self.processes(self.idle, "ipykernel_launcher"),
            *self.processes(self.in_vain, "ipykernel_launcher"),
            *{*self.processes(self.busy, "-l")} - {*terminals},
        ]
        assert len(self.ending) == 4

    def processes(self, notebook: Notebook, word: str) -> list[psutil.Process]:
        """Return the children of a server with this word in their command line."""
        username = notebook.url.split("/")[-2]
        children = self.course.server(username).children()
        return [child for child in children if word in title_of(child)]

    def has_come(self) -> bool:
        """Say whether all has ended that should. Meanwhile a tab answers pings."""
        assert self.open.kernel_channels
        self.open.kernel_channels.settimeout(0.01)
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            self.open.kernel_channels.recv()
        return not any(map(is_ours, self.ending))


def state_of(notebook: Notebook) -> str:
    model = notebook.api("GET", f"kernels/{notebook.kernel_id}?no_track_activity=1")
    return str(model["execution_state"])


@pytest.fixture(scope="module")
def far(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gateway, Notebook] | None]:
    """A gateway, and a notebook with an idle kernel on it."""
    if not PROGRAM.exists():
        yield None
        return
    directory = tmp_path_factory.mktemp("far")
    with (
        running_gateway() as gateway,
        course_with(gateway, directory, 1, idle_kernel_minutes=1) as course,
    ):
        notebook = course.notebook(course.students[0])
        notebook.execute("1")
        yield gateway, notebook


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory, far: object) -> Iterator[Evening]:
    directory = tmp_path_factory.mktemp("course")
    with Course(directory, 6, idle_minutes=1, busy_minutes=1) as course:
        course.check("setup")
        course.check("send")
        course.launch().wait_ready()
        evening = Evening(course)
        wait_until(evening.has_come, 240, "the end of what is idle")
        yield evening


def test_an_idle_server_ends_and_the_next_visit_brings_it_back(evening: Evening) -> None:
    course, away = evening.course, evening.course.students[0]
    assert f"{away}: stopped" in evening.launch.output
    assert "Traceback" not in evening.launch.output
    response = fetch(f"{course.url}{away}", context=course.context())
    assert response.headers["Location"] == course.notebook_url(away)
    content = course.notebook(away).api("GET", "contents/kept.txt")["content"]
    assert content == "kept"


def test_a_kernel_that_computes_for_an_open_tab_runs_on(evening: Evening) -> None:
    assert state_of(evening.open) == "busy"


def test_a_kernel_whose_output_no_tab_has_shown_stays(evening: Evening) -> None:
    evening.unread.open_tab()
    assert evening.unread.output_of(evening.result) == "a result"


def test_a_tab_is_told_why_its_idle_kernel_was_ended(evening: Evening) -> None:
    assert evening.idle.kernel_channels
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        while evening.idle.kernel_channels.recv():
            pass
    model = evening.idle.api("GET", f"kernels/{evening.idle.kernel_id}")
    assert model["execution_state"] == "dead"
    assert "was not used for 1 minute" in model["reason"]


def test_an_idle_kernel_on_a_gateway_is_ended_there(
    evening: Evening, far: tuple[Gateway, Notebook] | None
) -> None:
    if not far:
        pytest.skip(f"needs {PROGRAM} (make test)")
    gateway, notebook = far
    wait_until(lambda: state_of(notebook) == "dead", 120, "the end of an idle kernel")
    path = f"api/kernels/{notebook.kernel_id}"
    assert "was not used for 1 minute" in notebook.fetch(path).json["reason"]
    assert gateway.ask(f"/{path}") == HTTPStatus.NOT_FOUND


def test_a_tab_is_told_that_its_kernel_computed_for_nobody(evening: Evening) -> None:
    """By the next server of this student."""
    course, username = evening.course, evening.course.students[3]
    server = course.server(username)
    server.terminate()
    wait_until(lambda: not is_ours(server), 20, "the end of a server")
    notebook = course.notebook(username)
    notebook.kernel_id = evening.in_vain.kernel_id
    assert state_of(notebook) == "dead"
    reason = notebook.api("GET", f"kernels/{notebook.kernel_id}")["reason"]
    assert "computed for 1 minute while no tab was open" in reason
    assert notebook.api("GET", "kernels") == []


def test_a_terminal_in_which_something_runs_stays_and_another_ends(
    evening: Evening,
) -> None:
    terminals = evening.busy.api("GET", "terminals")
    assert [each["name"] for each in terminals] == ["1"]
    assert evening.busy.api("POST", "terminals", {"name": "2"})["name"] == "2"
    channel = evening.busy.open_websocket("terminals/websocket/2")
    shown = ""
    while "was not used for 1 minute" not in shown:
        shown += json.loads(channel.recv())[-1] or ""
