"""Users in a file: a line a user, its password as an argon2id hash and as SCRAM keys.

    alice  $argon2id$v=19$m=19456,t=2,p=1$...  SCRAM-SHA-256$4096:salt$stored:server

The file is written whole or not at all, and read again when it has changed, so that `penstock user` works while the
server runs. A name that is not there costs as much as a wrong password: nobody learns from the time who exists.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import argon2
import scramp
import trio

from penstock.smtp.sasl import ScramKeys

_NAME: Final = re.compile(r"[^\s#:\x00-\x1f\x7f][^\s\x00-\x1f\x7f]{0,254}")
_SCRAM: Final = re.compile(r"SCRAM-SHA-256\$(\d{4,7}):([^$:]+)\$([^$:]+):([^$:]+)")  # RFC 5803
_AT_A_TIME: Final = 2
"""Passwords that are being hashed at a time: each costs 19 MiB and a core."""
ITERATIONS: Final = 4096
"""Of SCRAM (RFC 7677 4)."""
_SALT_OCTETS: Final = 16
"""Of every salt, an invented one among them: its length must not tell who exists."""


class UsersFileError(ValueError):
    """A users file that can not be used; the text names the line."""


class User(NamedTuple):
    """A line of the file."""

    name: str
    password_hash: str
    scram: ScramKeys

    def line(self) -> str:
        """Return the line, with its end."""
        salt, stored, server, iterations = self.scram
        texts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
        return f"{self.name} {self.password_hash} SCRAM-SHA-256${iterations}:{texts[0]}${texts[1]}:{texts[2]}\n"


def make_user(name: str, password: str, hasher: argon2.PasswordHasher) -> User:
    """Return a user with a new password. Raise ValueError for a name or password that is of no use."""
    if not _NAME.fullmatch(name) or len(name.encode()) > 255:
        raise ValueError(
            f"a user name has 1 to 255 octets and no blanks, and begins with neither # nor :, not {name!r}"
        )
    if not password or len(password.encode()) > 1024 or "\0" in password:
        raise ValueError("a password has 1 to 1024 octets, and no NUL")
    try:
        keys = scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info(
            password, iteration_count=ITERATIONS, salt=os.urandom(_SALT_OCTETS)
        )
    except scramp.ScramException as exc:
        raise ValueError(f"SASLprep (RFC 4013) does not allow this password: {exc}") from exc
    return User(name, hasher.hash(password), ScramKeys(*keys))


class UsersFile:
    """The file, read and written as a whole. Blocking."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, User]:
        """Return the users by name; none when there is no file. Raise UsersFileError or OSError."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError as exc:
            raise UsersFileError(f"{self.path}: a users file is UTF-8 text") from exc
        return {user.name: user for user in self._parse(text)}

    def _parse(self, text: str) -> Iterator[User]:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words = line.split()
            scram = _SCRAM.fullmatch(words[2]) if len(words) == 3 else None
            if scram is None or not words[1].startswith("$argon2"):
                raise UsersFileError(f"{self.path}:{number}: a line is: name argon2-hash SCRAM-SHA-256$...")
            try:
                salt, stored, server = (base64.b64decode(part, validate=True) for part in scram.groups()[1:])
            except binascii.Error as exc:
                raise UsersFileError(f"{self.path}:{number}: the SCRAM keys are no base64") from exc
            yield User(words[0], words[1], ScramKeys(salt, stored, server, int(scram[1])))

    def write(self, users: dict[str, User]) -> None:
        """Write the users, mode 0600: whole, or the file stays as it was. Raise OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.writelines(user.line() for user in users.values())
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError:
            new.unlink(missing_ok=True)
            raise


class UsersAuthenticator:
    """The authenticator of a users file (penstock.auth.base)."""

    def __init__(self, file: UsersFile, hasher: argon2.PasswordHasher | None = None) -> None:
        """Read the file. Raise UsersFileError or OSError when that is not possible."""
        self._file = file
        self._hasher = hasher or make_hasher()
        self._limiter = trio.CapacityLimiter(_AT_A_TIME)
        self._secret = os.urandom(32)
        # Hashed as any password is, so that checking against it takes as long.
        self._nobody = self._hasher.hash(self._secret.hex())
        self._stamp = self._stamp_now()
        self._users = file.read()
        self.last_error = ""
        """Why the file could not be read again; the users known before stay."""

    async def verify(self, name: str, password: str) -> bool:
        """Say whether the password is that user's."""
        user = self._look_up(name)
        password_hash = self._nobody if user is None else user.password_hash
        is_right = await trio.to_thread.run_sync(self._check, password_hash, password, limiter=self._limiter)
        return is_right and user is not None

    def scram_keys(self, name: str) -> ScramKeys:
        """Return the keys of a user; for an unknown one, keys that no password fits, the same each time."""
        user = self._look_up(name)
        if user is not None:
            return user.scram

        def invent(purpose: bytes) -> bytes:
            return hmac.digest(self._secret, purpose + name.encode(), hashlib.sha256)

        return ScramKeys(invent(b"salt")[:_SALT_OCTETS], invent(b"stored"), invent(b"server"), ITERATIONS)

    def _check(self, password_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False

    def _stamp_now(self) -> tuple[int, int, int]:
        """Return what changes when the file does."""
        try:
            stat = self._file.path.stat()
        except OSError:
            return (0, 0, 0)
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def _look_up(self, name: str) -> User | None:
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._users = self._file.read()
                self.last_error = ""
            except (OSError, UsersFileError) as exc:
                self.last_error = str(exc)
        return self._users.get(name)


def make_hasher() -> argon2.PasswordHasher:
    """Return the hasher of new passwords: argon2id as OWASP recommends for servers (19 MiB, two passes)."""
    return argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
