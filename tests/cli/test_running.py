"""Common to `serve` and `sink`: a journal that never blocks, and errors that name the key."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import smtplib
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from penstock.app import assemble
from penstock.cli import journaling
from penstock.cli.journaling import JournalWriter
from penstock.cli.main import main
from penstock.journal import Journal, JournalSettings
from tests.cli.outfits import settings_of


def tell(missing: int) -> bytes:
    return b"missing %d\n" % missing


FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """A file whose writes wait for permission, then take the given octets, fail, or at last succeed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *acts: int | OSError) -> None:
        self.pieces: list[bytes] = []
        self.begun = threading.Semaphore(0)
        self.may = threading.Semaphore(0)
        self._acts = iter(acts)
        monkeypatch.setattr(journaling, "os", self)

    @property
    def written(self) -> bytes:
        return b"".join(self.pieces)

    def write(self, _: int, data: memoryview) -> int:
        self.begun.release()
        assert self.may.acquire(timeout=60)
        act = next(self._acts, len(data))
        if isinstance(act, OSError):
            raise act
        self.pieces.append(bytes(data[:act]))
        return act


def test_unwritten_lines_are_counted_and_reported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, FULL, FULL)
    write = JournalWriter(2, tell)
    write(b"one\ntwo\n")
    assert disk.begun.acquire(timeout=60)
    write(b"three\n")
    disk.may.release(9)
    write.close(60)
    assert disk.written == b"missing 2\nthree\n"


def test_a_truncated_line_is_completed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, 6, FULL)
    disk.may.release(9)
    write = JournalWriter(2, tell)
    write(b"one\ntwo\nthree\n")
    write.close(60)
    assert disk.written == b"one\ntwo\nmissing 1\n"


def test_lines_beyond_the_limit_are_dropped_and_reported_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(journaling, "_MOST_WAITING", 8)
    write = JournalWriter(2, tell)
    write(b"one\n")
    assert disk.begun.acquire(timeout=60)
    for lines in (b"two\n", b"three\n", b"four\nfive\n", b"six\n"):
        write(lines)
    disk.may.release(9)
    write.close(60)
    assert disk.written == b"one\ntwo\nthree\nmissing 3\n"


def test_close_does_not_wait_for_a_blocked_write(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write = JournalWriter(2, tell)
    write(b"one\n")
    write.close(0)
    disk.may.release(9)
    write.close(60)
    assert disk.written == b"one\n"


def test_shared_descriptors_get_atomic_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.may.release(9)
    monkeypatch.setattr(journaling, "_ATOMIC", 10)
    write = JournalWriter(2, tell, is_shared=True)
    long = b"x" * 20 + b"\n"
    write(b"one\ntwo\nthree\n" + long + b"four\n")
    write.close(60)
    assert disk.pieces == [b"one\ntwo\n", b"three\n", long, b"four\n"]


def test_a_non_blocking_pipe_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    write = JournalWriter(writing, tell)
    lines = b"line\n" * 100_000
    write(lines)
    with os.fdopen(reading, "rb") as file:
        assert file.read(len(lines)) == lines
    write.close(60)
    os.close(writing)


def test_a_closed_standard_error_only_costs_lines() -> None:
    write = JournalWriter(-1, tell)
    write(b"one\n")
    write.close(60)


def test_the_line_about_dropped_lines_has_the_usual_format() -> None:
    line = Journal(JournalSettings(format="json")).tell_dropped(7)
    assert json.loads(line)["event"] == "dropped"
    assert json.loads(line)["events"] == 7
    assert Journal(JournalSettings(format="human")).tell_dropped(7).endswith(b" dropped       events=7\n")


@contextmanager
def started(errors: int, folder: Path, workers: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run `penstock serve` with the given standard error. Yield its process and port."""
    command = [sys.executable, "-m", "penstock", "serve", "--data", str(folder), "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--workers", workers], stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            assert process.stdout is not None
            said = (re.search(rb"listening on 127\.0\.0\.1:(\d+)", line) for line in process.stdout)
            yield process, int(next(found[1] for found in said if found))
        finally:
            process.kill()


def send(port: int, sessions: int) -> None:
    for _ in range(sessions):
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_under_the_journal_costs_no_mail(tmp_path: Path, workers: str) -> None:
    with Path("/dev/full").open("wb") as full, started(full.fileno(), tmp_path, workers) as (process, port):
        send(port, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_unread_journal_blocks_neither_mail_nor_shutdown(tmp_path: Path, workers: str) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with started(writing, tmp_path, workers) as (process, port):
        send(port, 40)  # about 10,000 octets of journal
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    os.close(writing)
    os.close(reading)


NO_MX = "next_hop = 'smtp://a'\ntls.mode = 'require'\nauth.user = 'me'"


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[[listener]]\ntls.certificate = 'gone'", r"listener\[0\]\.tls\.certificate: .*No such file"),
        ("[[listener]]\ntls.certificate = 'text'", r"listener\[0\]\.tls\.certificate: .*PEM"),
        ("[[listener]]\ntls.certificate = 'chain'\ntls.key = 'gone'", r"listener\[0\]\.tls\.key: .*No such file"),
        ("[[listener]]\ntls.certificate = 'chain'\ntls.key = 'text'", r"listener\[0\]\.tls\.key: .*PEM"),
        ("[[listener]]\ntls.certificate = 'chain'", r"listener\[0\]\.tls\.certificate: .*PEM"),
        ("[[listener]]\nauth.users = '.'", r"listener\[0\]\.auth\.users: .*Is a directory"),
        ("[[listener]]\nauth.users = 'text'", r"listener\[0\]\.auth\.users: .*text:1: "),
        (f"[[route]]\n{NO_MX}\nauth.password_file = 'gone'", r"route\[0\]\.auth\.password_file: .*No such file"),
        ("[recipients]\nfile = 'gone'", r"recipients\.file: .*No such file"),
        ("[recipients]\nfile = 'text'", r"recipients\.file: .*text:1: a line is an address"),
    ],
)
def test_an_unusable_file_is_reported_with_its_key(tmp_path: Path, toml: str, expected: str) -> None:
    (tmp_path / "text").write_text("this is text\n")
    trustme.CA().cert_pem.write_to_path(tmp_path / "chain")  # and no key
    file = tmp_path / "penstock.toml"
    listener = "" if "[[listener]]" in toml else "[[listener]]\naddress = '127.0.0.1:0'\n"
    file.write_text(listener + toml.replace("[[listener]]", "[[listener]]\naddress = '127.0.0.1:0'"))
    result = CliRunner().invoke(main, ["serve", "--config", str(file), "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert re.search(expected, result.output)


async def test_another_user_can_pass_through_new_parents_of_the_data(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        server = assemble(settings_of(tmp_path / "new" / "a" / "data"), Journal(JournalSettings()), lambda _: None)
    finally:
        os.umask(before)
    server.listeners[0].socket.close()
    found = [
        stat.S_IMODE((tmp_path / each).stat().st_mode) for each in ("new", "new/a", "new/a/data", "new/a/data/tmp")
    ]
    assert found == [0o755, 0o755, 0o750, 0o750]
