"""swaks, the usual SMTP test client."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from tests.e2e.running import ENVIRONMENT, Server, digest, serving
from tests.e2e.test_python_clients import AUTH, add_user


def swaks(server: Server, *arguments: str) -> str:
    """Run swaks against a server and return what it printed."""
    command = ["swaks", "--server", server.address, "--from", "a@example.com", "--to", "b@example.org", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["--pipeline"], ["-tls"], ["-tls", "--pipeline"]], ids=" ".join)
def test_swaks_delivers(tmp_path: Path, arguments: list[str]) -> None:
    with serving(tmp_path / "data") as server:
        swaks(server, *arguments)
        assert len(server.messages(1)) == 1


def test_swaks_over_implicit_tls(tmp_path: Path) -> None:
    toml = '[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "implicit"\n'
    with serving(tmp_path / "data", toml) as server:
        swaks(server, "--tls-on-connect")
        assert len(server.messages(1)) == 1


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_swaks_authenticates(tmp_path: Path, mechanism: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    add_user(folder, "alice", "secret")
    with serving(folder, AUTH) as server:
        swaks(server, "-tls", "--auth", mechanism, "--auth-user", "alice", "--auth-password", "secret")
        assert len(server.messages(1)) == 1


def test_swaks_over_lmtp(tmp_path: Path) -> None:
    toml = '[[listener]]\naddress = "127.0.0.1:0"\nkind = "lmtp"\n'
    with serving(tmp_path / "data", toml) as server:
        swaks(server, "--protocol", "LMTP")
        assert len(server.messages(1)) == 1


def test_swaks_attachment_of_25_megabytes(tmp_path: Path) -> None:
    attachment = tmp_path / "large.bin"
    attachment.write_bytes(bytes(range(256)) * 98_000)
    toml = '[[listener]]\naddress = "127.0.0.1:0"\nmax_size = 50_000_000\n'
    with serving(tmp_path / "data", toml) as server:
        swaks(server, "--attach", f"@{attachment}", "--hide-all")
        (received,) = server.messages(1)
        assert len(received) > 33_000_000
        part = received.partition(b"Content-Transfer-Encoding: BASE64\r\n\r\n")[2].partition(b"\r\n------")[0]
        assert digest(base64.b64decode(part)) == digest(attachment.read_bytes())
