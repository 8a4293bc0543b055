"""The certificates of a server's listeners: read at the start, and again when their files change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

import msgspec

from penstock.cli.filecheck import tls_problems
from penstock.config import ListenerSettings, Settings
from penstock.net.tls import KeyPair, generated_certificate
from penstock.privileges import Account, acting_as

_replace = msgspec.structs.replace
_Stamp = tuple[tuple[int, int, int], ...]
_SOON: Final = 0.5
"""Seconds until the next look at a pair that does not match: it may be between the two renames of its files."""


class Look(NamedTuple):
    """Changes of the files since the last check."""

    is_changed: bool
    """`Certificates.pairs` has a new one."""
    problems: tuple[str, ...]
    """What is wrong with files that have changed, each with its key, and not reported before."""
    again: float
    """Seconds after which to look again; 0: as usual."""


class Certificates:
    """Reads certificates and keys. All methods block."""

    pairs: list[KeyPair | None]
    """That of each listener; None without TLS."""
    ca_file: Path | None
    """The authority of a generated certificate."""

    def __init__(
        self, settings: Settings, account: Account | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        """Read those of the settings. Raise OSError or ValueError, which names the key.

        `account` is that of the workers: a certificate of our own making belongs to it.
        """
        self._settings = settings
        self._account = account
        self._clock = clock
        self._names = list(dict.fromkeys([settings.own_hostname, "localhost", "127.0.0.1", "::1"]))
        self.ca_file = None
        wrong = tls_problems(settings)
        if wrong:
            raise ValueError("\n".join(wrong))
        self._stamps = [self._stamp(each) for each in settings.listener]
        self._bad: dict[int, tuple[_Stamp, float, bool]] = {}
        """Listeners whose changed files cannot be used: their stamp, since when, and whether it was reported."""
        self.pairs = [self._read(each) for each in settings.listener]

    def look(self, patience: float) -> Look:
        """Read again what has changed. A pair that cannot be used is reported once, after `patience` seconds."""
        is_changed, problems, again = False, [], 0.0
        for number, listener in enumerate(self._settings.listener):
            stamp = self._stamp(listener)
            if stamp == self._stamps[number]:
                self._bad.pop(number, None)
                continue
            try:
                pair = self._checked(number, listener)
            except (OSError, ValueError) as exc:
                now = self._clock()
                _, since, is_told = self._bad.get(number, (stamp, now, False))
                if not is_told and now - since >= patience:
                    problems.append(str(exc))
                    is_told = True
                elif not is_told:
                    again = min(_SOON, max(0.02, patience - (now - since)))
                self._bad[number] = (stamp, since, is_told)
                if is_told:
                    self._stamps[number] = stamp  # not read again before it changes
                    del self._bad[number]
                continue
            self._bad.pop(number, None)
            self._stamps[number] = stamp
            if pair != self.pairs[number]:
                self.pairs[number], is_changed = pair, True
        return Look(is_changed, tuple(problems), again)

    def _checked(self, number: int, listener: ListenerSettings) -> KeyPair | None:
        """Return the pair of a listener. Raise OSError or ValueError, which names the key."""
        wrong = tls_problems(_replace(self._settings, listener=(listener,)))
        if wrong:
            raise ValueError(wrong[0].replace("listener[0].", f"listener[{number}].", 1))
        pair = self._read(listener)
        if pair is not None:
            pair.context(listener.tls)  # the files may have changed since they were checked
        return pair

    def _read(self, listener: ListenerSettings) -> KeyPair | None:
        if listener.tls.mode == "none":
            return None
        return KeyPair.read(*self._files(listener))

    def _files(self, listener: ListenerSettings) -> tuple[Path, Path | None]:
        """Return the files of a listener with TLS; a generated certificate is renewed before it expires."""
        folder = Path(self._settings.data_dir).absolute()
        if listener.tls.certificate:
            return folder / listener.tls.certificate, folder / listener.tls.key if listener.tls.key else None
        with acting_as(self._account):
            made = generated_certificate(folder / "tls", self._names)
        self.ca_file = self.ca_file or made.ca_file
        return made.certificate, None

    def _stamp(self, listener: ListenerSettings) -> _Stamp:
        """Return a value that changes when the files of a listener do."""
        if listener.tls.mode == "none":
            return ()
        return tuple(_stamp_of(path) for path in self._files(listener) if path is not None)


def _stamp_of(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size
