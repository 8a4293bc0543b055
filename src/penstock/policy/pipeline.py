"""Calls the policies of a listener at each hook point, in their order.

A hook point without a policy is an empty tuple and costs one `if` of the caller. A policy that raises, takes too long
or returns something else than a verdict has failed: the client gets 451, and the cause is journaled. A policy that
fails repeatedly is not called for a while; the reply is the same 451 meanwhile, because mail must not bypass a check.

The built-in checks (judge.py) are asked first. At the end of a message, the scores of all are added up.
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
from penstock.policy.base import ACCEPT, Mark
from penstock.policy.evidence import evidence_of
from penstock.policy.hooks import HookSettings
from penstock.policy.judge import Judge
from penstock.policy.scores import BEFORE_MAIL, DEFAULT_THRESHOLDS, Thresholds, apply_mark, settle
from penstock.reply import Reply
from penstock.transaction import Transaction

_FAILED: Final = replies.CHECK_FAILED


class _Guard:
    """One policy with its deadline, its concurrency limit and its circuit breaker."""

    def __init__(self, policy: object, settings: HookSettings, journal: Journal) -> None:
        self.policy = policy
        self.name = settings.hook.rpartition(":")[2]
        """What scores are noted under."""
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
            self.fail(hook_point, cause)
            return _FAILED
        self._breaker.succeeded()
        return answer

    def fail(self, hook_point: str, cause: str) -> None:
        """Note that it has failed."""
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
    """The policies of a listener. Attributes named like hook points hold what has the hook, the judge included."""

    def __init__(
        self,
        policies: Sequence[tuple[object, HookSettings]],
        journal: Journal,
        judge: Judge | None = None,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        remover: Judge | None = None,
    ) -> None:
        """`judge` has the built-in checks. Without one, `remover` leaves forged Authentication-Results out."""
        guards = [_Guard(policy, settings, journal) for policy, settings in policies]
        self.judge = judge
        self.unjudged = self if judge is None else Pipeline(policies, journal, None, thresholds, judge)
        """The same policies without the built-in checks."""
        self._remover = remover if remover is not None and remover.removes_forged else None
        self._thresholds = thresholds

        def watching(hook_point: str) -> tuple[_Asked, ...]:
            return tuple(
                (guard, getattr(guard.policy, hook_point)) for guard in guards if hasattr(guard.policy, hook_point)
            )

        self._connect = watching("on_connect")
        self._helo = watching("on_helo")
        self.auth = watching("on_auth")
        self._mail = watching("on_mail")
        self._rcpt = watching("on_rcpt")
        self._message = watching("on_message")
        self.reset = watching("on_reset")
        self.disconnect = watching("on_disconnect")
        self.connect: tuple[object, ...] = self._connect if judge is None else judge.connect + self._connect
        self.helo: tuple[object, ...] = self._helo if judge is None else judge.helo + self._helo
        self.mail: tuple[object, ...] = self._mail if judge is None else judge.mail + self._mail
        self.rcpt: tuple[object, ...] = self._rcpt if judge is None else judge.rcpt + self._rcpt
        own: tuple[object, ...] = tuple(each for each in (judge, self._remover) if each is not None)
        self.message: tuple[object, ...] = own + self._message

    async def on_connect(self, transaction: Transaction) -> Reply | None:
        """Judge a client by its address. None is a yes."""
        verdict = None if self.judge is None else await self.judge.on_connect(transaction)
        if self._connect and (verdict is None or verdict.accepts):
            verdict = (
                await self._ask(self._connect, "on_connect", transaction, transaction.peer, transaction.listener)
                or verdict
            )
        return verdict

    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        """Judge the name a client gives itself."""
        verdict = None if self.judge is None else await self.judge.on_helo(transaction, name)
        if self._helo and (verdict is None or verdict.accepts):
            verdict = await self._ask(self._helo, "on_helo", transaction, transaction, name) or verdict
        return verdict

    async def on_auth(self, transaction: Transaction, identity: str, mechanism: str) -> Reply | None:
        """Judge an identity that has proved itself."""
        return await self._ask(self.auth, "on_auth", transaction, transaction, identity, mechanism)

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Reply | None:
        """Judge a reverse-path."""
        judge = self.judge
        verdict = None if judge is None else await judge.on_mail(transaction, sender, parameters)
        if self._mail and (verdict is None or verdict.accepts):
            verdict = await self._ask(self._mail, "on_mail", transaction, transaction, sender, parameters) or verdict
        return self._note_refusal(verdict, "on_mail", transaction)

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        """Judge a forward-path."""
        verdict = None if self.judge is None else await self.judge.on_rcpt(transaction, recipient)
        if self._rcpt and (verdict is None or verdict.accepts):
            verdict = await self._ask(self._rcpt, "on_rcpt", transaction, transaction, recipient) or verdict
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
                asked = message._replace(prefix=transaction.added_fields + message.prefix)
            verdict = await self._ask(self._message, "on_message", transaction, transaction, asked) or verdict
        if verdict is None or verdict.accepts:
            verdict = settle(transaction, self._thresholds) or verdict
        if judge is not None:
            judge.conclude(transaction, message, verdict)
        if verdict is None or verdict.accepts:
            top = b"" if judge is None else judge.take_header_field(transaction)
            fields = top + transaction.added_fields
            if fields:
                message = message._replace(prefix=fields + message.prefix.removeprefix(top))
        return self._note_refusal(verdict, "on_message", transaction), message

    def _note_refusal(self, verdict: Reply | None, hook_point: str, transaction: Transaction) -> Reply | None:
        """Tell the checks that count what was refused. Return the verdict."""
        if self.judge is not None and verdict is not None and not verdict.accepts:
            self.judge.refused(transaction, hook_point)
        return verdict

    def close(self, transaction: Transaction) -> None:
        """Let go of what is kept about a connection."""
        evidence = evidence_of(transaction)
        if self.judge is not None:
            self.judge.close(transaction, evidence)

    async def on_reset(self, transaction: Transaction) -> None:
        """Tell the policies that a client gives up its transaction."""
        for guard, method in self.reset:
            await guard.ask(method, "on_reset", transaction)

    async def on_disconnect(self, transaction: Transaction) -> None:
        """Tell the policies that a connection has ended."""
        for guard, method in self.disconnect:
            await guard.ask(method, "on_disconnect", transaction)

    async def _ask(
        self, asked: tuple[_Asked, ...], hook_point: str, transaction: Transaction, *arguments: object
    ) -> Reply | None:
        """Call policies in order. The first refusal or ACCEPT ends this; an accepting reply is kept unless one refuses.

        Marks are applied, those before MAIL to all messages of the connection.
        """
        kept: Reply | None = None
        for guard, method in asked:
            answer = await guard.ask(method, hook_point, *arguments)
            if answer is ACCEPT:
                break
            if isinstance(answer, Mark):
                if not self._apply(guard, hook_point, transaction, answer):
                    return _FAILED
            elif isinstance(answer, Reply):
                if answer.code == 421 and not answer.closes:  # RFC 5321 3.8: a server that sends 421 closes
                    return Reply(421, answer.status, answer.text, closes=True, cause=answer.cause)
                if not answer.accepts:
                    return answer
                kept = answer
        return kept

    def _apply(self, guard: _Guard, hook_point: str, transaction: Transaction, mark: Mark) -> bool:
        """Apply the mark of a policy. Return False when it is not a valid one: the policy has failed."""
        marks = [(mark, False)]
        if self._thresholds.monitors_hooks:  # its field is harmless, its score must not decide
            marks = [(Mark(header=mark.header), False), (Mark(score=mark.score), True)]
        for each, is_monitored in marks:
            if hook_point in BEFORE_MAIL:
                evidence_of(transaction).keep_mark(guard.name, each, is_monitored=is_monitored)
                continue
            try:
                apply_mark(transaction, guard.name, each, is_monitored=is_monitored)
            except (TypeError, ValueError) as exc:
                guard.fail(hook_point, _cause_of(exc))
                return False
        return True
