"""The command line: user, config, help, wrong options."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.main import main


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def test_users_are_added_listed_and_removed(tmp_path: Path) -> None:
    file = ("--file", str(tmp_path / "users"))
    assert run("user", "add", "alice", "--password-stdin", *file, stdin="secret\n").exit_code == 0
    assert run("user", "add", "bob", *file, stdin="secret\nsecret\n").exit_code == 0
    assert run("user", "list", *file).output == "alice\nbob\n"
    again = run("user", "add", "bob", "--password-stdin", *file, stdin="x\n")
    assert again.exit_code == 1
    assert "--replace" in again.output
    assert run("user", "add", "bob", "--replace", "--password-stdin", *file, stdin="x\n").exit_code == 0
    assert run("user", "remove", "alice", *file).exit_code == 0
    assert run("user", "remove", "alice", *file).exit_code == 1
    assert run("user", "list", *file).output == "bob\n"


def test_user_add_refuses_an_empty_password(tmp_path: Path) -> None:
    result = run("user", "add", "alice", "--password-stdin", "--file", str(tmp_path / "users"), stdin="\n")
    assert result.exit_code == 1
    assert "1 to 1024 octets" in result.output


def test_config_check_names_a_wrong_key(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('domains = ["example.org"]\n[[listener]]\nadress = "127.0.0.1:25"\n')
    result = run("config", "check", str(file))
    assert result.exit_code == 1
    assert "listener[0].adress: unknown key (did you mean address?)" in result.output
    file.write_text('domains = ["example.org"]\n[[listener]]\naddress = "127.0.0.1:25"\n')
    assert run("config", "check", str(file)).output.endswith("ok\n")


def test_config_check_loads_the_hooks(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('[[check]]\nhook = "no.such.module:thing"\n')
    result = run("config", "check", str(file))
    assert result.exit_code == 1
    assert "check[0].hook" in result.output


def test_config_show_diff_shows_what_was_changed(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('hostname = "mx.example.org"\n')
    output = run("config", "show", "--config", str(file), "--diff").output
    assert 'hostname = "mx.example.org"' in output
    assert "listener" not in output


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["sink", "-h"], ["config", "-h"], ["user", "-h"]]
)
def test_every_command_has_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_version() -> None:
    assert run("--version").output == "penstock 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--listen", "0.0.0.0:2525"], "open relay"),
        (["sink", "--listen", "0.0.0.0:2525"], "open relay"),
        (["serve", "--listen", "nonsense"], "127.0.0.1:2525"),
        (["serve", "--config", "no-such-file.toml"], "No such file"),
        (["sink", "--report", "a.json", "--report", "b.json"], "--report is given 2 times; it takes one value"),
        (["sink", "--web", "127.0.0.1:0", "--web", "127.0.0.1:1"], "--web is given 2 times"),
        (["serve", "--data", "a", "--data", "b"], "--data is given 2 times"),
        (["user", "list", "--file", "a", "--file", "b"], "--file is given 2 times"),
    ],
)
def test_a_failed_start_names_the_cause(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.output


def test_an_address_in_use_is_reported(tmp_path: Path) -> None:
    result = run("serve", "--listen", f"unix:{tmp_path}", "--data", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert "cannot listen on unix:" in result.output
