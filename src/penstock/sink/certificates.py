"""Certificates with one fault each, signed by the CA of the valid one."""

from __future__ import annotations

import datetime
import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trustme

from penstock.files import write_atomically
from penstock.sink.plan import TlsFault

FAULTY_CONTEXTS: Final[frozenset[TlsFault | None]] = frozenset({"wrong-name", "expired", "alert", "tls-1.2"})
"""TLS faults that are properties of a context."""
_WRONG_NAME: Final = "wrong-name.invalid"
_LONG_AGO: Final = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


class Certificates:
    """A CA, the certificate of a server, and TLS contexts with faults.

    `put` writes the valid certificate for the listeners. Clients that trust its CA find only the intended fault in the
    others.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are the host names and addresses of the server."""
        self._names = tuple(names)
        self._authority = trustme.CA(organization_name="Penstock", key_type=trustme.KeyType.ECDSA)
        self._contexts: dict[TlsFault | None, ssl.SSLContext] = {}

    def put(self, folder: Path) -> None:
        """Write `server.pem` and `ca.pem`. Raise OSError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        leaf = self._issue(*self._names)
        write_atomically(folder / "ca.pem", self._authority.cert_pem.bytes(), mode=0o644)
        write_atomically(folder / "server.pem", leaf.private_key_and_cert_chain_pem.bytes())

    def context(self, what: TlsFault | None) -> ssl.SSLContext:
        """Return the server context for a fault, None for none. Made on first use."""
        if what not in self._contexts:
            self._contexts[what] = self._make(what)
        return self._contexts[what]

    def _make(self, what: TlsFault | None) -> ssl.SSLContext:
        names = (_WRONG_NAME,) if what == "wrong-name" else self._names
        leaf = self._issue(*names, not_after=_LONG_AGO if what == "expired" else None)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory(prefix="penstock-sink-") as folder:  # ssl reads certificates only from files
            file = Path(folder) / "leaf.pem"
            file.touch(mode=0o600)
            file.write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
            context.load_cert_chain(file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if what == "tls-1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        elif what == "alert":
            # Require a client certificate, which no client has. In TLS 1.3, the client has finished its handshake when
            # the server notices and sends a fatal alert (RFC 8446 4.4.2.4). OpenSSL has no other way to force one.
            context.verify_mode = ssl.CERT_REQUIRED
            self._authority.configure_trust(context)
        return context

    def _issue(self, *names: str, not_after: datetime.datetime | None = None) -> trustme.LeafCert:
        """Issue a certificate. trustme makes it valid from 2000 on, so tests may change the clock."""
        return self._authority.issue_cert(
            *names, organization_name="Penstock", not_after=not_after, key_type=trustme.KeyType.ECDSA
        )
