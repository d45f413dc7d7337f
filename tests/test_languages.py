"""What the pages say is in the catalogs, and the catalogs are where they are looked for."""

import ast
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.parse
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from babel.messages.catalog import Catalog, Message
from babel.messages.pofile import read_po
from jinja2 import nodes

import notebooks
from conftest import CourseMaker
from support import ENVIRONMENT, NOTEBOOKS, ROOT, fetch, wait_until

CATALOGS = sorted(ROOT.glob("locale/*.po"))
HEADER = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"
"""
ENDS = "The certificate of this page ends on {date}: tell your teacher."


def phrases() -> set[str]:
    """Return what templates and code say; whatever is marked must be a text itself."""
    found = set()
    for template in notebooks.TEMPLATES.values():
        for call in jinja2.Environment().parse(template).find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "_":
                (text,) = call.args
                assert isinstance(text, nodes.Const), text
                found.add(text.value)
    for node in ast.walk(ast.parse(NOTEBOOKS.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Phrase":
            (argument,) = node.args
            assert isinstance(argument, ast.Constant), ast.unparse(node)
            found.add(argument.value)
    return found - {""}


def read_catalog(path: Path) -> Catalog:
    with open(path, "rb") as file:
        return read_po(file, abort_invalid=True)


# ---------------------------------------------------------------------------------------
# Catalogs
# ---------------------------------------------------------------------------------------


def test_templates_say_nothing_but_phrases() -> None:
    for name, template in notebooks.TEMPLATES.items():
        assert not re.search(r"\w", re.sub(r"(?s){%.*?%}|{{.*?}}|<.*?>", "", template)), (
            name
        )


@pytest.mark.parametrize("path", CATALOGS, ids=lambda path: path.stem)
def test_a_catalog_has_all_phrases_and_no_others(path: Path) -> None:
    catalog = read_catalog(path)
    messages: list[Message] = [message for message in catalog if message.id]
    assert {message.id for message in messages} == phrases()
    assert notebooks.read_language(path.stem).phrases.keys() == phrases()
    assert not catalog.obsolete
    language = str(catalog.locale).lower().replace("_", "-")  # of its header
    assert language == path.stem
    for message in messages:
        assert message.string and not message.fuzzy, message.id
        has_fields = "{" in str(message.id)
        assert ("python-brace-format" in message.flags) == has_fields, message.id


def test_the_documented_languages_are_there() -> None:
    assert [path.stem for path in CATALOGS] == ["de", "es", "fr", "ja", "pt", "ru"]
    for text in ((ROOT / "README.rst").read_text(), (ROOT / "notebooks.cfg").read_text()):
        assert re.search(r"de`*, `*en`*,\s+`*es`*, `*fr`*, `*ja`*, `*pt`* or `*ru", text)


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Any]:
    """A notebooks.py that has no catalogs beside it."""
    spec = importlib.util.spec_from_file_location(
        "copied", shutil.copy(NOTEBOOKS, tmp_path)
    )
    assert spec and spec.loader
    sys.modules["copied"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tmp_path.joinpath("locale").mkdir()
    yield module
    del sys.modules["copied"]


def test_another_language_is_another_file(tmp_path: Path, copied: Any) -> None:
    """What it does not say, or a translator has not looked at, is said in English."""
    entries = f'msgid "{ENDS}"\nmsgstr "{{date}}!"\n\n#, fuzzy\nmsgid "Log in"\n'
    entries += 'msgstr "Log out"\n\nmsgid "User name"\nmsgstr ""\n'
    (tmp_path / "locale/xx.po").write_text(f"{HEADER}\n{entries}")
    assert copied.parse_language("XX") == "xx"
    language = copied.read_language("xx")
    assert language.name == "xx"
    assert language.say(ENDS, date="today") == "today!"
    assert [language.say(x) for x in ("Log in", "User name")] == ["Log in", "User name"]
    with pytest.raises(ValueError, match="must be one of en, xx"):
        copied.parse_language("de")


@pytest.mark.parametrize(
    "entry",
    [
        f'msgid "{ENDS}"\nmsgstr "{{day}}"',
        f'msgid "{ENDS}"\nmsgstr "without"',
        f'msgid "{ENDS}"\nmsgstr "{{date}} {{}}"',
        'msgid "Log in"\nmsgstr "}"',
        'msgid "Log in"\nmsgstr "\xff"',
        "Log in = Einloggen",
    ],
)
def test_a_catalog_with_which_pages_would_fail_is_refused(
    tmp_path: Path, copied: Any, entry: str
) -> None:
    path = tmp_path / "locale/xx.po"
    path.write_bytes(f"{HEADER}\n{entry}\n".encode("latin-1"))
    with pytest.raises(copied.Error, match=re.escape(str(path))):
        copied.read_language("xx")


# ---------------------------------------------------------------------------------------
# Where they are
# ---------------------------------------------------------------------------------------


def test_an_installation_has_the_catalogs_and_a_copy_alone_says_that_it_has_none(
    tmp_path: Path,
) -> None:
    prefix, config = tmp_path / "prefix", tmp_path / "notebooks.cfg"
    venv.create(prefix, symlinks=True)
    (site,) = prefix.glob("lib/*/site-packages")
    site.joinpath("ours.pth").write_text(sysconfig.get_path("purelib"))
    script = shutil.copy(NOTEBOOKS, prefix / "bin")
    config.write_text("[Launch]\nlanguage = de\n")

    def python(*command: object, cwd: Path = tmp_path) -> str:
        line = [str(prefix / "bin/python"), *map(str, command)]
        done = subprocess.run(
            line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    said = python(script, "setup", config)
    assert f"neither in {prefix / 'bin/locale'} nor in {prefix}/share/" in said
    assert "`sudo make install` puts them there" in said

    setup = "import setuptools; setuptools.setup()"
    place = f"--install-dir={prefix}"
    assert "Error" not in python("-c", setup, "-q", "install_data", place, cwd=ROOT)
    assert "language" not in python(script, "setup", config)
    look = (
        "import sys; sys.path.insert(0, 'prefix/bin'); import notebooks;"
        "notebooks.parse_language('de'); print('babel' in sys.modules);"
        "print(notebooks.read_language('de').say('Log in'))"
    )
    assert python("-c", look) == "False\nAnmelden\n"


@pytest.mark.root
def test_pages_are_in_the_language_of_the_course(make_course: CourseMaker) -> None:
    course = make_course(1, language="de")
    course.check("setup")
    launch = course.launch().wait_ready()

    def show(url: str, **request: Any) -> str:
        text = fetch(url, **request, context=course.context()).text
        assert '<html lang="de">' in text
        shown = re.sub("(?s)<.*?>", "", text.partition("<script")[0])
        assert "password" not in shown.lower()
        return shown

    (username,) = course.students
    assert "Mein Notebook öffnen" in show(course.url)
    assert "Anmelden" in show(f"{course.notebook_url(username)}login")
    assert "Neues Passwort" in show(f"{course.url}-password")
    assert "Die Datei öffnen" in show(f"{course.url}-certificate")
    # What the launcher answers.
    wish = dict.fromkeys(("old", "new", "again"), "abc")
    body = urllib.parse.urlencode({"username": username, **wish})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = show(f"{course.url}-password", method="POST", body=body, headers=headers)
    assert "Der Benutzername oder das bisherige Passwort ist falsch." in answer

    course.configure(language="fr")
    launch.process.send_signal(signal.SIGHUP)
    context = course.context()
    wait_until(lambda: 'lang="fr"' in fetch(course.url, context=context).text, 20, "French")
