"""The users file: one user per line, with the password as argon2id hash (RFC 9106) and as SCRAM keys (RFC 5803).

    # name, password hash, keys; separated by blanks
    alice  $argon2id$v=19$m=19456,t=2,p=1$...  SCRAM-SHA-256$4096:salt$stored:server

The file is written atomically, by one process at a time, and comments, empty lines and the order of the lines are kept.
It is read again when it has changed, so `penstock user` works while the server runs. Names are compared without case.

The server does not disclose which names exist. An unknown name costs the hash of a password, as a wrong password does,
and SCRAM answers it with invented keys of the same shape. They depend on a secret in data_dir, so they are the same in
every worker and after a restart. Keys that were copied from elsewhere, with another salt length or number of
iterations, do disclose that their user exists.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import argon2
import scramp
import trio

from penstock.files import locked, write_atomically
from penstock.journal import Journal
from penstock.smtp.sasl import MAX_NAME, MAX_PASSWORD, ScramKeys

ITERATIONS: Final = 4096
"""SCRAM iterations of new keys (RFC 7677 4)."""
_SALT_OCTETS: Final = 16
"""Octets of SCRAM salts, real or invented: set here, because the default of a library may change."""
_KEY_OCTETS: Final = 32
"""Octets of a SCRAM key: a SHA-256 hash."""
_MAX_ITERATIONS: Final = 10_000_000
"""scramp refuses more."""
_MAX_FILE: Final = 64 << 20
"""Octets of a users file: about 250,000 users."""
_AT_A_TIME: Final = 2
"""Passwords that are verified at the same time: each takes 19 MiB and a core."""
_SECRET_OCTETS: Final = 32
"""Octets of the secret behind invented SCRAM keys."""
_PROCESS_SECRET: Final = os.urandom(_SECRET_OCTETS)
"""Used if there is no secret in a file: all listeners of a process invent the same keys for a name."""

_B64: Final = r"[A-Za-z0-9+/]+"
_ARGON2ID: Final = re.compile(rf"\$argon2id\$v=19\$m=[0-9]{{1,9}},t=[0-9]{{1,9}},p=[0-9]{{1,3}}\${_B64}\${_B64}")
_SCRAM: Final = re.compile(rf"SCRAM-SHA-256\$([0-9]{{4,8}}):({_B64}={{0,2}})\$({_B64}={{0,2}}):({_B64}={{0,2}})")


class UsersFileError(ValueError):
    """The users file cannot be used; the text names the file and the line."""


class User(NamedTuple):
    """A user: one line of the file."""

    name: str
    password_hash: str
    scram: ScramKeys

    def line(self) -> str:
        """Return the line, without its line end."""
        salt, stored, server, iterations = self.scram
        texts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
        return f"{self.name} {self.password_hash} SCRAM-SHA-256${iterations}:{texts[0]}${texts[1]}:{texts[2]}"


def check_name(name: str) -> None:
    """Raise ValueError unless a name can be that of a user.

    A name has 1 to 255 octets of printable characters without blanks, and does not begin with #. It must not be changed
    by SASLprep (RFC 4013), which SCRAM applies to it (RFC 5802 5.1).
    """
    if not name or name[0] == "#" or " " in name or not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise ValueError(
            f"a user name is 1 to {MAX_NAME} printable octets without blanks and does not begin with #; not {name!r}"
        )
    if name.isascii():  # SASLprep does not change it, and is slow
        return
    try:
        prepared = scramp.core.saslprep(name)
    except scramp.ScramException as exc:
        raise ValueError(f"SASLprep (RFC 4013) does not allow the user name {name!r}: {exc}") from exc
    if prepared != name:
        raise ValueError(f"SASLprep (RFC 4013) changes the user name {name!r} to {prepared!r}; use that one")


def make_user(name: str, password: str, hasher: argon2.PasswordHasher) -> User:
    """Return a user with a new password. Raise ValueError for an invalid name or password. Slow."""
    check_name(name)
    octets = password.encode("utf-8", "surrogatepass")
    if not 1 <= len(octets) <= MAX_PASSWORD or "\0" in password:
        raise ValueError(f"a password has 1 to {MAX_PASSWORD} octets, and no NUL")
    try:
        keys = scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info(
            password, iteration_count=ITERATIONS, salt=os.urandom(_SALT_OCTETS)
        )
    except scramp.ScramException as exc:
        raise ValueError(f"SASLprep (RFC 4013) does not allow this password: {exc}") from exc
    return User(name, hasher.hash(password), ScramKeys(*keys))


def make_hasher() -> argon2.PasswordHasher:
    """Return the hasher of new passwords: argon2id as OWASP recommends for servers (19 MiB, two passes)."""
    return argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


def _parse_user(line: str) -> User:
    """Return the user of a line. Raise ValueError, whose text contains no hash and no key."""
    words = line.split()
    if len(words) != 3:
        raise ValueError(f"a line is 'name $argon2id$... SCRAM-SHA-256$...', three words, not {len(words)}")
    name, password_hash, scram = words
    check_name(name)
    if not _ARGON2ID.fullmatch(password_hash):
        raise ValueError("the second word is not an argon2id hash: '$argon2id$v=19$m=...,t=...,p=...$salt$hash'")
    return User(name, password_hash, _parse_keys(scram))


def _parse_keys(text: str) -> ScramKeys:
    match = _SCRAM.fullmatch(text)
    if match is None:
        raise ValueError("the third word is not 'SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey' (RFC 5803)")
    iterations = int(match[1])
    if not ITERATIONS <= iterations <= _MAX_ITERATIONS:
        raise ValueError(f"SCRAM needs {ITERATIONS} to {_MAX_ITERATIONS} iterations, not {iterations}")
    try:
        salt, stored, server = (base64.b64decode(part, validate=True) for part in match.groups()[1:])
    except ValueError as exc:
        raise ValueError(f"the SCRAM keys are not base64: {exc}") from exc
    if len(salt) < 12 or len(stored) != _KEY_OCTETS or len(server) != _KEY_OCTETS:
        raise ValueError(f"a SCRAM salt has at least 12 octets, and each key {_KEY_OCTETS}")
    return ScramKeys(salt, stored, server, iterations)


class UsersFile:
    """Reads and writes the file. All methods block, and raise OSError and UsersFileError."""

    def __init__(self, path: Path, hasher: argon2.PasswordHasher | None = None) -> None:
        self.path = path
        self.hasher = hasher or make_hasher()

    def read(self) -> dict[str, User]:
        """Return the users by name, in the order of the file. Raise FileNotFoundError when it is missing.

        Takes about 10 microseconds per user.
        """
        return self._parse(self._read_text())

    def names(self) -> list[str]:
        """Return the names in the order of the file, [] without a file."""
        try:
            return list(self.read())
        except FileNotFoundError:
            return []

    def add(self, name: str, password: str, *, replace: bool = False) -> bool:
        """Add a user, and create the file and its folder if necessary. `replace` gives an existing user a new password.

        Return False, and change nothing, when the user exists. Raise ValueError for an invalid name or password.
        """
        line = make_user(name, password, self.hasher).line()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        return self._edit(name, line, lambda is_there: replace or not is_there)

    def remove(self, name: str) -> bool:
        """Remove a user. Return False when the user does not exist."""
        if name.casefold() not in map(str.casefold, self.names()):
            return False
        return self._edit(name, None, lambda is_there: is_there)

    def _read_text(self) -> str:
        with self.path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise UsersFileError(f"{self.path}: a users file has at most {_MAX_FILE} octets")
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            number = data.count(b"\n", 0, exc.start) + 1
            raise UsersFileError(f"{self.path}:{number}: a users file is UTF-8 text") from exc

    def _parse(self, text: str) -> dict[str, User]:
        users: dict[str, User] = {}
        lines: dict[str, int] = {}
        # Not splitlines, which also splits at characters that are no line ends to an editor.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                user = _parse_user(line)
            except ValueError as exc:
                raise UsersFileError(f"{self.path}:{number}: {exc}") from exc
            before = lines.setdefault(user.name.casefold(), number)
            if before != number:
                raise UsersFileError(f"{self.path}:{number}: the user {user.name} is already in line {before}")
            users[user.name] = user
        return users

    def _edit(self, name: str, line: str | None, is_wanted: Callable[[bool], bool]) -> bool:
        """Replace the line of a user, or append it; None removes it. Return whether `is_wanted` allowed that.

        A malformed file is not changed.
        """
        target = self.path.resolve()  # a link stays a link
        with locked(target.parent):
            try:
                text = self._read_text()
            except FileNotFoundError:
                text = ""
            folded = name.casefold()
            is_there = folded in map(str.casefold, self._parse(text))
            if not is_wanted(is_there):
                return False
            lines = text.removesuffix("\n").split("\n") if text else []
            if is_there:
                at = next(n for n, old in enumerate(lines) if old.split()[:1] and old.split()[0].casefold() == folded)
                lines[at : at + 1] = [] if line is None else [line]
            elif line is not None:
                lines.append(line)
            # With its owner: after `penstock user add` by root the server must still read it.
            write_atomically(target, "".join(f"{each}\n" for each in lines).encode(), keep_owner=True)
        return True


def load_secret(path: Path) -> bytes:
    """Return the secret behind invented SCRAM keys; create it, with mode 0600, when there is no file.

    All processes that call this get the same secret. Blocks. Raise OSError, and ValueError for a file of another size.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        with contextlib.suppress(FileExistsError):  # another process was first
            write_atomically(path, os.urandom(_SECRET_OCTETS), replace=False)
    secret = path.read_bytes()
    if len(secret) != _SECRET_OCTETS:
        raise ValueError(f"{path}: expected {_SECRET_OCTETS} octets, found {len(secret)}; remove the file")
    return secret


class UsersAuthenticator:
    """The authenticator of a users file (penstock.auth.base)."""

    last_error: str | None
    """Why the file could not be read again, None when it could. The users read before remain."""

    def __init__(
        self,
        file: UsersFile,
        journal: Journal | None = None,
        *,
        secret: bytes = _PROCESS_SECRET,
        at_a_time: int = _AT_A_TIME,
    ) -> None:
        """Read the file; a missing one has no users yet. Raise UsersFileError or OSError.

        When reading it again fails later, that is journaled, and so is its recovery. `secret` is that of `load_secret`.
        `at_a_time` passwords are verified at the same time, each in a thread.
        """
        self._journal = journal
        self._file = file
        self._limiter = trio.CapacityLimiter(at_a_time)
        self._secret = secret
        # Hashed like any password, so that verifying against it takes as long.
        self._unknown = file.hasher.hash(os.urandom(32).hex())
        self._users: dict[str, User] = {}
        """The users by their names in folded case."""
        self._stamp: tuple[int, int, int] | None = None
        self.last_error = None
        # The stamp is taken first: a change between the two is noticed at the next look-up.
        with contextlib.suppress(FileNotFoundError):
            stamp = self._stamp_now()
            self._users = _by_folded_name(file.read())
            self._stamp = stamp

    async def verify(self, name: str, password: str) -> bool:
        """Return whether the password is that of the user. Raise RuntimeError when argon2 fails (out of memory)."""
        user = self._look_up(name)
        password_hash = self._unknown if user is None else user.password_hash
        is_right = await trio.to_thread.run_sync(self._check, password_hash, password, limiter=self._limiter)
        return is_right and user is not None

    def scram_keys(self, name: str) -> ScramKeys:
        """Return the keys of a user; for an unknown one, keys that no password fits, always the same ones."""
        user = self._look_up(name)
        salt, stored, server = (self._invent(purpose, name) for purpose in (b"salt", b"stored", b"server"))
        return ScramKeys(salt[:_SALT_OCTETS], stored, server, ITERATIONS) if user is None else user.scram

    def canonical_name(self, name: str) -> str:
        """Return the name as the file has it."""
        user = self._users.get(name.casefold())
        return name if user is None else user.name

    def _invent(self, purpose: bytes, name: str) -> bytes:
        """Return 32 octets that look random, the same for the same name and secret."""
        return hmac.digest(self._secret, purpose + name.casefold().encode(), hashlib.sha256)

    def _check(self, password_hash: str, password: str) -> bool:
        try:
            return self._file.hasher.verify(password_hash, password)
        except argon2.exceptions.VerifyMismatchError:
            return False
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError) as exc:
            # Not False: a client that gets 535 discards a good password.
            raise RuntimeError(f"argon2 cannot verify a password: {exc}") from exc

    def _stamp_now(self) -> tuple[int, int, int]:
        """Return a value that changes when the file does."""
        stat = self._file.path.stat()
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def _look_up(self, name: str) -> User | None:
        self._refresh()
        return self._users.get(name.casefold())

    def _refresh(self) -> None:
        """Read the file again if it has changed; otherwise this is one stat."""
        try:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._users = _by_folded_name(self._file.read())
            self._note(None)
        except UsersFileError as exc:
            self._note(exc)  # not read again until it changes
        except OSError as exc:
            self._note(exc)
            self._stamp = None  # may be temporary: try again at the next look-up

    def _note(self, exc: Exception | None) -> None:
        """Remember why the file cannot be used, None when it can; journal each change."""
        error = None if exc is None else str(exc)
        if error == self.last_error:
            return
        self.last_error = error
        if self._journal is not None:
            if error is None:
                self._journal.users_read(str(self._file.path), len(self._users))
            else:
                self._journal.users_failed(f"{error}; the users read before remain")


def _by_folded_name(users: dict[str, User]) -> dict[str, User]:
    return {name.casefold(): user for name, user in users.items()}
