"""The users file, and the authenticator that reads it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

import argon2
import pytest

from penstock.auth.users import UsersAuthenticator, UsersFile, UsersFileError, make_user


class CountingHasher(argon2.PasswordHasher):
    """Counts how often a password was hashed for a check; cheap, for tests."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=64, parallelism=1)
        self.checks: list[str] = []

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - the library's name
        self.checks.append(argon2.extract_parameters(str(hash)).__repr__())
        return super().verify(hash, password)


@pytest.fixture
def hasher() -> CountingHasher:
    return CountingHasher()


@pytest.fixture
def file(tmp_path: Path, hasher: CountingHasher) -> UsersFile:
    users = UsersFile(tmp_path / "users")
    users.write({"alice": make_user("alice", "secret", hasher)})
    return users


async def test_the_right_password_is_right(file: UsersFile, hasher: CountingHasher) -> None:
    users = UsersAuthenticator(file, hasher)
    assert await users.verify("alice", "secret")
    assert not await users.verify("alice", "Secret")
    assert not await users.verify("mallory", "secret")


async def test_an_unknown_user_costs_what_a_wrong_password_costs(file: UsersFile, hasher: CountingHasher) -> None:
    users = UsersAuthenticator(file, hasher)
    await users.verify("alice", "wrong")
    await users.verify("mallory", "wrong")
    wrong, unknown = hasher.checks
    assert wrong == unknown  # one hash each, of the same parameters


async def test_an_unknown_users_scram_keys_are_always_the_same(file: UsersFile, hasher: CountingHasher) -> None:
    users = UsersAuthenticator(file, hasher)
    assert users.scram_keys("mallory") == users.scram_keys("mallory")
    assert users.scram_keys("mallory").salt != users.scram_keys("trent").salt
    assert users.scram_keys("mallory").iterations == users.scram_keys("alice").iterations
    assert len(users.scram_keys("mallory").salt) == len(users.scram_keys("alice").salt)


async def test_a_changed_file_is_read_again(file: UsersFile, hasher: CountingHasher) -> None:
    users = UsersAuthenticator(file, hasher)
    known = file.read()
    known["bob"] = make_user("bob", "later", hasher)
    file.write(known)
    assert await users.verify("bob", "later")
    file.path.write_text("nonsense\n")
    assert await users.verify("bob", "later")
    assert "users:1" in users.last_error


def test_the_file_is_nobody_elses(file: UsersFile) -> None:
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_the_file_comes_back_as_it_was(file: UsersFile) -> None:
    known = file.read()
    file.path.write_text("# comment\n\n" + file.path.read_text())
    assert file.read() == known


@pytest.mark.parametrize(
    "line", ["alice", "alice $argon2id$x", "alice plain SCRAM-SHA-256$4096:a$b:c", "a $argon2 x y"]
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "users"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(UsersFileError, match=":2:"):
        UsersFile(path).read()


def test_no_file_means_no_users(tmp_path: Path) -> None:
    assert UsersFile(tmp_path / "users").read() == {}


@pytest.mark.parametrize(
    ("name", "password"), [("", "x"), ("a b", "x"), ("#a", "x"), ("a\n", "x"), ("a", ""), ("a", "\0")]
)
def test_useless_names_and_passwords_are_refused(name: str, password: str, hasher: CountingHasher) -> None:
    with pytest.raises(ValueError, match=r"octets|SASLprep"):
        make_user(name, password, hasher)


def test_a_failed_write_leaves_the_file_as_it_was(file: UsersFile, hasher: CountingHasher) -> None:
    before = file.path.read_text()
    broken = UsersFile(file.path / "below-a-file")
    with pytest.raises(OSError, match="users"):
        broken.write({"bob": make_user("bob", "x", hasher)})
    assert file.path.read_text() == before
    assert [path.name for path in file.path.parent.iterdir()] == ["users"]
