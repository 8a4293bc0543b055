"""Calls the policies of a listener at each hook point, in their order.

A hook point without a policy is an empty tuple and costs one `if` of the caller. A policy that raises, takes too long
or returns something else than a verdict has failed: the client gets 451, and the cause is journaled. A policy that
fails repeatedly is not called for a while; the reply is the same 451 meanwhile, because mail must not bypass a check.

The built-in checks (judge.py) are asked first. At the end of a message, the scores of all are added up, and the header
fields that the message gets are put into its prefix, below our Authentication-Results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import trio

from penstock import reply as replies
from penstock.breaker import Breaker
from penstock.journal import Journal
from penstock.message import MailParameters, Message, Path, Recipient
from penstock.policy.asking import WAIT, Answer, Asked, Later, ask_in_order
from penstock.policy.base import ACCEPT, Mark, Verdict
from penstock.policy.edits import end_of_results
from penstock.policy.evidence import evidence_of
from penstock.policy.hooks import HookSettings
from penstock.policy.judge import Judge
from penstock.policy.scores import BEFORE_MAIL, DEFAULT_THRESHOLDS, Thresholds, apply_mark, settle
from penstock.reply import Reply
from penstock.transaction import Transaction

_FAILED: Final = replies.CHECK_FAILED


class _Guard:
    """One policy with its deadline, its concurrency limit and its circuit breaker."""

    def __init__(
        self, policy: object, settings: HookSettings, journal: Journal, *, has_monitored_scores: bool = False
    ) -> None:
        """`has_monitored_scores`: what it adds to the score is noted, and decides nothing."""
        self.policy = policy
        self.name = settings.hook.rpartition(":")[2]
        """What scores are noted under."""
        self._settings = settings
        self._has_monitored_scores = has_monitored_scores
        self._journal = journal
        self._limiter = trio.CapacityLimiter(settings.concurrency)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_pause, settings.breaker_pause)

    async def ask(
        self, method: Callable[..., Any], hook_point: str, transaction: Transaction, *arguments: object
    ) -> Answer:
        """Return the policy's verdict, or CHECK_FAILED. A mark is applied: one before MAIL to all messages."""
        answer: Verdict = await self.call(method, hook_point, transaction, *arguments)
        if isinstance(answer, Mark):
            return None if self._apply(hook_point, transaction, answer) else _FAILED
        return answer

    async def call(self, method: Callable[..., Any], hook_point: str, *arguments: object) -> Any:
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
            elif answer is not None and answer is not ACCEPT and not isinstance(answer, Mark):
                cause = f"an answer is None, ACCEPT, a Mark or a Reply, not {answer!r}"
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
        """Note that it has failed."""
        self._journal.hook_failed(self._settings.hook, hook_point, cause)
        self._breaker.failed(trio.current_time())

    def _apply(self, hook_point: str, transaction: Transaction, mark: Mark) -> bool:
        """Apply a mark. Return False when it is not a valid one: the policy has failed."""
        marks = [(mark, False)]
        if self._has_monitored_scores:  # its field is harmless, its score must not decide
            marks = [(Mark(header=mark.header), False), (Mark(score=mark.score), True)]
        for each, is_monitored in marks:
            if hook_point in BEFORE_MAIL:
                evidence_of(transaction).keep_mark(self.name, each, is_monitored=is_monitored)
                continue
            try:
                apply_mark(transaction, self.name, each, is_monitored=is_monitored)
            except (TypeError, ValueError) as exc:
                self._fail(hook_point, _cause_of(exc))
                return False
        return True


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


def _asks_about_peer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `on_connect` of a policy, called with a transaction."""
    return lambda transaction: method(transaction.peer, transaction.listener)


class Pipeline:
    """The policies of a listener. Attributes named like hook points have the policies with that hook, and the judge."""

    def __init__(
        self,
        policies: Sequence[tuple[object, HookSettings]],
        journal: Journal,
        judge: Judge | None = None,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        remover: Judge | None = None,
    ) -> None:
        """`judge` has the built-in checks. Without one, `remover` leaves forged Authentication-Results out."""
        monitors = thresholds.monitors_hooks
        guards = [_Guard(policy, settings, journal, has_monitored_scores=monitors) for policy, settings in policies]
        self.judge = judge
        self.unjudged = self if judge is None else Pipeline(policies, journal, None, thresholds, judge)
        """The same policies without the built-in checks."""
        self._remover = remover if remover is not None and remover.removes_forged else None
        self._thresholds = thresholds

        def watching(hook_point: str) -> tuple[tuple[_Guard, Callable[..., Any]], ...]:
            return tuple(
                (guard, getattr(guard.policy, hook_point)) for guard in guards if hasattr(guard.policy, hook_point)
            )

        none: tuple[Asked, ...] = ()
        connect = tuple((guard, _asks_about_peer(method)) for guard, method in watching("on_connect"))
        self.connect: tuple[Asked, ...] = (none if judge is None else judge.connect) + connect
        self.helo: tuple[Asked, ...] = (none if judge is None else judge.helo) + watching("on_helo")
        self.auth: tuple[Asked, ...] = watching("on_auth")
        self.mail: tuple[Asked, ...] = (none if judge is None else judge.mail) + watching("on_mail")
        self.rcpt: tuple[Asked, ...] = (none if judge is None else judge.rcpt) + watching("on_rcpt")
        self._message: tuple[Asked, ...] = watching("on_message")
        self.reset = watching("on_reset")
        self.disconnect = watching("on_disconnect")
        own: tuple[object, ...] = tuple(each for each in (judge, self._remover) if each is not None)
        self.message: tuple[object, ...] = own + self._message

    async def on_connect(self, transaction: Transaction) -> Reply | None:
        """Judge a client by its address. None is a yes."""
        return await ask_in_order(self.connect, "on_connect", transaction)

    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        """Judge the name a client gives itself."""
        return await ask_in_order(self.helo, "on_helo", transaction, name)

    async def on_auth(self, transaction: Transaction, identity: str, mechanism: str) -> Reply | None:
        """Judge an identity that has proved itself."""
        return await ask_in_order(self.auth, "on_auth", transaction, identity, mechanism)

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Reply | None:
        """Judge a reverse-path."""
        verdict = await ask_in_order(self.mail, "on_mail", transaction, sender, parameters)
        return self._note_refusal(verdict, "on_mail", transaction)

    def mail_now(
        self, transaction: Transaction, sender: Path, parameters: MailParameters
    ) -> Reply | Literal[Later.WAIT] | None:
        """Judge a reverse-path as `on_mail` does, without a task; return WAIT if it has to be asked instead."""
        if self.judge is None or len(self.mail) != len(self.judge.mail):
            return WAIT  # hooks have a deadline
        verdict = self.judge.mail_now(transaction, sender, parameters)
        return WAIT if verdict is WAIT else self._note_refusal(verdict, "on_mail", transaction)

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        """Judge a forward-path."""
        verdict = await ask_in_order(self.rcpt, "on_rcpt", transaction, recipient)
        return self._note_refusal(verdict, "on_rcpt", transaction)

    async def on_message(self, transaction: Transaction, message: Message) -> tuple[Reply | None, Message]:
        """Judge a whole message. Return the verdict and the message, with all header fields that it gets."""
        verdict: Reply | None = None
        judge = self.judge
        if judge is not None:
            verdict, message = await judge.on_message(transaction, message)
        elif self._remover is not None:
            verdict, message = await self._remover.remove_forged(message)
        if self._message and (verdict is None or verdict.accepts):
            asked = message
            if transaction.added_fields:
                asked = message._replace(prefix=_with_fields(message.prefix, transaction.added_fields))
            verdict = await ask_in_order(self._message, "on_message", transaction, asked) or verdict
        if verdict is None or verdict.accepts:
            verdict = settle(transaction, self._thresholds) or verdict
        if judge is not None:
            judge.conclude(transaction, message, verdict)
        if transaction.added_fields and (verdict is None or verdict.accepts):
            message = message._replace(prefix=_with_fields(message.prefix, transaction.added_fields))
        return self._note_refusal(verdict, "on_message", transaction), message

    def _note_refusal(self, verdict: Reply | None, hook_point: str, transaction: Transaction) -> Reply | None:
        """Report a refusal to the checks that count. Return the verdict."""
        if self.judge is not None and verdict is not None and not verdict.accepts:
            self.judge.refused(transaction, hook_point)
        return verdict

    def close(self, transaction: Transaction) -> None:
        """Let go of what is kept about a connection."""
        evidence = evidence_of(transaction)
        if self.judge is not None:
            self.judge.close(transaction, evidence)

    async def on_reset(self, transaction: Transaction) -> None:
        """Notify the policies that a client has aborted its transaction."""
        for guard, method in self.reset:
            await guard.call(method, "on_reset", transaction)

    async def on_disconnect(self, transaction: Transaction) -> None:
        """Tell the policies that a connection has ended."""
        for guard, method in self.disconnect:
            await guard.call(method, "on_disconnect", transaction)


def _with_fields(prefix: bytes, fields: bytes) -> bytes:
    """Return the fields that a message gets with some more: at the top, but below our Authentication-Results."""
    at = end_of_results(prefix)
    return prefix[:at] + fields + prefix[at:]
