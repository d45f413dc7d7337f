"""Certificates: those of the teacher are checked, our own is made once and kept."""

import base64
import contextlib
import dataclasses
import hashlib
import logging
import socket
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

import notebooks
from support import make_certificate


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
    assert certificate.fingerprint().replace(":", "") == digest


@pytest.mark.parametrize(
    ("days", "warns"), [(13, True), (16, False)], ids=["within 14 days", "later"]
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
        f"{cert}: the certificate expires within 14 days",
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
    assert (*certificate,) == (path, path)
    assert {*config.path.parent.iterdir()} - before == {path}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = decode(path)
    assert "NIST CURVE: P-256" in text and "TLS Web Server Authentication" in text
    for name in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        shake_hands(certificate, path, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(certificate, path, "lab.example.org")


def test_our_certificate_is_kept_until_the_names_change(
    config: notebooks.Config, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = notebooks.ensure_certificate(config)
    first = certificate.cert_file.read_bytes()
    notebooks.ensure_certificate(config)
    assert certificate.cert_file.read_bytes() == first and not caplog.messages
    for address, names in (
        ("lab.example.org", ["lab.example.org"]),
        ("{username}.example.org", ["example.org", "zoe.example.org"]),
        ("[2001:db8::1]", ["2001:db8::1"]),
        ("192.0.2.1", ["192.0.2.1", "localhost"]),
    ):
        last = certificate.cert_file.read_bytes()
        changed = dataclasses.replace(config, server_address=address)
        certificate = notebooks.ensure_certificate(changed)
        kept = certificate.cert_file.read_bytes()
        notebooks.ensure_certificate(changed)
        assert certificate.cert_file.read_bytes() == kept != last
        for name in names:
            shake_hands(certificate, certificate.cert_file, name)
        assert len(caplog.messages) == 1 and "made anew" in caplog.messages[0]
        caplog.clear()


def test_our_certificate_is_made_anew_before_it_expires(
    config: notebooks.Config,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebooks, "CERTIFICATE_DAYS", 13)
    path = config.path.with_name("notebooks.pem")
    notebooks.make_certificate(path, notebooks.host_names(config))
    first = path.read_bytes()
    certificate = notebooks.ensure_certificate(config)
    assert path.read_bytes() != first
    (message,) = caplog.messages
    assert message.startswith(f"{path}: made anew for its age; ")
    monkeypatch.undo()
    notebooks.make_certificate(path, notebooks.host_names(config))
    assert certificate.valid_for(395) and not certificate.valid_for(398)


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
