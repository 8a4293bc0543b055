"""The dialog of a test's server: what was said, for the report of a test that fails.

Commands and replies are noted where the session reads and makes them, so that each reply stands below its command
although pipelined ones leave together; connections, TLS and failures come from the journal. Passwords are not noted:
the report of a test is public in many places.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from penstock.journal import Journal, JournalSettings, escape
from penstock.message import Path
from penstock.reply import Reply
from penstock.sink.faults import AppliedFault, FaultLog
from penstock.transaction import Peer, TlsInfo

MOST_LINES: Final = 1000
"""Lines a dialog keeps; the oldest are forgotten."""


class Dialog:
    """The last lines of all sessions: "#1 C: MAIL FROM:<alice@example.org>". For any thread."""

    def __init__(self, most: int = MOST_LINES) -> None:
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=most)

    def note(self, session: int, who: str, text: str) -> None:
        """Note a line: of the client ("C:"), of the server ("S:"), or about them ("--"). Escaped, and cut at 256."""
        with self._lock:
            self._lines.append(f"#{session} {who} {escape(text)}".rstrip())

    def lines(self) -> list[str]:
        """Return the lines, the oldest first."""
        with self._lock:
            return list(self._lines)

    def clear(self) -> None:
        """Forget all lines."""
        with self._lock:
            self._lines.clear()


class NotedJournal(Journal):
    """A journal that notes in the dialog what no command and no reply tells, and keeps what went wrong in here."""

    def __init__(self, dialog: Dialog) -> None:
        super().__init__(JournalSettings(events="none"))
        self.logs_connections = True  # so that `disconnected` is called; what is noted elsewhere is not written
        self._dialog = dialog
        self.failures: list[BaseException] = []
        """What was thrown where nothing should be; the first hundred."""

    def connected(self, session: int, peer: Peer, listener: str) -> None:
        """Note a client."""
        self._dialog.note(session, "--", f"connected from {peer.literal}:{peer.port}")

    def rejected_connection(self, session: int, peer: Peer, listener: str, reply: Reply) -> None:
        """Note a client that was turned away."""
        self._dialog.note(session, "--", f"turned away: {reply.code} {reply.text} {reply.cause}")

    def tls(self, session: int, peer: Peer, info: TlsInfo) -> None:
        """Note what TLS agreed on."""
        self._dialog.note(session, "--", f"{info.version} with {info.cipher}")

    def authenticated(self, session: int, peer: Peer, name: str, mechanism: str) -> None:
        """Note who has proved to be whom."""
        self._dialog.note(session, "--", f"is {name}, by {mechanism}")

    def auth_failed(self, session: int, peer: Peer, name: str, mechanism: str, cause: str) -> None:
        """Note why an authentication failed."""
        self._dialog.note(session, "--", f"{mechanism} failed for {name!r}: {cause}")

    def refused(self, session: int, peer: Peer, verb: str, reply: Reply, sender: Path | None, subject: str) -> None:
        """Note the cause of a refusal, where the reply does not tell it."""
        if reply.cause:
            self._dialog.note(session, "--", f"{verb} {subject} refused: {reply.cause}")

    def lost(self, session: int, peer: Peer, sender: Path | None, cause: str) -> None:
        """Note a message that did not end."""
        self._dialog.note(session, "--", f"the message was lost: {cause}")

    def disconnected(
        self, session: int, peer: Peer, messages: int, errors: int, octets: int, seconds: float, cause: str
    ) -> None:
        """Note the end of a session."""
        self._dialog.note(session, "--", f"the end, after {messages} messages and {seconds:.3f} s: {cause}")

    def hook_failed(self, hook: str, hook_point: str, cause: str) -> None:
        """Note what a policy threw: its client hears 451, as in earnest."""
        self._dialog.note(0, "--", f"{hook}.{hook_point} failed: {cause}")

    def error(self, session: int, where: str, exc: BaseException) -> None:
        """Keep a bug, or what the machine lacked."""
        self._dialog.note(session, "--", f"{where} failed: {type(exc).__name__}: {exc}")
        if len(self.failures) < 100:
            self.failures.append(exc)


class NotedFaults(FaultLog):
    """Statistics of faults that are noted in the dialog: a reply that goes out wrong stands there as it should be."""

    def __init__(self, dialog: Dialog) -> None:
        super().__init__()
        self._dialog = dialog

    def on_fault(self, fault: AppliedFault) -> None:
        """Note it."""
        super().on_fault(fault)
        self._dialog.note(fault.session, "--", f"fault {fault.rule!r} in phase {fault.phase}: {fault.action}")
