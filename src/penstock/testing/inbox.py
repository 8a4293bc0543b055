"""The inbox of a test server: what was received, and waiting for it without sleeping.

The server's thread adds messages and the test's thread reads them. A test that waits is woken by the message itself: by
a condition without an event loop, by a thread-safe call into trio or asyncio otherwise.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from functools import cached_property, partial
from typing import Final, TypeVar, overload

import trio

from penstock.journal import escape
from penstock.message import Envelope, Message, MessageId
from penstock.reply import Reply
from penstock.testing.links import links_of
from penstock.transaction import Peer, TlsInfo, Transaction

T = TypeVar("T")

Predicate = Callable[["ReceivedMessage"], bool]
_now: Final = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
"""Seconds of a clock that a test does not freeze (freezegun)."""
_SHOWN: Final = 10
"""Messages that a failed assertion shows."""


@dataclass(frozen=True)
class ReceivedMessage:
    """A message that the server has accepted, and how it was sent."""

    id: MessageId
    """The id in the server's reply and its Received field."""
    raw: bytes
    """The message as it was received: dots un-stuffed, no header field added."""
    envelope: Envelope
    """The arguments of MAIL and RCPT, with their parameters (SIZE, BODY, SMTPUTF8, NOTIFY, ORCPT, RET, ENVID ...)."""
    peer: Peer
    """Address and port of the client and of the server."""
    hello: str
    """The name in the client's EHLO, HELO or LHLO."""
    protocol: str
    """The protocol as RFC 3848 names it: "ESMTP", "ESMTPSA" (TLS and AUTH), "LMTP", "UTF8SMTPS" ..."""
    tls: TlsInfo | None
    """Version and cipher; None without TLS."""
    identity: str | None
    """The user who had authenticated; None without AUTH."""
    received_at: float
    """Seconds since the epoch."""

    @property
    def sender(self) -> str:
        """The mailbox of MAIL FROM; "" for the null reverse-path of a bounce."""
        return self.envelope.sender.text

    @property
    def recipients(self) -> tuple[str, ...]:
        """The mailboxes of the accepted RCPT TO, in their order."""
        return tuple(recipient.path.text for recipient in self.envelope.recipients)

    @cached_property
    def email(self) -> EmailMessage:
        """The message as Python's email package parses it (policy.default), at first use."""
        return message_from_bytes(self.raw, policy=policy.default)

    @property
    def subject(self) -> str:
        """The Subject field, decoded; "" without one, and unchanged if it cannot be decoded."""
        try:
            return str(self.email["Subject"] or "")
        except Exception:  # noqa: BLE001 - the email package raises many exceptions for malformed fields
            return str(BytesHeaderParser(policy=policy.compat32).parsebytes(self.raw)["Subject"] or "")

    @property
    def text(self) -> str:
        """The plain text of the message, decoded, its line ends LF; "" without one."""
        return self._part("plain")

    @property
    def html(self) -> str:
        """The HTML of the message, decoded, its line ends LF; "" without one."""
        return self._part("html")

    @cached_property
    def links(self) -> tuple[str, ...]:
        """The http and https links in their order, each once: the targets of <a href> first, then those of the text."""
        return links_of(self.html, self.text)

    def _part(self, kind: str) -> str:
        try:
            part = self.email.get_body((kind,))
            text = "" if part is None else str(part.get_content())
        except (LookupError, AttributeError):  # an unknown charset, an impossible structure
            found = (part for part in self.email.walk() if part.get_content_type() == f"text/{kind}")
            payload = next((part.get_payload(decode=True) for part in found), b"")
            text = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else str(payload)
        return text.replace("\r\n", "\n")

    def describe(self) -> str:
        """Return two lines: sender and recipients; subject, size and protocol."""
        recipients = ", ".join(f"<{escape(name)}>" for name in self.recipients[:10])
        more = f" and {len(self.recipients) - 10} more" if len(self.recipients) > 10 else ""
        by = f", as {escape(self.identity)}" if self.identity is not None else ""
        over = f", {self.tls.version}" if self.tls is not None else ""
        return (
            f"<{escape(self.sender)}> -> {recipients}{more}\n"
            f"    Subject: {escape(self.subject)} ({len(self.raw)} octets, {self.protocol}{over}{by})"
        )


def describe_last(messages: Sequence[ReceivedMessage], most: int) -> tuple[list[str], int]:
    """Return descriptions of the last `most` messages, and the number of earlier ones."""
    first = max(0, len(messages) - most)
    return [f"[{n}] {message.describe()}" for n, message in enumerate(messages[first:], first)], first


def received(message: Message, transaction: Transaction) -> ReceivedMessage:
    """Join a message and what is known of its connection."""
    return ReceivedMessage(
        id=message.id,
        raw=b"".join(message.body.chunks()),
        envelope=message.envelope,
        peer=transaction.peer,
        hello=transaction.hello,
        protocol=transaction.protocol,
        tls=transaction.tls,
        identity=transaction.identity,
        received_at=message.received_at,
    )


class _Waiter:
    """A task of trio or asyncio that waits for a change of the inbox."""

    def __init__(self) -> None:
        self._woken: trio.Event | asyncio.Event
        self._call: Callable[[Callable[[], object]], object]
        self._is_in_trio = trio.lowlevel.in_trio_task()
        if self._is_in_trio:
            self._woken, self._call = trio.Event(), trio.lowlevel.current_trio_token().run_sync_soon
        else:
            self._woken, self._call = asyncio.Event(), asyncio.get_running_loop().call_soon_threadsafe

    def wake(self) -> None:
        """Let it check again. Thread-safe."""
        with suppress(RuntimeError):  # its loop is over
            self._call(self._woken.set)

    async def sleep(self) -> None:
        """Wait until `wake` was called."""
        await self._woken.wait()

    async def checkpoint(self) -> None:
        """Let other tasks run; may be cancelled."""
        if self._is_in_trio:
            await trio.lowlevel.checkpoint()
        else:
            await asyncio.sleep(0)


class Inbox(Sequence[ReceivedMessage]):
    """The messages of a server in the order of their arrival: a sequence, with waiting and assertions. Thread-safe.

    It holds at most `max_messages` with together at most `max_octets`; the server refuses further ones with 452 4.3.1,
    rather than forgetting a message that a test may look for.
    """

    def __init__(self, *, max_messages: int, max_octets: int, context: Callable[[], str] = str) -> None:
        """`context` returns what the error of a failed wait or assertion shows besides the messages."""
        if max_messages < 1 or max_octets < 1:
            raise ValueError("an inbox has room for at least one message and one octet")
        self._max_messages = max_messages
        self._max_octets = max_octets
        self._context = context
        self._changed = threading.Condition()
        self._messages: list[ReceivedMessage] = []
        self._changes = 0
        """How often the inbox has changed."""
        self._octets = 0
        self._waiters: set[_Waiter] = set()
        self._failure: BaseException | None = None

    # ---- the server's side

    def put(self, message: ReceivedMessage) -> Reply:
        """Add a message and wake the tests that wait. Return the reply for the client."""
        with self._changed:
            if len(self._messages) >= self._max_messages:
                return Reply(452, "4.3.1", f"The inbox of this test is full: max_messages={self._max_messages}")
            if self._octets + len(message.raw) > self._max_octets:
                return Reply(452, "4.3.1", f"The inbox of this test is full: max_octets={self._max_octets}")
            self._messages.append(message)
            self._octets += len(message.raw)
            self._wake()
        return Reply(250, "2.0.0", f"Ok: received as {message.id}")

    def fail(self, failure: BaseException) -> None:
        """Raise this in all waits, now and later: no more messages will arrive."""
        with self._changed:
            self._failure = failure
            self._wake()

    def _wake(self) -> None:
        self._changes += 1
        self._changed.notify_all()
        for waiter in self._waiters:
            waiter.wake()

    # ---- a sequence

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> ReceivedMessage: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReceivedMessage]: ...
    def __getitem__(self, index: int | slice) -> ReceivedMessage | list[ReceivedMessage]:
        with self._changed:
            return self._messages[index]

    @property
    def last(self) -> ReceivedMessage:
        """The latest message. Raise IndexError if the inbox is empty."""
        with self._changed:
            if not self._messages:
                raise IndexError("the inbox is empty")
            return self._messages[-1]

    @property
    def octets(self) -> int:
        """Octets of all messages."""
        return self._octets

    def clear(self) -> None:
        """Forget all messages."""
        with self._changed:
            self._messages.clear()
            self._octets = 0

    def __repr__(self) -> str:
        return f"<Inbox of {len(self)} message{'s' if len(self) != 1 else ''}>"

    # ---- assertions. pytest shows their callers: the lines of the test.

    def latest(self, *, to: str | None = None, subject: str | None = None) -> ReceivedMessage:
        """Return the latest message, of those to a recipient, or with a part of the subject, if given.

        Raise AssertionError, which shows what has arrived, if no message matches.
        """
        __tracebackhide__ = True
        found, what = self._sent(to, subject)
        if not found:
            raise AssertionError(self._shown(f"there is no {what}"))
        return found[-1]

    def assert_sent(
        self, *, to: str | None = None, subject: str | None = None, count: int | None = None
    ) -> list[ReceivedMessage]:
        """Check that messages were sent, and return them: to this recipient, with this part of the subject.

        `count` is their exact number; without it, at least one. 0 asserts that nothing matches. Does not wait: see
        `wait_for`. Raise AssertionError, which shows what has arrived.
        """
        __tracebackhide__ = True
        found, what = self._sent(to, subject)
        if (count is None and not found) or (count is not None and len(found) != count):
            expected = "at least 1" if count is None else str(count)
            what = what if count in (None, 1) else what.replace("message", "messages", 1)
            raise AssertionError(self._shown(f"expected {expected} {what}, found {len(found)}"))
        return found

    def _sent(self, to: str | None, subject: str | None) -> tuple[list[ReceivedMessage], str]:
        """Return the messages that match, and their description."""
        messages = self[:]
        if to is None and subject is None:
            return messages, "message"
        wanted, what = _matcher(None, None, to, subject)
        return [message for message in messages if wanted(message)], what.removeprefix("a ")

    # ---- waiting

    def wait(self, count: int = 1, timeout: float = 5.0) -> list[ReceivedMessage]:
        """Wait until there are at least `count` messages, and return all of them.

        `timeout` is in seconds. Raise TimeoutError, which shows what has arrived instead, or RuntimeError if the server
        has failed. Blocks the thread: in an async test, use `wait_async`.
        """
        __tracebackhide__ = True
        return self._wait(partial(_at_least, count), timeout, _plural(count))

    def wait_for(
        self,
        predicate: Predicate | None = None,
        *,
        sender: str | None = None,
        recipient: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,
    ) -> ReceivedMessage:
        """Wait for a matching message, and return the first one.

        A message matches if the predicate returns true, `sender` is its sender, `recipient` is one of its recipients,
        and `subject` is part of its subject: all that are given. Earlier messages count. Raise as `wait` does.
        """
        __tracebackhide__ = True
        wanted, what = _matcher(predicate, sender, recipient, subject)
        return self._wait(partial(_first, wanted), timeout, what)

    async def wait_async(self, count: int = 1, timeout: float = 5.0) -> list[ReceivedMessage]:  # noqa: ASYNC109 - the error names it
        """Like `wait`, in a test that runs in trio or asyncio."""
        __tracebackhide__ = True
        return await self._wait_async(partial(_at_least, count), timeout, _plural(count))

    async def wait_for_async(
        self,
        predicate: Predicate | None = None,
        *,
        sender: str | None = None,
        recipient: str | None = None,
        subject: str | None = None,
        timeout: float = 5.0,  # noqa: ASYNC109 - the error names it
    ) -> ReceivedMessage:
        """Like `wait_for`, in a test that runs in trio or asyncio."""
        __tracebackhide__ = True
        wanted, what = _matcher(predicate, sender, recipient, subject)
        return await self._wait_async(partial(_first, wanted), timeout, what)

    def _look(self, look: Callable[[list[ReceivedMessage]], T | None]) -> tuple[T | None, int]:
        """Return what was found, and how often the inbox has changed.

        The predicate is called without the lock, which the server needs to continue. Raise RuntimeError if no more
        messages will arrive.
        """
        with self._changed:
            messages, changes, failure = list(self._messages), self._changes, self._failure
        found = look(messages)
        if found is None and failure is not None:
            raise RuntimeError("the server has died, no more messages will arrive") from failure
        return found, changes

    def _wait(self, look: Callable[[list[ReceivedMessage]], T | None], timeout: float, what: str) -> T:
        __tracebackhide__ = True
        deadline = _deadline(timeout)
        while True:
            found, changes = self._look(look)
            if found is not None:
                return found
            with self._changed:
                while self._changes == changes and (left := deadline - _now()) > 0:
                    self._changed.wait(left)
                if self._changes == changes:
                    break
        raise TimeoutError(self._in_vain(timeout, what))

    async def _wait_async(self, look: Callable[[list[ReceivedMessage]], T | None], timeout: float, what: str) -> T:  # noqa: ASYNC109
        """Wait in a task. A thread keeps the time: the clock of a loop may be frozen, or run ahead, in a test."""
        __tracebackhide__ = True
        deadline = _deadline(timeout)
        while True:
            waiter = _Waiter()
            timer = threading.Timer(max(deadline - _now(), 0), waiter.wake)
            with self._changed:
                self._waiters.add(waiter)
            try:
                found, _ = self._look(look)
                if found is not None:
                    await waiter.checkpoint()
                    return found
                if _now() >= deadline:
                    raise TimeoutError(self._in_vain(timeout, what))
                timer.start()
                await waiter.sleep()
            finally:
                timer.cancel()
                with self._changed:
                    self._waiters.discard(waiter)

    def _in_vain(self, timeout: float, what: str) -> str:
        """Return the text of a failed wait."""
        return self._shown(f"waited {timeout:g} s for {what}")

    def _shown(self, failure: str) -> str:
        """Return a failure, followed by the messages that there are."""
        shown, first = describe_last(self[:], _SHOWN)
        which = f", the last {_SHOWN} of them" if first else ""
        parts = [f"{failure}; {_plural(first + len(shown))} in the inbox{which}", *shown, self._context()]
        return "\n".join(part for part in parts if part)


def _at_least(count: int, messages: list[ReceivedMessage]) -> list[ReceivedMessage] | None:
    return messages if len(messages) >= count else None


def _first(wanted: Predicate, messages: list[ReceivedMessage]) -> ReceivedMessage | None:
    return next((message for message in messages if wanted(message)), None)


def _deadline(timeout: float) -> float:
    if not 0 <= timeout < math.inf:
        raise ValueError(f"a timeout is a number of seconds, not {timeout!r}")
    return _now() + timeout


def _plural(count: int) -> str:
    return f"{count} message{'s' if count != 1 else ''}"


def _matcher(
    predicate: Predicate | None, sender: str | None, recipient: str | None, subject: str | None
) -> tuple[Predicate, str]:
    """Return a predicate for all that is given, and its description."""
    given = {"sender": sender, "recipient": recipient, "subject": subject}
    parts = [f"{name} {text!r}" for name, text in given.items() if text is not None]
    if predicate is not None:
        parts.append(f"{getattr(predicate, '__name__', 'a predicate')}")
    if not parts:
        raise ValueError("say what to wait for: a predicate, sender, recipient or subject")

    def is_wanted(message: ReceivedMessage) -> bool:
        return (
            (sender is None or message.sender == sender)
            and (recipient is None or recipient in message.recipients)
            and (subject is None or subject in message.subject)
            and (predicate is None or predicate(message))
        )

    return is_wanted, f"a message with {' and '.join(parts)}"
