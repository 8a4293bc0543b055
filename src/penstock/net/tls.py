"""TLS: contexts, generated certificates, and how turns use the TLS of a connection.

STARTTLS and implicit TLS are `trio.SSLStream`. A session that takes turns without waking its task (penstock.net.stream)
cannot use its coroutines for each command: that would wake the task, pass two locks and several checkpoints, and cost
two to three times what the ciphers do. So after the handshake `TlsTurns` borrows the SSLObject and the two memory BIOs
of the stream, and drives them with plain calls.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Protocol

import msgspec
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from penstock.files import locked, memory_file, write_atomically
from penstock.net import _poller
from penstock.transaction import TlsInfo

_RENEW_BEFORE: Final = datetime.timedelta(days=7)
_VALID_FOR: Final = datetime.timedelta(days=397)
"""What browsers and mail clients accept at most."""
_ENCODING_DER: Final = 2
"""_ssl.ENCODING_DER."""
_READ: Final = 65_536
"""Octets received, or decrypted, at a time."""


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS of a listener (RFC 3207, RFC 8314)."""

    mode: Annotated[
        Literal["none", "starttls", "implicit"],
        msgspec.Meta(
            description="starttls: offered after EHLO; implicit: from the first octet, as on port 465; none: no TLS"
        ),
    ] = "starttls"
    required: Annotated[
        bool,
        msgspec.Meta(description="Refuse mail without TLS (530 5.7.0). Not allowed on a public port 25 (RFC 3207 4)"),
    ] = False
    certificate: Annotated[
        str, msgspec.Meta(description="Certificate chain (PEM file); generated in data_dir if empty")
    ] = ""
    key: Annotated[str, msgspec.Meta(description="Private key (PEM file); read from the certificate file if empty")] = (
        ""
    )
    minimum: Annotated[Literal["1.2", "1.3"], msgspec.Meta(description="Minimum TLS version (RFC 8996, RFC 9325)")] = (
        "1.2"
    )
    ciphers: Annotated[
        str, msgspec.Meta(description="TLS 1.2 ciphers in OpenSSL's format; the default of Python if empty")
    ] = ""


@dataclass(frozen=True, slots=True)
class GeneratedCertificate:
    """A certificate of our own making, and the authority that clients have to trust for it."""

    certificate: Path
    """Chain and key in one PEM file, mode 0600."""
    ca_file: Path


def server_context(settings: TlsSettings, certificate: Path, key: Path | None = None) -> ssl.SSLContext:
    """Return the context of a listener. Raise OSError or ssl.SSLError (an OSError) when a file is of no use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if settings.minimum == "1.3" else ssl.TLSVersion.TLSv1_2
    if settings.ciphers:
        context.set_ciphers(settings.ciphers)
    context.load_cert_chain(certificate, key, password=_no_passphrase)
    context.num_tickets = 1  # a session that is resumed gets another one; OpenSSL would make two for each handshake
    return context


def _no_passphrase() -> str:
    """Refuse an encrypted key: without this, OpenSSL would ask on the terminal."""
    raise ValueError("the private key is encrypted")


class KeyPair(NamedTuple):
    """A certificate chain and its key as read from their files, for another process or for later."""

    chain: bytes
    """PEM; the first certificate is that of the server."""
    key: bytes
    """PEM."""

    @classmethod
    def read(cls, certificate: Path, key: Path | None = None) -> KeyPair:
        """Read the files. Raise OSError."""
        chain = certificate.read_bytes()
        return cls(chain, chain if key is None else key.read_bytes())

    def context(self, settings: TlsSettings) -> ssl.SSLContext:
        """Return the context of a listener. Raise OSError or ssl.SSLError (an OSError) when they are of no use.

        OpenSSL reads files only: they are files in memory, because a worker may not be allowed to read the real ones.
        """
        with memory_file(self.chain) as chain, memory_file(self.key) as key:
            return server_context(settings, Path(f"/proc/self/fd/{chain}"), Path(f"/proc/self/fd/{key}"))

    def binding(self) -> bytes:
        """Return the tls-server-end-point channel binding (RFC 5929 4.1)."""
        return _binding(self.chain)

    def not_after(self) -> float:
        """Return the Unix time at which the certificate expires."""
        return _not_after(self.chain)


class Agreed(Protocol):
    """The result of a handshake: an SSLObject or a trio.SSLStream."""

    def cipher(self) -> tuple[str, str, int] | None:
        """Return name, protocol and secret bits of the cipher."""

    def version(self) -> str | None:
        """Return the version of TLS."""


def tls_info(agreed: Agreed) -> TlsInfo:
    """Say what a handshake agreed on."""
    name, version, bits = agreed.cipher() or ("", "", 0)
    return TlsInfo(agreed.version() or version, name, bits)


def client_context(*, verify: bool, ca_file: str = "") -> ssl.SSLContext:
    """Return the context of a client: with any certificate, or with one of an authority of the file, or the system's.

    Raise OSError or ssl.SSLError (an OSError) when the file is of no use. Reads the disk.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file:
        context.load_verify_locations(ca_file)
    else:
        context.load_default_certs()
    return context


class TlsTurns:
    """TLS of a connection, for turns that do not await: the finished `trio.SSLStream`, borrowed.

    The handshake is `SSLStream.do_handshake`, and whatever is awaited goes through the stream. A turn (the pump of a
    server connection, the turns of a client) uses the same SSLObject between the same two memory BIOs with plain
    calls: received octets go in, what is to be sent comes out. The stream itself must not be used while turns are
    taken, and the other way round; both leave the objects in a consistent state between two calls.
    """

    __slots__ = ("_incoming", "_outgoing", "object")

    def __init__(self, ssl_object: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        """Use `TlsTurns.of`."""
        self.object = ssl_object
        self._incoming = incoming
        self._outgoing = outgoing

    @classmethod
    def of(cls, stream: trio.SSLStream[trio.abc.Stream]) -> TlsTurns | None:
        """Borrow the parts of a stream whose handshake is done.

        After a TLS 1.3 handshake a server's SSLStream holds back the session tickets: they are sent with what is
        encrypted first. None: this version of trio has no such attributes, so that the public methods of the stream
        have to be used for everything.
        """
        try:
            # The one place that knows private attributes of trio (checked with 0.27 to 0.31).
            parts = stream._ssl_object, stream._incoming, stream._outgoing  # noqa: SLF001
            tickets, stream._delayed_outgoing = stream._delayed_outgoing, None  # noqa: SLF001
        except AttributeError:
            return None
        if tickets:
            parts[2].write(tickets)
        return cls(*parts)

    @staticmethod
    def unsent_alert(stream: trio.SSLStream[trio.abc.Stream]) -> bytes:
        """Return the alert about a failed handshake: SSLStream raises without sending it."""
        outgoing = getattr(stream, "_outgoing", None)
        return b"" if outgoing is None else outgoing.read()

    def recv(self, fd: int, octets: int = _READ, /) -> int:
        """Receive encrypted octets from a socket; see `Wire.recv`."""
        data = _poller.recv(fd, octets)
        if data is None:
            return -1
        self._incoming.write(data)
        return len(data)

    def decrypt_into(self, feed: Callable[[bytes], object]) -> bool:
        """Decrypt what was received. Return False when the peer has ended TLS. Raise ssl.SSLError."""
        # A read returns a whole record, and the next one comes from the BIO: asking once more when that is empty would
        # only raise SSLWantReadError, which costs as much as decrypting a command.
        incoming, decrypting = self._incoming, self.object
        try:
            while incoming.pending or decrypting.pending():
                data = decrypting.read(_READ)
                if not data:
                    return False
                feed(data)
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLZeroReturnError:
            return False
        return True

    def encrypt(self, data: bytes) -> bytes:
        """Return the records to send for some data, perhaps none, and for TLS itself. Raise ssl.SSLError."""
        if data:
            self.object.write(data)
        return self._outgoing.read()

    def end(self) -> bytes:
        """Return the close_notify that ends the output (RFC 8446 6.1)."""
        with suppress(ssl.SSLError):
            self.object.unwrap()
        return self._outgoing.read()


def sent_chain(stream: trio.SSLStream[trio.abc.Stream]) -> list[bytes]:
    """Return the certificates that the peer has sent, in DER, its own first, whether or not they were verified."""
    get_chain = getattr(stream, "get_unverified_chain", None)  # Python 3.13, if trio passes it on
    if get_chain is None:
        # Before Python 3.13 only the object of the C module has it.
        made = getattr(stream, "_ssl_object", None)
        get_chain = getattr(made, "get_unverified_chain", None)
        get_chain = get_chain or getattr(getattr(made, "_sslobj", None), "get_unverified_chain", None)
    chain = [] if get_chain is None else get_chain() or []
    if chain:
        return [each if isinstance(each, bytes) else each.public_bytes(_ENCODING_DER) for each in chain]
    own = stream.getpeercert(binary_form=True)
    return [] if own is None else [own]


def end_point_binding(certificate: Path) -> bytes:
    """Return the tls-server-end-point channel binding of a certificate file (RFC 5929 4.1).

    It is the hash of the certificate with the hash of its signature, and SHA-256 in the place of MD5 and SHA-1.
    """
    return _binding(certificate.read_bytes())


def certificate_not_after(certificate: Path) -> float:
    """Return the Unix time at which a certificate expires. Raise OSError or ValueError."""
    return _not_after(certificate.read_bytes())


def _not_after(chain: bytes) -> float:
    return x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc.timestamp()


def _binding(chain: bytes) -> bytes:
    leaf = x509.load_pem_x509_certificates(chain)[0]
    used = leaf.signature_hash_algorithm
    weak = used is None or isinstance(used, hashes.MD5 | hashes.SHA1)
    return leaf.fingerprint(hashes.SHA256() if weak or used is None else used)


# ---- generated certificates


def generated_certificate(folder: Path, names: Sequence[str]) -> GeneratedCertificate:
    """Return a certificate for these names, a new one if it is missing, or expires soon, or it has other names.

    Of several processes that call this at once, one makes it. Raise OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = GeneratedCertificate(folder / "server.pem", folder / "ca.pem")
    with locked(folder):
        if not _is_good(made, names):
            ca = trustme.CA(organization_name="Penstock", key_type=trustme.KeyType.ECDSA)
            leaf = ca.issue_cert(
                *names,
                organization_name="Penstock",
                not_after=datetime.datetime.now(datetime.UTC) + _VALID_FOR,
                key_type=trustme.KeyType.ECDSA,
            )
            write_atomically(made.ca_file, ca.cert_pem.bytes(), mode=0o644)
            write_atomically(made.certificate, leaf.private_key_and_cert_chain_pem.bytes())
    return made


def _is_good(made: GeneratedCertificate, names: Sequence[str]) -> bool:
    try:
        leaf = x509.load_pem_x509_certificates(made.certificate.read_bytes())[0]
        made.ca_file.stat()
    except (OSError, ValueError):
        return False
    alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    covered = {str(item.value) for item in alternatives}
    now = datetime.datetime.now(datetime.UTC)
    return covered >= set(names) and leaf.not_valid_after_utc - now > _RENEW_BEFORE
