"""The EHLO keywords of several servers, and the dialogs of tests/ that they answer with other reply codes.

Each server is given the dialogs that need no settings, over TCP. Only reply codes are compared, not texts and enhanced
status codes. A dialog differs if a code does, if there is no reply within two seconds, or if the connection stays open
where the dialog closes it. Not every difference is a fault: smtp-sink accepts on purpose.

    python -m bench.extensions
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
    """Return a dialog reduced to reply codes, without the checks of delivered messages."""
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
    """Return how the replies of a server differ from a dialog, "" if they do not."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        client = Client(stream, ssl.create_default_context(), whole)
        try:
            with trio.fail_after(2):
                await play(dialog, client, [])
        except AssertionError as exc:
            return str(exc)
        except trio.TooSlowError:
            return "no reply within two seconds"
    return ""


async def measure(server: Running) -> tuple[set[str], dict[str, str]]:
    """Return the keywords of a server, and how it differs from each dialog that it differs from."""
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
    print("| dialogs that differ | " + " | ".join(f"{len(d)} of {total}" for _, d in results.values()) + " |\n")
    for peer, (_, different) in results.items():
        for name, how in different.items():
            print(f"{peer.name}: {name}: {how}")


if __name__ == "__main__":
    main()
