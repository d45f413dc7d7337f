"""Certificates: those of the teacher are checked, our own is made once and kept."""

import base64
import contextlib
import dataclasses
import hashlib
import logging
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import notebooks
from support import ROOT, Course, make_certificate, memory_of


@pytest.fixture
def config(tmp_path: Path) -> notebooks.Config:
    """A configuration without a certificate."""
    path = tmp_path / "notebooks.cfg"
    path.touch()
    return notebooks.read_config(path)[0]


def with_files(
    config: notebooks.Config, cert_file: Path, key_file: Path | None = None
) -> notebooks.Config:
    return dataclasses.replace(config, cert_file=cert_file, key_file=key_file)


def decode(path: Path) -> str:
    """Return what openssl prints about a certificate."""
    command = ["openssl", "x509", "-noout", "-text", "-in", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def shake_hands(certificate: notebooks.Certificate, trusted: Path, name: str) -> None:
    """Let a client that trusts only that file greet the certificate's server by name.

    Raises: ssl.SSLCertVerificationError.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=trusted).wrap_bio(
        to_client, to_server, server_hostname=name
    )
    server = certificate.context().wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    server.do_handshake()


# ---------------------------------------------------------------------------------------
# The teacher's
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", ["ec", "rsa"])
@pytest.mark.parametrize("together", [True, False])
def test_a_certificate_with_its_key_is_used(
    config: notebooks.Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key_type: str,
    together: bool,
) -> None:
    cert, key = make_certificate(tmp_path, key=key_type)
    if together:
        cert.write_text(key.read_text() + cert.read_text())
        key.unlink()
    certificate = notebooks.ensure_certificate(
        with_files(config, cert, None if together else key)
    )
    shake_hands(certificate, cert, "localhost")
    assert not caplog.messages
    lines = cert.read_text().splitlines()
    body = lines[lines.index("-----BEGIN CERTIFICATE-----") + 1 : -1]
    digest = hashlib.sha256(base64.b64decode("".join(body))).hexdigest().upper()
    assert notebooks.fingerprint(certificate.chain[0]).replace(":", "") == digest


@pytest.mark.parametrize(
    ("days", "warns"), [(29, True), (32, False)], ids=["within a month", "later"]
)
def test_the_end_of_a_certificate_is_announced(
    config: notebooks.Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    days: int,
    warns: bool,
) -> None:
    cert, key = make_certificate(tmp_path, days=days)
    notebooks.ensure_certificate(with_files(config, cert, key))
    warning = (
        "notebooks",
        logging.WARNING,
        f"{cert}: the certificate expires in 28 days",
    )
    assert caplog.record_tuples == [warning] * warns


def test_a_certificate_that_cannot_be_used_is_refused(
    config: notebooks.Config, tmp_path: Path
) -> None:
    cert, key = make_certificate(tmp_path)
    other_key = make_certificate(tmp_path, "other")[1]
    rsa_key = make_certificate(tmp_path, "rsa", key="rsa")[1]
    hidden, hidden_key = make_certificate(tmp_path, "hidden", passphrase="abcd")
    old, old_key = make_certificate(tmp_path, "old", days=-1)
    missing, text = tmp_path / "missing.pem", tmp_path / "text.pem"
    text.write_text("no certificate\n")
    for cert_file, key_file, named, words in (
        (missing, key, missing, "No such file"),
        (missing, None, missing, "No such file"),
        (cert, missing, missing, "No such file"),
        (tmp_path, key, tmp_path, "Is a directory"),
        (cert, other_key, cert, f"the key in {other_key} is another certificate's"),
        (cert, rsa_key, cert, f"the key in {rsa_key} is another certificate's"),
        (cert, None, cert, f"no key in {cert}"),
        (cert, text, cert, f"no key in {text}"),
        (hidden, hidden_key, hidden, f"the key in {hidden_key} has a passphrase"),
        (old, old_key, old, "the certificate has expired"),
        (text, key, text, "no certificate in it"),
        (key, None, key, "no certificate in it"),
    ):
        with pytest.raises(notebooks.UsageError) as refusal:
            notebooks.ensure_certificate(with_files(config, cert_file, key_file))
        message = str(refusal.value)
        assert message.startswith(f"{named}: ") and words in message, message
    assert not config.path.with_name("notebooks.pem").exists()


# ---------------------------------------------------------------------------------------
# Our own
# ---------------------------------------------------------------------------------------


def test_our_certificate_is_for_this_host_and_private(config: notebooks.Config) -> None:
    before = {*config.path.parent.iterdir()}
    certificate = notebooks.ensure_certificate(config)
    path = config.path.with_name("notebooks.pem")
    assert certificate.path == str(path)
    assert {*config.path.parent.iterdir()} - before == {path}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = decode(path)
    assert "NIST CURVE: P-256" in text and "TLS Web Server Authentication" in text
    for name in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        shake_hands(certificate, path, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(certificate, path, "lab.example.org")


def write_authority(certificate: notebooks.Certificate, directory: Path) -> Path:
    """Write what students install into a file."""
    assert certificate.authority
    path = directory / "authority.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(certificate.authority))
    return path


def verify(authority: Path, chain: Path, *options: str) -> str:
    """Return what openssl-verify(1ssl) says of the first certificate of a file."""
    command = ["openssl", "verify", "-x509_strict", *options, "-CAfile", str(authority)]
    done = subprocess.run([*command, str(chain)], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_our_authority_is_enough_to_trust_this_host_and_no_other(
    config: notebooks.Config, tmp_path: Path
) -> None:
    """Apple wants what RFC 5280 says, serverAuth, and at most 825 days."""
    config = dataclasses.replace(config, server_address="{username}.lab.example.org")
    certificate = notebooks.ensure_certificate(config)
    authority = write_authority(certificate, tmp_path)
    for name in ("localhost", "127.0.0.1", "::1", "zoe.lab.example.org"):
        shake_hands(certificate, authority, name)
    assert ": OK" in verify(authority, Path(certificate.path), "-purpose", "sslserver")
    assert 815 < notebooks.days_until(certificate.end()) < 825
    text = decode(authority)
    for words in ("CA:TRUE, pathlen:0", "Certificate Sign\n", "Name Constraints: critical"):
        assert words in text
    assert "DNS:lab.example.org" in text and "*" not in text


@pytest.mark.parametrize("name", ["DNS:example.com", "DNS:org", "IP:192.0.2.7", "IP:::2"])
def test_nothing_that_is_left_behind_can_sign_for_another_name(
    config: notebooks.Config, tmp_path: Path, name: str
) -> None:
    """The server's key cannot; and the authority's could for this host alone."""
    certificate = notebooks.ensure_certificate(config)
    authority, forged = write_authority(certificate, tmp_path), tmp_path / "forged.pem"
    sign = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-subj", "/CN=x"]
    sign += ["-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", "-", "-out", str(forged)]
    sign += ["-addext", f"subjectAltName={name}", "-addext", "basicConstraints=CA:FALSE"]
    signer = ["-CA", certificate.path, "-CAkey", certificate.path]
    subprocess.run([*sign, *signer], check=True, capture_output=True)
    said = verify(authority, forged, "-untrusted", certificate.path)
    assert "invalid CA certificate" in said or "unable to get" in said
    assert certificate.pem.count("PRIVATE KEY-----") == 2

    # What makes the authority, with a name that the authority does not cover.
    script = ["sh", "-c", notebooks.MAKE_CERTIFICATE, "sh", "9", "/CN=authority"]
    script += ["permitted;DNS:localhost,permitted;IP:127.0.0.1/255.255.255.255"]
    done = subprocess.run(
        [*script, f"subjectAltName={name}"], check=True, capture_output=True
    )
    forged.write_bytes(done.stdout)
    blocks = done.stdout.split(b"-----BEGIN CERTIFICATE-----")
    authority.write_bytes(b"-----BEGIN CERTIFICATE-----" + blocks[-1])
    assert "permitted subtree violation" in verify(authority, forged)


def test_the_key_of_our_authority_is_on_no_disk(
    config: notebooks.Config, tmp_path: Path
) -> None:
    """The programs that know it write to pipes and to memory alone."""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=openat,creat,memfd_create", "-o", str(trace)]
    script = ["sh", "-c", notebooks.MAKE_CERTIFICATE, "sh", "9", "/CN=authority"]
    script += ["permitted;DNS:localhost", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *script], check=True, capture_output=True)
    opened = trace.read_text()
    assert opened.count("openssl.cnf") >= 3
    written = re.findall(r'openat\(.*"(.*)", O_(?:WRONLY|RDWR|CREAT)', opened)
    assert {*written} <= {"/dev/null", "/dev/tty"}, written


@pytest.fixture
def key_of_authority(tmp_path: Path) -> Iterator[Path]:
    """Have openssl tell us the key as well, which it otherwise tells nobody."""
    real, ours, key = tmp_path / "real", tmp_path / "openssl", tmp_path / "key"
    shutil.copy("/usr/bin/openssl", real)
    ours.write_text(
        f'#!/bin/sh\nif [ "$1" = genpkey ]; then {real} "$@" | tee {key}; else'
        f' exec {real} "$@"; fi\n'
    )
    ours.chmod(0o755)
    subprocess.run(["mount", "--bind", str(ours), "/usr/bin/openssl"], check=True)
    yield key
    subprocess.run(["umount", "/usr/bin/openssl"], check=True)


def forms_of_key(pem: str) -> list[bytes]:
    """Return how the private number of an EC key may lie in a memory or a file."""
    body = base64.b64decode("".join(pem.splitlines()[1:-1]))
    start = body.index(b"\4\x20") + 2  # an octet string of 32 bytes: RFC 5915
    number = body[start : start + 32]
    return [pem.splitlines()[1].encode(), number, number[::-1], number.hex().encode()]


@pytest.mark.root
def test_nobody_remembers_the_key_of_our_authority(
    make_course: Callable[..., Course], key_of_authority: Path
) -> None:
    """Neither the processes of a course nor the files that it has written."""
    course = make_course(1)
    course.check("setup")
    launch = course.launch().wait_ready()
    secret = forms_of_key(key_of_authority.read_text())
    kept = notebooks.PRIVATE_KEY.findall((course.directory / "notebooks.pem").read_text())
    ours = forms_of_key(kept[0])
    helpers = [launch.helper("template process"), launch.helper("webserver")]
    processes = [psutil.Process(launch.pid), *helpers, course.server(course.students[0])]

    for process in processes:
        memory = b"".join(memory_of(process))
        assert not [form for form in secret if form in memory], process
        if process != helpers[0]:  # the search works
            assert [form for form in ours if form in memory], process
    for directory in (course.directory, Path("/var/lib"), Path("/run"), Path("/home")):
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24:
                data = path.read_bytes()
                assert not [form for form in secret if form in data], path


@pytest.mark.parametrize(
    "host", ["ip-172-31-255-254.eu-central-1.compute.internal", "a" * 63, "MY_LAB"]
)
def test_a_host_may_have_any_name(
    config: notebooks.Config, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """That of the authority must have 64 characters at most."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    certificate = notebooks.ensure_certificate(config)
    shake_hands(certificate, write_authority(certificate, config.path.parent), host)


@pytest.mark.root
def test_a_router_of_the_network_changes_no_certificate() -> None:
    """Whoever sends router advertisements gives each host addresses, for a while."""
    script = (
        "ip link set lo up; ip address add 2001:db8::1/64 dev lo;"
        " ip address add 2001:db8::2/64 dev lo valid_lft 600 preferred_lft 600;"
        f" {sys.executable} -c 'import notebooks as n; print(*n.stable_ipv6_addresses())'"
    )
    command = ["unshare", "--net", "sh", "-ec", script]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2001:db8::1"]


def test_a_certificate_of_an_earlier_version_is_kept(
    config: notebooks.Config, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher is told that iPads want another."""
    path = config.path.with_name("notebooks.pem")
    cert, key = make_certificate(path.parent)
    names = f"subjectAltName={','.join(notebooks.host_names(config))}\n"
    path.write_text(names + key.read_text() + cert.read_text())
    before = path.read_bytes()
    certificate = notebooks.ensure_certificate(config)
    assert path.read_bytes() == before and certificate.authority is None
    assert "no iPad" in caplog.text


def test_our_certificate_is_kept_until_the_names_change(
    config: notebooks.Config, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = notebooks.ensure_certificate(config)
    assert notebooks.ensure_certificate(config) == certificate and not caplog.messages
    for address, names in (
        ("lab.example.org", ["lab.example.org"]),
        ("{username}.example.org", ["example.org", "zoe.example.org"]),
        ("[2001:db8::1]", ["2001:db8::1"]),
        ("192.0.2.1", ["192.0.2.1", "localhost"]),
    ):
        last = certificate
        changed = dataclasses.replace(config, server_address=address)
        certificate = notebooks.ensure_certificate(changed)
        assert notebooks.ensure_certificate(changed) == certificate != last
        for name in names:
            shake_hands(certificate, Path(certificate.path), name)
        assert len(caplog.messages) == 1 and "made anew" in caplog.messages[0]
        caplog.clear()


def test_an_address_that_comes_while_launch_runs_is_no_reason_for_another(
    config: notebooks.Config,
) -> None:
    """Such as that of a container's network: students would have to trust anew."""
    certificate = notebooks.ensure_certificate(config)
    changed = dataclasses.replace(config, server_address="192.0.2.99")
    assert notebooks.ensure_certificate(changed, certificate.names) == certificate
    assert notebooks.ensure_certificate(changed) != certificate


def test_our_certificate_is_made_anew_before_it_expires(
    config: notebooks.Config,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebooks, "CERTIFICATE_DAYS", 13)
    path = config.path.with_name("notebooks.pem")
    notebooks.make_certificate(path, notebooks.host_names(config))
    first = path.read_bytes()
    notebooks.ensure_certificate(config)
    assert path.read_bytes() != first
    (message,) = caplog.messages
    assert message.startswith(f"{path}: made anew for its age; ")
    monkeypatch.setattr(notebooks, "CERTIFICATE_DAYS", 20)
    notebooks.make_certificate(path, notebooks.host_names(config))
    certificate = notebooks.ensure_certificate(config)
    assert (
        certificate.pem == path.read_text()
        and 19 < notebooks.days_until(certificate.end()) < 20
    )
    assert "made anew in 5 days; then students who trust it" in caplog.messages[1]


@pytest.mark.parametrize("content", ["", "nonsense", "key", "pair"])
def test_a_file_that_is_not_our_certificate_is_not_overwritten(
    config: notebooks.Config, content: str
) -> None:
    """It may be the only copy of a key of the teacher's."""
    path = config.path.with_name("notebooks.pem")
    cert, key = make_certificate(path.parent)
    texts = {"key": key.read_text(), "pair": cert.read_text() + key.read_text()}
    path.write_text(texts.get(content, content))
    before = path.read_bytes()
    with pytest.raises(notebooks.Error, match=str(path)):
        notebooks.ensure_certificate(config)
    assert path.read_bytes() == before
