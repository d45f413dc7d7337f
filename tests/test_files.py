"""Copying: send, retrieve, and what hostile students put in their way."""

import contextlib
import grp
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import notebooks
from conftest import CourseMaker
from notebooks import CopyReport, Error, TreeCopy, identity_of
from support import Course, interrupt, made_account, python_of, run_as, start, wait_until

KEPT = notebooks.KEPT_COPY
EARLIER = 1_000_000_000  # seconds since the epoch; no file of the tests is that old


def copy(source: Path, destination: Path, **options: Any) -> CopyReport:
    """Copy as the user who runs the tests."""
    me = identity_of(pwd.getpwuid(os.geteuid()))
    destination.mkdir(exist_ok=True)
    return TreeCopy(me, me, **options).run((source, ()), (destination, ()))


def files_in(directory: Path) -> Iterator[Path]:
    """Yield all that is in a directory but the records of what was copied."""
    for path in directory.rglob("*"):
        if path.name != notebooks.RECORD_NAME:
            yield path


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in files_in(directory)}


def content(directory: Path) -> dict[str, str]:
    """Return what is in a directory: names, with the content of regular files."""
    found = {}
    for path in files_in(directory):
        info = path.lstat()
        name = str(path.relative_to(directory))
        if stat.S_ISDIR(info.st_mode):
            found[name] = "a directory"
        elif stat.S_ISREG(info.st_mode):
            found[name] = path.read_text()
        else:
            found[name] = stat.filemode(info.st_mode)[0]
    return found


def write(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    path = tmp_path / "destination"
    path.mkdir()
    return path


# ---------------------------------------------------------------------------------------
# TreeCopy, as any user
# ---------------------------------------------------------------------------------------


def test_a_copy_reports_what_is_new_updated_and_unchanged(
    source: Path, destination: Path
) -> None:
    files = {"a": "1", "dir/b": "2", "dir/sub/c": "3"}
    write(source, files)
    assert copy(source, destination) == CopyReport(new=3, copied_bytes=3)
    assert copy(source, destination) == CopyReport(unchanged=3)
    write(source, {"a": "11", "d": "4"})
    write(destination, {"dir/b": "x", "own": "5"})
    assert copy(source, destination) == CopyReport(
        new=1, updated=1, unchanged=1, kept=1, copied_bytes=3
    )
    left = {"dir/b": "x", "own": "5"}
    assert content(destination) == content(source) | left
    assert copy(source, destination, reset=True) == CopyReport(
        updated=1, unchanged=3, overwritten=1, named="'dir/b'", copied_bytes=1
    )
    assert content(destination) == content(source) | {"own": "5"}


def test_a_file_of_the_same_content_but_another_age_is_unchanged(
    source: Path, destination: Path
) -> None:
    write(source, {"file": "same"})
    write(destination, {"file": "same"})
    os.utime(destination / "file", (EARLIER, EARLIER))
    assert copy(source, destination, keep_as=KEPT, keep_all=True) == CopyReport(unchanged=1)


def test_modes_and_times_are_kept_without_setuid_setgid_and_sticky(
    source: Path, destination: Path
) -> None:
    write(source, {"file": "1", "script": "2", "secret": "3", "dir/file": "4"})
    for name, mode in {"file": 0o6644, "script": 0o4755, "secret": 0o600}.items():
        os.chmod(source / name, mode)
        os.utime(source / name, ns=(EARLIER, 123456789))
    os.chmod(source / "dir", 0o7750)
    copy(source, destination)
    for name, mode in {"file": 0o644, "script": 0o755, "secret": 0o600}.items():
        info = (destination / name).stat()
        assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (mode, 123456789)
    assert stat.S_IMODE((destination / "dir").stat().st_mode) == 0o750


def test_what_is_overwritten_is_kept_as_a_numbered_backup(
    source: Path, destination: Path
) -> None:
    for number in range(1, 4):
        write(source, {"dir/file": f"version {number}"})
        os.utime(source / "dir/file", (EARLIER, EARLIER + number))
        report = copy(source, destination, keep_as=KEPT, keep_all=True)
        assert report.backups == (number > 1)
    assert content(destination) == {
        "dir": "a directory",
        "dir/file": "version 3",
        "dir/file.~1~": "version 1",
        "dir/file.~2~": "version 2",
    }


def test_backups_of_names_that_begin_alike_do_not_get_in_each_others_way(
    source: Path, destination: Path
) -> None:
    """To count up all others first would take time by the square of their number."""
    long = [f"{'x' * 250}{i}" for i in range(3)]
    for number in (1, 2):
        write(source, dict.fromkeys(long, f"version {number}"))
        for name in long:
            os.utime(source / name, (EARLIER, EARLIER + number))
        copy(source, destination, keep_as=KEPT, keep_all=True)
    backups = names(destination) - {*long}
    assert len(backups) == 3 and all(name.endswith(".~1~") for name in backups)


def test_a_directory_in_the_place_of_a_file_is_moved_aside_and_the_reverse(
    source: Path, destination: Path
) -> None:
    write(source, {"a": "a file", "b/c": "in a directory"})
    write(destination, {"a/mine": "kept", "b": "kept too"})
    assert copy(source, destination) == CopyReport(
        new=1, updated=1, backups=2, copied_bytes=20
    )
    assert content(destination) == {
        "a": "a file",
        "a (mine 1)": "a directory",
        "a (mine 1)/mine": "kept",
        "b": "a directory",
        "b/c": "in a directory",
        "b (mine 1)": "kept too",
    }


def test_links_at_the_destination_are_replaced_and_never_followed(
    source: Path, destination: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    write(precious, {"file": "precious", "dir/x": "precious"})
    write(source, {"file": "sent", "dir/x": "sent", "gone": "sent", "hard": "sent"})
    (destination / "file").symlink_to(precious / "file")
    (destination / "dir").symlink_to(precious / "dir")
    (destination / "gone").symlink_to(precious / "new")
    (destination / "hard").hardlink_to(precious / "file")
    report = copy(source, destination)
    assert report.problem == ""
    assert content(precious) == {
        "file": "precious",
        "dir": "a directory",
        "dir/x": "precious",
    }
    assert (destination / "dir (mine 1)").is_symlink()
    (destination / "dir (mine 1)").unlink()
    assert content(destination) == content(source)


def test_special_files_at_the_destination_are_replaced(
    source: Path, destination: Path
) -> None:
    write(source, {"fifo": "sent", "socket": "sent", "closed": "sent"})
    os.mkfifo(destination / "fifo")
    write(destination, {"closed": "old"})
    os.chmod(destination / "closed", 0)
    with bound_socket(destination):
        assert copy(source, destination).updated == 3
    assert content(destination) == content(source)


@contextlib.contextmanager
def bound_socket(directory: Path) -> Iterator[None]:
    """Bind `socket` in a directory, by a path that is short enough for it."""
    fd = os.open(directory, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{fd}/socket")
        os.close(fd)
        yield


def test_links_fifos_sockets_and_mounts_are_skipped_and_counted(
    source: Path, destination: Path, tmp_path: Path
) -> None:
    write(tmp_path / "elsewhere", {"secret": "private"})
    write(source, {"file": "1"})
    (source / "link").symlink_to(tmp_path / "elsewhere/secret")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "broken").symlink_to("nowhere")
    (source / "self").symlink_to("self")
    os.mkfifo(source / "fifo")
    with bound_socket(source):
        report = copy(source, destination)
    assert report == CopyReport(new=1, skipped=6, copied_bytes=1)
    assert "6 skipped (links and other special files)" in str(report)
    assert content(destination) == {"file": "1"}


@pytest.mark.root
def test_a_mount_in_the_source_is_skipped(source: Path, destination: Path) -> None:
    write(source, {"mounted/hidden": "", "file": "1"})
    os.mknod(source / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with small_disk(source / "mounted") as mounted:
        write(mounted, {"large": "x"})
        report = copy(source, destination)
    assert report == CopyReport(new=1, skipped=2, copied_bytes=1)
    assert not (destination / "mounted/large").exists()


NAMES = [b"new\nline", b"\x1b[2J\x1b[31mred", b"\xff\xfe", "\u202etxt.exe".encode()]


def test_any_name_is_copied_and_none_is_printed_raw(
    source: Path, destination: Path
) -> None:
    unusual = [*NAMES, b"n" * 255, b" ", b"-rf", b"~", b"%s{0}"]
    for name in unusual:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text("text")
    assert copy(source, destination).new == len(unusual)
    assert {os.fsencode(path.name) for path in files_in(destination)} == {*unusual}
    for name in NAMES:
        report = CopyReport()
        report.fail(Path(os.fsdecode(name)), PermissionError(13, "Permission denied"))
        assert report.problem.isprintable()


def test_the_longest_name_can_be_updated_too(source: Path, destination: Path) -> None:
    """A backup's name is longer; the older version must not be lost over that."""
    name = "n" * 255
    write(source, {name: "old"})
    copy(source, destination, keep_as=KEPT, keep_all=True)
    write(source, {name: "newer"})
    report = copy(source, destination, keep_as=KEPT, keep_all=True)
    assert sorted(content(destination).values()) == ["newer", "old"]
    assert (report.updated, report.backups, report.problem) == (1, 1, "")


def test_directories_are_followed_to_a_depth_and_no_further(
    source: Path, destination: Path
) -> None:
    write(source, {"file": "1"})
    fd = os.open(source, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        parent, fd = fd, os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(parent)
    os.close(fd)
    report = copy(source, destination)
    assert report == CopyReport(new=1, skipped=1, copied_bytes=1)
    subprocess.run(["find", source, "-mindepth", "1", "-delete"], check=True)


def test_the_limit_counts_each_entry_and_the_size_that_files_pretend(
    source: Path, destination: Path
) -> None:
    with (source / "sparse").open("wb") as file:
        file.truncate(3 << 40)
    report = copy(source, destination, limit=1 << 30)
    assert report == CopyReport(over_limit="sparse")
    assert report.problem == "more than retrieve_limit: 'sparse' is left out"
    assert not os.listdir(destination)
    (source / "sparse").unlink()
    for i in range(3000):
        (source / f"empty{i}").touch()
    report = copy(source, destination, limit=1000 * notebooks.ENTRY_BYTES)
    assert (report.new, report.over_limit) == (1000, "...")
    assert len(names(destination)) == 1000


def test_a_file_that_grows_meanwhile_is_copied_as_long_as_it_was(
    source: Path, destination: Path
) -> None:
    script = 'exec >>"$0"; echo go >&2; while :; do printf %8192s x; done'
    command = ["sh", "-c", script, str(source / "log")]
    writer = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert writer.stderr and writer.stderr.readline()
        report = copy(source, destination, limit=1 << 30)
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()
    assert report.new + bool(report.over_limit) == 1
    assert report.copied_bytes == sum(x.stat().st_size for x in files_in(destination))
    assert report.copied_bytes <= (source / "log").stat().st_size


def test_a_dry_run_counts_and_writes_nothing(source: Path, destination: Path) -> None:
    write(source, {"a": "1", "dir/b": "2"})
    assert copy(source, destination, dry_run=True).new == 2
    assert not os.listdir(destination)
    copy(source, destination)
    write(source, {"a": "changed"})
    assert copy(source, destination, dry_run=True) == CopyReport(updated=1, unchanged=1)


def test_no_descriptor_is_left_open(source: Path, destination: Path) -> None:
    write(source, {"a": "1", "dir/b": "2", "dir/closed/c": "3"})
    os.chmod(source / "dir/closed", 0)
    os.mkfifo(source / "fifo")
    before = os.listdir("/proc/self/fd")
    copy(source, destination)
    assert os.listdir("/proc/self/fd") == before
    os.chmod(source / "dir/closed", 0o700)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte on a directory."""
    options = "size=1M,mode=0777"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "x", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.root
def test_a_full_disk_leaves_the_older_version_and_no_other_file(
    source: Path, destination: Path
) -> None:
    write(source, {"dir/large": "x" * 2_000_000})
    with small_disk(destination):
        write(destination, {"dir/large": "old"})
        with pytest.raises(Error, match="No space left on device"):
            copy(source, destination)
        assert content(destination) == {"dir": "a directory", "dir/large": "old"}


@pytest.mark.root
def test_a_colleague_can_go_on_with_a_copy_that_ended_early(
    source: Path, destination: Path
) -> None:
    write(source, {"dir/large": "x" * 2_000_000})
    os.chmod(source / "dir", 0o700)
    with small_disk(destination):
        with pytest.raises(Error, match="No space left on device"):
            copy(source, destination, mode=0o2070)
        assert stat.S_IMODE((destination / "dir").stat().st_mode) == 0o2770


def test_a_file_that_grows_is_read_to_the_size_that_it_had(source: Path) -> None:
    """Else who lets it grow faster than it is read keeps us reading."""
    write(source, {"one": "abc", "two": "abcdef"})
    with (source / "one").open() as one, (source / "two").open() as two:
        digest = notebooks.digest_file(one.fileno())
        assert notebooks.digest_file(two.fileno(), 3) == digest
        assert notebooks.digest_file(two.fileno()) != digest


STORED = {
    "what?.txt": r"what_-\w{8}\.txt",
    'a"*:<>|\\b': r"a_______b-\w{8}",
    "end. . ": r"end_-\w{8}",
    "aux.tar.gz": r"aux_\.tar-\w{8}\.gz",
    "CON": r"CON_-\w{8}",
    "...": r"_-\w{8}",
    "\udcff\udcfe.py": r"__-\w{8}\.py",
    "\x01\x7f": r"__-\w{8}",
    "é" * 127: r"é{90}-\w{8}",
    "x. " + "y" * 17 + " z": r"x-\w{8}\. y{17}",
    "Contents.txt": r"Contents-\w{8}\.txt",
}


@pytest.mark.parametrize("name", STORED, ids=ascii)
def test_a_portable_name_can_be_held_anywhere(name: str) -> None:
    portable = notebooks.portable_name(name)
    assert re.fullmatch(STORED[name], portable)
    assert portable == notebooks.portable_name(name) != notebooks.portable_name(name + "?")
    assert not notebooks.AWKWARD.search(portable)
    assert len(portable.encode()) <= 220


# ---------------------------------------------------------------------------------------
# send and retrieve
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def owner() -> Iterator[pwd.struct_passwd]:
    """Who gets what is retrieved."""
    with made_account() as account:
        yield account


@pytest.fixture(scope="module")
def class_of_three(
    tmp_path_factory: pytest.TempPathFactory, owner: pwd.struct_passwd
) -> Iterator[Course]:
    storage = Path(owner.pw_dir, "storage")
    directory = tmp_path_factory.mktemp("course")
    with Course(directory, 3, owner=owner.pw_name, storage_dir=storage) as course:
        course.storage = storage
        course.check("setup")
        yield course


@pytest.fixture
def course(class_of_three: Course) -> Course:
    """A course of three students, who have nothing but what was just sent."""
    course = class_of_three
    for username in course.students:
        subprocess.run(["rm", "-rf", course.home(username) / "course"], check=True)
        run_as(username, "mkdir", "course", check=True)
    subprocess.run(["rm", "-rf", course.storage, course.material], check=True)
    write(course.material, {"welcome.txt": "hello", "data/table.csv": "1,2"})
    course.check("send")
    return course


MATERIAL = {
    "material": "a directory",
    "material/welcome.txt": "hello",
    "material/data": "a directory",
    "material/data/table.csv": "1,2",
}


def counts(output: str, username: str) -> str:
    """Return what a command said about one student."""
    (line,) = (x for x in output.splitlines() if x.startswith(f"{username}: "))
    return line.removeprefix(f"{username}: ")


def shell(username: str, script: str, *arguments: object) -> str:
    """Run a shell script in a student's course directory."""
    command = ["sh", "-euc", f"cd ~/course; {script}", *arguments]
    return run_as(username, *command, check=True).stdout


@pytest.mark.root
def test_send_gives_each_student_the_material_as_their_own(course: Course) -> None:
    for username in course.students:
        account = pwd.getpwnam(username)
        home = course.home(username)
        assert content(home / "course") == MATERIAL
        for path in (home / "course").rglob("*"):
            assert (path.owner(), path.group()) == (username, username)
            assert os.stat(path).st_uid == account.pw_uid
    output = course.check("send")
    assert counts(output, username) == "0 new, 0 updated, 2 unchanged"
    assert "3 students: 0 new, 0 updated, 6 unchanged; 0 bytes copied." in output


@pytest.mark.root
@pytest.mark.parametrize("keep", ["no", "yes"])
def test_send_overwrites_what_was_changed_and_keeps_it_only_if_told(
    course: Course, keep: str
) -> None:
    course.configure(keep_changed=keep)
    changed, untouched, _ = course.students
    shell(changed, "echo mine >material/welcome.txt; echo own >material/own")
    output = course.check("send")
    if keep == "yes":  # not yet: the material is as it was when it was sent
        assert counts(output, changed).endswith("1 changed there and left alone")
        output = course.check("send", "--reset")
    text = "0 new, 1 updated, 1 unchanged"
    assert counts(output, changed) == text + ", 1 kept as backups" * (keep == "yes")
    assert counts(output, untouched) == "0 new, 0 updated, 2 unchanged"
    kept = {"material/welcome (mine 1).txt": "mine\n"} if keep == "yes" else {}
    home = course.home(changed) / "course"
    assert content(home) == MATERIAL | kept | {"material/own": "own\n"}
    course.configure(keep_changed="no")


@pytest.mark.root
def test_retrieve_gives_the_owner_what_others_cannot_read(
    course: Course, owner: pwd.struct_passwd
) -> None:
    username, other, _ = course.students
    script = "echo 42 >answer; chmod 4755 answer; mkdir open; chmod 777 open"
    shell(username, f"umask 0; {script}; ln answer open/hard")
    output = course.check("retrieve")
    assert counts(output, username) == "4 new, 0 updated, 0 unchanged"
    stored = course.storage / username
    assert content(stored) == MATERIAL | {
        "answer": "42\n",
        "open": "a directory",
        "open/hard": "42\n",
    }
    group = grp.getgrgid(owner.pw_gid).gr_name
    for path in (course.storage, stored, *stored.rglob("*")):
        assert (path.owner(), path.group()) == (owner.pw_name, group)
    assert stat.S_IMODE((stored / "answer").stat().st_mode) == 0o755
    assert stat.S_IMODE(stored.stat().st_mode) == 0o700
    os.chmod(owner.pw_dir, 0o755)
    os.chmod(course.storage, 0o755)
    assert run_as(owner.pw_name, "cat", stored / "answer").stdout == "42\n"
    for name in (username, other):
        assert "denied" in run_as(name, "cat", stored / "answer").stderr
    assert "0 new, 0 updated, 4 unchanged" in course.check("retrieve")


@pytest.mark.root
def test_what_is_retrieved_belongs_to_who_called_sudo_unless_told(
    make_course: CourseMaker,
) -> None:
    with made_account() as account:
        course = make_course(1, storage_dir=f"{account.pw_dir}/storage")
        course.check("setup")
        course.check("send")
        course.check("retrieve", env={"SUDO_UID": str(account.pw_uid)})
        storage = Path(account.pw_dir, "storage")
        found = [storage, *storage.rglob("*")]
        assert len(found) > 3
        assert {path.owner() for path in found} == {account.pw_name}
        assert stat.S_IMODE(storage.stat().st_mode) == 0o700


@pytest.mark.root
def test_retrieve_keeps_every_version_and_the_owners_notes(course: Course) -> None:
    username = course.students[0]
    course.check("retrieve")
    stored = course.storage / username / "material"
    (stored / "welcome.txt").write_text("graded: well done")
    shell(username, "echo second >material/welcome.txt")
    output = course.check("retrieve")
    assert counts(output, username) == ("0 new, 1 updated, 1 unchanged, 1 kept as backups")
    shell(username, "rm -r material; echo third >material")
    course.check("retrieve")
    assert content(course.storage / username) == {
        "material": "third\n",
        "material.~1~": "a directory",
        "material.~1~/data": "a directory",
        "material.~1~/data/table.csv": "1,2",
        "material.~1~/welcome.txt": "second\n",
        "material.~1~/welcome.txt.~1~": "graded: well done",
    }


@pytest.mark.root
def test_send_follows_no_link_out_of_a_home(course: Course) -> None:
    """To a file of root's, the owner's or another student's, and to directories."""
    hostile, other, _ = course.students
    files = [Path("/etc/shadow"), course.home(other) / "course/material/welcome.txt"]
    precious = Path("/etc/precious")
    write(precious, {"table.csv": "precious"})
    os.chmod(precious, 0o777)  # even where the student might write
    before = [path.read_bytes() for path in files]
    shell(
        hostile,
        f"cd material; rm -r *; ln -s {precious} data; ln -s {files[0]} welcome.txt",
    )
    write(course.material, {"more.txt": "more"})
    shell(hostile, f"ln -s {files[1]} material/more.txt")
    course.check("send")
    assert [path.read_bytes() for path in files] == before
    assert content(precious) == {"table.csv": "precious"}
    found = content(course.home(hostile) / "course")
    assert found == MATERIAL | {"material/more.txt": "more", "material/data (mine 1)": "l"}


@pytest.mark.root
def test_retrieve_reads_nothing_that_the_student_cannot(course: Course) -> None:
    """Links, closed files, and a hard link that somebody made to another's file."""
    hostile, other, _ = course.students
    shell(other, "echo private >secret; chmod 600 secret")
    secret = course.home(other) / "course/secret"
    script = "ln -s /etc/shadow shadow; ln -s /etc etc; ln -s $0 link; mkfifo fifo"
    shell(hostile, f"{script}; touch closed; chmod 0 closed; mkdir -m 0 dir", secret)
    (course.home(hostile) / "course/hard").hardlink_to(secret)
    done = course.run("retrieve")
    assert done.returncode == 1
    assert f"{hostile}: 3 not copied, first " in done.stderr
    assert "Permission denied" in done.stderr
    assert counts(done.stdout, hostile) == (
        "2 new, 0 updated, 0 unchanged, 4 skipped (links and other special files)"
    )
    found = content(course.storage / hostile)
    assert {*found} - {*MATERIAL} <= {"dir"}
    assert content(course.storage / other)["secret"] == "private\n"


@pytest.mark.root
@pytest.mark.parametrize("command", ["send", "retrieve"])
@pytest.mark.parametrize("made", ["ln -s {} course", "echo x >course", "mkfifo course"])
def test_a_course_directory_that_is_none_stops_only_its_student(
    course: Course, command: str, made: str
) -> None:
    hostile, *others = course.students
    elsewhere = course.home(others[0])
    os.chmod(elsewhere, 0o777)
    write(course.material, {"new.txt": "new"})
    run_as(hostile, "sh", "-c", f"rm -r course; {made.format(elsewhere)}", check=True)
    before = os.listdir(elsewhere)
    done = course.run(command)
    os.chmod(elsewhere, 0o700)
    assert done.returncode == 1
    path = f"{course.home(hostile)}/course"
    assert f"{hostile}: '{path}' is a link or a file, not a directory" in done.stderr
    assert f"1 failed: {hostile}." in done.stdout
    assert os.listdir(elsewhere) == before
    for username in others:
        new = {"send": 1, "retrieve": 2}[command]
        assert counts(done.stdout, username).startswith(f"{new} new, ")
    subprocess.run(["rm", path], check=True)
    assert not (course.storage / hostile / "material").exists()


@pytest.mark.root
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("chmod 0 ~", "Permission denied"),
        ("chmod 0 .", "Permission denied"),
        ("cd; rm -r course", "No such file or directory"),
    ],
)
def test_a_closed_or_missing_directory_is_named(
    course: Course, script: str, reason: str
) -> None:
    hostile, other, _ = course.students
    shell(hostile, script)
    done = course.run("retrieve")
    os.chmod(course.home(hostile), 0o700)
    assert done.returncode == 1
    assert f"{hostile}: '{course.home(hostile)}" in done.stderr
    assert done.stderr.endswith(f": {reason}\n")
    assert counts(done.stdout, other) == "2 new, 0 updated, 0 unchanged"


SWAP = """
import contextlib, os
os.chdir("course/material")
print(flush=True)
while True:
    with contextlib.suppress(OSError):
        os.rename("data", "aside")
    with contextlib.suppress(OSError):
        os.symlink(os.path.expanduser("~/outside"), "data")
    with contextlib.suppress(OSError):
        os.unlink("data")
    with contextlib.suppress(OSError):
        os.rename("aside", "data")
"""


@pytest.mark.root
@pytest.mark.parametrize("command", ["send", "retrieve"])
def test_a_directory_that_becomes_a_link_meanwhile_leads_nowhere(
    course: Course, command: str
) -> None:
    """The link leads to where the student may read and write: no rights stop us."""
    hostile, *others = course.students
    run_as(hostile, "sh", "-c", "mkdir outside; echo x >outside/private", check=True)
    with python_of(hostile, SWAP) as swapper:
        for i in range(8):
            write(course.material, {"data/table.csv": f"1,{i}"})
            done = course.run(command)
            assert done.returncode in (0, 1)
            assert "Traceback" not in done.stderr
            assert not any(f"{username}: " in done.stderr for username in others)
        assert swapper.poll() is None
    outside = course.home(hostile) / "outside"
    assert content(outside) == {"private": "x\n"}
    stored = course.storage / hostile
    assert not [path for path in stored.rglob("*") if path.name == "private"]
    subprocess.run(["rm", "-r", outside], check=True)


@pytest.mark.root
def test_a_file_that_its_student_holds_a_lease_on_does_not_hold_us_up(
    course: Course,
) -> None:
    """Who opens such a file waits for the holder, up to 45 seconds: fcntl(2)."""
    hostile, other, _ = course.students
    script = """
import fcntl, os, signal, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open("course/material/welcome.txt", os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print(flush=True)
time.sleep(300)
"""
    with python_of(hostile, script):
        done = course.run("retrieve", timeout=20)
        assert done.returncode == 1
        assert f"{hostile}: 1 not copied, first 'material/welcome.txt'" in done.stderr
        assert counts(done.stdout, other) == "2 new, 0 updated, 0 unchanged"
        write(course.material, {"welcome.txt": "changed"})
        output = course.check("send", timeout=20)
        assert counts(output, hostile) == "0 new, 1 updated, 1 unchanged"


@pytest.mark.root
def test_what_is_over_the_limit_is_left_out_and_named(course: Course) -> None:
    course.configure(retrieve_limit="10M")
    sparse, many, other = course.students
    shell(sparse, "truncate --size 3T sparse")
    shell(many, "mkdir many; cd many; seq 3000 | xargs touch")
    done = course.run("retrieve", timeout=30)
    course.configure(retrieve_limit="1G")
    assert done.returncode == 1
    assert f"{sparse}: more than retrieve_limit: 'sparse' is left out" in done.stderr
    assert f"{many}: " in done.stderr and f"{other}: " not in done.stderr
    assert content(course.storage / sparse) == MATERIAL
    assert 2000 < len(os.listdir(course.storage / many / "many")) <= 10 << 8
    assert content(course.storage / other) == MATERIAL


@pytest.mark.root
def test_what_is_printed_about_hostile_names_is_harmless(course: Course) -> None:
    hostile = course.students[0]
    for name in NAMES:
        shell(hostile, 'touch "$0"; chmod 0 "$0"', os.fsdecode(name))
        done = course.run("retrieve")
        assert done.returncode == 1
        assert f"{hostile}: 1 not copied, first " in done.stderr
        for line in (done.stdout + done.stderr).splitlines():
            assert line.isprintable()
        shell(hostile, 'rm -f "$0"', os.fsdecode(name))


@pytest.mark.root
def test_a_full_disk_of_the_owners_leaves_no_part_of_a_file(course: Course) -> None:
    large, *others = course.students
    shell(large, "head -c 3000000 /dev/urandom >zz-large")
    stored_large = course.storage / large  # alone: others are copied at the same time
    run_as(course.storage.parent.owner(), "mkdir", "-p", stored_large, check=True)
    with small_disk(stored_large):
        done = course.run("retrieve")
        assert done.returncode == 1
        assert f"{large}: No space left on device" in done.stderr
        assert "zz-large" not in content(stored_large)
        parts = course.storage.rglob(f"{notebooks.PART_PREFIX}*")
        assert not [*parts]
        for username in others:
            assert content(course.storage / username) == MATERIAL
    course.check("retrieve")
    assert (stored_large / "zz-large").stat().st_size == 3000000


@pytest.mark.root
@pytest.mark.parametrize("command", ["send", "retrieve"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_copy_leaves_no_part_of_a_file(
    course: Course, command: str, signum: signal.Signals
) -> None:
    course.configure(retrieve_limit="4G")
    username = course.students[0]
    stored = course.storage / username
    source = course.home(username) / "course"
    if command == "send":
        source, stored = course.material, source / "material"
    size = (300 << 20) + 1
    with (source / "large").open("wb") as file:
        file.truncate(size)
    process = start(command, config=course.config)

    def copies_it() -> bool:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                if any(Path(file.path).name == "large" for file in child.open_files()):
                    return True
        return False

    try:
        wait_until(copies_it, 20, "the copy of the file")
    finally:
        errors = interrupt(process, signum)
    assert process.returncode in (130, -signum), errors
    assert "Traceback" not in errors
    parts = names(stored) - names(source)
    assert len(parts) <= (signum == signal.SIGKILL)  # the next one removes it
    course.check(command)
    assert names(stored) == names(source)
    assert (stored / "large").stat().st_size == size


@pytest.mark.root
def test_students_without_an_account_are_named_and_the_others_get_theirs(
    course: Course,
) -> None:
    rows = course.rows()
    nobody = f"{course.group}x"
    course.write_students([{"username": nobody}, *({"username": x} for x in rows)])
    try:
        for command in ("send", "retrieve"):
            done = course.run(command)
            assert done.returncode == 1
            assert f"{nobody}: has no account; run setup first" in done.stderr
            assert "3 students: " in done.stdout
    finally:
        course.write_students(rows.values())


@pytest.mark.root
def test_material_that_is_not_there_or_not_the_callers_is_refused(
    course: Course, owner: pwd.struct_passwd
) -> None:
    course.configure(material_dir="nowhere")
    done = course.run("send")
    course.configure(material_dir="material")
    assert done.returncode == 2
    assert "material_dir: " in done.stderr and "No such file" in done.stderr
    done = course.run("send", env={"SUDO_UID": str(owner.pw_uid)})
    assert done.returncode == 2
    assert "material_dir: " in done.stderr and "Permission denied" in done.stderr


@pytest.mark.root
def test_storage_that_its_owner_cannot_make_is_refused(course: Course) -> None:
    course.configure(storage_dir="/root/storage")
    done = course.run("retrieve")
    course.configure(storage_dir=course.storage)
    assert done.returncode == 2
    assert "storage_dir: /root/storage cannot be made" in done.stderr
