"""`penstock load`: send messages to a server, and tell what it felt like."""

from __future__ import annotations

import os
import platform
import random
import shlex
import signal
import string
import sys
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import trio
from rich.console import Console
from rich.live import Live
from rich.text import Text

from penstock import __version__
from penstock.cli import reports
from penstock.load.generator import Generator
from penstock.load.page import page
from penstock.load.plan import Plan, PlanError, Target
from penstock.load.report import comparison, summary_table

_LETTERS: Final = string.digits + string.ascii_lowercase
_REFRESH: Final = 4.0
"""Looks at the progress in a second."""


def _size_help() -> str:
    return "4096; 1000-50000; lognormal:MEDIAN:SIGMA; table:1000=70,50000=30."


@click.command()
@click.argument("targets", nargs=-1, metavar="HOST:PORT...")
@click.option(
    "--sessions", type=click.IntRange(1, 50_000), default=10, show_default=True, help="Connections at a time."
)
@click.option("--messages", type=click.IntRange(min=1), help="Messages in all [default: 1000 without --duration].")
@click.option(
    "--duration", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds to start messages in."
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="R",
              help="Start so many a second whether answers come or not (open loop).")  # fmt: skip
@click.option(
    "--ramp", type=click.FloatRange(min=0), default=0.0, metavar="S", help="Seconds to grow to the full load in."
)
@click.option("--size", default="4096", show_default=True, metavar="OCTETS", help=_size_help())
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Send its *.eml files.")
@click.option("--recipients", type=click.IntRange(1, 100_000), default=1, help="Recipients of a message.")
@click.option("--from", "sender", default="", metavar="A", help="[default: carries the mark of the message]")
@click.option("--to", "to", multiple=True, default=["load@load.invalid"], metavar="A",
              help="[default: load@load.invalid] May be repeated: messages take one of them in turn; with more "
              "--recipients, numbers stand before its @.")  # fmt: skip
@click.option("--reuse", is_flag=True, help="Keep connections [default: a new one for each message].")
@click.option("--per-connection", type=click.IntRange(min=1), metavar="N", help="Messages of a connection.")
@click.option("--pipeline", is_flag=True, help="Send groups of commands (RFC 2920).")
@click.option("--bdat", is_flag=True, help="Send texts with BDAT (RFC 3030).")
@click.option("--lmtp", is_flag=True, help="Speak LMTP.")
@click.option("--tls", type=click.Choice(["none", "starttls", "implicit"]), default="none", show_default=True)
@click.option("--ca-file", type=click.Path(path_type=Path, exists=True), help="Check certificates with this authority.")
@click.option("--no-resumption", is_flag=True, help="A full handshake for each connection.")
@click.option("--auth", metavar="USER:PASSWORD", help="Authenticate; PENSTOCK_LOAD_AUTH in the environment does, too.")
@click.option("--source", "sources", multiple=True, metavar="IP", help="Come from this address. May be repeated.")
@click.option("--helo", "hello", default="load.invalid", metavar="NAME", help="Who we are.")
@click.option("--header", is_flag=True, help="Put the mark into a header field, too (X-Penstock-Sequence).")
@click.option("--run", metavar="NAME", help="Names the run in its marks [default: drawn].")
@click.option("--seed", type=int, default=1, show_default=True, help="Draws the sizes.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, metavar="S",
              help="Seconds to wait for an answer.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write .html or .json.")
@click.option("--compare", nargs=2, type=click.Path(path_type=Path, exists=True, dir_okay=False),
              metavar="A.json B.json", help="Compare two reports, and send nothing.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON in place of tables.")
@click.option("-v", "--verbose", is_flag=True, help="A line each second where there is no terminal.")
def load(
    targets: tuple[str, ...],
    report: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    verbose: bool,
    **words: Any,
) -> None:
    """Send messages to a server, as fast as it takes them or at a rate, and tell the latencies of each phase.

    \b
    penstock load 127.0.0.1:2525 --sessions 100 --messages 100000 --reuse
    penstock load 127.0.0.1:2525 --sessions 500 --rate 2000 --duration 60 --report run.html

    A target is 127.0.0.1:2525, [::1]:25, mx.example.org:25 or unix:/path. A name is looked up once, and stands for
    the first of its addresses that takes a connection; sessions take several targets in turn.

    The latency of a message counts from its MAIL to the answer to its text; with --rate from when it was to start,
    so that a server is charged for what it kept waiting.

    Exit code 0 when every message was accepted, 1 when some were not, or were not sent, 2 for wrong words.
    """  # noqa: D301 - \b is click's word for lines to be left as they are
    if compare is not None:
        first, second = (_read_report(path) for path in compare)
        try:
            Console().print(comparison(first, second))
        except (KeyError, TypeError, ValueError) as exc:
            raise click.UsageError(f"{compare[0]} and {compare[1]} are not both reports of this version") from exc
        return
    if report is not None and report.suffix not in (".html", ".json"):
        raise click.UsageError("--report takes a name that ends with .html or .json")
    if report is not None:
        reports.check_place(report)
    try:
        generator = Generator(_plan(targets, words))
    except (PlanError, OSError) as exc:
        raise click.UsageError(str(exc)) from exc
    console = Console(stderr=True)
    try:
        trio.run(_run, generator, console, verbose)
    except PlanError as exc:
        raise click.UsageError(str(exc)) from exc
    told = _report(generator)
    trouble: click.ClickException | None = None
    if report is not None:
        try:
            reports.write(report, page(told).encode() if report.suffix == ".html" else msgspec.json.encode(told))
        except click.ClickException as exc:
            trouble = exc  # the tables come all the same
    try:
        if as_json:
            click.echo(msgspec.json.encode(told))
        else:
            Console().print(summary_table(told))
    except OSError as exc:
        raise click.ClickException(f"standard output: {exc.strerror}") from exc
    if trouble is not None:
        raise trouble
    raise SystemExit(0 if generator.counts.failed == 0 and generator.counts.accepted else 1)


def _plan(targets: tuple[str, ...], words: dict[str, Any]) -> Plan:
    """Make a plan of the words of the command line. Raise PlanError."""
    if not targets:
        raise PlanError("say where to: penstock load HOST:PORT")
    auth = words.pop("auth") or os.environ.get("PENSTOCK_LOAD_AUTH", "")
    user, colon, password = auth.partition(":")
    if auth and not (user and colon):
        raise PlanError("--auth is USER:PASSWORD")
    reuse, per_connection = words.pop("reuse"), words.pop("per_connection")
    if words["messages"] is None and words["duration"] is None:
        words["messages"] = 1000
    run = words.pop("run") or "".join(random.SystemRandom().choices(_LETTERS, k=6))
    return Plan(
        targets=[Target.parse(target) for target in targets],
        per_connection=per_connection or (0 if reuse else 1),
        pipelining=words.pop("pipeline"),
        chunking=words.pop("bdat"),
        resumption=not words.pop("no_resumption"),
        user=user,
        password=password,
        run=run,
        **words,
    )


async def _run(generator: Generator, console: Console, verbose: bool) -> None:
    await generator.resolve()
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, generator, nursery.cancel_scope)
        nursery.start_soon(_show, generator, console, verbose)
        await generator.run()
        nursery.cancel_scope.cancel()


async def _stop_on_signals(
    generator: Generator, run: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Stop at SIGINT or SIGTERM; what is under way may end. At a second one, end now."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        await anext(signals)
        generator.stop()
        await anext(signals)
        run.cancel()


async def _show(generator: Generator, console: Console, verbose: bool) -> None:
    """Show the progress, until cancelled: a live line on a terminal, a line a second with --verbose."""
    if not console.is_terminal:
        while verbose:
            await trio.sleep(1)
            console.print(_progress(generator).plain, soft_wrap=True, highlight=False)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(_progress(generator), refresh=True)
            await trio.sleep(1 / _REFRESH)


def _progress(generator: Generator) -> Text:
    plan, counts = generator.plan, generator.counts
    last = counts.seconds[-1] if counts.seconds else None
    done = counts.accepted + counts.failed
    if plan.messages is not None:
        part = done / plan.messages
    else:
        assert plan.duration is not None
        part = min(counts.elapsed / plan.duration, 1.0)
    line = Text()
    line.append("█" * int(part * 20), style="cyan")
    line.append("░" * (20 - int(part * 20)), style="dim")
    line.append(f" {part:4.0%}  {counts.accepted:,} accepted")
    if counts.failed:
        line.append(f"  {counts.failed:,} failed", style="bold red")
    if last is not None:
        line.append(f"  {last.accepted:,}/s  p50 {last.p50 * 1e3:.1f} ms  p99 {last.p99 * 1e3:.1f} ms")
    line.append(f"  {generator.open_sessions:,} connections", style="dim")
    return line


def _report(generator: Generator) -> dict[str, Any]:
    plan, counts = generator.plan, generator.counts
    return {
        "report": "penstock load",
        "schema": 1,
        "version": __version__,
        "command": shlex.join([Path(sys.argv[0]).name, *_without_password(sys.argv[1:])])
        .encode("utf-8", "replace")  # a name of a file may be anything
        .decode(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}",
        "targets": [str(target) for target in plan.targets],
        "run": plan.run,
        "sessions": plan.sessions,
        "intended_rate": plan.rate,
        **counts.as_report(),
    }


def _without_password(words: list[str]) -> list[str]:
    """Return the words of the command line, but for what follows --auth."""
    hidden = [*words]
    for place, word in enumerate(words):
        if word == "--auth" and place + 1 < len(words):
            hidden[place + 1] = "***"
        elif word.startswith("--auth="):
            hidden[place] = "--auth=***"
    return hidden


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        if found["report"] != "penstock load" or found["schema"] != 1:
            raise click.UsageError(f"{path} is no report of this version")
    except (msgspec.DecodeError, KeyError, TypeError) as exc:
        raise click.UsageError(f"{path} is no report of penstock load") from exc
    return found
