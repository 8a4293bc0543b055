"""SMTP smuggling (CVE-2023-51764): no end of data but CR LF . CR LF makes a second message, here or at a next hop.

Every odd ending is sent in DATA, in BDAT and in binary BDAT through each delivery to a next hop that takes any line end
for a line end, and any lone dot for the end of the data.
"""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.config import ConfigError, parse
from tests.e2e.running import serving

LINE_ENDS = (b"\r\n", b"\n", b"\r")
ENDINGS = [
    *(a + dots + b for dots in (b".", b"..") for a in LINE_ENDS for b in LINE_ENDS if dots + a + b != b".\r\n\r\n"),
    b"\r\n.\0\r\n",
    b"\r\n\0.\r\n",
    b"\r\r\n.\r\r\n",
    b"\n.\r\r\n",
    b"\r\n.\r\0\n",
    b"\r\n. \r\n",
]
SMUGGLED = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\nsmuggled\r\n.\r\n"


class Session(socketserver.StreamRequestHandler):
    """A next hop as lenient as can be: records the sender of every message."""

    server: LenientHop
    buffer = b""

    def handle(self) -> None:
        self.reply("220 hop")
        while line := self.until(rb"\r\n|\r(?!\Z)|\n"):
            verb, _, argument = line.decode("latin-1").strip().partition(" ")
            if verb.upper() == "EHLO":
                more = ["CHUNKING", "BINARYMIME"] if self.server.has_chunking else []
                self.reply("\r\n".join(f"250-{word}" for word in ("hop", "8BITMIME", *more)) + "\r\n250 SIZE")
            elif verb.upper() == "MAIL":
                self.server.senders.append(argument)
                self.reply("250 ok")
            elif verb.upper() == "DATA":
                self.reply("354 go on")
                self.buffer = b"\r\n" + self.buffer
                self.until(rb"(?:\r\n|\r|\n)\.(?:\r\n|\r(?!\Z)|\n)")
                self.reply("250 ok")
            elif verb.upper() == "BDAT":
                self.take(int(argument.split()[0]))
                self.reply("250 ok")
            else:
                self.reply("250 ok" if verb.upper() != "QUIT" else "221 bye")

    def reply(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())

    def receive(self) -> bool:
        data = self.connection.recv(65_536)
        self.buffer += data
        return bool(data)

    def until(self, pattern: bytes) -> bytes:
        """Return what is received up to a pattern, with it; b"" at the end of the connection."""
        while (found := re.search(pattern, self.buffer)) is None:
            if not self.receive():
                return b""
        text, self.buffer = self.buffer[: found.end()], self.buffer[found.end() :]
        return text

    def take(self, octets: int) -> None:
        while len(self.buffer) < octets and self.receive():
            pass
        self.buffer = self.buffer[octets:]


class LenientHop(socketserver.ThreadingTCPServer):
    """The server of such sessions."""

    daemon_threads = True

    def __init__(self, *, has_chunking: bool) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.has_chunking = has_chunking
        self.senders: list[str] = []


@contextmanager
def lenient_hop(*, has_chunking: bool) -> Iterator[LenientHop]:
    with LenientHop(has_chunking=has_chunking) as hop:
        thread = threading.Thread(target=hop.serve_forever)
        thread.start()
        try:
            yield hop
        finally:
            hop.shutdown()
            thread.join()


def dialog(port: int, *pieces: bytes) -> list[bytes]:
    """Send pieces, each after the reply to the one before, then QUIT; return all replies."""
    replies: list[bytes] = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client, client.makefile("rb") as file:
        for piece in (b"", *pieces, b"QUIT\r\n"):
            try:
                client.sendall(piece)
                while (line := file.readline()) and line[3:4] == b"-":
                    pass
            except OSError:  # the server has closed: the two sides disagree about the end of the text
                return replies
            replies.append(line)
        replies += file.readlines()
    return replies


def smuggle(port: int, ending: bytes) -> int:
    """Try an ending in DATA, in BDAT, and in binary BDAT. Return how many of the texts were answered with 250."""
    text = b"Subject: odd\r\n\r\nhello" + ending + SMUGGLED
    chunk = b"BDAT %d LAST\r\n" % len(text) + text
    mail, rcpt = b"MAIL FROM:<a@example.com>%b\r\n", b"RCPT TO:<b@example.org>\r\n"
    replies = [
        dialog(port, b"EHLO c\r\n", mail % b"", rcpt, b"DATA\r\n", text)[5:],
        dialog(port, b"EHLO c\r\n", mail % b"", rcpt, chunk)[4:],
        dialog(port, b"EHLO c\r\n", mail % b" BODY=BINARYMIME", rcpt, chunk)[4:],
    ]
    return sum(reply.startswith(b"250 ") for each in replies for reply in each)


def send_marker(port: int) -> None:
    """Send an ordinary message."""
    text = b"Subject: marker\r\n\r\nend\r\n.\r\n"
    mail, rcpt = b"MAIL FROM:<marker@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n"
    assert dialog(port, b"EHLO c\r\n", mail, rcpt, b"DATA\r\n", text)[5].startswith(b"250 ")


@pytest.mark.parametrize("rule", ["normalize", "reject"])
@pytest.mark.parametrize(
    ("delivery", "has_chunking"),
    [("maildir", False), ("spool", False), ("spool", True), ("passthrough", False), ("passthrough", True)],
)
def test_no_odd_ending_makes_a_second_message(tmp_path: Path, rule: str, delivery: str, has_chunking: bool) -> None:
    with lenient_hop(has_chunking=has_chunking) as hop:
        toml = (
            f"delivery.kind = '{delivery}'\njournal.format = 'json'\n"
            f"[[listener]]\naddress = '127.0.0.1:0'\n"
            f"wire = {{ bare_lf = '{rule}', bare_cr = '{rule}', nul = '{rule}' }}\n"
        )
        if delivery != "maildir":
            toml += f"[[route]]\nnext_hop = 'smtp://127.0.0.1:{hop.server_address[1]}'\ntls.mode = 'none'\n"
        with serving(tmp_path, toml) as server:
            taken = sum(smuggle(server.port, ending) for ending in ENDINGS)
            assert taken
            send_marker(server.port)
            server.said(r'"event":"accepted"[^\n]*"from":"marker@example\.com"')
            assert server.journal.read_text().count('"event":"accepted"') == taken + 1
            if delivery == "maildir":
                assert len(server.messages(taken + 1)) == taken + 1
            else:
                server.said(rf"(?s)(?:(?:\"event\":\"(?:delivered|bounced)\"|Ok: passed on).*?){{{taken + 1}}}")
                server.stop()  # reports on what a hop without BINARYMIME cannot take are sent before the end
        journal = server.journal.read_text()
        assert '"from":"evil@' not in journal
        assert not [sender for sender in hop.senders if "evil" in sender]


@pytest.mark.parametrize("key", ["bare_lf", "bare_cr"])
def test_accepting_bare_line_ends_for_a_next_hop_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"listener\[0\]\.wire\.{key}: .*SMTP smuggling"):
        parse(f"[[route]]\nnext_hop = 'mx'\n[[listener]]\nwire.{key} = 'accept'")
