"""`penstock config`: check, show and describe configuration files."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import click

from penstock.cli import filecheck
from penstock.cli.once import OnceGroup
from penstock.cli.online import problems as online_problems
from penstock.config import ConfigError, Settings, load, to_toml
from penstock.config import describe as describe_all

_FILE = click.argument("file", type=click.Path(path_type=Path))


def _load(file: Path) -> Settings:
    try:
        return load(file)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc


@click.group(cls=OnceGroup)
def config() -> None:
    """Check, show and describe configuration files; print a systemd unit, alert rules and a dashboard."""


@config.command()
@_FILE
@click.option("--no-files", is_flag=True, help="Do not open the files that the configuration names.")
@click.option("--online", is_flag=True, help="Also ask every DNS server, DNS list and filter once.")
def check(file: Path, no_files: bool, online: bool) -> None:
    """Check a configuration file and the files that it names.

    Exit code 1, with a line for each key, if the server would not start or not work: wrong keys and values, missing or
    unreadable files, expired certificates, keys that do not match. Lines that begin with "warning:" name what will
    cause trouble later, such as a certificate that expires within 14 days.
    """
    settings = _load(file)
    found = [] if no_files else filecheck.problems(settings)
    unanswered, refused = online_problems(settings) if online else ([], [])
    if found or unanswered:
        raise click.ClickException("\n".join(f"{file}: {problem}" for problem in [*found, *unanswered]))
    for warning in [*filecheck.warnings(settings, reads_files=not no_files), *refused]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{file}: ok")


@config.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration file [default: all defaults].")
@click.option("--diff", is_flag=True, help="Print only the settings that differ from the defaults.")
def show(file: Path | None, diff: bool) -> None:
    """Print the settings of a configuration file, defaults included, as TOML."""
    settings = Settings() if file is None else _load(file)
    click.echo(to_toml(settings, only_changed=diff), nl=False)


@config.command()
def describe() -> None:
    """Print every key with its description, bounds and default: a configuration file to start from."""
    click.echo(describe_all(), nl=False)


@config.command()
def unit() -> None:
    """Print a systemd unit for `penstock serve`, with the sandboxing that it works with."""
    program = shutil.which("penstock") or "/usr/bin/penstock"
    click.echo(packaged("penstock.service").replace("@PENSTOCK@", program), nl=False)


@config.command()
def alerts() -> None:
    """Print alert rules for Prometheus (YAML)."""
    click.echo(packaged("alerts.yaml"), nl=False)


@config.command()
def dashboard() -> None:
    """Print a dashboard for Grafana (JSON)."""
    click.echo(packaged("dashboard.json"), nl=False)


def packaged(name: str) -> str:
    """Return the text of a file that the package brings along."""
    return (resources.files("penstock.operations") / "files" / name).read_text(encoding="utf-8")
