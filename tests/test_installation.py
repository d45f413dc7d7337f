"""What root has configured for all: files below the environment's etc/jupyter and /etc."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import notebooks
from support import Course, Notebook, run_as

pytestmark = pytest.mark.root

ETC = Path("/etc/jupyter")
FILES = {
    "jupyter_server_config.json": {"ServerApp": {"terminals_enabled": False}},
    "jupyter_config.json": {"ContentsManager": {"untitled_notebook": "Sheet"}},
    "jupyter_notebook_config.json": {"ContentsManager": {"untitled_file": "leaf"}},
    "jupyter_server_config.d/own.json": {"ServerApp": {"port": 1, "password": "x"}},
    "labconfig/default_setting_overrides.json": {
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}
    },
}
PYTHON = """
c.ContentsManager.untitled_directory = 'Box'
import warnings
warnings.simplefilter("default")
warnings.warn("old and rusty", DeprecationWarning)
"""
# What protects students and the host's key is ours to say.
REFUSED = """
c.KernelManager.transport = "tcp"
c.ServerApp.cookie_secret = b"known"
c.ServerApp.base_url = "/other/"
c.PasswordIdentityProvider.hashed_password = ""
c.PasswordIdentityProvider.password_required = False
"""


@pytest.fixture(scope="module")
def configured() -> Iterator[None]:
    for name, content in FILES.items():
        path = ETC / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (ETC / "jupyter_server_config.py").write_text(PYTHON + REFUSED)
    yield
    for name in (*FILES, "jupyter_server_config.py"):
        (ETC / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def course(configured: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 1, on_demand="yes") as course:
        course.check("setup")
        username = course.students[0]
        theirs = "c.ContentsManager.untitled_directory = 'theirs'; open('ran', 'w')"
        command = f'mkdir -p .jupyter; echo "{theirs}" >.jupyter/jupyter_server_config.py'
        run_as(username, "sh", "-c", command, check=True)
        course.launch().wait_ready()
        yield course


@pytest.fixture(scope="module")
def notebook(course: Course) -> Notebook:
    return course.notebook(course.students[0])


def test_files_of_all_documented_names_count(notebook: Notebook) -> None:
    assert notebook.fetch("api/terminals").status == 404
    made = [
        notebook.api("POST", "contents", {"type": kind})["path"]
        for kind in ("notebook", "file", "directory")
    ]
    assert made == ["Sheet.ipynb", "leaf", "Box"]
    settings = "lab/api/settings/@jupyterlab/notebook-extension:tracker"
    properties = notebook.fetch(settings).json["schema"]["properties"]
    assert properties["windowingMode"]["default"] == "none"


def test_what_packages_warn_of_is_in_the_students_log(
    course: Course, notebook: Notebook
) -> None:
    notebook.api("GET", "contents")
    assert "rusty" not in course.launches[0].output
    log = course.home(course.students[0]) / notebooks.SERVER_LOG
    assert "rusty" in log.read_text()


def test_the_students_own_files_do_not(course: Course, notebook: Notebook) -> None:
    notebook.api("GET", "contents")
    assert not list(course.home(course.students[0]).rglob("ran"))


def test_what_protects_students_is_not_for_these_files(notebook: Notebook) -> None:
    notebook.start_kernel()
    code = "import ipykernel; print(open(ipykernel.get_connection_file()).read())"
    assert json.loads(notebook.execute(code))["transport"] == "ipc"
    stranger = Notebook(notebook.url, notebook.context)
    assert stranger.fetch("api/contents").status == 403
