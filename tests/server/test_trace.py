"""`[[trace]]`: the dialogs of selected sessions in a file."""

from __future__ import annotations

import json
import smtplib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from penstock.app import open_server
from penstock.auth.users import UsersFile
from penstock.config import ConfigError, parse
from penstock.server.trace import Trace, TraceSettings

Lines = list[dict[str, object]]


@asynccontextmanager
async def traced(folder: Path, *traces: str, listener: str = "") -> AsyncIterator[Callable[[], smtplib.SMTP]]:
    """Run a server with traces; yield what connects to it."""
    tables = "\n".join(f"[[trace]]\n{trace}" for trace in traces)
    toml = f"data_dir = '{folder}'\n[delivery]\nkind = 'discard'\n{tables}\n"
    toml += f"[[listener]]\naddress = '127.0.0.1:0'\nname = 'in'\n{listener}"
    async with open_server(parse(toml)) as server:
        port = int(server.addresses[0].rpartition(":")[2])
        yield lambda: smtplib.SMTP("127.0.0.1", port)


def lines_of(folder: Path, name: str = "trace.jsonl") -> Lines:
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def texts(lines: Lines) -> list[str]:
    return [f"{line['side']} {line['text']}" for line in lines]


def send(connect: Callable[[], smtplib.SMTP], sender: str, recipient: str, text: str = "Hello\r\n") -> None:
    with connect() as client:
        client.sendmail(sender, [recipient], text)


async def test_a_session_of_a_network_is_traced_from_its_greeting(tmp_path: Path) -> None:
    async with traced(tmp_path, 'networks = ["127.0.0.0/8"]', 'networks = ["192.0.2.1"]\nfile = "other"') as connect:
        await trio.to_thread.run_sync(send, connect, "a@example.com", "b@example.org")
    lines = lines_of(tmp_path)
    said = texts(lines)
    assert said[0].startswith("S: 220 ") and said[-1] == "S: 221 2.0.0 Bye"
    assert "C: Hello" in said and "C: (7 octets of text)" in said
    (recipient,) = [number for number, text in enumerate(said) if text.lower() == "c: rcpt to:<b@example.org>"]
    assert recipient + 1 == said.index("S: 250 2.1.5 Recipient ok")
    assert {(line["session"], line["peer"], line["listener"]) for line in lines} == {(1, "127.0.0.1", "in")}
    assert (tmp_path / "trace.jsonl").stat().st_mode & 0o777 == 0o600
    assert lines_of(tmp_path, "other") == []


async def test_a_session_is_traced_by_sender_and_recipient(tmp_path: Path) -> None:
    trace = 'sender = "*@example.com"\nrecipient = "B@example.org"'
    async with traced(tmp_path, trace) as connect:
        for sender, recipient in (
            ("a@example.com", "c@example.org"),
            ("a@example.net", "b@example.org"),
            ("a@example.com", "b@example.org"),
        ):
            await trio.to_thread.run_sync(send, connect, sender, recipient)
    lines = lines_of(tmp_path)
    assert {line["session"] for line in lines} == {3}
    assert texts(lines)[0].startswith("S: 220 ")  # what was said before is there


async def test_a_refused_recipient_is_traced_as_well(tmp_path: Path) -> None:
    async with traced(tmp_path, 'recipient = "bad"') as connect:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            await trio.to_thread.run_sync(send, connect, "a@example.com", "bad")
    assert any("S: 501 5.1.3" in text for text in texts(lines_of(tmp_path)))


async def test_passwords_are_not_in_a_trace(tmp_path: Path) -> None:
    await trio.to_thread.run_sync(UsersFile(tmp_path / "users").add, "alice", "secret-word")
    listener = "auth = { without_tls = true }"
    async with traced(tmp_path, 'networks = ["127.0.0.1"]', listener=listener) as connect:

        def login() -> None:
            with connect() as client:
                client.login("alice", "secret-word")
                client.docmd("AUTH", "PLAIN AGFsaWNlAHNlY3JldC13b3Jk")

        await trio.to_thread.run_sync(login)
    text = (tmp_path / "trace.jsonl").read_text()
    assert "S: 235" in "\n".join(texts(lines_of(tmp_path))) and "not shown" in text
    assert "secret" not in text and "AGFsaWNl" not in text


async def test_a_trace_is_bounded(tmp_path: Path) -> None:
    async with traced(tmp_path, 'networks = ["127.0.0.1"]\nmost = 2') as connect:
        text = "x" * 900 + "\r\n"
        for _ in range(4):
            await trio.to_thread.run_sync(send, connect, "a@example.com", "b@example.org", text * 100)
    lines = lines_of(tmp_path)
    assert {line["session"] for line in lines} == {1, 2}
    assert (tmp_path / "trace.jsonl").stat().st_size < 10_000


async def test_a_session_is_traced_up_to_its_bound(tmp_path: Path) -> None:
    async with traced(tmp_path, 'networks = ["127.0.0.1"]') as connect:

        def chat() -> None:
            with connect() as client:
                client.ehlo()
                assert isinstance(client.sock, socket.socket)
                client.sock.sendall(b"MAIL FROM:<a@example.com>\r\nRSET\r\n" * 5000)
                client.file = client.sock.makefile("rb")
                for _ in range(10_000):
                    client.getreply()

        await trio.to_thread.run_sync(chat)
    assert 200_000 < (tmp_path / "trace.jsonl").stat().st_size < 300_000


def test_lines_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    trace = Trace(TraceSettings(sender="*", file="folder/trace"), tmp_path)
    trace.add([b"one\n", b"two\n"])
    with pytest.raises(OSError, match="folder/trace"):
        trace.flush()
    (tmp_path / "folder").mkdir()
    trace.add([b'{"three": 3}\n'])
    trace.flush()
    three, dropped = (tmp_path / "folder" / "trace").read_text().splitlines()
    assert three == '{"three": 3}' and json.loads(dropped)["dropped"] == 2


def test_a_trace_needs_a_condition() -> None:
    with pytest.raises(ConfigError, match=r"trace\[0\]: choose the sessions by networks, sender or recipient"):
        parse("[[trace]]\nmost = 3")
    with pytest.raises(ConfigError, match=r"trace\[0\].networks: "):
        parse("[[trace]]\nnetworks = ['x']")
