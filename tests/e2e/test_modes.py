"""Files that hold mail or addresses are for their owner, whatever the umask."""

from __future__ import annotations

import os
import smtplib
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import serving

CONFIG = """
hostname = "mx.example.org"
domains = ["example.org"]
data_dir = "."
[[listener]]
address = "127.0.0.1:0"
[delivery.maildir]
path = "mail/{domain}/{local}"
[spool]
body_in_file = 100
[[trace]]
networks = ["127.0.0.0/8"]
[journal]
file = "journal.log"
"""
BODY = b"Subject: x\r\n\r\n" + b"x" * 1000 + b"\r\n"
PUBLIC = {"penstock.toml", "out", "journal", "ca.pem", "plan.toml"}
"""Files of the test, and what clients read."""


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """Return the files and folders below a folder that users of other groups may use."""
    return [
        f"{path.relative_to(folder)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for path in folder.rglob("*")
        if path.lstat().st_mode & 0o007 and path.name not in PUBLIC and not path.is_symlink()
    ]


@pytest.mark.usefixtures("no_umask")
def test_files_of_a_gateway_are_not_for_others(tmp_path: Path) -> None:
    with serving(tmp_path / "data", CONFIG) as server, smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail("a@example.com", ["b@example.org"], BODY)
        client.sendmail("a@example.com", ["c@example.org"], BODY)
        while len(list((tmp_path / "data").glob("mail/*/*/new/*"))) < 2:
            assert server.process.poll() is None
        assert open_to_others(tmp_path / "data") == []


@pytest.mark.usefixtures("no_umask")
def test_files_of_a_sink_are_not_for_others(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[rule]]\nphase = "rcpt"\nreply = "451 4.2.1 x"\nmatch = { recipient = ["slow@*"] }\n')
    keep = [f"{kind}:{tmp_path / 'data' / f'kept-{kind}'}" for kind in ("mbox", "jsonl", "maildir")]
    words = [word for each in keep for word in ("--keep", each)]
    words += ["-d", f"{tmp_path}/data/dump/%Y/"]
    words += ["--faults", str(plan), "--fault-log", str(tmp_path / "data" / "f.jsonl")]
    with (
        serving(tmp_path / "data", "", "sink", *words) as server,
        smtplib.SMTP("127.0.0.1", server.port) as client,
    ):
        refused = client.sendmail("a@example.com", ["b@example.org", "slow@example.org"], BODY)
        assert list(refused) == ["slow@example.org"]
    assert open_to_others(tmp_path / "data") == []
