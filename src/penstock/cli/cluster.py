"""`penstock cluster`: make, check and show the replicated queue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import trio

from penstock.cluster.settings import JetStreamSettings
from penstock.config import ConfigError, Settings, load
from penstock.spool.admins import QueueAdmins
from penstock.spool.store import SpoolError

if TYPE_CHECKING:
    from penstock.cluster.jetstream import JetStream

T = TypeVar("T")
_config = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), required=True, help="Configuration file of the server."
)


@click.group()
def cluster() -> None:
    """Make, check and show the replicated queue (delivery.kind = "jetstream")."""


def _settings(config_file: Path) -> Settings:
    try:
        settings = load(config_file)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    if settings.delivery.kind != "jetstream":
        raise click.UsageError(f'{config_file}: delivery.kind = "{settings.delivery.kind}" has no cluster')
    return settings


def run(config_file: Path | None, act: Callable[[JetStream, JetStreamSettings], Awaitable[T]]) -> T:
    """Connect to the cluster and do something; errors become one line and exit code 1."""
    from penstock.cluster import setup  # noqa: PLC0415 - needs the extra
    from penstock.net.nats import NatsError  # noqa: PLC0415

    assert config_file is not None
    settings = _settings(config_file)

    async def connect() -> T:
        async with setup.connected(settings.jetstream, Path(settings.data_dir)) as jetstream:
            return await act(jetstream, settings.jetstream)

    failures: list[Exception] = []

    async def guarded() -> T | None:
        try:
            return await connect()
        except* (NatsError, setup.SetupError, SpoolError, OSError, ValueError) as group:
            failures.append(group)
        return None

    result = trio.run(guarded)
    if failures:
        cause: BaseException = failures[0]
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise click.ClickException(str(cause))
    return result  # type: ignore[return-value]  # without a failure it is a T


@contextmanager
def cluster_admins(config_file: Path | None) -> Iterator[QueueAdmins]:
    """Give what `penstock spool` needs of all nodes. Raise click.UsageError or SpoolError."""
    if config_file is None:
        raise click.UsageError("--cluster requires --config")
    from penstock.cluster import admin, setup  # noqa: PLC0415 - needs the extra

    settings = _settings(config_file)
    layout = setup.make_layout(settings.jetstream)

    def ask(act: Callable[[JetStream], Awaitable[T]]) -> T:
        return run(config_file, lambda jetstream, _: act(jetstream))

    yield admin.ClusterAdmins(ask, layout)


@cluster.command()
@_config
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let the node relay again.")
def drain(config_file: Path, node: str, undo: bool) -> None:
    """Have a node give all its partitions to the others, and wait until it has none.

    It still accepts mail, which the others relay. It has none after a restart either, until --undo.
    """
    from penstock.cluster import admin, setup  # noqa: PLC0415 - needs the extra

    def act(jetstream: JetStream, settings: JetStreamSettings) -> Awaitable[None]:
        return admin.drain(jetstream, setup.make_layout(settings), node, undo=undo)

    run(config_file, act)
    click.echo(f"{node} relays again" if undo else f"{node} has no partitions")


@cluster.command()
@_config
def init(config_file: Path) -> None:
    """Make the streams and buckets. It can be repeated: what exists is kept, and changed where it differs."""
    from penstock.cluster import setup  # noqa: PLC0415 - needs the extra

    for line in run(config_file, setup.make_streams):
        click.echo(line)
    click.echo("\nEach server needs a configuration like this:\n")
    click.echo(setup.SERVER_CONFIGURATION, nl=False)


@cluster.command()
@_config
def check(config_file: Path) -> None:
    """Check servers, streams and leases; exit code 1 and a line for each problem.

    Servers must be 2.15.1 or newer and sync each message before they acknowledge it, streams must have 3 replicas that
    are up to date. While nodes run, each partition must have one, and no local spool may hold mail for the cluster.
    """
    from penstock.cluster import setup  # noqa: PLC0415 - needs the extra
    from penstock.cluster import status as shown  # noqa: PLC0415

    async def find(jetstream: JetStream, settings: JetStreamSettings) -> tuple[list[str], list[str]]:
        wrong = await setup.problems(jetstream, settings)
        nodes, more = await shown.lease_problems(jetstream, setup.make_layout(settings))
        return nodes, wrong + more

    nodes, found = run(config_file, find)
    for line in (*nodes, *found):
        click.echo(line)
    if found:
        raise SystemExit(1)
    click.echo("the cluster is as it should be")


@cluster.command()
@_config
def status(config_file: Path) -> None:
    """Show streams, their leaders and what is in them, the nodes, and which node relays which partitions."""
    from penstock.cluster import status as shown  # noqa: PLC0415 - needs the extra

    for line in run(config_file, shown.describe):
        click.echo(line)
