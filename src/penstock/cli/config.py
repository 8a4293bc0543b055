"""`penstock config`: check, show and describe configurations."""

from __future__ import annotations

from pathlib import Path

import click

from penstock.config import ConfigError, Settings, load, to_toml
from penstock.config import describe as describe_all
from penstock.loading import HookError
from penstock.policy.hooks import load_hook

_FILE = click.argument("file", type=click.Path(path_type=Path))


def _load(file: Path) -> Settings:
    try:
        return load(file)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc


@click.group()
def config() -> None:
    """Check, show and describe configuration files."""


@config.command()
@_FILE
def check(file: Path) -> None:
    """Say whether a file can be used; exit code 1 and the key that is wrong when it can not."""
    settings = _load(file)
    for number, hook in enumerate(settings.check):
        try:
            load_hook(hook.hook, hook.arguments)
        except HookError as exc:
            raise click.ClickException(f"{file}: check[{number}].hook: {exc}") from exc
    click.echo(f"{file}: ok")


@config.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="The file [default: none, so the defaults].")
@click.option("--diff", is_flag=True, help="Only what is not the default.")
def show(file: Path | None, diff: bool) -> None:
    """Print the settings that are in force, as TOML."""
    settings = Settings() if file is None else _load(file)
    click.echo(to_toml(settings, only_changed=diff), nl=False)


@config.command()
def describe() -> None:
    """Print every key with its meaning, its bounds and its default: a file to start from."""
    click.echo(describe_all(), nl=False)
