"""Observes the dialog of a session: commands, message text and replies, without passwords."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

from penstock.smtp import _wire
from penstock.smtp._wire import VERBS
from penstock.smtp.server import OUTPUT_TAKEN, ServerSession
from penstock.smtp.states import State

Side = Literal["C:", "S:"]
Note = Callable[[Side, str], None]
"""Gets a line of the client ("C:") or of the server ("S:"), not escaped."""

_NO_MECHANISM: Final = re.compile(r"[^A-Za-z0-9_-]")


class DialogObserver:
    """The `observer` of a ServerSession that notes its dialog.

    Commands and replies are noted where the session reads and makes them, so each reply follows its command even if the
    client pipelines.
    """

    __slots__ = ("_is_after_auth", "_note", "_noted", "_session", "_text_left", "_text_octets")

    def __init__(self, session: ServerSession, note: Note, *, text_octets: int = 0) -> None:
        """Of each text, the first `text_octets` octets are noted as well."""
        self._session = session
        self._note = note
        self._text_octets = self._text_left = text_octets
        self._is_after_auth = False
        """No command was known since AUTH."""
        self._noted = 0
        """Replies in the output that were noted."""

    def __call__(self, token: int) -> None:
        """Note a token of the wire, or the output that is about to be sent."""
        if token == OUTPUT_TAKEN:
            self._note_replies()
            self._noted = 0
        elif token == _wire.CHUNK:
            self._note_replies()
            self._note_text(bytes(self._session.wire.chunk[: self._text_left]))
        elif token != _wire.NEED_DATA:
            self._note_replies()
            self._note("C:", self._line(token))

    def _line(self, token: int) -> str:
        if token == _wire.COMMAND:
            return self._command()
        if token == _wire.TEXT_END:
            self._text_left = self._text_octets
            return f"({self._session.wire.octets} octets of text)"
        return "(a line, or a text, that breaks a rule)"

    def _note_text(self, data: bytes) -> None:
        self._text_left -= len(data)
        for line in data.splitlines():
            self._note("C:", line.decode("utf-8", "replace"))

    def _command(self) -> str:
        """Return the command without its secrets."""
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
                self._note("S:", "334 (a challenge)" if line.startswith("334") else line)
        self._noted = len(output)
