"""Calls the policies of a listener at each hook point, in their order.

A hook point without a policy is an empty tuple and costs one `if` of the caller. A policy that raises, takes too long
or returns something else than a verdict has failed: the client gets 451, and the cause is journaled. A policy that
fails repeatedly is not called for a while; the reply is the same 451 meanwhile, because mail must not bypass a check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from penstock import reply as replies
from penstock.breaker import Breaker
from penstock.journal import Journal
from penstock.message import MailParameters, Message, Path, Recipient
from penstock.policy.base import ACCEPT
from penstock.policy.hooks import HookSettings
from penstock.reply import Reply
from penstock.transaction import Peer, Transaction

_FAILED: Final = replies.CHECK_FAILED


class _Guard:
    """One policy with its deadline, its concurrency limit and its circuit breaker."""

    def __init__(self, policy: object, settings: HookSettings, journal: Journal) -> None:
        self.policy = policy
        self._settings = settings
        self._journal = journal
        self._limiter = trio.CapacityLimiter(settings.concurrency)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_pause, settings.breaker_pause)

    async def ask(self, method: Callable[..., Any], hook_point: str, *arguments: object) -> object:
        """Return the policy's verdict, or CHECK_FAILED."""
        if self._breaker.blocks(trio.current_time()):
            return _FAILED
        self._breaker.probe()
        cause = ""
        answer: object = None
        began = trio.current_time()
        # The `try` is outside of the scope: exceptions that a nursery of the hook raises while the deadline cancels it
        # leave the scope as a group, after the scope has removed its Cancelled from it.
        try:
            with trio.move_on_after(self._settings.deadline) as scope:
                async with self._limiter:
                    answer = method(*arguments)
                    if inspect.isawaitable(answer):
                        answer = await answer
            if scope.cancelled_caught:
                cause = f"no answer within {self._settings.deadline} s"
            elif isinstance(answer, Reply):
                if 300 <= answer.code < 400:  # would ask the client for more: not a verdict
                    cause = f"a policy returns a 2xx, 4xx or 5xx reply, not {answer.code}"
            elif answer is not None and answer is not ACCEPT:
                cause = f"an answer is None, ACCEPT or a Reply, not {answer!r}"
        except BaseException as exc:  # also SystemExit of a hook: the check has failed
            if _is_ours(exc):
                self._breaker.abandon()
                raise
            cause = _cause_of(exc)
        if self._journal.counters is not None:
            seconds = trio.current_time() - began
            self._journal.counters.observe("policy_seconds", seconds, check=self._settings.hook, milestone=hook_point)
        if cause:
            self._fail(hook_point, cause)
            return _FAILED
        self._breaker.succeeded()
        return answer

    def _fail(self, hook_point: str, cause: str) -> None:
        self._journal.hook_failed(self._settings.hook, hook_point, cause)
        self._breaker.failed(trio.current_time())


def _is_ours(exc: BaseException) -> bool:
    """Return whether an exception cancels the session from outside."""
    if isinstance(exc, BaseExceptionGroup):
        return exc.subgroup(trio.Cancelled) is not None
    return isinstance(exc, trio.Cancelled | GeneratorExit)


def _cause_of(exc: BaseException) -> str:
    """Return the text of an exception for the journal; of a group with one exception, of that one."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - the __str__ of an exception may raise
        return type(exc).__name__


_Asked = tuple[_Guard, Callable[..., Any]]


class Pipeline:
    """The policies of a listener. Attributes named like hook points hold the policies that have the hook."""

    def __init__(self, policies: Sequence[tuple[object, HookSettings]], journal: Journal) -> None:
        guards = [_Guard(policy, settings, journal) for policy, settings in policies]

        def watching(hook_point: str) -> tuple[_Asked, ...]:
            return tuple(
                (guard, getattr(guard.policy, hook_point)) for guard in guards if hasattr(guard.policy, hook_point)
            )

        self.connect = watching("on_connect")
        self.helo = watching("on_helo")
        self.auth = watching("on_auth")
        self.mail = watching("on_mail")
        self.rcpt = watching("on_rcpt")
        self.message = watching("on_message")
        self.reset = watching("on_reset")
        self.disconnect = watching("on_disconnect")

    async def on_connect(self, peer: Peer, listener: str) -> Reply | None:
        """Judge a client by its address. None is a yes."""
        return await _ask(self.connect, "on_connect", peer, listener)

    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        """Judge the name a client gives itself."""
        return await _ask(self.helo, "on_helo", transaction, name)

    async def on_auth(self, transaction: Transaction, identity: str, mechanism: str) -> Reply | None:
        """Judge an identity that has proved itself."""
        return await _ask(self.auth, "on_auth", transaction, identity, mechanism)

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Reply | None:
        """Judge a reverse-path."""
        return await _ask(self.mail, "on_mail", transaction, sender, parameters)

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        """Judge a forward-path."""
        return await _ask(self.rcpt, "on_rcpt", transaction, recipient)

    async def on_message(self, transaction: Transaction, message: Message) -> Reply | None:
        """Judge a whole message."""
        return await _ask(self.message, "on_message", transaction, message)

    async def on_reset(self, transaction: Transaction) -> None:
        """Tell the policies that a client gives up its transaction."""
        for guard, method in self.reset:
            await guard.ask(method, "on_reset", transaction)

    async def on_disconnect(self, transaction: Transaction) -> None:
        """Tell the policies that a connection has ended."""
        for guard, method in self.disconnect:
            await guard.ask(method, "on_disconnect", transaction)


async def _ask(asked: tuple[_Asked, ...], hook_point: str, *arguments: object) -> Reply | None:
    """Call policies in order. The first refusal or ACCEPT ends this; an accepting reply is kept unless one refuses."""
    kept: Reply | None = None
    for guard, method in asked:
        answer = await guard.ask(method, hook_point, *arguments)
        if answer is ACCEPT:
            break
        if isinstance(answer, Reply):
            if answer.code == 421 and not answer.closes:  # RFC 5321 3.8: a server that sends 421 closes
                return Reply(421, answer.status, answer.text, closes=True, cause=answer.cause)
            if not answer.accepts:
                return answer
            kept = answer
    return kept
