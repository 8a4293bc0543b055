"""What `penstock sink` does about faults: plans, magic recipients, and the letters of smtp-sink."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from penstock.app import Server
from penstock.auth.base import Authenticator, AuthSettings
from penstock.cli.smtpsink import LetterWishes, smtp_sink_letters
from penstock.config import ListenerSettings, Settings
from penstock.server.connection import Component
from penstock.sink.accept_all import AcceptAllAuthenticator
from penstock.sink.certificates import Certificates
from penstock.sink.control import FaultAdmin, FaultFile, describe_faults
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.injector import fault_injection
from penstock.sink.plan import NO_PLAN, PlanError, load_plan

F = TypeVar("F", bound=Callable[..., Any])

_replace = msgspec.structs.replace

_ANYBODY: Final = AuthSettings(mechanisms=("PLAIN", "LOGIN"), without_tls=True)


def _describe(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(describe_faults(), nl=False)
        context.exit()


_OPTIONS: Final = (
    click.option("--faults", "plan_file", type=click.Path(path_type=Path), help="Misbehave as this plan says, a TOML."),
    click.option(
        "--seed", type=click.IntRange(0, (1 << 63) - 1), metavar="N", help="What is drawn, is drawn from this number."
    ),
    click.option(
        "--magic/--no-magic",
        default=True,
        help="Recipients such as 450-4.2.2@, delay-2s@ or drop@ ask for a fault [default: yes].",
    ),
    click.option(
        "--fault-log",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write each fault to this file, one JSON object a line.",
    ),
    click.option(
        "--describe-faults",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_describe,
        help="Print all there is to know of plans and of magic recipients, and end.",
    ),
    click.option("--auth", is_flag=True, help="Extensions AUTH PLAIN and LOGIN; every name and password is right."),
    click.option("--sessions", type=click.IntRange(min=1), metavar="N", help="Stop after so many sessions."),
)


def fault_options(command: F) -> F:
    """Add the options to a command, which gives them to `Faulting.take`."""
    command = smtp_sink_letters(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Faulting:
    """The faults of one run of a sink. Made before the worker, whose connections ask the engine."""

    def __init__(
        self,
        letters: LetterWishes,
        plan_file: Path | None = None,
        seed: int | None = None,
        *,
        fault_log: Path | None = None,
        magic: bool = True,
        auth: bool = False,
    ) -> None:
        """Raise click.UsageError for wishes that can not be met, ClickException for a plan that can not be read."""
        letters.check()
        self.letters = letters
        self._offers_auth = auth
        self._plan_file, self._seed = plan_file, seed
        if auth and "a" in letters.given:
            raise click.UsageError("-a and --auth exclude each other")
        try:
            self._log = FaultLog() if fault_log is None else FaultFile(fault_log)
        except OSError as exc:
            raise click.ClickException(f"{fault_log}: {exc.strerror}") from exc
        self._engine = FaultEngine(receipts=self._log, has_magic=magic)
        self._certificates: Certificates | None = None
        self.desk = FaultAdmin(self._engine, self._log, seed=seed)

    @classmethod
    def take(cls, options: dict[str, Any]) -> Faulting:
        """Take what is about faults out of the options of a command."""
        letters = LetterWishes.take(options)
        own = {name: options.pop(name) for name in ("plan_file", "seed", "fault_log", "magic", "auth")}
        return cls(letters, **own)

    def prepare(self, settings: Settings, folder: Path) -> Settings:
        """Load the plan, make the certificates, and return the settings as the letters have them.

        The right certificate is put into the folder, for listeners that have none, and its authority beside it. Raise
        OSError.
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
            self.desk.note_text(self._plan_file.read_text(encoding="utf-8"))
        names = dict.fromkeys([settings.own_hostname, "localhost", "127.0.0.1", "::1"])
        self._certificates = Certificates(list(names))
        self._certificates.put(folder)
        listeners = tuple(self._prepared(each, str(folder / "server.pem")) for each in settings.listener)
        settings = _replace(settings, listener=listeners)
        for note in self.letters.notes:
            click.echo(f"penstock: {note}", err=True)
        return settings

    def _prepared(self, listener: ListenerSettings, certificate: str) -> ListenerSettings:
        if listener.tls.mode != "none" and not listener.tls.certificate:
            listener = _replace(listener, tls=_replace(listener.tls, certificate=certificate))
        return _replace(listener, auth=_ANYBODY) if self._offers_auth else listener

    @property
    def component(self) -> Component:
        """The component that makes connections misbehave."""
        return fault_injection(self._engine, self._certificates)

    @property
    def authenticator(self) -> Authenticator | None:
        """Who knows everybody, where that is asked for."""
        return AcceptAllAuthenticator() if self._offers_auth else None

    def begin(self, parts: Server) -> None:
        """Set what smtp-sink sets of the sockets."""
        for bound in parts.listeners:
            if self.letters.window is not None:
                bound.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.letters.window)
            if self.letters.backlog is not None:
                bound.socket.listen(self.letters.backlog)

    def end(self) -> None:
        """Finish the log. Raise ClickException when it is not whole."""
        try:
            if isinstance(self._log, FaultFile):
                self._log.close()
        except OSError as exc:
            raise click.ClickException(f"--fault-log: {exc.strerror}") from exc
