"""`launch` and `shutdown`: what runs when, who has the ports, what ends, what stays."""

import asyncio
import contextlib
import os
import pwd
import re
import signal
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
    Course,
    Launch,
    fetch,
    is_ours,
    processes_of,
    run_as,
    run_on_terminal,
    title_of,
    wait_until,
)

root = pytest.mark.root
TEXT = {"type": "file", "format": "text", "content": "typed before"}

# ---------------------------------------------------------------------------------------
# Which port is whose
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "assigned"),
    [
        (["", "", ""], [101, 102, 103]),
        (["103", "", ""], [103, 101, 102]),
        (["102", "103", "101"], [102, 103, 101]),
        (["102", "102", ""], [101, 102, 103]),  # not unique: whose it was is not known
        (["100", "104", "8"], [101, 102, 103]),  # the page's, above and below the range
        (["", "101", "65535"], [102, 101, 103]),
    ],
)
def test_ports_are_kept_where_unique_and_in_range_else_the_lowest_free(
    listed: list[str], assigned: list[int]
) -> None:
    students = [
        notebooks.Student(i, f"student{i}", "", "", "", "", port)
        for i, port in enumerate(listed)
    ]
    ports = notebooks.assign_ports(students, 100)
    assert [ports[student.username] for student in students] == assigned


def test_the_delay_after_failures_doubles_up_to_a_minute() -> None:
    delays, now = [0.0], time.monotonic()
    for _ in range(5000):
        delays.append(notebooks.restart_delay(delays[-1], now))
    assert delays[1:9] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delays[-1] == 60
    assert notebooks.restart_delay(60, now - 61) == 1


# ---------------------------------------------------------------------------------------
# A launch that goes on, whatever is killed
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """Two students; each test may end what runs."""
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        course.check("setup")
        course.check("send")
        yield course


@pytest.fixture
def launch(course: Course) -> Launch:
    """A launch that runs and is ready."""
    for launch in course.launches[-1:]:
        if launch.process.poll() is None:
            return launch
    return course.launch().wait_ready()


def answers(course: Course, username: str) -> bool:
    """Say whether a single request is answered, which none may refuse meanwhile."""
    url = course.notebook_url(username) + "login"
    return fetch(url, context=course.context()).status == 200


def server_pids(course: Course) -> dict[str, int]:
    return {username: course.server(username).pid for username in course.students}


def listening_ports(pid: int) -> set[int]:
    return {
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def ports_of(course: Course) -> set[int]:
    return {int(row["port"]) for row in course.rows().values()}


@root
def test_launch_tells_what_the_teacher_has_to_know(course: Course, launch: Launch) -> None:
    first, last = course.port, course.port + 2
    assert "2 of 2 notebook servers run." in launch.output
    assert f"TCP ports {first}-{last}." in launch.output
    assert re.search(rf"^Ready: https://\S+:{first}/$", launch.output, re.MULTILINE)
    assert re.search(r"\(SHA-256\): ([0-9A-F]{2}:){31}[0-9A-F]{2}$", launch.output, re.M)
    assert ports_of(course) == {first + 1, last}


@root
def test_the_launcher_holds_all_ports(course: Course, launch: Launch) -> None:
    assert listening_ports(launch.pid) == {course.port, *ports_of(course)}
    assert listening_ports(launch.helper("template process").pid) == set()
    assert listening_ports(launch.helper("webserver").pid) == {course.port}
    for username, row in course.rows().items():
        assert listening_ports(course.server(username).pid) == {int(row["port"])}


@root
def test_a_second_launch_is_refused_while_one_runs(course: Course, launch: Launch) -> None:
    before = server_pids(course)
    done = course.run("launch")
    assert done.returncode == 2
    assert f"launch runs already (pid {launch.pid})" in done.stderr
    assert server_pids(course) == before
    assert fetch(course.url, context=course.context()).status == 200


@root
def test_sigterm_leaves_the_notebooks_running_and_the_next_launch_adopts_them(
    course: Course, launch: Launch
) -> None:
    notebook = course.notebook(course.students[0])
    notebook.execute("kept = 42")
    before = server_pids(course)
    helpers = psutil.Process(launch.pid).children()
    assert launch.stop(signal.SIGTERM, seconds=2) == 0
    assert "Notebook servers that run on: 2." in launch.output
    assert not [process for process in helpers if is_ours(process)]
    with pytest.raises(ConnectionRefusedError):
        fetch(course.url)
    assert all(answers(course, username) for username in course.students)
    assert notebook.execute("kept") == "42"
    second = course.launch("-v").wait_ready()
    assert server_pids(course) == before
    assert second.output.count("adopted") == 2
    assert listening_ports(second.pid) == {course.port, *ports_of(course)}
    assert notebook.execute("kept") == "42"
    revive(course, course.students[0])


def revive(course: Course, username: str) -> None:
    """Kill a server and see that the next visitors, all at once, are answered."""
    server, port = course.server(username), course.rows()[username]["port"]
    server.kill()
    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(answers, [course] * 10, [username] * 10))
    new = course.server(username)
    assert new.pid != server.pid
    assert course.rows()[username]["port"] == port
    course.notebook(username)  # the password is still good


@root
def test_a_killed_server_comes_back_at_the_next_connection(
    course: Course, launch: Launch
) -> None:
    revive(course, course.students[0])
    killed = f"{course.students[0]}: the server was ended by signal 9 (Killed); its log is"
    assert killed in launch.output, "nobody knows why"


@root
def test_an_open_tab_saves_and_computes_after_its_server_was_started_again(
    make_course: CourseMaker,
) -> None:
    course = make_course(1, on_demand="yes")
    (username,) = course.students
    course.check("setup")

    def end_server() -> None:
        course.server(username).kill()

    def end_lesson() -> None:
        assert course.launches[-1].stop() == 0
        course.check("shutdown")
        course.launch().wait_ready()

    course.launch().wait_ready()
    tab = course.notebook(username)
    for end in (end_server, end_lesson):
        tab.execute("1")
        end()
        tab.api("PUT", "contents/kept.txt", TEXT)
        tab.kernel_channels = None
        assert tab.execute("6 * 7") == "42"


@root
def test_a_server_may_end_by_any_signal(course: Course, launch: Launch) -> None:
    username = course.students[0]
    template = launch.helper("template process")
    run_as(username, "kill", "-37", course.server(username).pid, check=True)
    assert answers(course, username)
    assert f"{username}: the server was ended by signal 37" in launch.output
    assert launch.helper("template process") == template
    assert "Traceback" not in launch.output


@root
def test_a_server_that_its_student_ends_comes_back(course: Course, launch: Launch) -> None:
    username = course.students[0]
    notebook, server = course.notebook(username), course.server(username)
    notebook.api("POST", "shutdown")
    wait_until(lambda: not is_ours(server), 20, "the end of the server")
    assert answers(course, username)


@root
def test_a_killed_template_is_replaced(course: Course, launch: Launch) -> None:
    template = launch.helper("template process")
    template.kill()
    revive(course, course.students[1])
    assert launch.helper("template process").pid != template.pid
    assert "the template ended; starting it again" in launch.output


@root
def test_a_killed_webserver_is_replaced(course: Course, launch: Launch) -> None:
    webserver = launch.helper("webserver")
    webserver.kill()
    assert fetch(course.url, context=course.context()).status == 200
    assert launch.helper("webserver").pid != webserver.pid


@root
def test_a_killed_launcher_takes_its_helpers_along_and_leaves_the_notebooks(
    course: Course, launch: Launch
) -> None:
    before = server_pids(course)
    helpers = [launch.helper("template process"), launch.helper("webserver")]
    launch.stop(signal.SIGKILL)
    wait_until(lambda: not any(map(is_ours, helpers)), 5, "the end of the helpers")
    assert all(answers(course, username) for username in course.students)
    course.launch().wait_ready()
    assert server_pids(course) == before


@root
def test_two_courses_are_launched_at_the_same_time(make_course: CourseMaker) -> None:
    courses = [make_course(1) for _ in range(2)]
    for course in courses:
        course.check("setup")
    launches = [course.launch() for course in courses]
    for course, launch in zip(courses, launches):
        launch.wait_ready()
        assert answers(course, course.students[0])


def test_a_task_that_survives_being_cancelled_is_cancelled_again() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    async def end_it() -> bool:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await asyncio.wait_for(notebooks.end_tasks([task]), 10)
        return task.cancelled()

    assert asyncio.run(end_it())


TAKE_PORT = """
import itertools, os, signal, socket, sys, time
pid, *ports = map(int, sys.argv[1:])
addresses = ("127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1")
options = [set(), {socket.SO_REUSEADDR}, {socket.SO_REUSEPORT}]
options.append(options[1] | options[2])
tried, taken = 0, set()
os.kill(pid, signal.SIGKILL)
start = time.monotonic()
visited = False
while time.monotonic() < start + 1.5:
    for port, address, chosen in itertools.product(ports, addresses, options):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as each:
            try:
                for option in chosen:
                    each.setsockopt(socket.SOL_SOCKET, option, 1)
                each.bind((address, port))
                each.listen()
                taken.add(port)
            except OSError:
                tried += 1
    if not visited and time.monotonic() > start + 0.3:
        visited = socket.create_connection(("localhost", ports[0]))
print(tried, *taken)
"""


@root
def test_no_student_takes_a_port_of_the_course(course: Course, launch: Launch) -> None:
    username = course.students[0]
    server = course.server(username)
    own = int(course.rows()[username]["port"])
    free = course.port + 4
    ports = [own, *({course.port, *ports_of(course)} - {own}), free]
    done = run_as(username, sys.executable, "-c", TAKE_PORT, server.pid, *ports)
    tried, *taken = map(int, done.stdout.split())
    assert taken == [free]  # it would work with any that is free
    assert tried > 1000
    assert answers(course, username)
    assert course.server(username).pid != server.pid


@root
def test_a_terminal_shows_what_runs_in_one_line(make_course: CourseMaker) -> None:
    course = make_course(2)
    course.check("setup")
    on_a_pipe = course.launch().wait_ready()
    on_a_pipe.stop()
    course.check("shutdown")
    said = on_a_pipe.output
    assert all(f"{username}: started" in said for username in course.students)
    assert "students hold" not in said
    with run_on_terminal("launch", course.config) as terminal:
        terminal.expect_exact("Ready: https://")
        terminal.expect(r"2 running, 0 starting, 0 stopped, 0 failed")
        terminal.expect(r"students hold [1-9][0-9.]* MB; load [0-9.]+")
        course.server(course.students[0]).kill()
        terminal.expect_exact(
            f"{course.students[0]}: the server was ended by signal 9 (Killed)"
        )
        terminal.expect("1 running, 0 starting, 1 stopped, 0 failed")
        terminal.sendintr()
        terminal.expect_exact("Notebook servers that run on: 1.")
        terminal.expect_exact(terminal.delimiter)
    assert terminal.exitstatus == 0


# ---------------------------------------------------------------------------------------
# Students whose server cannot start
# ---------------------------------------------------------------------------------------


@root
def test_who_cannot_be_served_is_named_and_the_others_go_on(
    make_course: CourseMaker,
) -> None:
    course = make_course(7)
    course.check("setup")
    course.check("send")
    fine, gone, closed, full, file, link, missing = course.students
    subprocess.run(["rm", "-r", course.home(gone)], check=True)
    course.home(closed).chmod(0)
    for username in (file, link):
        subprocess.run(["rm", "-r", course.home(username) / "course"], check=True)
    (course.home(file) / "course").mkdir()
    (course.home(file) / "course/material").write_text("no directory")
    (course.home(link) / "course").symlink_to("/etc")
    subprocess.run(["userdel", "--remove", missing], check=True, capture_output=True)
    with full_home(course, full):
        launch = course.launch().wait_ready()
        for username in (fine, full, file, link):
            assert answers(course, username)
            assert f"{username}: started" in launch.output
        failed = f"{closed}: the server did not start, it ended: .*Permission denied"
        assert re.search(failed, launch.output)
        assert f"{gone}: {course.home(gone)} is missing; run setup" in launch.output
        assert f"{missing}: has no account" in launch.output
        assert "4 of 6 notebook servers run." in launch.output
        assert course.notebook(full).execute("6 * 7") == "42"
        assert course.notebook(link).api("GET", "contents")["type"] == "directory"
        course.home(closed).chmod(0o700)
        assert answers(course, closed)  # a visit tries again
        assert launch.stop() == 0, "a service that was told to end has not failed"


@contextlib.contextmanager
def full_home(course: Course, username: str) -> Iterator[None]:
    """Leave no room for a single byte in a student's home."""
    account, home = pwd.getpwnam(username), course.home(username)
    options = f"size=64k,mode=0700,uid={account.pw_uid},gid={account.pw_gid}"
    command = ["mount", "--no-mtab", "-t", "tmpfs", "-o", options, "tmpfs", str(home)]
    subprocess.run(command, check=True)
    try:
        run_as(username, "sh", "-c", "cat /dev/zero >filling")
        yield
    finally:
        for process in processes_of([username]):
            process.kill()
        subprocess.run(["umount", "--no-mtab", "--lazy", home], check=True)


# ---------------------------------------------------------------------------------------
# Starting on demand, and ports that others hold
# ---------------------------------------------------------------------------------------

SQUAT = """
import socket, sys, time
open("/proc/self/comm", "w").write(sys.argv[2])
with socket.create_server(("127.0.0.1", int(sys.argv[1]))):
    print("ready", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def squatter(username: str, port: int, title: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of a user's that listens on a port and pretends to be another."""
    with subprocess.Popen(
        [title, "-c", SQUAT, str(port), title],
        executable=sys.executable,
        stdout=subprocess.PIPE,
        text=True,
        user=username,
        group=pwd.getpwnam(username).pw_gid,
        extra_groups=[],
        env=ENVIRONMENT,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def pretend(username: str) -> str:
    return f"{notebooks.SERVER_TITLE}{username}"


@root
def test_what_holds_a_port_cannot_write_on_the_teachers_terminal(
    course: Course,
) -> None:
    username, port = course.students[0], course.port + 5
    with squatter(username, port, "\033[2J\nforged") as process:
        described = notebooks.describe_holder(port)
    assert described == f"?[2J?forged (pid {process.pid}, user {username})"


@root
def test_a_taken_port_is_named_and_its_student_gets_one_above_the_range(
    make_course: CourseMaker,
) -> None:
    """What holds it is not adopted, though ps shows it as that student's server."""
    course = make_course(3, on_demand="yes")
    course.check("setup")
    first, second, _ = course.students
    port = course.port + 1
    course.write_students(
        {**row, "port": str(course.port + 3) if username == first else ""}
        for username, row in course.rows().items()
    )
    with squatter(second, port, pretend(second)) as process:
        launch = course.launch().wait_ready()
        held = f"{second}: port {port} is held by {pretend(second)[:15]}"
        assert held in launch.output
        assert f"(pid {process.pid}, user {second}); using {port + 3}" in launch.output
        ports = [int(row["port"]) - course.port for row in course.rows().values()]
        assert ports == [3, 4, 2]
        assert f"TCP ports {course.port}-{port + 3}." in launch.output
        assert "0 of 3 notebook servers run." in launch.output
        assert [each.pid for each in course.processes()] == [process.pid]
        assert answers(course, second)  # the first visit starts it, and no other
        assert len(course.processes()) == 2
        check_adoption_above_the_range(course, launch, second)


def check_adoption_above_the_range(course: Course, launch: Launch, username: str) -> None:
    (before,) = {x.pid for x in course.servers(username) if listening_ports(x.pid)}
    rows = course.rows()
    assert launch.stop() == 0
    launch = course.launch().wait_ready()
    assert "1 of 3 notebook servers run." in launch.output
    assert psutil.pid_exists(before)
    assert course.rows() == rows
    assert answers(course, username)


# ---------------------------------------------------------------------------------------
# shutdown
# ---------------------------------------------------------------------------------------

STUBBORN = "trap '' TERM HUP INT; while :; do sleep 1; done"


@root
def test_shutdown_ends_all_that_is_jupyters_and_nothing_else(
    make_course: CourseMaker,
) -> None:
    """Also kernels and programs in terminals that ignore signals, and orphans."""
    course = make_course(3)
    course.check("setup")
    launch = course.launch().wait_ready()
    for username in course.students:
        notebook = course.notebook(username)
        notebook.execute("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        if username != course.students[-1]:
            notebook.execute_in_terminal(f"bash -c {STUBBORN!r} & disown")
        run_as(username, "sh", "-c", "setsid --fork sleep 1000 >/dev/null 2>&1")
    assert launch.stop() == 0
    orphan = [x for x in course.processes() if "ipykernel" in title_of(x)][-1]
    course.server(course.students[-1]).kill()
    assert is_ours(orphan)
    start = time.monotonic()
    course.check("shutdown")
    assert time.monotonic() - start < 2 * notebooks.GRACE_SECONDS
    left = [title_of(process) for process in course.processes()]
    assert left == ["sleep 1000"] * 3
    for username in course.students:
        runtime_dir = notebooks.RUNTIME_DIR / str(pwd.getpwnam(username).pw_uid)
        assert not runtime_dir.exists()


@contextlib.contextmanager
def starts_held_up(launch: Launch, call: str, seconds: float) -> Iterator[None]:
    """Have each server that starts wait so long before a system call of its own."""
    inject = f"inject={call}:delay_enter={int(seconds * 1e6)}"
    template = launch.helper("template process")
    command = ["strace", "-f", "-qq", "-e", inject, "-o", "/dev/null", "-p"]
    with subprocess.Popen([*command, str(template.pid)], env=ENVIRONMENT) as strace:
        status = Path(f"/proc/{template.pid}/status")
        traced = f"TracerPid:\t{strace.pid}\n"
        wait_until(lambda: traced in status.read_text(), 10, "strace")
        try:
            yield
        finally:
            strace.terminate()


def root_forks(launch: Launch) -> set[psutil.Process]:
    forks = set()
    for child in launch.helper("template process").children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.match("notebooks.py: [tn]", title_of(child)) and child.uids().real == 0:
                forks.add(child)
    return forks


def starting(launch: Launch) -> set[psutil.Process]:
    """Return the servers that are held up: others have gone on at a second look."""
    forks = root_forks(launch)
    time.sleep(0.3)
    return forks & root_forks(launch)


@root
@pytest.mark.parametrize(
    ("call", "end"),
    [
        ("pidfd_open", "shutdown"),
        ("setresuid", "shutdown --everything"),
        ("setresuid", "remove --yes"),
    ],
)
def test_a_server_that_is_not_its_students_yet_outlives_no_command(
    make_course: CourseMaker, call: str, end: str
) -> None:
    course = make_course(1)
    course.check("setup")
    launch = course.launch()
    with starts_held_up(launch, call, 3):
        held_up = wait_until(lambda: starting(launch), 30, "a start")
        course.check(*end.split())
        assert not any(map(is_ours, held_up))


@root
def test_shutdown_names_a_start_that_does_not_go_on(make_course: CourseMaker) -> None:
    course = make_course(2)
    course.check("setup")
    launch = course.launch()
    with starts_held_up(launch, "setresuid", 60):
        held_up = wait_until(lambda: starting(launch), 30, "a start")
        done = course.run("shutdown")
        launch.wait_ready()
        assert "0 of 2 notebook servers run, 2 still starting.\n" in launch.output
    stuck = "a server that is starting: pid {} does not go on"
    assert done.returncode == 1
    assert any(stuck.format(each.pid) in done.stderr for each in held_up)


def test_a_fork_that_nobody_waits_for_any_more_is_ended() -> None:
    """The launcher ends, or the student leaves, between its answer and our reading it."""
    template = notebooks.Template(role="template", course=Path())
    ours, theirs = notebooks.Channel.pair()
    hears, says = os.pipe()

    def answer_and_live_on(*_: object) -> None:
        os.write(2, b".")
        time.sleep(60)

    async def give_up() -> None:
        template.child = notebooks.Child(os.getpid(), ours)
        task = asyncio.create_task(template.fork(notebooks.Ready(), []))
        await asyncio.sleep(0)
        _, (fd,) = theirs.receive_message()
        notebooks.fork_on_request(fd, answer_and_live_on)
        assert os.read(hears, 1) == b"."
        await notebooks.end_tasks([task])
        assert task.cancelled()

    stderr = os.dup(2)
    os.dup2(says, 2)
    try:
        asyncio.run(give_up())
    finally:
        os.dup2(stderr, 2)
    _, wait_status = os.waitpid(-1, 0)
    assert os.waitstatus_to_exitcode(wait_status) == -signal.SIGKILL
    for fd in (stderr, says, hears):
        os.close(fd)
    for each in (ours, theirs):
        each.close()


@root
def test_shutdown_tells_of_a_launch_that_still_runs(course: Course, launch: Launch) -> None:
    done = course.run("shutdown")
    assert done.returncode == 0
    assert f"launch still runs (pid {launch.pid})" in done.stderr
    assert course.processes() == []
    assert all(answers(course, username) for username in course.students)
