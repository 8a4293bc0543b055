"""`penstock spool`: shows and changes what waits to be delivered."""

from __future__ import annotations

import email.parser
import email.policy
import itertools
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from penstock.cli.cluster import cluster_admins
from penstock.cli.terminal import json_text
from penstock.config import ConfigError, Settings, load
from penstock.journal import escape
from penstock.spool.admin import AGES, Change, Filter, Listed, ListedMessage, Stats, no_message
from penstock.spool.admins import QueueAdmins
from penstock.spool.entry import STATES
from penstock.spool.store import SpoolError

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_HEADER: Final = 64 * 1024
"""Octets of a message that are searched for its header."""


class Age(click.ParamType[float]):
    """A duration: 30s, 10m, 2h, 5d, 1w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        found = re.fullmatch(r"(\d{1,9})([smhdw])", str(value))
        if found is None:
            self.fail(f"{value!r} is not a duration; expected 30s, 10m, 2h, 5d or 1w", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


_CLUSTER: Final = click.option(
    "--cluster",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, value: context.meta.__setitem__("cluster", value),
    help="The replicated queue: ask all nodes. Requires --config.",
)
"""For every command: what it does with the parts of a spool, it does with the nodes of a cluster."""
_OPTIONS: Final = (
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file of the server."),
    click.option("--data", "data_dir", metavar="DIR", help="Data directory of the server [default: ./penstock-data]."),
    _CLUSTER,
)
_FILTERS: Final = (
    click.option("--sender", default="", metavar="GLOB", help="Sender: '*@example.com'; '<>' is the null sender."),
    click.option("--recipient", default="", metavar="GLOB", help="Recipient: 'bob@*'."),
    click.option("--domain", default="", metavar="DOMAIN", help="Domain of the recipient."),
    click.option("--state", type=click.Choice(STATES), help="State of the recipient."),
    click.option("--older", type=Age(), help="Minimum age: 30s, 10m, 2h, 5d, 1w."),
    click.option("--newer", type=Age(), help="Maximum age."),
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds options in order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_filtered = _with(click.argument("ids", nargs=-1, metavar="[ID]..."), *_FILTERS, *_OPTIONS)


@contextmanager
def _opened(config_file: Path | None, data_dir: str | None) -> Iterator[QueueAdmins]:
    """Open the spool that `penstock serve` uses with the same options; errors become one line and exit code 1.

    Printing within the block may fail as well. If the output is a closed pipe (to head), there is no message.
    """
    try:
        settings = Settings() if config_file is None else load(config_file)
        if click.get_current_context().meta.get("cluster"):
            with cluster_admins(config_file) as admin:
                yield admin
            return
        folder = Path(data_dir or settings.data_dir) / settings.spool.path
        with QueueAdmins.opened(folder) as admin:
            yield admin
    except (ConfigError, SpoolError, sqlite3.Error) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        _forget_output()
        if isinstance(exc, BrokenPipeError):
            raise SystemExit(1) from None
        raise click.ClickException(str(exc)) from exc


def _forget_output() -> None:
    """Discard what could not be written to standard output: Python would try again at exit, and print a traceback."""
    with suppress(OSError), Path(os.devnull).open("wb") as nowhere:  # standard output of a test has no descriptor
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _filter(ids: tuple[str, ...], state: str | None, words: dict[str, Any]) -> Filter:
    return Filter(ids=ids, state=state or "", **words)


@click.group()
def spool() -> None:
    """Show the messages in the spool, and retry, hold, release, bounce or drop them.

    Works while the server runs, and when it is stopped. Without an ID or a filter, `list` shows everything, and the
    commands that change something require --all.
    """


@spool.command(name="list")
@_filtered
@click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(min=0), help="Maximum number of messages; 0: all."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
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
    with _opened(config_file, data_dir) as admin:
        unknown = admin.unknown(ids)
        found = admin.find(_filter(ids, state, words), limit)
        if as_json:
            click.echo(json_text([_as_json(message) for message in found]))
            _fail_unknown(unknown)
            return
        count = 0
        for message in found:
            click.echo(_as_lines(message))
            count += 1
    if limit and count == limit:
        click.echo(f"... only the first {limit} messages; use --limit for more", err=True)
    _fail_unknown(unknown)


def _fail_unknown(ids: Sequence[str]) -> None:
    """End with exit code 1 if there are unknown message ids."""
    for message_id in ids:
        click.echo(f"Error: {no_message(message_id)}", err=True)
    if ids:
        raise SystemExit(1)


def _as_json(message: ListedMessage) -> dict[str, object]:
    return {**message._asdict(), "recipients": [recipient._asdict() for recipient in message.recipients]}


def _as_lines(message: ListedMessage) -> str:
    """Return a line for a message, and one for each recipient."""
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
    """Return a duration in its largest unit."""
    for unit, size in reversed(_UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return "0s"


@spool.command()
@click.argument("message_id", metavar="ID")
@_with(*_OPTIONS)
@click.option("--body", is_flag=True, help="Write the whole message, unchanged, to standard output.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(message_id: str, config_file: Path | None, data_dir: str | None, body: bool, as_json: bool) -> None:
    """Show a message: its envelope, its recipients, its header."""
    with _opened(config_file, data_dir) as admin:
        prefix, text = admin.text(message_id)
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
        message = next(admin.find(Filter(ids=(message_id,)), 0), None)
        if message is None:  # it has been delivered meanwhile
            raise SpoolError(no_message(message_id))
        # RFC 6532: non-ASCII header fields are UTF-8.
        head = (prefix + first)[:_HEADER].decode("utf-8", "replace")
        parsed = email.parser.HeaderParser(policy=email.policy.compat32).parsestr(head)
        fields = [(name, " ".join(str(value).split())) for name, value in parsed.items()]
        if as_json:
            click.echo(json_text({**_as_json(message), "header": fields}))
            return
        click.echo(_as_lines(message))
        click.echo("".join(f"\n{escape(name)}: {escape(value)}" for name, value in fields).lstrip("\n"))


def _change(name: str, act: Callable[[QueueAdmins, Filter], Change], done: str, help_text: str) -> None:
    """Add a command that changes the recipients that a filter selects."""

    @spool.command(name=name, help=help_text)
    @_filtered
    @click.option("--all", "is_all", is_flag=True, help="Everything, without an ID or a filter.")
    @click.option("--yes", is_flag=True, help="Do not ask.", hidden=name not in _FINAL)
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
            raise click.UsageError("give message IDs, a filter, or --all")
        with _opened(config_file, data_dir) as admin:
            unknown = admin.unknown(ids)
            if name in _FINAL and not yes and not (ids and name == "bounce"):
                count = sum(len(message.recipients) for message in admin.find(what, 0))
                click.confirm(_FINAL[name].format(count=count), abort=True)
            change = act(admin, what)
            click.echo(f"{_recipients(change.changed)} {done}")
            if change.busy:
                click.echo(f"{_recipients(change.busy)} not changed: being delivered now")
            if change.pending:
                click.echo(f"{_recipients(change.pending)} will be changed when the server is started")
        _fail_unknown(unknown)


_FINAL: Final = {
    "drop": "Drop {count} recipients permanently, without a report to the senders?",
    "bounce": "Return {count} recipients to their senders?",
}
"""Commands that cannot be undone, and what they ask."""


def _recipients(count: int) -> str:
    return "1 recipient" if count == 1 else f"{count} recipients"


_change("retry", QueueAdmins.retry, "due now", "Try recipients now that wait for their next try.")
_change("hold", QueueAdmins.hold, "held", "Do not attempt recipients until they are released.")
_change("release", QueueAdmins.release, "due now", "Try recipients now that are held.")
_change("drop", QueueAdmins.drop, "dropped", "Delete recipients, and messages without any, without a report.")
_change("bounce", QueueAdmins.bounce, "returned to the sender", "Return recipients to their sender now.")


@spool.command()
@click.argument("name", metavar="DOMAIN|HOP")
@_with(*_OPTIONS)
def suspend(name: str, config_file: Path | None, data_dir: str | None) -> None:
    """Send nothing to a domain or a next hop until it is resumed.

    A next hop is named by its host, or in full as `penstock spool hops` shows it. The mail waits in the spool.
    """
    if not name or not name.isprintable() or (" " in name and not name.startswith("unix:")):
        raise click.BadParameter(f"expected a domain, a host or the name of a next hop, not {name!r}")
    with _opened(config_file, data_dir) as admin:
        click.echo(f"{name} suspended" if admin.suspend(name) else f"{name} was already suspended")


@spool.command()
@click.argument("name", metavar="DOMAIN|HOP")
@_with(*_OPTIONS)
def resume(name: str, config_file: Path | None, data_dir: str | None) -> None:
    """Send again to a domain or a next hop that was suspended."""
    with _opened(config_file, data_dir) as admin:
        if not admin.resume(name):
            names = ", ".join(admin.suspended()) or "none"
            raise click.ClickException(f"{name} is not suspended; suspended: {names}")
        click.echo(f"{name} resumed")


@spool.command()
@_with(*_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def hops(config_file: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Show the next hops that are down and why, and what is suspended."""
    with _opened(config_file, data_dir) as admin:
        down, suspended = admin.hops(), admin.suspended()
        if as_json:
            click.echo(json_text({"down": [hop._asdict() for hop in down], "suspended": suspended}))
            return
        now = time.time()
        for hop in down:
            tried = f"next try in {_span(hop.until - now)}" if hop.until > now else "being tried"
            click.echo(f"{escape(hop.name)} down for {_span(now - hop.since)}, {tried}: {escape(hop.reason)}")
        for name in suspended:
            click.echo(f"{escape(name)} suspended")
        if not down and not suspended:
            click.echo("no next hop is down or suspended")


@spool.command()
@_with(*_OPTIONS)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=0), help="Domains; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def ages(config_file: Path | None, data_dir: str | None, limit: int, as_json: bool) -> None:
    """Count recipients by domain and age in minutes, like qshape of Postfix."""
    heads = [*map(str, AGES), f"{AGES[-1]}+"]
    with _opened(config_file, data_dir) as admin:
        found = admin.ages()
        shown = found[:limit] if limit else found
        if as_json:
            rows = [{"domain": each.domain, "total": sum(each.counts), "ages": each.counts} for each in shown]
            click.echo(json_text(rows))
            return
        sums = [sum(column) for column in zip(*(each.counts for each in found), strict=True)] or [0] * len(heads)
        width = max([5, *(len(escape(each.domain)) for each in shown)])
        click.echo(" ".join([f"{'':{width}}", f"{'total':>8}", *(f"{head:>6}" for head in heads)]))
        for domain, counts in [("TOTAL", sums), *((escape(each.domain), each.counts) for each in shown)]:
            click.echo(" ".join([f"{domain:{width}}", f"{sum(counts):8}", *(f"{count:6}" for count in counts)]))


@spool.command()
@_with(*_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def stats(config_file: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Count messages and recipients by state."""
    with _opened(config_file, data_dir) as admin:
        found = admin.stats()
        if as_json:
            click.echo(json_text(found._asdict()))
        else:
            Console().print(_as_table(found))


def _as_table(found: Stats) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{found.messages:,}", f"messages of {found.octets:,} octets")
    table.add_row(f"{found.due:,}", "recipients due now")
    table.add_row(f"{found.later:,}", "waiting for their next try")
    table.add_row(f"{found.attempting:,}", "being attempted")
    table.add_row(f"{found.held:,}", "held")
    if found.oldest is not None:
        table.add_row(_span(time.time() - found.oldest), "age of the oldest message")
    for queue, count in found.queues:
        table.add_row(f"{count:,}", f"for {escape(queue)}")
    return table


@spool.command()
@_with(*_OPTIONS)
def check(config_file: Path | None, data_dir: str | None) -> None:
    """Check the consistency of the spool; exit code 1 and a line for each problem."""
    with _opened(config_file, data_dir) as admin:
        problems = list(admin.check())
        found = admin.stats()
        for line in problems:
            click.echo(line)
        if problems:
            raise SystemExit(1)
        click.echo(f"the spool is consistent: {found.messages:,} messages for {found.recipients:,} recipients")
