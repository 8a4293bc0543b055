"""One authentication of a client: a SASL exchange, the authenticator and the throttle together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from penstock import reply as replies
from penstock.auth.base import Authenticator, CanonicalNames, StartsExchanges
from penstock.auth.throttle import AuthThrottle
from penstock.reply import Reply
from penstock.smtp.sasl import (
    Challenge,
    ChannelBinding,
    Exchange,
    Failure,
    Step,
    Success,
    VerifyPassword,
    start_exchange,
)

_Data = TypeVar("_Data", bytes, bytes | None)

NAME_THROTTLED: Final = Reply(454, "4.7.0", "Too many failed authentications of this user, please try again later")


class Login:
    """The authentication that one AUTH command begins (RFC 4954).

    `start` handles the command and `respond` each further message. Both return a `Challenge`, a `Failure` or a
    `Success`, after which the login is over. The attempt counts as a failure from the start (penstock.auth.throttle);
    `finish` takes it back after a success.
    """

    def __init__(
        self,
        mechanism: str,
        authenticator: Authenticator,
        throttle: AuthThrottle,
        network: str,
        binding: ChannelBinding | None = None,
    ) -> None:
        """`network` is `Peer.network`; the other arguments are those of `start_exchange`. Raise KeyError like it."""
        self.mechanism = mechanism
        self.name = ""
        """The user name that the client claims, "" until it is known."""
        self._exchange: Exchange
        if isinstance(authenticator, StartsExchanges):
            self._exchange = authenticator.start_exchange(mechanism)
        else:
            self._exchange = start_exchange(mechanism, scram_keys=authenticator.scram_keys, binding=binding)
        self._authenticator = authenticator
        self._attempt = throttle.begin(network)

    async def start(self, initial: bytes | None) -> Challenge | Success | Failure:
        """Handle the initial response: b"" for an empty one, None when there was none.

        Raise what the authenticator raises; the attempt does not count then.
        """
        return await self._step(self._exchange.start, initial)

    async def respond(self, data: bytes) -> Challenge | Success | Failure:
        """Handle the response to the last challenge. Raise what the authenticator raises."""
        return await self._step(self._exchange.respond, data)

    def finish(self, reply: Reply) -> None:
        """End the login with the reply that the client gets: 2xx is a success, 4xx does not count, 5xx is a failure."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if reply.accepts:
            attempt.succeeded()
        elif not reply.is_permanent:
            attempt.withdrawn()

    async def _step(self, take: Callable[[_Data], Step], data: _Data) -> Challenge | Success | Failure:
        if self._attempt is None:
            return Failure(replies.AUTH_THROTTLED, "too many failures of the network")
        # The name of a SCRAM exchange is known before its proof is verified, here.
        if self._exchange.name and not self._claim(self._exchange.name):
            return self._fail(Failure(NAME_THROTTLED, "too many failures of the user name"))
        step = take(data)
        self.name = self._exchange.name or self.name
        if isinstance(step, VerifyPassword):
            step = await self._verify(step)
        if isinstance(step, Failure):
            return self._fail(step)
        if isinstance(step, Success):
            return step._replace(name=self._canonical(step.name))
        return step

    async def _verify(self, step: VerifyPassword) -> Success | Failure:
        assert self._attempt is not None
        if not self._claim(step.name):
            return Failure(NAME_THROTTLED, "too many failures of the user name")
        try:
            is_right = await self._authenticator.verify(step.name, step.password)
        except Exception:
            self._attempt.withdrawn()
            raise
        return Success(step.name, "") if is_right else Failure(replies.AUTH_FAILED, "wrong name or password")

    def _claim(self, name: str) -> bool:
        assert self._attempt is not None
        self.name = name
        return self._attempt.claim(name)

    def _fail(self, failure: Failure) -> Failure:
        self.finish(failure.reply)
        return failure

    def _canonical(self, name: str) -> str:
        authenticator = self._authenticator
        return authenticator.canonical_name(name) if isinstance(authenticator, CanonicalNames) else name
