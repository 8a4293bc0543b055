"""A DNS server on the loopback interface for tests: real messages, a zone as a table, and failures on request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import trio

SOA = "ns.example. hostmaster.example. 1 3600 600 86400 {ttl}"


@dataclass
class Zone:
    """The records of the server by name and type. A name without any record does not exist."""

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    ttl: int = 300
    negative_ttl: int = 60
    failures: dict[str, str] = field(default_factory=dict)
    """Name -> "SERVFAIL", "REFUSED", "silence" or "garbage"."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    follows: bool = True
    """Include the target of an alias in the answer, as recursive servers do."""

    def add(self, name: str, kind: str, *records: str) -> None:
        self.records.setdefault((name, kind), []).extend(records)

    def answer(self, wire: bytes) -> bytes | None:
        """Return the response to a query; None for no response."""
        question = dns.message.from_wire(wire)
        name, kind = question.question[0].name, question.question[0].rdtype
        text = name.to_text(omit_final_dot=True).lower()
        self.asked.append((text, dns.rdatatype.to_text(kind)))
        response = dns.message.make_response(question)
        response.flags |= dns.flags.RA
        failure = self.failures.get(text)
        if failure == "silence":
            return None
        if failure == "garbage":
            return wire[:2] + b"\xff" * 20
        if failure is not None:
            response.set_rcode(dns.rcode.from_text(failure))
            return response.to_wire()
        self._fill(response, text, dns.rdatatype.to_text(kind))
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: str, kind: str) -> None:
        seen: set[str] = set()
        while name not in seen:
            seen.add(name)
            found = self.records.get((name, kind))
            alias = self.records.get((name, "CNAME"))
            if found:
                response.answer.append(dns.rrset.from_text_list(f"{name}.", self.ttl, "IN", kind, found))
                return
            if alias is None:
                break
            response.answer.append(dns.rrset.from_text_list(f"{name}.", self.ttl, "IN", "CNAME", alias))
            if not self.follows:
                return
            name = alias[0].rstrip(".")
        if not any(known == name for known, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        soa = SOA.format(ttl=self.negative_ttl)
        response.authority.append(
            dns.rrset.from_text(name.rpartition(".")[2] + ".", self.negative_ttl, "IN", "SOA", soa)
        )


@asynccontextmanager
async def nameserver(zone: Zone) -> AsyncIterator[str]:
    """Serve a zone on a free port until the end of the block; yield "127.0.0.1:port"."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))

        async def serve() -> None:
            while True:
                wire, client = await sock.recvfrom(4096)
                answer = zone.answer(wire)
                if answer is not None:
                    await sock.sendto(answer, client)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield f"127.0.0.1:{sock.getsockname()[1]}"
            nursery.cancel_scope.cancel()
