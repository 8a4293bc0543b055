"""The authenticator seam: who may prove to be whom, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

from penstock.smtp.sasl import MECHANISMS, Exchange, ScramKeys


class AuthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Authentication on a listener (RFC 4954)."""

    users: Annotated[
        str,
        msgspec.Meta(min_length=1, description="The users file, as `penstock user` writes it; relative to data_dir"),
    ] = "users"
    mechanisms: Annotated[
        tuple[Literal["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN"], ...],
        msgspec.Meta(description=f"Mechanisms in the order they are offered: {', '.join(MECHANISMS)}"),
    ] = MECHANISMS
    required: Annotated[bool, msgspec.Meta(description="No MAIL before AUTH: 530 5.7.0")] = False
    without_tls: Annotated[
        bool,
        msgspec.Meta(description="Extensions PLAIN and LOGIN in the clear, too: for a loopback or a trusted network"),
    ] = False


class Authenticator(Protocol):
    """Knows users. Both questions take the same time for a name that exists and for one that does not."""

    async def verify(self, name: str, password: str) -> bool:
        """Say whether the password is that user's. Slow on purpose (argon2, in a thread, few at a time).

        The name has 1 to 255 octets, the password 1 to 1024. Raise what you like when there is no telling: that is a
        surprise and not a wrong password, it costs the connection and counts as no guess.
        """

    def scram_keys(self, name: str) -> ScramKeys:
        """Return what a SCRAM exchange needs of a user; for an unknown one, keys no password fits, always the same.

        Invented keys have the shape of real ones: salt length and iterations are what everybody gets to see
        (RFC 5802 5.1). Quick: it is asked in the loop. Whatever it raises, the client hears 454.
        """


@runtime_checkable
class StartsExchanges(Protocol):
    """The add-on of an authenticator that has SASL exchanges of its own, such as one that accepts everybody."""

    def start_exchange(self, mechanism: str) -> Exchange:
        """Return a new exchange for a mechanism of the listener."""
