"""The journal: one method for each mail event, one line for each call.

An event costs the session one tuple in a bounded queue; lines are made of it later, by `drain`, away from the hot
path. Whatever came from a client is escaped and cut: no octet of a client reaches a log as it is.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec

from penstock.message import Message, Path
from penstock.reply import Reply
from penstock.transaction import Peer, TlsInfo

_MOST_WAITING: Final = 65_536
"""Events that may wait for `drain`; those beyond are counted and dropped."""
_MOST_TEXT: Final = 256
"""Characters of a value."""
_MOST_RECIPIENTS: Final = 10

Fields = dict[str, Any]


class JournalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The journal on standard error."""

    format: Annotated[
        Literal["auto", "human", "json"],
        msgspec.Meta(description="auto: human on a terminal, json elsewhere"),
    ] = "auto"
    events: Annotated[
        Literal["all", "mail", "errors", "none"],
        msgspec.Meta(description="mail: without connections that come and go; errors: what went wrong here"),
    ] = "all"


def escape(text: str) -> str:
    r"""Return text that is safe in a log line: printable, one line, at most 256 characters.

    Controls, line separators, bidirectional controls and lone surrogates become \xNN or \uNNNN.
    """
    if len(text) > _MOST_TEXT:
        text = text[: _MOST_TEXT - 3] + "..."
    if text.isprintable():
        return text.replace("\\", "\\\\")
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


class Journal:
    """Takes events and makes lines of them. Not for several threads."""

    def __init__(
        self, settings: JournalSettings, *, is_terminal: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._human = settings.format == "human" or (settings.format == "auto" and is_terminal)
        self._clock = clock
        self._waiting: deque[tuple[float, str, int, Peer | None, tuple[Any, ...]]] = deque()
        self._dropped = 0
        self._logs_connections = settings.events == "all"
        self.logs_mail = settings.events in ("all", "mail")
        """Mail events are wanted: what is noted of them need not be made otherwise."""
        self._logs_errors = settings.events != "none"

    # ---- the server

    def listening(self, address: str, listener: str) -> None:
        """A listener is open."""
        if self._logs_connections:
            self._note("listening", 0, None, address, listener)

    def stopping(self, sessions: int) -> None:
        """The server stops accepting; so many sessions are open."""
        if self._logs_connections:
            self._note("stopping", 0, None, sessions)

    def stopped(self) -> None:
        """The last session is over."""
        if self._logs_connections:
            self._note("stopped", 0, None)

    def error(self, session: int, where: str, exc: BaseException) -> None:
        """Something went wrong that is nobody's mail: a bug, or the machine."""
        if self._logs_errors:
            self._note("error", session, None, where, exc)

    def hook_failed(self, hook: str, milestone: str, cause: str) -> None:
        """A policy threw, took too long, or answered nonsense."""
        if self._logs_errors:
            self._note("hook-failed", 0, None, hook, milestone, cause)

    # ---- connections

    def connected(self, session: int, peer: Peer, listener: str) -> None:
        """A client was let in."""
        if self._logs_connections:
            self._note("connected", session, peer, listener)

    def rejected_connection(self, session: int, peer: Peer, listener: str, reply: Reply) -> None:
        """A client was turned away before its first command."""
        if self.logs_mail:
            self._note("rejected", session, peer, listener, reply)

    def tls(self, session: int, peer: Peer, info: TlsInfo) -> None:
        """TLS began."""
        if self._logs_connections:
            self._note("tls", session, peer, info.version, info.cipher)

    def authenticated(self, session: int, peer: Peer, name: str, mechanism: str) -> None:
        """A client has proved to be somebody."""
        if self.logs_mail:
            self._note("authenticated", session, peer, name, mechanism)

    def auth_failed(self, session: int, peer: Peer, name: str, mechanism: str, cause: str) -> None:
        """A client has not."""
        if self.logs_mail:
            self._note("auth-failed", session, peer, name, mechanism, cause)

    def disconnected(self, session: int, peer: Peer, messages: int, errors: int, octets: int, seconds: float) -> None:
        """A session is over."""
        if self._logs_connections:
            self._note("disconnected", session, peer, messages, errors, octets, round(seconds, 3))

    # ---- mail

    def refused(self, session: int, peer: Peer, verb: str, reply: Reply, sender: Path | None, subject: str) -> None:
        """A command was refused by a decision (not by the syntax); `subject` is what it was about."""
        if self.logs_mail:
            self._note("refused", session, peer, verb, reply, sender, subject)

    def accepted(self, session: int, peer: Peer, message: Message, reply: Reply) -> None:
        """A message was taken."""
        if self.logs_mail:
            self._note("accepted", session, peer, message.id, message.envelope, message.body.size, reply)

    def lost(self, session: int, peer: Peer, sender: Path | None, cause: str) -> None:
        """A message that had begun did not end."""
        if self.logs_mail:
            self._note("lost", session, peer, sender, cause)

    # ---- next hops

    def hop_down(self, hop: str, cause: str, seconds: float) -> None:
        """A next hop has failed again and again, and is left alone for a while."""
        if self._logs_errors:
            self._note("hop-down", 0, None, hop, cause, seconds)

    def hop_up(self, hop: str) -> None:
        """A next hop that was left alone takes mail again."""
        if self._logs_errors:
            self._note("hop-up", 0, None, hop)

    # ---- lines

    def _note(self, event: str, session: int, peer: Peer | None, *values: Any) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.append((self._clock(), event, session, peer, values))

    def drain(self) -> bytes:
        """Return the lines of all events since the last call; b"" when there were none."""
        if not self._waiting:
            return b""
        waiting, self._waiting = self._waiting, deque()
        if self._dropped:
            waiting.append((self._clock(), "dropped", 0, None, (self._dropped,)))
            self._dropped = 0
        line = _human_line if self._human else _json_line
        return b"".join([line(*record) for record in waiting])


# The names of the values of each event, in the order of its method's arguments.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "listening": ("address", "listener"),
    "stopping": ("sessions",),
    "stopped": (),
    "dropped": ("events",),
    "error": ("where", "error"),
    "hook-failed": ("hook", "milestone", "cause"),
    "connected": ("listener",),
    "rejected": ("listener", "reply"),
    "tls": ("version", "cipher"),
    "authenticated": ("name", "mechanism"),
    "auth-failed": ("name", "mechanism", "cause"),
    "disconnected": ("messages", "errors", "octets", "seconds"),
    "refused": ("verb", "reply", "from", "subject"),
    "accepted": ("id", "envelope", "size", "reply"),
    "lost": ("from", "cause"),
    "hop-down": ("hop", "cause", "seconds"),
    "hop-up": ("hop",),
}


def _fields(event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> Fields:
    """Return the fields of a line, each a number, an escaped text, or a list of those."""
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
            fields["reply"] = escape(f"{value.code} {value.status or ''} {value.text}".replace("  ", " "))
            if value.cause:
                fields["cause"] = escape(value.cause)
        elif name == "envelope":
            fields["from"] = escape(value.sender.text)
            fields["to"] = [escape(recipient.path.text) for recipient in value.recipients[:_MOST_RECIPIENTS]]
            fields["recipients"] = len(value.recipients)
        elif isinstance(value, BaseException):
            fields["error"] = escape(f"{type(value).__name__}: {value}")
            fields["trace"] = _trace(value)
        else:
            fields[name] = value if isinstance(value, int | float) else escape(str(value))
    return fields


def _trace(exc: BaseException) -> list[str]:
    """Return the innermost frames of a trace, a text each."""
    frames = traceback.extract_tb(exc.__traceback__)[-5:]
    return [escape(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}") for frame in frames]


def _json_line(when: float, event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> bytes:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when * 1000) % 1000:03d}Z"
    return msgspec.json.encode({"time": stamp, "event": event, **_fields(event, session, peer, values)}) + b"\n"


_IN_BRACKETS: Final = str.maketrans({" ": r"\x20", "<": r"\x3c", ">": r"\x3e"})
"""A quoted local part may hold all three, and would write fields of its own behind its brackets."""


def _human_line(when: float, event: str, session: int, peer: Peer | None, values: tuple[Any, ...]) -> bytes:
    stamp = time.strftime("%H:%M:%S", time.localtime(when)) + f".{int(when * 1000) % 1000:03d}"
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
    return f"{stamp} {event:<13} {' '.join(pairs)}\n".encode()
