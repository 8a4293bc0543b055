"""The authenticator interface, and the settings of authentication."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

from penstock.smtp.sasl import MECHANISMS, Exchange, ScramKeys


class AuthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Authentication on a listener (RFC 4954)."""

    users: Annotated[
        str,
        msgspec.Meta(
            min_length=1,
            description="The users file, written by `penstock user`; relative to data_dir. Servers with the same users "
            "should also have the same file `secret` in data_dir: SCRAM invents salts for unknown names with it, and "
            "names whose salts differ from server to server are known not to exist",
        ),
    ] = "users"
    mechanisms: Annotated[
        tuple[Literal["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN"], ...],
        msgspec.Meta(description=f"Mechanisms in the order they are offered: {', '.join(MECHANISMS)}"),
    ] = MECHANISMS
    required: Annotated[bool, msgspec.Meta(description="Refuse MAIL before AUTH: 530 5.7.0")] = False
    without_tls: Annotated[
        bool,
        msgspec.Meta(description="Also offer PLAIN and LOGIN without TLS: for loopback or a trusted network"),
    ] = False


class Authenticator(Protocol):
    """Verifies users. Both methods take the same time for known and for unknown names."""

    async def verify(self, name: str, password: str) -> bool:
        """Return whether the password is that of the user.

        The name has 1 to 255 octets in UTF-8, the password 1 to 1024. Slow on purpose (argon2, in a thread, few at the
        same time). Raise if the backend is unavailable: the connection is closed, and the attempt does not count.
        """

    def scram_keys(self, name: str) -> ScramKeys:
        """Return the SCRAM keys of a user; for an unknown name, keys that no password fits, always the same ones.

        Invented keys have the shape of real ones, because clients can see the salt and the iterations (RFC 5802 5.1).
        Called in the event loop, so it has to be quick. If it raises an exception, the client receives 454.
        """


@runtime_checkable
class StartsExchanges(Protocol):
    """Optional interface of an authenticator with its own SASL exchanges, such as one that accepts all users."""

    def start_exchange(self, mechanism: str) -> Exchange:
        """Return a new exchange for a mechanism of the listener."""


@runtime_checkable
class CanonicalNames(Protocol):
    """Optional interface of an authenticator for which several spellings of a name are the same user."""

    def canonical_name(self, name: str) -> str:
        """Return the canonical spelling of an authenticated user name: the identity of the session."""
