"""Large messages need little memory."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.e2e.running import Server, serving

TOML = """
[[listener]]
address = "127.0.0.1:0"
max_size = 0
[body]
memory_total = 16_777_216
"""
LINE = b"x" * 998 + b"\r\n"
BLOCK = LINE * 64


def peak_of(pid: int) -> int:
    """Return the peak of resident octets since `reset_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def reset_peak(pid: int) -> int:
    """Start measuring the peak again; return the resident octets."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_of(pid)


def send(server: Server, octets: int) -> bytes:
    """Send a message of about `octets` octets and return the last reply."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as sock:
        sock.sendall(b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        replies = b""
        while b"\r\n354" not in replies:
            replies += sock.recv(65536)
        for _ in range(octets // len(BLOCK)):
            sock.sendall(BLOCK)
        sock.sendall(b".\r\n")
        return sock.recv(65536)


def test_a_message_of_100_megabytes_adds_less_than_2_megabytes(tmp_path: Path) -> None:
    with serving(tmp_path / "data", TOML) as server:
        assert send(server, 1_000_000).startswith(b"250")  # warms up: threads and stacks do not belong to a message
        before = reset_peak(server.process.pid)
        assert send(server, 100_000_000).startswith(b"250")
        added = peak_of(server.process.pid) - before
        assert added < 2 * 1024 * 1024, added
        sizes = sorted(len(message) for message in server.messages(2))
        assert sizes[1] > 99_000_000
        assert list((tmp_path / "data" / "tmp").iterdir()) == []


def test_many_large_messages_at_a_time_stay_within_the_budget(tmp_path: Path) -> None:
    count, octets = 40, 4_000_000
    with serving(tmp_path / "data", TOML) as server:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(send, [server] * count, [100_000] * count))  # warms up: threads, sockets, blocks
            before = reset_peak(server.process.pid)
            replies = list(pool.map(send, [server] * count, [octets] * count))
        assert all(reply.startswith(b"250") for reply in replies)
        # 160 MB of messages in a budget of 16, and what threads and the allocator use besides.
        added = peak_of(server.process.pid) - before
        assert added < 24 * 1024 * 1024, added


def test_a_message_above_the_limit_is_not_buffered(tmp_path: Path) -> None:
    toml = TOML.replace("max_size = 0", "max_size = 1_000_000")
    with serving(tmp_path / "data", toml) as server:
        send(server, 500_000)
        before = reset_peak(server.process.pid)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            file = sock.makefile("rb")
            for line in (b"EHLO x", b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.org>", b"DATA"):
                sock.sendall(line + b"\r\n")
                while file.readline()[3:4] == b"-":
                    pass
            file.readline()
            for _ in range(500):
                sock.sendall(BLOCK)
            sock.sendall(b".\r\nNOOP\r\n")
            assert file.readline().startswith(b"552 5.3.4")
            assert file.readline().startswith(b"250")
        assert peak_of(server.process.pid) - before < 2 * 1024 * 1024
        assert len(server.messages(1)) == 1
        assert os.listdir(tmp_path / "data" / "tmp") == []
