"""Signals that operators and log rotation send: none but SIGTERM and SIGINT ends a server."""

from __future__ import annotations

import signal
import smtplib
from pathlib import Path

import pytest

from tests.e2e.running import serving


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGQUIT"])
@pytest.mark.parametrize("workers", [1, 2])
def test_other_signals_end_no_session(tmp_path: Path, name: str, workers: int) -> None:
    with (
        serving(tmp_path, "", "serve", "--workers", str(workers)) as server,
        smtplib.SMTP("127.0.0.1", server.port) as client,
    ):
        client.ehlo("client.example")
        server.process.send_signal(getattr(signal, name))
        assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert server.process.poll() is None
