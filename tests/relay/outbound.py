"""A world to send mail to: a name server with an AD bit, MX hosts and policy hosts with certificates, and a gateway.

The zone is served by NSD. A front before it sets the AD bit, as a validating resolver does, for all names but those
below "insecure.example". All hosts are on the loopback: 127.0.0.2 and 127.0.0.3 are MX hosts, 127.0.0.4 is a policy
host.
"""

from __future__ import annotations

import hashlib
import json
import smtplib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import h11
import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from penstock.app import Server, assemble
from penstock.assembly import relaying
from penstock.config import parse
from penstock.dns import MailExchangers
from penstock.journal import Journal, JournalSettings
from tests.relay.fake import FakeHop

ORDINARY_TLS = ("PIPELINING", "SIZE", "8BITMIME", "DSN", "STARTTLS")


def tls_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """Return the context of a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def der_of(blob: trustme.Blob) -> bytes:
    return x509.load_pem_x509_certificate(blob.bytes()).public_bytes(Encoding.DER)


def tlsa(usage: int, selector: int, matching: int, blob: trustme.Blob) -> str:
    """Return the data of a TLSA record for a certificate, as a zone has it."""
    certificate = x509.load_pem_x509_certificate(blob.bytes())
    octets = certificate.public_bytes(Encoding.DER)
    if selector:
        octets = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if matching:
        octets = hashlib.new(("sha256", "sha512")[matching - 1], octets).digest()
    return f"{usage} {selector} {matching} {octets.hex()}"


@asynccontextmanager
async def front(nsd: str, *, broken: Sequence[str] = ()) -> AsyncIterator[str]:
    """Pass questions on to a name server, and set the AD bit in its answers; names in `broken` get SERVFAIL."""
    host, port = nsd.split(":")

    def answer(wire: bytes) -> bytes:
        query = dns.message.from_wire(wire)
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        if name in broken:
            failed = dns.message.make_response(query)
            failed.set_rcode(dns.rcode.SERVFAIL)
            return failed.to_wire()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect((host, int(port)))
            sock.send(wire)
            octets = bytearray(sock.recv(65_535))
        octets[3] |= 0x80  # RA
        if not name.endswith("insecure.example"):
            octets[3] |= 0x20  # AD
        return bytes(octets)

    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        await udp.bind(("127.0.0.1", 0))

        async def serve() -> None:
            while True:
                wire, client = await udp.recvfrom(4096)
                await udp.sendto(answer(wire), client)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield f"127.0.0.1:{udp.getsockname()[1]}"
            nursery.cancel_scope.cancel()


@dataclass
class PolicyHost:
    """An HTTPS server for policies of MTA-STS, and for reports."""

    certificate: trustme.LeafCert
    text: bytes = b""
    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("Content-Type", "text/plain")])
    asked: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Hosts and paths."""
    posted: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Media types and data."""
    port: int = 0
    stalls: bool = False

    async def serve(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(65_536)))
                elif isinstance(event, h11.Request):
                    self.asked.append((dict(event.headers)[b"host"], event.target))
                    kind = dict(event.headers).get(b"content-type", b"")
                elif isinstance(event, h11.Data):
                    self.posted.append((kind, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:  # the client refuses the certificate
                    await trio.aclose_forcefully(stream)
                    return
            if self.stalls:
                await trio.sleep_forever()
            out = connection.send(h11.Response(status_code=self.status, headers=self.headers)) or b""
            out += connection.send(h11.Data(data=self.text)) or b""
            await stream.send_all(out + (connection.send(h11.EndOfMessage()) or b""))
            await stream.aclose()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):  # a client that leaves early
            await trio.aclose_forcefully(stream)


def policy(*mx: str, mode: str = "enforce", max_age: int = 604_800) -> bytes:
    lines = ["version: STSv1", f"mode: {mode}", *(f"mx: {each}" for each in mx), f"max_age: {max_age}"]
    return "\r\n".join([*lines, ""]).encode()


@dataclass
class Outbound:
    """A gateway that sends to MX hosts."""

    server: Server
    lines: list[bytes]
    journal: Journal

    async def send(self, *to: str, sender: str = "alice@out.example") -> None:
        """Hand a message to the gateway, as a mail program does."""
        host, port = self.server.addresses[0].split(":")
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = sender or "a@out.example", ", ".join(to), "Hello"
        message.set_content("How are you?\n")

        def talk() -> None:
            with smtplib.SMTP(host, int(port), timeout=30) as client:
                client.sendmail(sender, to, message.as_bytes())

        await trio.to_thread.run_sync(talk)

    def events(self, kind: str) -> list[dict[str, Any]]:
        self.lines.append(self.journal.drain())
        found = [json.loads(line) for line in b"".join(self.lines).splitlines()]
        return [each for each in found if each["event"] == kind]

    async def event(self, kind: str) -> dict[str, Any]:
        """Wait for the first event of a kind."""
        await until(lambda: bool(self.events(kind)))
        return self.events(kind)[0]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - any condition
            await trio.sleep(0.005)


@asynccontextmanager
async def sending(
    folder: Path,
    nsd: str,
    mx: FakeHop,
    monkeypatch: pytest.MonkeyPatch,
    *,
    toml: str = "",
    tls: str = "dane = true\nmta_sts = true",
    authority: trustme.CA | None = None,
    policy_host: PolicyHost | None = None,
    broken: Sequence[str] = (),
) -> AsyncIterator[Outbound]:
    """Run a gateway whose MX hosts are all `mx`, on any address. `authority` is trusted for MTA-STS."""
    folder.mkdir(exist_ok=True)
    async with trio.open_nursery() as nursery, front(nsd, broken=broken) as resolver:
        listeners = await nursery.start(partial(trio.serve_tcp, mx.serve, 0, host="0.0.0.0"))
        mx.port = listeners[0].socket.getsockname()[1]
        monkeypatch.setattr(relaying, "SMTP_PORT", mx.port)
        monkeypatch.setattr(MailExchangers, "_is_own", lambda _, address: address == "127.0.0.1")
        if policy_host is not None:
            serve = partial(trio.serve_ssl_over_tcp, policy_host.serve, 0, tls_of(policy_host.certificate))
            served = await nursery.start(partial(serve, host="127.0.0.4"))
            policy_host.port = served[0].transport_listener.socket.getsockname()[1]
            monkeypatch.setattr(relaying, "HTTPS_PORT", policy_host.port)
        if authority is not None:
            authority.cert_pem.write_to_path(str(folder / "ca.pem"))
            tls += '\nca_file = "ca.pem"'
        settings = parse(
            f'hostname = "out.example"\ndata_dir = "{folder}"\n'
            '[[listener]]\naddress = "127.0.0.1:0"\n[[route]]\nnext_hop = "mx"\n'
            f'[resolver]\nservers = ["{resolver}"]\nttl_least = 0.0\nfamilies = ["ipv4"]\n'
            f"[server]\ngrace = 2.0\n[relay.tls]\n{tls}\n{toml}"
        )
        lines: list[bytes] = []
        journal = Journal(JournalSettings(format="json"))
        server = assemble(settings, journal, lines.append)
        await nursery.start(server.run)
        try:
            yield Outbound(server, lines, journal)
        finally:
            server.stop()
            nursery.cancel_scope.deadline = trio.current_time() + 10
            assert server.gateway is not None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                await server.gateway.over.wait()
        nursery.cancel_scope.cancel()
