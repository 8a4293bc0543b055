"""Which keys sign a message, and signatures on messages of our own: reports (RFC 6376, RFC 8463)."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.mailauth.dkim import DkimSigner
from penstock.mailauth.header import Header, author_domains
from penstock.message import Message


class SigningKeys:
    """Keys by domain. A domain signs for itself and for those below it (RFC 9989 alignment); the nearest one signs."""

    def __init__(self, keys: Iterable[tuple[str, DkimSigner]]) -> None:
        """`keys` are domains, in their canonical form, and what signs for them."""
        found: dict[str, list[DkimSigner]] = {}
        for domain, signer in keys:
            found.setdefault(domain, []).append(signer)
        self._domains = sorted(found.items(), key=lambda each: -len(each[0]))

    def of(self, header: Header) -> list[DkimSigner]:
        """Return what signs a message with this header; nothing if it does not have one author in our domains."""
        authors = author_domains(header)
        if len(authors) != 1:
            return []
        for domain, signers in self._domains:
            if authors[0] == domain or authors[0].endswith(f".{domain}"):
                return signers
        return []

    def sign(self, message: Message, now: int) -> Message:
        """Return a message of our own, which is in memory and has its header in the body, with our signatures."""
        octets = message.prefix + b"".join(message.body.chunks())
        head, _, text = octets.partition(b"\r\n\r\n")
        header = Header(head + b"\r\n")
        signers = self.of(header)
        if not signers:
            return message
        hashes = DkimSigner.start()
        hashes.feed(text)
        hashes.finish()
        fields = [signer.finish(header, hashes, now=now) for signer in signers]
        return message._replace(prefix=b"".join(fields) + message.prefix)
