"""Run jupyter_server's own tests against a student's server and a plain one beside it.

Prints which tests passed with the plain server alone. `make upstream` calls it, with the
directory of the suite of the version that is installed. Both servers run as the student.
"""

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import conftest
import support
from support import Course

SUITE = (
    *("services/contents", "services/kernels/test_api.py", "services/config/test_api.py"),
    *("services/sessions/test_api.py", "services/kernelspecs/test_api.py"),
    *("services/api/test_api.py", "test_terminal.py"),
)
SECONDS = 30  # for a test
TOKEN = "plain"
FIXTURES = Path(__file__).with_name("upstream_fixtures.py")


def unpack_suite(archive: Path, directory: Path) -> Path:
    """Unpack the source of jupyter_server with our fixtures; return where its tests are."""
    with tarfile.open(archive) as source:
        source.extractall(directory)
    (suite,) = directory.glob("*/tests")
    with (suite / "conftest.py").open("a") as file:
        file.write(FIXTURES.read_text())
    return suite


def run_suite(account: pwd.struct_passwd, suite: Path, **target: str) -> dict[str, str]:
    """Return the outcome of each test, with a server at a URL."""
    environment = {f"UPSTREAM_{key.upper()}": value for key, value in target.items()}
    options = f"-q -rA --color=no --timeout={SECONDS} -p no:cacheprovider -W ignore"
    tests = [str(suite / each) for each in SUITE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), *tests],
        cwd=suite.parent,
        env={**support.ENVIRONMENT, "HOME": account.pw_dir, **environment},
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    found = re.findall(
        r"^(PASSED|FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE
    )
    if not found:
        sys.exit(done.stdout + done.stderr)
    print(f"{target['url']}: {done.stdout.splitlines()[-1]}", flush=True)
    return {test.removeprefix(f"{suite.parent}/"): outcome for outcome, test in found}


def start_plain(account: pwd.struct_passwd, port: int) -> "subprocess.Popen[bytes]":
    program = Path(sys.executable).with_name("jupyter-server")
    return subprocess.Popen(
        [
            str(program),
            f"--port={port}",
            "--no-browser",
            f"--IdentityProvider.token={TOKEN}",
        ]
        + ["--ServerApp.root_dir=plain", "--ServerApp.base_url=/plain/"],
        cwd=account.pw_dir,
        env={
            **support.ENVIRONMENT,
            "HOME": account.pw_dir,
            "PATH": f"{program.parent}:{support.ENVIRONMENT['PATH']}",
        },
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        stderr=subprocess.DEVNULL,
    )


def compare(course: Course, archive: Path, directory: Path) -> int:
    """Print the tests that pass with the plain server alone; return how many they are."""
    (username,) = course.students
    course.check("setup")
    support.run_as(username, "mkdir", "plain", "ours", check=True)
    course.launch().wait_ready()
    account, notebook = pwd.getpwnam(username), course.notebook(username)
    suite = unpack_suite(archive, directory)
    subprocess.run(["chown", "-R", f"{username}:", directory], check=True)

    port = support.free_port_range(1)
    plain = start_plain(account, port)
    url = f"http://localhost:{port}/plain/"

    def is_ready() -> bool:
        try:
            return support.fetch(f"{url}api").status == 200
        except OSError:
            return False

    try:
        support.wait_until(is_ready, 30, "the plain server")
        token = json.dumps({"Authorization": f"token {TOKEN}"})
        root = f"{account.pw_dir}/plain"
        expected = run_suite(account, suite, url=url, root=root, headers=token)
    finally:
        plain.kill()
        plain.wait()

    cookies = {"Cookie": notebook.cookie_header()}
    cookies["X-XSRFToken"] = notebook.cookies["_xsrf"].value
    target = {"url": notebook.url, "root": f"{account.pw_dir}/ours"}
    found = run_suite(account, suite, headers=json.dumps(cookies), **target)
    missed = [x for x in expected if expected[x] == "PASSED" and found.get(x) != "PASSED"]
    print("\n".join(["Only the plain one passes:", *(missed or ["none"])]))
    return len(missed)


def main() -> int:
    os.umask(0o022)
    conftest.enter_private_host()
    directory = Path(tempfile.mkdtemp(prefix="upstream-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        settings = {"root_dir": "ours", "launch_dir": "ours"}
        with Course(directory / "course", 1, **settings) as course:
            return compare(course, Path(sys.argv[1]), directory / "suite")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
