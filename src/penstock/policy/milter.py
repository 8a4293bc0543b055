"""Milters: filters with the milter protocol of sendmail, version 6.

Rules
-----
1. A filter that replies to MAIL or RCPT is asked then, so that it can refuse a sender, or one recipient of several;
   what it says about the client is the answer to MAIL. It has a connection of its own for as long as the client has
   (`_Early`). Others, and those in monitor mode, are asked at the end of the message, with fewer round trips.
2. Where asking early fails, nothing is decided: the whole dialog is held at the end of the message, and only its
   failure counts. That is so as well where the recipients are others in the end than those the filter was told.
3. Changes count once the filter has accepted the message; a filter that dies in the middle has changed nothing.
4. Nothing is dropped without a word: "discard" holds the message in the spool, and so does the removal of all its
   recipients.
5. A connection is used by one message after the other (QUIT_NC), if the filter can do that: rspamd can, while filters
   made with libmilter never answer the second SMFIC_CONNECT. That is tried out beside the mail.
6. A dialog ends at its deadline; progress of the filter does not extend it, because a client waits. For the same
   reason, a message whose text reaches the deadline is not told from the beginning again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

import trio

from penstock.message import Envelope, MailParameters, Message, Path, Recipient
from penstock.policy import milterwire as wire
from penstock.policy.base import Mark
from penstock.policy.check import Check, Edited, Finding, FindingOrAwaitable, MessageFinding, Mode, Parts
from penstock.policy.edits import EditError, MessageEditor, make_field
from penstock.policy.evidence import Pending, evidence_of
from penstock.policy.filters import FilterConnection, FilterError, FilterPool, next_chunk
from penstock.policy.milterwire import MilterError, Packet, Reader, macros, packet, text
from penstock.policy.settings import MilterSettings, PolicySettings
from penstock.policy.units import Address, parse_addresses
from penstock.reply import CHECK_FAILED, Reply
from penstock.results import IprevResult
from penstock.smtp.grammar import parse_mailbox
from penstock.transaction import Transaction

_REJECTED: Final = Reply(550, "5.7.1", "Rejected by a mail filter")
_DEFERRED: Final = Reply(451, "4.7.1", "A mail filter asks to try again later")
_MAX_HEADER: Final = 1 << 20
"""Octets of a header that a filter sees as such."""
_SEND: Final = 1 << 16
"""Octets that are collected before they are sent."""
_CHANGES: Final = frozenset(b"hmibeR+-2q")
_DECISIONS: Final = frozenset(b"acdrty")
_ON_MESSAGE: Final = (b"a", b"d")
"""Decisions that are about the message, whatever they answer: accept it as it is, discard it."""
_PROBE: Final = 2.0
"""Seconds that a filter has to answer when it is tried out whether it can keep connections."""
_GRACE: Final = 5.0
"""Seconds between our own deadline and that of the judge, which is for bugs."""


class Outcome(NamedTuple):
    """The result of a dialog."""

    message: Message
    has_changed: bool = False
    verdict: Reply | Mark | None = None


class _Job(NamedTuple):
    """A message that a filter is asked about."""

    message: Message
    header: bytes
    """The header of the body, with CRLF."""
    rest: int
    """Where the text after the empty line begins in the body."""


class _Dialog:
    """The dialog about a client and its messages, on a connection.

    Steps return the packet that decides, None to go on.
    """

    def __init__(self, connection: FilterConnection, hostname: str, transaction: Transaction) -> None:
        self.connection = connection
        self._hostname = hostname
        self._transaction = transaction
        self._reader = Reader()
        self._out: list[bytes] = []
        """Packets that are not sent yet."""
        self._waiting = 0
        """Octets of the body in them."""
        self._steps = 0

    async def run(self, job: _Job) -> Outcome:
        """Hold the whole dialog about a message. Raise FilterError."""
        envelope = job.message.envelope
        iprev = self._transaction.results.iprev
        decision = await self.begin("" if iprev is None else iprev.name)
        if decision is None:
            decision = await self.tell_sender(envelope.sender, envelope, job.message.id)
        for recipient in envelope.recipients:
            if decision is not None:
                break
            decision = await self.tell_recipient(recipient.path, job.message.id)
        return await self.finish(job, decision)

    async def finish(self, job: _Job, decision: Packet | None = None) -> Outcome:
        """Tell the text of a message whose envelope was told, unless that has decided; return the result."""
        queue_id = macros(b"T", (("i", job.message.id),))
        if decision is None:
            decision = await self._ask(wire.NO_DATA, wire.NR_DATA, queue_id + packet(b"T"))
        if decision is None:
            decision = await self._send_header(job)
        if decision is None:
            decision = await self._send_body(job)
        if decision is not None:
            await self._abort()
            return self._outcome(job, decision, MessageEditor(job.message, b""))
        return await self._finish(job)

    # ---- the steps

    async def begin(self, name: str) -> Packet | None:
        """Negotiate, and tell the filter about the client; `name` leads back to it, or is ""."""
        connection = self.connection
        if connection.state is None:
            connection.state = wire.parse_negotiation(await self._exchange(wire.negotiation()))
        else:
            # The end of the dialog before, and a new client: together with the first step.
            self._out.append(packet(b"K"))
        assert isinstance(connection.state, int)
        self._steps = connection.state
        transaction, hostname = self._transaction, self._hostname
        peer = transaction.peer
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
        return await self._ask(wire.NO_CONNECT, wire.NR_CONNECT, out) or await self.tell_hello()

    async def tell_hello(self) -> Packet | None:
        """Tell the name of the client, and its TLS."""
        tls = self._transaction.tls
        secure = (
            ()
            if tls is None
            else (("{tls_version}", tls.version), ("{cipher}", tls.cipher), ("{cipher_bits}", str(tls.bits)))
        )
        out = macros(b"H", secure) + packet(b"H", text(self._transaction.hello))
        return await self._ask(wire.NO_HELO, wire.NR_HELO, out)

    async def tell_sender(
        self, sender: Path, parameters: Envelope | MailParameters, queue_id: str = ""
    ) -> Packet | None:
        """Begin a message."""
        values = (
            ("i", queue_id),
            ("{auth_authen}", self._transaction.identity or ""),
            ("{mail_addr}", sender.text),
            ("{mail_host}", sender.domain),
            ("{mail_mailer}", "smtp"),
        )
        out = macros(b"M", values) + packet(b"M", text(f"<{sender.text}>"), *_mail_arguments(parameters))
        return await self._ask(wire.NO_MAIL, wire.NR_MAIL, out)

    async def tell_recipient(self, path: Path, queue_id: str = "") -> Packet | None:
        """Tell a recipient."""
        values = (("i", queue_id), ("{rcpt_addr}", path.text), ("{rcpt_host}", path.domain), ("{rcpt_mailer}", "smtp"))
        return await self._ask(wire.NO_RCPT, wire.NR_RCPT, macros(b"R", values) + packet(b"R", text(f"<{path.text}>")))

    async def _send_header(self, job: _Job) -> Packet | None:
        steps = self._steps
        if not steps & wire.NO_HEADERS:
            fields = wire.headers(job.message.prefix, steps)
            _leave_out_received(fields)
            fields += wire.headers(job.header, steps)
            if steps & wire.NR_HEADER:
                self._out += fields
                fields.clear()
            macro = macros(b"L", (("i", job.message.id),)) if fields else b""
            for field in fields:
                decision = await self._ask(0, 0, macro + field)
                macro = b""
                if decision is not None:
                    return decision
        out = macros(b"N", (("i", job.message.id),)) + packet(b"N")
        return await self._ask(wire.NO_EOH, wire.NR_EOH, out)

    async def _send_body(self, job: _Job) -> Packet | None:
        if self._steps & wire.NO_BODY:
            return None
        body, skip = job.message.body, job.rest
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
        """Send a part of the body; return the answer, None to continue."""
        self._out.append(packet(b"B", piece))
        if self._steps & wire.NR_BODY:
            self._waiting += len(piece)
            if self._waiting >= _SEND:
                await self._flush()
            return None
        answer = await self._exchange()
        return None if answer.code == b"c" else answer

    async def _finish(self, job: _Job) -> Outcome:
        """Say that the message is complete; collect the changes until the decision."""
        editor = MessageEditor(job.message, job.header)
        is_quarantined = False
        answer = await self._exchange(macros(b"E", (("i", job.message.id),)) + packet(b"E"))
        while answer.code[0] in _CHANGES:
            is_quarantined |= answer.code == b"q"
            try:
                self._change(editor, answer)
            except EditError as exc:
                raise MilterError(f"the filter wants a change that cannot be made: {exc}") from exc
            answer = self._reader.next() or await self._receive()
        if answer.code != b"c":
            self._decision(answer)
        self.connection.can_be_kept = self._reader.is_empty
        outcome = self._outcome(job, answer, editor)
        if outcome.verdict is None and (is_quarantined or not editor.has_recipients):
            return outcome._replace(verdict=Mark(quarantine="hold"))
        return outcome

    # ---- answers

    def _decision(self, answer: Packet) -> Packet:
        if answer.code[0] not in _DECISIONS:
            if answer.code in (b"4", b"f"):
                raise MilterError("the filter is shutting down")
            raise MilterError(f"the filter answers with {answer.code!r}")
        return answer

    def _outcome(self, job: _Job, decision: Packet, editor: MessageEditor) -> Outcome:
        """Return what follows from the packet that decides."""
        original = job.message
        code = decision.code
        if code in (b"c", b"a"):
            if editor.has_recipients:
                return Outcome(editor.apply(), editor.has_changed)
            return Outcome(original)  # rule 4: all of it is held as it came
        if code == b"d":
            return Outcome(original, verdict=Mark(quarantine="hold"))
        return Outcome(original, verdict=_refusal(decision))

    def _change(self, editor: MessageEditor, change: Packet) -> None:
        """Make a change. Raise EditError or MilterError."""
        code, data = change
        has_space = bool(self._steps & wire.LEADING_SPACE)
        if code == b"h":
            name, value = wire.strings(data)
            editor.add(make_field(name, value, has_space=has_space))
        elif code in (b"i", b"m"):
            if len(data) < 4:
                raise MilterError(f"the filter sends a change of {len(data)} octets")
            index = int.from_bytes(data[:4], "big")
            name, value = wire.strings(data, 4)
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
            self._out.append(out)
            return None
        answer = await self._exchange(out)
        return None if answer.code == b"c" else self._decision(answer)

    async def _exchange(self, out: bytes = b"") -> Packet:
        self._out.append(out)
        await self._flush()
        return await self._receive()

    async def _flush(self) -> None:
        out, self._waiting = b"".join(self._out), 0
        self._out.clear()
        if out:
            await self.connection.send(out)

    async def _receive(self) -> Packet:
        while (found := self._reader.next()) is None:
            self._reader.feed(await self.connection.receive())
        return found

    async def abort(self) -> None:
        """Give up the message. Raise FilterError."""
        self._out.append(packet(b"A"))
        await self._flush()

    async def _abort(self) -> None:
        """End the dialog before the end of the message."""
        with suppress(FilterError):
            await self.abort()
            self.connection.can_be_kept = self._reader.is_empty


def _refusal(decision: Packet) -> Reply:
    """Return the reply of a decision that refuses. Raise MilterError."""
    if decision.code == b"y":
        return wire.parse_reply(decision.data)
    return _DEFERRED if decision.code == b"t" else _REJECTED


class _Early:
    """The dialog with a filter about a client that is connected: the envelope is sent as it arrives."""

    def __init__(self, dialog: _Dialog, hello: object) -> None:
        self.dialog = dialog
        self.hello = hello
        """What the filter was told about the client."""
        self.client: Packet | None = None
        """What it has decided about the client, for all of its messages."""
        self.message: Packet | None = None
        """What it has decided about the message that begins."""
        self.is_busy = False
        """A step is under way, or was cut: the connection is of no use any more."""
        self.has_begun = False
        """The filter was told a sender, and not yet the text."""
        self._sender: Path | None = None
        self._recipients: list[Path] = []

    async def tell_sender(self, sender: Path, parameters: MailParameters) -> Packet | None:
        """Begin a message; return what decides about the sender. Raise FilterError."""
        self.is_busy = True
        if self.has_begun:
            await self.dialog.abort()
        self.has_begun, self._sender, self._recipients, self.message = True, sender, [], None
        decision = self.client or await self.dialog.tell_sender(sender, parameters)
        self.message = decision
        self.is_busy = False
        return decision

    async def tell_recipient(self, path: Path) -> Packet | None:
        """Tell a recipient; return what decides about it. Raise FilterError."""
        if self.message is not None:
            return None
        self.is_busy = True
        decision = await self.dialog.tell_recipient(path)
        if decision is None or decision.code in _ON_MESSAGE:
            self._recipients.append(path)
            self.message = decision
        self.is_busy = False
        return decision

    def was_told(self, envelope: Envelope) -> bool:
        """Return whether a message has the sender and the recipients that the filter was told."""
        if self.message is not None:
            return self.message.code in _ON_MESSAGE
        return self._sender == envelope.sender and self._recipients == [each.path for each in envelope.recipients]

    async def finish(self, job: _Job) -> Outcome:
        """Return the result for the message. Raise FilterError."""
        self.is_busy, self.has_begun = True, False
        outcome = await self.dialog.finish(job, self.message)
        self.is_busy = False
        return outcome


def _mail_arguments(parameters: Envelope | MailParameters) -> Iterator[bytes]:
    if parameters.size is not None:
        yield text(f"SIZE={parameters.size}")
    if parameters.body_type != "7BIT":
        yield text(f"BODY={parameters.body_type}")
    if parameters.smtputf8:
        yield text("SMTPUTF8")


def _leave_out_received(fields: list[bytes]) -> None:
    """Drop the trace field from the packets of those that we add: filters add one of their own from what they know."""
    for at, field in enumerate(fields):
        if field.startswith(b"Received\0", 5):
            del fields[at]
            return


def _path(data: bytes, *, can_be_null: bool = False) -> Path:
    """Return an address of the filter, with or without its angle brackets. Raise MilterError."""
    address = wire.strings(data)[0].decode("utf-8", "replace").strip().removeprefix("<").removesuffix(">")
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
        self._deadline = settings.deadline
        self._asks_early = False
        """The filter replies to MAIL or RCPT, and may refuse there (rule 1)."""

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
                    replies = not steps & (wire.NO_MAIL | wire.NR_MAIL) or not steps & (wire.NO_RCPT | wire.NR_RCPT)
                    self._asks_early |= replies and self.mode == "enforce"
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
        except FilterError:
            pass
        return False if answers == 2 else None

    # ---- the envelope, as it arrives

    def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> FindingOrAwaitable:
        """Ask a filter that replies to MAIL or RCPT about the client and the sender."""
        if not self._asks_early:
            return None
        return self._tell(transaction, partial(self._tell_sender, transaction, sender, parameters))

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:
        """Ask about a recipient."""
        early = self._early_of(transaction)
        return None if early is None else self._tell(transaction, partial(early.tell_recipient, recipient.path))

    def on_disconnect(self, transaction: Transaction) -> None:
        """End the dialog about a client."""
        self._drop(transaction)

    def _early_of(self, transaction: Transaction) -> _Early | None:
        found: _Early | None = evidence_of(transaction).kept.get(self)
        return found

    async def _tell(self, transaction: Transaction, tell: Callable[[], Awaitable[Packet | None]]) -> Finding:
        """Return what a step of the dialog decides; None if it fails (rule 2)."""
        try:
            with trio.fail_after(self._deadline):
                decision = await tell()
            refusal = None if decision is None or decision.code in _ON_MESSAGE else _refusal(decision)
        except (FilterError, trio.TooSlowError):
            self._fail_early(transaction)
            return None
        early = self._early_of(transaction)
        if early is not None and decision is not None:
            self._pool.note_success(early.dialog.connection)
        return refusal

    def _fail_early(self, transaction: Transaction) -> None:
        """Let go of a dialog that has failed. One that could not begin has been reported by the pool."""
        early = self._early_of(transaction)
        if early is not None:
            self._pool.note_failure(early.dialog.connection)
            self._drop(transaction)

    async def _tell_sender(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Packet | None:
        """Begin a message: on the connection that the client has, or on a new one."""
        hello = (transaction.hello, transaction.tls)
        early = self._early_of(transaction)
        if early is not None and (early.is_busy or early.hello != hello):
            self._drop(transaction)
            early = None
        if early is None:
            pending: Pending[IprevResult] | None = evidence_of(transaction).pending("iprev")
            iprev = None if pending is None else await pending.get()
            name = "" if iprev is None else iprev.name
            early = await self._pool.lend(partial(self._open, transaction, hello, name))
            if early is None:
                return None
            evidence_of(transaction).kept[self] = early
        return await early.tell_sender(sender, parameters)

    async def _open(self, transaction: Transaction, hello: object, name: str, connection: FilterConnection) -> _Early:
        """Tell a filter about a client, on a connection that is lent."""
        early = _Early(_Dialog(connection, self._hostname, transaction), hello)
        early.client = await early.dialog.begin(name)
        return early

    def _drop(self, transaction: Transaction) -> None:
        """Let go of the connection that a client has."""
        early: _Early | None = evidence_of(transaction).kept.pop(self, None)
        if early is not None:
            connection = early.dialog.connection
            connection.can_be_kept &= not (early.is_busy or early.has_begun)
            self._pool.take_back(connection)

    # ---- the message

    async def on_message(self, transaction: Transaction, message: Message) -> MessageFinding:
        """Ask the filter about a message. Raise FilterError."""
        header, rest = await split_body(message)
        job = _Job(message, header, rest)
        outcome = await self._finish_early(transaction, job)
        if outcome is None:
            outcome = await self._pool.talk(
                lambda connection: _Dialog(connection, self._hostname, transaction).run(job)
            )
        self._has_worked.set()
        if isinstance(outcome.verdict, Mark) and not self._can_hold:
            return _REJECTED.because(f"{self.name} wants it held, and there is no spool")
        if outcome.has_changed:
            return Edited(outcome.message, outcome.verdict)
        return outcome.verdict

    async def _finish_early(self, transaction: Transaction, job: _Job) -> Outcome | None:
        """Return the result of the dialog that began with the envelope, if there is one that goes on.

        Raise FilterError when there is no result within the deadline: the client has waited long enough.
        """
        early = self._early_of(transaction)
        if early is None:
            return None
        if early.is_busy or not early.was_told(job.message.envelope):
            self._drop(transaction)
            return None
        try:
            with trio.fail_after(self._deadline):
                outcome = await early.finish(job)
        except trio.TooSlowError as exc:
            self._fail_early(transaction)
            raise FilterError(f"no answer within {self._deadline:g} s") from exc
        except FilterError:
            self._fail_early(transaction)
            return None
        self._pool.note_success(early.dialog.connection)
        return outcome


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return a check for each filter, in the order of the file."""
    found: list[Check] = []
    for milter in settings.milter:
        mode = settings.mode_of(milter)
        if mode != "off":
            found.append(MilterCheck(milter, mode, parts.hostname, can_hold=parts.can_hold))
    return found
