"""The dialog of a test's server: what was said, for the report of a test that fails.

Commands and replies are noted where the session reads and makes them, so that each reply stands below its command
although pipelined ones leave together; connections, TLS and failures come from the journal. Passwords are not noted:
the report of a test is public in many places.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from typing import Final

from penstock.journal import Journal, JournalSettings, escape
from penstock.message import Path
from penstock.reply import Reply
from penstock.sink.faults import AppliedFault, FaultLog
from penstock.smtp import _wire
from penstock.smtp._wire import VERBS
from penstock.smtp.server import OUTPUT_TAKEN, ServerSession
from penstock.smtp.states import State
from penstock.transaction import Peer, TlsInfo

_NO_MECHANISM: Final = re.compile(r"[^A-Za-z0-9_-]")
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


class DialogObserver:
    """Notes the dialog of one session (the `observer` of a ServerSession)."""

    __slots__ = ("_dialog", "_is_after_auth", "_noted", "_number", "_session")

    def __init__(self, session: ServerSession, dialog: Dialog, number: int) -> None:
        self._session = session
        self._dialog = dialog
        self._number = number
        self._is_after_auth = False
        """No command was known since AUTH."""
        self._noted = 0
        """Replies in the output that were noted."""

    def __call__(self, token: int) -> None:
        """Note what the wire has found, and what is about to be sent."""
        if token == OUTPUT_TAKEN:
            self._note_replies()
            self._noted = 0
            return
        if token in (_wire.NEED_DATA, _wire.CHUNK):
            return
        self._note_replies()
        if token == _wire.COMMAND:
            text = self._command()
        elif token == _wire.TEXT_END:
            text = f"({self._session.wire.octets} octets of text)"
        else:
            text = "(a line, or a text, that breaks a rule)"
        self._dialog.note(self._number, "C:", text)

    def _command(self) -> str:
        """Return the command without what is secret in it."""
        wire = self._session.wire
        if self._session.state is State.AUTH:
            return "(an answer, not shown)"
        verb = VERBS[wire.verb]
        argument = wire.argument.decode("utf-8", "replace")
        if verb == "AUTH":
            self._is_after_auth = True
            mechanism = _NO_MECHANISM.split(argument, maxsplit=1)[0]
            return f"AUTH {mechanism}{' (initial response, not shown)' if argument.strip() != mechanism else ''}"
        if wire.verb:
            self._is_after_auth = False
            return f"{verb} {argument}"
        # The argument of an unknown verb is its line. A client that misreads the refusal of its AUTH sends its password
        # in place of a command.
        is_secret = self._is_after_auth or argument[:4].upper() == "AUTH"
        return "(no command, not shown after AUTH)" if is_secret else argument

    def _note_replies(self) -> None:
        output = self._session.replies_waiting
        for reply in output[self._noted :]:
            for line in reply.decode("utf-8", "replace").splitlines():
                self._dialog.note(self._number, "S:", "334 (a challenge)" if line.startswith("334") else line)
        self._noted = len(output)


class NotedJournal(Journal):
    """A journal that notes in the dialog what no command and no reply tells, and keeps what went wrong in here."""

    def __init__(self, dialog: Dialog) -> None:
        super().__init__(JournalSettings(events="none"))
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
