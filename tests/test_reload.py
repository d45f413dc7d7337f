"""Changes while `launch` runs: late students, students who left, new settings."""

import pwd
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import notebooks
from support import (
    Course,
    Launch,
    LogInRefused,
    Notebook,
    fetch,
    held,
    is_ours,
    make_certificate,
    wait_until,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 3, web_title="First") as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


def reload(launch: Launch) -> str:
    """Send SIGHUP and return what is said of it."""
    return said_after(launch, lambda: launch.process.send_signal(signal.SIGHUP))


def said_after(launch: Launch, action: Callable[[], object]) -> str:
    before = len(launch.output)
    action()

    def said() -> str:
        text = launch.output[before:]
        return text if "eloaded: " in text and text.endswith("\n") else ""

    return wait_until(said, 20, "a reload")


def landing_page(course: Course) -> str:
    return fetch(course.url, context=course.context()).text


def test_setup_brings_a_late_student_into_a_launch_that_runs(
    course: Course, launch: Launch
) -> None:
    before = {name: course.server(name) for name in course.students}
    notebook = course.notebook(course.students[0])
    notebook.execute("kept = 42")
    late = f"{course.students[0]}late"
    rows = list(course.rows().values())
    course.write_students([*rows, {"username": late, "name": "Late"}])
    course.students.append(late)
    said = said_after(launch, lambda: course.check("setup"))
    assert "Reloaded: 1 student came, 0 left." in said
    wait_until(lambda: course.servers(late), 20, "the late student's server")
    course.notebook(late)
    assert int(course.rows()[late]["port"]) == course.port + 4
    assert f'href="/{late}"' in landing_page(course)
    address = fetch(f"{course.url}{late}", context=course.context()).headers["Location"]
    assert address == course.notebook_url(late)
    assert {name: course.server(name) for name in before} == before
    assert notebook.execute("kept") == "42"


def test_a_student_who_left_the_list_loses_server_and_port(
    course: Course, launch: Launch
) -> None:
    gone, stays = course.students[-1], course.students[0]
    course.notebook(gone).execute("1")
    port = int(course.rows()[gone]["port"])
    others = course.server(stays)
    rows = course.rows()
    course.write_students(row for name, row in rows.items() if name != gone)
    assert "Reloaded: 0 students came, 1 left." in reload(launch)
    assert course.servers(gone) == []
    assert not [x for x in course.processes() if x.username() == gone]
    with pytest.raises(ConnectionRefusedError):
        fetch(f"https://localhost:{port}/")
    assert f'href="/{gone}"' not in landing_page(course)
    assert course.server(stays) == others
    course.write_students(rows.values())
    assert "Reloaded: 1 student came, 0 left." in reload(launch)
    course.notebook(gone)


def test_a_bad_list_or_configuration_changes_nothing(
    course: Course, launch: Launch
) -> None:
    before = {name: course.server(name) for name in course.students}
    rows = list(course.rows().values())
    course.write_students([*rows, {"username": "../x"}, rows[0]])
    said = reload(launch)
    assert "not reloaded: " in said and "line 6: '../x'" in said
    assert "line 7: the name" in said
    course.write_students(rows)
    text = course.config.read_text()
    course.config.write_text(text.replace("web_title", "wb_title"))
    assert "did you mean `web_title`" in reload(launch)
    course.config.write_text(text)
    assert {name: course.server(name) for name in course.students} == before
    assert "<title>First</title>" in landing_page(course)


def test_a_reload_waits_until_nobody_else_works_with_the_list(
    course: Course, launch: Launch
) -> None:
    gone = course.students[-1]
    rows = course.rows()
    course.write_students(row for name, row in rows.items() if name != gone)
    before = launch.output
    with held(course):
        launch.process.send_signal(signal.SIGHUP)
        time.sleep(2.5)
        assert course.servers(gone)
    wait_until(lambda: "0 students came, 1 left." in launch.output, 20, "a reload")
    assert "not reloaded" not in launch.output.removeprefix(before)
    course.write_students(rows.values())
    reload(launch)


def test_settings_count_at_once_where_they_can(course: Course, launch: Launch) -> None:
    server = course.server(course.students[0])
    webserver = launch.helper("webserver")
    course.configure(web_title="Second", list_students="no")
    reload(launch)
    wait_until(lambda: "Second" in landing_page(course), 10, "the new title")
    assert 'href="/nbt' not in landing_page(course)
    course.configure(web_title="First", list_students="yes", port=course.port + 1)
    assert "another `port` counts from the next launch" in reload(launch)
    course.configure(port=course.port)
    assert launch.helper("webserver") == webserver
    assert course.server(course.students[0]) == server


def served(course: Course, port: int) -> str:
    """Return the certificate that a new connection sees, in PEM format."""
    return ssl.get_server_certificate(("localhost", port))


def test_a_renewed_certificate_reaches_all_that_runs(
    course: Course, launch: Launch, tmp_path: Path
) -> None:
    """The page, servers, an open tab, and what starts later; nothing ends for it."""
    first, second = course.students[:2]
    ports = [course.port, *(int(course.rows()[x]["port"]) for x in (first, second))]
    processes = [launch.helper("webserver"), *map(course.server, (first, second))]
    notebook = course.notebook(first)
    request = notebook.submit("import time; time.sleep(4); print('computed')")
    old = {served(course, port) for port in ports}

    (course.directory / "notebooks.pem").unlink()
    reload(launch)
    new = (course.directory / "notebooks.pem").read_text()
    wait_until(lambda: {served(course, x) for x in ports} - old, 10, "the new certificate")
    wait_until(lambda: len({served(course, x) for x in ports}) == 1, 10, "it everywhere")
    shown = served(course, ports[0])
    assert shown in new and shown not in old
    *_, authority = re.findall("Fingerprint of its authority, .*: (.*)", launch.output)
    page = fetch(f"{course.url}-certificate", context=course.context()).text
    assert authority in page
    assert [launch.helper("webserver"), *map(course.server, (first, second))] == processes
    assert notebook.output_of(request) == "computed"
    notebook.context = course.context()
    notebook.api(
        "PUT", "contents/saved.txt", {"type": "file", "format": "text", "content": ""}
    )

    processes[2].kill()
    wait_until(lambda: not is_ours(processes[2]), 10, "its end")
    assert (
        fetch(f"{course.notebook_url(second)}login", context=course.context()).status == 200
    )
    # One of the teacher's, with another kind of key.
    cert, key = make_certificate(tmp_path, key="rsa")
    course.configure(cert_file=cert, key_file=key)
    reload(launch)
    for port in ports:
        wait_until(lambda x=port: served(course, x) in cert.read_text(), 10, "that")  # type: ignore[misc]
    course.configure(cert_file="", key_file="")
    reload(launch)
    assert "keeps the old certificate" not in launch.output


def test_a_server_of_an_earlier_launch_gets_the_certificate_of_the_next(
    make_course: Callable[..., Course],
) -> None:
    course = make_course(2)
    course.check("setup")
    launch = course.launch().wait_ready()
    launch.stop()
    (course.directory / "notebooks.pem").unlink()
    servers = [*map(course.server, course.students)]
    servers[1].suspend()
    Path(
        notebooks.CONTROL_DIR, str(int(course.rows()[course.students[1]]["port"]))
    ).unlink()
    later = course.launch().wait_ready()
    # As one of an earlier version, which has made no socket for certificates.
    words = f"keep their certificate until shutdown: {course.students[1]}\n"
    assert later.output.count(words) == 1
    servers[1].resume()
    new = (course.directory / "notebooks.pem").read_text()
    port = int(course.rows()[course.students[0]]["port"])
    wait_until(lambda: served(course, port) in new, 10, "the new certificate")
    assert [*map(course.server, course.students)] == servers


def test_no_student_gives_a_server_a_certificate(course: Course) -> None:
    """Its socket is behind a directory of root's."""
    username = course.students[0]
    path = f"{notebooks.CONTROL_DIR}/{course.rows()[username]['port']}"
    connect = f"import socket; socket.socket(1, 5).connect({path!r})"
    as_student = ["setpriv", "--reuid", username, "--regid", username, "--init-groups"]
    command = [*as_student, "/usr/bin/python3", "-c", connect]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PermissionError" in done.stderr
    subprocess.run(command[len(as_student) :], check=True)
    before = served(course, int(course.rows()[username]["port"]))
    assert before == served(course, course.port)


def test_a_webserver_that_starts_again_comes_with_the_renewed_certificate(
    course: Course, launch: Launch
) -> None:
    launch.helper("webserver").kill()
    (course.directory / "notebooks.pem").unlink()
    reload(launch)
    assert fetch(course.url, context=course.context()).status == 200


def test_a_new_password_counts_from_the_next_start(course: Course, launch: Launch) -> None:
    username = course.students[1]
    rows = course.rows()
    old, tab = rows[username]["nb-pass"], Notebook(course.notebook_url(username))
    tab.log_in(old)  # its server may have an older certificate
    rows[username]["nb-pass"] = ""
    course.write_students(rows.values())
    said_after(launch, lambda: course.check("setup"))
    assert course.rows()[username]["nb-pass"] not in ("", old)
    server = course.server(username)
    server.kill()
    wait_until(lambda: not is_ours(server), 10, "its end")
    course.notebook(username)
    assert tab.fetch("api/contents").status == 403
    with pytest.raises(LogInRefused):
        Notebook(course.notebook_url(username), course.context()).log_in(old)


def test_who_visits_while_remove_works_has_nothing_reported(
    course: Course, launch: Launch
) -> None:
    """Their account is closed first. What somebody else has closed is named."""
    username = course.students[1]
    before = len(launch.output)
    expire = ["usermod", username, "--expiredate"]
    with notebooks.host_locked():
        subprocess.run([*expire, "1"], check=True)
        course.server(username).kill()
        with socket.create_connection(("localhost", int(course.rows()[username]["port"]))):
            time.sleep(notebooks.RELOAD_SECONDS + 3)
    said = launch.output[before:]
    assert said.splitlines() == [f"notebooks.py: {username}: stopped"]
    closed = f"{username}: the account does not exist, or is closed; run setup"
    wait_until(lambda: closed in launch.output, notebooks.RELOAD_SECONDS + 5, closed)
    subprocess.run([*expire, ""], check=True)
    course.notebook(username)


def test_remove_takes_students_out_of_a_launch_that_runs(
    course: Course, launch: Launch
) -> None:
    """And one who is made anew afterwards, with the old name, is served again."""
    username = course.students[2]
    uid = pwd.getpwnam(username).pw_uid
    rows = course.rows()
    course.write_students([rows[username]])
    said = said_after(launch, lambda: course.check("remove", "--yes"))
    assert "Reloaded: 0 students came, " in said
    never = f"{username}never"
    course.write_students([*course.rows().values(), {"username": never}])
    said += reload(launch)
    assert f"{never}: has no account; run setup first" in said
    assert f"{username}: " not in said.replace(f"{username}: stopped", "")
    assert all(x.uids().real != uid for x in psutil.process_iter(["uids"]))
    assert not (notebooks.RUNTIME_DIR / str(uid)).exists()
    subprocess.run(["useradd", "--create-home", username], check=True)  # another uid
    course.write_students(rows.values())
    said_after(launch, lambda: course.check("setup"))
    course.notebook(username)
    assert launch.process.poll() is None
