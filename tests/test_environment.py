"""What kernels and terminals are given: variables, and the course's Python."""

import json
import os
import pwd
import signal
import sys
from collections.abc import Iterator

import pytest

import notebooks
from support import Course, Notebook, run_as, wait_until

pytestmark = pytest.mark.root

BIN = os.path.dirname(sys.executable)
GIVEN = {"http_proxy": "http://u:p%40x@proxy:1", "HTTP_PROXY": "", "PYTHONPATH": "/srv/x"}
TEACHERS = {"LANG": "C.utf8", "TZ": "Asia/Kolkata", "SECRET": "not for students"}
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
# Runs with each export: nbconvert reads it in the student's home.
TELL_EXPORT = """
import json, os
with open(os.environ["HOME"] + "/env", "w") as file:
    json.dump(dict(os.environ), file)
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with Course(tmp_path_factory.mktemp("course"), 2) as course:
        lines = [f"{name} = {value}\n" for name, value in GIVEN.items()]
        text = course.config.read_text()
        course.config.write_text("".join([text, "[Environment]\n", *lines]))
        course.check("setup")
        course.check("send")
        course.launch(env=TEACHERS).wait_ready()
        yield course


@pytest.fixture(scope="module")
def student(course: Course) -> str:
    return course.students[0]


@pytest.fixture(scope="module")
def notebook(course: Course, student: str) -> Notebook:
    notebook = course.notebook(student)
    notebook.start_kernel()
    return notebook


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
    response = notebook.fetch(f"nbconvert/python/welcome.ipynb?download=true&_xsrf={token}")
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
    notebook: Notebook, shell: str
) -> None:
    """Although /etc/profile sets PATH anew in a log-in shell."""
    names = ["python", "python3", "pip", "jupyter", "ipython"]
    command = shell.format(f"which {' '.join(names)}")
    wanted = [f"{BIN}/{name}" for name in names]
    assert notebook.execute_in_terminal(command).split() == wanted
    assert notebook.execute(f"!{command}").split() == wanted


def test_a_log_in_shell_within_a_terminal_has_the_courses_python(
    notebook: Notebook, student: str
) -> None:
    command = "printf 'command -v python\\nexit\\n' | bash -li 2>/dev/null"
    assert f"{BIN}/python" in notebook.execute_in_terminal(command).split()


def test_a_log_in_shell_that_is_no_bash_has_the_courses_python(
    course: Course, student: str
) -> None:
    account = pwd.struct_passwd((*pwd.getpwnam(student)[:6], "/bin/sh"))
    environment = notebooks.server_environment(account, {})
    command = ["env", *(f"{name}={value}" for name, value in environment.items())]
    done = run_as(student, *command, "sh", "-li", input="command -v python\n")
    assert f"{BIN}/python" in done.stdout.split()


def test_what_a_student_activates_stays_in_front(notebook: Notebook) -> None:
    command = "export PATH=/tmp:$PATH; eval $PROMPT_COMMAND; echo ${PATH%%:*}"
    assert notebook.execute_in_terminal(command) == "/tmp"
