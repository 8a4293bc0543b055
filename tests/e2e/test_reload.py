"""Reloads, by signal and without: through `penstock serve`, with real clients."""

from __future__ import annotations

import contextlib
import signal
import smtplib
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from bench.operations import make_pair, status_of

from tests.e2e.running import ENVIRONMENT, Server, serving
from tests.e2e.test_workers import events, workers_of
from tests.ports import free_port


def certificate_of(server: Server) -> bytes:
    """Return the certificate that a new client is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
        client.starttls(context=context)
        assert isinstance(client.sock, ssl.SSLSocket)
        found = client.sock.getpeercert(binary_form=True)
        assert found is not None
        return found


def wait_for_event(server: Server, name: str, count: int = 1) -> dict[str, Any]:
    """Wait until the journal has so many events of a kind; return the last."""
    deadline = time.monotonic() + 60
    while len(found := events(server, name)) < count:
        assert time.monotonic() < deadline, server.journal.read_text()
        time.sleep(0.02)
    return found[count - 1]


def settings(**changes: str) -> str:
    """Return a configuration file with TLS."""
    return "\n".join(
        [
            'hostname = "mx.example.org"',
            changes.get("top", ""),
            "[server]",
            f"workers = {changes.get('workers', '1')}",
            f"reload_check = {changes.get('reload_check', '0')}",
            "[[listener]]",
            f'address = "{changes.get("address", "127.0.0.1:0")}"',
            changes.get("listener", ""),
            '[listener.tls]\ncertificate = "cert.pem"\nkey = "key.pem"',
            changes.get("more", ""),
        ]
    )


@contextmanager
def reloadable(folder: Path, **changes: str) -> Iterator[Server]:
    folder.mkdir(exist_ok=True)
    if not (folder / "cert.pem").exists():
        make_pair(folder)
    with serving(folder, settings(**changes)) as server:
        yield server


def rewrite(server: Server, **changes: str) -> None:
    (server.folder / "penstock.toml").write_text(settings(**changes))
    server.process.send_signal(signal.SIGHUP)


MESSAGE = b"Subject: x\r\n\r\nHello\r\n"
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@WORKERS
def test_a_replaced_certificate_is_used_without_a_signal(tmp_path: Path, workers: str) -> None:
    with reloadable(tmp_path, workers=workers, reload_check="0.5") as server:
        before = certificate_of(server)
        after = make_pair(tmp_path)
        assert after != before
        wait_for_event(server, "reloaded")
        assert {certificate_of(server) for _ in range(6)} == {after}
        assert server.stop() == 0


@WORKERS
def test_a_bad_pair_keeps_the_old_one_and_is_reported_once(tmp_path: Path, workers: str) -> None:
    with reloadable(tmp_path, workers=workers, reload_check="0.3") as server:
        before = certificate_of(server)
        other = trustme.CA().issue_cert("mx.example.org")
        other.private_key_pem.write_to_path(tmp_path / "key.pem")
        cause = wait_for_event(server, "reload-failed")["cause"]
        assert cause.startswith("listener[0].tls.key: ")
        assert "not the private key" in cause
        assert certificate_of(server) == before
        after = make_pair(tmp_path)
        wait_for_event(server, "reloaded")
        assert certificate_of(server) == after
        assert len(events(server, "reload-failed")) == 1


def test_the_time_between_two_renames_is_not_reported(tmp_path: Path) -> None:
    with reloadable(tmp_path, reload_check="5") as server:
        leaf = trustme.CA().issue_cert("mx.example.org")
        leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        server.process.send_signal(signal.SIGUSR2)
        wait_for_event(server, "state", 2)
        leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
        wait_for_event(server, "reloaded")
        assert certificate_of(server) == ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
        assert events(server, "reload-failed") == []


@WORKERS
def test_a_reload_changes_limits_in_place(tmp_path: Path, workers: str) -> None:
    with reloadable(tmp_path, workers=workers) as server, smtplib.SMTP("127.0.0.1", server.port) as old:
        old.ehlo()
        rewrite(server, workers=workers, listener="max_size = 1000000")
        wait_for_event(server, "reloaded")
        for _ in range(4):
            with smtplib.SMTP("127.0.0.1", server.port) as new:
                new.ehlo()
                assert new.esmtp_features["size"] == "1000000"
        old.ehlo()
        assert old.esmtp_features["size"] != "1000000"  # a session keeps what it began with
        assert old.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}


@WORKERS
def test_a_wrong_configuration_changes_nothing(tmp_path: Path, workers: str) -> None:
    with reloadable(tmp_path, workers=workers) as server:
        pids = workers_of(server)
        wrong = [
            ({"listener": "max_sise = 3"}, r"penstock.toml: listener\[0\].max_sise"),
            ({"more": '[recipients]\nfile = "nowhere"'}, "recipients.file: "),
            ({"more": '[[check]]\nhook = "policies.py:Nothing"'}, "policies.py:Nothing"),
        ]
        for number, (changes, message) in enumerate(wrong, 1):
            rewrite(server, workers=workers, **changes)
            cause = wait_for_event(server, "reload-refused", number)["cause"]
            assert message.replace("\\", "") in cause
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert workers_of(server) == pids


POLICY = """
from penstock import Reply
class Texts:
    def __init__(self, file):
        self.text = open(file).read().strip()
    def on_mail(self, transaction, sender, parameters):
        return Reply(550, "5.7.1", self.text)
"""


@WORKERS
def test_policy_files_are_read_again_when_they_change(tmp_path: Path, workers: str) -> None:
    (tmp_path / "policies.py").write_text(POLICY)
    (tmp_path / "text").write_text("first")
    more = f'[[check]]\nhook = "policies.py:Texts"\narguments = {{ file = "{tmp_path / "text"}" }}'
    with reloadable(tmp_path, workers=workers, reload_check="0.2", more=more) as server:

        def said() -> str:
            with smtplib.SMTP("127.0.0.1", server.port) as client:
                client.ehlo()
                return client.mail("a@example.com")[1].decode()

        each = int(workers)
        assert said() == "5.7.1 first"
        (tmp_path / "text").write_text("second text")
        wait_for_event(server, "reloaded", each)
        assert said() == "5.7.1 second text"
        (tmp_path / "policies.py").write_text(POLICY.replace("self.text)", "'third: ' + self.text)"))
        wait_for_event(server, "reloaded", each * 2)
        assert said() == "5.7.1 third: second text"
        (tmp_path / "policies.py").write_text("class Texts: pass")
        assert "the policies used before remain" in wait_for_event(server, "reload-failed", each)["cause"]
        assert said() == "5.7.1 third: second text"


MEMORY = "[body]\nmemory_total = 50_000_000"
"""A change that needs new processes."""


@WORKERS
def test_domains_routes_and_limits_change_in_place(tmp_path: Path, workers: str) -> None:
    down = f"smtp://127.0.0.1:{free_port()}"
    route = f'[[route]]\nnext_hop = "{down}"\n'
    waits = "[relay.retry]\nschedule = [3600]\n"
    with (
        reloadable(tmp_path, workers=workers, more=route + waits) as server,
        smtplib.SMTP("127.0.0.1", server.port) as old,
    ):
        old.ehlo()
        pids = workers_of(server)
        assert old.sendmail("a@example.com", ["b@example.org", "c@example.net"], MESSAGE) == {}
        server.said('"deferred"')
        limit = "[admission]\nconnections = 4\n"
        rewrite(server, workers=workers, top='domains = ["example.org"]', more=limit + waits)
        wait_for_event(server, "reloaded")
        for _ in range(4):
            with smtplib.SMTP("127.0.0.1", server.port) as new:
                new.ehlo()
                new.mail("a@example.com")
                assert new.rcpt("b@example.net")[0] == 550
                assert new.rcpt("<postmaster>")[0] == 250
        assert old.sendmail("a@example.com", ["d@example.net"], MESSAGE) == {}  # as the session began
        assert len(server.messages(1)) == 1, "new mail has the new route"
        deadline = time.monotonic() + 60
        ctl(server, "hop", "example.org", "retry")
        ctl(server, "hop", "example.net", "retry")
        everyone = ["b@example.org", "c@example.net", "d@example.net"]
        while (to := sorted(to for each in events(server, "delivered") for to in each["to"])) != everyone:
            assert time.monotonic() < deadline, f"mail that waits has the new route, too: {to}"
            time.sleep(0.02)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(smtplib.SMTP("127.0.0.1", server.port))
            with pytest.raises(smtplib.SMTPConnectError) as refused:
                smtplib.SMTP("127.0.0.1", server.port)
            assert refused.value.smtp_code == 421
        assert workers_of(server) == pids


def ctl(server: Server, *words: str) -> None:
    command = [server.python, "-m", "penstock", "ctl", *words, "--config", str(server.folder / "penstock.toml")]
    place = ["--data", str(server.folder)]
    subprocess.run([*command, *place], check=True, capture_output=True, env=ENVIRONMENT, timeout=60)


def test_other_changes_replace_the_workers(tmp_path: Path) -> None:
    with reloadable(tmp_path, workers="2") as server:
        before = workers_of(server)
        rewrite(server, workers="3", top="domains = ['example.org']")
        wait_for_event(server, "reloaded")
        after = workers_of(server)
        assert sorted(after) == [0, 1, 2]
        assert not set(before.values()) & set(after.values())
        for _ in range(6):
            with smtplib.SMTP("127.0.0.1", server.port) as client:
                client.ehlo()
                client.mail("a@example.com")
                assert client.rcpt("b@example.net")[0] == 550
                assert client.rcpt("b@example.org")[0] == 250
        rewrite(server, workers="1", top="domains = ['example.org']")
        wait_for_event(server, "reloaded", 2)
        assert sorted(workers_of(server)) == [0]
        for _ in range(12):  # also those whose clients were given to the workers that have left
            with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
                assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert server.stop() == 0


def test_a_worker_that_does_not_start_stops_the_roll(tmp_path: Path) -> None:
    with reloadable(tmp_path, workers="2", more=MEMORY) as server:
        before = workers_of(server)
        (tmp_path / "policies.py").write_text("import os\nos._exit(3)\n")
        rewrite(server, workers="2", more='[[check]]\nhook = "policies.py:X"')
        cause = wait_for_event(server, "reload-failed")["cause"]
        assert "the new worker 0 ended with code 3 before it was ready" in cause
        assert workers_of(server) == before
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            assert client.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nHello\r\n") == {}


def wait_for_metrics(port: int) -> None:
    """Wait until the server is ready there."""
    deadline = time.monotonic() + 60
    status = 0
    while not status:
        with contextlib.suppress(ConnectionRefusedError):
            status = status_of(f"127.0.0.1:{port}")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status == 200


def test_the_address_of_the_metrics_can_change(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    more = [f'[metrics]\naddress = "127.0.0.1:{port}"' for port in ports]
    with reloadable(tmp_path, more=more[0]) as server:
        assert status_of(f"127.0.0.1:{ports[0]}") == 200
        pids = workers_of(server)
        rewrite(server, more=more[1])
        wait_for_event(server, "reloaded")
        wait_for_metrics(ports[1])
        with pytest.raises(ConnectionRefusedError):
            status_of(f"127.0.0.1:{ports[0]}")
        assert workers_of(server) == pids


def test_an_address_in_use_leaves_the_old_address_of_the_metrics(tmp_path: Path) -> None:
    port = free_port()
    with reloadable(tmp_path, more=f'[metrics]\naddress = "127.0.0.1:{port}"') as server, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        rewrite(server, more=f'[metrics]\naddress = "127.0.0.1:{other.getsockname()[1]}"')
        assert wait_for_event(server, "error")["where"] == "control, metrics"
        wait_for_metrics(port)
        ctl(server, "rotate")  # the control socket is there, too


def test_a_certificate_behind_a_link_to_a_folder_is_noticed(tmp_path: Path) -> None:
    """As certbot and Kubernetes replace certificates."""
    new = [tmp_path / name for name in ("first", "second")]
    for folder in new:
        folder.mkdir()
    make_pair(new[0])
    after = make_pair(new[1])
    (tmp_path / "live").symlink_to("first")
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).symlink_to(f"live/{name}")
    with reloadable(tmp_path, reload_check="0.2") as server:
        assert certificate_of(server) != after
        (tmp_path / "new").symlink_to("second")
        (tmp_path / "new").replace(tmp_path / "live")
        wait_for_event(server, "reloaded")
        assert certificate_of(server) == after
        assert events(server, "reload-failed") == []


def test_a_single_process_says_what_needs_a_restart(tmp_path: Path) -> None:
    with reloadable(tmp_path) as server:
        rewrite(server, more=MEMORY)
        assert wait_for_event(server, "reload-refused")["cause"].startswith("body: ")
