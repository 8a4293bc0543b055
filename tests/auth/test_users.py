"""The users file, and who authenticates by it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import stat
import threading
from pathlib import Path
from typing import Literal

import argon2
import pytest
import scramp

from penstock.auth import users as module
from penstock.auth.base import Authenticator
from penstock.auth.users import (
    ITERATIONS,
    User,
    UsersAuthenticator,
    UsersFile,
    UsersFileError,
    check_name,
    load_secret,
    make_hasher,
    make_user,
)
from penstock.journal import Journal, JournalSettings
from penstock.smtp.sasl import Challenge, ScramKeys, Step, Success, start_exchange

QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


class CountingHasher(argon2.PasswordHasher):
    """Remembers the parameters of each hash that it checked a password against."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.work: list[argon2.Parameters] = []

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - the library's name
        assert isinstance(hash, str)
        self.work.append(argon2.extract_parameters(hash))
        return super().verify(hash, password)


class BrokenHasher(argon2.PasswordHasher):
    """Has no memory for a check."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - the library's name
        raise argon2.exceptions.VerificationError("Memory allocation error")


@pytest.fixture
def file(tmp_path: Path) -> UsersFile:
    return UsersFile(tmp_path / "users", QUICK)


_clock = itertools.count(1)


def overwrite(path: Path, text: str) -> None:
    """Write in place, as an editor may, with a time of its own: clocks are coarse."""
    path.write_text(text)
    os.utime(path, ns=(0, next(_clock) * 1_000_000_000))


# ---- writing


def test_users_are_added_listed_and_removed(file: UsersFile) -> None:
    assert file.names() == []
    assert file.add("bob", "builder")
    assert file.add("alice", "secret")
    assert file.names() == ["bob", "alice"]
    assert file.remove("bob")
    assert file.names() == ["alice"]


def test_removing_an_unknown_user_creates_no_file(tmp_path: Path) -> None:
    file = UsersFile(tmp_path / "nowhere" / "users", QUICK)
    assert not file.remove("alice")
    assert not (tmp_path / "nowhere").exists()


def test_adding_makes_the_folder(tmp_path: Path) -> None:
    file = UsersFile(tmp_path / "some" / "where" / "users", QUICK)
    assert file.add("alice", "secret")
    assert file.names() == ["alice"]


def test_a_user_who_is_there_is_only_replaced_when_asked(file: UsersFile) -> None:
    file.add("alice", "old")
    before = file.path.read_bytes()
    assert not file.add("alice", "new")
    assert file.path.read_bytes() == before
    assert file.add("alice", "new", replace=True)
    assert QUICK.verify(file.read()["alice"].password_hash, "new")
    assert file.names() == ["alice"]


def test_only_the_owner_may_read_the_file(file: UsersFile) -> None:
    file.add("alice", "secret")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    file.path.chmod(0o644)
    file.add("bob", "builder")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_the_file_contains_no_password(file: UsersFile) -> None:
    file.add("alice", "correct horse battery")
    text = file.path.read_text()
    assert "$argon2id$" in text
    assert "correct" not in text
    assert base64.b64encode(b"correct horse battery").decode() not in text


def test_comments_order_and_empty_lines_stay(file: UsersFile) -> None:
    file.add("alice", "secret")
    alice = file.path.read_text()
    bob, carol = alice.replace("alice", "bob"), alice.replace("alice", "carol")
    file.path.write_text(f"# the staff\n{alice}\n#bob is on leave\n{bob}{carol}# no end of line")
    file.remove("bob")
    file.add("dave", "new")
    kept = f"# the staff\n{alice}\n#bob is on leave\n{carol}# no end of line\n"
    assert file.path.read_text().startswith(kept + "dave ")
    file.add("alice", "newer", replace=True)
    assert file.names() == ["alice", "carol", "dave"]


def test_a_write_that_fails_leaves_the_file_and_nothing_beside_it(
    file: UsersFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("alice", "secret")
    before = file.path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        file.add("bob", "builder")
    assert file.path.read_bytes() == before
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_malformed_file_is_not_written_to(file: UsersFile) -> None:
    file.path.write_text("alice\n")
    with pytest.raises(UsersFileError):
        file.add("bob", "builder")
    with pytest.raises(UsersFileError):
        file.remove("alice")
    assert file.path.read_text() == "alice\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "users"
    link.symlink_to(tmp_path / "real" / "users")
    UsersFile(link, QUICK).add("alice", "secret")
    assert link.is_symlink()
    assert UsersFile(tmp_path / "real" / "users").names() == ["alice"]


def test_the_owner_of_the_file_stays_its_owner(file: UsersFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.add("alice", "secret")
    owner, group = file.path.stat().st_uid, file.path.stat().st_gid
    given: list[tuple[int, int]] = []
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda it: os.stat_result([*fstat(it)[:4], owner + 1, *fstat(it)[5:]]))
    monkeypatch.setattr(os, "fchown", lambda descriptor, uid, gid: given.append((uid, gid)))
    file.add("bob", "builder")
    assert given == [(owner, group)]


def test_writers_at_the_same_time_lose_no_user(file: UsersFile) -> None:
    names = [f"user{number}" for number in range(12)]
    threads = [threading.Thread(target=UsersFile(file.path, QUICK).add, args=(name, "secret")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.names()) == sorted(names)


# ---- names and passwords


@pytest.mark.parametrize("name", ["alice", "alice@example.org", "o'neil+x", "jürgen", "a:b", "a#b", "日本", "a" * 255])
def test_a_good_name(file: UsersFile, name: str) -> None:
    assert file.add(name, "secret")
    assert file.names() == [name]


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a\tb", "a\nb", "a\0b", "a\x7fb", "a\u2028b", "a\u00a0b", "a\u202eb", "\udcff", "#a", "a" * 256],
)
def test_a_name_that_no_line_can_hold(file: UsersFile, name: str) -> None:
    with pytest.raises(ValueError, match="user name"):
        file.add(name, "secret")
    assert not file.path.exists()


def test_a_name_that_scram_would_not_find_names_the_one_it_would() -> None:
    with pytest.raises(ValueError, match="'IX'"):
        check_name("\u2168")  # ROMAN NUMERAL NINE


def test_a_name_that_saslprep_forbids() -> None:
    with pytest.raises(ValueError, match="SASLprep"):
        check_name("\u0627a")


@pytest.mark.parametrize("password", ["", "a\0b", "a" * 1025, "é" * 513, "\udcff", "a\x07b"])
def test_an_invalid_password_is_refused(file: UsersFile, password: str) -> None:
    with pytest.raises(ValueError, match="password"):
        file.add("alice", password)


def test_the_ordinary_hasher_makes_argon2id_hashes_the_file_can_read(tmp_path: Path) -> None:
    file = UsersFile(tmp_path / "users")
    file.add("alice", "secret")
    assert file.read()["alice"].password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert make_hasher().verify(file.read()["alice"].password_hash, "secret")


# ---- reading


def good_line(name: str = "alice") -> str:
    return make_user(name, "secret", QUICK).line()


def test_a_line_reads_back_as_the_user_it_was_made_of(file: UsersFile) -> None:
    user = make_user("alice", "secret", QUICK)
    file.path.write_text(f"\n  # indented\n{user.line()}\r\n")
    assert file.read() == {"alice": user}


def test_the_line_has_the_words_of_rfc_5803() -> None:
    keys = ScramKeys(b"s" * 16, b"k" * 32, b"v" * 32, 4096)
    salt, stored, server = (base64.b64encode(part).decode() for part in keys[:3])
    assert User("a", "h", keys).line() == f"a h SCRAM-SHA-256$4096:{salt}${stored}:{server}"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("bob", "three words, not 1"),
        (good_line("bob") + " more", "three words, not 4"),
        ("bo\u202eb $argon2id$ SCRAM-SHA-256$", "user name"),
        (good_line("bob").replace("argon2id", "argon2i"), "argon2id"),
        (good_line("bob").replace("$v=19", ""), "argon2id"),
        (good_line("bob").replace("SCRAM-SHA-256", "SCRAM-SHA-1"), "RFC 5803"),
        (good_line("bob").replace("$4096:", "$1024:"), "iterations"),
        (good_line("bob").replace("$4096:", "$99999999:"), "iterations"),
        (good_line("bob").replace("$4096:", "$4096:A"), "base64"),
        ("bob $argon2id$v=19$m=8,t=1,p=1$AAAA$AAAA SCRAM-SHA-256$4096:AAAA$AAAA:AAAA", "at least 12"),
        (good_line("alice"), "already"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(file: UsersFile, line: str, complaint: str) -> None:
    file.path.write_text(f"# one\n{good_line()}\n\n{line}\n")
    with pytest.raises(UsersFileError, match=complaint) as error:
        file.read()
    assert str(error.value).startswith(f"{file.path}:4: ")
    assert "SCRAM-SHA-256$4096:" not in str(error.value)


def test_text_that_is_not_utf_8_is_named_by_its_line(file: UsersFile) -> None:
    file.path.write_bytes(b"# one\n# two \xff\n")
    with pytest.raises(UsersFileError, match=r"users:2: "):
        file.read()


def test_a_file_without_end_is_not_read_to_its_end(file: UsersFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILE", 10)
    file.path.write_text("#" * 11)
    with pytest.raises(UsersFileError, match="at most 10 octets"):
        file.read()


# ---- authenticating


async def test_only_the_right_password_is_accepted(file: UsersFile) -> None:
    file.add("alice", "secret")
    authenticator: Authenticator = UsersAuthenticator(file)
    assert await authenticator.verify("alice", "secret")
    assert not await authenticator.verify("alice", "Secret")
    assert not await authenticator.verify("alice", "")
    assert not await authenticator.verify("bob", "secret")


async def test_a_wrong_password_and_an_unknown_user_do_the_same_work(tmp_path: Path) -> None:
    hasher = CountingHasher()
    file = UsersFile(tmp_path / "users", hasher)
    file.add("alice", "secret")
    authenticator = UsersAuthenticator(file)
    assert not await authenticator.verify("alice", "wrong")
    wrong_password = hasher.work.copy()
    hasher.work.clear()
    assert not await authenticator.verify("bob", "wrong")
    assert len(wrong_password) == 1
    assert hasher.work == wrong_password


async def test_an_argon2_that_cannot_tell_is_no_wrong_password(tmp_path: Path) -> None:
    file = UsersFile(tmp_path / "users", BrokenHasher())
    file.add("alice", "secret")
    with pytest.raises(RuntimeError, match="Memory allocation"):
        await UsersAuthenticator(file).verify("alice", "secret")


def scram(authenticator: UsersAuthenticator, name: str, password: str) -> Step:
    exchange = start_exchange("SCRAM-SHA-256", scram_keys=authenticator.scram_keys, binding=None)
    client = scramp.ScramClient(["SCRAM-SHA-256"], name, password)
    first = exchange.start(client.get_client_first().encode())
    assert isinstance(first, Challenge)
    client.set_server_first(first.data.decode())
    step = exchange.respond(client.get_client_final().encode())
    return exchange.respond(b"") if isinstance(step, Challenge) else step


def test_scram_proves_a_user_of_the_file(file: UsersFile) -> None:
    file.add("jürgen", "größe")
    authenticator = UsersAuthenticator(file)
    assert scram(authenticator, "jürgen", "größe") == Success("jürgen", "")


def test_scram_refuses_unknown_users_like_wrong_passwords(file: UsersFile) -> None:
    file.add("alice", "secret")
    authenticator = UsersAuthenticator(file)
    wrong = scram(authenticator, "alice", "wrong")
    assert not isinstance(wrong, Success)
    assert scram(authenticator, "bob", "wrong") == wrong


def test_invented_scram_keys_look_like_real_ones_and_stay_the_same(file: UsersFile) -> None:
    file.add("alice", "secret")
    one, other = UsersAuthenticator(file), UsersAuthenticator(file)
    invented = one.scram_keys("bob")
    assert [len(part) for part in invented[:3]] == [len(part) for part in one.scram_keys("alice")[:3]]
    assert invented.iterations == one.scram_keys("alice").iterations == ITERATIONS
    assert invented == one.scram_keys("bob") == other.scram_keys("bob")
    assert invented.salt != one.scram_keys("carol").salt


# ---- names without case


async def test_users_are_found_in_any_case(file: UsersFile) -> None:
    file.add("Alice", "secret")
    authenticator = UsersAuthenticator(file)
    assert await authenticator.verify("ALICE", "secret")
    assert authenticator.canonical_name("aLICE") == "Alice"
    assert authenticator.canonical_name("bob") == "bob"
    assert scram(authenticator, "alice", "secret") == Success("alice", "")
    assert authenticator.scram_keys("BOB") == authenticator.scram_keys("bob")


def test_a_user_is_added_and_removed_in_any_case(file: UsersFile) -> None:
    file.add("Alice", "secret")
    assert not file.add("alice", "other")
    assert file.add("alice", "other", replace=True)
    assert file.names() == ["alice"]
    assert file.remove("ALICE")
    assert file.names() == []


def test_a_file_with_one_name_in_two_cases_is_malformed(file: UsersFile) -> None:
    file.path.write_text(f"{good_line('alice')}\n{good_line('ALICE')}\n")
    with pytest.raises(UsersFileError, match=":2: the user ALICE is already in line 1"):
        file.read()


# ---- the secret behind invented keys


def test_all_processes_get_the_same_secret_and_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(load_secret(path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len({*found, load_secret(path)}) == 1
    assert len(found[0]) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_secret_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match="expected 32 octets, found 5"):
        load_secret(tmp_path / "secret")


def test_unknown_users_have_the_same_salt_in_every_worker(file: UsersFile) -> None:
    secret = b"x" * 32
    one, other = (UsersAuthenticator(file, secret=secret) for _ in range(2))
    assert one.scram_keys("bob") == other.scram_keys("bob")
    assert one.scram_keys("bob") != UsersAuthenticator(file, secret=b"y" * 32).scram_keys("bob")


# ---- the file changes while the server runs


async def test_a_user_added_later_is_known(file: UsersFile) -> None:
    authenticator = UsersAuthenticator(file)  # there is no file yet
    assert authenticator.last_error is None
    assert not await authenticator.verify("alice", "secret")
    file.add("alice", "secret")
    assert await authenticator.verify("alice", "secret")
    assert authenticator.last_error is None
    file.remove("alice")
    assert not await authenticator.verify("alice", "secret")


def test_a_file_that_has_not_changed_is_not_read_again(file: UsersFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.add("alice", "secret")
    authenticator = UsersAuthenticator(file)
    reads: list[dict[str, User]] = []
    read = file.read

    def counted() -> dict[str, User]:
        reads.append(read())
        return reads[-1]

    monkeypatch.setattr(file, "read", counted)
    for _ in range(3):
        authenticator.scram_keys("alice")
    assert not reads
    file.add("bob", "builder")
    for _ in range(3):
        authenticator.scram_keys("alice")
    assert len(reads) == 1


async def test_a_file_that_became_malformed_keeps_the_last_good_users(file: UsersFile) -> None:
    file.add("alice", "secret")
    good = file.path.read_text()
    authenticator = UsersAuthenticator(file)
    overwrite(file.path, "alice\n")
    assert await authenticator.verify("alice", "secret")
    assert await authenticator.verify("alice", "secret")
    assert authenticator.last_error is not None and "users:1: " in authenticator.last_error
    overwrite(file.path, good.replace("alice", "bob"))
    assert await authenticator.verify("bob", "secret")
    assert not await authenticator.verify("alice", "secret")
    assert authenticator.last_error is None


async def test_a_file_that_is_gone_keeps_the_last_good_users(file: UsersFile) -> None:
    file.add("alice", "secret")
    authenticator = UsersAuthenticator(file)
    file.path.rename(file.path.with_name("away"))
    assert await authenticator.verify("alice", "secret")
    assert authenticator.last_error is not None and "No such file" in authenticator.last_error
    file.path.with_name("away").rename(file.path)
    assert await authenticator.verify("alice", "secret")
    assert authenticator.last_error is None


async def test_a_file_that_could_not_be_read_once_is_tried_again(
    file: UsersFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("alice", "secret")
    authenticator = UsersAuthenticator(file)
    file.add("bob", "builder")

    def fail() -> dict[str, User]:
        raise OSError("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(file, "read", fail)
        assert not await authenticator.verify("bob", "builder")
        assert authenticator.last_error == "Too many open files"
    assert await authenticator.verify("bob", "builder")
    assert authenticator.last_error is None


async def test_each_new_error_of_the_file_is_journaled_once(file: UsersFile) -> None:
    file.add("alice", "secret")
    good = file.path.read_text()
    journal = Journal(JournalSettings(format="json"))
    authenticator = UsersAuthenticator(file, journal)

    def told() -> list[tuple[str, str]]:
        for _ in range(3):
            authenticator.scram_keys("alice")
        records = [json.loads(line) for line in journal.drain().splitlines()]
        return [(record["event"], record.get("cause") or record["file"]) for record in records]

    assert told() == []
    file.path.unlink()
    (gone,) = told()
    assert gone[0] == "users-failed"
    assert "No such file" in gone[1] and gone[1].endswith("; the users read before remain")
    overwrite(file.path, "alice\n")
    (malformed,) = told()
    assert "users:1: " in malformed[1]
    overwrite(file.path, good)
    assert told() == [("users-read", str(file.path))]
    assert told() == []


def test_a_file_that_is_malformed_from_the_start_is_an_error(file: UsersFile) -> None:
    file.path.write_text("alice\n")
    with pytest.raises(UsersFileError, match="users:1: "):
        UsersAuthenticator(file)
