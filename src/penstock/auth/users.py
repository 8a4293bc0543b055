"""Users in a file: a line a user, its password as an argon2id hash (RFC 9106) and as SCRAM keys (RFC 5803).

    # name, password, keys; blanks between them
    alice  $argon2id$v=19$m=19456,t=2,p=1$...  SCRAM-SHA-256$4096:salt$stored:server

The file is written whole or not at all, one writer at a time, and what an operator wrote beside the users (comments,
empty lines, the order) stays. It is read again when it has changed, so that `penstock user` works while the server
runs.

Nobody learns who exists. A name that is not there costs the hash of a password, as a wrong password does, and SCRAM
answers it with keys of the same shape, the same each time. That holds for the keys this file makes: those copied from
elsewhere with another salt length or count of iterations tell that their user exists.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import argon2
import scramp
import trio

from penstock.journal import Journal
from penstock.smtp.sasl import MAX_NAME, MAX_PASSWORD, ScramKeys

ITERATIONS: Final = 4096
"""Of SCRAM (RFC 7677 4)."""
_SALT_OCTETS: Final = 16
"""Of SCRAM salts, also of the invented ones: told here, because a library may change its mind."""
_KEY_OCTETS: Final = 32
"""Of SCRAM keys: an SHA-256 each."""
_MAX_ITERATIONS: Final = 10_000_000
"""More than that is what scramp refuses, too."""
_MAX_FILE: Final = 64 << 20
"""Octets of a users file: about 250,000 users."""
_AT_A_TIME: Final = 2
"""Passwords that are being checked at a time: each costs 19 MiB and a core."""
_SECRET: Final = os.urandom(32)
"""Of this process, not of one authenticator: two listeners must invent the same keys for the same unknown name."""

_B64: Final = r"[A-Za-z0-9+/]+"
_ARGON2ID: Final = re.compile(rf"\$argon2id\$v=19\$m=[0-9]{{1,9}},t=[0-9]{{1,9}},p=[0-9]{{1,3}}\${_B64}\${_B64}")
_SCRAM: Final = re.compile(rf"SCRAM-SHA-256\$([0-9]{{4,8}}):({_B64}={{0,2}})\$({_B64}={{0,2}}):({_B64}={{0,2}})")


class UsersFileError(ValueError):
    """A users file that can not be used; the text names the file and the line."""


class User(NamedTuple):
    """A line of the file."""

    name: str
    password_hash: str
    scram: ScramKeys

    def line(self) -> str:
        """Return the line, without its end."""
        salt, stored, server, iterations = self.scram
        texts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
        return f"{self.name} {self.password_hash} SCRAM-SHA-256${iterations}:{texts[0]}${texts[1]}:{texts[2]}"


def check_name(name: str) -> None:
    """Raise ValueError for a name that no user can have.

    A name has 1 to 255 octets, only printable characters, no blanks, and no # in front. It is written as SASLprep
    (RFC 4013) would write it, because that is how SCRAM asks for it (RFC 5802 5.1).
    """
    if not name or name[0] == "#" or " " in name or not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise ValueError(
            f"a user name is 1 to {MAX_NAME} octets that print, without blanks, and begins with no #; not {name!r}"
        )
    if name.isascii():  # SASLprep leaves it alone, and is slow
        return
    try:
        prepared = scramp.core.saslprep(name)
    except scramp.ScramException as exc:
        raise ValueError(f"SASLprep (RFC 4013) does not allow the user name {name!r}: {exc}") from exc
    if prepared != name:
        raise ValueError(f"SASLprep (RFC 4013) turns the user name {name!r} into {prepared!r}; use that one")


def make_user(name: str, password: str, hasher: argon2.PasswordHasher) -> User:
    """Return a user with a new password. Raise ValueError for a name or a password that is of no use. Slow."""
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
    """Return the user of a line. Raise ValueError that says what is wrong, and repeats no hash and no key."""
    words = line.split()
    if len(words) != 3:
        raise ValueError(f"a line is 'name $argon2id$... SCRAM-SHA-256$...', three words, not {len(words)}")
    name, password_hash, scram = words
    check_name(name)
    if not _ARGON2ID.fullmatch(password_hash):
        raise ValueError("the second word is no argon2id hash: '$argon2id$v=19$m=...,t=...,p=...$salt$hash'")
    return User(name, password_hash, _parse_keys(scram))


def _parse_keys(text: str) -> ScramKeys:
    match = _SCRAM.fullmatch(text)
    if match is None:
        raise ValueError("the third word is no 'SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey' (RFC 5803)")
    iterations = int(match[1])
    if not ITERATIONS <= iterations <= _MAX_ITERATIONS:
        raise ValueError(f"SCRAM takes {ITERATIONS} to {_MAX_ITERATIONS} iterations, not {iterations}")
    try:
        salt, stored, server = (base64.b64decode(part, validate=True) for part in match.groups()[1:])
    except ValueError as exc:
        raise ValueError(f"the SCRAM keys are no base64: {exc}") from exc
    if len(salt) < 12 or len(stored) != _KEY_OCTETS or len(server) != _KEY_OCTETS:
        raise ValueError(f"a SCRAM salt has at least 12 octets, and each key {_KEY_OCTETS}")
    return ScramKeys(salt, stored, server, iterations)


class UsersFile:
    """The file, read and written as a whole. Blocking; all of it raises OSError and UsersFileError."""

    def __init__(self, path: Path, hasher: argon2.PasswordHasher | None = None) -> None:
        self.path = path
        self.hasher = hasher or make_hasher()

    def read(self) -> dict[str, User]:
        """Return the users by name, in the order of the file. Raise FileNotFoundError when there is none.

        Costs about 10 microseconds a user.
        """
        return self._parse(self._read_text())

    def names(self) -> list[str]:
        """Return the names in the order of the file; none when there is no file."""
        try:
            return list(self.read())
        except FileNotFoundError:
            return []

    def add(self, name: str, password: str, *, replace: bool = False) -> bool:
        """Add a user, and make the file and its folder if need be; with `replace` also give a new password.

        Return False, and change nothing, when the name is there already. Raise ValueError for a name or a password
        that is of no use.
        """
        line = make_user(name, password, self.hasher).line()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        return self._edit(name, line, lambda is_there: replace or not is_there)

    def remove(self, name: str) -> bool:
        """Remove a user; return False when there is none of that name."""
        if name not in self.names():
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
        # Not splitlines: it knows line ends that no editor counts.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                user = _parse_user(line)
            except ValueError as exc:
                raise UsersFileError(f"{self.path}:{number}: {exc}") from exc
            if user.name in users:
                raise UsersFileError(f"{self.path}:{number}: {user.name} is there already, further up")
            users[user.name] = user
        return users

    def _edit(self, name: str, line: str | None, is_wanted: Callable[[bool], bool]) -> bool:
        """Put a line in the place of a name, or behind the others; None removes it. Say whether that was wanted.

        A file that is malformed is not touched.
        """
        target = self.path.resolve()  # a link stays a link
        with _locked(target.parent) as folder:
            try:
                text = self._read_text()
            except FileNotFoundError:
                text = ""
            is_there = name in self._parse(text)
            if not is_wanted(is_there):
                return False
            lines = text.removesuffix("\n").split("\n") if text else []
            if is_there:
                at = next(number for number, old in enumerate(lines) if old.split()[:1] == [name])
                lines[at : at + 1] = [] if line is None else [line]
            elif line is not None:
                lines.append(line)
            _write_whole(target, "".join(f"{each}\n" for each in lines).encode(), folder)
        return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keep other writers out of a folder, and lend its descriptor.

    They hold the lock for one small write, and the kernel takes it back from one that dies: waiting is short.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_whole(target: Path, data: bytes, folder: int) -> None:
    """Put data in the place of a file, mode 0600: whole and on the disk, or the file stays as it was."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # is made with mode 0600
    new = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            _keep_owner(file.fileno(), target)
            os.fsync(file.fileno())
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    os.fsync(folder)  # the new name, too, is on the disk


def _keep_owner(descriptor: int, target: Path) -> None:
    """Give a file the owner of the one it replaces: root's `penstock user add` must not lock the server out."""
    with contextlib.suppress(FileNotFoundError):
        old = target.stat()
        if old.st_uid != os.geteuid():
            os.fchown(descriptor, old.st_uid, old.st_gid)


class UsersAuthenticator:
    """The authenticator of a users file (penstock.auth.base)."""

    last_error: str | None
    """Why the file could not be read again, None when it could; the users known before stay."""

    def __init__(self, file: UsersFile, journal: Journal | None = None, *, at_a_time: int = _AT_A_TIME) -> None:
        """Read the file; one that is not there has no users yet. Raise UsersFileError or OSError.

        One that is of no use later leaves things as they were, and is journaled; so is its getting better. `at_a_time`
        passwords are checked at a time, each in a thread; the others wait for their turn.
        """
        self._journal = journal
        self._file = file
        self._limiter = trio.CapacityLimiter(at_a_time)
        # Hashed as any password is, so that checking against it takes as long.
        self._nobody = file.hasher.hash(os.urandom(32).hex())
        self._users: dict[str, User] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.last_error = None
        # The stamp is taken first: a change between the two is seen at the next look.
        with contextlib.suppress(FileNotFoundError):
            stamp = self._stamp_now()
            self._users = file.read()
            self._stamp = stamp

    async def verify(self, name: str, password: str) -> bool:
        """Say whether the password is that user's. Raise RuntimeError when argon2 can not tell (memory, a bad hash)."""
        user = self._look_up(name)
        password_hash = self._nobody if user is None else user.password_hash
        is_right = await trio.to_thread.run_sync(self._check, password_hash, password, limiter=self._limiter)
        return is_right and user is not None

    def scram_keys(self, name: str) -> ScramKeys:
        """Return the keys of a user; for an unknown one, keys that no password fits, the same each time."""
        user = self._look_up(name)
        invented = ScramKeys(
            _invent(b"salt", name)[:_SALT_OCTETS], _invent(b"stored", name), _invent(b"server", name), ITERATIONS
        )
        return invented if user is None else user.scram

    def _check(self, password_hash: str, password: str) -> bool:
        try:
            return self._file.hasher.verify(password_hash, password)
        except argon2.exceptions.VerifyMismatchError:
            return False
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError) as exc:
            # Not False: a client that hears 535 throws a good password away.
            raise RuntimeError(f"argon2 can not check a password: {exc}") from exc

    def _stamp_now(self) -> tuple[int, int, int]:
        """Return what changes when the file does."""
        stat = self._file.path.stat()
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def _look_up(self, name: str) -> User | None:
        self._refresh()
        return self._users.get(name)

    def _refresh(self) -> None:
        """Read the file again if it has changed: one stat otherwise."""
        try:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._users = self._file.read()
            self._note(None)
        except UsersFileError as exc:
            self._note(exc)  # as malformed as it is, until it changes
        except OSError as exc:
            self._note(exc)
            self._stamp = None  # may pass by itself: try again at the next look

    def _note(self, exc: Exception | None) -> None:
        """Keep why the file is of no use, None when it is good; the journal hears of each change."""
        error = None if exc is None else str(exc)
        if error == self.last_error:
            return
        self.last_error = error
        if self._journal is not None:
            if error is None:
                self._journal.users_read(str(self._file.path), len(self._users))
            else:
                self._journal.users_failed(f"{error}; what was read before still holds")


def _invent(purpose: bytes, name: str) -> bytes:
    """Return 32 octets that nobody can tell from random ones, the same for the same name."""
    return hmac.digest(_SECRET, purpose + name.encode(), hashlib.sha256)
