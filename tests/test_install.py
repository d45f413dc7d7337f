"""`make install` and `make upgrade`, with tiny packages instead of Jupyter's."""

import base64
import contextlib
import hashlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from conftest import CourseMaker
from support import ENVIRONMENT, ROOT, free_port_range, kill_all, processes_of

SCRIPT = "#!python\nimport brick\nprint(brick.__file__, brick.VERSION)\n"
# Imports something late, and has a file of its version open as a library is.
STUDENT = """
import mmap, sys
import brick
file = open(brick.__file__, "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(brick.VERSION, flush=True)
sys.stdin.readline()
import brick.late
print(brick.late.VERSION)
"""


def digest_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def make_wheel(
    directory: Path, name: str, version: str, files: Mapping[str, str], needs: str = ""
) -> None:
    """Write a wheel: PEP 427."""
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    wheel = "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {**files, f"{info}/METADATA": about, f"{info}/WHEEL": wheel}
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in content.items():
            member = zipfile.ZipInfo(path)
            member.external_attr = 0o100755 << 16  # or pip makes no program of it
            file.writestr(member, text)
        record = "".join(f"{path},{digest_of(text)},\n" for path, text in content.items())
        file.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


class Installation:
    """A place for `make` to install into, and an index of packages."""

    def __init__(self, directory: Path):
        self.prefix = directory / "notebooks"
        self.versions = directory / "notebooks.versions"
        self.index = directory / "index"
        self.link = directory / "bin/notebooks.py"
        self.index.mkdir()
        script = {"notebooks_py-1.0.data/scripts/notebooks.py": SCRIPT}
        make_wheel(self.index, "notebooks_py", "1.0", script, "brick")
        self.release("brick", "1.1")
        self.release("extra", "3.0")

    def release(self, name: str, version: str) -> None:
        text = f"VERSION = {version!r}\n"
        files = {f"{name}/__init__.py": text, f"{name}/late.py": text}
        make_wheel(self.index, name, version, files)

    def environment(self) -> dict[str, str]:
        index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        return {**ENVIRONMENT, **index, "PIP_CONFIG_FILE": os.devnull}

    def run_make(self, goal: str) -> subprocess.CompletedProcess[str]:
        variables = (
            f"PREFIX={self.prefix} LINK={self.link} PACKAGE=notebooks-py BUILD_FILES="
        )
        return subprocess.run(
            ["make", "-C", str(ROOT), goal, *variables.split()],
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=120,
        )

    def make(self, goal: str) -> str:
        done = self.run_make(goal)
        assert done.returncode == 0, done
        return done.stdout

    def pip_install(self, name: str, umask: int = 0o022) -> None:
        command = [str(self.prefix / "bin/pip"), "install", "--quiet", name]
        subprocess.run(command, check=True, env=self.environment(), umask=umask)

    def site(self) -> Path:
        (site,) = self.prefix.glob("lib/python3*/site-packages")
        return site

    def run(self) -> str:
        """Return what the installed program says."""
        return subprocess.check_output([str(self.link), "--version"], text=True)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    installation = Installation(tmp_path_factory.mktemp("installation"))
    installation.make("install")
    assert installation.run().endswith(" 1.1\n")
    return installation


@pytest.mark.root
def test_make_install_mends_what_is_damaged_and_opens_what_is_closed(
    installation: Installation,
) -> None:
    installation.pip_install("extra", umask=0o077)
    site = installation.site()
    shutil.rmtree(site / "extra")
    shutil.rmtree(site / "pip")
    (site / "brick/__init__.py").write_text("VERSION = 'bad'\n")  # as long as before
    settings = installation.prefix / "etc/jupyter/of-the-teacher.json"
    settings.parent.mkdir(parents=True)
    settings.write_text("{}")
    said = installation.make("install")
    assert "Damaged" in said and {"brick==1.1", "extra==3.0"} < {*said.split()}
    assert installation.run().endswith(" 1.1\n")
    assert settings.read_text() == "{}"
    mended = installation.site() / "extra"
    assert mended.stat().st_mode & 0o777 == 0o755
    assert (mended / "late.py").stat().st_mode & 0o777 == 0o755
    installation.pip_install("extra")  # pip works, too
    assert "Damaged" not in installation.make("install")


@pytest.mark.root
def test_make_upgrade_leaves_what_runs_its_version_and_its_work(
    installation: Installation,
) -> None:
    installation.pip_install("extra")
    version = installation.prefix.resolve()
    with subprocess.Popen(
        [version / "bin/python", "-c", STUDENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as student:
        assert student.stdout and student.stdin
        assert student.stdout.readline() == "1.1\n"
        installation.release("brick", "1.2")
        installation.release("brick", "2.0")
        installation.release("extra", "3.5")
        assert "launch has been ended and started again" in installation.make("upgrade")
        assert installation.run().endswith(" 1.2\n"), "within a major version"
        text = (installation.site() / "extra/late.py").read_text()
        assert text == "VERSION = '3.5'\n", "what the teacher has installed"
        installation.make("install")
        assert version.is_dir() and not version.is_symlink()
        output, _ = student.communicate("\n")
        assert output == "1.1\n"

    installation.make("install")
    assert version.is_symlink()
    script = f"#!{version}/bin/python\nimport brick; print(brick.VERSION)\n"
    theirs = installation.prefix.with_name("script-of-a-student")
    theirs.write_text(script)
    theirs.chmod(0o755)
    assert subprocess.check_output([theirs], text=True) == "1.2\n"
    kept = [x for x in installation.versions.iterdir() if not x.is_symlink()]
    assert len(kept) == 2, "the newest, and a way back"


@pytest.mark.root
def test_make_install_keeps_what_was_installed_for_an_earlier_python(
    tmp_path: Path,
) -> None:
    """As after an upgrade of the system, for which nothing can be imported any more."""
    installation = Installation(tmp_path)
    installation.make("install")
    installation.pip_install("extra")
    installation.release("extra", "3.5")
    site = installation.site()
    (site / "knife.py").write_text("copied by hand")
    site.parent.rename(site.parent.with_name("python3.0"))
    done = subprocess.run([installation.link], capture_output=True, text=True)
    assert "No module named 'brick'" in done.stderr
    done = installation.run_make("install")
    assert "so only in the version before: knife.py\n" in done.stderr
    assert installation.run().endswith(" 1.1\n")
    assert "VERSION = '3." in (installation.site() / "extra/late.py").read_text()
    assert list(installation.versions.glob("*/lib/python3.0/site-packages/knife.py"))


@pytest.mark.root
def test_a_script_names_what_helps_where_a_package_is_missing(tmp_path: Path) -> None:
    """The installed one another make install, any other the installed one."""
    environment = tmp_path / "version"
    venv.create(environment, symlinks=True)
    (tmp_path / "link").symlink_to(environment)
    python = tmp_path / "link/bin/python"
    said = {}
    for directory in (environment / "bin", tmp_path):
        script = Path(shutil.copy(ROOT / "notebooks.py", directory))
        done = subprocess.run([python, script], capture_output=True, text=True)
        assert done.returncode == 2
        said[directory] = done.stderr.removeprefix(f"notebooks.py: {python} lacks ")
    assert said[environment / "bin"].startswith("pexpect; run `sudo make install` again")
    assert said[tmp_path].startswith("pexpect; run the notebooks.py that")


# Stands for the script that is installed, without all that it needs.
DEMO_SCRIPT = f"""#!python
import os, sys
command = [{sys.executable!r}, {str(ROOT / "notebooks.py")!r}, *sys.argv[1:]]
if os.path.exists("%s") and "launch" in command:  # each session takes its time
    slow = "strace -D -f -qq -o /dev/null -e inject=setsid:delay_enter=7000000"
    command = [*slow.split(), *command]
os.execvp(command[0], command)
"""


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path)
    script = DEMO_SCRIPT % (tmp_path / "is-slow")
    files = {"notebooks_py-2.0.data/scripts/notebooks.py": script}
    make_wheel(installation.index, "notebooks_py", "2.0", files)
    subprocess.run(["useradd", "--create-home", "ada"], check=True)
    yield installation
    installation.run_make("undo-demo")
    kill_all(lambda: processes_of(["ada", "emmy"]), "the demo")
    subprocess.run(["userdel", "--remove", "ada"], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.root
def test_a_demo_that_fails_names_the_way_on_and_back(
    demo: Installation, tmp_path: Path
) -> None:
    """On a host where a port is taken, and a student of the demo is somebody real."""
    config = demo.prefix.with_name("notebooks-demo") / "notebooks.cfg"
    own = Path(pwd.getpwnam("ada").pw_dir, "course/own.txt")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is taken already
            stack.enter_context(socket.create_server(("", 8888)))
        done = demo.run_make("demo")
    assert done.returncode != 0
    assert "port 8888: Address already in use" in done.stderr
    assert f"own {config}, and run sudo make demo again;" in done.stderr
    assert "sudo make undo-demo" in done.stderr

    config.write_text(
        re.sub(r"(?m)^port = .*", f"port = {free_port_range(3)}", config.read_text())
    )
    (tmp_path / "is-slow").touch()
    done = demo.run_make("demo")
    assert "0 of 2 notebook servers run, 2 still starting.\n" in done.stdout
    assert "sudo make undo-demo ends it" in done.stdout
    assert "does not run" not in done.stderr and done.returncode == 0
    own.write_text("theirs")
    said = demo.make("undo-demo")
    assert (
        "ada was not made by setup: it only leaves the course; ~ada/course stays." in said
    )
    assert own.read_text() == "theirs"
    with pytest.raises(KeyError):
        pwd.getpwnam("emmy")
    assert not config.parent.exists() and not demo.prefix.exists()


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that students can enter, as /opt."""
    with tempfile.TemporaryDirectory(dir="/home") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def make_environment(directory: Path) -> Path:
    """Return an environment with the packages of ours, behind a link as in /opt."""
    environment = directory / "version"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        os.symlink(path, site / path.name)
    link = directory / "link"
    link.symlink_to(environment)
    return link


@pytest.mark.root
def test_launch_names_closed_packages_and_keeps_to_its_version(
    make_course: CourseMaker, reachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = make_course(1, own_packages="no")
    link = make_environment(reachable)
    (site,) = link.glob("lib/*/site-packages")
    for name in ("cowsay", "cowsay-6.1.dist-info"):
        (site / name).mkdir(mode=0o700)
    (site / "knife.py").touch(mode=0o600)
    python = str(link / "bin/python")
    monkeypatch.setattr(sys, "executable", python)
    course.check("setup")
    launch = course.launch().wait_ready()
    place = link.resolve()
    closed = (
        f"students cannot read the packages cowsay, knife: run `chmod -R go+rX {place}`"
    )
    assert closed in launch.output
    (username,) = course.students
    notebook = course.notebook(username)
    assert notebook.execute("import sys; print(sys.prefix)") == str(place)
    assert notebook.execute("import os; os.environ['PATH'].split(':')[0]") == repr(
        str(place / "bin")
    )
    assert not [x for x in course.processes() if str(link) in " ".join(x.cmdline())]
