"""Measure what a notebook server per student costs, side by side, in one run.

    sudo make bench [STUDENTS="10 30"] [OURS="100 300"] [HERD=100] [LESSON=20]

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
seconds, log in and run a cell; and what servers hold after a lesson. The table
and a plot are written into bench/.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

import conftest
import notebooks
import support

BENCH = Path(__file__).resolve().parent.parent / "bench"
# Where `make bench` installs JupyterHub and its proxy.
HUB_PREFIX = Path(os.environ.get("BENCH_PREFIX", "/opt/notebooks-bench"))
HERD_SECONDS = 10.0  # within which the herd comes
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


class Row(NamedTuple):
    """What one contender cost; memory in kB, times in seconds."""

    contender: str
    students: int
    seconds: float
    cpu_seconds: float
    pss: float
    private: float
    rest_pss: float


HEADER = "contender             students  seconds  CPU s each  PSS each  private   rest"


def format_row(row: Row) -> str:
    return (
        f"{row.contender:<22}{row.students:>8}{row.seconds:>9.1f}"
        f"{row.cpu_seconds:>12.3f}{row.pss / 1000:>7.1f} MB"
        f"{row.private / 1000:>6.1f} MB{row.rest_pss / 1000:>4.0f} MB"
    )


def memory(process: psutil.Process) -> tuple[int, int]:
    """Return the PSS and the private memory of a process in kB (proc(5))."""
    pss = private = 0
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    for line in text.splitlines()[1:]:
        name, number, *_ = line.split()
        pss += int(number) * (name == "Pss:")
        private += int(number) * name.startswith("Private_")
    return pss, private


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Return what processes and the children that they waited for have used."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def wait_for_answer(url: str, statuses: tuple[int, ...] = (200,)) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError):
            return support.fetch(url).status in statuses
        return False

    support.wait_until(answers, 600, f"an answer of {url}")


def measure(
    contender: str,
    course: support.Course,
    start: Callable[[], list[psutil.Process]],
) -> Row:
    """Start servers, wait for their answers, and look at what they hold.

    `start` returns the other processes of the contender.
    """
    begin = time.monotonic()
    others = start()
    seconds = time.monotonic() - begin
    time.sleep(2)  # until it is quiet
    servers = course.processes()
    sizes = [memory(process) for process in servers]
    number = len(course.students)
    return Row(
        contender,
        number,
        seconds,
        cpu_seconds(servers) / number,
        sum(pss for pss, _ in sizes) / number,
        sum(private for _, private in sizes) / number,
        sum(memory(process)[0] for process in others),
    )


# ---------------------------------------------------------------------------------------
# The contenders
# ---------------------------------------------------------------------------------------


def launch_processes(launch: support.Launch) -> list[psutil.Process]:
    launcher = psutil.Process(launch.pid)
    return [launcher, *launcher.children()]


def start_ours(course: support.Course, script: Path) -> list[psutil.Process]:
    launch = course.launch(script=script).wait_ready(300)
    if course.settings.get("on_demand") != "yes":
        for username in course.students:
            wait_for_answer(f"{course.notebook_url(username)}login")
    return launch_processes(launch)


def start_plain(course: support.Course) -> list[psutil.Process]:
    """Start a plain server for each student as a teacher would without any tool."""
    rows = course.rows()
    program = Path(sys.executable).with_name("jupyter-notebook")
    for number, username in enumerate(course.students, 1):
        port = course.port + number
        command = (
            f"{program} --no-browser --ip=127.0.0.1 --port={port} --port-retries=0"
            f" --ServerApp.base_url=/{username}/ --notebook-dir=course/material"
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
        wait_for_answer(f"http://localhost:{port}/{username}/login")
    return []


@contextlib.contextmanager
def running_hub(course: support.Course) -> Iterator[tuple[str, str, psutil.Process]]:
    """Yield the address of a JupyterHub, a token of its API and its process."""
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
        url = f"http://127.0.0.1:{port}"
        wait_for_answer(f"{url}/hub/health")
        yield url, token, psutil.Process(process.pid)
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


def start_hub(
    course: support.Course, url: str, token: str, hub: psutil.Process
) -> list[psutil.Process]:
    """Ask for all servers at once, and wait for the last."""
    headers = {"Authorization": f"token {token}"}

    def start(username: str) -> None:
        api = f"{url}/hub/api/users/{username}"
        support.fetch(api, "POST", "", headers)
        support.fetch(f"{api}/server", "POST", "", headers, timeout=900)
        wait_for_answer(f"{url}/user/{username}/api/status", (302, 403))

        def is_ready() -> bool:
            user = support.fetch(api, headers=headers).json
            return bool(user["servers"].get("", {}).get("ready"))

        support.wait_until(is_ready, 600, f"the server of {username}")

    with ThreadPoolExecutor(len(course.students)) as pool:
        list(pool.map(start, course.students))
    return [hub, *(x for x in hub.children(True) if x.uids().real == 0)]


# ---------------------------------------------------------------------------------------
# What visitors notice
# ---------------------------------------------------------------------------------------


def first_visit_seconds(course: support.Course) -> list[float]:
    """Return how long first visitors wait, one after the other, for a log-in page."""
    waits = []
    for username in course.students:
        begin = time.monotonic()
        wait_for_answer(f"{course.notebook_url(username)}login")
        waits.append(time.monotonic() - begin)
    return sorted(waits)


def log_ins_per_second(course: support.Course) -> float:
    with ThreadPoolExecutor(8) as pool:
        begin = time.monotonic()
        list(pool.map(course.notebook, course.students))
        return len(course.students) / (time.monotonic() - begin)


def herd_waits(course: support.Course) -> list[float]:
    """Return how long each of a herd waited from the first visit to a cell's result."""
    rows = course.rows()
    context = course.context()

    def come(number: int) -> float:
        username = course.students[number]
        time.sleep(HERD_SECONDS * number / len(course.students))
        begin = time.monotonic()

        def address() -> str:
            page = support.fetch(
                f"{course.url}{username}", context=context, timeout=300
            )
            return page.headers.get("Location", "") if page.status == 302 else ""

        notebook = support.Notebook(
            support.wait_until(address, 300, "the way to the notebook"), context
        )
        with notebook:
            notebook.log_in(rows[username]["nb-pass"])
            notebook.seconds = 300
            assert notebook.execute("6 * 7") == "42"
        return time.monotonic() - begin

    threading.stack_size(1 << 18)
    with ThreadPoolExecutor(len(course.students)) as pool:
        return sorted(pool.map(come, range(len(course.students))))


def attend(notebook: support.Notebook, password: str, minutes: float) -> None:
    """Do what a student does in a lesson: open a notebook, run cells, save."""
    end = time.monotonic() + minutes * 60
    with notebook:
        notebook.log_in(password)
        for page in ("tree", "lab/api/settings", "notebooks/welcome.ipynb"):
            notebook.fetch(page)
        notebook.start_kernel(path="welcome.ipynb")
        while time.monotonic() < end:
            for path in ("contents", "contents/welcome.ipynb", "kernels", "sessions"):
                notebook.api("GET", path)
            for number in range(5):
                notebook.execute(
                    f"x = [i * i for i in range({number}000)]; print(len(x))"
                )
            model = notebook.api("GET", "contents/welcome.ipynb")
            content = {"type": "notebook", "content": model["content"]}
            notebook.api("PUT", "contents/welcome.ipynb", content)
            time.sleep(10)


def measure_lesson(students: int, minutes: float, script: Path) -> Iterator[str]:
    """Have both contenders' students in a lesson at the same time, then look."""
    with made_course(students) as ours, made_course(students) as plain:
        start_ours(ours, script)
        start_plain(plain)
        urls = {username: ours.notebook_url(username) for username in ours.students}
        for number, username in enumerate(plain.students, 1):
            urls[username] = f"http://localhost:{plain.port + number}/{username}/"
        rows = ours.rows() | plain.rows()

        def take_part(username: str) -> None:
            notebook = support.Notebook(urls[username])
            attend(notebook, rows[username]["nb-pass"], minutes)

        with ThreadPoolExecutor(len(urls)) as pool:
            list(pool.map(take_part, urls))
        for name, course in (("notebooks.py", ours), ("jupyter-notebook", plain)):
            servers = [
                x for x in course.processes() if "kernel" not in support.title_of(x)
            ]
            sizes = [memory(process) for process in servers]
            private = sum(size for _, size in sizes) / students / 1000
            seconds = cpu_seconds(servers) / students
            yield (
                f"after a lesson of {minutes:g} minutes, {students} students, {name}:"
                f" private {private:.1f} MB, CPU {seconds:.1f} s for each server"
            )


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


def measure_ours(students: int, script: Path) -> Iterator[Row]:
    with made_course(students) as course:
        yield measure("notebooks.py", course, lambda: start_ours(course, script))
    with made_course(students, on_demand="yes") as course:
        yield measure("  on demand, idle", course, lambda: start_ours(course, script))
        waits = first_visit_seconds(course)
        print(
            f"  first visits: {waits[len(waits) // 2]:.2f} s (median),"
            f" {waits[-1]:.2f} s (longest of {len(waits)});"
            f" {log_ins_per_second(course):.0f} log-ins per second",
            flush=True,
        )


def measure_others(students: int) -> Iterator[Row]:
    with made_course(students) as course:
        yield measure("jupyter-notebook", course, lambda: start_plain(course))
    if not (HUB_PREFIX / "bin/jupyterhub").exists():
        print(f"  no JupyterHub in {HUB_PREFIX}: left out", flush=True)
        return
    with made_course(students) as course, running_hub(course) as hub:
        yield measure("JupyterHub", course, lambda: start_hub(course, *hub))


def measure_herd(students: int, script: Path) -> str:
    with made_course(students, on_demand="yes") as course:
        start_ours(course, script)
        waits = herd_waits(course)
    median = waits[len(waits) // 2]
    return (
        f"a herd of {students} within {HERD_SECONDS:.0f} s, each logs in and runs a"
        f" cell: {len(waits)} succeeded; waited {median:.1f} s (median),"
        f" {waits[-1]:.1f} s (last)"
    )


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
    if python.exists():
        text = json.dumps([row._asdict() for row in rows])
        command = [str(python), "-c", PLOT, str(BENCH / "servers.png")]
        subprocess.run(command, input=text, text=True, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("students", nargs="*", type=int)
    parser.add_argument("--ours", nargs="*", type=int, default=[])
    parser.add_argument("--herd", type=int, default=0)
    parser.add_argument("--lesson", type=float, default=0, metavar="MINUTES")
    options = parser.parse_args()
    conftest.enter_private_host()
    BENCH.mkdir(exist_ok=True)
    rows = []
    lines = [describe_machine(), HEADER]
    print(*lines, sep="\n", flush=True)
    # A copy of the script is not measured by coverage, whatever the environment.
    with tempfile.TemporaryDirectory(prefix="notebooks-bench-") as directory:
        script = Path(shutil.copy(support.NOTEBOOKS, directory))
        for students in [*options.students, *options.ours]:
            both = [measure_ours(students, script)]
            if students in options.students:
                both.append(measure_others(students))
            for row in (row for each in both for row in each):
                rows.append(row)
                lines.append(format_row(row))
                print(lines[-1], flush=True)
        if options.herd:
            lines.append(measure_herd(options.herd, script))
            print(lines[-1], flush=True)
        if options.lesson:
            for line in measure_lesson(10, options.lesson, script):
                lines.append(line)
                print(line, flush=True)
    (BENCH / "table.txt").write_text("\n".join([*lines, ""]))
    draw(rows)
    return 0


if __name__ == "__main__":
    assert pwd.getpwuid(os.getuid()).pw_uid == 0, "the benchmark needs root"
    sys.exit(main())
