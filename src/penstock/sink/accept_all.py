"""AUTH of a sink: every name and password is accepted, in every mechanism whose server needs no password to answer."""

from __future__ import annotations

import os
import re
from typing import Final

from penstock.smtp.sasl import Challenge, Exchange, ScramKeys, Step, Success

ACCEPT_ALL_MECHANISMS: Final = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER")
"""SCRAM and DIGEST-MD5 are missing because their servers prove to the client that they know its password."""

_LOGIN_PROMPTS: Final = (b"Username:", b"Password:")
_OAUTH_NAME: Final = re.compile(rb"(?:\An,a=|user=)([^,\x01]*)")
"""XOAUTH2: "user=NAME^Aauth=Bearer TOKEN^A^A"; OAUTHBEARER: "n,a=NAME,^Aauth=Bearer TOKEN^A^A" (RFC 7628 3.1)."""


class AcceptAllAuthenticator:
    """Accepts everybody; see penstock.auth.base."""

    async def verify(self, name: str, password: str) -> bool:  # noqa: ARG002 - the protocol has them
        """Return True."""
        return True

    def scram_keys(self, name: str) -> ScramKeys:
        """Raise NotImplementedError: the mechanism is not offered."""
        raise NotImplementedError(f"SCRAM is not offered, so {name!r} has no keys")

    def start_exchange(self, mechanism: str) -> Exchange:
        """Return an exchange that succeeds whatever the client sends, empty names among it."""
        return _AcceptAll(mechanism)


class _AcceptAll:
    """An exchange that accepts every response. The user name is extracted for the journal."""

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.name = ""  # no name is claimed: names are not throttled
        self._responses: list[bytes] = []

    def start(self, initial: bytes | None) -> Step:
        """Prompt, or take the initial response."""
        return Challenge(self._prompt()) if initial is None else self.respond(initial)

    def respond(self, data: bytes) -> Step:
        """Prompt for the password of LOGIN; otherwise accept."""
        self._responses.append(data)
        if self.mechanism == "LOGIN" and len(self._responses) == 1:
            return Challenge(self._prompt())
        return Success(self._name(), "")

    def _prompt(self) -> bytes:
        if self.mechanism == "LOGIN":
            return _LOGIN_PROMPTS[len(self._responses)]
        # The challenge of CRAM-MD5 is a message id (RFC 2195 2); the other mechanisms begin with an empty one.
        return b"<%d.penstock@localhost>" % int.from_bytes(os.urandom(8)) if self.mechanism == "CRAM-MD5" else b""

    def _name(self) -> str:
        """Return the name in the responses; "" if they have no name."""
        first = self._responses[0]
        if self.mechanism == "PLAIN":  # authzid NUL authcid NUL password (RFC 4616 2)
            parts = first.split(b"\0")
            name = parts[1] if len(parts) > 1 else first
        elif self.mechanism == "CRAM-MD5":  # name, a blank, the digest
            name = first.rpartition(b" ")[0]
        elif self.mechanism == "LOGIN":
            name = first
        else:
            found = _OAUTH_NAME.search(first)
            name = b"" if found is None else found[1]
        return name.decode("utf-8", "replace")
