"""Measure what a notebook server per student costs, side by side, in one run.

    make bench [STUDENTS="10 30"]

For each number of students: this project, and a plain `jupyter-notebook` for each
student that is started by su(1), one after the other. It runs in the private mount
namespace of the tests, with their accounts. A row says how many seconds it took until
the last server answered its log-in page, and for each server the CPU time until then,
its proportional set size (PSS: shared pages divided among those who share them) and its
private memory; the rest is what everything else of the contender holds.
"""

import argparse
import contextlib
import importlib.metadata
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

import conftest
import support


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


def wait_for_log_in(url: str) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError):
            return support.fetch(f"{url}login").status == 200
        return False

    support.wait_until(answers, 120, f"an answer of {url}")


def measure(
    contender: str, course: support.Course, start: Callable[[], list[psutil.Process]]
) -> Row:
    """Start servers, wait for their log-in pages, and look at what they hold.

    `start` returns the other processes of the contender. Their CPU time counts, too.
    """
    begin = time.monotonic()
    others = start()
    seconds = time.monotonic() - begin
    time.sleep(2)  # until it is quiet
    servers = course.processes()
    sizes = [memory(process) for process in servers]
    return Row(
        contender,
        len(course.students),
        seconds,
        cpu_seconds(servers) / len(course.students),
        sum(pss for pss, _ in sizes) / len(course.students),
        sum(private for _, private in sizes) / len(course.students),
        sum(memory(process)[0] for process in others),
    )


def start_ours(course: support.Course, script: Path) -> list[psutil.Process]:
    launch = course.launch(script=script).wait_ready()
    for username in course.students:
        wait_for_log_in(course.notebook_url(username))
    launcher = psutil.Process(launch.pid)
    return [launcher, *launcher.children()]


def start_plain(course: support.Course) -> list[psutil.Process]:
    """Start a plain server for each student as a teacher would without any tool."""
    program = Path(sys.executable).with_name("jupyter-notebook")
    for number, username in enumerate(course.students, 1):
        port = course.port + number
        command = (
            f"{program} --no-browser --ip=127.0.0.1 --port={port} --port-retries=0"
            f" --ServerApp.base_url=/{username}/"
        )
        subprocess.Popen(
            ["su", "-", username, "-c", f"exec {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_log_in(f"http://localhost:{port}/{username}/")
    return []


@contextlib.contextmanager
def made_course(students: int) -> Iterator[support.Course]:
    with tempfile.TemporaryDirectory(prefix="notebooks-bench-") as directory:
        with support.Course(Path(directory), students) as course:
            course.check("setup")
            yield course


def measure_all(students: int, script: Path) -> Iterator[Row]:
    with made_course(students) as course:
        yield measure("notebooks.py", course, lambda: start_ours(course, script))
    with made_course(students) as course:
        yield measure("jupyter-notebook", course, lambda: start_plain(course))


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("students", nargs="*", type=int, default=[10])
    numbers = parser.parse_args().students
    conftest.enter_private_namespace()
    conftest.choose_uids()
    print(describe_machine(), HEADER, sep="\n", flush=True)
    for students in numbers:
        # A copy of the script is not measured by coverage, whatever the environment.
        with tempfile.TemporaryDirectory(prefix="notebooks-bench-") as directory:
            script = Path(shutil.copy(support.NOTEBOOKS, directory))
            for row in measure_all(students, script):
                print(format_row(row), flush=True)
    return 0


if __name__ == "__main__":
    assert pwd.getpwuid(os.getuid()).pw_uid == 0, "the benchmark needs root"
    sys.exit(main())
