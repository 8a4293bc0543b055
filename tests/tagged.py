"""Messages with a number of their own, as tests send them to a sink that is to know them again."""

from __future__ import annotations

import smtplib
from collections.abc import Iterable
from typing import NamedTuple

from penstock.sequence import mark


class Marked(NamedTuple):
    """A message whose sender has its mark."""

    sender: str
    recipient: str
    text: str


def marked(run: str, number: int, *, recipient: str = "", text: str = "") -> Marked:
    """Make a message of a run. Without other words its recipient is one of seven, so that some are alike."""
    sender = f"{mark(run, number)}@load.invalid"
    return Marked(
        sender,
        recipient or f"bob{number % 7}@example.org",
        text or f"Subject: {number}\r\n\r\nThis is message {number}\r\n",
    )


def send_marked(port: int, messages: Iterable[Marked]) -> None:
    """Send messages over one connection, with smtplib. Raise what it raises."""
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        for message in messages:
            client.sendmail(message.sender, [message.recipient], message.text)
