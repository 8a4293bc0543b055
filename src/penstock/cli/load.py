"""`penstock load`: send messages to a server and measure it; compare two reports."""

from __future__ import annotations

import os
import platform
import random
import shlex
import signal
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import trio
from click.core import ParameterSource
from rich.console import Console
from rich.live import Live
from rich.text import Text

from penstock import __version__
from penstock.cli import reports
from penstock.cli.once import OnceCommand
from penstock.cli.terminal import json_text
from penstock.forked import WorkerError
from penstock.load.compare import Change, compare, overall, regressions
from penstock.load.generator import Generator
from penstock.load.page import comparison_page, page
from penstock.load.plan import Plan, PlanError, Target
from penstock.load.report import comparison_table, summary_table
from penstock.load.schedule import MAX_RATE, parse_stages
from penstock.load.search import Trial, find_rate, judge
from penstock.load.thresholds import Result, Threshold
from penstock.load.units import parse_duration
from penstock.load.workers import WorkerGroup

_LETTERS: Final = string.digits + string.ascii_lowercase
_REFRESH: Final = 4.0
"""Updates of the progress line per second."""
_SUFFIXES: Final = (".html", ".json")
_OF_COMPARISON: Final = {"compare_files", "report_files", "as_json", "fail_on_regression"}
_FIRST_RATE: Final = 100.0
_RUN_OF_TRIALS: Final = 13
"""Characters of --run at the beginning of the names of the trials, which have at most 16."""
_TRIAL: Final = 5.0
"""Seconds of a trial of --find-rate."""
Runner = Generator | WorkerGroup
"""A run in this process or in several."""
_RENAMED: Final = {"banner": "greeting", "ehlo": "hello"}
"""Phases of the reports of earlier versions."""


def _converter(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return the type of an option. Its default needs no parsing."""

    def convert(value: Any) -> Any:
        try:
            return parse(value) if isinstance(value, str) else value
        except ValueError as exc:
            raise click.BadParameter(str(exc)) from exc

    return convert


def _parse_percentage(text: str) -> float:
    """Return a fraction. Raise ValueError."""
    number = text.removesuffix("%")
    if not (text.endswith("%") and number.replace(".", "", 1).isdecimal() and number.isascii()):
        raise ValueError(f"a percentage looks like 10%, not {text!r}")
    return float(number) / 100


_duration = _converter(parse_duration)


@click.command(cls=OnceCommand, context_settings={"max_content_width": 110})
@click.argument("targets", nargs=-1, metavar="HOST:PORT...")
@click.option(
    "--sessions", type=click.IntRange(1, 50_000), default=10, show_default=True, help="Concurrent connections."
)
@click.option(
    "--messages",
    type=click.IntRange(min=1),
    metavar="N",
    help="Messages in total [default: 1000 without --duration or --stages].",
)
@click.option(
    "--duration", type=_duration, metavar="TIME", help="Stop starting messages after this time: 30s, 5m, or seconds."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, MAX_RATE, min_open=True),
    metavar="R",
    help="Open loop: start R messages per second regardless of replies.",
)
@click.option(
    "--ramp",
    type=_duration,
    default=0.0,
    metavar="TIME",
    help="Reach the full rate, or number of sessions, in this time.",
)
@click.option(
    "--stages",
    type=_converter(parse_stages),
    metavar="TIME:RATE,...",
    help="Open loop with a changing rate: 10s:100,60s:1000,10s:0 ramps linearly to each rate; 0s:R jumps.",
)
@click.option(
    "--think", type=_duration, default=0.0, metavar="TIME", help="Pause of a session after each message (closed loop)."
)
@click.option(
    "--warm-up", type=_duration, default=0.0, metavar="TIME", help="Exclude the first part of the run from the figures."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Generator processes; one report.",
)
@click.option(
    "--size",
    metavar="OCTETS",
    help="Message size: 4096; 1000-50000; lognormal:MEDIAN:SIGMA; table:1000=70,50000=30 [default: 4096].",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Send the *.eml files of this directory, in place of messages of --size.",
)
@click.option("--recipients", type=click.IntRange(1, 100_000), default=1, metavar="N", help="Recipients per message.")
@click.option(
    "--from", "sender", default="", metavar="ADDRESS", help="Sender [default: carries the sequence tag of the message]."
)
@click.option(
    "--to",
    "to",
    multiple=True,
    default=["load@load.invalid"],
    metavar="ADDRESS",
    help="Recipient [default: load@load.invalid]. Repeatable: messages use them round robin. With --recipients, "
    "numbers are put before the @.",
)
@click.option("--reuse", is_flag=True, help="Keep connections open [default: a new one for each message].")
@click.option("--per-connection", type=click.IntRange(min=1), metavar="N", help="Messages per connection.")
@click.option("--pipeline", is_flag=True, help="Pipeline commands (RFC 2920).")
@click.option("--bdat", is_flag=True, help="Send messages with BDAT (RFC 3030).")
@click.option("--lmtp", is_flag=True, help="Use LMTP.")
@click.option(
    "--tls", type=click.Choice(["none", "starttls", "implicit"]), default="none", show_default=True, help="TLS mode."
)
@click.option(
    "--ca-file", type=click.Path(path_type=Path, exists=True), help="Verify the server with these CA certificates."
)
@click.option("--no-resumption", is_flag=True, help="Full TLS handshake for each connection.")
@click.option("--auth", metavar="USER:PASSWORD", help="Authenticate [also PENSTOCK_LOAD_AUTH in the environment].")
@click.option("--source", "sources", multiple=True, metavar="IP", help="Source IP address. Repeatable.")
@click.option("--helo", "hello", default="load.invalid", show_default=True, metavar="NAME", help="EHLO hostname.")
@click.option(
    "--header", is_flag=True, help="Write the sequence tag into the header field X-Penstock-Sequence as well."
)
@click.option("--run", metavar="NAME", help="Name of the run in its sequence tags [default: random].")
@click.option("--seed", type=int, default=1, show_default=True, help="Random seed of the message sizes.")
@click.option(
    "--timeout", type=_duration, default=60.0, show_default=True, metavar="TIME", help="Time to wait for a reply."
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 when violated: 'dot.p99<50ms', 'error_rate<0.1%', 'rate>=1000'. Repeatable.",
)
@click.option(
    "--abort-on-threshold",
    is_flag=True,
    help="Stop the run once a --threshold is violated, and exit with 1. Checked every second, on what was measured so "
    "far. A rate near the offered one needs --warm-up: it is lower while the sessions connect and in a ramp.",
)
@click.option(
    "--find-rate",
    metavar="CONDITION",
    help="Search for the highest rate that meets this condition, such as 'dot.p99<50ms', in trials of --duration "
    "[default: 5s], starting at --rate [default: 100].",
)
@click.option(
    "--report",
    "report_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a report: .html or .json. Repeatable.",
)
@click.option(
    "--compare",
    "compare_files",
    nargs=2,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="A.json B.json",
    help="Compare two reports; sends nothing.",
)
@click.option(
    "--fail-on-regression",
    type=_converter(_parse_percentage),
    metavar="P%",
    help="With --compare: exit with 1 if B is worse by more than P% and by more than the noise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line per second when there is no terminal.")
@click.pass_context
def load(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    report_files: tuple[Path, ...],
    compare_files: tuple[Path, Path] | None,
    fail_on_regression: float | None,
    as_json: bool,
    verbose: bool,
    thresholds: tuple[str, ...],
    abort_on_threshold: bool,
    find_rate: str | None,
    **options: Any,
) -> None:
    """Send messages to a server, as fast as it takes them or at a given rate, and measure the latency of each phase.

    \b
    penstock load 127.0.0.1:2525 --sessions 100 --messages 100000 --reuse
    penstock load 127.0.0.1:2525 --sessions 500 --rate 2000 --duration 60s --report run.html --report run.json
    penstock load 127.0.0.1:2525 --duration 30s --threshold 'dot.p99<50ms' --threshold 'error_rate<0.1%'
    penstock load --compare before.json after.json --fail-on-regression 10%

    A target is 127.0.0.1:2525, [::1]:25, mx.example.org:25 or unix:/path. A name is resolved once, to the first of its
    addresses that accepts a connection. Sessions use several targets round robin.

    The latency of a message (phase `message`) counts from its MAIL to the reply after its end; in an open loop (--rate,
    --stages) it counts from the intended start, so that a server is charged for the messages it delayed.

    Thresholds: connect, greeting, hello, tls, auth, mail, rcpt, data, dot, message, session with .p50 .p90 .p99 .p99.9
    .max .mean, and rate, error_rate; operators < <= > >=; units us, ms, s, %.

    Exit code 0 when every message was accepted and all thresholds hold, 1 when not, 2 for usage errors.
    """  # noqa: D301 - \b keeps click from wrapping these lines
    _check_reports(report_files)
    if compare_files is not None:
        _refuse_others(context)
        _compare(compare_files, report_files, as_json=as_json, limit=fail_on_regression)
        return
    if fail_on_regression is not None:
        raise click.UsageError("--fail-on-regression needs --compare A.json B.json")
    if abort_on_threshold and (not thresholds or find_rate is not None):
        raise click.UsageError("--abort-on-threshold needs --threshold, and cannot be combined with --find-rate")
    console = Console(stderr=True)
    try:
        conditions = [Threshold.parse(text) for text in thresholds]
        plan = _plan(targets, options, is_search=find_rate is not None)
        if find_rate is None:
            report = _measure(plan, console, conditions, verbose=verbose, may_abort=abort_on_threshold)
        else:
            report = _search(plan, Threshold.parse(find_rate), console, conditions)
    except (PlanError, OSError) as exc:
        raise click.UsageError(str(exc)) from exc
    except WorkerError as exc:
        raise (click.UsageError if exc.is_usage else click.ClickException)(str(exc)) from exc
    _publish(report, report_files, as_json=as_json)
    has_passed = all(each["passed"] for each in report["thresholds"]) and report.get("sustainable_rate") != 0
    raise SystemExit(0 if has_passed and report["accepted"] and not report["error_rate"] else 1)


def _check_reports(files: Sequence[Path]) -> None:
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise click.UsageError(f"--report {file}: the name must end with .html or .json")
        reports.check_place(file)


def _plan(targets: tuple[str, ...], options: dict[str, Any], *, is_search: bool) -> Plan:
    """Make a plan of the command line. Raise PlanError."""
    if not targets:
        raise PlanError("missing target: penstock load HOST:PORT")
    auth = options.pop("auth") or os.environ.get("PENSTOCK_LOAD_AUTH", "")
    user, colon, password = auth.partition(":")
    if auth and not (user and colon):
        raise PlanError("--auth must be USER:PASSWORD")
    options["stages"] = options["stages"] or ()
    for name in ("duration", "timeout", "rate"):
        if options[name] is not None and not options[name] > 0:  # NaN is not
            raise PlanError(f"--{name} must be more than 0")
    for one, other in (("reuse", "per_connection"), ("folder", "size")):
        if options[one] and options[other] is not None:
            raise PlanError(f"--{one} and --{other.replace('_', '-')} are mutually exclusive")
    if is_search:
        if options["stages"] or options["messages"] is not None:
            raise PlanError("--find-rate runs trials of --duration at a constant rate, without --stages or --messages")
        options["duration"] = options["duration"] or _TRIAL
        options["rate"] = options["rate"] or _FIRST_RATE
    elif options["messages"] is None and options["duration"] is None and not options["stages"]:
        options["messages"] = 1000
    options["size"] = "4096" if options["size"] is None else options["size"]
    reuse, per_connection = options.pop("reuse"), options.pop("per_connection")
    run = options.pop("run") or "".join(random.SystemRandom().choices(_LETTERS, k=6))
    return Plan(
        targets=[Target.parse(target) for target in targets],
        per_connection=per_connection or (0 if reuse else 1),
        pipelining=options.pop("pipeline"),
        chunking=options.pop("bdat"),
        resumption=not options.pop("no_resumption"),
        user=user,
        password=password,
        run=run,
        **options,
    )


# ---- runs


def _measure(
    plan: Plan, console: Console, conditions: Sequence[Threshold], *, verbose: bool = False, may_abort: bool = False
) -> dict[str, Any]:
    """Run a plan and return its report. Raise PlanError, WorkerError, OSError.

    With `may_abort`, stop once a condition is violated.
    """
    with ExitStack() as stack:
        runner: Runner
        if plan.workers == 1:
            runner = Generator(plan)
        else:
            runner = stack.enter_context(closing(WorkerGroup(plan, is_judged=may_abort)))
        stopped_by = trio.run(_run, runner, console, verbose, conditions if may_abort else ())
    return _report(runner, stopped_by, conditions)


def _search(plan: Plan, threshold: Threshold, console: Console, conditions: Sequence[Threshold]) -> dict[str, Any]:
    """Search for the highest sustainable rate, and return the report of its trial. Raise PlanError and the like."""
    trials: list[Trial] = []

    def trial(rate: float) -> Trial | None:
        # A server that leaves a second's messages waiting does not sustain the rate.
        backlog = max(plan.sessions, int(rate)) // plan.workers + 1
        # Each trial is a run of its own: a sink would take its messages for duplicates.
        run = f"{plan.run[:_RUN_OF_TRIALS]}{len(trials) + 1}"
        tried = replace(plan, rate=rate, give_up_at=backlog, run=run)
        report = _measure(tried, console, conditions)
        if report["interrupted"]:
            return None
        trials.append(judge(report, tried, threshold))
        verdict = "sustained" if trials[-1].passed else "not sustained"
        with suppress(OSError):  # a terminal may be closed, and the report is still to be written
            console.print(f"{rate:10,.4g}/s  {verdict}  ({trials[-1].reason})", highlight=False, soft_wrap=True)
        return trials[-1]

    assert plan.rate is not None
    best = find_rate(trial, plan.rate)
    if not trials:
        raise click.Abort
    report = (best or trials[-1]).report
    report["sustainable_rate"] = 0.0 if best is None else best.rate
    report["search"] = [{"rate": each.rate, "passed": each.passed, "reason": each.reason} for each in trials]
    return report


async def _run(runner: Runner, console: Console, verbose: bool, conditions: Sequence[Threshold]) -> list[Result | None]:
    """Run, and return what has stopped it: None for a signal, or a violation. Raise PlanError, WorkerError."""
    await runner.resolve()
    stopped_by: list[Result | None] = []
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, runner, stopped_by)
        nursery.start_soon(_show, runner, console, verbose)
        if conditions:
            nursery.start_soon(_stop_on_violation, runner, conditions, stopped_by)
        try:
            await runner.run()
        except (PlanError, WorkerError) as exc:
            failure = exc  # raised outside of the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return stopped_by


async def _stop_on_signals(
    runner: Runner, stopped_by: list[Result | None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Stop at SIGINT, SIGTERM or SIGHUP: messages in flight may end. End the run at a second one."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that closes; nohup ignores it
        numbers.append(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        await anext(signals)
        stopped_by.append(None)
        runner.stop()
        await anext(signals)
        runner.abort()
        await trio.sleep_forever()


async def _stop_on_violation(runner: Runner, conditions: Sequence[Threshold], stopped_by: list[Result | None]) -> None:
    while not stopped_by:
        await trio.sleep(1)
        found = runner.so_far()
        results = [] if found is None else [condition.check(found) for condition in conditions]
        stopped_by += [each for each in results if each.value is not None and not each.passed][:1]
    runner.stop()


async def _show(runner: Runner, console: Console, verbose: bool) -> None:
    """Show the progress, until cancelled: a live line on a terminal, a line per second with --verbose."""
    # Around all of it: on a terminal that was closed, the end of the live line fails in place of a cancellation.
    with suppress(OSError):
        if not console.is_terminal:
            while verbose:
                await trio.sleep(1)
                console.print(_progress(runner).plain, soft_wrap=True, highlight=False)
            return
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(_progress(runner), refresh=True)
                await trio.sleep(1 / _REFRESH)


def _progress(runner: Runner) -> Text:
    plan, counts = runner.plan, runner.counts
    last = counts.seconds[-1] if counts.seconds else None
    if plan.messages is not None:
        part = (runner.accepted + runner.failed) / plan.messages
    else:
        assert plan.seconds is not None
        part = counts.elapsed / (plan.seconds - (plan.warm_up if runner.warm_up is not None else 0))
    part = min(part, 1.0)
    line = Text()
    line.append("█" * int(part * 20), style="cyan")
    line.append("░" * (20 - int(part * 20)), style="dim")
    line.append(f" {part:4.0%}  {runner.accepted:,} accepted")
    if runner.failed:
        line.append(f"  {runner.failed:,} failed", style="bold red")
    if last is not None:
        line.append(f"  {last.accepted / last.length:,.0f}/s  p50 {last.p50 * 1e3:.1f} ms  p99 {last.p99 * 1e3:.1f} ms")
    line.append(f"  {runner.open_sessions:,} connections", style="dim")
    return line


# ---- reports


def _report(runner: Runner, stopped_by: Sequence[Result | None], conditions: Sequence[Threshold]) -> dict[str, Any]:
    plan, counts, warm_up = runner.plan, runner.counts, runner.warm_up
    violated = next(filter(None, stopped_by), None)
    report = {
        "report": "penstock load",
        "schema": 1,
        "version": __version__,
        "command": shlex.join(["penstock", *_without_password(sys.argv[1:])])
        .encode("utf-8", "replace")  # a file name may have any octets
        .decode(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}",
        "targets": [str(target) for target in plan.targets],
        "run": plan.run,
        "sessions": plan.sessions,
        "workers": plan.workers,
        "interrupted": bool(stopped_by),
        "aborted_by": violated and violated.threshold,
        "intended_rate": plan.rate,
        "stages": [stage._asdict() for stage in plan.stages],
        "warm_up": None
        if warm_up is None
        else {
            "seconds": plan.warm_up,
            "accepted": warm_up.accepted,
            "failed": warm_up.failed,
        },
        **counts.as_report(),
    }
    # The threshold that has stopped the run stays violated, whatever the messages that were in flight have changed.
    results = (violated if violated and violated.threshold == each.text else each.check(report) for each in conditions)
    return {**report, "thresholds": [result._asdict() for result in results]}


def _without_password(arguments: list[str]) -> list[str]:
    """Return the arguments of the command line without the value of --auth."""
    hidden = [*arguments]
    for place, word in enumerate(arguments):
        if word == "--auth" and place + 1 < len(arguments):
            hidden[place + 1] = "***"
        elif word.startswith("--auth="):
            hidden[place] = "--auth=***"
    return hidden


def _publish(report: dict[str, Any], files: Sequence[Path], *, as_json: bool) -> None:
    """Write the reports and print the result. Raise click.ClickException at the end if a file cannot be written."""
    trouble = _write_all(files, report, lambda: page(report))
    try:
        if as_json:
            click.echo(json_text(report))
        else:
            Console().print(summary_table(report))
    except OSError as exc:
        raise click.ClickException(f"standard output: {exc.strerror}") from exc
    if trouble is not None:
        raise trouble


def _write_all(
    files: Sequence[Path], data: Mapping[str, Any], page_of: Callable[[], str]
) -> click.ClickException | None:
    """Write all reports, and return the first failure."""
    trouble: click.ClickException | None = None
    for file in files:
        try:
            reports.write(file, page_of().encode() if file.suffix == ".html" else msgspec.json.encode(data))
        except click.ClickException as exc:
            trouble = trouble or exc
    return trouble


# ---- comparison


def _refuse_others(context: click.Context) -> None:
    """Raise click.UsageError for options of a run: a comparison sends nothing."""
    for param in context.command.params:
        name = param.name or ""
        if name in _OF_COMPARISON or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if name == "targets" and not context.params["targets"]:
            continue
        given = context.params["targets"][0] if name == "targets" else param.opts[-1]
        raise click.UsageError(f"--compare reads two reports and sends nothing; remove {given}")


def _compare(paths: tuple[Path, Path], files: Sequence[Path], *, as_json: bool, limit: float | None) -> None:
    """Compare two reports. Ends the process with code 1 for a regression beyond the limit."""
    first, second = (_read_report(path) for path in paths)
    try:
        changes = compare(first, second)
        found = [] if limit is None else regressions(changes, limit)
        data = _comparison(paths, changes, found)
        trouble = _write_all(
            files, data, lambda: comparison_page(first, second, changes, [str(path) for path in paths])
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise click.UsageError(f"{paths[0]} and {paths[1]} are not both reports of this version") from exc
    if as_json:
        click.echo(json_text(data))
    else:
        Console().print(comparison_table(changes))
        for each in found:
            click.echo(f"regression: {each.metric}")
    if trouble is not None:
        raise trouble
    if found:
        raise SystemExit(1)


def _comparison(paths: Sequence[Path], changes: Sequence[Change], found: Sequence[Change]) -> dict[str, Any]:
    return {
        "report": "penstock load comparison",
        "schema": 1,
        "first": str(paths[0]),
        "second": str(paths[1]),
        "verdict": overall(changes),
        "changes": [each._asdict() for each in changes],
        "regressions": [each.metric for each in found],
    }


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        if found["report"] != "penstock load" or found["schema"] != 1:
            raise click.UsageError(f"{path} is not a report of this version")
        found["phases"] = {_RENAMED.get(name, name): summary for name, summary in found["phases"].items()}
        found["replies"] = [[_RENAMED.get(name, name), *rest] for name, *rest in found["replies"]]
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError, AttributeError) as exc:
        raise click.UsageError(f"{path} is not a report of penstock load") from exc
    return found
