"""`penstock judge`: what would be decided about a message."""

from __future__ import annotations

import ipaddress
import json as json_module
import socket
import time
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec
import trio

from penstock.config import ConfigError, Settings, load
from penstock.dns import Budget, Resolver
from penstock.journal import Journal, JournalSettings
from penstock.mailauth import Decision, Judgement, MessageCheck, spf
from penstock.mailauth.decision import Action
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.policy import dnsbl, fcrdns
from penstock.policy.authentication import decision_settings, iprev_method
from penstock.policy.check import Parts
from penstock.policy.judge import Judge
from penstock.policy.scores import Thresholds
from penstock.policy.settings import DEFAULT, PolicySettings
from penstock.reply import Reply
from penstock.results import Results
from penstock.transaction import Peer, Transaction

_EXIT_CODES: Final[dict[Action, int]] = {"accept": 0, "quarantine": 0, "reject": 1, "defer": 75}
_SECONDS: Final = 60.0


class _Found(NamedTuple):
    """Everything that was found and decided."""

    judgement: Judgement
    results: Results
    decision: Decision


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--client", required=True, metavar="IP", help="Address of the client.")
@click.option("--helo", default="localhost", show_default=True, metavar="NAME", help="Name the client gives in EHLO.")
@click.option("--from", "sender", default="", metavar="ADDRESS", help="Envelope sender [default: the null sender].")
@click.option("--config", type=click.Path(path_type=Path), help="Configuration file, for [policy] and [resolver].")
@click.option("--json", is_flag=True, help="Print JSON.")
def judge(file: Path, client: str, helo: str, sender: str, config: Path | None, *, json: bool) -> None:
    """Print the decision about a message and the result of each check: SPF, DKIM, DMARC, ARC, DNS lists, reverse DNS.

    Checks in monitor mode decide here as if they were enforced, and clients in policy.trusted are judged too.

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
    hostname = settings.own_hostname if settings.hostname else socket.gethostname()
    found = trio.run(_judge, settings, hostname, _crlf(file.read_bytes()), client, helo, sender)
    click.echo(json_module.dumps(_as_json(found), indent=2) if json else _as_text(found))
    raise SystemExit(_EXIT_CODES[found.decision.action])


def _enforced(policy: PolicySettings) -> PolicySettings:
    """Return the settings with every check in enforce mode that is not off, and without trusted clients."""

    def enforce(check: object) -> object:
        if isinstance(check, msgspec.Struct) and getattr(check, "mode", None) == "monitor":
            return msgspec.structs.replace(check, mode="enforce")
        return check

    changed = {name: enforce(getattr(policy, name)) for name in ("spf", "dkim", "dmarc", "fcrdns")}
    lists = tuple(map(enforce, policy.dnsbl))
    return msgspec.structs.replace(policy, mode="enforce", trusted=(), dnsbl=lists, **changed)


async def _judge(settings: Settings, hostname: str, message: bytes, client: str, helo: str, sender: str) -> _Found:
    policy = _enforced(settings.policy or DEFAULT)
    resolver = Resolver(settings.resolver)
    header, _, body = (b"\r\n" + message).partition(b"\r\n\r\n")
    now = int(time.time())
    decisions = decision_settings(policy)
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        results, refusal = await _judge_client(nursery, policy, resolver, hostname, client)
        budget = Budget(resolver, seconds=_SECONDS)
        found = None
        if decisions.spf != "off":
            found = await spf.check(budget.query, address=client, sender=sender, helo=helo, receiver=hostname, now=now)
        check = MessageCheck(header[2:] + b"\r\n", decisions, now=now)
        check.feed(body)
        judgement = await check.finish(
            budget.query,
            authserv_id=hostname,
            spf=found,
            mail_from=sender,
            helo=helo,
            first=iprev_method(results.iprev, client),
        )
        nursery.cancel_scope.cancel()
    decision = judgement.decisions.enforced
    if refusal is not None:
        decision = Decision("reject", "dnsbl", refusal.code, refusal.status or "", refusal.text, refusal.cause)
    elif decision.action in ("accept", "quarantine"):
        action = Thresholds.of(policy).add_up(results.score).action
        if action == "reject":
            decision = Decision("reject", "score", 550, "5.7.1", f"Score {results.score:g}")
        elif action == "quarantine":
            decision = Decision("quarantine", "score")
    return _Found(judgement, results, decision)


async def _judge_client(
    nursery: trio.Nursery, policy: PolicySettings, resolver: Resolver, hostname: str, client: str
) -> tuple[Results, Reply | None]:
    """Ask what is known about the client. Return the results and the refusal of the lists."""
    journal = Journal(JournalSettings(events="none"))
    parts = Parts(hostname, resolver, journal, Path(), lambda _: True)
    judge = Judge(policy, [*dnsbl.make_checks(policy, parts), *fcrdns.make_checks(policy, parts)], journal)
    await nursery.start(judge.run)
    transaction = Transaction(Peer(client, 0))
    refusal = await judge.on_connect(transaction)
    if refusal is None:
        refusal = await judge.on_rcpt(transaction, Recipient(MailPath("someone@localhost", "someone", "localhost")))
    return transaction.results, refusal


def _crlf(message: bytes) -> bytes:
    """Return a message with the line ends of SMTP: files often have others."""
    return message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _checks(found: _Found) -> list[dict[str, str]]:
    """Return one row for each result."""
    judgement, results = found.judgement, found.results
    findings = judgement.findings
    rows: list[dict[str, str]] = []
    if results.iprev is not None:
        rows.append({"check": "iprev", "result": results.iprev.result, "domain": results.iprev.name,
                     "cause": results.iprev.cause})  # fmt: skip
    if results.dnsbl is not None:
        rows += [
            {"check": "dnsbl", "result": f"{each.score:+g}", "domain": each.zone, "cause": ", ".join(each.answers)}
            for each in results.dnsbl.listings
        ] or [{"check": "dnsbl", "result": "none", "domain": "", "cause": "not listed"}]
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


def _as_json(found: _Found) -> dict[str, object]:
    judgement, _, decision = found
    return {
        "action": decision.action,
        "code": decision.code,
        "status": decision.status,
        "text": decision.text,
        "decided_by": decision.check,
        "cause": decision.cause,
        "score": found.results.score,
        "checks": _checks(found),
        "header": judgement.header_field.decode(),
        "forged_fields": len(judgement.forged),
    }


def _as_text(found: _Found) -> str:
    judgement, _, decision = found
    lines = [
        f"{row['check']:<6} {row['result']:<10} {row['domain']}" + (f" ({row['cause']})" if row["cause"] else "")
        for row in _checks(found)
    ]
    reply = f": {decision.code} {decision.status} {decision.text}" if decision.text else ""
    by = f" by {decision.check}" if decision.check else ""
    lines += [f"{decision.action}{by}{reply}", "", judgement.header_field.decode().replace("\r\n", "\n").rstrip()]
    return "\n".join(map(_printable, "\n".join(lines).split("\n")))


def _printable(line: str) -> str:
    """Return a line without control characters: parts of it were written by strangers."""
    return "".join(char if char.isprintable() or char == "\t" else "?" for char in line)
