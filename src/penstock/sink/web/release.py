"""Releasing a kept message: it is sent on to a real server, by the user's request and to addresses the user names."""

from __future__ import annotations

import smtplib
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.sink.kept import KeptMessage

_TIMEOUT: Final = 15.0
"""Seconds the hop has for each reply."""


def _line_ends(text: bytes) -> bytes:
    """Return a text as servers that relay send it: a sink has accepted bare line ends, which could end it in a hop."""
    # Not an expression with a function: it would hold the interpreter for seconds.
    return text.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\n", b"\r\n")


class ReleaseError(Exception):
    """The hop has not taken the message; the text says why."""


class Hop(NamedTuple):
    """The server that released messages go to."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Hop:
        """Read "mail.example.org:25" or "[2001:db8::1]:25". Raise ValueError."""
        host, colon, port = text.rpartition(":")
        if not host or not colon or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(f"a release hop looks like mail.example.org:25, not {text!r}")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def send(self, message: KeptMessage, sender: str, recipients: Sequence[str]) -> list[str]:
        """Send a message. Blocks; call it in a thread. Return the recipients that were refused.

        It is sent as it was received, but for bare line ends, which are normalized as in `penstock serve`.

        Raise ReleaseError when no recipient was accepted, or the message was not.
        """
        options = []
        is_utf8 = not all(each.isascii() for each in (sender, *recipients))
        try:
            with smtplib.SMTP(self.host, self.port, timeout=_TIMEOUT) as client:
                client.ehlo()
                if is_utf8:
                    options.append("SMTPUTF8")
                if client.has_extn("8bitmime") and not message.raw.isascii():
                    options.append("BODY=8BITMIME")
                refused = client.sendmail(sender, list(recipients), _line_ends(message.raw), options)
        except smtplib.SMTPRecipientsRefused as exc:
            said = "; ".join(
                f"{name}: {code} {text.decode(errors='replace')}" for name, (code, text) in exc.recipients.items()
            )
            raise ReleaseError(f"{self} refuses all recipients: {said}") from exc
        except smtplib.SMTPResponseException as exc:
            said = exc.smtp_error if isinstance(exc.smtp_error, str) else exc.smtp_error.decode(errors="replace")
            raise ReleaseError(f"{self} refuses the message: {exc.smtp_code} {said}") from exc
        except (smtplib.SMTPException, OSError, ValueError) as exc:
            why = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise ReleaseError(f"{self}: {why}") from exc
        return list(refused)
