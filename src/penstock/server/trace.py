"""Traces: the full dialogs of selected sessions in a file, for support. Passwords and challenges are masked.

A trace is a line of JSON for each line of the dialog: time, session (the number of the journal), peer, listener, side
("C:" the client, "S:" the server) and text. A session is selected by the network of the client when it is greeted, and
by a sender or a recipient when those are known: earlier lines are kept until then.

Everything is bounded: `most` sessions, 256 KiB of each, 1 KiB of each message text, and 8 MiB that wait for the disk.
Further lines are dropped, and their number is written.
"""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import trio

from penstock.addresses import Network, parse_address, parse_network
from penstock.journal import escape
from penstock.server.connection import Connection
from penstock.server.dialog import DialogObserver, Side
from penstock.transaction import Peer

_PATH: Final = re.compile(r"(MAIL|RCPT) [A-Z]+:\s*<?([^\s>]*)", re.IGNORECASE)
_TEXT_OCTETS: Final = 1024
_SESSION_OCTETS: Final = 256 * 1024
_MOST_WAITING: Final = 8 << 20
_MOST_KEPT: Final = 64 * 1024
"""Octets of a session that is not selected yet."""
_INTERVAL: Final = 0.5
"""Seconds that lines may wait before they are written."""


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Full dialogs of selected sessions. A session is traced if it meets all given conditions."""

    networks: Annotated[tuple[str, ...], msgspec.Meta(description="Networks of clients")] = ()
    sender: Annotated[str, msgspec.Meta(description="Sender; * matches any text: *@example.com")] = ""
    recipient: Annotated[str, msgspec.Meta(description="Recipient; * matches any text")] = ""
    most: Annotated[int, msgspec.Meta(ge=1, le=1_000_000, description="Maximum traced sessions of a worker")] = 1000
    file: Annotated[
        str, msgspec.Meta(min_length=1, description="File that lines are appended to, relative to data_dir")
    ] = "trace.jsonl"


class Trace:
    """Writes the dialogs that one `[[trace]]` selects."""

    def __init__(self, settings: TraceSettings, data_dir: Path) -> None:
        self.settings = settings
        self.sessions = 0
        """Sessions selected so far."""
        self._file = data_dir / settings.file
        self._networks: list[Network] = [parse_network(network) for network in settings.networks]
        self._waiting: list[bytes] = []
        self._octets = 0
        self._dropped = 0

    @property
    def is_full(self) -> bool:
        """No further session is traced."""
        return self.sessions >= self.settings.most

    def wants_peer(self, peer: Peer) -> bool:
        """Return whether a client is in one of the networks."""
        if not self._networks:
            return True
        return bool(peer.address) and any(parse_address(peer.address) in network for network in self._networks)

    def wants(self, sender: str | None, recipient: str | None) -> bool:
        """Return whether the paths of a transaction fulfil the conditions; None for one that is not known yet."""
        return _matches(sender, self.settings.sender) and _matches(recipient, self.settings.recipient)

    def add(self, lines: Sequence[bytes]) -> None:
        """Write lines soon."""
        for line in lines:
            if self._octets + len(line) > _MOST_WAITING:
                self._dropped += 1
            else:
                self._waiting.append(line)
                self._octets += len(line)

    def flush(self) -> None:
        """Write the waiting lines. Raise OSError; then they are dropped, and their number is written later."""
        lines, self._waiting, self._octets = self._waiting, [], 0
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(msgspec.json.encode({"time": time.time(), "dropped": dropped}) + b"\n")
        if not lines:
            return
        try:
            # Opened each time: log rotation needs no signal.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with open(descriptor, "ab", buffering=0) as file:  # noqa: PTH123 - of a descriptor
                file.write(b"".join(lines))
        except OSError:
            self._dropped += len(lines) + dropped
            raise


def _matches(text: str | None, pattern: str) -> bool:
    return not pattern or (text is not None and fnmatch.fnmatchcase(text.lower(), pattern.lower()))


class Traces:
    """All `[[trace]]` tables of a worker."""

    def __init__(self, settings: Sequence[TraceSettings], data_dir: Path) -> None:
        """Raise ValueError for a wrong network."""
        self._traces = [Trace(each, data_dir) for each in settings]

    def watch(self, connection: Connection) -> None:
        """Observe a new connection: a component of penstock.server.connection."""
        if connection.session.observer is None and not all(trace.is_full for trace in self._traces):
            connection.session.observer = _Selector(connection, self._traces)

    async def run(self) -> None:
        """Write from time to time until cancelled, then the rest."""
        try:
            while True:
                await trio.sleep(_INTERVAL)
                await trio.to_thread.run_sync(self._flush)
        finally:
            self._flush()

    def _flush(self) -> None:
        for trace in self._traces:
            try:
                trace.flush()
            except OSError:
                continue  # the number is written when the file can be written again


class _Selector:
    """The observer of a session that may be traced."""

    __slots__ = (
        "_candidates", "_connection", "_kept", "_kept_octets", "_observer", "_recipient", "_selected", "_sender",
        "_written",
    )  # fmt: skip

    def __init__(self, connection: Connection, traces: Sequence[Trace]) -> None:
        self._connection = connection
        self._candidates = [*traces]
        """Traces whose conditions can still become true."""
        self._sender: str | None = None
        self._recipient: str | None = None
        """The paths of the last MAIL and RCPT, whether they were accepted or not."""
        self._selected: list[Trace] = []
        self._kept: list[bytes] = []
        self._kept_octets = 0
        self._written = 0
        self._observer = DialogObserver(connection.session, self._note, text_octets=_TEXT_OCTETS)

    def __call__(self, token: int) -> None:
        """Note a token of the wire."""
        if not self._kept and not self._selected:
            self._begin()
        if self._connection.session.observer is self:
            self._observer(token)
            self._select()

    def _begin(self) -> None:
        """Stop observing if no trace selects the network of the client, which is known now, also with a proxy."""
        peer = self._connection.peer
        self._candidates = [trace for trace in self._candidates if not trace.is_full and trace.wants_peer(peer)]
        if not self._candidates:
            self._connection.session.observer = None

    def _select(self) -> None:
        """Write the dialog so far to the traces whose conditions have become true."""
        if not self._candidates:
            return
        for trace in [each for each in self._candidates if each.wants(self._sender, self._recipient)]:
            self._candidates.remove(trace)
            if not trace.is_full:
                trace.sessions += 1
                self._selected.append(trace)
                trace.add(self._kept)
        if not self._candidates:
            self._kept = []

    def _note(self, side: Side, text: str) -> None:
        connection = self._connection
        if side == "C:" and self._candidates and (found := _PATH.match(text)):
            if found[1].upper() == "MAIL":
                self._sender, self._recipient = found[2], None
            else:
                self._recipient = found[2]
        fields: dict[str, Any] = {
            "time": round(time.time(), 3),
            "session": connection.number,
            "peer": connection.peer.address or "unix",
            "listener": connection.listener.name,
            "side": side,
            "text": escape(text),
        }
        line = msgspec.json.encode(fields) + b"\n"
        if self._selected and self._written < _SESSION_OCTETS:
            self._written += len(line)
            for trace in self._selected:
                trace.add([line])
        if self._candidates and self._kept_octets < _MOST_KEPT:
            self._kept_octets += len(line)
            self._kept.append(line)
