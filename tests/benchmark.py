"""Measure what a notebook server per student costs, side by side, in one run.

    sudo make bench [STUDENTS="10 30"] [OURS="100 300"] [HERD=100] [LESSON=20] [FAR=100]

The contenders: this project, with servers started at launch, and on demand; a plain
`jupyter-notebook` for each student, started by su(1) one after the other; JupyterHub
with its LocalProcessSpawner and configurable-http-proxy, all asked for at once, with
time limits that let it finish. They run in the private mount namespace of the tests,
with accounts of the tests, one contender after the other.

A row says how many seconds it took until the last server answered, and for each server
the CPU time until then, its proportional set size (PSS: shared pages are divided among
those who share them) and its private memory, after two quiet seconds; the rest is the
PSS of all other processes of the contender. Then, for this project: how long a first
visitor waits on demand, log-ins a second, and a herd of students who come within ten
seconds, log in and run a cell; what servers hold after a lesson; and what a student costs
this host whose kernel runs here, or on a gateway, whose own processes do not count. The
table and a plot are written into bench/.

A contender may lose a student: the server does not start in time, or its kernel, the
WebSocket or a cell fails. That is a figure like the others, which are then those of the
students who were not lost. What happened is told at once, and with its traceback in
bench/lost.txt. The exit status is 1 if this project lost anybody.
"""

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import math
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil

import conftest
import notebooks
import support
from test_gateway import running_gateway

BENCH = Path(__file__).resolve().parent.parent / "bench"
# Where `make bench` installs JupyterHub and its proxy.
HUB_PREFIX = Path(os.environ.get("BENCH_PREFIX", "/opt/notebooks-bench"))
WELCOME = "course/material/welcome.ipynb"
OURS, ON_DEMAND = "notebooks.py", "  on demand, idle"
PLAIN, HUB = "jupyter-notebook", "JupyterHub"
HERD_SECONDS = 10.0  # within which the herd comes
START_SECONDS = 60.0  # in which a server that starts alone must answer,
CROWD_SECONDS = 600.0  # all servers that start at once,
CELL_SECONDS = 60.0  # and a cell of a lesson
HUB_CONFIG = """
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_port = {port} + 1
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{port_2}"
c.JupyterHub.cookie_secret_file = "{directory}/cookie_secret"
c.JupyterHub.db_url = "sqlite:///{directory}/hub.sqlite"
c.ConfigurableHTTPProxy.pid_file = "{directory}/proxy.pid"
c.Spawner.default_url = "/tree"
c.Spawner.start_timeout = c.Spawner.http_timeout = 600
c.JupyterHub.services = [{{"name": "bench", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [{{"name": "bench", "services": ["bench"],
    "scopes": ["admin:users", "admin:servers", "access:servers"]}}]
c.JupyterHub.log_level = c.Spawner.log_level = "WARN"
"""


Value = TypeVar("Value")


class Started(NamedTuple):
    """What a contender has started, and how long that took.

    `students` are those who were not lost; `others`, the processes of no student.
    """

    seconds: float
    students: Collection[str]
    others: Collection[psutil.Process]


NOTHING = Started(math.nan, [], [])


class Row(NamedTuple):
    """What one contender cost; memory in kB, times in seconds.

    All but `lost` and `rest_pss` is of those who were not lost: NaN if all were.
    """

    contender: str
    students: int
    lost: int
    seconds: float
    cpu_seconds: float
    pss: float
    private: float
    rest_pss: float


class Note(NamedTuple):
    """What else a contender cost, in words, and how many students it lost."""

    contender: str
    lost: int
    text: str


HEADER = (
    "contender             students  lost  seconds  CPU s each  PSS each  private   rest"
)


def format_row(row: Row) -> str:
    return (
        f"{row.contender:<22}{row.students:>8}{row.lost:>6}{row.seconds:>9.1f}"
        f"{row.cpu_seconds:>12.3f}{row.pss / 1000:>7.1f} MB"
        f"{row.private / 1000:>6.1f} MB{row.rest_pss / 1000:>4.0f} MB"
    )


class Cost(NamedTuple):
    """What processes have used and hold together; memory in kB."""

    cpu_seconds: float
    pss: float
    private: float


def cost_of(processes: Iterable[psutil.Process]) -> Cost:
    """Return what processes cost, with the CPU time of children they waited for.

    Source: proc(5). What has ended meanwhile costs nothing.
    """
    cpu_seconds = pss = private = 0.0
    for process in processes:
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            cpu_seconds += sum(process.cpu_times()[:4])
            for line in text.splitlines()[1:]:
                name, number, *_ = line.split()
                pss += int(number) * (name == "Pss:")
                private += int(number) * name.startswith("Private_")
    return Cost(cpu_seconds, pss, private)


def wait_for_answer(
    url: str, seconds: float = START_SECONDS, statuses: tuple[int, ...] = (200,)
) -> float:
    """Return when (time.monotonic) a server has answered."""

    def answers() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return support.fetch(url).status in statuses
        return False

    support.wait_until(answers, seconds, f"an answer of {url}")
    return time.monotonic()


def attempt(who: str, function: Callable[..., Value], *arguments: object) -> Value | None:
    """Return what a function returns, or nothing if it raised, which is told.

    A contender can fail in any way, hence no exception ends the benchmark.
    """
    try:
        return function(*arguments)
    except Exception as error:
        with (BENCH / "lost.txt").open("a") as file:
            traceback.print_exception(error, file=file)
        print(f"  lost: {who}: {error!r:.200}", flush=True)
        return None


def attempt_all(
    function: Callable[[str], Value], students: Sequence[str], at_once: int = 1
) -> dict[str, Value]:
    """Return what a function returns for each student who is not lost."""
    with ThreadPoolExecutor(at_once) as pool:
        values = pool.map(lambda student: attempt(student, function, student), students)
        pairs = zip(students, values)
        return {student: value for student, value in pairs if value is not None}


def last(times: dict[str, float]) -> float:
    return max(times.values(), default=math.nan)


def measure(contender: str, course: support.Course, start: Callable[[], Started]) -> Row:
    """Start servers, wait for their answers, and look at what they hold."""
    seconds, students, others = attempt(contender, start) or NOTHING
    time.sleep(2)  # until it is quiet
    cost = cost_of(support.processes_of(students))
    number = len(students) or math.nan
    return Row(
        contender,
        len(course.students),
        len(course.students) - len(students),
        seconds,
        cost.cpu_seconds / number,
        cost.pss / number,
        cost.private / number,
        cost_of(others).pss,
    )


# ---------------------------------------------------------------------------------------
# The contenders
# ---------------------------------------------------------------------------------------


def launch_processes(launch: support.Launch) -> list[psutil.Process]:
    launcher = psutil.Process(launch.pid)
    return [launcher, *launcher.children()]


def start_ours(course: support.Course, script: Path) -> Started:
    begin = time.monotonic()
    launch = course.launch(script=script).wait_ready(300)
    if course.settings.get("on_demand") == "yes":
        answers = dict.fromkeys(course.students, time.monotonic())
    else:
        answers = attempt_all(
            lambda username: wait_for_answer(f"{course.notebook_url(username)}login"),
            course.students,
        )
    return Started(last(answers) - begin, answers, launch_processes(launch))


def plain_url(course: support.Course, username: str) -> str:
    port = course.port + 1 + course.students.index(username)
    return f"http://localhost:{port}/{username}/"


def start_plain(course: support.Course) -> Started:
    """Start a plain server for each student as a teacher would without any tool.

    Each is waited for before the next one; the wait for one that is lost is left out.
    """
    rows = course.rows()
    program = Path(sys.executable).with_name("jupyter-notebook")

    def start(username: str) -> float:
        begin = time.monotonic()
        url = urllib.parse.urlsplit(plain_url(course, username))
        command = (
            f"{program} --no-browser --ip=127.0.0.1 --port={url.port} --port-retries=0"
            f" --ServerApp.base_url={url.path}"
            " --PasswordIdentityProvider.hashed_password="
            + notebooks.hash_password(rows[username]["nb-pass"])
        )
        subprocess.Popen(
            ["su", "-", username, "-c", f"exec {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return wait_for_answer(f"{url.geturl()}login") - begin

    seconds = attempt_all(start, course.students)
    return Started(sum(seconds.values()) or math.nan, seconds, [])


@contextlib.contextmanager
def running_hub(course: support.Course) -> Iterator[tuple[str, str]]:
    """Yield the address of a JupyterHub, which need not answer yet, and a token."""
    directory, token = course.directory, secrets.token_hex(16)
    config = directory / "jupyterhub_config.py"
    port = course.port
    config.write_text(
        HUB_CONFIG.format(port=port, port_2=port + 2, directory=directory, token=token)
    )
    environment = {
        **support.ENVIRONMENT,
        "PATH": f"{HUB_PREFIX}/bin:{support.ENVIRONMENT['PATH']}",
    }
    with (directory / "hub.log").open("wb") as log:
        process = subprocess.Popen(
            [HUB_PREFIX / "bin/jupyterhub", "--config", config],
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}", token
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        support.kill_all(lambda: hub_processes(directory), "JupyterHub")
        process.wait()


def hub_processes(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory) and process.uids().real == 0:
                found.append(process)
    return found


def start_hub(course: support.Course, url: str, token: str) -> Started:
    """Ask for all servers at once, and wait for the last."""
    headers = {"Authorization": f"token {token}"}

    def start(username: str) -> float:
        api = f"{url}/hub/api/users/{username}"
        support.fetch(api, "POST", "", headers)
        asked = support.fetch(f"{api}/server", "POST", "", headers, timeout=900)
        assert asked.status < 400, asked
        page = f"{url}/user/{username}/api/status"
        wait_for_answer(page, CROWD_SECONDS, (302, 403))

        def is_ready() -> bool:
            user = support.fetch(api, headers=headers).json
            return bool(user["servers"].get("", {}).get("ready"))

        support.wait_until(is_ready, CROWD_SECONDS, f"the server of {username}")
        return time.monotonic()

    begin = wait_for_answer(f"{url}/hub/health")
    answers = attempt_all(start, course.students, len(course.students))
    return Started(last(answers) - begin, answers, hub_processes(course.directory))


# ---------------------------------------------------------------------------------------
# What visitors notice
# ---------------------------------------------------------------------------------------


def in_words(waits: Iterable[float]) -> str:
    ordered = sorted(waits) or [math.nan]
    median, longest = ordered[len(ordered) // 2], ordered[-1]
    return f"{median:.2f} s (median), {longest:.2f} s (longest)"


def measure_visits(course: support.Course) -> Note:
    """Have first visitors come one by one, then all log in, eight at a time."""

    def visit(username: str) -> float:
        begin = time.monotonic()
        return wait_for_answer(f"{course.notebook_url(username)}login") - begin

    def log_in(username: str) -> float:
        course.notebook(username)
        return time.monotonic()

    waits = attempt_all(visit, course.students)
    begin = time.monotonic()
    logged_in = attempt_all(log_in, course.students, at_once=8)
    speed = len(logged_in) / (last(logged_in) - begin)
    students = len(course.students)
    lost = students - len(waits.keys() & logged_in.keys())
    text = (
        f"  first visits: {in_words(waits.values())}; {speed:.0f} log-ins per second;"
        f" {lost} of {students} lost"
    )
    return Note(OURS, lost, text)


def run_cell(notebook: support.Notebook, code: str, seconds: float) -> str:
    """Run a cell that must end in time, whatever becomes of its kernel.

    The socket's own time limit begins again with each ping of the server.
    """
    channels = notebook.kernel_channels
    assert channels is not None
    timer = threading.Timer(seconds, channels.abort)
    timer.start()
    try:
        return notebook.execute(code)
    finally:
        timer.cancel()


def herd_waits(course: support.Course) -> dict[str, float]:
    """Return how long each of a herd waited from the first visit to a cell's result."""
    rows = course.rows()

    def come(username: str) -> float:
        number = course.students.index(username)
        time.sleep(HERD_SECONDS * number / len(course.students))
        begin = time.monotonic()
        context = course.context()

        def address() -> str:
            page = support.fetch(f"{course.url}{username}", context=context, timeout=300)
            return page.headers.get("Location", "") if page.status == 302 else ""

        notebook = support.Notebook(
            support.wait_until(address, 300, "the way to the notebook"), context
        )
        with notebook:
            notebook.log_in(rows[username]["nb-pass"])
            notebook.seconds = 300
            notebook.start_kernel()
            assert run_cell(notebook, "6 * 7", 300) == "42"
        return time.monotonic() - begin

    threading.stack_size(1 << 18)
    return attempt_all(come, course.students, at_once=len(course.students))


def attend(notebook: support.Notebook, password: str, minutes: float) -> None:
    """Do what a student does in a lesson: open a notebook, run cells, save."""
    end = time.monotonic() + minutes * 60
    with notebook:
        notebook.log_in(password)
        for page in ("tree", "lab/api/settings", f"notebooks/{WELCOME}"):
            notebook.fetch(page)
        notebook.start_kernel(path=WELCOME)
        while time.monotonic() < end:
            for path in ("contents", f"contents/{WELCOME}", "kernels", "sessions"):
                notebook.api("GET", path)
            for number in range(5):
                code = f"x = [i * i for i in range({number}000)]; print(len(x))"
                run_cell(notebook, code, CELL_SECONDS)
            model = notebook.api("GET", f"contents/{WELCOME}")
            content = {"type": "notebook", "content": model["content"]}
            notebook.api("PUT", f"contents/{WELCOME}", content)
            time.sleep(10)


def measure_lesson(students: int, minutes: float, script: Path) -> Iterator[Note]:
    """Have both contenders' students in a lesson at the same time, then look."""
    with made_course(students) as ours, made_course(students) as plain:
        present = [
            *(attempt(OURS, start_ours, ours, script) or NOTHING).students,
            *(attempt(PLAIN, start_plain, plain) or NOTHING).students,
        ]
        rows = ours.rows() | plain.rows()

        def take_part(username: str) -> bool:
            url = (
                ours.notebook_url(username)
                if username in ours.students
                else plain_url(plain, username)
            )
            attend(support.Notebook(url), rows[username]["nb-pass"], minutes)
            return True

        came = attempt_all(take_part, present, at_once=2 * students)
        for contender, course in ((OURS, ours), (PLAIN, plain)):
            stayed = came.keys() & {*course.students}
            processes = support.processes_of(stayed)
            cost = cost_of(x for x in processes if "kernel" not in support.title_of(x))
            number = len(stayed) or math.nan
            lost = students - len(stayed)
            text = (
                f"after a lesson of {minutes:g} minutes, {students} students,"
                f" {contender}: private {cost.private / number / 1000:.1f} MB,"
                f" CPU {cost.cpu_seconds / number:.1f} s for each server;"
                f" {lost} of {students} lost"
            )
            yield Note(contender, lost, text)


def measure_far(students: int, script: Path) -> Iterator[Note]:
    """Have all students work with a kernel of this host, then with one of a gateway."""
    with running_gateway() as gateway:
        token = gateway.directory / "token"
        token.write_text(gateway.token)
        token.chmod(0o600)
        settings = {"gateway_url": gateway.url, "gateway_token_file": token}
        for name in ("python3", "far"):
            with made_course(students, **settings, gateway_kernel="far") as course:
                attempt(OURS, start_ours, course, script)
                rows, context = course.rows(), course.context()

                def work(
                    username: str, course: support.Course = course, name: str = name
                ) -> support.Notebook:
                    url = course.notebook_url(username)
                    notebook = support.Notebook(url, context)  # noqa: B023
                    notebook.log_in(rows[username]["nb-pass"])  # noqa: B023
                    notebook.seconds = CELL_SECONDS
                    notebook.start_kernel(name=name)
                    for number in range(20):
                        run_cell(notebook, f"print('x' * {number}000)", CELL_SECONDS)
                    return notebook

                stayed = attempt_all(work, course.students, at_once=4)
                cost, number = (
                    cost_of(support.processes_of(stayed)),
                    len(stayed) or math.nan,
                )
                lost = students - len(stayed)
                text = (
                    f"{students} students with a kernel {name}, after 20 cells: here"
                    f" PSS {cost.pss / number / 1000:.1f} MB, CPU"
                    f" {cost.cpu_seconds / number:.2f} s each; {lost} of {students} lost"
                )
                for notebook in stayed.values():
                    notebook.resources.close()
            yield Note(OURS, lost, text)


# ---------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def made_course(students: int, **settings: object) -> Iterator[support.Course]:
    with tempfile.TemporaryDirectory(prefix="notebooks-bench-") as directory:
        with support.Course(Path(directory), students, **settings) as course:
            course.check("setup", timeout=600)
            course.check("send", timeout=600)
            yield course


def measure_ours(students: int, script: Path) -> Iterator[Row | Note]:
    with made_course(students) as course:
        yield measure(OURS, course, lambda: start_ours(course, script))
    with made_course(students, on_demand="yes") as course:
        yield measure(ON_DEMAND, course, lambda: start_ours(course, script))
        yield measure_visits(course)


def measure_others(students: int) -> Iterator[Row]:
    with made_course(students) as course:
        yield measure(PLAIN, course, lambda: start_plain(course))
    if not (HUB_PREFIX / "bin/jupyterhub").exists():
        print(f"  no JupyterHub in {HUB_PREFIX}: left out", flush=True)
        return
    with made_course(students) as course, running_hub(course) as hub:
        yield measure(HUB, course, lambda: start_hub(course, *hub))


def measure_herd(students: int, script: Path) -> Note:
    with made_course(students, on_demand="yes") as course:
        attempt(OURS, start_ours, course, script)
        waits = herd_waits(course)
    lost = students - len(waits)
    text = (
        f"a herd of {students} within {HERD_SECONDS:.0f} s, each logs in and runs a"
        f" cell: waited {in_words(waits.values())}; {lost} of {students} lost"
    )
    return Note(OURS, lost, text)


def describe_machine() -> str:
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2]
    gigabytes = psutil.virtual_memory().total / 1e9
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("notebook", "jupyter_server")
    )
    python = sys.version.split()[0]
    model = model.splitlines()[0]
    hardware = f"{os.cpu_count()} x {model}, {gigabytes:.0f} GB"
    return f"{hardware}; Python {python}, {versions}"


PLOT = """
import json, sys
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
rows = json.load(sys.stdin)
figure, axes = pyplot.subplots(1, 3, figsize=(12, 4))
for axis, (key, label) in zip(axes, (
    ("cpu_seconds", "CPU seconds per server"), ("private", "private MB per server"),
    ("seconds", "seconds until the last answers"),
)):
    rows_of = {}
    for row in rows:
        rows_of.setdefault(row["contender"].strip(), []).append(row)
    for name, points in rows_of.items():
        values = [p[key] / 1000 if key == "private" else p[key] for p in points]
        axis.plot([p["students"] for p in points], values, "o-", label=name)
    axis.set_xlabel("students"); axis.set_title(label); axis.set_xscale("log")
    axis.set_ylim(bottom=0)
axes[0].legend()
figure.tight_layout()
figure.savefig(sys.argv[1], dpi=120)
"""


def draw(rows: list[Row]) -> None:
    python = HUB_PREFIX / "bin/python"
    if rows and python.exists():
        text = json.dumps([row._asdict() for row in rows])
        command = [str(python), "-c", PLOT, str(BENCH / "servers.png")]
        subprocess.run(command, input=text, text=True, check=True)


def measure_all(options: argparse.Namespace, script: Path) -> Iterator[Row | Note]:
    for students in [*options.students, *options.ours]:
        yield from measure_ours(students, script)
        if students in options.students:
            yield from measure_others(students)
    if options.herd:
        yield measure_herd(options.herd, script)
    if options.lesson:
        yield from measure_lesson(10, options.lesson, script)
    if options.far:
        yield from measure_far(options.far, script)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("students", nargs="*", type=int)
    parser.add_argument("--ours", nargs="*", type=int, default=[])
    parser.add_argument("--herd", type=int, default=0)
    parser.add_argument("--far", type=int, default=0)
    parser.add_argument("--lesson", type=float, default=0, metavar="MINUTES")
    options = parser.parse_args()
    conftest.enter_private_host()
    BENCH.mkdir(exist_ok=True)
    (BENCH / "lost.txt").unlink(missing_ok=True)
    results = []
    lines = [describe_machine(), HEADER]
    print(*lines, sep="\n", flush=True)
    # A copy of the script is not measured by coverage, whatever the environment.
    with tempfile.TemporaryDirectory(prefix="notebooks-bench-") as directory:
        script = Path(shutil.copy(support.NOTEBOOKS, directory))
        for result in measure_all(options, script):
            results.append(result)
            lines.append(result.text if isinstance(result, Note) else format_row(result))
            print(lines[-1], flush=True)
    if any(result.lost for result in results):
        lines.append("All figures are those of the students who were not lost.")
        print(lines[-1])
    (BENCH / "table.txt").write_text("\n".join([*lines, ""]))
    draw([result for result in results if isinstance(result, Row)])
    return int(any(x.lost for x in results if x.contender in (OURS, ON_DEMAND)))


if __name__ == "__main__":
    assert pwd.getpwuid(os.getuid()).pw_uid == 0, "the benchmark needs root"
    sys.exit(main())
