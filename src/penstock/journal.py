"""The journal: one method for each mail event, one line for each call.

An event costs a session one tuple in a bounded queue. Lines are formatted in batches, at the latest by `drain`; the
most frequent ones by compiled code (ext/journal.pyx). Text from clients is escaped and cut, never written as it is.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec

from penstock import _journal
from penstock.message import MessageId, Path, Recipient
from penstock.reply import Reply
from penstock.transaction import Peer, TlsInfo

_MAX_WAITING: Final = 65_536
"""Maximum number of events that wait for `drain`; more are dropped and counted."""
_BATCH: Final = 256
"""Events that are formatted at once."""
_MAX_TEXT: Final = 256
"""Maximum characters of a value."""
_MAX_RECIPIENTS: Final = 10

Fields = dict[str, Any]
Recipients = Sequence[Recipient]


_MASK: Final = 0xFFFF_FFFF
_GOLDEN: Final = 2_654_435_769
"""2 ** 32 by the golden ratio. Its multiples modulo 2 ** 32 are spread evenly, so that sessions are chosen evenly."""


class JournalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The journal (log), on standard error or in a file."""

    file: Annotated[
        str,
        msgspec.Meta(
            description="File of the journal, relative to data_dir; opened again at SIGUSR1. Standard error if empty"
        ),
    ] = ""

    format: Annotated[
        Literal["auto", "human", "json"],
        msgspec.Meta(description="human: readable lines; json: JSON Lines; auto: human on a terminal, otherwise json"),
    ] = "auto"
    events: Annotated[
        Literal["all", "mail", "errors", "none"],
        msgspec.Meta(description="all; mail: without connections; errors: only failures of this server; none"),
    ] = "all"
    sessions: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1,
            description="Part of the sessions whose connected, tls and disconnected lines are written; 0.01: every "
            "hundredth. Lines about their mail are always written",
        ),
    ] = 1.0


def escape(text: str) -> str:
    r"""Return text that is safe in a log line: printable, on one line, at most 256 characters.

    Control characters, line separators, bidirectional controls and lone surrogates become \xNN or \uNNNN.
    """
    if len(text) > _MAX_TEXT:
        text = text[: _MAX_TEXT - 3] + "..."
    if text.isprintable():
        return text.replace("\\", "\\\\") if "\\" in text else text
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


class EventCounters(Protocol):
    """Counts some events of the journal for /metrics; see penstock.metrics.counters."""

    def count(self, name: str, n: int = 1, /, **labels: str) -> None:
        """Add to a counter."""

    def counting(self, name: str, /, **labels: str) -> Callable[[], None]:
        """Return what adds 1 to a counter."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add to a histogram."""


class Journal:
    """Collects events and formats them as lines. Not thread-safe."""

    def __init__(
        self, settings: JournalSettings, *, is_terminal: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._human = settings.format == "human" or (settings.format == "auto" and is_terminal)
        self._clock = clock
        self._waiting: list[tuple[float, str, int, Peer | None, tuple[Any, ...]]] = []
        self._lines: list[bytes] = []
        self._made = 0
        """Number of events in `_lines`."""
        self._dropped = 0
        self.counters: EventCounters | None = None
        """Counts some events for /metrics, whether they are written or not."""
        self.logs_connections = settings.events == "all"
        self.logs_mail = settings.events in ("all", "mail")
        """Mail events are written. Callers may skip the preparation of events that are not."""
        self._logs_errors = settings.events != "none"
        self._part = int(settings.sessions * (_MASK + 1))

    def _shows(self, session: int) -> bool:
        """Return whether the connection of a session is logged: the same answer at its start and its end."""
        return self.logs_connections and (self._part > _MASK or session * _GOLDEN & _MASK < self._part)

    # ---- the server

    def listening(self, address: str, listener: str) -> None:
        """A listener accepts connections."""
        if self.logs_connections:
            self._note("listening", 0, None, address, listener)

    def limited(self, key: str, wanted: int, value: int, cause: str) -> None:
        """A setting is lower than configured."""
        if self.logs_connections:
            self._note("limited", 0, None, key, wanted, value, cause)

    def stopping(self, sessions: int) -> None:
        """The server stops accepting connections; `sessions` are open."""
        if self.logs_connections:
            self._note("stopping", 0, None, sessions)

    def stopped(self) -> None:
        """The last session has ended."""
        if self.logs_connections:
            self._note("stopped", 0, None)

    def error(self, session: int, where: str, exc: BaseException) -> None:
        """An error that is not about a message: a bug, or the operating system."""
        if self._logs_errors:
            self._note("error", session, None, where, exc)

    def reloaded(self, what: str) -> None:
        """The configuration or files that it names were read again and are in use."""
        if self._logs_errors:
            self._note("reloaded", 0, None, what)

    def reload_refused(self, cause: str) -> None:
        """The configuration is wrong: nothing was changed. `cause` begins with the key."""
        if self._logs_errors:
            self._note("reload-refused", 0, None, cause)

    def reload_failed(self, cause: str) -> None:
        """A changed file or a new worker cannot be used; the previous one remains in use."""
        if self._logs_errors:
            self._note("reload-failed", 0, None, cause)

    def draining(self, sessions: int) -> None:
        """Mail is refused until the server is resumed or has ended; `sessions` are open."""
        if self._logs_errors:
            self._note("draining", 0, None, sessions)

    def resumed(self) -> None:
        """Mail is accepted again."""
        if self._logs_errors:
            self._note("resumed", 0, None)

    def state(self, state: Fields) -> None:
        """The state of the server, as an operator has asked for it."""
        self._note("state", 0, None, state)

    def shortage(self, cause: str, failures: int) -> None:
        """Clients could not be accepted for lack of descriptors or memory, `failures` times since the last line."""
        if self._logs_errors:
            self._note("shortage", 0, None, cause, failures)

    def hook_failed(self, hook: str, hook_point: str, cause: str) -> None:
        """A policy raised an exception, missed its deadline, or returned an invalid value."""
        if self.counters is not None:
            self.counters.count("policy_failures_total", check=hook)
        if self._logs_errors:
            self._note("hook-failed", 0, None, hook, hook_point, cause)

    def state_failed(self, cause: str) -> None:
        """Greylisting and rates are not available, were reset, or cannot be saved."""
        if self._logs_errors:
            self._note("state-failed", 0, None, cause)

    def users_failed(self, cause: str) -> None:
        """A users file has changed and cannot be read, or no longer exists."""
        if self._logs_errors:
            self._note("users-failed", 0, None, cause)

    def users_read(self, file: str, users: int) -> None:
        """A users file was read again and has `users` users."""
        if self._logs_errors:
            self._note("users-read", 0, None, file, users)

    # ---- connections

    def connected(self, session: int, peer: Peer, listener: str) -> None:
        """A connection was accepted."""
        if self._shows(session):
            self._note("connected", session, peer, listener)

    def rejected_connection(self, session: int, peer: Peer, listener: str, reply: Reply) -> None:
        """A connection was refused before its first command."""
        if self.logs_mail:
            self._note("rejected", session, peer, listener, reply)

    def tls(self, session: int, peer: Peer, info: TlsInfo) -> None:
        """A TLS handshake was completed."""
        if self.counters is not None:
            self.counters.count("tls_handshakes_total", version=info.version, result="ok")
        if self._shows(session):
            self._note("tls", session, peer, info.version, info.cipher)

    def authenticated(self, session: int, peer: Peer, name: str, mechanism: str) -> None:
        """A client has authenticated."""
        if self.counters is not None:
            self.counters.count("auth_total", mechanism=mechanism, result="ok")
        if self.logs_mail:
            self._note("authenticated", session, peer, name, mechanism)

    def auth_failed(self, session: int, peer: Peer, name: str, mechanism: str, cause: str) -> None:
        """An authentication has failed."""
        if self.counters is not None:
            self.counters.count("auth_total", mechanism=mechanism, result="failed")
        if self.logs_mail:
            self._note("auth-failed", session, peer, name, mechanism, cause)

    def disconnected(
        self, session: int, peer: Peer, messages: int, errors: int, octets: int, seconds: float, cause: str
    ) -> None:
        """A session has ended; `cause` is the reason: "QUIT", a timeout, or a connection error."""
        if self._shows(session):
            self._note("disconnected", session, peer, messages, errors, octets, round(seconds, 3), cause)

    # ---- mail

    def refused(self, session: int, peer: Peer, verb: str, reply: Reply, sender: Path | None, subject: str) -> None:
        """A command was refused by a decision, not for its syntax; `subject` is its argument."""
        if self.logs_mail:
            self._note("refused", session, peer, verb, reply, sender, subject)

    def accepted(
        self,
        session: int,
        peer: Peer,
        message_id: MessageId,
        sender: Path | None,
        recipients: Sequence[Recipient],
        octets: int,
        reply: Reply,
    ) -> None:
        """A message with `octets` octets of body was accepted. The list of recipients must not change afterwards."""
        if self.logs_mail:
            self._note("accepted", session, peer, message_id, sender, recipients, octets, reply)

    def tolerated(self, session: int, peer: Peer, message_id: MessageId, kinds: Sequence[str]) -> None:
        """The commands of a message had irregularities that the tolerant mode lets through."""
        if self.logs_mail:
            self._note("tolerated", session, peer, message_id, ",".join(sorted(set(kinds))))

    def monitored(self, session: int, peer: Peer, check: str, hook_point: str, reply: Reply) -> None:
        """A check in monitor mode would have refused something with this reply; a 2xx reply describes its action."""
        if self.logs_mail:
            self._note("monitored", session, peer, check, hook_point, reply)

    def judged(self, session: int, peer: Peer, message_id: str, verdict: str, score: float, checks: str) -> None:
        """A message was judged: "accept", "quarantine", "defer" or "reject", and what each check has found."""
        if self.logs_mail:
            self._note("judged", session, peer, message_id, verdict, round(score, 3), checks)

    def list_failed(self, zone: str, cause: str) -> None:
        """A DNS list is not used: its self-test has failed, or it has returned an error."""
        if self._logs_errors:
            self._note("list-failed", 0, None, zone, cause)

    def list_works(self, zone: str) -> None:
        """A DNS list has passed its self-test, and is used."""
        if self._logs_errors:
            self._note("list-works", 0, None, zone)

    def lost(self, session: int, peer: Peer, sender: Path | None, cause: str) -> None:
        """A message began and did not end."""
        if self.logs_mail:
            self._note("lost", session, peer, sender, cause)

    # ---- the relay

    def recovered(self, messages: int, interrupted: int, swept: int) -> None:
        """The spool was opened: waiting messages, attempts that were interrupted, orphaned files that were removed."""
        if self.logs_connections:
            self._note("recovered", 0, None, messages, interrupted, swept)

    def attempted(self, message_id: str, to: Recipients, hop: str, attempts: int) -> None:
        """A message is tried again at a next hop."""
        if self.logs_mail:
            self._note("attempted", 0, None, message_id, to, hop, attempts)

    def delivered(self, message_id: str, to: Recipients, hop: str, reply: str, attempts: int, seconds: float) -> None:
        """A message was delivered to recipients, `seconds` after its arrival."""
        if self.logs_mail:
            self._note("delivered", 0, None, message_id, to, hop, reply, attempts, round(seconds, 3))

    def deferred(self, message_id: str, to: Recipients, hop: str, reply: str, attempts: int, wait: float) -> None:
        """A delivery has failed temporarily; it is retried after `wait` seconds."""
        if self.logs_mail:
            self._note("deferred", 0, None, message_id, to, hop, reply, attempts, round(wait))

    def bounced(self, message_id: str, to: Recipients, hop: str, reply: str, attempts: int, report: str) -> None:
        """A delivery has failed permanently; `report` says whether the sender is notified."""
        if self.logs_mail:
            self._note("bounced", 0, None, message_id, to, hop, reply, attempts, report)

    def reported(self, report_id: str, message_id: str, action: str, sender: Path) -> None:
        """A delivery report was sent to the sender of a message, as a new message."""
        if self.counters is not None:
            self.counters.count("reports_total", kind=action)
        if self.logs_mail:
            self._note("reported", 0, None, report_id, message_id, action, sender)

    # ---- operators

    def operated(self, action: str, message_id: str, recipients: int) -> None:
        """An operator held, released, retried, dropped or returned recipients of a message with `penstock spool`."""
        if self.logs_mail:
            self._note("operated", 0, None, action, message_id, recipients)

    def suspended(self, name: str, *, is_over: bool = False) -> None:
        """An operator suspended a domain or a next hop, or resumed it."""
        if self.logs_mail:
            self._note("route-resumed" if is_over else "route-suspended", 0, None, name)

    def clock_jumped(self, seconds: float, rescheduled: int) -> None:
        """The clock of the machine was set forward, or back if negative; recipients were given other due times."""
        if self.counters is not None:
            self.counters.count("clock_jumps_total")
        if self._logs_errors:
            self._note("clock-jumped", 0, None, round(seconds), rescheduled)

    # ---- next hops

    def sts_failed(self, domain: str, cause: str) -> None:
        """A domain has an MTA-STS policy that cannot be fetched or read. A cached one is still used."""
        if self.logs_mail:
            self._note("sts-failed", 0, None, domain, cause)

    def hop_down(self, hop: str, cause: str, seconds: float) -> None:
        """A next hop has failed repeatedly and is not tried for `seconds` seconds."""
        if self._logs_errors:
            self._note("hop-down", 0, None, hop, cause, seconds)

    def hop_up(self, hop: str) -> None:
        """A next hop that was down accepts mail again."""
        if self._logs_errors:
            self._note("hop-up", 0, None, hop)

    def cluster(self, server: str, cause: str) -> None:
        """A connection to a server of the replicated queue was made, or lost if there is a cause."""
        if self._logs_errors:
            self._note("cluster", 0, None, server, cause)

    # ---- lines

    def _note(self, event: str, session: int, peer: Peer | None, *values: Any) -> None:
        waiting = self._waiting
        if len(waiting) >= _BATCH:
            self._format()
        if self._made + len(waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        waiting.append((self._clock(), event, session, peer, values))

    def _format(self) -> None:
        """Format the waiting events, a batch at a time while their values are in the cache."""
        if self._human:
            lines = [_human_line(*record) for record in self._waiting]
        else:
            lines = [_journal.line(*record) or _json_line(*record) for record in self._waiting]
        self._lines.append(b"".join(lines))
        self._made += len(self._waiting)
        self._waiting.clear()

    def tell_dropped(self, events: int) -> bytes:
        """Return the line that reports lines that could not be written. Any thread may call it."""
        self._count_dropped(events)
        line = _human_line if self._human else _json_line
        return line(self._clock(), "dropped", 0, None, (events,))

    def _count_dropped(self, events: int) -> None:
        if self.counters is not None:
            self.counters.count("journal_dropped_total", events)

    def drain(self) -> bytes:
        """Return the lines of all events since the last call; b"" if there were none."""
        if self._dropped:
            self._count_dropped(self._dropped)
            self._waiting.append((self._clock(), "dropped", 0, None, (self._dropped,)))
            self._dropped = 0
        if self._waiting:
            self._format()
        lines, self._lines = self._lines, []
        self._made = 0
        return b"".join(lines)


# The names of the values of each event, in the order of the arguments of its method.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "listening": ("address", "listener"),
    "limited": ("key", "wanted", "value", "cause"),
    "stopping": ("sessions",),
    "stopped": (),
    "dropped": ("events",),
    "error": ("where", "error"),
    "reloaded": ("what",),
    "reload-refused": ("cause",),
    "reload-failed": ("cause",),
    "draining": ("sessions",),
    "resumed": (),
    "state": ("state",),
    "shortage": ("cause", "failures"),
    "hook-failed": ("hook", "hook_point", "cause"),
    "state-failed": ("cause",),
    "users-failed": ("cause",),
    "users-read": ("file", "users"),
    "connected": ("listener",),
    "rejected": ("listener", "reply"),
    "tls": ("version", "cipher"),
    "authenticated": ("name", "mechanism"),
    "auth-failed": ("name", "mechanism", "cause"),
    "disconnected": ("messages", "errors", "octets", "seconds", "cause"),
    "refused": ("verb", "reply", "from", "subject"),
    "accepted": ("id", "from", "to", "size", "reply"),
    "tolerated": ("id", "kinds"),
    "monitored": ("check", "hook_point", "reply"),
    "judged": ("id", "verdict", "score", "checks"),
    "list-failed": ("zone", "cause"),
    "list-works": ("zone",),
    "lost": ("from", "cause"),
    "recovered": ("messages", "interrupted", "swept"),
    "attempted": ("id", "to", "hop", "attempts"),
    "delivered": ("id", "to", "hop", "reply", "attempts", "seconds"),
    "deferred": ("id", "to", "hop", "reply", "attempts", "wait"),
    "bounced": ("id", "to", "hop", "reply", "attempts", "report"),
    "reported": ("id", "about", "action", "sender"),
    "hop-down": ("hop", "cause", "seconds"),
    "hop-up": ("hop",),
    "sts-failed": ("domain", "cause"),
    "cluster": ("server", "cause"),
    "operated": ("action", "id", "recipients"),
    "route-suspended": ("name",),
    "route-resumed": ("name",),
    "clock-jumped": ("seconds", "rescheduled"),
}


def _fields(event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> Fields:
    """Return the fields of a line: numbers, escaped texts, or lists of them."""
    fields: Fields = {}
    if session:
        fields["session"] = session
    if peer is not None:
        fields["peer"] = peer.address or "unix"
        if peer.proxy:
            fields["proxy"] = peer.proxy
    for name, value in zip(_NAMES[event], values, strict=True):
        if value is None or value == "":
            continue
        if isinstance(value, Reply):
            fields["reply"] = _reply_text(value)
            if value.cause:
                fields["cause"] = escape(value.cause)
        elif name == "to":
            fields["to"] = [escape(recipient.path.text) for recipient in value[:_MAX_RECIPIENTS]]
            fields["recipients"] = len(value)
        elif isinstance(value, dict):
            fields |= value
        elif isinstance(value, BaseException):
            fields["error"] = escape(f"{type(value).__name__}: {value}")
            fields["trace"] = _trace(value)
        else:
            fields[name] = value if isinstance(value, int | float) else escape(str(value))
    return fields


def _trace(exc: BaseException) -> list[str]:
    """Return the innermost frames of a traceback, one text each."""
    frames = traceback.extract_tb(exc.__traceback__)[-5:]
    return [escape(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}") for frame in frames]


def _reply_text(reply: Reply) -> str:
    """Return a reply as the client reads it."""
    return escape(f"{reply.code} {reply.status} {reply.text}" if reply.status else f"{reply.code} {reply.text}")


_MILLISECONDS: Final = tuple(f"{i:03d}" for i in range(1000))
_encoder: Final = msgspec.json.Encoder()
_seconds: list[dict[int, str]] = [{}, {}]


def _stamp(when: float, human: int) -> str:
    """Return the time of a line with milliseconds. Each second is formatted once."""
    milliseconds = int(when * 1000)
    second = milliseconds // 1000
    name = _seconds[human].get(second)
    if name is None:
        shape, parts = ("%H:%M:%S.", time.localtime(when)) if human else ("%Y-%m-%dT%H:%M:%S.", time.gmtime(when))
        name = time.strftime(shape, parts)
        _seconds[human] = {second: name}
    return name + _MILLISECONDS[milliseconds % 1000]


def _json_line(when: float, event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> bytes:
    return (
        _encoder.encode({"time": f"{_stamp(when, 0)}Z", "event": event, **_fields(event, session, peer, values)})
        + b"\n"
    )


_IN_BRACKETS: Final = str.maketrans({" ": r"\x20", "<": r"\x3c", ">": r"\x3e"})
"""A quoted local part may contain all three, and could otherwise forge further fields after its brackets."""


def _human_line(when: float, event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> bytes:
    pairs = []
    for name, value in _fields(event, session, peer, values).items():
        if name in ("from", "to"):
            boxes = [value] if name == "from" else value
            pairs.append(f"{name}={','.join(f'<{box.translate(_IN_BRACKETS)}>' for box in boxes)}")
        elif isinstance(value, list):
            pairs.append(f"{name}={'|'.join(value)}")
        elif isinstance(value, str) and (" " in value or '"' in value):
            quoted = value.replace('"', r"\"")  # backslashes are doubled by `escape`
            pairs.append(f'{name}="{quoted}"')
        else:
            pairs.append(f"{name}={value}")
    return f"{_stamp(when, 1)} {event:<13} {' '.join(pairs)}\n".encode()
