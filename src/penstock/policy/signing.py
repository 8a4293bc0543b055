"""DKIM signatures of our own on mail of our users (RFC 6376, 8301, 8463).

Only mail of clients that may use our domains is signed: authenticated clients, those in trusted networks, and unix
sockets. The signature is made when the message is accepted, after everything that may change the message, because the
relay does not know whose mail it is; so it is made once, and not at each attempt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Final

import trio

from penstock.addresses import canonical_domain, parse_address, parse_network
from penstock.mailauth.dkim import DkimSigner, load_private_key
from penstock.mailauth.header import Header
from penstock.mailauth.signing import SigningKeys
from penstock.message import Body, Message
from penstock.policy.check import Check, Edited, MessageFinding, Parts
from penstock.policy.milter import split_body
from penstock.policy.settings import PolicySettings, SignSettings
from penstock.reply import CHECK_FAILED
from penstock.transaction import Transaction

_IN_THREAD: Final = 1 << 18
"""Octets of a body above which it is hashed in a thread: 256 KiB take less than a millisecond."""


class SigningError(ValueError):
    """A key cannot be used."""


def read_signer(settings: SignSettings, data_dir: FilePath) -> DkimSigner:
    """Return what signs with a key. Raise OSError or SigningError."""
    path = data_dir / settings.key
    try:
        return DkimSigner(canonical_domain(settings.domain), settings.selector, load_private_key(path.read_bytes()))
    except ValueError as exc:
        raise SigningError(f"{path}: {exc}") from exc


def read_keys(settings: Sequence[SignSettings], data_dir: FilePath) -> SigningKeys:
    """Return the keys of some tables. Raise OSError or SigningError."""
    return SigningKeys((canonical_domain(each.domain), read_signer(each, data_dir)) for each in settings)


class SigningCheck(Check):
    """Signs. It has no mode: nothing is judged."""

    name = "sign"
    mode = "enforce"
    deadline = 60.0
    failure = CHECK_FAILED
    judges_trusted = True
    judges_authenticated = True

    def __init__(self, settings: Sequence[SignSettings], trusted: Sequence[str], data_dir: FilePath) -> None:
        """Read the keys. Raise OSError or SigningError."""
        self._trusted = [parse_network(network) for network in trusted]
        self._keys = read_keys(settings, data_dir)

    async def on_message(self, transaction: Transaction, message: Message) -> MessageFinding:
        """Sign a message if its client may send for the domain of its author."""
        if not self._may_sign(transaction):
            return None
        octets, rest = await split_body(message)
        header = Header(octets)
        signers = self._keys.of(header)
        if not signers:
            return None
        hashes = DkimSigner.start()

        def read(body: Body) -> None:
            skip = rest
            for chunk in body.chunks():
                if skip < len(chunk):
                    hashes.feed(memoryview(chunk)[skip:])
                skip = max(0, skip - len(chunk))
            hashes.finish()

        if message.body.size <= _IN_THREAD and getattr(message.body, "in_memory", False):
            read(message.body)
        else:
            await trio.to_thread.run_sync(read, message.body)
        now = int(time.time())
        fields = [signer.finish(header, hashes, now=now) for signer in signers]
        return Edited(message._replace(prefix=message.prefix + b"".join(fields)))

    def _may_sign(self, transaction: Transaction) -> bool:
        if transaction.identity is not None or not transaction.peer.address:
            return True
        address = parse_address(transaction.peer.address)
        return any(address in network for network in self._trusted)


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, if there are keys. Raise OSError or SigningError."""
    return [SigningCheck(settings.sign, settings.trusted, parts.data_dir)] if settings.sign else []
