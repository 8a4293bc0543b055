"""`penstock status`: what a running server does, at one glance or as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from penstock.cli.controlclient import ServerError, ask, server_options, socket_path
from penstock.cli.once import OnceCommand
from penstock.control import ServerState
from penstock.metrics._shared import BUCKETS
from penstock.metrics.exposition import percentile
from penstock.operations.observation import process_values

Value = int | list[int]
_MOST_HOPS: Final = 20


class Series(msgspec.Struct, frozen=True):
    """The answer of the control socket to `metrics`."""

    series: list[tuple[str, str, Value]]
    """Kind, name with labels, value; a histogram has the counts of its buckets, then the sum."""
    workers: dict[str, dict[str, Value]] = {}
    """The series of each worker, by its process id."""

    def value(self, name: str) -> int:
        """Return the sum of all series of a metric."""
        return _sum((name_, value) for _, name_, value in self.series if _is_of(name_, name))

    def of_worker(self, pid: int, name: str) -> int:
        """Return the sum of all series of a metric of one worker."""
        return _sum((name_, value) for name_, value in self.workers.get(str(pid), {}).items() if _is_of(name_, name))

    def labelled(self, name: str) -> dict[str, int]:
        """Return the series of a metric with one label, by the value of that."""
        found = {}
        for _, series, value in self.series:
            if _is_of(series, name) and isinstance(value, int):
                found[series.partition('="')[2].removesuffix('"}')] = value
        return found

    def histogram(self, name: str) -> list[int]:
        """Return the sum of all series of a histogram."""
        total = [0] * (BUCKETS + 1)
        for _, series, value in self.series:
            if _is_of(series, name) and isinstance(value, list):
                total = [one + two for one, two in zip(total, value, strict=True)]
        return total


def _is_of(series: str, name: str) -> bool:
    return series == name or series.startswith(f"{name}{{")


def _sum(found: Any) -> int:
    return sum(value for _, value in found if isinstance(value, int))


def read(path: Path) -> tuple[ServerState, Series]:
    """Ask a server for its state and its metrics. Raise ServerError."""
    try:
        state = msgspec.convert(ask(path, "state"), ServerState)
        return state, msgspec.convert(ask(path, "metrics"), Series)
    except msgspec.ValidationError as exc:
        raise ServerError(f"the server is of another version: {exc}") from exc


@click.command(cls=OnceCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@server_options
def status(config_file: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Show the state of a running server: workers, listeners and their certificates, spool, next hops, last reload.

    The server is found by --config and --data, as given to `penstock serve`. Exit code 1 if it does not run.
    """
    try:
        state, series = read(socket_path(config_file, data_dir))
    except ServerError as exc:
        raise click.ClickException(str(exc)) from exc
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(summary(state, series))).decode())
        return
    console = Console(highlight=False)
    for line in _head(state, series):
        console.print(line)
    console.print(worker_table(state, series))
    listeners = {each.name: each for worker in state.workers for each in worker.listeners}
    for name, listener in listeners.items():
        ends = listener.certificate_not_after
        certificate = f"; certificate until {_date(ends)}" if ends else ""
        console.print(f"listener {name}: {listener.address}{certificate}")
    for line in hop_lines(state, series):
        console.print(line)


def summary(state: ServerState, series: Series) -> dict[str, Any]:
    """Return what --json prints: the state, and the metrics that belong to it."""
    workers = []
    for worker, fields in zip(state.workers, msgspec.to_builtins(state.workers), strict=True):
        resident = process_values([worker.pid])["process_resident_memory_bytes"]
        accepted = series.of_worker(worker.pid, "messages_accepted_total")
        workers.append({**fields, "resident_octets": int(resident), "messages_accepted": accepted})
    hops = {
        name: {"up": bool(is_up), "connections": series.labelled("relay_connections").get(name, 0)}
        for name, is_up in series.labelled("relay_hop_up").items()
    }
    return {
        **msgspec.to_builtins(state),
        "workers": workers,
        "messages_accepted": series.value("messages_accepted_total"),
        "sessions": series.value("sessions"),
        "spool": {
            "messages": series.value("spool_messages"),
            "recipients": series.value("spool_recipients"),
            "octets": series.value("spool_octets"),
            "oldest_seconds": series.value("spool_oldest_seconds"),
            "free_octets": series.value("spool_free_octets"),
        },
        "hops": hops,
        "clock_jumps": series.value("clock_jumps_total"),
    }


def _head(state: ServerState, series: Series) -> list[str]:
    ready = "ready" if state.is_ready else "not ready"
    lines = [
        f"penstock {state.version}: {state.phase}, {ready}; process {state.pid}, since {_date(state.since)}",
        f"accepted {series.value('messages_accepted_total'):,} messages; {series.value('sessions'):,} sessions open; "
        f"99 % accepted within {percentile(series.histogram('accept_seconds'), 's', 0.99) * 1000:,.3g} ms",
        f"spool: {series.value('spool_messages'):,} messages, {series.value('spool_recipients'):,} recipients, "
        f"oldest {series.value('spool_oldest_seconds'):,} s",
    ]
    reload = state.last_reload
    if reload.at:
        reason = f": {reload.reason}" if reload.reason else ""
        lines.append(f"last reload: {_date(reload.at)}, {reload.result}{reason}")
    if series.value("clock_jumps_total"):
        lines.append(f"the clock was set {series.value('clock_jumps_total')} times; see clock-jumped in the journal")
    return lines


def worker_table(state: ServerState, series: Series) -> Table:
    """Return a table of the workers."""
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "process", "since", "sessions", "accepted", "/s", "memory", "restarts"):
        table.add_column(name, justify="left" if name in ("since", "worker") else "right", no_wrap=True)
    for worker in state.workers:
        accepted = series.of_worker(worker.pid, "messages_accepted_total")
        age = time.time() - worker.since if worker.since else 0.0
        resident = process_values([worker.pid])["process_resident_memory_bytes"]
        table.add_row(
            f"{worker.index}{'' if worker.is_ready else ' (not ready)'}",
            str(worker.pid),
            time.strftime("%m-%d %H:%M", time.localtime(worker.since)) if worker.since else "-",
            f"{series.of_worker(worker.pid, 'sessions'):,}",
            f"{accepted:,}",
            f"{accepted / age:,.1f}" if age > 1 else "-",
            f"{resident / (1 << 20):,.0f} MB",
            str(worker.restarts),
        )
    return table


def hop_lines(state: ServerState, series: Series) -> list[str]:
    """Return a line for each next hop that is backing off, and for each that is suspended."""
    down = [name for name, is_up in series.labelled("relay_hop_up").items() if not is_up]
    suspended = sorted({name for worker in state.workers for name in worker.suspended})
    lines = [f"next hop {name}: backing off" for name in down[:_MOST_HOPS]]
    if len(down) > _MOST_HOPS:
        lines.append(f"{len(down) - _MOST_HOPS} further next hops are backing off")
    return lines + [f"{name}: suspended" for name in suspended[:_MOST_HOPS]]


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
