"""`penstock config check --online`, with a name server on the loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from penstock.cli.config import config
from tests.dns.lying import Lying, serving, zone_of

SETTINGS = """
[resolver]
servers = ["127.0.0.1:{port}"]
timeout = 0.2
lifetime = 0.2
[policy]
[[policy.dnsbl]]
zone = "bl.example"
"""


async def check(lying: Lying, folder: Path) -> Result:
    path = folder / "penstock.toml"
    async with serving(lying) as port:
        path.write_text(SETTINGS.format(port=port))
        return await trio.to_thread.run_sync(lambda: CliRunner().invoke(config, ["check", "--online", str(path)]))


async def test_servers_and_lists_that_work_are_fine(tmp_path: Path) -> None:
    lying = Lying(zone_of("2.0.0.127.bl.example A 127.0.0.2", "top A 192.0.2.1"))
    result = await check(lying, tmp_path)
    assert result.exit_code == 0, result.output
    assert {(".", "NS"), ("2.0.0.127.bl.example", "A"), ("1.0.0.127.bl.example", "A")} <= set(lying.zone.asked)


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ({"2.0.0.127.bl.example": "silence"}, "policy.dnsbl[0].zone: bl.example: no answer to the self-test"),
        ({".": "silence", "2.0.0.127.bl.example": "silence"}, "resolver.servers[0]: 127.0.0.1:"),
        ({}, "policy.dnsbl[0].zone: bl.example: 127.0.0.2 is not listed"),
    ],
)
async def test_what_does_not_answer_is_named(trouble: dict[str, str], expected: str, tmp_path: Path) -> None:
    result = await check(Lying(zone_of(failures=trouble)), tmp_path)
    assert result.exit_code == 1
    assert expected in result.output


async def test_a_server_that_refuses_is_a_warning(tmp_path: Path) -> None:
    lying = Lying(zone_of("2.0.0.127.bl.example A 127.0.0.2", failures={".": "REFUSED"}))
    result = await check(lying, tmp_path)
    assert result.exit_code == 0
    assert "warning: resolver.servers[0]: 127.0.0.1:" in result.output
    assert "not a recursive server for us" in result.output
