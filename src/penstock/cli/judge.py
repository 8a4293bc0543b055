"""`penstock judge`: what would be decided about a message."""

from __future__ import annotations

import ipaddress
import json as json_module
import socket
import time
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from penstock.config import ConfigError, Settings, load
from penstock.dns import Budget, Resolver, ResolverSettings
from penstock.mailauth import DecisionSettings, Judgement, MessageCheck, spf
from penstock.mailauth.decision import Action

_EXIT_CODES: Final[dict[Action, int]] = {"accept": 0, "quarantine": 0, "reject": 1, "defer": 75}
_SECONDS: Final = 60.0
_ENFORCE: Final = DecisionSettings(spf="enforce", dkim="enforce", dmarc="enforce")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--client", required=True, metavar="IP", help="Address of the client.")
@click.option("--helo", default="localhost", show_default=True, metavar="NAME", help="Name the client gives in EHLO.")
@click.option("--from", "sender", default="", metavar="ADDRESS", help="Envelope sender [default: the null sender].")
@click.option("--config", type=click.Path(path_type=Path), help="Configuration file, for its [resolver].")
@click.option("--json", is_flag=True, help="Print JSON.")
def judge(file: Path, client: str, helo: str, sender: str, config: Path | None, *, json: bool) -> None:
    """Print what would be decided about a message, check by check, with all checks enforced.

    Exits with 0 if the message would be accepted, 1 if it would be refused, 75 if it would be deferred, and 2 for
    usage errors.
    """
    try:
        ipaddress.ip_address(client)
    except ValueError as exc:
        raise click.BadParameter(f"{client!r} is not an IP address", param_hint="--client") from exc
    try:
        settings = Settings() if config is None else load(config)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    resolver = Resolver(msgspec.convert(msgspec.to_builtins(settings.resolver), ResolverSettings))
    judgement = trio.run(_judge, resolver, _crlf(file.read_bytes()), client, helo, sender)
    click.echo(json_module.dumps(_as_json(judgement), indent=2) if json else _as_text(judgement))
    raise SystemExit(_EXIT_CODES[judgement.decisions.enforced.action])


async def _judge(resolver: Resolver, message: bytes, client: str, helo: str, sender: str) -> Judgement:
    header, _, body = (b"\r\n" + message).partition(b"\r\n\r\n")
    hostname, now = socket.gethostname(), int(time.time())
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        budget = Budget(resolver, seconds=_SECONDS)
        found = await spf.check(budget.query, address=client, sender=sender, helo=helo, receiver=hostname, now=now)
        check = MessageCheck(header[2:] + b"\r\n", _ENFORCE, now=now)
        check.feed(body)
        judgement = await check.finish(budget.query, authserv_id=hostname, spf=found, mail_from=sender, helo=helo)
        nursery.cancel_scope.cancel()
    return judgement


def _crlf(message: bytes) -> bytes:
    """Return a message with the line ends of SMTP: files often have others."""
    return message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _checks(judgement: Judgement) -> list[dict[str, str]]:
    """Return one row for each result."""
    findings = judgement.findings
    rows: list[dict[str, str]] = []
    if findings.spf is not None:
        rows.append({"check": "spf", "result": findings.spf.result, "domain": findings.spf.domain,
                     "cause": findings.spf.cause or findings.spf.explanation})  # fmt: skip
    rows += [
        {"check": "dkim", "result": each.result, "domain": each.domain, "cause": each.cause, "selector": each.selector}
        for each in findings.dkim
    ] or [{"check": "dkim", "result": "none", "domain": "", "cause": "no signature"}]
    if findings.dmarc is not None:
        rows.append({"check": "dmarc", "result": findings.dmarc.result, "domain": findings.dmarc.domain,
                     "cause": findings.dmarc.cause, "policy": findings.dmarc.policy})  # fmt: skip
    domain = judgement.arc.sealers[-1] if judgement.arc.sealers else ""
    rows.append({"check": "arc", "result": judgement.arc.result, "domain": domain, "cause": judgement.arc.cause})
    return rows


def _as_json(judgement: Judgement) -> dict[str, object]:
    decision = judgement.decisions.enforced
    return {
        "action": decision.action,
        "code": decision.code,
        "status": decision.status,
        "text": decision.text,
        "decided_by": decision.check,
        "cause": decision.cause,
        "checks": _checks(judgement),
        "header": judgement.header_field.decode(),
        "forged_fields": len(judgement.forged),
    }


def _as_text(judgement: Judgement) -> str:
    lines = [
        f"{row['check']:<6} {row['result']:<10} {row['domain']}" + (f" ({row['cause']})" if row["cause"] else "")
        for row in _checks(judgement)
    ]
    decision = judgement.decisions.enforced
    reply = f": {decision.code} {decision.status} {decision.text}" if decision.text else ""
    by = f" by {decision.check}" if decision.check else ""
    lines += [f"{decision.action}{by}{reply}", "", judgement.header_field.decode().replace("\r\n", "\n").rstrip()]
    return "\n".join(map(_printable, "\n".join(lines).split("\n")))


def _printable(line: str) -> str:
    """Return a line without control characters: parts of it were written by strangers."""
    return "".join(char if char.isprintable() or char == "\t" else "?" for char in line)
