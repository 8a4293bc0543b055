"""Fault injection of `penstock sink`: fault plans, magic recipients, and the options of smtp-sink."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from penstock.app import Server
from penstock.auth.base import Authenticator, AuthSettings
from penstock.cli.smtpsink import SmtpSinkOptions, smtp_sink_letters
from penstock.config import ListenerSettings, Settings
from penstock.server.connection import Component
from penstock.sink.accept_all import ACCEPT_ALL_MECHANISMS, AcceptAllAuthenticator
from penstock.sink.certificates import Certificates
from penstock.sink.control import FaultAdmin, FaultFile, describe_faults
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.injector import fault_injection
from penstock.sink.plan import NO_PLAN, PlanError, PlanSettings, load_plan, parse_plan

F = TypeVar("F", bound=Callable[..., Any])

_replace = msgspec.structs.replace

_MAX_PLAN: Final = 1 << 20
"""Octets of a plan that is given to several processes; a request to the page has fewer."""
_ACCEPT_ALL: Final = _replace(AuthSettings(without_tls=True), mechanisms=ACCEPT_ALL_MECHANISMS)


def _describe(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(describe_faults(), nl=False)
        context.exit()


_OPTIONS: Final = (
    click.option("--faults", "plan_file", type=click.Path(path_type=Path), help="Fault plan (TOML file)."),
    click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), metavar="N", help="Random seed of the fault plan."),
    click.option(
        "--magic/--no-magic",
        default=True,
        help="Let recipients such as 450-4.2.2@, delay-2s@ or drop@ request a fault [default: yes].",
    ),
    click.option(
        "--fault-log",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write every injected fault to this file, as JSON Lines.",
    ),
    click.option(
        "--describe-faults",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_describe,
        help="Print the reference of fault plans and magic recipients, then exit.",
    ),
    click.option(
        "--auth",
        is_flag=True,
        help=f"Offer AUTH ({', '.join(ACCEPT_ALL_MECHANISMS)}) and accept every name and password.",
    ),
    click.option("--sessions", type=click.IntRange(min=1), metavar="N", help="Stop after N sessions."),
)


def fault_options(command: F) -> F:
    """Add the options to a command, which passes them to `FaultInjection.of`."""
    command = smtp_sink_letters(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class FaultInjection:
    """The faults of one run of a sink. Made before the worker, because its connections use the engine."""

    def __init__(
        self,
        letters: SmtpSinkOptions,
        plan_file: Path | None = None,
        seed: int | None = None,
        *,
        fault_log: Path | None = None,
        magic: bool = True,
        auth: bool = False,
    ) -> None:
        """Raise click.UsageError for conflicting options, ClickException for a log that cannot be written."""
        letters.check()
        self.letters = letters
        self._offers_auth = auth
        self._plan_file, self._seed = plan_file, seed
        if auth and "a" in letters.given:
            raise click.UsageError("-a and --auth are mutually exclusive")
        try:
            self._log = FaultLog() if fault_log is None else FaultFile(fault_log)
        except OSError as exc:
            raise click.ClickException(f"{fault_log}: {exc.strerror}") from exc
        self._engine = FaultEngine(receipts=self._log, has_magic=magic)
        self._certificates: Certificates | None = None
        self.control = FaultAdmin(self._engine, self._log, seed=seed)

    @classmethod
    def of(cls, options: dict[str, Any]) -> FaultInjection:
        """Remove the options about faults from those of a command."""
        letters = SmtpSinkOptions.of(options)
        own = {name: options.pop(name) for name in ("plan_file", "seed", "fault_log", "magic", "auth")}
        return cls(letters, **own)

    def prepare(self, settings: Settings, folder: Path) -> Settings:
        """Load the plan, generate the certificates, and return the settings as changed by the smtp-sink options.

        The valid certificate, for listeners that name none, and its authority are written to the folder. Raise OSError,
        or ClickException for a plan that cannot be used.
        """
        settings = self.letters.apply(settings)
        try:
            plan = NO_PLAN if self._plan_file is None else load_plan(self._plan_file)
        except PlanError as exc:
            raise click.ClickException(str(exc)) from exc
        loaded, plan = plan, self.letters.plan(plan, settings.hostname)
        if self._seed is not None:
            plan = _replace(plan, seed=self._seed)
        self._engine.load(plan)
        if self._plan_file is not None and plan.rule == loaded.rule:
            self.control.note_text(self._plan_file.read_text(encoding="utf-8"))
        names = dict.fromkeys([settings.own_hostname, "localhost", "127.0.0.1", "::1"])
        self._certificates = Certificates(list(names))
        self._certificates.put(folder)
        listeners = tuple(self._prepared(each, str(folder / "server.pem")) for each in settings.listener)
        settings = _replace(settings, listener=listeners)
        for note in self.letters.notes:
            click.echo(f"penstock: {note}", err=True)
        return settings

    def check_workers(self) -> None:
        """Raise click.UsageError for a plan whose rules cannot be applied by several processes."""
        try:
            _check_workers(self._engine.plan)
        except PlanError as exc:
            raise click.UsageError(str(exc)) from exc

    def _prepared(self, listener: ListenerSettings, certificate: str) -> ListenerSettings:
        if listener.tls.mode != "none" and not listener.tls.certificate:
            listener = _replace(listener, tls=_replace(listener.tls, certificate=certificate))
        return _replace(listener, auth=_ACCEPT_ALL) if self._offers_auth else listener

    @property
    def component(self) -> Component:
        """The component that makes connections misbehave."""
        return fault_injection(self._engine, self._certificates)

    @property
    def authenticator(self) -> Authenticator | None:
        """The authenticator of --auth; None without it."""
        return AcceptAllAuthenticator() if self._offers_auth else None

    def begin(self, parts: Server) -> None:
        """Apply -T and the backlog to the listening sockets."""
        for bound in parts.listeners:
            if "T" in self.letters.given:
                bound.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.letters.given["T"])
            if self.letters.backlog is not None:
                bound.socket.listen(self.letters.backlog)

    def end(self) -> str:
        """Close the fault log. Return why it is incomplete, or an empty text."""
        try:
            if isinstance(self._log, FaultFile):
                self._log.close()
        except OSError as exc:
            return f"--fault-log: {exc.strerror}"
        return ""


def _check_workers(plan: PlanSettings) -> None:
    """Raise PlanError for a rule that counts or remembers."""
    for number, rule in enumerate(plan.rule):
        if condition := rule.counting_condition:
            raise PlanError(
                f"rule[{number}].{condition} cannot be combined with --workers: each process counts separately"
            )


class WorkersFaultControl:
    """The fault plan of several processes (penstock.sink.statistics.FaultControl).

    Made before the workers. A new plan is written to memory that all processes share, and `on_replaced` lets the
    workers call `load`; a plan that they read while the next one is written is replaced by it at once.
    """

    def __init__(self, faults: FaultInjection) -> None:
        self._control = faults.control
        self._shared = mmap.mmap(-1, _MAX_PLAN)
        self.on_replaced: Callable[[], None] = lambda: None
        self.number = 0
        """How often the plan was replaced."""

    @property
    def fails_next(self) -> bool:
        """Always false."""
        return False

    def check(self, text: str) -> list[str]:
        """Return the names of the rules of a plan. Raise PlanError."""
        plan = parse_plan(text)
        _check_workers(plan)
        return plan.names()

    def plan(self) -> str:
        """Return the plan in force as TOML."""
        return self._control.plan()

    def replace(self, text: str) -> None:
        """Put another plan in force. Raise PlanError."""
        self.check(text)
        data = text.encode()
        self._control.replace(text)
        self._shared[: len(data) + 1] = data + b"\0"  # which no TOML has
        self.number += 1
        self.on_replaced()

    def load(self, _: int) -> None:
        """Put the plan of the parent in force, in a worker."""
        with suppress(ValueError):
            self._control.replace(self._shared[: self._shared.find(b"\0")].decode())

    def fail_next(self, phase: str, reply: str, count: int) -> None:  # noqa: ARG002 - the interface
        """Raise ValueError."""
        raise ValueError("the next commands cannot be counted with --workers: each process counts separately")

    def pending(self) -> dict[str, int]:
        """Return nothing."""
        return {}
