"""Kernels on a gateway: a real Jupyter Enterprise Gateway, on loopback."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import websocket

import notebooks
import support
from support import (
    ENVIRONMENT,
    Course,
    ExecutionError,
    Notebook,
    fetch,
    run_as,
    wait_until,
)

GATEWAY_PREFIX = Path(os.environ.get("GATEWAY_PREFIX", "/opt/notebooks-gateway"))
PROGRAM = GATEWAY_PREFIX / "bin/jupyter-enterprisegateway"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not PROGRAM.exists(), reason=f"needs {PROGRAM} (make test)"),
]


OPTIONS = ("--ip=127.0.0.1", "--EnterpriseGatewayApp.port_retries=0")
ARGV = [
    f"{GATEWAY_PREFIX}/bin/python",
    "-m",
    "ipykernel_launcher",
    "-f",
    "{connection_file}",
]


class Gateway:
    """A Jupyter Enterprise Gateway in the home of its own account, as which kernels run.

    It has a Python kernel by two names.
    """

    def __init__(self, directory: Path, username: str, *certificate: Path):
        self.directory, self.username = directory, username
        self.token = secrets.token_hex(20)
        self.port = support.free_port_range(1)
        host = "https://localhost" if certificate else "http://127.0.0.1"
        self.url = f"{host}:{self.port}"
        files = zip(("certfile", "keyfile"), certificate, strict=False)
        self.options = [f"--{name}={path}" for name, path in files]
        self.process: subprocess.Popen[bytes] | None = None
        spec = json.dumps({"argv": ARGV, "display_name": "Far", "language": "python"})
        for name in ("far", "python3"):
            path = directory / "kernels" / name / "kernel.json"
            path.parent.mkdir(parents=True)
            path.write_text(spec)

    def start(self) -> None:
        with (self.directory / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, f"--port={self.port}", *OPTIONS, *self.options],
                user=self.username,
                group=self.username,
                extra_groups=[],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **ENVIRONMENT,
                    "HOME": f"/home/{self.username}",
                    "JUPYTER_PATH": str(self.directory),
                    "EG_AUTH_TOKEN": self.token,
                },
            )
        wait_until(lambda: self.ask("/api/kernelspecs"), 20, "the gateway")

    def ask(self, path: str) -> int:
        """Return the status of its answer, or 0."""
        headers = {"Authorization": f"token {self.token}"}
        with contextlib.suppress(OSError):
            return fetch(self.url + path, headers=headers).status
        return 0

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        kernels = lambda: support.processes_of([self.username])  # noqa: E731
        support.kill_all(kernels, "the gateway's kernels")

    def stop(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_gateway() -> Iterator[Gateway]:
    with support.made_account() as account:
        gateway = Gateway(Path(account.pw_dir, "first"), account.pw_name)
        try:
            gateway.start()
            yield gateway
        finally:
            gateway.kill()


@contextlib.contextmanager
def course_with(
    gateway: Gateway, directory: Path, students: int, **settings: object
) -> Iterator[Course]:
    """Yield a course that takes kernels from a gateway, and runs."""
    token = directory / "token"
    token.write_text(f"{gateway.token}\n")
    token.chmod(0o600)
    settings |= {"gateway_url": gateway.url, "gateway_token_file": token}
    with Course(directory, students, **settings) as course:
        course.check("setup")
        course.launch().wait_ready()
        yield course


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with running_gateway() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, gateway: Gateway) -> Iterator[Course]:
    directory = tmp_path_factory.mktemp("course")
    with course_with(gateway, directory, 2, gateway_kernel="far") as course:
        yield course


WHO = """\
import os
print(*[os.environ.get(f"KERNEL_{x}") for x in ("USERNAME", "UID", "GID", "WORKING_DIR")])
"""
# Widgets send such messages, which a kernel answers.
ECHO = """\
from ipykernel.comm import Comm
import comm
def answer(message):
    return {"n": message["content"]["data"]["n"] * 2}
def opened(channel, message):
    channel.on_msg(lambda message: channel.send(answer(message), buffers=[b"12"]))
comm.get_comm_manager().register_target("echo", opened)
"""


@pytest.fixture
def notebooks_of_both(course: Course) -> Iterator[list[Notebook]]:
    both = [course.notebook(username) for username in course.students]
    for each in both:
        each.seconds = 25  # less than between two pings
        start_there(each)
    yield both
    for each in both:
        for kernel in each.api("GET", "kernels"):
            each.fetch(f"api/kernels/{kernel['id']}", "DELETE")


@pytest.fixture
def notebook(notebooks_of_both: list[Notebook]) -> Notebook:
    return notebooks_of_both[0]


def greet(notebook: Notebook) -> None:
    """Ask a kernel who it is until it is heard, as JupyterLab does before it runs cells.

    What a kernel says at first gets lost if it is busy while a gateway subscribes to it.
    """

    def is_heard() -> bool:
        send(notebook, "kernel_info_request", {})
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            receive(notebook, "status")
            return True
        return False

    assert notebook.kernel_channels
    notebook.kernel_channels.settimeout(2)
    wait_until(is_heard, notebook.seconds, "the kernel is heard")
    notebook.kernel_channels.settimeout(notebook.seconds)


def start_there(notebook: Notebook, name: str = "far", path: str = "") -> None:
    notebook.start_kernel(name=name, path=path)
    greet(notebook)


def log_of(course: Course) -> str:
    return (course.home(course.students[0]) / ".notebooks.log").read_text()


def send(notebook: Notebook, kind: str, content: object, channel: str = "shell") -> str:
    """Send a message to the kernel, and return its id."""
    assert notebook.kernel_channels
    header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": "t"}
    header |= {"username": "", "version": "5.3"}
    message = {"channel": channel, "header": header, "parent_header": {}, "metadata": {}}
    notebook.kernel_channels.send(json.dumps({**message, "content": content}))
    return header["msg_id"]


def receive(notebook: Notebook, kind: str) -> Any:
    """Return the next message of a kind that the kernel sends, also of bytes."""
    assert notebook.kernel_channels
    while True:
        message = notebook.kernel_channels.recv()
        if isinstance(message, bytes):
            start = int.from_bytes(message[4:8], "big")
            message = message[start : int.from_bytes(message[8:12], "big")]
        message = json.loads(message)
        if message["msg_type"] == kind:
            return message["content"]


def words_of(notebook: Notebook, words: str) -> str:
    """Return what the tab shows on standard error, once these words are in it."""
    text = ""
    while words not in text:
        content = receive(notebook, "stream")
        text += content["text"] if content["name"] == "stderr" else ""
    return text


def test_kernels_run_there_under_their_students_names(
    course: Course, notebooks_of_both: list[Notebook]
) -> None:
    for username, notebook in zip(course.students, notebooks_of_both, strict=True):
        account = pwd.getpwnam(username)
        ids = f"{account.pw_uid} {account.pw_gid}"
        assert notebook.execute(WHO) == f"{username} {ids} {account.pw_dir}/course"
        (kernel,) = notebook.api("GET", "kernels")
        assert kernel["id"] == notebook.kernel_id and kernel["name"] == "far"


def test_no_directory_of_a_students_gets_into_the_templates_of_a_gateway(
    course: Course, notebook: Notebook
) -> None:
    home = course.home(course.students[0])
    for name, place in (("plain", f"{home}/plain ü"), ('x"\n  hostPID: true', str(home))):
        run_as(course.students[0], "mkdir", name if name != "plain" else "plain ü")
        path = urllib.parse.unquote(name) if name != "plain" else "plain ü"
        start_there(notebook, path=path)
        assert notebook.execute(WHO).partition(" ")[2].split(" ", 2)[2] == place


def test_kernels_of_others_are_out_of_reach(
    gateway: Gateway, notebooks_of_both: list[Notebook]
) -> None:
    """Nor can a request be led to another address of the gateway's."""
    mine, theirs = notebooks_of_both
    theirs.execute("secret = 6 * 7")
    foreign = theirs.kernel_id
    path = f"api/kernels/{foreign}"
    assert mine.fetch(path).status == 404
    assert mine.fetch(path, "DELETE").status == 404
    for action in ("interrupt", "restart"):
        assert mine.fetch(f"{path}/{action}", "POST").status in (404, 500)
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        mine.open_websocket(f"{path}/channels?session_id={theirs.session_id}")
    assert refused.value.status_code == 404

    # A wish for an id gets another kernel.
    assert (
        mine.api("POST", "kernels", {"name": "far", "kernel_id": foreign})["id"] != foreign
    )
    kernel = {"name": "far", "id": foreign}
    session = {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": kernel}
    made = mine.api("POST", "sessions", session)
    assert made["kernel"]["id"] != foreign
    wish = json.dumps({"kernel": {"id": foreign}})
    assert mine.fetch(f"api/sessions/{made['id']}", "PATCH", wish).status == 400
    assert foreign not in json.dumps(mine.api("GET", "kernels"))

    for path in (
        f"kernelspecs/far/../../api/kernels/{foreign}",
        f"kernelspecs/far/..%2f..%2fapi%2fkernels%2f{foreign}",
        f"kernelspecs/%2e%2e/api/kernels/{foreign}",
        f"api/kernelspecs/..%2fkernels%2f{foreign}",
        f"api/kernels/{foreign[:-12]}..%2f{foreign}",
        "kernelspecs/far//etc/passwd",
        "kernelspecs/far/kernel.json?x",
    ):
        assert mine.fetch(path).status == 404, path
    assert theirs.execute("secret") == "42"


def test_the_token_is_nowhere_in_a_students_reach(
    course: Course, gateway: Gateway, notebook: Notebook
) -> None:
    """Nor is it where students' own processes could find it, while some fail."""
    username, token = course.students[0], gateway.token
    here = course.notebook(username)
    here.start_kernel(name="python3")
    places = [f"/home/{username}", "/tmp", "/etc", "/var/lib/notebooks", course.directory]
    search = run_as(username, "grep", "-rlsIF", token, *places)
    assert search.stdout == ""
    scan = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mem 2>/dev/null"
    for text in (
        run_as(username, "sh", "-c", f"{scan} | tr '\\0' '\\n'; env").stdout,
        here.execute(
            "import os, subprocess; print(os.environ, subprocess.getoutput('env'))"
        ),
        here.execute_in_terminal(f"env; {scan} | tr '\\0' ' ' | tail -c 100000"),
    ):
        assert text and token not in text
    server = course.server(username)
    assert run_as(username, "cat", f"/proc/{server.pid}/environ").returncode != 0
    memory = b"".join(support.memory_of(server))
    assert token.encode() in memory  # so root would have found it everywhere

    paths = (
        *("", "lab", "tree", "login", "api", "api/me", "api/status", "api/kernels"),
        *("api/kernelspecs", "api/sessions", "api/config/notebook", "lab/api/settings"),
        *("api/spec.yaml", "api/kernels/0-0-0-0-0", "api/contents", "metrics", "nowhere"),
        *("api/terminals", "api/kernelspecs/far", "lab/api/workspaces", "api/contents/no"),
    )
    for path in paths:
        answer = notebook.fetch(path)
        assert token not in answer.text + str(answer.headers), path
    assert token not in notebook.fetch("api/kernels", "POST", '{"name": "no"}').text
    assert token not in log_of(course) and token not in course.launches[0].output
    assert token not in "".join(support.title_of(x) for x in course.processes())


def test_a_student_gets_nothing_from_the_gateway_itself(
    course: Course, gateway: Gateway, notebook: Notebook
) -> None:
    assert "gateway_url is not https" in course.launches[0].output
    path = f"/api/kernels/{notebook.kernel_id}"
    assert gateway.ask(path) == 200
    command = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}")
    for header in ("X: y", "Authorization: token ", "Authorization: token wrong"):
        for method in ("GET", "DELETE"):
            done = run_as(
                course.students[0],
                *(*command, "-X", method, "-H", header, gateway.url + path),
            )
            assert done.stdout == "401"
    assert notebook.execute("1 + 1") == "2"


def test_a_kernel_there_does_all_that_one_here_does(notebook: Notebook) -> None:
    notebook.execute("x = 42")
    slow = notebook.submit("import time\nprint('on')\ntime.sleep(60)")
    assert notebook.output_of(slow, until="on")
    path = f"kernels/{notebook.kernel_id}"
    notebook.api("POST", f"{path}/interrupt")
    with pytest.raises(ExecutionError, match="KeyboardInterrupt"):
        notebook.output_of(slow)
    # A kernel drops what it is asked just after an error.
    wait_until(lambda: notebook.execute("x") == "42", 10, "the kernel as it was")

    # JSON makes 15 MB of it, and Tornado takes 10 by itself.
    assert len(notebook.execute("print(('x' + chr(10)) * 5_000_000)")) >= 9_999_999

    content = {"code": "print(input('who '))", "silent": False, "allow_stdin": True}
    send(notebook, "execute_request", content)
    assert receive(notebook, "input_request")["prompt"] == "who "
    send(notebook, "input_reply", {"value": "me"}, "stdin")
    assert receive(notebook, "stream")["text"].strip() == "me"

    notebook.execute(ECHO)
    send(notebook, "comm_open", {"comm_id": "1", "target_name": "echo", "data": {}})
    send(notebook, "comm_msg", {"comm_id": "1", "data": {"n": 21}})
    assert receive(notebook, "comm_msg")["data"] == {"n": 42}

    notebook.api("POST", f"{path}/restart")
    notebook.close_tab()
    notebook.open_tab()
    greet(notebook)
    with pytest.raises(ExecutionError, match="NameError"):
        notebook.execute("x")


def test_a_kernel_that_dies_there_is_started_again(notebook: Notebook) -> None:
    notebook.execute("x = 42")
    notebook.submit("import os; os._exit(1)")
    while receive(notebook, "status")["execution_state"] != "restarting":
        pass
    time.sleep(2)  # what the gateway is sent too soon is lost there
    greet(notebook)
    with pytest.raises(ExecutionError, match="NameError"):
        notebook.execute("x")


def test_a_tab_that_comes_back_has_what_was_computed_meanwhile(notebook: Notebook) -> None:
    request = notebook.submit("import time; time.sleep(1); print('late')")
    notebook.close_tab()
    time.sleep(1.5)
    notebook.open_tab()
    assert notebook.output_of(request) == "late"


def test_a_tab_that_does_not_read_fills_no_memory(
    course: Course, notebook: Notebook
) -> None:
    server = course.server(course.students[0])
    before = server.memory_info().rss
    request = notebook.submit("for i in range(60): print('x' * 1_000_000, flush=True)")
    time.sleep(2)
    assert server.memory_info().rss < before + 30_000_000
    assert "xxx" in notebook.output_of(request, until="xxx")


def test_a_kernel_that_ended_there_is_told_to_be_dead(
    course: Course, gateway: Gateway, notebook: Notebook
) -> None:
    """As the gateway ends idle ones."""
    other = course.notebook(course.students[0])
    start_there(other)
    path = f"/api/kernels/{notebook.kernel_id}"
    headers = {"Authorization": f"token {gateway.token}"}
    assert fetch(gateway.url + path, "DELETE", headers=headers).status == 204
    assert notebook.kernel_channels
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        while notebook.kernel_channels.recv():
            pass
        raise websocket.WebSocketConnectionClosedException
    model = notebook.api("GET", f"kernels/{notebook.kernel_id}")
    assert model["execution_state"] == "dead" and "cluster" in model["reason"]
    assert other.execute("1 + 1") == "2"


def test_kernels_here_and_there_run_side_by_side(
    course: Course, notebook: Notebook
) -> None:
    specs = notebook.api("GET", "kernelspecs")
    assert specs["default"] == "python3" and {"far", "python3"} <= {*specs["kernelspecs"]}
    assert specs["kernelspecs"]["far"]["spec"]["argv"] == []
    here = course.notebook(course.students[0])
    here.start_kernel(name="python3")
    uid = pwd.getpwnam(course.students[0]).pw_uid
    who = "import os; os.getuid()"
    assert here.execute(who) == str(uid) and notebook.execute(who) != str(uid)
    kernels = {x["id"]: x["name"] for x in notebook.api("GET", "kernels")}
    assert kernels == {here.kernel_id: "python3", notebook.kernel_id: "far"}


def test_a_gateway_that_was_away_is_told_of_and_tabs_go_on(
    course: Course, gateway: Gateway, notebooks_of_both: list[Notebook]
) -> None:
    mine, theirs = notebooks_of_both
    here = course.notebook(course.students[0])
    here.start_kernel(name="python3")
    gateway.stop()
    try:
        mine.submit("x = 6 * 7")
        assert "does not answer" in words_of(mine, "files and terminals")
        begun = time.monotonic()
        for each in notebooks_of_both:
            for path in ("api/contents", "api/kernels", "api/kernelspecs", "tree", "lab"):
                assert each.fetch(path).status == 200
        assert here.execute("1 + 1") == "2"
        assert here.execute_in_terminal("echo $((6*7))") == "42"
        assert time.monotonic() - begun < 10
        warning = f"the gateway {gateway.url}, and all kernels on it: "
        wait_until(lambda: warning in course.launches[0].output, 30, "the teacher's line")
    finally:
        gateway.go_on()
    words_of(mine, "The cluster answers again")
    assert mine.execute("x") == "42"
    words_of(theirs, "The cluster answers again")
    assert theirs.execute("1 + 1") == "2"
    wait_until(lambda: "answers again" in course.launches[0].output, 30, "the end of it")
    assert course.launches[0].output.count(warning) == 1


def test_a_gateway_that_was_killed_is_told_of_and_comes_back(
    course: Course, gateway: Gateway, notebook: Notebook
) -> None:
    """Its kernels are gone, which the tab is told, and the next one runs there again."""
    gateway.kill()
    try:
        notebook.submit("1 + 1")
        words_of(notebook, "does not answer")
        model = {
            "path": "b.ipynb",
            "type": "notebook",
            "name": "",
            "kernel": {"name": "far"},
        }
        answer = notebook.fetch("api/sessions", "POST", json.dumps(model))
        assert answer.status == 500
        assert answer.json["message"].startswith(
            "The kernel far cannot be started: the clus"
        )
        path = f"api/kernels/{notebook.kernel_id}/interrupt"
        assert "Gateway" in notebook.fetch(path, "POST").json["message"]
    finally:
        gateway.start()
    path = f"kernels/{notebook.kernel_id}"
    wait_until(
        lambda: notebook.api("GET", path)["execution_state"] == "dead", 20, "its end"
    )
    start_there(notebook)
    assert notebook.execute("1 + 1") == "2"


def test_a_tab_that_cannot_be_told_keeps_nothing_from_others(
    course: Course, gateway: Gateway, notebook: Notebook
) -> None:
    broken = course.notebook(course.students[0])
    start_there(broken)
    assert broken.kernel_channels
    header = {"msg_type": "execute_request"}
    broken.kernel_channels.send(json.dumps({"channel": "shell", "header": header}))
    gateway.stop()
    try:
        wait_until(lambda: "does not answer" in log_of(course)[-200:], 20, "its absence")
    finally:
        gateway.go_on()
    words_of(notebook, "The cluster answers again")


def test_who_answers_in_its_place_fills_no_memory_of_the_webserver(
    course: Course, gateway: Gateway
) -> None:
    launch = psutil.Process(course.launches[0].pid)
    title = notebooks.WEBSERVER_TITLE
    (webserver,) = (x for x in launch.children(True) if support.title_of(x) == title)
    gateway.kill()
    try:
        before = webserver.memory_info().rss
        with socket.create_server(("127.0.0.1", gateway.port)) as listener:
            requests = b""
            while b"/api/swagger.json" not in requests:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    requests += connection.recv(10_000)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Length: 90000000\r\n\r\n"
                    )
                    connection.sendall(bytes(89_999_999))
                    time.sleep(0.5)
                    assert webserver.memory_info().rss < before + 20_000_000
    finally:
        gateway.start()


def test_a_gateway_that_is_no_longer_in_use_is_not_told_of(
    course: Course, gateway: Gateway
) -> None:
    launch = course.launches[0]
    reloads = launch.output.count("Reloaded")

    def is_away() -> bool:
        lines = [x for x in launch.output.splitlines() if f"gateway {gateway.url}" in x]
        return bool(lines) and "all kernels on it" in lines[-1]

    def reload(**settings: object) -> None:
        nonlocal reloads
        course.configure(**settings)
        os.kill(launch.pid, signal.SIGHUP)
        reloads += 1
        wait_until(lambda: launch.output.count("Reloaded") == reloads, 20, "the reload")

    keys = "gateway_url", "gateway_token_file", "gateway_kernel"
    settings = {key: course.settings[key] for key in keys}
    gateway.stop()
    try:
        wait_until(is_away, 30, "the teacher's line")
        reload(**dict.fromkeys(keys, ""))
        time.sleep(2 * notebooks.GATEWAY_SECONDS)
        assert "gateway  answers" not in launch.output
    finally:
        gateway.go_on()
        reload(**settings)


def test_a_server_ends_its_kernels_there_and_waits_for_no_gateway(
    course: Course, gateway: Gateway, notebooks_of_both: list[Notebook]
) -> None:
    first, second = (course.server(username) for username in course.students)
    mine, theirs = (f"/api/kernels/{each.kernel_id}" for each in notebooks_of_both)
    first.terminate()
    first.wait(10)
    assert gateway.ask(mine) == 404 and gateway.ask(theirs) == 200
    gateway.stop()
    try:
        second.terminate()
        second.wait(8)
    finally:
        gateway.go_on()
    for username in course.students:
        log = (course.home(username) / ".notebooks.log").read_text()
        end = log[log.index("Shutting down 1 kernel") :]
        assert "Traceback" not in end and "destroyed" not in end
        assert course.notebook(username).api("GET", "kernels") == []


def test_what_a_gateway_refuses_is_told_and_a_broken_file_stops_a_launch(
    gateway: Gateway, tmp_path: Path
) -> None:
    token, other = tmp_path / "token", tmp_path / "broken"
    settings: dict[str, object] = {"gateway_url": gateway.url, "gateway_token_file": other}
    with Course(tmp_path, 1, **settings) as course:
        course.check("setup")
        assert course.run("launch").returncode == 2
        assert not (tmp_path / notebooks.CERTIFICATE_NAME).exists()

        for path, text in ((token, "another"), (other, "two words")):
            path.write_text(text)
            path.chmod(0o600)
        course.configure(gateway_token_file=token)
        launch = course.launch().wait_ready()
        answer = course.notebook(course.students[0]).fetch("api/kernels", "POST", "{}")
        assert answer.status == 503 and "the cluster answers" in answer.json["message"]
        assert "Unauthorized" in answer.json["message"]

        course.configure(gateway_token_file=other)
        os.kill(launch.pid, signal.SIGHUP)
        wait_until(lambda: "not reloaded: " in launch.output, 20, "the reload")


def test_all_kernels_can_be_on_a_gateway_of_a_private_authority(
    tmp_path_factory: pytest.TempPathFactory, gateway: Gateway
) -> None:
    directory = tmp_path_factory.mktemp("all")
    certificate, key = support.make_certificate(gateway.directory)
    shutil.chown(key, gateway.username)
    secure = Gateway(gateway.directory / "secure", gateway.username, certificate, key)
    token = directory / "token"
    settings: dict[str, object] = {"gateway_url": secure.url, "gateway_token_file": token}
    try:
        secure.start()
        with Course(directory, 1, **settings) as course:
            course.check("setup")
            done = course.run("launch")
            assert done.returncode == 2 and "No such file" in done.stderr
            token.write_text(secure.token)
            token.chmod(0o640)
            done = course.run("launch")
            assert done.returncode == 2 and "chmod 600" in done.stderr
            token.chmod(0o600)
            course.configure(gateway_ca=certificate)
            course.launch().wait_ready()

            notebook = course.notebook(course.students[0])
            found = notebook.api("GET", "kernelspecs")["kernelspecs"]
            assert {*found} == {"far", "python3"}
            start_there(notebook, name="python3")
            assert notebook.execute(WHO).startswith(course.students[0])
            assert "not https" not in course.launches[0].output

            # Who is not trusted hears no token.
            course.configure(gateway_ca=support.make_certificate(directory)[0])
            server = course.server(course.students[0])
            server.terminate()
            server.wait(10)
            os.kill(course.launches[0].pid, signal.SIGHUP)
            wait_until(lambda: "Reloaded" in course.launches[0].output, 20, "the reload")
            answer = course.notebook(course.students[0]).fetch("api/kernels", "POST", "{}")
            assert answer.status == 503
    finally:
        secure.kill()


def test_a_key_without_the_address_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notebooks.cfg"
    path.write_text("[Launch]\ngateway_kernel = far\n")
    config, _ = notebooks.read_config(path)
    with pytest.raises(notebooks.UsageError, match="gateway_url: is missing"):
        notebooks.read_gateway(config)


@pytest.mark.parametrize("key", ["gateway_token_file", "gateway_ca"])
@pytest.mark.parametrize("text", ["", "two words", "zwölf"])
def test_a_token_or_an_authority_that_is_none_is_refused(
    tmp_path: Path, key: str, text: str
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    file.chmod(0o600)
    path = tmp_path / "notebooks.cfg"
    path.write_text(f"[Launch]\ngateway_url = http://a\n{key} = file\n")
    config, problems = notebooks.read_config(path)
    assert not problems
    with pytest.raises(notebooks.UsageError, match=f"{key} = {file}: "):
        notebooks.read_gateway(config)
