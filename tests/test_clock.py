"""The clock of the machine is set back, or forth, while a course runs.

Nothing of ours may look at the time of day to find out how long something takes. A
small library, preloaded into all that is started in the tests' namespace (ld.so(8)),
has them see another time of day; the monotonic clock and the file systems keep theirs,
as they do when the clock of a machine is set.
"""

import contextlib
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from conftest import CourseMaker
from support import Course, fetch, wait_until

pytestmark = pytest.mark.root

DAY_SECONDS = 86400
PRELOAD = Path("/etc/ld.so.preload")
LIBRARY = """
struct timespec { long seconds, nanoseconds; };
struct timeval { long seconds, microseconds; };
int open(const char *, int, ...), close(int);
long read(int, void *, unsigned long), atol(const char *), syscall(long, ...);

static long shift(void)
{
    char text[32] = "";
    int fd = open(CLOCK_FILE, 0);
    if (fd >= 0) {
        read(fd, text, sizeof text - 1);
        close(fd);
    }
    return atol(text);
}

int clock_gettime(int id, struct timespec *now)
{
#ifdef __aarch64__
    int status = syscall(113, id, now);
#else
    int status = syscall(228, id, now);
#endif
    if (id == 0 || id == 5)  /* CLOCK_REALTIME, CLOCK_REALTIME_COARSE */
        now->seconds += shift();
    return status;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec exact;
    clock_gettime(0, &exact);
    now->seconds = exact.seconds;
    now->microseconds = exact.nanoseconds / 1000;
    return 0;
}

long time(long *copy)
{
    struct timespec now;
    clock_gettime(0, &now);
    if (copy)
        *copy = now.seconds;
    return now.seconds;
}
"""


@pytest.fixture
def set_clock() -> Iterator[Callable[[int], None]]:
    """A function that sets the clock of all that is started: seconds from the real."""
    if not shutil.which("tcc"):
        pytest.skip("needs tcc, to compile what is preloaded")
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        directory = Path(name)
        directory.chmod(0o755)
        clock, library = directory / "clock", directory / "clock.so"
        command = ["tcc", "-shared", "-nostdlib", f'-DCLOCK_FILE="{clock}"', "-"]
        command += ["-o", str(library)]
        subprocess.run(command, input=LIBRARY, text=True, check=True)

        def set_clock(seconds: int) -> None:
            new = directory / "new"
            new.write_text(str(seconds))
            new.rename(clock)

        set_clock(0)
        stack.callback(PRELOAD.unlink)
        PRELOAD.write_text(f"{library}\n")
        yield set_clock


def sees_that_clock(process: psutil.Process) -> bool:
    return "/clock.so" in Path(f"/proc/{process.pid}/maps").read_text()


def lead_to_notebook(course: Course, username: str) -> str:
    """Return where the page leads a student at last, through its waiting page."""

    def address() -> str:
        page = fetch(f"{course.url}{username}", context=course.context())
        return page.headers.get("Location", "")

    return wait_until(address, 20, "the way to the notebook")


@contextlib.contextmanager
def jumping(set_clock: Callable[[int], None]) -> Iterator[None]:
    """Set the clock ten times a second: forth by a day, or back by nine."""
    over = threading.Event()

    def jump() -> None:
        for number in itertools.count():
            set_clock(DAY_SECONDS * (number % 10 - 10))
            if over.wait(0.1):
                return

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_clock_that_is_set_back_or_forth_disturbs_nobody(
    make_course: CourseMaker, set_clock: Callable[[int], None]
) -> None:
    course = make_course(2, on_demand="yes")
    course.check("setup")
    launch = course.launch().wait_ready()
    first, second = course.students
    notebook = course.notebook(first)
    notebook.execute("import time; kept = 42")
    server = course.server(first)
    helpers = [launch.helper("template process"), launch.helper("webserver")]
    assert all(map(sees_that_clock, [psutil.Process(launch.pid), server, *helpers]))

    set_clock(-DAY_SECONDS)
    shift = float(notebook.execute("time.time()")) - time.time()
    assert abs(shift + DAY_SECONDS) < 60
    # Who works goes on, and what is saved is retrieved.
    assert notebook.execute("kept") == "42"
    model = {"type": "file", "format": "text", "content": "saved"}
    notebook.api("PUT", "contents/course/file.txt", model)
    course.check("retrieve")
    assert (course.storage / first / "file.txt").read_text() == "saved"
    # A first visit, one after a crash, and one for which all is started again.
    with jumping(set_clock):
        assert lead_to_notebook(course, second) == course.notebook_url(second)
        assert course.notebook(second).execute("6 * 7") == "42"
        server.kill()
        course.notebook(first)
        for process in (*helpers, course.server(first)):
            process.kill()
        assert lead_to_notebook(course, first) == course.notebook_url(first)
        # What does not end before its grace period does.
        stubborn = "(trap '' TERM HUP; exec sleep 300) & disown"
        course.notebook(first).execute_in_terminal(stubborn)
        course.check("retrieve")
        course.check("shutdown")
        assert launch.stop() == 0
    assert "Traceback" not in launch.output
