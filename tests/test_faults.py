"""What goes wrong in a lesson, done on purpose; see also tests/test_launch.py."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import notebooks
from conftest import CourseMaker
from support import (
    ENVIRONMENT,
    NOTEBOOKS,
    READY,
    Course,
    Launch,
    fetch,
    kill_all,
    run_as,
    wait_until,
)

pytestmark = pytest.mark.root

PIDS_CONTROLLER = Path("/sys/fs/cgroup/pids")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """Students whose servers start at a visit."""
    with Course(tmp_path_factory.mktemp("course"), 6, on_demand="yes") as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


def log_in_page(course: Course, username: str, timeout: float = 30.0) -> int:
    url = f"{course.notebook_url(username)}login"
    return fetch(url, context=course.context(), timeout=timeout).status


def test_a_template_that_cannot_start_ends_launch_with_the_reason(
    make_course: CourseMaker, tmp_path: Path
) -> None:
    course = make_course(1)
    course.check("setup")
    script = tmp_path / "notebooks.py"
    text = NOTEBOOKS.read_text()
    script.write_text(text.replace('"babel.dates"', '"no_such_module"'))
    launch = course.launch(script=script)
    wait_until(lambda: launch.process.poll() is not None, 30, "the end of launch")
    assert launch.process.returncode == 1
    assert "No module named 'no_such_module'" in launch.output
    assert "the template cannot start; what it said is above" in launch.output
    assert READY not in launch.output
    course.launch().wait_ready()


def rehearsal_homes() -> set[Path]:
    return {*notebooks.RUNTIME_DIR.glob("template-*")}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_template_that_ends_while_it_rehearses_leaves_no_home(
    make_course: CourseMaker, signum: int
) -> None:
    course = make_course(1)
    course.check("setup")
    before = rehearsal_homes()
    launch = course.launch()
    wait_until(lambda: rehearsal_homes() - before, 30, "a rehearsal")
    if signum == signal.SIGKILL:  # nobody is left to tidy up until the next command
        launch.helper("template process").suspend()
        template = launch.helper("template process")
        launch.stop(signum)
        template.kill()
        wait_until(lambda: not template.is_running(), 10, "the template's end")
        assert rehearsal_homes() - before
        course.check("shutdown")
    else:
        assert launch.stop(signum) == 130
    assert not rehearsal_homes() - before


@contextlib.contextmanager
def without_forks(pid: int) -> Iterator[None]:
    """Let a process have no child more than it has."""
    if not PIDS_CONTROLLER.is_dir():
        pytest.skip("needs the pids controller of cgroup v1")
    group = PIDS_CONTROLLER / f"nbt{os.getpid()}"
    group.mkdir()
    try:
        (group / "pids.max").write_text("1")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (PIDS_CONTROLLER / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def test_a_fork_that_fails_is_reported_and_tried_again_by_the_next_visit(
    course: Course, launch: Launch
) -> None:
    username = course.students[0]
    template = launch.helper("template process")
    with without_forks(template.pid):
        with pytest.raises(OSError):
            log_in_page(course, username, 1.5)
        reason = f"{username}: cannot fork: Resource temporarily unavailable"
        wait_until(lambda: reason in launch.output, 10, reason)
    assert log_in_page(course, username) == 200
    assert launch.helper("template process") == template


def test_a_helper_that_cannot_be_started_is_tried_again(
    course: Course, launch: Launch
) -> None:
    with without_forks(launch.pid):
        for role in ("template process", "webserver"):
            launch.helper(role).kill()
        for role in ("template", "webserver"):
            reason = f"the {role} could not be started: Resource temporarily unavail"
            wait_until(lambda: reason in launch.output, 10, reason)
    course.server(course.students[0]).kill()
    assert log_in_page(course, course.students[0]) == 200
    assert fetch(course.url, context=course.context()).status == 200


KILL_SERVERS = """
import os, pathlib, signal, sys
while True:
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(sys.argv[1].encode()):
                os.kill(int(path.parts[2]), signal.SIGKILL)
        except OSError:
            pass
"""


def test_a_server_that_ends_at_each_start_is_tried_less_and_less(
    course: Course, launch: Launch
) -> None:
    username, other = course.students[1:3]
    killer = subprocess.Popen(
        [sys.executable, "-c", KILL_SERVERS, f"{notebooks.SERVER_TITLE}{username}"],
        user=username,
        group=username,
        extra_groups=[],
        env=ENVIRONMENT,
    )
    with killer:
        try:
            end = time.monotonic() + 12
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    log_in_page(course, username, 1)
                assert log_in_page(course, other) == 200
        finally:
            killer.kill()
    failures = launch.output.count(f"{username}: the server did not start")
    assert 2 <= failures <= 6  # after 0, 1, 3, 7 seconds, and what was in between
    assert wait_until(lambda: log_in_page(course, username), 30, "an answer") == 200


def half_open(stack: contextlib.ExitStack, port: int, count: int, data: bytes) -> None:
    for _ in range(count):
        client = stack.enter_context(socket.create_connection(("localhost", port)))
        client.sendall(data)


@pytest.mark.parametrize("data", [b"", b"\x16", b"GET / HTTP/1.1\r\n"])
def test_a_thousand_half_open_connections_keep_nobody_out(
    course: Course, data: bytes
) -> None:
    username = course.students[3]
    port = int(course.rows()[username]["port"])
    assert log_in_page(course, username) == 200
    with contextlib.ExitStack() as stack:
        for each in (course.port, port):
            half_open(stack, each, 1000, data)
        page = fetch(course.url, context=course.context())
        assert page.status == 200
        assert log_in_page(course, username) == 200
    assert log_in_page(course, username) == 200


def test_a_herd_of_first_visits_is_answered_through_the_page(
    make_course: CourseMaker,
) -> None:
    """Each waits for a page that says so, or for nothing at all."""
    course = make_course(12, on_demand="yes")
    course.check("setup")
    course.launch().wait_ready()
    context = course.context()

    def visit(username: str) -> int:
        def leads_there() -> str:
            response = fetch(f"{course.url}{username}", context=context)
            if response.status == 503:
                assert "is being started" in response.text
                assert response.headers["Refresh"] == "1"
                return ""
            assert response.status == 302
            return response.headers["Location"]

        address = wait_until(leads_there, 60, "the way to the notebook")
        return fetch(f"{address}login", context=context).status

    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(visit, course.students)] == [200] * 12


def test_a_visitor_of_a_server_that_hangs_sees_a_page_that_says_so(
    course: Course, launch: Launch
) -> None:
    username = course.students[4]
    assert log_in_page(course, username) == 200
    server = course.server(username)
    server.suspend()
    try:
        response = fetch(f"{course.url}{username}", context=course.context())
        assert response.status == 503
        assert "Your notebook is being started" in response.text
    finally:
        server.resume()
    response = fetch(f"{course.url}{username}", context=course.context())
    assert response.headers["Location"] == course.notebook_url(username)


def test_a_list_that_cannot_be_written_does_not_keep_launch_from_running(
    make_course: CourseMaker,
) -> None:
    course = make_course(1)
    course.check("setup")
    before = course.user_list.read_bytes()
    disk = course.directory / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=16k", "tmpfs"]
    subprocess.run(["mount", "--no-mtab", *options, disk], check=True)
    try:
        user_list = Path(shutil.copy(course.user_list, disk))
        with contextlib.suppress(OSError):
            (disk / "filling").write_bytes(bytes(20000))
        with contextlib.suppress(OSError):
            (disk / "more").write_bytes(bytes(4096))
        course.configure(user_list=user_list)
        launch = course.launch().wait_ready()
        assert "the ports could not be written: No space left" in launch.output
        assert user_list.read_bytes() == before
        url = f"https://localhost:{course.port + 1}/{course.students[0]}/login"
        assert fetch(url, context=course.context()).status == 200
        assert launch.stop() == 0
    finally:
        kill_all(course.processes, "the servers")
        subprocess.run(["umount", disk], check=True)


def test_a_full_home_keeps_what_was_saved_and_its_server_running(
    make_course: CourseMaker,
) -> None:
    """Nothing can be saved and nothing logged, and that is all."""
    course = make_course(1, on_demand="yes")
    course.check("setup")
    (username,) = course.students
    account = pwd.getpwnam(username)
    options = f"size=200k,mode=0700,uid={account.pw_uid},gid={account.pw_gid}"
    mount = ["mount", "--no-mtab", "-t", "tmpfs", "-o", options, "tmpfs"]
    subprocess.run([*mount, account.pw_dir], check=True)
    filling = Path(account.pw_dir, "filling")
    text = {"type": "file", "format": "text", "content": "saved"}
    try:
        launch = course.launch().wait_ready()
        notebook = course.notebook(username)
        notebook.api("PUT", "contents/file.txt", text)
        run_as(username, "sh", "-c", "yes >filling")
        longer = json.dumps({**text, "content": "longer " * 10000})
        assert notebook.fetch("api/contents/file.txt", "PUT", longer).status == 500
        for _ in range(200):
            assert notebook.fetch("no-such-page").status == 404  # each is logged
        course.server(username).kill()
        notebook = course.notebook(username)
        assert notebook.api("GET", "contents/file.txt")["content"] == "saved"
        filling.unlink()
        notebook.api("PUT", "contents/file.txt", {**text, "content": "again"})
        assert notebook.api("GET", "contents/file.txt")["content"] == "again"
        assert launch.output.count("started") == 2
    finally:
        kill_all(course.processes, "the server")
        subprocess.run(["umount", "--no-mtab", account.pw_dir], check=True)


def test_too_few_open_files_are_refused_with_what_to_set(
    make_course: CourseMaker,
) -> None:
    course = make_course(2)
    course.check("setup")
    limit = "ulimit -n 100; exec setpriv --bounding-set -sys_resource"
    command = f"{limit} {sys.executable} {NOTEBOOKS} launch {course.config}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert "2 students need 262 open files, only 100 are allowed" in done.stderr
    assert "ulimit -n 262" in done.stderr


def test_many_students_get_the_open_files_that_they_need(
    make_course: CourseMaker,
) -> None:
    course = make_course(20, on_demand="yes")
    course.check("setup")
    command = f"ulimit -Sn 100; exec {sys.executable} {NOTEBOOKS} launch {course.config}"
    launch = subprocess.Popen(
        ["sh", "-c", command], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    try:
        for username in (course.students[0], course.students[-1]):
            wait_until(lambda: answers(course, username), 30, "an answer")
        soft, _ = psutil.Process(launch.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert soft >= 256 + 3 * 20
    finally:
        launch.terminate()
        launch.wait()


def answers(course: Course, username: str) -> bool:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return log_in_page(course, username) == 200
    return False


def test_a_closed_terminal_does_not_end_launch(make_course: CourseMaker) -> None:
    """Its hang-up is a SIGHUP, and what it prints goes nowhere."""
    course = make_course(1, on_demand="yes")
    course.check("setup")
    master, slave = os.openpty()
    launch = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, NOTEBOOKS, "launch", course.config],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**ENVIRONMENT, "TERM": "xterm"},
    )
    os.close(slave)
    try:
        shown = b""
        while b"Ready: " not in shown:
            shown += os.read(master, 4096)
        os.close(master)
        assert answers(course, course.students[0])
        course.server(course.students[0]).kill()
        assert answers(course, course.students[0])
        time.sleep(2)
        assert launch.poll() is None
        assert answers(course, course.students[0])
    finally:
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(10) == 0


def test_a_student_who_stops_their_starting_server_holds_nobody_up(
    course: Course, launch: Launch
) -> None:
    """As many as start at once may be stopped: the others go on after a moment."""
    script = KILL_SERVERS.replace("SIGKILL", "SIGSTOP")
    stopped, other = course.students[4], course.students[5]
    course.server(stopped).kill()
    prefix = f"{notebooks.SERVER_TITLE}{stopped}"
    run_as(stopped, "true")
    with subprocess.Popen(
        [sys.executable, "-c", script, prefix],
        user=stopped,
        group=stopped,
        extra_groups=[],
        env=ENVIRONMENT,
    ) as stopper:
        try:
            with contextlib.suppress(OSError):
                log_in_page(course, stopped, 1)
            assert log_in_page(course, other) == 200
        finally:
            stopper.kill()
    for server in course.servers(stopped):
        server.resume()
    assert log_in_page(course, stopped) == 200
