"""`penstock sink`: accept and discard mail, inject faults on request, report what arrived: a target for load tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import trio

from penstock.app import Overrides, Server
from penstock.cli import reports
from penstock.cli.faulting import FaultInjection, WorkersFaultControl, fault_options
from penstock.cli.once import OnceCommand
from penstock.cli.receiving import Receiving, ReceivingOptions, as_expected, duplicates_of, receipt_options
from penstock.cli.running import listen_on, run
from penstock.cli.sinkworkers import PLAN, RESET, Progress, SinkFrame, SinkWorkers, Sockets
from penstock.cli.smtpsink import smtp_sink_help
from penstock.config import ConfigError, DeliverySettings, ListenerSettings, Settings, load
from penstock.delivery.discard import DiscardDelivery
from penstock.forked import ABORT, END, WorkerLine
from penstock.journal import JournalSettings
from penstock.policy.recipients import RecipientSettings
from penstock.server.limits import LimitSettings
from penstock.server.listener import WireSettings
from penstock.sink.kept import KeptMessage
from penstock.sink.merging import KeptCopy, Merging, WorkerReport
from penstock.sink.report import Report, Sample, encode
from penstock.sink.statistics import FaultCounters

_replace = msgspec.structs.replace

_MAX_UNSHOWN: Final = 10
"""Seconds whose counters wait to be printed."""

_PAUSE: Final = 0.1
"""Seconds between two reports of progress, and after which a message that a worker has kept is on the page."""
_KEPT_BATCH: Final = 1 << 20
"""Octets of messages that a worker sends together."""

_LISTENER = ListenerSettings(
    max_size=0,
    max_hops=0,
    limits=LimitSettings(recipients=100_000, errors=1_000_000, unknown_recipients=1_000_000, auth_failures=1_000_000),
    wire=WireSettings(bare_lf="accept", bare_cr="accept", nul="accept", long_line="accept"),
)


@click.command(
    cls=OnceCommand,
    epilog=f"\b\n{smtp_sink_help()}",
    context_settings={"help_option_names": ["--help"], "max_content_width": 110},
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen on this address; unix:/path for a unix socket. May be repeated. [default: 127.0.0.1:2525]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Use the listeners, users, checks and limits of a `penstock serve` configuration; its delivery, metrics and "
    "control socket are ignored.",
)
@click.option(
    "--tls",
    type=click.Choice(["none", "starttls", "implicit"]),
    help="TLS mode of all listeners; implicit: from the first octet, as on port 465 [default: starttls].",
)
@click.option("--certificate", metavar="FILE", help="Certificate chain (PEM) [default: generated for each run].")
@click.option("--key", metavar="FILE", help="Private key (PEM) [default: in the certificate file].")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the CA of the generated certificate to this file, for clients that verify.",
)
@click.option("--messages", type=click.IntRange(min=1), metavar="N", help="Stop after N messages.")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Allow addresses that other machines can reach, although they accept mail for every domain.",
)
@click.option("--user", metavar="NAME", help="Run as this user after the sockets are bound and the keys are read.")
@click.option("--allow-root", is_flag=True, help="Allow root on addresses that other machines can reach.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    metavar="N",
    help="Run N processes on the same addresses, with one report and page, and common files of --keep and --fault-log "
    "[default: 1].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the final counters as JSON.")
@fault_options
@receipt_options
@click.pass_context
def sink(
    context: click.Context,
    /,
    addresses: tuple[str, ...],
    messages: int | None,
    sessions: int | None,
    is_open: bool,
    workers: int,
    as_json: bool,
    user: str | None,
    allow_root: bool,
    config_file: Path | None,
    tls: str | None,
    certificate: str | None,
    key: str | None,
    ca_file: Path | None,
    **options: Any,
) -> None:
    """Accept and discard every message, and report what arrived.

    The sink has all extensions of `penstock serve`, STARTTLS with a generated certificate included. Without --config,
    it accepts bare line ends, NULs and long lines; only CR LF . CR LF ends the data. SIGINT and SIGTERM stop it
    gracefully.
    """
    faults = FaultInjection.of(options)
    letters = faults.letters
    if letters.given.get("h") == "":
        click.echo(context.get_help())
        return
    if workers > 1 and letters.stores:
        raise click.UsageError("--workers cannot be combined with -d or -D")
    if user is not None and "u" in letters.given:
        raise click.UsageError("-u and --user are mutually exclusive")
    receiving = Receiving(ReceivingOptions(**options), letters.stores, workers)
    with tempfile.TemporaryDirectory(prefix="penstock-sink-") as folder:
        settings = _with_tls(_base(config_file, folder), tls, certificate, key)
        settings = _as_user(settings, user or letters.given.get("u"), allow_root)
        settings = faults.prepare(settings, Path(folder) / "tls")
        if workers > 1:
            faults.check_workers()
        if ca_file is not None:
            _copy(Path(folder) / "tls" / "ca.pem", ca_file)
        settings = listen_on(settings, (*addresses, *letters.listen()))
        messages, sessions = messages or letters.given.get("M"), sessions or letters.given.get("n")
        made = _Sink(settings, faults, receiving, messages, sessions, is_open)
        found = made.run() if workers == 1 else made.run_workers(workers)
        if found is None:
            return
        counts, report = found
        file = options["report_file"]
        try:
            if report is not None and file is not None:
                reports.write(file, encode(report))  # first: a terminal may be closed
        finally:
            counts |= _troubles(report)
            line = " ".join(f"{name}={count}" for name, count in counts.items())
            click.echo(msgspec.json.encode(counts) if as_json else line, err=file == reports.STDOUT)
        if made.trouble:
            raise click.ClickException(made.trouble)
        if report is not None and not as_expected(report):
            raise click.ClickException("messages are missing or duplicated")


class _Sink:
    """A run of a sink, in one process or several."""

    def __init__(
        self,
        settings: Settings,
        faults: FaultInjection,
        receiving: Receiving,
        messages: int | None,
        sessions: int | None,
        is_open: bool,
    ) -> None:
        self._settings = settings
        self._faults = faults
        self._receiving = receiving
        self._messages, self._sessions = messages, sessions
        self._is_open = is_open
        self.trouble = ""
        """What has failed at the end of the run, but for its report."""

    def run(self) -> tuple[dict[str, int], Report | None] | None:
        """Run in this process. Return the counts and the report; None if the sink did not start."""
        faults, receiving = self._faults, self._receiving
        counted: list[Server] = []

        def announce(parts: Server) -> None:
            counted.append(parts)
            faults.begin(parts)
            receiving.begin(parts.worker, parts.addresses, faults.control)
            receiving.announce()
            click.echo(f"penstock: sink on {', '.join(parts.addresses)}", err=True)

        run(
            self._settings,
            announce,
            done=lambda parts: self._is_done(self._progress(parts)),
            allow_open=self._is_open,
            overrides=self._overrides(),
            beside=lambda _: receiving.run(faults.control),
        )
        if not counted:
            return None
        self.trouble = faults.end()
        report = receiving.end()
        return _counts(counted[0], receiving), report

    def run_workers(self, workers: int) -> tuple[dict[str, int], Report | None]:
        """Run in several processes. Return the sum of the counts, and one report."""
        receiving = self._receiving
        control = WorkersFaultControl(self._faults)
        merging = Merging(workers, receiving.message_ids, lambda: processes.tell(RESET, merging.generation))
        control.on_replaced = lambda: processes.tell(PLAN, control.number)
        shown, to_show = trio.open_memory_channel[tuple[Sample, int]](_MAX_UNSHOWN)

        def announce() -> None:
            receiving.announce()
            click.echo(f"penstock: sink on {', '.join(processes.addresses)}; {workers} workers", err=True)

        def take(worker: int, frame: SinkFrame) -> None:
            for each in frame.kept:
                receiving.add_kept(each.message())
            samples: list[Sample] = []
            if frame.second is not None:
                samples = merging.add_second(worker, frame.second)
            if frame.report is not None:
                samples = merging.add_report(worker, frame.report)
                self.trouble = self.trouble or frame.report.trouble
            if receiving.metrics is not None and (samples or frame.report is not None):
                receiving.add_samples(samples, merging.metrics())
            for sample in samples:
                with suppress(trio.WouldBlock):  # the task that shows the samples is behind
                    shown.send_nowait((sample, merging.messages))

        async def show() -> None:
            async for sample, count in to_show:
                await receiving.show(sample, count)

        async def beside() -> None:
            await processes.ready.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(show)
                nursery.start_soon(receiving.serve_page, control)

        processes = SinkWorkers(
            self._settings, workers, partial(self._work, control), allow_open=self._is_open, serves=receiving.has_page
        )
        # Before any of them reports: what connections receive before all workers are ready counts, too.
        receiving.begin(merging, processes.addresses, merging)
        processes.run(announce, take, self._is_done, beside=beside)
        self.trouble = self._faults.end() or self.trouble
        return dict(merging.counts), receiving.end()

    def _work(self, control: WorkersFaultControl, sockets: Sockets, line: WorkerLine) -> WorkerReport:
        """Be one of several processes. Return what it has counted."""
        faults, receiving = self._faults, self._receiving
        receiving.become_worker()
        line.commands = {RESET: receiving.reset, PLAN: control.load}
        kept = KeptOutbox(receiving.take_kept)
        counted: list[Server] = []

        def announce(parts: Server) -> None:
            counted.append(parts)
            line.commands[END] = lambda wanted: parts.abort() if wanted == ABORT else parts.stop()
            faults.begin(parts)
            receiving.begin(parts.worker, parts.addresses, faults.control)

        async def beside(parts: Server) -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(line.follow, parts.abort)
                nursery.start_soon(self._tell_progress, parts, line)
                if receiving.metrics is not None:
                    nursery.start_soon(_tell_seconds, receiving, faults.control, line)
                if receiving.has_page:
                    nursery.start_soon(kept.follow, line)

        run(
            self._settings,
            announce,
            allow_open=self._is_open,
            overrides=self._overrides(sockets),
            beside=beside,
        )
        (parts,) = counted
        for frame in kept.frames():
            line.tell_at_end(frame)
        trouble = faults.end()
        receiving.report_failures()
        counts, fault_counts = _counts(parts, receiving), list(faults.control.counted())
        if receiving.metrics is None:
            return WorkerReport(counts, faults=fault_counts, trouble=trouble)
        rest = receiving.second(faults.control)
        rest.metrics = None  # the same as those of the report
        tags = receiving.metrics.sequences.take_changes() if rest.tags is None else None
        return WorkerReport(counts, receiving.metrics.state(), tags, fault_counts, rest, trouble)

    def _overrides(self, sockets: Sockets | None = None) -> Overrides:
        return Overrides(
            delivery=self._receiving.delivery,
            authenticator=self._faults.authenticator,
            metrics=self._receiving.metrics,
            components=(self._faults.component,),
            sockets=sockets,
        )

    def _progress(self, parts: Server) -> Progress:
        messages = 0 if self._messages is None else _counts(parts, self._receiving)["messages"]
        return Progress(messages, parts.worker.sessions, parts.worker.open_connections)

    async def _tell_progress(self, parts: Server, line: WorkerLine) -> None:
        last: Progress | None = None
        while True:
            now = self._progress(parts)
            if now != last:
                await line.tell(SinkFrame(progress=now))
                last = now
            await trio.sleep(_PAUSE)

    def _is_done(self, progress: Progress) -> bool:
        if self._sessions is not None and progress.sessions >= self._sessions and not progress.open:
            return True
        return self._messages is not None and progress.messages >= self._messages


async def _tell_seconds(receiving: Receiving, faults: FaultCounters, line: WorkerLine) -> None:
    """Report each second to the parent, until cancelled."""
    due = trio.current_time()
    while True:
        due += 1
        await trio.sleep_until(due)
        await line.tell(SinkFrame(second=receiving.second(faults)))


class KeptOutbox:
    """Messages that a worker has kept for the page, on their way to the parent."""

    def __init__(self, take: Callable[[], list[KeptMessage]]) -> None:
        """`take` returns the messages since the last time: those beyond the bounds of --keep were dropped here."""
        self._take = take

    async def follow(self, line: WorkerLine) -> None:
        """Send messages until cancelled, or until the end of the line."""
        while True:
            await trio.sleep(_PAUSE)
            with trio.CancelScope(shield=True):  # what was taken is sent: the clients have a 250 for it
                for frame in self.frames():
                    if not await line.tell(frame):
                        return

    def frames(self) -> Iterator[SinkFrame]:
        """Yield the messages that were kept since the last time."""
        octets, frame = 0, SinkFrame(kept=[])
        for message in self._take():
            if octets >= _KEPT_BATCH:
                yield frame
                octets, frame = 0, SinkFrame(kept=[])
            frame.kept.append(KeptCopy.of(message))
            octets += len(message.raw)
        if frame.kept:
            yield frame


def _base(config_file: Path | None, folder: str) -> Settings:
    """Return the settings of a sink, or those of a configuration file with the delivery of a sink."""
    if config_file is None:
        return Settings(
            hostname="localhost",
            data_dir=folder,
            listener=(_LISTENER,),
            delivery=DeliverySettings(kind="discard"),
            journal=JournalSettings(events="errors"),
        )
    try:
        settings = load(config_file)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    return _replace(settings, delivery=DeliverySettings(kind="discard"), route=(), recipients=RecipientSettings())


def _with_tls(settings: Settings, mode: str | None, certificate: str | None, key: str | None) -> Settings:
    """Return the settings with the TLS options applied to every listener."""
    if key is not None and certificate is None:
        raise click.UsageError("--key requires --certificate")
    changed: dict[str, str] = {} if mode is None else {"mode": mode}
    if certificate is not None:
        changed |= {"certificate": certificate, "key": key or ""}
    return _replace(
        settings, listener=tuple(_replace(each, tls=_replace(each.tls, **changed)) for each in settings.listener)
    )


def _as_user(settings: Settings, user: str | None, allow_root: bool) -> Settings:
    """Return the settings with the options about the user applied."""
    changed = {} if user is None else {"user": user, "group": ""}
    server = _replace(settings.server, allow_root=settings.server.allow_root or allow_root, **changed)
    return _replace(settings, server=server)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as exc:
        raise click.ClickException(f"{target}: {exc.strerror}") from exc


def _counts(parts: Server, receiving: Receiving) -> dict[str, int]:
    """Return what the sink has received."""
    metrics, delivery = receiving.metrics, parts.delivery
    if metrics is not None:
        sessions, messages = metrics.sessions, metrics.accepted + metrics.unheard
        recipients, octets = metrics.recipients, metrics.text_octets
    else:
        assert isinstance(delivery, DiscardDelivery)
        sessions, messages = parts.worker.sessions, delivery.messages
        recipients, octets = delivery.recipients, delivery.octets
    return {"sessions": sessions, "messages": messages, "recipients": recipients, "octets": octets}


def _troubles(report: Report | None) -> dict[str, int]:
    """Return refusing replies, lost and duplicate messages and faults; nothing without statistics."""
    if report is None:
        return {}
    return {
        "refusals": sum(each.count for each in report.replies if each.code >= 400),
        "lost": report.messages.lost,
        "duplicates": duplicates_of(report),
        "faults": sum(each.count for each in report.faults),
    }
