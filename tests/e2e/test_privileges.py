"""Root binds and reads keys, another user serves. Without root, the server says that it cannot change the user."""

from __future__ import annotations

import os
import pwd
import smtplib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.operations import CONTEXT, make_pair

from tests.e2e.running import ENVIRONMENT, serving
from tests.e2e.test_reload import certificate_of, wait_for_event
from tests.e2e.test_workers import workers_of

IS_ROOT = os.geteuid() == 0
NOBODY = pwd.getpwnam("nobody")
CONFIG = """
data_dir = "state"
hostname = "mx.example.org"
[server]
user = "nobody"
reload_check = 0.3
[[listener]]
address = "127.0.0.1:0"
tls = { certificate = "../cert.pem", key = "../key.pem" }
[journal]
file = "log"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user can enter; those of pytest are private."""
    with tempfile.TemporaryDirectory(prefix="penstock-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def start(*arguments: str) -> tuple[int, str]:
    """Run a server that should not start."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock", *arguments],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_workers_serve_as_another_user_without_capabilities(folder: Path) -> None:
    make_pair(folder)
    (folder / "key.pem").chmod(0o600)
    (folder / "penstock.toml").write_text(CONFIG)
    if not IS_ROOT:
        code, said = start("serve", "--config", str(folder / "penstock.toml"))
        assert (code, "only root can become 'nobody'" in said) == (2, True)
        return
    (folder / "state").mkdir()  # of root, as an earlier server has left it
    with serving(folder / "state", CONFIG.replace("state", "."), "serve", "--listen", "127.0.0.1:0") as server:
        workers = workers_of(server)
        assert list(workers) == [0]  # with a user, there is always a supervisor
        status = status_of(workers[0])
        assert set(status["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert set(status["Gid"].split()) == {str(NOBODY.pw_gid)}
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status_of(server.process.pid)["Uid"].split()[0] == "0"
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert len(server.messages(1)) == 1
        after = make_pair(folder)  # which only root can read
        (folder / "key.pem").chmod(0o600)
        server.journal = folder / "state" / "log"
        wait_for_event(server, "reloaded")
        assert certificate_of(server) == after
        owners = {path.stat().st_uid for path in (folder / "state" / "spool").rglob("*")}
        assert owners == {NOBODY.pw_uid}
        assert server.stop() == 0


@pytest.mark.parametrize("command", ["serve", "sink"])
def test_root_does_not_serve_other_machines_by_accident(folder: Path, command: str) -> None:
    config = folder / "penstock.toml"
    addresses = "".join(f'[[listener]]\naddress = "{each}"\nname = "{each}"\n' for each in ("127.0.0.1:0", ":0"))
    config.write_text(f'domains = ["example.org"]\n{addresses}')
    if not IS_ROOT:
        with serving(folder, config.read_text(), command, "--listen", "127.0.0.1:0") as server:
            assert server.process.poll() is None
        return
    arguments = ["--config", str(config), *(["--open"] if command == "sink" else [])]
    code, said = start(command, *arguments)
    assert code == 2
    assert "server.user: as root, listener[1] on :0" in said
    done = start("config", "check", str(config))
    assert done[0] == 0
    with serving(folder, config.read_text() + "[server]\nallow_root = true\n", command, *arguments[2:]) as server:
        assert server.process.poll() is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('user = "no-such-user"', "server.user: there is no user 'no-such-user'"),
        ('user = "nobody"\ngroup = "no-such-group"', "server.group: there is no group 'no-such-group'"),
    ],
)
def test_unknown_accounts_are_named(folder: Path, lines: str, message: str) -> None:
    (folder / "penstock.toml").write_text(f"[server]\n{lines}\n[[listener]]\naddress = '127.0.0.1:0'\n")
    code, said = start("serve", "--config", str(folder / "penstock.toml"))
    assert code == 2
    assert message in said
    code, said = start("config", "check", str(folder / "penstock.toml"))
    assert (code, message in said) == (1, True)


@pytest.mark.parametrize("option", ["--user", "-u"])
def test_a_sink_serves_as_another_user(folder: Path, option: str) -> None:
    arguments = (option, "nobody" if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_name)
    with serving(folder, "", "sink", *arguments) as server:
        uid = str(NOBODY.pw_uid if IS_ROOT else os.geteuid())
        assert set(status_of(server.process.pid)["Uid"].split()) == {uid}
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.starttls(context=CONTEXT)
            assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert server.stop() == 0
