"""What root has configured for all: files below /etc/jupyter and in the environment."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import notebooks
from conftest import mount, mount_overlay
from support import Course, Notebook, run_as

pytestmark = pytest.mark.root

ETC = Path("/etc/jupyter")
# Of the environment; in a test they are covered by overlays.
ENVIRONMENT_ETC = Path(sys.prefix, "etc/jupyter")
LAB = Path(sys.prefix, "share/jupyter/lab")
TRACKER = "@jupyterlab/notebook-extension:tracker"
THEMES = "@jupyterlab/apputils-extension:themes"
FILES = {
    ETC: {
        "jupyter_server_config.json": {"ServerApp": {"terminals_enabled": False}},
        "jupyter_config.json": {"ContentsManager": {"untitled_notebook": "Sheet"}},
        "jupyter_notebook_config.json": {"ContentsManager": {"untitled_file": "leaf"}},
        "jupyter_server_config.d/own.json": {"ServerApp": {"port": 1, "password": "x"}},
        "labconfig/default_setting_overrides.json": {TRACKER: {"windowingMode": "none"}},
    },
    ENVIRONMENT_ETC: {
        "jupyter_server_config.json": {"ContentsManager": {"allow_hidden": True}},
        "jupyter_server_config.d/own.json": {
            "ServerApp": {"jpserver_extensions": {"jupyter_lsp": False}}
        },
        # It goes before /etc.
        "jupyter_config.json": {"ContentsManager": {"untitled_notebook": "Page"}},
        "labconfig/page_config.json": {"disabledExtensions": {"nbt-first": True}},
        "labconfig/default_setting_overrides.json": {TRACKER: {"scrollPastEnd": False}},
    },
    LAB: {
        "settings/overrides.json": {THEMES: {"theme": "JupyterLab Dark"}},
        "settings/overrides.d/own.json": {TRACKER: {"recordTiming": True}},
        "settings/page_config.json": {"nbt": "second"},
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
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All files are there, but nothing is written into the environment."""
    scratch = tmp_path_factory.mktemp("layers")
    mount("-t", "tmpfs", "tmpfs", str(scratch))
    for i, directory in enumerate((ENVIRONMENT_ETC, LAB)):
        scratch.joinpath(str(i)).mkdir()
        mount_overlay(directory, scratch / str(i))

    written = [ETC / "jupyter_server_config.py"]
    ETC.mkdir(exist_ok=True)
    written[0].write_text(PYTHON + REFUSED)
    for directory, contents in FILES.items():
        for name, content in contents.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
            written.append(path)
    yield

    for path in written:
        path.unlink()
    for mounted in (LAB, ENVIRONMENT_ETC, scratch):
        subprocess.run(["umount", "--no-mtab", "--lazy", mounted], check=True)


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


def default_of(notebook: Notebook, plugin: str, name: str) -> object:
    """Return what a setting of JupyterLab is for who has changed nothing."""
    properties = notebook.fetch(f"lab/api/settings/{plugin}").json["schema"]["properties"]
    return properties[name]["default"]


def test_files_of_all_documented_names_count(notebook: Notebook) -> None:
    assert notebook.fetch("api/terminals").status == 404
    made = [
        notebook.api("POST", "contents", {"type": kind})["path"]
        for kind in ("notebook", "file", "directory")
    ]
    assert made == ["Page.ipynb", "leaf", "Box"]
    assert default_of(notebook, TRACKER, "windowingMode") == "none"


def test_those_of_the_environment_do_too(notebook: Notebook) -> None:
    assert notebook.api("GET", "contents/.bashrc")["type"] == "file"
    assert notebook.fetch("lsp/status").status == 404
    assert default_of(notebook, TRACKER, "scrollPastEnd") is False
    for page in ("lab", "tree"):
        assert "nbt-first" in notebook.fetch(page).text


def test_jupyterlabs_overrides_count(notebook: Notebook) -> None:
    assert default_of(notebook, THEMES, "theme") == "JupyterLab Dark"
    assert default_of(notebook, TRACKER, "recordTiming") is True
    assert '"nbt": "second"' in notebook.fetch("lab").text


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
