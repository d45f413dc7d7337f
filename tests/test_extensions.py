"""The extensions that teachers install, each used as its front end does."""

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sysconfig
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import support
from conftest import CourseMaker
from support import Course, Launch, Notebook, fetch, run_as

PREFIX = Path(os.environ.get("EXTENSIONS_PREFIX", "/opt/notebooks-extensions"))
PYTHON = str(PREFIX / "bin/python")
SITE_PACKAGES = Path(
    sysconfig.get_path("purelib", vars={"base": str(PREFIX), "platbase": str(PREFIX)})
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not Path(PYTHON).exists(), reason=f"needs {PREFIX} (make test makes it)"
    ),
]

NAMES = {
    *("jupyter_archive", "jupyter_lsp", "jupyter_resource_usage", "jupyter_server_fileid"),
    *("jupyter_server_proxy", "jupyter_server_ydoc", "jupyterlab_git", "nbclassic"),
    *("nbdime", "nbgitpuller", "voila.server_extension"),
}
START = "course/material"  # where notebooks start
WELCOME = f"{START}/welcome.ipynb"
# Two tabs: what the first writes into a cell, the second shows. In the language of
# jupyter-collaboration, which the environment of the tests does not have.
TABS = """
import ssl, sys, websocket
from pycrdt import Array, Doc, YMessageType
from pycrdt import create_sync_message, create_update_message, handle_sync_message

url, cookie, certificate, text = sys.argv[1:]

class Tab:
    def __init__(self):
        context = ssl.create_default_context(cafile=certificate)
        self.channel = websocket.create_connection(
            url, timeout=20, cookie=cookie, sslopt={"context": context})
        self.doc = Doc()
        self.cells = self.doc.get("cells", type=Array)
        self.channel.send_binary(create_sync_message(self.doc))
        self.wait("")

    def wait(self, text):
        while not (len(self.cells) and text in str(self.cells[0]["source"])):
            message = self.channel.recv()
            if isinstance(message, bytes) and message[0] == YMessageType.SYNC:
                answer = handle_sync_message(message[1:], self.doc)
                if answer:
                    self.channel.send_binary(answer)

first, second = Tab(), Tab()
source = first.cells[0]["source"]
source += text
first.channel.send_binary(create_update_message(first.doc.get_update()))
second.wait(text)
print(second.cells[0]["source"])
"""


class Running(NamedTuple):
    course: Course
    launch: Launch
    asked: Path  # what the npm of the environment was asked


@contextlib.contextmanager
def installed(path: Path, text: str, mode: int = 0o644) -> Iterator[None]:
    """Have a file in the environment meanwhile."""
    path.write_text(text)
    path.chmod(mode)
    try:
        yield
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("course")
    directory.chmod(0o711)
    asked = Path("/var/tmp", f"npm-{os.getpid()}")
    npm = f'#!/bin/sh\necho "$@" >>{asked}; echo /usr\n'
    with Course(directory, 2) as course, installed(PREFIX / "bin/npm", npm, 0o755):
        asked.touch()
        asked.chmod(0o666)
        course.check("setup")
        course.check("send")
        yield Running(course, course.launch(python=PYTHON).wait_ready(), asked)


@pytest.fixture(scope="module")
def course(running: Running) -> Course:
    return running.course


@pytest.fixture(scope="module")
def student(course: Course) -> str:
    return course.students[0]


@pytest.fixture(scope="module")
def notebook(course: Course, student: str) -> Notebook:
    notebook = course.notebook(student)
    notebook.start_kernel(path=WELCOME)
    return notebook


def document_url(notebook: Notebook, path: str) -> str:
    """Return where the tabs of a document meet."""
    body = json.dumps({"format": "json", "type": "notebook"})
    answer = notebook.fetch(f"api/collaboration/session/{path}", "PUT", body).json
    room = f"json:notebook:{answer['fileId']}?sessionId={answer['sessionId']}"
    url = urllib.parse.urljoin(notebook.url, f"api/collaboration/room/{room}")
    return url.replace("https:", "wss:", 1)


def test_launch_finds_nothing_wrong_with_the_extensions(running: Running) -> None:
    assert "fails" not in running.launch.output


def test_what_extensions_say_at_their_start_is_in_the_log_of_their_student(
    course: Course, student: str
) -> None:
    log = (course.home(student) / ".notebooks.log").read_text()
    loaded = {*re.findall(r"(\S+) \| extension was successfully loaded", log)}
    assert loaded >= NAMES
    assert "failed" not in log


def test_two_tabs_of_a_notebook_share_what_is_written(
    course: Course, student: str, notebook: Notebook
) -> None:
    done = subprocess.run(
        [PYTHON, "-c", TABS, document_url(notebook, WELCOME)]
        + [notebook.cookie_header(), course.directory / "notebooks.pem", "# by the first"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("# by the first\n")
    path = course.home(student) / "course/material/welcome.ipynb"
    support.wait_until(lambda: "by the first" in path.read_text(), 20, "the file")


def test_no_extension_keeps_a_database_in_the_home(
    course: Course, student: str, notebook: Notebook
) -> None:
    """SQLite would run, in the server, what a student has written into one."""
    document_url(notebook, WELCOME)
    kernels = run_as(student, "find", ".ipython", "-name", "*.sqlite").stdout
    found = run_as(student, "find", ".", "-name", "*.db", "-o", "-name", "*.sqlite")
    assert found.stdout in ("", f"./{kernels}")
    server = course.server(student)
    opened = [os.readlink(path) for path in Path(f"/proc/{server.pid}/fd").iterdir()]
    assert not [path for path in opened if ".db" in path]


def test_a_repository_is_made_committed_and_looked_at(
    course: Course, student: str, notebook: Notebook
) -> None:
    """A hook of the student's runs, but in a process of its own."""
    repository = "course/material/mine"
    script = (
        f"mkdir {repository}; echo 1 >{repository}/new.txt;"
        " git config --global user.email a@b; git config --global user.name Ada"
    )
    run_as(student, "sh", "-ec", script, check=True)
    assert notebook.fetch(f"git/{START}/mine/init", "POST", "{}").json["code"] == 0

    hook = f"{repository}/.git/hooks/pre-commit"
    script = f"printf '#!/bin/sh\necho $$ >~/hooked\n' >{hook}; chmod +x {hook}"
    run_as(student, "sh", "-ec", script, check=True)
    files = notebook.fetch(f"git/{START}/mine/status", "POST", "{}").json["files"]
    assert [(each["x"], each["y"], each["to"]) for each in files] == [("?", "?", "new.txt")]
    notebook.fetch(f"git/{START}/mine/add", "POST", json.dumps({"add_all": True}))
    body = json.dumps({"commit_msg": "first", "amend": False, "author": None})
    answer = notebook.fetch(f"git/{START}/mine/commit", "POST", body)
    assert answer.json["code"] == 0, answer
    assert notebook.fetch(f"git/{START}/mine/status", "POST", "{}").json["files"] == []
    pid = (course.home(student) / "hooked").read_text()
    assert int(pid) != course.server(student).pid


def test_a_repository_of_the_teachers_is_pulled_by_a_link(
    course: Course, student: str, notebook: Notebook
) -> None:
    script = (
        "git init -q -b main origin && cd origin && echo 2 >two.txt && git add . &&"
        " git -c user.email=a@b -c user.name=Ada commit -qm first"
    )
    run_as(student, "sh", "-ec", script, check=True)
    query = f"repo=file://{course.home(student)}/origin&branch=main"
    query += f"&targetpath={START}/pulled"
    assert "nbgitpuller" in notebook.fetch(f"git-pull?{query}").text
    assert '"phase": "finished"' in notebook.fetch(f"git-pull/api?{query}").text
    assert (course.home(student) / "course/material/pulled/two.txt").read_text() == "2\n"


def test_the_use_of_memory_is_shown(notebook: Notebook) -> None:
    assert notebook.fetch("api/metrics/v1").json["rss"] > 0


def test_a_server_in_a_kernel_is_reached_through_the_students(
    course: Course, notebook: Notebook
) -> None:
    port = support.free_port_range(1)
    code = f"import subprocess, sys; arguments = ['-m', 'http.server', '{port}']\n"
    code += "web = subprocess.Popen([sys.executable, *arguments], stderr=-3)"
    notebook.execute(code)
    get = functools.partial(notebook.fetch, f"proxy/{port}/")
    support.wait_until(lambda: "welcome.ipynb" in get().text, 20, "the proxied server")
    assert fetch(f"{notebook.url}proxy/{port}/").status in (302, 403)
    notebook.execute("web.kill()")


def test_a_language_server_completes_code_in_a_process_of_its_own(
    running: Running, course: Course, student: str, notebook: Notebook
) -> None:
    answer = notebook.fetch("lsp/status").json
    assert [*answer["sessions"]] == ["pylsp"]

    channel = notebook.open_websocket("lsp/ws/pylsp")
    parameters: dict[str, object] = {"processId": None, "rootUri": None, "capabilities": {}}
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": parameters}
    channel.send(json.dumps(request))
    while "result" not in (message := json.loads(channel.recv())):
        pass
    assert "completionProvider" in message["result"]["capabilities"]
    servers = [each for each in course.processes() if "pylsp" in support.title_of(each)]
    assert [each.username() for each in servers] == [student]


def test_npm_is_not_asked_at_a_start(running: Running) -> None:
    assert running.asked.read_text() == ""


def test_widgets_and_figures_reach_the_page(course: Course, notebook: Notebook) -> None:
    page = notebook.fetch("lab").text
    assert "jupyter-matplotlib" in page and "@jupyter-widgets/jupyterlab-manager" in page
    code = "import ipywidgets; ipywidgets.IntSlider(7)"
    assert notebook.execute(code).startswith("IntSlider(value=7")
    code = "%matplotlib widget\nimport matplotlib.pyplot as p; p.figure().canvas"
    assert notebook.execute(code).startswith("Canvas(")


def test_a_directory_is_downloaded_as_an_archive(notebook: Notebook) -> None:
    token = notebook.cookies["_xsrf"].value
    query = f"archiveToken=x&archiveFormat=zip&_xsrf={token}"
    answer = notebook.fetch(f"directories/{START}/data?{query}")
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.testzip() is None and archive.namelist()


def test_the_classic_pages_are_shown(notebook: Notebook) -> None:
    for page in ("nbclassic/tree", f"nbclassic/notebooks/{WELCOME}"):
        assert notebook.fetch(page).status == 200


def test_a_dashboard_is_made_of_a_notebook(notebook: Notebook) -> None:
    page = notebook.fetch(f"voila/render/{WELCOME}")
    assert page.status == 200
    assert "voila" in page.text


# ---------------------------------------------------------------------------------------
# What may not happen in a server
# ---------------------------------------------------------------------------------------

HOSTILE = "{{ cycler.__init__.__globals__.os.system('echo $PPID >>~/ran') }}"
DATA = ".local/share/jupyter"


def test_templates_and_pages_in_the_home_are_used_by_no_extension(
    course: Course,
) -> None:
    username = course.students[1]
    planted = [
        *(
            f"{DATA}/{app}/templates/{name}/{file}"
            for app in ("voila", "nbconvert")
            for name in ("lab", "base", "mine")
            for file in ("index.html.j2", "page.html", "base.html.j2", "null.j2")
        ),
        *(
            f"{root}/{name}/index.html.j2"
            for root in (".", "course/material")
            for name in ("lab", "mine")
        ),
        f"{DATA}/nbextensions/page.html",
        f"{DATA}/voila/templates/lab/static/page.html",
        f"{DATA}/labextensions/page.html",
        ".ipython/nbextensions/page.html",
    ]
    script = (
        'for name; do mkdir -p "${name%/*}"; printf "%s" "$0" >"$name"; done;'
        ' for name in lab mine; do echo \'{"base_template": "base"}\''
        f" | tee {DATA}/voila/templates/$name/conf.json $name/conf.json; done"
    )
    run_as(username, "sh", "-ec", script, HOSTILE, *planted, check=True)
    notebook = course.notebook(username)
    assert notebook.fetch(f"voila/render/{WELCOME}").status == 200
    notebook.seconds = 4
    with contextlib.suppress(TimeoutError):  # what fails is never answered by voila
        notebook.fetch(f"voila/render/{WELCOME}?template=mine")
    for page in ("nbclassic/tree", f"nbclassic/notebooks/{WELCOME}", "voila"):
        notebook.fetch(page)
    for page in (
        *("nbextensions/page.html", "voila/templates/lab/static/page.html"),
        *("voila/static/page.html", "voila/labextensions/page.html"),
        *("lab/extensions/page.html", f"voila/files/{WELCOME}"),
    ):
        assert fetch(f"{notebook.url}{page}").status in (302, 403, 404), page
    assert not (course.home(username) / "ran").exists()


def test_a_file_of_the_students_name_is_no_database(course: Course) -> None:
    username = course.students[1]
    database = f"{DATA}/file_id_manager.db"
    run_as(username, "sh", "-c", f"mkdir -p {DATA}; echo not one >{database}", check=True)
    course.server(username).kill()
    notebook = course.notebook(username)
    document_url(notebook, WELCOME)
    assert (course.home(username) / database).read_text() == "not one\n"


def test_nothing_of_the_templates_home_is_left_in_a_server(
    course: Course, student: str
) -> None:
    """As a path that an extension has worked out when it was imported."""
    course.server(student).kill()
    course.launches[0].stop()
    command = [PYTHON, "-I", str(support.ROOT / "tests/probe.py"), str(course.config)]
    process = subprocess.Popen(
        [*command, student], stdout=subprocess.PIPE, env=support.ENVIRONMENT
    )
    with process:
        try:
            (notebook,) = support.wait_until(
                lambda: logged_in(course, student), 60, "the probe"
            )
            document_url(notebook, WELCOME)
            course.server(student).send_signal(signal.SIGUSR2)
            assert process.stdout
            report = json.loads(process.stdout.readline())
        finally:
            process.kill()
    assert not report["old_home"], "\n".join(report["old_home"])


def logged_in(course: Course, username: str) -> list[Notebook]:
    """Return a client, or none while no server answers."""
    with contextlib.suppress(OSError):
        return [course.notebook(username)]
    return []


# ---------------------------------------------------------------------------------------
# Broken ones
# ---------------------------------------------------------------------------------------

LOAD = "def load_jupyter_server_extension(app):\n    {}\n"


def test_the_teacher_is_told_once_which_extensions_fail(
    make_course: CourseMaker,
) -> None:
    broken = {
        "nbt_no_import": "raise KeyError('no import')",
        "nbt_no_load": LOAD.format("raise KeyError('no load')"),
        "nbt_prints": "print('nbt says hello')\n" + LOAD.format("print('nbt is here')"),
    }
    names = {**broken, "nbt_missing": ""}
    configuration = Path(PREFIX, "etc/jupyter/jupyter_server_config.d/nbt.json")
    enabled = {"ServerApp": {"jpserver_extensions": dict.fromkeys(names, True)}}
    with contextlib.ExitStack() as stack:
        stack.enter_context(installed(configuration, json.dumps(enabled)))
        for name, text in broken.items():
            stack.enter_context(installed(SITE_PACKAGES / f"{name}.py", text))
        course = make_course(2)
        course.check("setup")
        launch = course.launch(python=PYTHON).wait_ready()
        log = (course.home(course.students[0]) / ".notebooks.log").read_text()

    assert "2 of 2 notebook servers run." in launch.output
    told = [line for line in launch.output.splitlines() if "nbt_" in line]
    assert len(told) == 3, told
    assert "nbt_no_import: KeyError: 'no import'" in told[1]
    assert "nbt_no_load: KeyError: 'no load'" in told[2]
    assert "nbt_missing" in told[0] and "could not be found" in told[0]
    assert "nbt is here" in log and "nbt_no_load" in log
    assert "nbt is here" not in launch.output
