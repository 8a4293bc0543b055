"""Milters: filters that speak the milter protocol of sendmail, version 6.

Rules
-----
1. The whole dialog is held at the end of the message, after the checks that cost less. So a filter sees only mail that
   would be accepted otherwise, and one that wants no replies before the end of the message costs one round trip.
2. A reply to any step decides about the message, also one to RCPT: there is no recipient that can be refused alone
   after the text has come.
3. Changes count once the filter has accepted the message; a filter that dies in the middle has changed nothing.
4. Nothing is dropped without a word: "discard" holds the message in the spool, and so does the removal of all its
   recipients.
5. A connection is used by one message after the other (QUIT_NC), if the filter can do that: rspamd can, while filters
   made with libmilter never answer the second SMFIC_CONNECT. That is tried out beside the mail.
6. A dialog ends at its deadline, whatever the filter does; progress does not extend it, because a client waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from penstock.message import Message, Path
from penstock.policy import milterwire as wire
from penstock.policy.base import Mark
from penstock.policy.check import Check, Edited, MessageFinding, Mode, Parts
from penstock.policy.edits import EditError, MessageEditor, make_field
from penstock.policy.filters import FilterConnection, FilterError, FilterPool, next_chunk
from penstock.policy.milterwire import MilterError, Packet, Reader, macros, packet, text
from penstock.policy.settings import MilterSettings, PolicySettings
from penstock.policy.units import Address, parse_addresses
from penstock.reply import CHECK_FAILED, Reply
from penstock.smtp.grammar import parse_mailbox
from penstock.transaction import Transaction

_REJECTED: Final = Reply(550, "5.7.1", "Message rejected by a mail filter")
_DEFERRED: Final = Reply(451, "4.7.1", "A mail filter asks to try again later")
_MAX_HEADER: Final = 1 << 20
"""Octets of a header that a filter sees as such."""
_SEND: Final = 1 << 16
"""Octets that are collected before they are sent."""
_CHANGES: Final = frozenset(b"hmibeR+-2q")
_DECISIONS: Final = frozenset(b"acdrty")
_PROBE: Final = 2.0
"""Seconds that a filter has to answer when it is tried out whether it can keep connections."""
_GRACE: Final = 5.0
"""Seconds between our own deadline and that of the judge, which is for bugs."""


class Outcome(NamedTuple):
    """The result of a dialog."""

    message: Message
    has_changed: bool = False
    verdict: Reply | Mark | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """What a filter is asked about."""

    hostname: str
    transaction: Transaction
    message: Message
    header: bytes
    """The header of the body, with CRLF."""
    rest: int
    """Where the text after the empty line begins in the body."""


class _Dialog:
    """The dialog about one message on a connection."""

    def __init__(self, connection: FilterConnection, job: _Job) -> None:
        self._connection = connection
        self._job = job
        self._reader = Reader()
        self._out = bytearray()
        self._steps = 0

    async def run(self) -> Outcome:
        """Return the result. Raise FilterError or MilterError."""
        connection = self._connection
        if connection.state is None:
            await self._send(wire.negotiation())
            connection.state = wire.parse_negotiation(await self._receive())
        else:
            self._out += packet(b"K")  # the end of the dialog before, and a new client: together with the first step
        assert isinstance(connection.state, int)
        self._steps = connection.state
        for step in (self._send_envelope, self._send_header, self._send_body):
            decision = await step()
            if decision is not None:
                await self._abort()
                return self._outcome(decision, MessageEditor(self._job.message, b""))
        return await self._finish()

    # ---- the steps; each returns the packet that decides, or None

    async def _send_envelope(self) -> Packet | None:
        transaction, envelope = self._job.transaction, self._job.message.envelope
        peer, tls = transaction.peer, transaction.tls
        hostname = self._job.hostname
        queue_id = ("i", self._job.message.id)
        name = transaction.results.iprev.name if transaction.results.iprev is not None else ""
        client = name or (f"[{peer.address}]" if peer.address else "localhost")
        values: tuple[tuple[str, str], ...] = (
            ("j", hostname),
            ("{daemon_name}", transaction.listener or hostname),
            ("{daemon_addr}", peer.local_address),
            ("v", "Penstock"),
            ("_", f"{client} [{peer.address}]" if peer.address else "localhost"),
            ("{client_addr}", peer.address),
            ("{client_name}", name or "unknown"),
        )
        out = macros(b"C", values) + wire.connect(client, peer.address, peer.port)
        decision = await self._ask(wire.NO_CONNECT, wire.NR_CONNECT, out)
        if decision is None:
            secure = (
                ()
                if tls is None
                else (("{tls_version}", tls.version), ("{cipher}", tls.cipher), ("{cipher_bits}", str(tls.bits)))
            )
            out = macros(b"H", secure) + packet(b"H", text(transaction.hello))
            decision = await self._ask(wire.NO_HELO, wire.NR_HELO, out)
        if decision is None:
            sender = envelope.sender
            values = (
                queue_id,
                ("{auth_authen}", transaction.identity or ""),
                ("{mail_addr}", sender.text),
                ("{mail_host}", sender.domain),
                ("{mail_mailer}", "smtp"),
            )
            out = macros(b"M", values) + packet(b"M", text(f"<{sender.text}>"), *self._mail_arguments())
            decision = await self._ask(wire.NO_MAIL, wire.NR_MAIL, out)
        for recipient in envelope.recipients:
            if decision is not None:
                return decision
            path = recipient.path
            values = (queue_id, ("{rcpt_addr}", path.text), ("{rcpt_host}", path.domain), ("{rcpt_mailer}", "smtp"))
            out = macros(b"R", values) + packet(b"R", text(f"<{path.text}>"))
            decision = await self._ask(wire.NO_RCPT, wire.NR_RCPT, out)
        return decision or await self._ask(wire.NO_DATA, wire.NR_DATA, macros(b"T", (queue_id,)) + packet(b"T"))

    def _mail_arguments(self) -> Iterator[bytes]:
        envelope = self._job.message.envelope
        if envelope.size is not None:
            yield text(f"SIZE={envelope.size}")
        if envelope.body_type != "7BIT":
            yield text(f"BODY={envelope.body_type}")
        if envelope.smtputf8:
            yield text("SMTPUTF8")

    async def _send_header(self) -> Packet | None:
        steps = self._steps
        if not steps & wire.NO_HEADERS:
            ours = _without_received(self._job.message.prefix)
            fields = [*wire.headers(ours, steps), *wire.headers(self._job.header, steps)]
            if steps & wire.NR_HEADER:
                self._out += b"".join(fields)
                fields = []
            macro = macros(b"L", (("i", self._job.message.id),))
            for field in fields:
                decision = await self._ask(0, 0, macro + field)
                macro = b""
                if decision is not None:
                    return decision
        out = macros(b"N", (("i", self._job.message.id),)) + packet(b"N")
        return await self._ask(wire.NO_EOH, wire.NR_EOH, out)

    async def _send_body(self) -> Packet | None:
        if self._steps & wire.NO_BODY:
            return None
        body, skip = self._job.message.body, self._job.rest
        chunks = body.chunks()
        while (chunk := await next_chunk(chunks, body)) is not None:
            for at in range(skip, len(chunk), wire.BODY_CHUNK):
                answer = await self._send_piece(chunk[at : at + wire.BODY_CHUNK])
                if answer is None:
                    continue
                if answer.code == b"s" and self._steps & wire.SKIP:  # it has seen enough
                    return None
                return self._decision(answer)
            skip = max(0, skip - len(chunk))
        return None

    async def _send_piece(self, piece: bytes) -> Packet | None:
        """Send a piece of the body; return the answer unless it is to go on."""
        self._out += packet(b"B", piece)
        if self._steps & wire.NR_BODY:
            if len(self._out) >= _SEND:
                await self._flush()
            return None
        answer = await self._exchange()
        return None if answer.code == b"c" else answer

    async def _finish(self) -> Outcome:
        """Say that the message is complete; collect the changes until the decision."""
        editor = MessageEditor(self._job.message, self._job.header)
        is_quarantined = False
        answer = await self._exchange(macros(b"E", (("i", self._job.message.id),)) + packet(b"E"))
        while answer.code[0] in _CHANGES:
            is_quarantined |= answer.code == b"q"
            try:
                self._change(editor, answer)
            except EditError as exc:
                raise MilterError(f"the filter wants a change that cannot be made: {exc}") from exc
            answer = await self._receive()
        if answer.code != b"c":
            self._decision(answer)
        self._connection.can_be_kept = self._reader.is_empty
        outcome = self._outcome(answer, editor)
        if outcome.verdict is None and (is_quarantined or not editor.has_recipients):
            return outcome._replace(verdict=Mark(quarantine="hold"))
        return outcome

    # ---- answers

    def _decision(self, answer: Packet) -> Packet:
        if answer.code[0] not in _DECISIONS:
            raise MilterError(f"the filter answers with {answer.code!r}")
        return answer

    def _outcome(self, decision: Packet, editor: MessageEditor) -> Outcome:
        """Return what follows from the packet that decides."""
        original = self._job.message
        code = decision.code
        if code in (b"c", b"a"):
            if editor.has_recipients:
                return Outcome(editor.apply(), editor.has_changed)
            return Outcome(original)  # rule 4: all of it is held as it came
        if code == b"d":
            return Outcome(original, verdict=Mark(quarantine="hold"))
        if code == b"y":
            return Outcome(original, verdict=wire.parse_reply(decision.data))
        return Outcome(original, verdict=_DEFERRED if code == b"t" else _REJECTED)

    def _change(self, editor: MessageEditor, change: Packet) -> None:
        """Make a change. Raise EditError or MilterError."""
        code, data = change
        has_space = bool(self._steps & wire.LEADING_SPACE)
        if code == b"h":
            name, value = wire.strings(data, 2)
            editor.add(make_field(name, value, has_space=has_space))
        elif code in (b"i", b"m"):
            if len(data) < 4:
                raise MilterError(f"the filter sends a change of {len(data)} octets")
            index = int.from_bytes(data[:4], "big")
            name, value = wire.strings(data[4:], 2)
            if code == b"i":
                editor.insert(index, make_field(name, value, has_space=has_space))
            else:
                editor.change(name, index, make_field(name, value, has_space=has_space) if value else b"")
        elif code == b"b":
            editor.replace_body(data)
        elif code == b"e":
            editor.change_sender(_path(data, can_be_null=True))
        elif code in (b"+", b"2"):
            editor.add_recipient(_path(data))
        elif code in (b"-", b"R"):
            editor.delete_recipient(_path(data))

    # ---- packets

    async def _ask(self, unwanted: int, without_reply: int, out: bytes) -> Packet | None:
        """Send a step, unless the filter does not want it; return its answer if that decides."""
        if self._steps & unwanted:
            return None
        if self._steps & without_reply:
            self._out += out
            return None
        answer = await self._exchange(out)
        return None if answer.code == b"c" else self._decision(answer)

    async def _exchange(self, out: bytes = b"") -> Packet:
        self._out += out
        await self._flush()
        return await self._receive()

    async def _flush(self) -> None:
        out, self._out = self._out, bytearray()
        await self._send(bytes(out))

    async def _send(self, out: bytes) -> None:
        if out:
            await self._connection.send(out)

    async def _receive(self) -> Packet:
        """Return the next packet that is not about progress."""
        while True:
            found = self._reader.next()
            if found is None:
                self._reader.feed(await self._connection.receive())
            elif found.code in (b"4", b"f"):
                raise MilterError("the filter is shutting down")
            elif found.code != b"p":
                return found

    async def _abort(self) -> None:
        """End the dialog before the end of the message."""
        with suppress(FilterError):
            await self._send(packet(b"A"))
            self._connection.can_be_kept = self._reader.is_empty


def _without_received(prefix: bytes) -> bytes:
    """Return the fields that we add without the trace field: filters add one of their own from what they know."""
    at = 0 if prefix.startswith(b"Received:") else prefix.find(b"\r\nReceived:") + 2
    if at == 1:
        return prefix
    end = at
    while True:  # the end of the field: a line that no folded one follows
        end = prefix.find(b"\r\n", end) + 2
        if end == 1:
            return prefix[:at]
        if prefix[end : end + 1] not in (b" ", b"\t"):
            return prefix[:at] + prefix[end:].removesuffix(b"\r\n" if prefix.endswith(b"\r\n\r\n") else b"")


def _path(data: bytes, *, can_be_null: bool = False) -> Path:
    """Return an address of the filter, with or without its angle brackets. Raise MilterError."""
    (octets,) = wire.strings(data, 1)
    address = octets.decode("utf-8", "replace").strip().removeprefix("<").removesuffix(">")
    if can_be_null and not address:
        return Path("", "", "")
    path = parse_mailbox(address, smtputf8=True, tolerant=True)
    if path is None:
        raise MilterError(f"the filter names the address {address[:100]!r}")
    return path


async def split_body(message: Message) -> tuple[bytes, int]:
    """Return the header of a body, with CRLF, and where the text after the empty line begins."""
    body = message.body
    if message.prefix.endswith(b"\r\n\r\n"):  # what the client has sent is no header
        return b"", 0
    chunks = body.chunks()
    start = b""
    while (chunk := await next_chunk(chunks, body)) is not None:
        start = start + chunk if start else chunk
        if start.startswith(b"\r\n"):
            return b"", 2
        end = start.find(b"\r\n\r\n")
        if end >= 0:
            return start[: end + 2], end + 4
        if len(start) > _MAX_HEADER:
            end = start.rfind(b"\r\n", 0, _MAX_HEADER) + 2
            return start[:end], end
    return start, len(start)


class MilterCheck(Check):
    """One filter."""

    def __init__(self, settings: MilterSettings, mode: Mode, hostname: str, *, can_hold: bool = True) -> None:
        """`can_hold`: there is a spool where messages can be held. Otherwise they are refused."""
        addresses = parse_addresses(settings.address)
        self.name = f"milter {addresses[0]}"
        self.mode = mode
        self.deadline = settings.deadline + _GRACE
        self.failure = CHECK_FAILED if settings.fail == "defer" else None
        self._hostname = hostname
        self._can_hold = can_hold
        self._pool = FilterPool(addresses, connect=settings.connect, deadline=settings.deadline)
        self._pool.reusable.clear()
        self._has_worked = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find out which filters keep connections (rule 5), as soon as they are there."""
        task_status.started()
        unknown = list(self._pool.addresses)
        try:
            while True:
                for address in list(unknown):
                    found = await self._keeps_connections(address)
                    if found is not None:
                        unknown.remove(address)
                    if found:
                        self._pool.reusable.add(address)
                if not unknown:
                    await trio.sleep_forever()
                self._has_worked = trio.Event()
                await self._has_worked.wait()
        finally:
            self._pool.close()

    async def _keeps_connections(self, address: Address) -> bool | None:
        """Say whether a filter takes another client on a connection; None if it cannot be asked."""
        reader, client = Reader(), wire.connect("localhost", "127.0.0.1", 0)
        answers = 0

        async def ask(out: bytes) -> Packet:
            await connection.send(out)
            while (found := reader.next()) is None:
                reader.feed(await connection.receive())
            return found

        try:
            connection = await self._pool.connect(address)
            try:
                with trio.move_on_after(_PROBE):
                    steps = wire.parse_negotiation(await ask(wire.negotiation(wire.STEPS & ~wire.NR_CONNECT)))
                    answers += 1
                    if steps & wire.NR_CONNECT:  # not offered: this is rspamd, since libmilter takes no such step
                        return True
                    if steps & wire.NO_CONNECT:
                        return False
                    await ask(client)
                    answers += 1
                    await ask(packet(b"K") + client)
                    return True
            finally:
                connection.close()
        except (FilterError, MilterError):
            pass
        return False if answers == 2 else None

    async def on_message(self, transaction: Transaction, message: Message) -> MessageFinding:
        """Ask the filter about a message. Raise FilterError."""
        header, rest = await split_body(message)
        job = _Job(self._hostname, transaction, message, header, rest)

        async def talk(connection: FilterConnection) -> Outcome:
            try:
                return await _Dialog(connection, job).run()
            except MilterError as exc:
                raise FilterError(str(exc)) from exc

        outcome = await self._pool.talk(talk)
        self._has_worked.set()
        if isinstance(outcome.verdict, Mark) and not self._can_hold:
            return _REJECTED.because(f"{self.name} wants it held, and there is no spool")
        if outcome.has_changed:
            return Edited(outcome.message, outcome.verdict)
        return outcome.verdict


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return a check for each filter, in the order of the file."""
    found: list[Check] = []
    for milter in settings.milter:
        mode = settings.mode_of(milter)
        if mode != "off":
            found.append(MilterCheck(milter, mode, parts.hostname, can_hold=parts.can_hold))
    return found
