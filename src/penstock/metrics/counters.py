"""What one worker counts. Components call the methods; what is counted is in the worker's page (ext/shared.pyx).

Sessions count in compiled code, with a few additions for each reply (`SessionTotals`). Everything here is called less
often than once per message, except for `attempted`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec

from penstock import reply as replies
from penstock.metrics._shared import FIRST_OCTAVE, ListenerTotals, Page, SessionTotals, SharedTable
from penstock.metrics.families import FAMILIES, OTHER, OUTCOMES, SERIES_FROM_THE_START, series

_MOST_REASONS: Final = 128
"""Enhanced status codes that are counted separately."""
_MOST_DESTINATIONS: Final = 4096
"""Destinations of one report; those beyond are counted together."""
_REPLY: Final = re.compile(rb"([2-5]\d\d)[ -](?:([245]\.\d{1,3}\.\d{1,3}) )?")
_END_OF_CAUSE: Final = {
    "QUIT": "quit",
    "the client closed the connection": "closed",
    "turned away": "refused",
    "the server stopped": "shutdown",
    replies.SHUTTING_DOWN.text: "shutdown",
    replies.IDLE_TIMEOUT.text: "timeout",
    replies.DATA_TIMEOUT.text: "timeout",
    replies.SESSION_TIMEOUT.text: "timeout",
    replies.UNEXPECTED.text: "error",
    "the session ended": "dismissed",
}


class Report(msgspec.Struct, frozen=True):
    """Data without a fixed set of names, which a worker sends to the supervisor once a second."""

    destinations: dict[str, list[int]]
    """Attempts since the last report, by destination: one number for each of OUTCOMES."""
    hops: dict[str, tuple[int, int]]
    """Next hops: 1 if it is used, 0 while it is backing off; and its connections."""


class Counters:
    """Counts what a worker does."""

    def __init__(self, page: Page) -> None:
        """Use a page that was started."""
        self.page = page
        self.table = SharedTable(page)
        """The limits that all workers share."""
        self._cells: dict[tuple[str, tuple[str, ...]], int] = {}
        self._reasons: set[str] = set()
        self._destinations: dict[str, list[int]] = {}
        self.sessions = SessionTotals(page, self._code_cell, self._verb_cell)
        for name, labels in SERIES_FROM_THE_START:
            self._cell(name, **labels)
        self._seconds = {name: self._cell(name) for name in ("relay_seconds", "spool_commit_seconds", "spool_batch")}

    # ---- cells

    def _cell(self, name: str, **labels: str) -> int:
        """Return the cell of a series, which is made when it is first used."""
        key = (name, tuple(labels.values()))
        cell = self._cells.get(key)
        if cell is None:
            family = FAMILIES[name]
            kind = {"counter": "c", "gauge": "g"}.get(family.type, family.unit)
            cell = self._cells[key] = self.page.register(kind, series(name, labels))
        return cell

    def count(self, name: str, n: int = 1, /, **labels: str) -> None:
        """Add to a counter. Raise KeyError for a name that is not among FAMILIES."""
        self.page.add(self._cell(name, **labels), n)

    def counting(self, name: str, /, **labels: str) -> Callable[[], None]:
        """Return what adds 1 to a counter, for series that each message counts in. Raise KeyError as `count` does."""
        return partial(self.page.add, self._cell(name, **labels), 1)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self.page.put(self._cell(name, **labels), int(value))

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add to a histogram: seconds, octets or a number."""
        unit = FAMILIES[name].unit
        amount = int(value * 1e9) if unit == "s" else int(value)
        self.page.observe(self._cell(name, **labels), FIRST_OCTAVE[unit], max(0, amount))

    def _code_cell(self, code: int) -> int:
        return self._cell("replies_total", code=str(code))

    def _verb_cell(self, verb: str, kind: int) -> int:
        return self._cell("commands_total", verb=verb, **{"class": f"{kind}xx"})

    # ---- sessions

    def listener(self, name: str, kind: str) -> ListenerTotals:
        """Return what counts the sessions of a listener; `kind` is the kind of its delivery."""

        def cell_of(end: str) -> int:
            return self._cell("sessions_total", listener=name, end=end)

        cells = {cause: cell_of(end) for cause, end in _END_OF_CAUSE.items()}

        def end_cell(cause: str) -> int:
            found = cells.get(cause)
            return cell_of("lost" if cause.startswith("connection lost") else "dismissed") if found is None else found

        accepted = self._cell("messages_accepted_total", listener=name, kind=kind)
        return ListenerTotals(
            self.sessions, self._cell("sessions", listener=name), accepted, end_cell, self._note_refusal
        )

    def _note_refusal(self, phase: str, encoded: bytes) -> None:
        """Count a refused message or recipient by its code and its enhanced status, or a handshake that failed."""
        if phase == "tls":
            self.handshake("none", "failed")
            return
        found = _REPLY.match(encoded)
        code, reason = (found[1].decode(), (found[2] or b"none").decode()) if found else ("other", "none")
        if reason not in self._reasons:
            if len(self._reasons) >= _MOST_REASONS:
                reason = OTHER
            self._reasons.add(reason)
        if phase == "rcpt":
            self.count("recipients_refused_total", code=code, reason=reason)
        else:
            self.count("messages_refused_total", phase=phase, code=code, reason=reason)

    def refused_connection(self, reason: str) -> None:
        """Count a connection that a limit of admission has refused."""
        self.count("admission_refused_total", reason=reason)

    def handshake(self, version: str, result: str) -> None:
        """Count a TLS handshake with a client."""
        self.count("tls_handshakes_total", version=version, result=result)

    def authentication(self, mechanism: str, result: str) -> None:
        """Count an authentication."""
        self.count("auth_total", mechanism=mechanism, result=result)

    # ---- spool, cluster and relay

    def answered_by_cluster(self, result: str, seconds: float) -> None:
        """Count a message that was given to the cluster; its time if a majority has stored it."""
        self.count("jetstream_acks_total", result=result)
        if result == "stored":
            self.observe("jetstream_ack_seconds", seconds)

    def committed(self, seconds: float, requests: int) -> None:
        """Count a transaction of the spool. Any thread may call this."""
        self.page.observe(self._seconds["spool_commit_seconds"], FIRST_OCTAVE["s"], int(seconds * 1e9))
        self.page.observe(self._seconds["spool_batch"], FIRST_OCTAVE["n"], requests)

    def attempted(self, destination: str, outcome: int, recipients: int, seconds: float) -> None:
        """Count the attempt to deliver to recipients of a domain, `seconds` after the message came.

        `outcome` is a place in OUTCOMES.
        """
        self.page.add(self._cell("relay_attempts_total", outcome=OUTCOMES[outcome]), recipients)
        if outcome == 0:
            self.page.observe(self._seconds["relay_seconds"], FIRST_OCTAVE["s"], max(0, int(seconds * 1e9)))
        counts = self._destinations.get(destination)
        if counts is None:
            if len(self._destinations) >= _MOST_DESTINATIONS:
                destination = OTHER
            counts = self._destinations.setdefault(destination, [0] * len(OUTCOMES))
        counts[outcome] += recipients

    def report(self, hops: Mapping[str, tuple[int, int]]) -> None:
        """Report that the worker is alive; send data without a cell if the supervisor has read the last report."""
        self.page.beat()
        if self.page.send(msgspec.json.encode(Report(self._destinations, dict(hops)))):
            self._destinations = {}
