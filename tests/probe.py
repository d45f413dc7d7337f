"""A student's server, forked as the template does it, that tells what is in it.

    python -I tests/probe.py CONFIG USERNAME

It serves on the student's port until SIGTERM. On SIGUSR2 it prints a line of JSON: the
modules that were imported since the fork, where the template's HOME is still to be
found, and the times after which it would stop what is idle.
"""

import asyncio
import contextlib
import gc
import json
import os
import posix
import signal
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import setproctitle  # noqa: E402

import notebooks  # noqa: E402

del sys.path[0]


def holds(value: object, text: str) -> bool:
    """Say whether this is a string, bytes or path that has the text in it."""
    if isinstance(value, bytes):
        return text.encode() in value
    return isinstance(value, (str, PurePath)) and text in str(value)


def values_of_traits(value: object) -> Iterator[object]:
    """Yield what traits say when asked, which may be a default of the class."""
    from traitlets import HasTraits

    if isinstance(value, HasTraits):
        for name in value.trait_names():
            with contextlib.suppress(Exception):
                yield getattr(value, name)


def places(root: object, text: str) -> Iterator[str]:
    """Yield where the text is held, in all that can be reached from an object.

    Not by way of modules and classes: what these hold counts only if it is used.
    """
    seen = {id(vars(module)) for module in list(sys.modules.values())}
    seen |= {id(root), id(os.environ), id(posix.environ)}
    queue = [(root, type(root).__qualname__)]
    while queue:
        holder, path = queue.pop()
        for value in [*gc.get_referents(holder), *values_of_traits(holder)]:
            if id(value) in seen or isinstance(value, (type, ModuleType)):
                continue
            if holds(value, text):
                yield f"{path}: {value!r}"
            elif not isinstance(value, (str, bytes, int, float)):
                seen.add(id(value))
                queue.append((value, f"{path} > {type(value).__qualname__}"))


def globals_with(text: str) -> Iterator[str]:
    """Yield the modules' variables that hold the text, themselves or as a list."""
    ignored = (notebooks, posix, sys.modules["__main__"])
    for name, module in list(sys.modules.items()):
        for key, value in [] if module in ignored else list(vars(module).items()):
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(holds(each, text) for each in values):
                yield f"{name}.{key}: {value!r}"


def report(fd: int, old_modules: set[str]) -> None:
    from jupyter_server.serverapp import ServerApp  # imported by the template, not here

    (app,) = (each for each in gc.get_objects() if isinstance(each, ServerApp))
    terminals: Any = app.web_app.settings["terminal_manager"]
    old_home = str(notebooks.TEMPLATE_HOME)
    answer = {
        "modules": sorted(set(sys.modules) - old_modules),
        "old_home": [*places(app, old_home), *globals_with(old_home)],
        "idle_seconds": [
            app.shutdown_no_activity_timeout,
            app.kernel_manager.cull_idle_timeout,
            terminals.cull_inactive_timeout,
        ],
    }
    os.write(fd, json.dumps(answer).encode() + b"\n")


def main(config_file: str, username: str) -> None:
    setproctitle.setproctitle("notebooks.py: template process")
    os.environ["HOME"] = str(notebooks.TEMPLATE_HOME)
    become_server = notebooks.preload_server()
    course = notebooks.load_course(Path(config_file))
    (member,) = (
        each
        for each in notebooks.find_members(course.roster.students)
        if each.username == username
    )
    port = int(member.student.port)
    listener = notebooks.bind_port(port)
    context = notebooks.StartContext(
        config=course.config,
        certificate=notebooks.ensure_certificate(course.config),
        language=notebooks.read_language(course.config.language),
        gateway=notebooks.read_gateway(course.config),
        template=notebooks.Template(role="template", course=Path()),
        slots=asyncio.Semaphore(),
    )
    server = notebooks.Server(member, port, listener)
    order = notebooks.server_order(context, server)
    notebooks.ensure_runtime_dir(member.account)
    old_modules = set(sys.modules)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    else:
        fd = os.dup(1)
        signal.signal(signal.SIGUSR2, lambda *_: report(fd, old_modules))
        become_server(order, [listener.fileno(), os.dup(2)])


if __name__ == "__main__":
    main(*sys.argv[1:])
