"""Rspamd over HTTP: the message is sent to /checkv2 of a worker of type "normal", with what is known of its client.

Its score is added to that of the other checks (`scores`), or its action decides (`verdict`). It changes nothing in the
message; for that, ask it as a milter.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
import trio

from penstock.message import Message
from penstock.policy.base import Mark
from penstock.policy.check import Check, Finding, Mode, Parts
from penstock.policy.filters import FilterConnection, FilterError, FilterPool, next_chunk
from penstock.policy.settings import PolicySettings, RspamdSettings
from penstock.policy.units import parse_url
from penstock.reply import CHECK_FAILED, Reply
from penstock.transaction import Transaction

_GRACE: Final = 5.0
_MOST_HEADER: Final = 65_536
_MOST_BODY: Final = 8 << 20
"""Octets of an answer."""
_UNSAFE: Final = re.compile(r"[^\x20-\x7e]")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
_CLOSES: Final = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
_FLOAT = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class Answer(msgspec.Struct):
    """The result of rspamd: the parts of its JSON that are used."""

    action: str
    score: _FLOAT = 0.0
    messages: dict[str, object] = {}


_decode: Final = msgspec.json.Decoder(Answer).decode


def finding_of(answer: Answer, *, scores: bool, verdict: bool) -> Finding:
    """Return what follows from an answer."""
    text = answer.messages.get("smtp_message")
    text = text if isinstance(text, str) and text else ""
    if verdict:
        if answer.action == "reject":
            return Reply(550, "5.7.1", text or "Message rejected as spam")
        if answer.action in ("soft reject", "greylist"):
            return Reply(451, "4.7.1", text or "Try again later")
    is_spam = verdict and answer.action in ("add header", "rewrite subject", "quarantine")
    score = answer.score if scores else 0.0
    return Mark(score=score, quarantine=is_spam) if score or is_spam else None


def request_head(host: str, path: str, hostname: str, transaction: Transaction, message: Message) -> bytes:
    """Return the head of a request; the message follows."""
    envelope, tls = message.envelope, transaction.tls
    fields = [
        ("Host", host),
        ("Content-Length", str(message.size)),
        ("From", envelope.sender.text),
        ("Helo", transaction.hello),
        ("Queue-Id", message.id),
        ("MTA-Name", hostname),
    ]
    if transaction.peer.address:
        fields.append(("IP", transaction.peer.address))
    if transaction.has_results and transaction.results.iprev is not None and transaction.results.iprev.name:
        fields.append(("Hostname", transaction.results.iprev.name))
    if transaction.identity is not None:
        fields.append(("User", transaction.identity))
    if tls is not None:
        fields += [("TLS-Cipher", tls.cipher), ("TLS-Version", tls.version)]
    fields += [("Rcpt", recipient.path.text) for recipient in envelope.recipients]
    lines = [f"{name}: {_UNSAFE.sub('?', value)}\r\n" for name, value in fields]
    return f"POST {path}/checkv2 HTTP/1.1\r\n{''.join(lines)}\r\n".encode("ascii")


async def read_answer(connection: FilterConnection) -> bytes:
    """Return the body of an answer. Raise FilterError."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > _MOST_HEADER:
            raise FilterError("rspamd sends a header that does not end")
        data += await connection.receive()
    head, body = data[: end + 2], [data[end + 4 :]]
    status, length = _STATUS_LINE.match(head), _LENGTH.search(head)
    if status is None or status[1] != b"200" or length is None:
        raise FilterError(f"rspamd answers {data[:100].partition(bytes([13]))[0]!r}")
    octets = int(length[1])
    if octets > _MOST_BODY:
        raise FilterError(f"rspamd answers {octets} octets")
    missing = octets - len(body[0])
    while missing > 0:
        body.append(await connection.receive())
        missing -= len(body[-1])
    connection.can_be_kept = missing == 0 and _CLOSES.search(head) is None
    return b"".join(body)[:octets]


class RspamdCheck(Check):
    """The check."""

    name = "rspamd"

    def __init__(self, settings: RspamdSettings, mode: Mode, hostname: str) -> None:
        address, self._path = parse_url(settings.url)
        self.mode = mode
        self.deadline = settings.deadline + _GRACE
        self.failure = CHECK_FAILED if settings.fail == "defer" else None
        self._settings = settings
        self._hostname = hostname
        self._host = str(address).removeprefix("inet:")
        self._pool = FilterPool([address], connect=settings.connect, deadline=settings.deadline)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Close the connections at the end."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._pool.close()

    async def on_message(self, transaction: Transaction, message: Message) -> Finding:
        """Ask about a message. Raise FilterError."""
        head = request_head(self._host, self._path, self._hostname, transaction, message)

        async def talk(connection: FilterConnection) -> Answer:
            await connection.send(head + message.prefix)
            chunks = message.body.chunks()
            while (chunk := await next_chunk(chunks, message.body)) is not None:
                await connection.send(chunk)
            try:
                return _decode(await read_answer(connection))
            except (msgspec.MsgspecError, RecursionError) as exc:
                raise FilterError(f"rspamd answers what cannot be read: {exc}") from exc

        answer = await self._pool.talk(talk)
        return finding_of(answer, scores=self._settings.scores, verdict=self._settings.verdict)


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, if it is wanted."""
    mode = settings.mode_of(settings.rspamd)
    if settings.rspamd is None or mode == "off":
        return []
    return [RspamdCheck(settings.rspamd, mode, parts.hostname)]
