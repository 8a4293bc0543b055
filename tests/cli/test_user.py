"""`penstock user`: output and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.auth.users import UsersFile, make_hasher
from penstock.cli.main import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users"


def run(path: Path, *arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, ["user", *arguments, "--file", str(path)], input=stdin)


def has_password(path: Path, name: str, password: str) -> bool:
    return make_hasher().verify(UsersFile(path).read()[name].password_hash, password)


def test_add_prompts_twice_and_never_echoes_the_password(path: Path) -> None:
    result = run(path, "add", "alice", stdin="sesame\nsesame\n")
    assert result.exit_code == 0
    assert "Repeat for confirmation" in result.output
    assert "sesame" not in result.output
    assert has_password(path, "alice", "sesame")


def test_add_prompts_again_if_the_passwords_differ(path: Path) -> None:
    result = run(path, "add", "alice", stdin="sesame\nseasme\nopen\nopen\n")
    assert result.exit_code == 0
    assert has_password(path, "alice", "open")


@pytest.mark.parametrize("stdin", ["sesame\nmore\n", "sesame\r\n", "sesame"])
def test_add_reads_the_first_line_of_standard_input(path: Path, stdin: str) -> None:
    result = run(path, "add", "alice", "--password-stdin", stdin=stdin)
    assert result.exit_code == 0
    assert has_password(path, "alice", "sesame")


def test_a_password_keeps_its_spaces(path: Path) -> None:
    assert run(path, "add", "alice", "--password-stdin", stdin=" open sesame \n").exit_code == 0
    assert has_password(path, "alice", " open sesame ")


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\xff\n", b"a\0b\n", b"a" * 1025, b"a" * 100_000])
def test_add_refuses_an_invalid_password(path: Path, stdin: bytes) -> None:
    result = run(path, "add", "alice", "--password-stdin", stdin=stdin)
    assert result.exit_code == 1
    assert "password" in result.output
    assert not path.exists()


def test_add_refuses_an_invalid_name_before_prompting(path: Path) -> None:
    result = run(path, "add", "al ice")
    assert result.exit_code == 1
    assert "user name" in result.output
    assert "Password" not in result.output


def test_add_refuses_an_existing_user_before_prompting(path: Path) -> None:
    run(path, "add", "alice", "--password-stdin", stdin="old\n")
    result = run(path, "add", "alice")
    assert result.exit_code == 1
    assert "alice already exists in" in result.output and "--replace" in result.output
    assert "Password" not in result.output
    assert has_password(path, "alice", "old")


def test_add_replace_changes_the_password(path: Path) -> None:
    run(path, "add", "alice", "--password-stdin", stdin="old\n")
    assert run(path, "add", "alice", "--replace", "--password-stdin", stdin="new\n").exit_code == 0
    assert has_password(path, "alice", "new")


def test_remove_deletes_the_user(path: Path) -> None:
    run(path, "add", "alice", "--password-stdin", stdin="secret\n")
    result = run(path, "remove", "alice")
    assert result.exit_code == 0
    assert result.output.startswith("removed alice from ")
    assert UsersFile(path).names() == []


def test_remove_reports_an_unknown_user(path: Path) -> None:
    result = run(path, "remove", "alice")
    assert result.exit_code == 1
    assert f"alice does not exist in {path}" in result.output


def test_list_is_alphabetical(path: Path) -> None:
    for name in ("bob", "alice"):
        run(path, "add", name, "--password-stdin", stdin="secret\n")
    result = run(path, "list")
    assert result.exit_code == 0
    assert result.output == "alice\nbob\n"


def test_list_without_a_file_is_empty(path: Path) -> None:
    result = run(path, "list")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("arguments", [("list",), ("remove", "alice"), ("add", "bob")])
def test_a_malformed_file_is_reported_with_its_line(path: Path, arguments: tuple[str, ...]) -> None:
    path.write_text("# users\nalice\n")
    result = run(path, *arguments)
    assert result.exit_code == 1
    assert f"{path}:2: " in result.output
    assert path.read_text() == "# users\nalice\n"


def test_the_default_users_file_is_that_of_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["user", "add", "alice", "--password-stdin"], input="secret\n")
    assert result.exit_code == 0
    assert UsersFile(tmp_path / "penstock-data" / "users").names() == ["alice"]
