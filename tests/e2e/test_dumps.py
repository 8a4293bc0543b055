"""The dumps of `penstock sink -d` and `-D` compared with those of Postfix's smtp-sink."""

from __future__ import annotations

import re
import smtplib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.running import ENVIRONMENT, serving
from tests.e2e.test_postfix import wait_for
from tests.ports import free_port

TEXT = "Subject: x\r\n\r\n.dot\r\nline\r\nFrom here\r\n"
RANDOM = re.compile(r"\(\S+\) with (\S+) id \w+;\n\t.*")
"""The parts that differ between runs, and the name of the program."""


def send(port: int) -> None:
    """Send three messages: two equal ones, and one that is aborted."""
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo("client.example")
        for _ in range(2):
            client.docmd("MAIL", "FROM:<alice@example.com> BODY=8BITMIME")
            client.rcpt("bob@example.org")
            client.rcpt("eve@example.org")
            client.data(TEXT)
        client.mail("x@example.com")
        client.rcpt("y@example.org")
        client.docmd("DATA")
        client.send(b"half")
        client.close()
    # Both serve all sessions in one loop, so an answer here means that the end of the last session was processed.
    # smtp-sink would otherwise leave a file of the aborted message.
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo("client.example")


def of_postfix(folder: Path, arguments: Sequence[str]) -> None:
    port = free_port()
    command = ["smtp-sink", "-u", "root", "-h", "mx.example", *arguments, f"127.0.0.1:{port}", "100"]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT)
    try:
        wait_for(port)
        send(port)
    finally:
        process.terminate()
        process.wait(timeout=60)


def of_penstock(folder: Path, arguments: Sequence[str]) -> None:
    with serving(folder.parent / "data", "", "sink", "-h", "mx.example", *arguments) as server:
        send(server.port)
        assert server.stop() == 0


def files(folder: Path) -> list[tuple[str, str]]:
    """Return the folders and the texts of all files, without their random parts."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted((str(path.parent.relative_to(folder)), RANDOM.sub(r"with \1", path.read_text())) for path in found)


@pytest.mark.parametrize(
    "arguments", [["-d", "%Y/one."], ["-D", "all.%Y"], ["-S", r"--\t\101\n", "-D", "%Y/%m/all"]], ids=" ".join
)
def test_dumps_equal_those_of_smtp_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder, make in ((theirs, of_postfix), (ours, of_penstock)):
        folder.mkdir()
        monkeypatch.chdir(folder)
        make(folder, arguments)
    assert files(ours) == files(theirs)
    assert len(files(ours)) == (2 if "-d" in arguments else 1)
