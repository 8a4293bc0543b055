"""The texts of the [policy] tables, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.config import ConfigError, parse
from penstock.policy.units import Address, Limit, parse_addresses, parse_duration, parse_limit, parse_url

SECOND = 10**9


def test_durations_limits_and_addresses_are_read() -> None:
    assert parse_duration("60s") == 60 * SECOND
    assert parse_duration("1.5h") == 5400 * SECOND
    assert parse_limit("100/h") == Limit(100, 3600 * SECOND)
    assert parse_limit("2000/10m") == Limit(2000, 600 * SECOND)
    assert parse_limit("500M/d") == Limit(500 << 20, 86_400 * SECOND)
    assert parse_addresses("unix:/run/x") == [Address(path="/run/x")]
    assert parse_addresses(("inet:filter.example:1", "inet:[::1]:2")) == [
        Address(host="filter.example", port=1), Address(host="::1", port=2),
    ]  # fmt: skip
    assert [str(each) for each in parse_addresses(("inet:[::1]:2", "unix:/x"))] == ["inet:[::1]:2", "unix:/x"]
    assert parse_url("http://[::1]/x/") == (Address(host="::1", port=80), "/x")


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('[policy.greylist]\ndelay = "60"', "policy.greylist.delay: expected a duration"),
        ('[policy.greylist]\nremember = "0s"', "policy.greylist.remember: expected a duration"),
        ('[[policy.rate]]\nby = ["network"]\nlimit = "100"', r"policy.rate\[0\].limit: expected a limit"),
        ('[[policy.rate]]\nby = ["network"]\nlimit = "0/h"', r"policy.rate\[0\].limit: expected a limit"),
        ('[[policy.rate]]\nby = []\nlimit = "1/h"', r"policy.rate\[0\].by"),
        (
            '[[policy.rate]]\nby = ["sender"]\ncount = "connections"\nlimit = "1/h"',
            r"policy.rate\[0\].by: count = \"connections\" can be limited by network and listener, not by sender",
        ),
        ('[[policy.milter]]\naddress = "127.0.0.1:5"', r"policy.milter\[0\].address: expected \"inet:HOST:PORT\""),
        ("[[policy.milter]]\naddress = []", r"policy.milter\[0\].address: expected \"inet:HOST:PORT\""),
        ('[[policy.delegate]]\naddress = "inet:x:0"', r"policy.delegate\[0\].address: expected \"inet:HOST:PORT\""),
        ('[policy.rspamd]\nurl = "https://x"', "policy.rspamd.url: expected http://HOST:PORT"),
        ('[policy.rspamd]\nurl = "http://x:99999"', "policy.rspamd.url: expected http://HOST:PORT"),
        ('[[policy.sign]]\ndomain = "a..b"\nselector = "x"\nkey = "k"', r"policy.sign\[0\].domain: 'a..b'"),
    ],
)
def test_wrong_texts_are_named_with_their_keys(toml: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(toml)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    (tmp_path / "p.toml").write_text(
        f'data_dir = "{tmp_path}"\n[policy.sender_login]\nfile = "absent"\n'
        '[[policy.sign]]\ndomain = "example.org"\nselector = "x"\nkey = "key.pem"\n'
    )
    result = CliRunner().invoke(main, ["config", "check", str(tmp_path / "p.toml")])
    assert result.exit_code == 1
    assert "policy.sender_login.file: " in result.output
    assert "policy.sign[0].key: " in result.output
