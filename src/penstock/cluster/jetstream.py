"""The API of JetStream: what is asked of streams, and the answers as values or exceptions."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import msgspec
import trio

from penstock.net.nats import DisconnectedError, Message, NatsClient, NatsError, NoRespondersError, Request

_API: Final = "$JS.API"
_TIMEOUT: Final = 5.0
"""Seconds for a request to the API."""
_NOT_FOUND: Final = 404
_UNAVAILABLE: Final = 503
_TRIES: Final = 40
_PAUSE: Final = 0.05
"""How often, and after how many seconds, a consumer is asked again that does not run yet."""
PAGE: Final = 100_000
"""Subjects that a server lists at a time (JSMaxSubjectDetails)."""
_BATCH: Final = 1000
"""Messages that a scan asks for at a time."""
_WAITING: Final = 20_000
"""Messages of a scan that wait to be handled."""
_IDLE: Final = 30 * 10**9
"""Nanoseconds after which the server removes the consumer of a scan that was abandoned."""
_encode = msgspec.json.encode


class _ApiError(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct, frozen=True):
    """The answer to a publish."""

    seq: int = 0
    duplicate: bool = False
    error: _ApiError | None = None


_decode_ack = msgspec.json.Decoder(PubAck).decode


class ApiError(NatsError):
    """JetStream refuses a request."""

    def __init__(self, error: _ApiError, subject: str) -> None:
        super().__init__(f"{subject}: {error.description}")
        self.code = error.code
        self.number = error.err_code
        """The number of the error, as https://github.com/nats-io/nats-server/blob/main/server/errors.json lists it."""

    @property
    def is_not_found(self) -> bool:
        """There is no such stream, consumer or message."""
        return self.code == _NOT_FOUND


class Stored(NamedTuple):
    """A message of a stream."""

    subject: str
    sequence: int
    headers: bytes
    data: bytes
    stored_at: float = 0.0
    """Seconds since the epoch, for a message of a scan."""


class JetStream:
    """Requests to JetStream. All raise NatsError when there is no answer, ApiError for a refusal."""

    def __init__(self, client: NatsClient) -> None:
        self.client = client

    async def api(self, name: str, body: object = None, *, timeout: float = _TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109 - as in NatsClient.request
        """Ask the API for something."""
        data = b"" if body is None else _encode(body)
        answer = await self.client.request(f"{_API}.{name}", data, timeout=timeout)
        return _result(answer, name)

    async def publish(self, subject: str, data: bytes, headers: bytes, *, timeout: float = _TIMEOUT) -> int:  # noqa: ASYNC109
        """Publish a message and return its sequence once it is stored."""
        return acknowledged(await self.client.request(subject, data, headers, timeout=timeout), subject)

    async def delete(self, stream: str, sequence: int) -> None:
        """Delete a message. One that is gone is no error."""
        try:
            await self.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True})
        except ApiError as exc:
            if not is_gone(exc):
                raise

    async def purge(self, stream: str, subject: str) -> int:
        """Delete all messages of a subject, which may have wildcards. Return how many there were."""
        answer = await self.api(f"STREAM.PURGE.{stream}", {"filter": subject})
        return int(answer.get("purged", 0))

    async def last(self, stream: str, subject: str, *, timeout: float = _TIMEOUT) -> Stored | None:  # noqa: ASYNC109
        """Return the last message of a subject, as the leader knows it; None if the subject has no message."""
        try:
            answer = await self.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, timeout=timeout)
        except ApiError as exc:
            if exc.is_not_found:
                return None
            raise
        try:
            found = answer["message"]
            headers, data = (base64.b64decode(found.get(key, "")) for key in ("hdrs", "data"))
            return Stored(found["subject"], found["seq"], headers, data)
        except (KeyError, AttributeError, TypeError, ValueError) as exc:
            raise NatsError(f"{subject}: unexpected answer: {exc!r}") from exc

    async def direct(self, stream: str, sequences: Sequence[int]) -> list[Message | NatsError | None]:
        """Return messages from whichever servers have them, None for one that is not there (yet)."""
        subject = f"{_API}.DIRECT.GET.{stream}"
        requests = [Request(subject, b'{"seq":%d}' % sequence) for sequence in sequences]
        answers = await self.client.request_many(requests, timeout=_TIMEOUT)
        return [None if isinstance(each, Message) and each.status else each for each in answers]

    async def last_of_all(self, stream: str, subject: str) -> dict[str, Stored]:
        """Return the last message of each subject that matches, as a server knows it."""
        found: dict[str, Stored] = {}
        for name in await self.subjects(stream, subject):
            last = await self.last(stream, name)
            if last is not None:
                found[name] = last
        return found

    async def subjects(self, stream: str, subject: str) -> list[str]:
        """Return the subjects that match and have messages, as the leader knows them.

        What is deleted or published between two pages of `PAGE` subjects may hide others.
        """
        names: list[str] = []
        while True:
            body = {"subjects_filter": subject, "offset": len(names)}
            answer = await self.api(f"STREAM.INFO.{stream}", body, timeout=30)
            try:
                page = list(answer["state"].get("subjects") or ())
                total = int(answer.get("total", 0))
            except (KeyError, AttributeError, TypeError, ValueError) as exc:
                raise NatsError(f"{stream}: unexpected answer: {exc!r}") from exc
            names += page
            if not page or len(names) >= total:
                return names

    async def scan(self, stream: str, subjects: Sequence[str], *, start: int = 1) -> AsyncGenerator[list[Stored], None]:
        """Yield the messages of some subjects from a sequence on, without their payloads, some at a time, for ever.

        Close the iterator. Raise NatsError when the connection or the consumer is lost: then scan again from there.
        """
        client = self.client
        name = f"scan-{os.urandom(8).hex()}"
        configuration = {
            "name": name,
            "filter_subjects": list(subjects),
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, start),
            "ack_policy": "none",
            "headers_only": True,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _IDLE,
            "max_waiting": 8,
        }
        await self.api(f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": configuration})
        inbox = f"_INBOX.{name}"
        connections = client.connections
        async with client.subscribed(inbox, limit=_WAITING) as subscription, self._deleting(stream, name):
            request = _encode({"batch": _BATCH, "expires": 2 * 10**9})
            following = f"{_API}.CONSUMER.MSG.NEXT.{stream}.{name}"
            tries = 0
            left = _BATCH
            """Messages that the request under way may still return."""
            client.publish(following, request, reply=inbox)
            while True:
                batch: list[Stored] = []
                is_over = False
                while not is_over and len(batch) < _BATCH:
                    messages: Sequence[Message] = ()
                    with trio.move_on_after(_TIMEOUT):
                        messages = await subscription.receive_all()
                    if not messages or client.connections != connections or subscription.dropped:
                        raise DisconnectedError("the scan was interrupted")
                    for message in messages:
                        if message.reply:
                            left -= 1
                            batch.append(_scanned(message))
                            is_over = message.reply.endswith(".0")  # nothing is pending: what there is, is here
                            continue
                        is_over = True
                        left = 0
                        if message.status == _UNAVAILABLE and tries < _TRIES:  # the server has it not running yet
                            tries += 1
                            await trio.sleep(_PAUSE)
                        elif message.status not in (_NOT_FOUND, 408):
                            raise NatsError(f"the scan was ended: {message.headers!r}")
                if batch:
                    tries = 0
                if left <= 0:  # otherwise the request is still under way, and the server takes only some of them
                    left = _BATCH
                    client.publish(following, request, reply=inbox)  # the server works while this batch is handled
                yield batch

    @asynccontextmanager
    async def _deleting(self, stream: str, consumer: str) -> AsyncIterator[None]:
        """Delete a consumer at the end of an `async with`, without waiting for it."""
        try:
            yield
        finally:
            with suppress(NatsError):  # the server deletes it when it is idle
                self.client.publish(f"{_API}.CONSUMER.DELETE.{stream}.{consumer}", reply="_INBOX.none")


def _scanned(message: Message) -> Stored:
    """Return a message of a consumer. Its reply subject is $JS.ACK.stream.consumer.delivered.seq.cseq.time.pending."""
    subject, reply, headers, _ = message
    _, sequence, _, stored_at, _ = reply.rsplit(".", 4)
    return tuple.__new__(Stored, (subject, int(sequence), headers, b"", int(stored_at) / 1e9))  # see NatsClient


def is_gone(exc: ApiError) -> bool:
    """Return whether a deletion failed because there is nothing to delete."""
    return exc.is_not_found or "not found" in str(exc)


def acknowledged(answer: Message | NatsError, subject: str) -> int:
    """Return the sequence in the answer to a publish, 0 for another request. Raise NatsError if that has failed."""
    if isinstance(answer, NatsError):
        raise answer
    return read_ack(answer, subject).seq


def read_ack(answer: Message, subject: str) -> PubAck:
    """Return the answer to a publish. Raise ApiError if it is a refusal."""
    try:
        ack = _decode_ack(answer.data)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise NatsError(f"{subject}: unexpected answer {answer.data[:100]!r}") from exc
    if ack.error is not None:
        raise ApiError(ack.error, subject)
    return ack


def refusal(answer: Message | NatsError, subject: str) -> NatsError | None:
    """Return why a request of `request_many` to the API or to a stream failed; None if it did not."""
    if isinstance(answer, NatsError):
        return answer
    try:
        _result(answer, subject)
    except NatsError as exc:
        return exc
    return None


def _result(answer: Message, name: str) -> dict[str, Any]:
    if answer.status:
        raise NoRespondersError(f"{name}: status {answer.status}")
    try:
        found: dict[str, Any] = msgspec.json.decode(answer.data)
        error = msgspec.convert(found["error"], _ApiError) if found.get("error") else None
    except (msgspec.MsgspecError, RecursionError, AttributeError) as exc:
        raise NatsError(f"{name}: unexpected answer {answer.data[:100]!r}") from exc
    if error is not None:
        raise ApiError(error, name)
    return found
