"""notebooks.cfg: every key, every error, all of them at once."""

import configparser
import os
import re
from pathlib import Path
from typing import Any

import pytest

import notebooks
import support

OLD_FILE = """\
# as it was written in 2012
[Setup]
user_list=students.csv
tutorial_dir=labcourse_fall_2011
material_dir=../notebooks
password_length=10
group=labstudents
profile=course
[Launch]
cert_file=ipcert.pem
server_address=
web_title=100% Lab Course: Fall 2011
launch_dir=
port=9999
[Shutdown]
storage_dir=/srv/results
owner=root
"""


def read(directory: Path, text: str | bytes) -> tuple[notebooks.Config, list[str]]:
    """Return what the file says and what is wrong with it."""
    path = directory / "notebooks.cfg"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return notebooks.read_config(path)


def section_of(key: str) -> str:
    (section,) = (name for name, keys in support.SECTIONS.items() if key in keys.split())
    return section


def read_key(directory: Path, key: str, value: str) -> tuple[Any, list[str]]:
    """Return the value of a key that alone is in the file, and what is wrong."""
    config, problems = read(directory, f"[{section_of(key)}]\n{key} = {value}\n")
    return getattr(config, key), problems


def test_an_empty_file_gives_the_defaults_beside_it(tmp_path: Path) -> None:
    config, problems = read(tmp_path, "")
    assert not problems
    assert config == notebooks.Config(
        path=tmp_path / "notebooks.cfg",
        user_list=tmp_path / "students.csv",
        tutorial_dir=Path("course"),
        material_dir=tmp_path / "material",
        shared_dir=None,
        password_length=12,
        group="students",
        keep_changed=False,
        ignore=tuple(notebooks.IGNORE.split()),
        profile="",
        cert_file=None,
        key_file=None,
        server_address="",
        web_title="Notebooks",
        language="en",
        root_dir=None,
        launch_dir=None,
        start_page="tree",
        port=8888,
        list_students=True,
        on_demand=False,
        idle_minutes=0,
        idle_kernel_minutes=0,
        busy_minutes=0,
        debugger=False,
        tcp_kernels=True,
        own_packages=True,
        gateway_url="",
        gateway_token_file=None,
        gateway_kernel=(),
        gateway_ca=None,
        storage_dir=tmp_path / "storage",
        owner="",
        retrieve_limit=1 << 30,
        archive_dir=None,
        archive_limit=10 << 30,
        memory=0,
        cpu=0.0,
        processes=1000,
        disk=0,
        environment={},
    )
    assert config.start_dir == Path("course/material")


def test_a_file_of_2012_works(tmp_path: Path) -> None:
    directory = tmp_path / "course"
    directory.mkdir()
    config, problems = read(directory, OLD_FILE)
    assert not problems
    assert (config.user_list, config.material_dir, config.cert_file) == (
        directory / "students.csv",
        tmp_path / "notebooks",
        directory / "ipcert.pem",
    )
    assert (config.tutorial_dir, config.password_length, config.group) == (
        Path("labcourse_fall_2011"),
        10,
        "labstudents",
    )
    assert config.start_dir == Path("labcourse_fall_2011/notebooks")
    assert (config.profile, config.port, config.launch_dir) == ("course", 9999, None)
    assert config.web_title == "100% Lab Course: Fall 2011"
    assert (config.storage_dir, config.owner) == (Path("/srv/results"), "root")


def test_a_file_of_windows_works(tmp_path: Path) -> None:
    text = "[Launch]\nweb_title = Übung\nPort = 9000\n".replace("\n", "\r\n")
    config, problems = read(tmp_path, text.encode("utf-8-sig"))
    assert (config.web_title, config.port, problems) == ("Übung", 9000, [])


def test_the_defaults_in_the_sample_are_the_defaults() -> None:
    sample = configparser.ConfigParser(interpolation=None)
    sample.read(support.ROOT / "notebooks.cfg")
    written = [(section, *item) for section in sample for item in sample.items(section)]
    own = {"web_title": "Sample course", "keep_changed": "yes"}
    assert written == [
        (option["section"], key, own.get(key, option["default"]))
        for key, option in notebooks.config_keys().items()
    ]


def test_the_readme_lists_each_key_with_its_default() -> None:
    text = (support.ROOT / "README.rst").read_text()
    for section in support.SECTIONS:
        table = text.partition(f"\n``[{section}]`` ")[2].partition("\n\n")[0]
        rows = re.findall(r"^``(\w+)`` +(?:``(\S+)``)?", table, re.MULTILINE)
        rows = [
            (key, notebooks.IGNORE if key == "ignore" else default) for key, default in rows
        ]
        assert rows == [
            (key, option["default"])
            for key, option in notebooks.config_keys().items()
            if option["section"] == section
        ]

    assert f"``ignore`` is ``{notebooks.IGNORE}``" in text


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("ignore", "", ()),
        ("ignore", ".git  *.bak", (".git", "*.bak")),
        ("material_dir", "/srv/week 1/", Path("/srv/week 1")),
        ("material_dir", "~/week1", Path("~/week1").expanduser()),
        ("material_dir", "/srv/{username}/1", Path("/srv/{username}/1")),
        ("tutorial_dir", "physics/2024", Path("physics/2024")),
        ("password_length", "8", 8),
        ("group", "", ""),
        ("keep_changed", "TRUE", True),
        ("list_students", "off", False),
        ("idle_minutes", "30  # half an hour", 30),
        ("server_address", "lab.example.org", "lab.example.org"),
        ("server_address", "{username}.example.org", "{username}.example.org"),
        ("server_address", "192.0.2.1", "192.0.2.1"),
        ("server_address", "2001:db8::1", "[2001:db8::1]"),
        ("server_address", "[2001:db8::1]", "[2001:db8::1]"),
        ("retrieve_limit", "4096", 4096),
        ("retrieve_limit", "500M", 500 << 20),
        ("retrieve_limit", "2 GiB", 2 << 30),
        ("retrieve_limit", "1t", 1 << 40),
        ("web_title", "Physics #1; <b>100%</b>", "Physics #1; <b>100%</b>"),
    ],
)
def test_a_value_is_understood(
    tmp_path: Path, key: str, written: str, meant: object
) -> None:
    assert read_key(tmp_path, key, written) == (meant, [])


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("user_list", "", "needs a path"),
        ("tutorial_dir", "/srv/course", "relative to the home"),
        ("tutorial_dir", "../course", "relative to the home"),
        ("tutorial_dir", "~/course", "relative to the home"),
        ("tutorial_dir", ".", "relative to the home"),
        ("tutorial_dir", "", "relative to the home"),
        ("launch_dir", "course/../..", "relative to the home"),
        ("password_length", "7", "from 8 to 128"),
        ("password_length", "twelve", "from 8 to 128"),
        ("password_length", "-12", "from 8 to 128"),
        ("password_length", "１２", "from 8 to 128"),
        ("port", "0", "from 1 to 65535"),
        ("port", "65536", "from 1 to 65535"),
        ("idle_minutes", "1.5", "whole number"),
        ("group", "Lab Students", "lower-case"),
        ("group", "-g", "lower-case"),
        ("profile", "../other", "IPython profile"),
        ("profile", "..", "IPython profile"),
        ("keep_changed", "maybe", "yes or no"),
        ("keep_changed", "", "yes or no"),
        ("ignore", "data/*.bak", "patterns of names"),
        ("server_address", "https://lab.example.org/", "host name alone"),
        ("server_address", "lab.example.org:8888", "must not have a port"),
        ("server_address", "lab example", "host name alone"),
        ("server_address", "schüle.example.org", "xn--"),
        ("server_address", "lab..example.org", "host name alone"),
        ("server_address", "{username}.", "host name alone"),
        ("server_address", "[2001:db8::1]:8888", "host name alone"),
        ("server_address", "lab-{username}.example.org", "{username}."),
        ("server_address", "{user}.example.org", "host name alone"),
        ("owner", "nobody-of-that-name", "not a user"),
        ("retrieve_limit", "lots", "500M"),
        ("retrieve_limit", "-1", "500M"),
        ("retrieve_limit", "", "500M"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_right(
    tmp_path: Path, key: str, value: str, right: str
) -> None:
    _, (problem,) = read_key(tmp_path, key, value)
    place = f"{tmp_path}/notebooks.cfg: [{section_of(key)}] {key} = {value}: "
    assert problem.startswith(place)
    assert right in problem.removeprefix(place)


@pytest.mark.parametrize(
    ("text", "word", "hint"),
    [
        ("[Setup]\ntutorail_dir=a", "[Setup] tutorail_dir", "mean `tutorial_dir`?"),
        ("[Launch]\nweb-title=a", "[Launch] web-title", "mean `web_title`?"),
        ("[Shutdown]\nport=1", "[Shutdown] port", "belongs in section [Launch]"),
        ("[Shutdown]\nx=1", "[Shutdown] x", "retrieve_limit, archive_dir, archive_limit"),
        ("[setup]", "[setup]: unknown section", "did you mean `Setup`?"),
        ("[Lunch]\nport=1", "[Lunch]: unknown section", "did you mean `Launch`?"),
        (
            "[DEFAULT]\nport=1",
            "[DEFAULT]: unknown section",
            "Shutdown, Limits, Environment",
        ),
        ("[environment]\nA=1", "[environment]: unknown section", "`Environment`?"),
    ],
)
def test_an_unknown_word_is_refused_with_the_nearest_known_one(
    tmp_path: Path, text: str, word: str, hint: str
) -> None:
    _, (problem,) = read(tmp_path, text)
    assert problem.startswith(f"{tmp_path}/notebooks.cfg: {word}")
    assert problem.endswith(hint)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    _, problems = read(
        tmp_path, "[Setup]\ngruop = a\npassword_length = 1\n[X]\n[Launch]\nport = a\n"
    )
    words = ["gruop", "[X]", "password_length = 1", "port = a"]
    assert len(problems) == len(words)
    for word, problem in zip(words, problems):
        assert word in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("port = 1\n", "line 1: begin with a section"),
        ("[Launch]\nport\n", "line 2: is neither"),
        ("[Launch]\nport = 1\nport = 2\n", r"line 3: \[Launch\] has `port` twice"),
        ("[Launch]\nweb_title = Übung\n".encode("latin-1"), "not UTF-8"),
        ("[Launch]\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "notebooks.cfg"
    with pytest.raises(notebooks.UsageError, match=message) as refusal:
        if content is None:
            notebooks.read_config(path)
        else:
            read(tmp_path, content)
    assert str(path) in str(refusal.value)


def test_a_directory_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(notebooks.UsageError, match=f"{tmp_path}: is a directory"):
        notebooks.read_config(tmp_path)


def test_paths_stay_where_they_are_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks.cfg").touch()
    monkeypatch.chdir(tmp_path)
    config, _ = notebooks.read_config(Path("notebooks.cfg"))
    os.chdir("/")
    assert config.user_list == tmp_path / "students.csv"
    assert config.path == tmp_path / "notebooks.cfg"


def test_an_unknown_word_in_braces_is_refused(tmp_path: Path) -> None:
    _, problems = read_key(tmp_path, "material_dir", "feedback/{username}/{assignment}")
    (problem,) = problems
    assert "material_dir: has {assignment} in it; only {username} has" in problem


def test_the_environment_takes_variables_as_they_are_written(tmp_path: Path) -> None:
    text = (
        "[Environment]\nhttp_proxy = http://u:p%40x@proxy:3128/%7E  # ours\n"
        "HTTP_PROXY = upper\nPORT = 80\nEMPTY =\n[Launch]\nPort = 9000\n"
    )
    config, problems = read(tmp_path, text)
    assert (config.port, problems) == (9000, [])
    assert config.environment == {
        "http_proxy": "http://u:p%40x@proxy:3128/%7E",
        "HTTP_PROXY": "upper",
        "PORT": "80",
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1A = secret", "1A: must be a name of letters, digits and _"),
        ("A B = secret", "A B: must be a name of letters, digits and _"),
        ("HOME = secret", "HOME: is set by notebooks.py"),
        ("JUPYTER_CONFIG_PATH = secret", "JUPYTER_CONFIG_PATH: is set by notebooks.py"),
        ("BASH_ENV = secret", "BASH_ENV: is set by notebooks.py"),
        ('A = "secret"', "A: must be without quotation marks"),
    ],
)
def test_a_bad_variable_is_refused_and_its_value_not_shown(
    tmp_path: Path, line: str, problem: str
) -> None:
    _, (said,) = read(tmp_path, f"[Environment]\n{line}\n")
    assert said.startswith(f"{tmp_path}/notebooks.cfg: [Environment] {problem}")
    assert "secret" not in said


def test_a_root_without_the_directory_in_which_notebooks_start_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "notebooks.cfg"
    path.write_text("[Launch]\nroot_dir = work\nstart_page = tree\n")
    (problem,) = notebooks.read_config(path)[1]
    assert "root_dir = work" in problem and "course/material" in problem
    path.write_text("[Launch]\nroot_dir = work\nlaunch_dir = work/week1\n")
    assert notebooks.read_config(path)[1] == []
    path.write_text("[Launch]\nstart_page = desktop\n")
    assert "must be tree or lab" in notebooks.read_config(path)[1][0]
