"""The clock of the machine is set while mail waits: none is returned, none waits for days."""

from __future__ import annotations

import json
import smtplib
from pathlib import Path

from bench import processes

from tests.e2e.running import serving
from tests.ports import free_port

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), Path("libfaketime.so.1"))
"""Of the package libfaketime."""


def test_mail_survives_jumps_of_the_clock_by_days(tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {
        **processes.ENVIRONMENT,
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    toml = f'[[listener]]\naddress = "127.0.0.1:0"\n[[route]]\nnext_hop = "smtp://127.0.0.1:{free_port()}"\n'
    with serving(tmp_path / "data", toml, environment=environment) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@example.com", ["b@example.org"], "Hello")
        server.said('"deferred"')
        offset.write_text("+6d")
        server.said('"event":"clock-jumped","seconds":518400,')
        server.said('"attempts":2,')  # it has become due, and is deferred again
        offset.write_text("-3d")
        server.said('"event":"clock-jumped","seconds":-777600,"rescheduled":1')
        events = [json.loads(line) for line in server.journal.read_text().splitlines()]
        assert not [event for event in events if event["event"] in ("bounced", "reported")]
        waits = [event["wait"] for event in events if event["event"] == "deferred"]
        assert len(waits) == 2 and max(waits) < 400  # the first steps of the schedule, with jitter
