"""What kernels and terminals are given: variables, the course's Python, packages."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import notebooks
from conftest import CourseMaker
from support import Course, ExecutionError, Notebook, made_account, run_as, wait_until

pytestmark = pytest.mark.root

BIN = os.path.dirname(sys.executable)
GIVEN = {"http_proxy": "http://u:p%40x@proxy:1", "HTTP_PROXY": "", "PYTHONPATH": "/srv/x"}
TEAM = Path("/var/lib/nbtteam")
TEACHERS = {"LANG": "C.utf8", "TZ": "Asia/Kolkata", "SECRET": "not for students"}
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
# Runs with each export: nbconvert reads it in the student's home.
TELL_EXPORT = """
import json, os
with open(os.environ["HOME"] + "/env", "w") as file:
    json.dump(dict(os.environ), file)
"""


def make_team(course: Course) -> None:
    """Make a directory of both students, and a link to it where their notebooks are."""
    subprocess.run(["groupadd", "nbtteam"], check=True)
    TEAM.mkdir()
    shutil.chown(TEAM, group="nbtteam")
    TEAM.chmod(0o2770)
    for student in course.students:
        subprocess.run(["usermod", "-aG", "nbtteam", student], check=True)
        run_as(student, "ln", "-s", TEAM, "course/material/team", check=True)


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        lines = [f"{name} = {value}\n" for name, value in GIVEN.items()]
        text = course.config.read_text()
        course.config.write_text("".join([text, "[Environment]\n", *lines]))
        course.check("setup")
        course.check("send")
        make_team(course)
        course.launch(env=TEACHERS).wait_ready()
        yield course
        course.check("shutdown")  # whoever has these uids next finds no sockets
    shutil.rmtree(TEAM)
    subprocess.run(["groupdel", "nbtteam"], check=True)


@pytest.fixture(scope="module")
def student(course: Course) -> str:
    return course.students[0]


@pytest.fixture(scope="module")
def notebook(course: Course, student: str) -> Notebook:
    notebook = course.notebook(student)
    notebook.start_kernel()
    return notebook


def own_environment(student: str) -> Path:
    return notebooks.own_environment(Path(pwd.getpwnam(student).pw_dir))


def check_variables(environment: dict[str, str], student: str) -> None:
    wanted = {**GIVEN, "LANG": "C.utf8", "TZ": "Asia/Kolkata", "USER": student}
    assert wanted.items() <= environment.items()
    assert "SECRET" not in environment


def test_kernels_have_the_teachers_variables(notebook: Notebook, student: str) -> None:
    check_variables(json.loads(notebook.execute(SHOW)), student)
    assert notebook.execute("import time; time.strftime('%z')") == "'+0530'"


def test_terminals_have_the_teachers_variables(notebook: Notebook, student: str) -> None:
    shown = notebook.execute_in_terminal(f'stty cols 4000; python3 -c "{SHOW}"')
    check_variables(json.loads(shown.replace("\n", "")), student)


def test_exports_have_the_teachers_variables(
    course: Course, notebook: Notebook, student: str
) -> None:
    script = 'mkdir -p ~/.jupyter; echo "$0" >~/.jupyter/jupyter_nbconvert_config.py'
    run_as(student, "sh", "-c", script, TELL_EXPORT, check=True)
    token = notebook.cookies["_xsrf"].value
    path = "course/material/welcome.ipynb"
    response = notebook.fetch(f"nbconvert/python/{path}?download=true&_xsrf={token}")
    assert response.status == 200
    check_variables(json.loads((course.home(student) / "env").read_text()), student)


def test_a_variable_that_changes_counts_from_the_next_start_of_a_server(
    course: Course, notebook: Notebook
) -> None:
    other = course.students[1]
    (launch,) = course.launches
    text = course.config.read_text()
    course.config.write_text(text.replace("/srv/x", "/srv/y"))
    launch.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "Reloaded: " in launch.output, 20, "a reload")
    course.server(other).terminate()
    wait_until(lambda: not course.servers(other), 20, "the end of the server")
    code = "import os; os.environ['PYTHONPATH']"
    assert notebook.execute(code) == "'/srv/x'"
    assert course.notebook(other).execute(code) == "'/srv/y'"
    course.config.write_text(text)


def test_no_other_user_can_read_the_variables(course: Course, student: str) -> None:
    """They may be secrets; in a server's memory they are as safe as its key."""
    for process in course.processes():
        if process.username() == student:
            done = run_as(course.students[1], "cat", f"/proc/{process.pid}/environ")
            assert done.stdout == "" and done.returncode
            assert "p%40x" not in " ".join(process.cmdline())


@pytest.mark.parametrize("shell", ["{}", "bash -lc '{}'", "sh -c '{}'", "bash -c '{}'"])
def test_terminals_and_cells_have_the_courses_programs(
    notebook: Notebook, student: str, shell: str
) -> None:
    """Although /etc/profile sets PATH anew in a log-in shell."""
    names = ["python", "python3", "pip", "jupyter", "ipython", "jupyter-lab"]
    command = shell.format(f"which {' '.join(names)}")
    wanted = [f"{own_environment(student)}/bin/{name}" for name in names]
    wanted[-1] = f"{BIN}/jupyter-lab"
    assert notebook.execute_in_terminal(command).split() == wanted
    assert notebook.execute(f"!{command}").split() == wanted


def test_a_log_in_shell_within_a_terminal_has_the_courses_python(
    notebook: Notebook, student: str
) -> None:
    command = "printf 'command -v python\\nexit\\n' | bash -li 2>/dev/null"
    shown = notebook.execute_in_terminal(command).split()
    assert f"{own_environment(student)}/bin/python" in shown


def test_a_log_in_shell_that_is_no_bash_has_the_courses_python(
    course: Course, student: str
) -> None:
    account = pwd.struct_passwd((*pwd.getpwnam(student)[:6], "/bin/sh"))
    environment = notebooks.server_environment(account, {}, own_packages=False)
    command = ["env", *(f"{name}={value}" for name, value in environment.items())]
    done = run_as(student, *command, "sh", "-li", input="command -v python\n")
    assert f"{BIN}/python" in done.stdout.split()


def test_what_a_student_activates_stays_in_front(notebook: Notebook) -> None:
    command = "export PATH=/tmp:$PATH; eval $PROMPT_COMMAND; echo ${PATH%%:*}"
    assert notebook.execute_in_terminal(command) == "/tmp"


# ---------------------------------------------------------------------------------------
# Packages of a student's own
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheels() -> Iterator[Path]:
    """A directory that everybody can read, with a new package and one of the course's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        make_wheels(directory)
        yield directory


def make_wheels(directory: Path) -> None:
    for name in ("nbtpackage", "jsonpointer"):
        info = f"{name}-99.dist-info"
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n"
        script = f"[console_scripts]\n{name} = {name}:main\n"
        files = {
            f"{name}.py": f"__version__ = '99'\ndef main(): print('{name} 99')\n",
            f"{info}/METADATA": about,
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
            f"{info}/entry_points.txt": script,
            f"{info}/RECORD": "",
        }
        with zipfile.ZipFile(directory / f"{name}-99-py3-none-any.whl", "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)


def pip(notebook: Notebook, *arguments: object) -> str:
    """Return what pip says in a cell, after which the kernel is restarted."""
    words = " ".join(map(str, arguments))
    said = notebook.execute(f"%pip --disable-pip-version-check --no-cache-dir {words}")
    restart(notebook)
    return said


def restart(notebook: Notebook) -> None:
    notebook.api("POST", f"kernels/{notebook.kernel_id}/restart")
    path = f"api/kernels/{notebook.kernel_id}/channels"
    notebook.kernel_channels = notebook.open_websocket(path)


def test_students_install_packages_of_their_own(
    course: Course, notebook: Notebook, student: str, wheels: Path
) -> None:
    server = course.server(student)
    said = pip(notebook, f"install --no-index --find-links {wheels} nbtpackage")
    assert "Successfully installed nbtpackage-99" in said

    assert notebook.execute("import nbtpackage; nbtpackage.__file__").startswith(
        f"'{own_environment(student)}/lib/"
    )
    show = "import sys; print(*[x for x in sys.path if '/lib/' in x and 'local/' not in x])"
    probe = [sys.executable, "-c", show]
    course_path = subprocess.check_output(probe, text=True, env={}).split()
    assert notebook.execute(show).split() == course_path
    code = "import nbtpackage; print(nbtpackage.__version__)"
    for command in (f"python -c '{code}'", f"ipython --no-banner -c '{code}'"):
        assert "99" in notebook.execute_in_terminal(command)
    assert notebook.execute_in_terminal("nbtpackage") == "nbtpackage 99"
    assert course.server(student) == server
    with pytest.raises(ExecutionError):
        course.notebook(course.students[1]).execute("import nbtpackage")


def test_a_package_that_the_course_has_can_be_upgraded(
    notebook: Notebook, wheels: Path
) -> None:
    show = "import jsonpointer; jsonpointer.__version__"
    before = notebook.execute(show)
    said = pip(notebook, f"install --upgrade --no-index --find-links {wheels} jsonpointer")
    assert "Successfully installed jsonpointer-99" in said
    assert notebook.execute(show) == "'99'"
    assert notebook.execute_in_terminal("jsonpointer") == "jsonpointer 99"
    pip(notebook, "uninstall --yes jsonpointer")
    assert notebook.execute(show) == before


def test_packages_outlive_the_server_and_do_not_enter_it(
    course: Course, wheels: Path
) -> None:
    """Not even what shadows a module of the server's own."""
    student = course.students[1]
    place = own_environment(student)
    notebook = course.notebook(student)
    notebook.start_kernel()
    pip(notebook, f"install --no-index --find-links {wheels} nbtpackage")
    library = place / "lib" / place.name / "site-packages"
    script = 'echo "raise OSError" >"$0/jupyter_server.py"'
    run_as(student, "sh", "-c", script, library, check=True)
    course.server(student).kill()
    wait_until(lambda: not course.servers(student), 20, "the end of the server")

    notebook = course.notebook(student)
    assert notebook.execute("import nbtpackage; nbtpackage.__version__") == "'99'"
    with pytest.raises(ExecutionError, match="OSError"):
        notebook.execute("import jupyter_server")


BREAKAGES = {
    "all is deleted": "rm -r $0",
    "much is damaged": "cd $0; ln -sfn /nowhere bin/python; chmod -x bin/pip; : >bin/pip;"
    " truncate -s 0 pyvenv.cfg lib/*/site-packages/course.pth",
}


@pytest.mark.parametrize("script", BREAKAGES.values(), ids=BREAKAGES)
def test_what_a_student_breaks_is_mended(
    notebook: Notebook, student: str, script: str
) -> None:
    run_as(student, "sh", "-ec", script, own_environment(student), check=True)
    restart(notebook)
    wanted = f"{own_environment(student)}/bin/python"
    assert notebook.execute("import sys, tornado; sys.executable") == repr(wanted)
    assert "pip" in notebook.execute("!pip --version")
    run_as(student, "sh", "-ec", script, own_environment(student), check=True)
    assert "python" in notebook.execute_in_terminal("pip --version; which python")


def test_where_there_is_no_place_kernels_run_all_the_same(
    course: Course, student: str
) -> None:
    place = own_environment(student)
    run_as(student, "sh", "-ec", 'mv "$0" away; : >"$0"', place, check=True)
    notebook = course.notebook(student)
    notebook.start_kernel()
    assert notebook.execute("import sys; sys.executable") == f"'{sys.executable}'"
    assert notebook.execute_in_terminal("which python") == f"{BIN}/python"
    log = (course.home(student) / notebooks.SERVER_LOG).read_text()
    assert f"there are no packages of your own: Not a directory: '{place}" in log
    run_as(student, "sh", "-ec", 'rm "$0"; mv away "$0"', place, check=True)


def test_jupyters_commands_know_the_course_and_the_students_packages(
    course: Course, student: str
) -> None:
    notebook = course.notebook(student)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    script = f'echo "answer = 594" >"$(python -c "{code}")/nbtown.py"'
    notebook.execute_in_terminal(script)
    cell: dict[str, object] = {
        "cell_type": "code",
        "source": "import nbtown; nbtown.answer",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
    }
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    run_as(student, "sh", "-c", "cat >own.ipynb", input=json.dumps(content), check=True)
    command = "cd; jupyter nbconvert --execute --to html own.ipynb"
    notebook.execute_in_terminal(command)
    assert "<pre>594</pre>" in (course.home(student) / "own.html").read_text()


def test_packages_of_their_own_can_be_forbidden(
    make_course: CourseMaker, wheels: Path
) -> None:
    course = make_course(1, own_packages="no")
    (student,) = course.students
    course.check("setup")
    course.launch().wait_ready()
    notebook = course.notebook(student)
    assert notebook.execute("import sys; sys.executable") == f"'{sys.executable}'"
    assert notebook.execute_in_terminal("which python") == f"{BIN}/python"
    command = f"pip install --no-index --find-links {wheels} nbtpackage"
    assert "ERROR" in notebook.execute_in_terminal(command)
    assert not own_environment(student).exists()
    course.check("shutdown")


# ---------------------------------------------------------------------------------------
# A folder of a team
# ---------------------------------------------------------------------------------------


def test_two_students_save_the_same_notebook_in_turn(course: Course) -> None:
    both = "contents/course/material/team/both.ipynb"
    notebooks_of_both = [course.notebook(student) for student in course.students] * 2
    for i, notebook in enumerate(notebooks_of_both):
        if i:
            model = notebook.api("GET", both)
            assert model["content"]["metadata"]["turn"] == i - 1
        content = {"cells": [], "metadata": {"turn": i}, "nbformat": 4, "nbformat_minor": 5}
        model = {"type": "notebook", "format": "json", "content": content}
        notebook.api("PUT", both, model)
        assert notebook.api("POST", f"{both}/checkpoints", {})["id"]
    checkpoint = f"{both}/checkpoints/checkpoint"
    for notebook in notebooks_of_both[:2]:
        notebook.api("POST", checkpoint)
    notebooks_of_both[1].api("DELETE", checkpoint)
    notebooks_of_both[0].api("PATCH", both, {"path": "course/material/team/a.ipynb"})


def test_files_of_kernels_and_terminals_can_be_written_by_the_team(
    course: Course,
) -> None:
    first, second = (course.notebook(student) for student in course.students)
    first.execute(f"!mkdir {TEAM}/of-kernel; echo 1 >{TEAM}/of-kernel/file")
    first.execute_in_terminal(f"mkdir {TEAM}/of-terminal; echo 1 >{TEAM}/of-terminal/file")
    model = {"type": "file", "format": "text", "content": "1"}
    first.api("PUT", "contents/course/material/team/file", model)
    for path in ("of-kernel/file", "of-terminal/file", "file"):
        info = (TEAM / path).stat()
        assert (info.st_mode & 0o777, (TEAM / path).group()) == (0o664, "nbtteam")
    said = second.execute(f"!cd {TEAM}; for i in */file; do echo 2 >>$i; rm $i; done")
    assert said == ""


def test_what_is_private_stays_private(course: Course, student: str) -> None:
    notebook = course.notebook(student)
    notebook.start_kernel()
    home, uid = course.home(student), pwd.getpwnam(student).pw_uid
    runtime = notebooks.RUNTIME_DIR / str(uid)
    for path in (home, runtime):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (home / notebooks.SERVER_LOG, *runtime.glob("kernel-*.json")):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "mode", "umask"),
    [
        (["--user-group"], 0o700, 0o002),
        (["--user-group"], 0o750, 0o002),
        (["--user-group"], 0o755, 0o007),
        (["--gid", "users"], 0o700, 0o022),
        (["--gid", "users"], 0o750, 0o077),
    ],
)
def test_the_umask_is_that_of_a_log_in_unless_the_home_is_open(
    options: list[str], mode: int, umask: int
) -> None:
    with made_account(*options) as account:
        os.chmod(account.pw_dir, mode)
        assert notebooks.login_umask(account) == umask
