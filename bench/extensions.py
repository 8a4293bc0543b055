"""`python -m bench.offers`: what each server offers after EHLO, and which dialogs of tests/ it answers otherwise.

The dialogs without settings are played over TCP against each server; compared are the reply codes alone, with no regard
to texts and enhanced codes. A dialog differs when a code does, when the server says nothing within two seconds, or
when it keeps a connection open that the dialog ends. Not every difference is a fault: smtp-sink means to accept.
"""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import trio
from tests.dialog import Client, Dialog, play, read_dialog, whole

from bench.measure import AIOSMTPD, PENSTOCK_SERVE, SMTP_SINK, Peer, Running, machine, running

DIALOGS = sorted((Path(__file__).parent.parent / "tests" / "dialogs").glob("*.smtp"))
KEYWORDS = [
    "PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "CHUNKING", "BINARYMIME", "DSN", "STARTTLS",
    "AUTH", "LIMITS", "HELP", "VRFY", "ETRN", "XCLIENT",
]  # fmt: skip


def codes_only(dialog: Dialog) -> Dialog:
    """Return the dialog with nothing but the codes of the replies, and without what only our own server can tell."""
    steps = []
    for mark, text in dialog.steps:
        if mark == "M:":
            continue
        steps.append((mark, f"{text[:3]}*") if mark == "S:" else (mark, text))
    return replace(dialog, steps=steps)


async def keywords_of(server: Running) -> set[str]:
    """Return the EHLO keywords of a server."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        client = Client(stream, ssl.create_default_context(), whole)
        await client.line()
        await client.send(b"EHLO client.example\r\n")
        found: set[str] = set()
        while (line := await client.line()) is not None:
            found.update(word.upper() for word in line[4:].split()[:1])
            if line[3] == " ":
                break
        return found


async def differs(server: Running, dialog: Dialog) -> str:
    """Return how a server answers a dialog otherwise; "" when it does not."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        client = Client(stream, ssl.create_default_context(), whole)
        try:
            with trio.fail_after(2):
                await play(dialog, client, [])
        except AssertionError as exc:
            return str(exc)
        except trio.TooSlowError:
            return "no answer within two seconds"
    return ""


async def measure(server: Running) -> tuple[set[str], dict[str, str]]:
    """Return the keywords of a server, and the dialogs it answers otherwise."""
    dialogs = [codes_only(dialog) for path in DIALOGS if not (dialog := read_dialog(path)).settings]
    different = {dialog.name: how for dialog in dialogs if (how := await differs(server, dialog))}
    return await keywords_of(server), different


def main() -> None:
    """Measure and print."""
    print(machine(), "\n")
    results: dict[Peer, tuple[set[str], dict[str, str]]] = {}
    for peer in (PENSTOCK_SERVE, AIOSMTPD, SMTP_SINK):
        with running(peer) as server:
            results[peer] = trio.run(measure, server)
    print("| | " + " | ".join(peer.name for peer in results) + " |")
    print("|---|" + "---|" * len(results))
    for keyword in KEYWORDS:
        row = ["yes" if keyword in offered else "" for offered, _ in results.values()]
        if any(row):
            print(f"| {keyword} | " + " | ".join(row) + " |")
    total = sum(1 for path in DIALOGS if not read_dialog(path).settings)
    print("| dialogs answered otherwise | " + " | ".join(f"{len(d)} of {total}" for _, d in results.values()) + " |\n")
    for peer, (_, different) in results.items():
        for name, how in different.items():
            print(f"{peer.name}: {name}: {how}")


if __name__ == "__main__":
    main()
