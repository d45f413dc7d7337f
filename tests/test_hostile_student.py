"""What students put into their homes, or do to processes, for a server's memory.

The memory of a student's own server holds the key of the host's certificate: nothing
that the student writes may run in that process, and nobody but root may look into it.
"""

import contextlib
import http.client
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from conftest import CourseMaker
from support import (
    ENVIRONMENT,
    Course,
    Launch,
    Notebook,
    Response,
    fetch,
    is_ours,
    own_file_system,
    run_as,
    wait_until,
)

pytestmark = pytest.mark.root

SITE = ".local/lib/python{}.{}/site-packages".format(*sys.version_info)
OWN = ".local/share/notebooks/python{0}.{1}/lib/python{0}.{1}/site-packages/hostile".format(
    *sys.version_info
)
START = "course/material"
WELCOME = f"{START}/welcome.ipynb"
KERNEL = {
    "display_name": "Mine",
    "language": "python",
    "argv": [
        *("sh", "-c", 'echo kernel $$ $(id -u) >>~/ran; exec "$0" "$@"'),
        *(sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"),
    ],
}
EXTENSION = json.dumps({"ServerApp": {"jpserver_extensions": {"hostile": True}}})
PAGE_CONFIG = json.dumps({"disabledExtensions": {}, "federated_extensions": []})
PYTHON_FILES = [
    *(f".jupyter/{name}_config.py" for name in ("jupyter", "jupyter_server")),
    *(f".jupyter/{name}_config.py" for name in ("jupyter_notebook", "jupyter_lab")),
    *(".jupyter/jupyter_nbconvert_config.py", ".jupyter/jupyter_application_config.py"),
    *(".ipython/profile_default/startup/00-x.py", ".ipython/ipython_config.py"),
    *(f"{SITE}/{name}.py" for name in ("usercustomize", "sitecustomize", "hostile")),
    *(f"{SITE}/{name}.py" for name in ("json", "tornado", "nbconvert", "send2trash")),
    *(f"{start}/{name}.py" for start in (".", START) for name in ("tornado", "hostile")),
    *(f"{start}/jupyter_server_config.py" for start in (".", START)),
]
JSON_FILES = {
    ".jupyter/jupyter_server_config.json": EXTENSION,
    ".jupyter/jupyter_server_config.d/hostile.json": EXTENSION,
    ".local/etc/jupyter/jupyter_server_config.d/hostile.json": EXTENSION,
    ".local/share/jupyter/kernels/python3/kernel.json": json.dumps(KERNEL),
    ".local/share/jupyter/labextensions/hostile/package.json": json.dumps(
        {"name": "hostile", "version": "1", "jupyterlab": {"extension": True}}
    ),
    ".jupyter/labconfig/page_config.json": PAGE_CONFIG,
}
TEMPLATE_ROOTS = (".local/share/jupyter/nbconvert/templates", ".", START)


def plant(username: str) -> None:
    """Fill a home with files that each tell, in ~/ran, which process ran them."""
    home = Path(pwd.getpwnam(username).pw_dir)
    files = {
        **JSON_FILES,
        ".bash_profile": f"echo .bash_profile $$ $UID >>{home}/ran\n",
    }
    for name in PYTHON_FILES:
        said = f"'{name} ' + f'{{os.getpid()}} {{os.getuid()}}\\n'"
        files[name] = f"import os; open('{home}/ran', 'a').write({said})\n"
    files[f"{SITE}/hostile.pth"] = files[f"{SITE}/hostile.py"]
    files[f"{OWN}.pth"] = files[f"{SITE}/hostile.py"].replace(f"{SITE}/hostile.py", OWN)
    for root in TEMPLATE_ROOTS:
        command = f"echo {root}/lab $PPID $(id -u) >>{home}/ran"
        files[f"{root}/lab/conf.json"] = '{"mimetypes": {"text/html": true}}'
        files[f"{root}/lab/index.html.j2"] = (
            f"{{{{ cycler.__init__.__globals__.os.system({command!r}) }}}}"
        )
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["chown", "-R", f"{username}:", home], check=True)


def ran(course: Course, username: str) -> set[tuple[str, int, int]]:
    """Return what was run: which file, in which process, under which uid."""
    lines = (course.home(username) / "ran").read_text().split("\n")[:-1]
    return {(name, int(pid), int(uid)) for name, pid, uid in map(str.split, lines)}


class Running(NamedTuple):
    course: Course
    launch: Launch


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One who plants files, and one for each thing that can stand in a log's place."""
    with Course(tmp_path_factory.mktemp("course"), 4) as course:
        course.check("setup")
        course.check("send")
        planter, fifo, link, directory = course.students
        plant(planter)
        run_as(fifo, "mkfifo", ".notebooks.log", check=True)
        run_as(link, "sh", "-c", "echo kept >kept; ln -s kept .notebooks.log")
        run_as(directory, "mkdir", ".notebooks.log", check=True)
        yield Running(course, course.launch().wait_ready())


@pytest.fixture(scope="module")
def course(running: Running) -> Course:
    return running.course


def export(notebook: Notebook, kind: str) -> Response:
    token = notebook.cookies["_xsrf"].value
    return notebook.fetch(f"nbconvert/{kind}/{WELCOME}?_xsrf={token}")


def use(course: Course, username: str) -> None:
    """Do what could make a server run something of the student's."""
    notebook = course.notebook(username)
    for page in ("tree", "lab", f"notebooks/{WELCOME}", "lab/api/settings"):
        assert notebook.fetch(page).status == 200
    for path in ("kernelspecs", "contents", "config/notebook", "nbconvert", "me"):
        notebook.api("GET", path)
    notebook.start_kernel(path=WELCOME)
    assert notebook.execute("6 * 7") == "42"
    assert notebook.execute_in_terminal("python -c 'print(6 * 7)'") == "42"
    assert export(notebook, "html").status == 200
    assert export(notebook, "slides").status in (200, 500)
    notebook.api("DELETE", f"kernels/{notebook.kernel_id}")


def test_nothing_of_a_students_runs_in_their_server(running: Running) -> None:
    course, launch = running
    planter = course.students[0]
    ours = {launch.pid, *(each.pid for each in psutil.Process(launch.pid).children())}
    for _ in range(2):  # as launched, and as started again by a visit
        use(course, planter)
        server = course.server(planter)
        ours.add(server.pid)
        server.kill()
        server.wait(20)
    found = ran(course, planter)
    assert {uid for _, _, uid in found} == {pwd.getpwnam(planter).pw_uid}
    assert {(name, pid) for name, pid, _ in found if pid in ours} == set()
    # What belongs into a kernel, a terminal or an export did run there.
    assert {name for name, _, _ in found} >= {
        "kernel",
        ".bash_profile",
        ".ipython/profile_default/startup/00-x.py",
        ".jupyter/jupyter_nbconvert_config.py",
        f"{TEMPLATE_ROOTS[0]}/lab",
        OWN,
    }


def test_the_same_files_do_run_in_an_ordinary_server(course: Course) -> None:
    """So that the test before this one can fail."""
    planter = course.students[0]
    account, port = pwd.getpwnam(planter), course.port + 6
    start = course.home(planter) / START
    with subprocess.Popen(
        [
            *(Path(sys.executable).with_name("jupyter-notebook"), "--no-browser"),
            *(
                f"--port={port}",
                "--IdentityProvider.token=token",
                f"--notebook-dir={start}",
            ),
        ],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd=start,
        env={**ENVIRONMENT, "HOME": account.pw_dir},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            address = f"http://localhost:{port}/nbconvert/html/welcome.ipynb?token=token"
            wait_until(lambda: listens(server.pid, port), 60, "an ordinary server")
            fetch(address)
        finally:
            server.kill()
    names = {name for name, pid, _ in ran(course, planter) if pid == server.pid}
    assert names >= {".jupyter/jupyter_server_config.py", ".jupyter/jupyter_config.py"}
    assert [name for name in names if name.endswith("/lab")]


def test_pages_that_a_student_made_are_not_shown_without_a_log_in(
    course: Course,
) -> None:
    username = course.students[0]
    page = ".local/share/jupyter/labextensions/hostile/static/x.html"
    script = 'mkdir -p "${0%/*}" && echo "<p>hello</p>" >"$0"'
    run_as(username, "sh", "-c", script, page, check=True)
    url = f"{course.notebook_url(username)}lab/extensions/hostile/static/x.html"
    assert fetch(url).status in (302, 403, 404)


def test_no_database_in_a_home_is_opened(course: Course) -> None:
    """SQLite would run what is in it: here a notebook is trusted."""
    username = course.students[3]
    notebook = course.notebook(username)
    notebook.api("POST", f"contents/{WELCOME}/trust")
    assert not [*course.home(username).rglob("*.db")]


def listens(pid: int, port: int) -> bool:
    return any(
        connection.laddr.port == port
        for connection in psutil.Process(pid).net_connections("tcp")
    )


@pytest.mark.parametrize("number", [1, 2, 3], ids=["fifo", "link", "directory"])
def test_what_stands_in_the_place_of_the_log_holds_nobody_up(
    running: Running, number: int
) -> None:
    course, launch = running
    username = course.students[number]
    assert "4 of 4 notebook servers run." in launch.output
    assert course.notebook(username).api("GET", "contents")["type"] == "directory"
    outputs = {os.readlink(f"/proc/{course.server(username).pid}/fd/{fd}") for fd in (1, 2)}
    assert outputs == {"/dev/null"}
    assert run_as(course.students[2], "cat", "kept").stdout == "kept\n"


def test_a_kernel_that_kills_its_server_only_hurts_its_student(
    running: Running,
) -> None:
    course = running.course
    username, other = course.students[1:3]
    startup = ".ipython/profile_default/startup"
    code = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    run_as(username, "mkdir", "-p", startup, check=True)
    run_as(username, "sh", "-c", f"echo '{code}' >{startup}/00-x.py", check=True)
    server, others = course.server(username), course.server(other)
    notebook = course.notebook(username)
    with contextlib.suppress(http.client.RemoteDisconnected):  # it waits for the kernel
        notebook.api("POST", "kernels", {})
    wait_until(lambda: not is_ours(server), 20, "the end of the server")
    assert course.notebook(username).api("GET", "contents")["type"] == "directory"
    assert course.server(other) == others


LOOK_INTO = """
import ctypes, json, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
SEIZE, GETFD = 0x4206, 438
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

def succeeds(function, *arguments):
    try:
        return function(*arguments) != -1
    except OSError:
        return False

def take_descriptor(pid):
    fd = os.pidfd_open(pid)
    return libc.syscall(GETFD, fd, 1, 0)

def look(pid):
    found = {name: succeeds(open, f"/proc/{pid}/{name}", "rb", 0)
             for name in ("mem", "environ", "maps", "auxv", "stack")}
    del found["stack"]
    found["fd"] = succeeds(os.listdir, f"/proc/{pid}/fd")
    found["cwd"] = succeeds(os.readlink, f"/proc/{pid}/cwd")
    found["seize"] = succeeds(libc.ptrace, SEIZE, pid, None, None)
    found["pidfd_getfd"] = succeeds(take_descriptor, pid)
    return found

child = subprocess.Popen(["sleep", "100"])
print(json.dumps([look(child.pid), *map(look, map(int, sys.argv[1:]))]))
child.kill()
"""


def test_a_server_is_closed_to_its_own_student(running: Running) -> None:
    course, launch = running
    username = course.students[2]
    servers = [course.server(each).pid for each in course.students[2:]]
    helpers = [launch.helper("template process").pid, launch.helper("webserver").pid]
    pids = [*servers, *helpers, launch.pid]
    done = run_as(username, sys.executable, "-c", LOOK_INTO, *pids, check=True)
    own_child, *others = json.loads(done.stdout)
    assert {*own_child.values()} == {True}  # each way works, if it is allowed
    for found in others:
        assert {*found.values()} == {False}, found
    webserver = helpers[1]
    nobody = run_as("nobody", sys.executable, "-c", LOOK_INTO, webserver, check=True)
    assert {*json.loads(nobody.stdout)[1].values()} == {False}


def test_a_student_can_signal_only_their_own_server(running: Running) -> None:
    course, launch = running
    username = course.students[2]
    others = [course.server(course.students[3]), launch.helper("template process")]
    others += [launch.helper("webserver"), psutil.Process(launch.pid)]
    for process in others:
        assert run_as(username, "kill", "-0", process.pid).returncode == 1
    assert run_as(username, "kill", "-0", course.server(username).pid).returncode == 0


# To map a file of FUSE a second time, past the cache, is to wait in mmap(2) for what is
# dirty in it to be written, which is never answered: until then the memory map of the
# process is locked.
HOLD_MAP = """
first = os.open(f"{point}/file", os.O_RDWR)
memory = mmap.mmap(first, 4096)
memory[0] = 1
second = os.open(f"{point}/file", os.O_RDONLY)
print("holding", flush=True)
mmap.mmap(second, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
"""


def test_a_process_that_cannot_be_looked_at_holds_nobody_up(
    make_course: CourseMaker,
) -> None:
    course = make_course(2)
    course.check("setup")
    launch = course.launch().wait_ready()
    hostile, other = course.students
    for command in (["shutdown"], ["remove", "--yes"]):
        point = course.home(hostile) / command[0]
        with own_file_system(hostile, HOLD_MAP, point) as holder:
            status = Path(f"/proc/{holder.pid}/status")
            wait_until(lambda: "\nState:\tD" in status.read_text(), 10, "the lock")
            course.check(*command)
            holder.communicate()
        assert course.processes() == []
    assert launch.process.poll() is None
