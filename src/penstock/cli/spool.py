"""`penstock spool`: what waits to be delivered, and what an operator does about it."""

from __future__ import annotations

import email.parser
import email.policy
import itertools
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from penstock.config import ConfigError, Settings, load
from penstock.journal import escape
from penstock.spool.admin import Filter, Listed, ListedMessage, Stats, no_message
from penstock.spool.admins import QueueAdmins
from penstock.spool.entry import STATES
from penstock.spool.store import SpoolError

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_HEADER: Final = 64 * 1024
"""Octets of a message that are looked at for its header."""


class Age(click.ParamType[float]):
    """A time span: 30s, 10m, 2h, 5d, 1w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        found = re.fullmatch(r"(\d{1,9})([smhdw])", str(value))
        if found is None:
            self.fail(f"{value!r} is no age; write 30s, 10m, 2h, 5d or 1w", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


_OPTIONS: Final = (
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="The file that serve runs with."),
    click.option("--data", "data_dir", metavar="DIR", help="The folder of serve --data [default: ./penstock-data]."),
)
_FILTERS: Final = (
    click.option("--sender", default="", metavar="GLOB", help="'*@example.com'; '<>' is the sender of bounces."),
    click.option("--recipient", default="", metavar="GLOB", help="'bob@*'."),
    click.option("--domain", default="", metavar="DOMAIN", help="The domain of the recipient."),
    click.option("--state", type=click.Choice(STATES), help="What the recipient waits for."),
    click.option("--older", type=Age(), help="Older than 30s, 10m, 2h, 5d, 1w."),
    click.option("--newer", type=Age(), help="Not older than that."),
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds options in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_filtered = _with(click.argument("ids", nargs=-1, metavar="[ID]..."), *_FILTERS, *_OPTIONS)


@contextmanager
def _desk(config_file: Path | None, data_dir: str | None) -> Iterator[QueueAdmins]:
    """Open the spool that `penstock serve` with the same options has; turn trouble into one line and exit code 1.

    What is printed within the block may be the trouble. Where nobody reads it any more (a pipe to head), no line.
    """
    try:
        settings = Settings() if config_file is None else load(config_file)
        folder = Path(data_dir or settings.data_dir) / settings.spool.path
        with QueueAdmins.opened(folder) as desk:
            yield desk
    except (ConfigError, SpoolError, sqlite3.Error) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        _forget_output()
        if isinstance(exc, BrokenPipeError):
            raise SystemExit(1) from None
        raise click.ClickException(str(exc)) from exc


def _forget_output() -> None:
    """Let what could not be written to standard output go: Python would try again at its end, and print a trace."""
    with suppress(OSError), Path(os.devnull).open("wb") as nowhere:  # a test's has no descriptor
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _filter(ids: tuple[str, ...], state: str | None, words: dict[str, Any]) -> Filter:
    return Filter(ids=ids, state=state or "", **words)


@click.group()
def spool() -> None:
    """Look at the messages that wait, and retry, hold, release or drop them.

    Works while the server runs, which notices within seconds, and when it is stopped. Without an ID or a filter,
    `list` shows everything, and the commands that change something ask for --all.
    """


@spool.command(name="list")
@_filtered
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=0), help="Messages at most; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="An array of objects.")
def list_messages(
    ids: tuple[str, ...],
    state: str | None,
    config_file: Path | None,
    data_dir: str | None,
    limit: int,
    as_json: bool,
    **words: Any,
) -> None:
    """List messages, the oldest first."""
    with _desk(config_file, data_dir) as desk:
        found = desk.find(_filter(ids, state, words), limit)
        if as_json:
            click.echo(msgspec.json.encode([_as_json(message) for message in found]))
            return
        count = 0
        for message in found:
            click.echo(_as_lines(message))
            count += 1
    if limit and count == limit:
        click.echo(f"... only the first {limit}; --limit shows more", err=True)


def _as_json(message: ListedMessage) -> dict[str, object]:
    return {**message._asdict(), "recipients": [recipient._asdict() for recipient in message.recipients]}


def _as_lines(message: ListedMessage) -> str:
    """Return a message as a line, and one for each recipient."""
    age = _span(time.time() - message.received_at)
    head = f"{message.id}  {age:>6}  {message.size:>10,}  <{escape(message.sender)}>"
    return "\n".join([head, *(f"    {_recipient_line(recipient)}" for recipient in message.recipients)])


def _recipient_line(recipient: Listed) -> str:
    line = f"<{escape(recipient.address)}> {recipient.state}, {recipient.attempts} attempts"
    if recipient.state == "due":
        wait = recipient.due_at - time.time()
        line += ", now" if wait <= 0 else f", in {_span(wait)}"
    return f"{line}: {escape(recipient.last_reply)}" if recipient.last_reply else line


def _span(seconds: float) -> str:
    """Return a time span in its largest unit."""
    for unit, size in reversed(_UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return "0s"


@spool.command()
@click.argument("message_id", metavar="ID")
@_with(*_OPTIONS)
@click.option("--body", is_flag=True, help="Write the message as it is, all of it, to standard output.")
@click.option("--json", "as_json", is_flag=True, help="An object.")
def show(message_id: str, config_file: Path | None, data_dir: str | None, body: bool, as_json: bool) -> None:
    """Show a message: its envelope, its recipients, its header."""
    with _desk(config_file, data_dir) as desk:
        prefix, text = desk.text(message_id)
        chunks = text.chunks()
        try:
            first = next(chunks, b"")
        except FileNotFoundError:
            raise SpoolError(no_message(message_id)) from None
        if body:
            out = sys.stdout.buffer
            for chunk in itertools.chain((prefix, first), chunks):
                out.write(chunk)
            out.flush()
            return
        message = next(desk.find(Filter(ids=(message_id,)), 0), None)
        if message is None:  # it was delivered meanwhile
            raise SpoolError(no_message(message_id))
        # RFC 6532: a field that is not ASCII is UTF-8.
        head = (prefix + first)[:_HEADER].decode("utf-8", "replace")
        parsed = email.parser.HeaderParser(policy=email.policy.compat32).parsestr(head)
        fields = [(name, " ".join(str(value).split())) for name, value in parsed.items()]
        if as_json:
            click.echo(msgspec.json.encode({**_as_json(message), "header": fields}))
            return
        click.echo(_as_lines(message))
        click.echo("".join(f"\n{escape(name)}: {escape(value)}" for name, value in fields).lstrip("\n"))


def _change(name: str, act: Callable[[QueueAdmins, Filter], int], done: str, help_text: str) -> None:
    """Make a command that changes what a filter finds."""

    @spool.command(name=name, help=help_text)
    @_filtered
    @click.option("--all", "is_all", is_flag=True, help="Everything, without an ID or a filter.")
    @click.option("--yes", is_flag=True, help="Do not ask.", hidden=name != "drop")
    def command(
        ids: tuple[str, ...],
        state: str | None,
        config_file: Path | None,
        data_dir: str | None,
        is_all: bool,
        yes: bool,
        **words: Any,
    ) -> None:
        what = _filter(ids, state, words)
        if what.is_empty and not is_all:
            raise click.UsageError("name messages or a filter, or say --all")
        with _desk(config_file, data_dir) as desk:
            if name == "drop" and not yes:
                count = sum(len(message.recipients) for message in desk.find(what, 0))
                click.confirm(f"Drop {count} recipients for good, telling nobody?", abort=True)
            click.echo(f"{act(desk, what)} recipients {done}")


_change("retry", QueueAdmins.retry, "are due now", "Let recipients that wait for their next try be due now.")
_change("hold", QueueAdmins.hold, "are held", "Keep recipients from being attempted until they are released.")
_change("release", QueueAdmins.release, "are due now", "Let recipients that are held be due now.")
_change(
    "drop", QueueAdmins.drop, "were dropped", "Delete recipients, and messages that have none left. Nobody is told."
)


@spool.command()
@_with(*_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="An object.")
def stats(config_file: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Count what waits."""
    with _desk(config_file, data_dir) as desk:
        found = desk.stats()
        if as_json:
            click.echo(msgspec.json.encode(found._asdict()))
        else:
            Console().print(_as_table(found))


def _as_table(found: Stats) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{found.messages:,}", f"messages of {found.octets:,} octets")
    table.add_row(f"{found.due:,}", "recipients are due now")
    table.add_row(f"{found.later:,}", "wait for their next try")
    table.add_row(f"{found.attempting:,}", "are being attempted")
    table.add_row(f"{found.held:,}", "are held")
    if found.oldest is not None:
        table.add_row(_span(time.time() - found.oldest), "is the oldest message old")
    for lane, count in found.lanes:
        table.add_row(f"{count:,}", f"for {escape(lane)}")
    return table


@spool.command()
@_with(*_OPTIONS)
def check(config_file: Path | None, data_dir: str | None) -> None:
    """Say whether the spool is whole; exit code 1 and a line for each thing that is wrong when it is not."""
    with _desk(config_file, data_dir) as desk:
        wrong = list(desk.check())
        found = desk.stats()
        for line in wrong:
            click.echo(line)
        if wrong:
            raise SystemExit(1)
        click.echo(f"the spool is whole: {found.messages:,} messages for {found.recipients:,} recipients")
