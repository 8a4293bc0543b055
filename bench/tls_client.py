"""A client for TLS: threads that send EHLO, STARTTLS, EHLO and messages. smtp-source has no TLS.

Only the CPU time of the server is measured, so that of the client does not matter.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time

from bench.measure import Round, Running, cpu_of

_ENVELOPE = b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n", b"DATA\r\n"


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # each server makes its certificate for the run
    return context


def _reply(sock: socket.socket, code: bytes) -> None:
    data = b""
    while True:
        piece = sock.recv(65536)
        data += piece
        last = data.rstrip(b"\r\n").rpartition(b"\n")[2]
        if not piece or (data.endswith(b"\r\n") and last[3:4] != b"-"):
            break
    if not last.startswith(code):
        raise RuntimeError(f"expected {code!r}, got {data!r}")


def _ask(sock: socket.socket, line: bytes, code: bytes) -> None:
    sock.sendall(line)
    _reply(sock, code)


def _connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _reply(plain, b"220")
    _ask(plain, b"EHLO client.example\r\n", b"250")
    _ask(plain, b"STARTTLS\r\n", b"220")
    sock = context.wrap_socket(plain, server_hostname="localhost")
    _ask(sock, b"EHLO client.example\r\n", b"250")
    return sock


def tls_source(server: Running, *, messages: int, sessions: int, size: int, reuse: bool) -> Round:
    """Send messages over STARTTLS and return what they cost the server. Raise OSError or RuntimeError."""
    line = b"x" * 78 + b"\r\n"
    text = b"Subject: bench\r\n\r\n" + line * (size // len(line)) + b".\r\n"
    failures: list[Exception] = []

    def work(count: int) -> None:
        context = _context()
        sock: ssl.SSLSocket | None = None
        try:
            for _ in range(count):
                if sock is None:
                    sock = _connect(server.port, context)
                for command, code in zip((*_ENVELOPE, text), (b"250", b"250", b"354", b"250"), strict=True):
                    _ask(sock, command, code)
                if not reuse:
                    _ask(sock, b"QUIT\r\n", b"221")
                    sock.close()
                    sock = None
        except (OSError, RuntimeError) as exc:
            failures.append(exc)
        finally:
            if sock is not None:
                sock.close()

    threads = [threading.Thread(target=work, args=(messages // sessions,)) for _ in range(sessions)]
    before, started = cpu_of(server.pid), time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    if failures:
        raise failures[0]
    return Round(messages // sessions * sessions, seconds, cpu_of(server.pid) - before)
