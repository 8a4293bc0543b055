"""Greylisting and rate limits of `penstock serve`, with one process and with several workers."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.running import Server, serving
from tests.e2e.test_workers import workers_of

SETTINGS = """
[[listener]]
address = "127.0.0.1:0"
proxy_networks = ["127.0.0.0/8"]
[delivery]
kind = "discard"
[policy]
mode = "enforce"
spf = {{ mode = "off" }}
dkim = {{ mode = "off" }}
dmarc = {{ mode = "off" }}
{tables}
[journal]
events = "errors"
"""
GREYLIST = '[policy.greylist]\nwhen = "always"\ndelay = "1s"\n'
RATE = '[[policy.rate]]\nby = ["network"]\ncount = "messages"\nlimit = "25/d"\n'


def send(
    server: Server, address: str = "198.51.100.1", recipient: str = "bob@example.org", sender: str = "alice@example.com"
) -> tuple[int, bytes]:
    """Send a message from an address, as the PROXY header says. Return the last reply."""
    with closing(socket.create_connection(("127.0.0.1", server.port), 60)) as sock, sock.makefile("rb") as replies:
        lines = [f"PROXY TCP4 {address} 192.0.2.25 40000 25", "HELO client.example", f"MAIL FROM:<{sender}>"]
        for line in (*lines, f"RCPT TO:<{recipient}>", "DATA", "Subject: test\r\n\r\ntext\r\n."):
            sock.sendall(f"{line}\r\n".encode())
            reply = replies.readline()
            if reply[:1] > b"3":
                break
        return int(reply[:3]), reply[4:].strip()


def send_many(server: Server, clients: int, messages: int) -> Counter[int]:
    """Send messages of one network over connections at the same time; return how often which code was the reply."""

    def run(_: int) -> list[int]:
        return [send(server)[0] for _ in range(messages)]

    with ThreadPoolExecutor(clients) as executor:
        return Counter(code for codes in executor.map(run, range(clients)) for code in codes)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_rate_is_exact_and_survives_a_restart(tmp_path: Path, workers: str) -> None:
    settings = SETTINGS.format(tables=RATE)
    with serving(tmp_path / "data", settings, "serve", "--workers", workers) as server:
        assert send_many(server, 8, 5) == {250: 25, 450: 15}
        assert send(server) == (450, b"4.7.1 Rate limit exceeded, please try again later")
        assert send(server, "198.51.100.2")[0] == 250
        assert server.stop() == 0
    with serving(tmp_path / "data", settings, "serve", "--workers", workers) as server:
        assert send(server)[0] == 450
        assert "state" not in server.journal.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_greylisted_attempts_do_not_count_and_passes_survive(tmp_path: Path, workers: str) -> None:
    settings = SETTINGS.format(tables=GREYLIST + RATE.replace("25", "3"))
    with serving(tmp_path / "data", settings, "serve", "--workers", workers) as server:
        assert send(server) == (451, b"4.7.1 Greylisted, please try again in 1 seconds")
        codes = [send(server, f"198.51.100.{number % 3}")[0] for number in range(9)]  # one /24
        while codes[-1] == 451:
            codes.append(send(server, "198.51.100.3")[0])
        assert codes.count(250) == 1, "a limit of 3 was not used up by deferred attempts"
        assert send(server, "198.51.100.4", "other@example.org")[0] == 451
        pids = workers_of(server)
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for index in pids:
            server.said(f"worker {index} was ended by SIGKILL, and is started again")
        assert [send(server, "198.51.100.3")[0] for _ in range(3)] == [250, 250, 450]
        assert server.stop() == 0
    with serving(tmp_path / "data", settings.replace('"1s"', '"1h"'), "serve", "--workers", workers) as server:
        assert send(server, "198.51.100.200")[0] == 250
        assert send(server, "198.51.101.200")[0] == 451
