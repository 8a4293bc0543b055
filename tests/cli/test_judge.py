"""`penstock judge`, with a name server on the loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from penstock.cli.judge import judge
from tests.dns.lying import Lying, serving, zone_of
from tests.mailauth.test_dkim import BODY, RSA, record, sign


@pytest.fixture
def zone() -> Lying:
    text = record(RSA).decode()
    lying = Lying(zone_of('example.com TXT "v=spf1 ip4:192.0.2.1 -all"', '_dmarc.example.com TXT "v=DMARC1; p=reject"'))
    lying.zone.add(
        "s1._domainkey.example.com", "TXT", " ".join(f'"{text[at : at + 250]}"' for at in range(0, len(text), 250))
    )
    return lying


@pytest.fixture
def message(tmp_path: Path) -> Path:
    path = tmp_path / "message.eml"
    path.write_bytes((sign() + b"\r\n" + BODY).replace(b"\r\n", b"\n"))
    return path


async def invoke(zone: Lying, path: Path, *arguments: str, more: str = "") -> Result:
    """Run the command in a thread, while the name server answers."""
    config = path.with_name("penstock.toml")
    async with serving(zone) as port:
        config.write_text(f'[resolver]\nservers = ["127.0.0.1:{port}"]\ntimeout = 0.5\nlifetime = 1.0\n{more}')
        return await trio.to_thread.run_sync(
            lambda: CliRunner().invoke(judge, [str(path), "--config", str(config), *arguments])
        )


async def test_genuine_mail_would_be_accepted(zone: Lying, message: Path) -> None:
    result = await invoke(zone, message, "--client", "192.0.2.1", "--from", "joe@example.com")
    assert result.exit_code == 0, result.output
    assert "dkim   pass       example.com\n" in result.output
    assert "accept\n" in result.output


async def test_forged_mail_would_be_refused(zone: Lying, message: Path) -> None:
    message.write_bytes(message.read_bytes().replace(b"dinner", b"supper"))
    result = await invoke(zone, message, "--client", "192.0.2.9", "--from", "joe@example.com", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert (found["code"], found["status"], found["decided_by"]) == (550, "5.7.1", "dmarc")
    assert [row["result"] for row in found["checks"]] == ["fail", "fail", "fail", "none"]


async def test_mail_would_be_deferred_while_the_dns_fails(zone: Lying, message: Path) -> None:
    zone.zone.failures["_dmarc.example.com"] = "SERVFAIL"
    result = await invoke(zone, message, "--client", "192.0.2.1", "--from", "joe@example.com")
    assert result.exit_code == 75
    assert "defer by dmarc: 451 4.4.3" in result.output


async def test_the_checks_of_the_configuration_are_made(zone: Lying, message: Path) -> None:
    zone.zone.add("2.0.0.127.bl.example", "A", "127.0.0.2")
    zone.zone.add("9.2.0.192.bl.example", "A", "127.0.0.4")
    zone.zone.add("9.2.0.192.in-addr.arpa", "PTR", "mail.example.")
    more = (
        '[policy]\nmode = "monitor"\n[policy.dmarc]\nmode = "off"\n[policy.spf]\nmode = "off"\n[policy.fcrdns]\n'
        '[[policy.dnsbl]]\nzone = "bl.example"\nanswers = {{ "127.0.0.4" = {score} }}\n'
    )
    arguments = ("--client", "192.0.2.9", "--from", "joe@example.com", "--json")
    result = await invoke(zone, message, *arguments, more=more.format(score=7))
    found = json.loads(result.output)
    assert (result.exit_code, found["action"], found["score"]) == (0, "quarantine", 7)
    rows = {row["check"]: row["result"] for row in found["checks"]}
    assert rows == {"iprev": "fail", "dnsbl": "+7", "dkim": "pass", "arc": "none"}
    result = await invoke(zone, message, *arguments, more=more.format(score=11))
    assert result.exit_code == 1
    assert json.loads(result.output)["text"].startswith("Client host [192.0.2.9] blocked using bl.example")


@pytest.mark.parametrize("arguments", [[], ["--client", "nonsense"]])
async def test_a_wrong_call_is_a_usage_error(zone: Lying, message: Path, arguments: list[str]) -> None:
    assert (await invoke(zone, message, *arguments)).exit_code == 2
