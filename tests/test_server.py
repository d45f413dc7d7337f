"""A student's server: what it does for its student, and what it keeps secret."""

import base64
import contextlib
import hashlib
import io
import json
import os
import pwd
import re
import select
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

import notebooks
import support
from conftest import CourseMaker
from support import (
    ENVIRONMENT,
    NOTEBOOKS,
    ROOT,
    Course,
    Launch,
    LogInRefused,
    Notebook,
    Response,
    fetch,
    run_as,
    title_of,
)

pytestmark = pytest.mark.root

HASH = re.compile(rb"sha256:([0-9a-f]{16}):([0-9a-f]{64})")
IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAA"
    "AABJRU5ErkJggg=="
)
WELCOME = "course/material/welcome.ipynb"
KERNEL_VARIABLES = {"JPY_PARENT_PID", "JPY_SESSION_NAME", "PYDEVD_USE_FRAME_EVAL"}
TERMINAL_VARIABLES = {"JUPYTER_SERVER_ROOT", "JUPYTER_SERVER_URL", "TERM", "COLUMNS"}
TERMINAL_VARIABLES |= {"LINES", "PYXTERM_DIMENSIONS", "LS_COLORS"}


class Running(NamedTuple):
    """A course whose servers run, and all that ps could have shown meanwhile."""

    course: Course
    launch: Launch
    seen: set[bytes]


def process_texts() -> set[bytes]:
    """Return each process's command line and environment."""
    texts = set()
    for process in psutil.process_iter():
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                texts.add(Path(f"/proc/{process.pid}/{name}").read_bytes())
    return texts


@pytest.fixture(scope="module")
def teacher() -> Iterator[pwd.struct_passwd]:
    """A user who called sudo, and has an IPython profile for the course."""
    name = f"nbteacher{os.getpid()}"
    subprocess.run(["useradd", "--create-home", name], check=True)
    account = pwd.getpwnam(name)
    startup = Path(account.pw_dir, ".ipython/profile_course/startup")
    script = 'mkdir -p "$0" && echo "given = \'by the teacher\'" >"$0/00-x.py"'
    run_as(name, "sh", "-c", script, startup, check=True)
    yield account
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, teacher: pwd.struct_passwd
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("course")
    with Course(directory, 3, profile="course", idle_minutes=7) as course:
        course.check("setup", env={"SUDO_UID": str(teacher.pw_uid)})
        course.check("send")
        launch = course.launch()
        seen: set[bytes] = set()
        while launch.process.poll() is None and "Ready:" not in launch.output:
            seen |= process_texts()
        launch.wait_ready(1)
        yield Running(course, launch, seen)


@pytest.fixture(scope="module")
def course(running: Running) -> Course:
    return running.course


@pytest.fixture(scope="module")
def student(course: Course) -> str:
    return course.students[0]


@pytest.fixture(scope="module")
def notebook(course: Course, student: str) -> Notebook:
    """The first student's notebook, with a kernel."""
    notebook = course.notebook(student)
    notebook.start_kernel(path=WELCOME)
    notebook.execute("import json, os, socket, stat, subprocess; from time import sleep")
    return notebook


def shell(notebook: Notebook, command: str) -> str:
    """Return what a command prints that the kernel runs."""
    return notebook.execute(f"print(subprocess.getoutput({command!r}))")


def passwords(course: Course) -> dict[str, list[bytes]]:
    """Return the student's passwords, that for the notebook first."""
    return {
        name: [row["nb-pass"].encode(), row["sys-pass"].encode()]
        for name, row in course.rows().items()
    }


def test_a_kernel_without_a_path_runs_where_the_server_was_started(
    course: Course, student: str
) -> None:
    """As a console's does: in plain Jupyter that is the directory of the notebooks."""
    notebook = course.notebook(student)
    notebook.start_kernel()
    start_dir = course.home(student) / "course" / course.material.name
    assert notebook.execute("import os; print(os.getcwd())") == str(start_dir)
    notebook.api("DELETE", f"kernels/{notebook.kernel_id}")


def test_a_start_directory_that_is_made_again_does_not_end_kernels(
    course: Course, student: str
) -> None:
    """As by `rm -r material; git clone ...` while the server runs."""
    material = f"course/{course.material.name}"
    script = f"mv {material} away; cp -r away {material}; rm -r away"
    run_as(student, "sh", "-ec", script, check=True)
    notebook = course.notebook(student)
    for specification in ({}, {"path": WELCOME}):
        notebook.start_kernel(**specification)
        directory = str(course.home(student) / material)
        assert notebook.execute("import os; print(os.getcwd())") == directory
        notebook.api("DELETE", f"kernels/{notebook.kernel_id}")
    assert notebook.execute_in_terminal("pwd") == str(course.home(student) / material)


@pytest.mark.parametrize("closed", ["course", "course/material"])
def test_a_start_directory_that_its_student_has_closed_ends_no_server(
    make_course: CourseMaker, closed: str
) -> None:
    course = make_course(1)
    course.check("setup")
    course.check("send")
    run_as(course.students[0], "chmod", "000", closed, check=True)
    launch = course.launch().wait_ready()
    assert "1 of 1 notebook servers run." in launch.output
    course.notebook(course.students[0]).api("GET", "kernelspecs")


def test_next_weeks_material_is_there_at_once_and_last_weeks_stays(
    make_course: CourseMaker,
) -> None:
    """The root is the home; the page, kernels and terminals begin in the material."""
    course = make_course(1, root_dir="", start_page="lab", on_demand="yes")
    course.check("setup")
    course.check("send")
    course.launch().wait_ready()
    (username,) = course.students
    home, notebook = course.home(username), course.notebook(username)
    assert (
        notebook.fetch("")
        .headers["Location"]
        .startswith(f"/{username}/lab/tree/course/material")
    )
    assert '"preferredPath": "course/material"' in notebook.fetch("lab").text
    where = "import os; print(os.getcwd())"
    assert notebook.execute(where) == str(home / "course/material")
    assert notebook.execute_in_terminal("pwd") == str(home / "course/material")
    notebook.start_kernel(path="course/x.ipynb")
    assert notebook.execute(where) == str(home / "course")

    course.material.rename(course.directory / "week2")
    course.configure(material_dir="week2")
    course.check("send")
    for week in ("material", "week2"):
        assert notebook.api("GET", f"contents/course/{week}/welcome.ipynb")
        assert notebook.fetch(f"tree/course/{week}").status == 200


@pytest.mark.parametrize("state", ["missing", "a link to /etc", "a file"])
def test_a_root_that_its_student_has_replaced_is_theirs_to_read(
    make_course: CourseMaker, state: str
) -> None:
    """Root never looks at it: what the student may not read stays out of reach."""
    course = make_course(1, tutorial_dir="course", root_dir="course", on_demand="yes")
    course.check("setup")
    (username,) = course.students
    script = {
        "missing": "",
        "a link to /etc": "ln -s /etc course",
        "a file": "echo >course",
    }
    run_as(username, "sh", "-ec", f"mv course away; {script[state]}", check=True)
    launch = course.launch().wait_ready()
    notebook = course.notebook(username)
    names = {entry["name"] for entry in notebook.api("GET", "contents")["content"]}
    assert ("passwd" if "/etc" in state else "away") in names
    assert notebook.fetch("api/contents/shadow").status >= 400
    assert notebook.fetch("").headers["Location"].startswith(f"/{username}/tree")
    assert notebook.execute("1 + 1") == "2"
    assert "Traceback" not in launch.output


# Searches its session keyring for a key: keyctl(2), KEYCTL_SEARCH.
FIND_KEY = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
found = libc.syscall({number}, 10, -3, b"user", b"teacher", 0) > 0
"""
# Executes its arguments in a new session keyring that has this key: add_key(2).
WITH_KEY = f"""
{FIND_KEY}
import os, sys
libc.syscall({{number}}, 1, None, 0, 0, 0)
libc.syscall({{number}} - 2, b"user", b"teacher", b"secret", 6, -3)
{FIND_KEY}
assert found
os.execv(sys.executable, [sys.executable, {{script!r}}, *sys.argv[1:]])
"""


def test_a_student_gets_no_key_of_who_launches(
    make_course: CourseMaker, tmp_path: Path
) -> None:
    number = notebooks.keyctl_number()
    assert number, "add the processor of this machine to SYS_KEYCTL"
    script = tmp_path / "with-key.py"
    script.write_text(WITH_KEY.format(number=number, script=str(NOTEBOOKS)))
    course = make_course(1)
    course.check("setup")
    course.launch(script=script).wait_ready()
    notebook = course.notebook(course.students[0])
    find_key = FIND_KEY.format(number=number)
    assert notebook.execute(f"{find_key}\nprint(found)") == "False"


def test_launch_says_so_where_it_cannot_leave_the_keyring(course: Course) -> None:
    """As on a processor of which it does not know the number of keyctl(2)."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import notebooks;"
        f" notebooks.SYS_KEYCTL.clear(); notebooks.main(['launch', {str(course.config)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "students' processes keep the session keyring of this launch" in done.stderr
    assert "launch runs already" in done.stderr


def make_notebook(notebook: Notebook, path: str) -> None:
    """Save a notebook whose output is an image."""
    output = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": IMAGE, "text/plain": "an image"},
    }
    cell = {
        "cell_type": "code",
        "id": "cell",
        "metadata": {},
        "source": "6 * 7",
        "execution_count": 1,
        "outputs": [output],
    }
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    model = {"type": "notebook", "format": "json", "content": content}
    notebook.api("PUT", f"contents/{path}", model)


def get(notebook: Notebook, path: str) -> Response:
    """Download as the front end does: the server asks where the request comes from."""
    token = notebook.cookies["_xsrf"].value
    return notebook.fetch(f"{path}?download=true&_xsrf={token}")


def export(notebook: Notebook, kind: str, path: str) -> Response:
    return get(notebook, f"nbconvert/{kind}/{path}")


# ---------------------------------------------------------------------------------------
# What works
# ---------------------------------------------------------------------------------------


def test_each_student_logs_in_with_their_own_password_only(course: Course) -> None:
    for username in course.students:
        for other, row in course.rows().items():
            notebook = Notebook(course.notebook_url(username), course.context())
            if other == username:
                notebook.log_in(row["nb-pass"])
                assert notebook.api("GET", "contents")["type"] == "directory"
            else:
                with pytest.raises(LogInRefused):
                    notebook.log_in(row["nb-pass"])
                assert notebook.fetch("api/contents").status == 403


def test_a_log_in_is_good_for_one_server_only(course: Course, notebook: Notebook) -> None:
    other = Notebook(course.notebook_url(course.students[1]), course.context())
    other.cookies = notebook.cookies
    assert notebook.fetch("api/contents").status == 200
    assert other.fetch("api/contents").status == 403


def test_kernels_run_as_their_student(course: Course) -> None:
    for username in course.students:
        account = pwd.getpwnam(username)
        ids = (account.pw_uid,) * 3, (account.pw_gid,) * 3
        code = "import os; os.getresuid(), os.getresgid()"
        assert course.notebook(username).execute(code) == repr(ids)


def test_kernels_have_the_groups_and_the_limits_of_their_student(
    course: Course, student: str, notebook: Notebook
) -> None:
    groups = os.getgrouplist(student, pwd.getpwnam(student).pw_gid)
    assert course.group in shell(notebook, "id -nG").split()
    assert notebook.execute("sorted(os.getgroups())") == repr(sorted(groups))
    assert shell(notebook, "bash -c 'ulimit -Hu'") == str(1000)


def test_what_students_run_ends_first_when_memory_runs_out(
    running: Running, course: Course, student: str, notebook: Notebook
) -> None:
    def score(pid: object) -> str:
        return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()

    assert shell(notebook, "cat /proc/self/oom_score_adj") == notebooks.CHOOM[2]
    assert int(notebooks.CHOOM[2]) > int(notebooks.OOM_SCORE)  # the server's
    assert score(course.server(student).pid) == notebooks.OOM_SCORE
    assert score(running.launch.pid) == score("self")


def test_kernels_run_with_the_teachers_ipython_profile(notebook: Notebook) -> None:
    assert notebook.execute("given") == "'by the teacher'"


def test_a_kernel_starts_where_its_notebook_is(
    course: Course, student: str, notebook: Notebook
) -> None:
    start = course.home(student) / "course/material"
    assert shell(notebook, "pwd") == str(start)


def test_the_environment_of_a_kernel_is_the_students(
    course: Course, student: str, notebook: Notebook
) -> None:
    code = "print(json.dumps(dict(os.environ)))"
    check_environment(course, student, json.loads(notebook.execute(code)))


def check_environment(course: Course, username: str, environment: dict[str, str]) -> None:
    home = str(course.home(username))
    wanted = {"HOME": home, "USER": username, "LOGNAME": username, "SHELL": "/bin/bash"}
    assert wanted.items() <= environment.items()
    for value in environment.values():
        for foreign in ("/root", "template", str(course.directory)):
            assert foreign not in value


def test_kernels_and_terminals_get_no_other_variables(
    course: Course, student: str, notebook: Notebook
) -> None:
    own = {*notebooks.server_environment(pwd.getpwnam(student), {})}
    own |= {"PWD", "OLDPWD", "SHLVL", "_"}  # the shell's
    in_kernel = notebook.execute("print(*os.environ)").split()
    in_terminal = notebook.execute_in_terminal("compgen -e").split()
    assert {*in_terminal} - own - TERMINAL_VARIABLES == set()
    ipython = {"CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "GIT_PAGER", "MPLBACKEND"}
    ipython |= {"PAGER", "TERM"}
    assert {*in_kernel} - own - KERNEL_VARIABLES - ipython == set()


def test_a_terminal_is_a_login_shell_of_the_student(
    course: Course, student: str, notebook: Notebook
) -> None:
    command = "shopt -q login_shell && echo login; id -un; umask; echo $HOME"
    lines = notebook.execute_in_terminal(command).split()
    assert lines == ["login", student, "0002", str(course.home(student))]


def test_contents_can_be_made_read_renamed_and_changed(notebook: Notebook) -> None:
    model = {"type": "file", "format": "text", "content": "first"}
    notebook.api("PUT", "contents/course/a file.txt".replace(" ", "%20"), model)
    moved = "course/material/data/b.txt"
    notebook.api("PATCH", "contents/course/a%20file.txt", {"path": moved})
    notebook.api("PUT", f"contents/{moved}", {**model, "content": "second"})
    assert notebook.api("GET", f"contents/{moved}")["content"] == "second"
    assert get(notebook, f"files/{moved}").text == "second"
    assert notebook.fetch("api/contents/course/a%20file.txt").status == 404


def test_new_files_are_the_students_alone(
    course: Course, student: str, notebook: Notebook
) -> None:
    make_notebook(notebook, "course/material/mine.ipynb")
    path = course.home(student) / "course/material/mine.ipynb"
    assert path.stat().st_uid == pwd.getpwnam(student).pw_uid
    assert course.home(student).stat().st_mode & 0o077 == 0
    assert run_as(course.students[1], "cat", path).returncode != 0


def test_what_is_deleted_goes_to_the_students_trash(
    course: Course, student: str, notebook: Notebook
) -> None:
    model = {"type": "file", "format": "text", "content": "rubbish"}
    notebook.api("PUT", "contents/course/material/rubbish.txt", model)
    notebook.api("DELETE", "contents/course/material/rubbish.txt")
    home = course.home(student)
    assert not (home / "course/material/rubbish.txt").exists()
    trash = home / ".local/share/Trash/files/rubbish.txt"
    assert trash.read_text() == "rubbish"
    assert trash.owner() == student


def test_settings_workspaces_and_configuration_are_kept_in_the_home(
    course: Course, student: str, notebook: Notebook
) -> None:
    settings = "lab/api/settings/@jupyterlab/notebook-extension:tracker"
    raw = '{"windowingMode": "full"}'
    assert notebook.fetch(settings, "PUT", json.dumps({"raw": raw})).status == 204
    assert notebook.fetch(settings).json["raw"] == raw
    assert notebook.fetch("lab/api/settings").status == 200
    workspace = {"data": {"x": 1}, "metadata": {"id": "default"}}
    path = "lab/api/workspaces/default"
    assert notebook.fetch(path, "PUT", json.dumps(workspace)).status == 204
    assert notebook.fetch(path).json["data"] == {"x": 1}
    assert notebook.api("PATCH", "config/notebook", {"key": 1}) == {"key": 1}
    assert notebook.api("GET", "config/notebook") == {"key": 1}
    kept = [*(course.home(student) / ".jupyter").rglob("*")]
    assert {path.owner() for path in kept} == {student}
    assert {".jupyterlab-settings", ".jupyterlab-workspace", ".json"} <= {
        path.suffix for path in kept
    }


def test_students_cannot_list_the_directory_of_runtime_directories(
    course: Course, student: str
) -> None:
    """Who can read a directory can keep it locked, and root waiting for it."""
    assert notebooks.RUNTIME_DIR.stat().st_mode & 0o777 == 0o711
    assert run_as(student, "ls", notebooks.RUNTIME_DIR).returncode != 0


def test_a_server_takes_as_many_connections_as_the_system_allows(
    course: Course, student: str
) -> None:
    """With fewer, others could use them up, and have each more fill the log."""
    limits = Path(f"/proc/{course.server(student).pid}/limits").read_text()
    ((soft, hard),) = re.findall(r"Max open files +(\d+) +(\d+)", limits)
    assert soft == hard and int(hard) > 1024


@pytest.mark.parametrize("page", ["tree", "lab", f"notebooks/{WELCOME}", "api/me"])
def test_pages_of_the_front_end_are_there(notebook: Notebook, page: str) -> None:
    assert notebook.fetch(page).status == 200


def test_pages_need_a_log_in(course: Course, student: str) -> None:
    url = course.notebook_url(student)
    for page in ("tree", f"files/{WELCOME}", f"nbconvert/html/{WELCOME}"):
        response = fetch(url + page, context=course.context())
        assert response.status == 302
        assert response.headers["Location"].startswith(f"/{student}/login?")
    for page in ("contents", "kernels", "terminals", "nbconvert"):
        assert fetch(f"{url}api/{page}", context=course.context()).status == 403


def test_the_export_formats_are_listed(notebook: Notebook) -> None:
    formats = notebook.api("GET", "nbconvert")
    assert {"html", "markdown", "pdf", "script"} <= {*formats}
    assert all("output_mimetype" in entry for entry in formats.values())


def test_a_notebook_is_exported_to_html(notebook: Notebook) -> None:
    make_notebook(notebook, "image.ipynb")
    response = export(notebook, "html", "image.ipynb")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/html")
    assert "image.html" in response.headers["Content-Disposition"]
    assert "sandbox" in response.headers["Content-Security-Policy"]
    assert IMAGE in response.text.replace("\n", "")


def test_an_export_of_several_files_is_zipped(notebook: Notebook) -> None:
    make_notebook(notebook, "image.ipynb")
    response = export(notebook, "markdown", "image.ipynb")
    assert "image.zip" in response.headers["Content-Disposition"]
    with zipfile.ZipFile(io.BytesIO(response.body)) as archive:
        (image,) = [name for name in archive.namelist() if name.endswith(".png")]
        assert "image.md" in archive.namelist()
        assert image in archive.read("image.md").decode()
        assert archive.read(image) == base64.b64decode(IMAGE)


def test_an_export_is_refused_to_other_sites_and_for_unknown_things(
    notebook: Notebook,
) -> None:
    assert notebook.fetch(f"nbconvert/html/{WELCOME}").status == 403
    assert export(notebook, "unknown", WELCOME).status == 404
    assert export(notebook, "html", "missing.ipynb").status == 404
    assert export(notebook, "html", "%2e%2e/%2e%2e/etc/passwd").status in (400, 404)


def test_a_failing_export_names_the_reason(notebook: Notebook) -> None:
    model = {"type": "file", "format": "text", "content": "not a notebook"}
    notebook.api("PUT", "contents/broken.txt", model)
    response = export(notebook, "html", "broken.txt")
    assert response.status == 500
    assert "nbconvert failed" in response.text


# ---------------------------------------------------------------------------------------
# What is secret
# ---------------------------------------------------------------------------------------


def test_no_process_shows_a_password_or_a_hash(running: Running) -> None:
    for text in running.seen | process_texts():
        assert not HASH.search(text)
        for words in passwords(running.course).values():
            assert not [word for word in words if word in text]
    config = str(running.course.config).encode()
    assert any(config in text for text in running.seen)  # it did look


def test_no_student_and_no_server_has_the_key(running: Running) -> None:
    course, launch = running.course, running.launch
    certificate = course.directory / notebooks.CERTIFICATE_NAME
    assert certificate.stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" in certificate.read_text()
    helpers = [launch.helper("template process"), launch.helper("webserver")]
    for process in [*helpers, *map(course.server, course.students)]:
        links = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert len(links) > 3
        assert str(certificate) not in links


def secrets_in(process: psutil.Process, course: Course) -> set[tuple[str, str]]:
    """Return whose password, system password or password's hash is in the memory."""
    words = passwords(course)
    found = set()
    for data in support.memory_of(process):
        for username, (notebook_password, system_password) in words.items():
            if notebook_password in data:
                found.add((username, "nb-pass"))
            if system_password in data:
                found.add((username, "sys-pass"))
            for salt, digest in HASH.findall(data):
                computed = hashlib.sha256(notebook_password + salt).hexdigest()
                if computed.encode() == digest:
                    found.add((username, "hash"))
    return found


def test_no_memory_holds_the_secrets_of_another_student(make_course: CourseMaker) -> None:
    """In a course in which nobody has typed a password at somebody else's server."""
    course = make_course(3)
    course.check("setup")
    launch = course.launch().wait_ready()
    for username in course.students:
        course.notebook(username)  # after their log-in
    for username in course.students:
        found = secrets_in(course.server(username), course)
        assert (username, "hash") in found  # the search works
        assert found <= {(username, "hash"), (username, "nb-pass")}
    for role in ("template process", "webserver"):
        assert secrets_in(launch.helper(role), course) == set()
    everything = {(username, "nb-pass") for username in course.students}
    assert everything <= secrets_in(psutil.Process(launch.pid), course)


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Return the addresses on which a process listens with TCP."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_servers_listen_on_their_ports_only(course: Course) -> None:
    for username, row in course.rows().items():
        assert listening(course.server(username)) == [("::", int(row["port"]))]


LISTEN = """
import sys, zmq
for kind in (zmq.SUB, zmq.PULL, zmq.DEALER):
    with zmq.Context() as context, context.socket(kind) as channel:
        channel.linger = 0
        if kind == zmq.SUB:
            channel.subscribe(b"")
        channel.connect(sys.argv[1])
        print("ready", flush=True)
        if channel.poll(700):
            print("heard", channel.recv(), flush=True)
"""


def test_a_kernel_tells_nothing_by_tcp(
    course: Course, student: str, notebook: Notebook
) -> None:
    """Its one TCP socket is ipykernel's, for output of forks: it only takes."""
    (kernel,) = [
        process for process in course.processes() if notebook.kernel_id in title_of(process)
    ]
    ((host, port),) = listening(kernel)
    assert host == "127.0.0.1"
    assert eavesdrop(course.students[1], f"tcp://{host}:{port}", notebook) == ""
    directory = notebooks.RUNTIME_DIR / str(kernel.uids().real)
    details = json.loads((directory / f"kernel-{notebook.kernel_id}.json").read_text())
    address = "ipc://{ip}-{iopub_port}".format_map(details)
    assert "heard" in eavesdrop(student, address, notebook)


def eavesdrop(username: str, address: str, notebook: Notebook) -> str:
    """Return what a user hears of a kernel that speaks."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, address],
        stdout=subprocess.PIPE,
        text=True,
        user=username,
        group=pwd.getpwnam(username).pw_gid,
        extra_groups=[],
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout
        heard = ""
        for line in process.stdout:
            if line == "ready\n":
                notebook.execute("for _ in range(8): print('a secret'), sleep(0.1)")
            else:
                heard += line
    return heard


CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as channel:
        try:
            channel.connect(path)
            print("connected")
        except OSError as error:
            print(type(error).__name__)
"""


def test_a_kernels_sockets_are_closed_to_other_students(
    course: Course, student: str, notebook: Notebook
) -> None:
    directory = notebooks.RUNTIME_DIR / str(pwd.getpwnam(student).pw_uid)
    sockets = [path for path in directory.iterdir() if path.is_socket()]
    assert len(sockets) >= 5  # of one kernel
    for username, outcome in zip(course.students, ("connected", "PermissionError")):
        done = run_as(username, sys.executable, "-c", CONNECT, *sockets)
        assert {*done.stdout.split()} == {outcome}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert run_as(course.students[1], "ls", directory).returncode != 0
    connection_file = next(directory.glob("kernel-*.json"))
    assert run_as(student, "cat", connection_file).returncode == 0
    assert run_as(course.students[1], "cat", connection_file).returncode != 0


DESCRIPTORS = """
for name in os.listdir("/proc/self/fd"):
    try:
        info, target = os.fstat(int(name)), os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        continue
    if stat.S_ISSOCK(info.st_mode):
        with socket.socket(fileno=os.dup(int(name))) as each:
            target = f"{each.family.name} {each.getsockname()!r}"
    print(info.st_uid, target)
"""


def test_a_kernel_holds_nothing_of_the_servers_and_of_roots(
    course: Course, student: str, notebook: Notebook
) -> None:
    uid = pwd.getpwnam(student).pw_uid
    lines = [line.split(" ", 1) for line in notebook.execute(DESCRIPTORS).splitlines()]
    foreign = {target for owner, target in lines if int(owner) != uid}
    # libffi may keep itself open, to map its trampolines; everybody may read it.
    harmless = re.compile(
        r"/dev/null$|anon_inode:|pipe:|/usr/lib/[\w/-]+/libffi\.so\.[\d.]+$"
    )
    assert not [target for target in foreign if not harmless.match(target)]
    for row in course.rows().values():
        assert not [target for _, target in lines if f" {row['port']}," in target]
    assert [target for _, target in lines if target.startswith("AF_UNIX")]


def test_a_terminal_holds_nothing_but_itself(notebook: Notebook) -> None:
    shown = notebook.execute_in_terminal("readlink /proc/$$/fd/*").split()
    assert shown and all(target.startswith("/dev/pts/") for target in shown)


def test_a_server_cannot_be_dumped_or_traced(running: Running) -> None:
    """What is not dumpable belongs to root in /proc: proc(5), prctl(2)."""
    course, launch = running.course, running.launch
    processes = [course.server(username) for username in course.students]
    for process in [*processes, launch.helper("webserver")]:
        assert process.uids().real != 0
        assert os.stat(f"/proc/{process.pid}/mem").st_uid == 0


def test_no_id_of_roots_is_left_in_a_server(course: Course) -> None:
    for username in course.students:
        account, process = pwd.getpwnam(username), course.server(username)
        assert {*process.uids()} == {account.pw_uid}
        assert {*process.gids()} == {account.pw_gid}
        status = Path(f"/proc/{process.pid}/status").read_text()
        groups = os.getgrouplist(username, account.pw_gid)
        (shown,) = re.findall(r"^Groups:\t(.*)$", status, re.MULTILINE)
        assert {*map(int, shown.split())} == {*groups}
        assert (
            re.findall(r"^Cap(?:Prm|Eff):\t(\w+)$", status, re.MULTILINE) == ["0" * 16] * 2
        )


# ---------------------------------------------------------------------------------------
# Seen from inside
# ---------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A server of tests/probe.py after typical use, and its report."""

    modules: list[str]
    old_home: list[str]
    idle_seconds: list[int]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    with Course(tmp_path_factory.mktemp("probe"), 1, idle_minutes=7) as course:
        (username,) = course.students
        course.check("setup")
        course.check("send")
        course.write_students([{**course.rows()[username], "port": str(course.port)}])
        command = [
            sys.executable,
            "-I",
            str(ROOT / "tests/probe.py"),
            str(course.config),
        ]
        process = subprocess.Popen(
            [*command, username], stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        with process:
            try:
                yield use_probe(course, username, process)
            finally:
                process.kill()


def use_probe(course: Course, username: str, process: "subprocess.Popen[bytes]") -> Probe:
    """Do what students do, then have the server report."""
    certificate = course.directory / notebooks.CERTIFICATE_NAME
    support.wait_until(certificate.exists, 90, "the certificate")
    notebook = course.notebook(username)
    for page in ("", "tree", "lab/api/settings", "api/status", "api/kernelspecs"):
        notebook.fetch(page)
    assert notebook.execute("1 + 1") == "2"
    notebook.execute_in_terminal("true")
    make_notebook(notebook, "image.ipynb")
    notebook.api("POST", "contents/image.ipynb/checkpoints", {})
    export(notebook, "markdown", "image.ipynb")
    notebook.api("DELETE", "contents/image.ipynb")
    course.server(username).send_signal(signal.SIGUSR2)
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "no report"
    return Probe(**json.loads(process.stdout.readline()))


def test_the_template_has_imported_what_servers_need(probe: Probe) -> None:
    assert len(probe.modules) < 4, probe.modules  # a codec, at times


def test_nothing_of_the_templates_home_is_left_in_a_server(probe: Probe) -> None:
    assert not probe.old_home, "\n".join(probe.old_home)


def test_idle_servers_kernels_and_terminals_are_ended(probe: Probe) -> None:
    assert probe.idle_seconds == [7 * 60] * 3
