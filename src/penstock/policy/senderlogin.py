"""Which senders an authenticated user may use.

Without this check, a user may send with any address. With it, a user may use the address that is the user name, or the
user name at one of our domains if it is not an address, and the addresses of a file. The null sender
of reports is allowed (RFC 8098 3: MDNs have it).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path as FilePath
from typing import Any, Final

import trio

from penstock.addresses import canonical_domain
from penstock.journal import Journal
from penstock.mailauth.header import Header, mailboxes
from penstock.message import MailParameters, Message, Path
from penstock.policy.check import Check, Finding, FindingOrAwaitable, Mode, Parts
from penstock.policy.milter import split_body
from penstock.policy.settings import PolicySettings, SenderLoginSettings
from penstock.reply import CHECK_FAILED, Reply
from penstock.smtp.grammar import parse_mailbox
from penstock.transaction import Transaction

_LOOK_AGAIN: Final = 1.0
"""Seconds after which the file is checked for changes again."""
_MOST_OCTETS: Final = 64 << 20
NOT_OWNED: Final = Reply(553, "5.7.1", "You may not send from this address")
NOT_OWNED_FROM: Final = Reply(550, "5.7.1", "You may not use this address in the From field")

Senders = dict[str, frozenset[str]]
"""User name, case folded -> addresses, "@domain" and "*"."""


class SendersError(ValueError):
    """The file has a line that is none."""


def read_senders(path: FilePath) -> Senders:
    """Return the senders of a file with lines `user: address, @domain ...`. Raise OSError or SendersError."""
    if path.stat().st_size > _MOST_OCTETS:
        raise SendersError(f"{path}: a file of senders has at most {_MOST_OCTETS >> 20} MB")
    found: dict[str, set[str]] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            user, colon, senders = text.partition(":")
            keys = [_key_of(each) for each in senders.replace(",", " ").split()]
            if not colon or not user.strip() or not keys or None in keys:
                raise SendersError(f"{path}:{number}: expected USER: ADDRESS, @DOMAIN or *, not {text[:80]!r}")
            found.setdefault(user.strip().casefold(), set()).update(key for key in keys if key is not None)
    except UnicodeDecodeError as exc:
        raise SendersError(f"{path}: a file of senders is UTF-8 text") from exc
    return {user: frozenset(senders) for user, senders in found.items()}


def _key_of(text: str) -> str | None:
    """Return how an address, a domain or * is compared; None for anything else."""
    if text == "*":
        return text
    if text.startswith("@"):
        try:
            return f"@{canonical_domain(text[1:])}"
        except ValueError:
            return None
    path = parse_mailbox(text, smtputf8=True, tolerant=True)
    return None if path is None else _key(path)


def _key(path: Path) -> str:
    return f"{path.local.lower()}@{path.domain}"


class SenderLoginCheck(Check):
    """The check."""

    name = "sender_login"
    failure = CHECK_FAILED
    judges_authenticated = True

    def __init__(
        self,
        settings: SenderLoginSettings,
        mode: Mode,
        *,
        data_dir: FilePath,
        is_ours: Callable[[str], bool],
        journal: Journal,
    ) -> None:
        """Read the file. Raise OSError or SendersError.

        When reading it again fails later, that is journaled, and the senders read before remain.
        """
        self.mode = mode
        self._is_ours = is_ours
        self._journal = journal
        self._check_from = settings.check_from
        self._path = data_dir / settings.file if settings.file else None
        self._stamp: object = None
        self._senders: Senders = {}
        self._look_at = 0.0
        if self._path is not None:
            self._stamp = _stamp_of(self._path)
            self._senders = read_senders(self._path)

    def on_mail(
        self,
        transaction: Transaction,
        sender: Path,
        parameters: MailParameters,  # noqa: ARG002 - the interface
    ) -> FindingOrAwaitable:
        """Refuse a sender that is not the user's."""
        if transaction.identity is None or not sender.text:
            return None
        if self._path is not None and trio.current_time() >= self._look_at:
            return self._refresh_and_check(transaction.identity, sender)
        return None if self.owns(transaction.identity, sender) else NOT_OWNED

    async def on_message(self, transaction: Transaction, message: Message) -> Finding:
        """Refuse a From field with an address that is not the user's."""
        if transaction.identity is None or not self._check_from:
            return None
        header, _ = await split_body(message)
        found = Header(header)
        for field in found.by_name.get(b"from", ()):
            for text in mailboxes(found.value(field).decode("utf-8", "surrogateescape")):
                path = parse_mailbox(text, smtputf8=True, tolerant=True)
                if path is None or not self.owns(transaction.identity, path):
                    return NOT_OWNED_FROM.because(f"{transaction.identity} uses {text[:100]}")
        return None

    def owns(self, user: str, sender: Path) -> bool:
        """Return whether a user may use a sender. Case does not matter."""
        name, key = user.casefold(), _key(sender)
        if _key_of(name) == key:
            return True
        if "@" not in name and sender.local.casefold() == name and sender.domain and self._is_ours(sender.domain):
            return True
        senders = self._senders.get(name)
        return senders is not None and (key in senders or f"@{sender.domain}" in senders or "*" in senders)

    def _refresh_and_check(self, user: str, sender: Path) -> Coroutine[Any, Any, Reply | None]:
        self._look_at = trio.current_time() + _LOOK_AGAIN  # others do not look meanwhile

        async def check() -> Reply | None:
            assert self._path is not None
            try:
                with trio.CancelScope(shield=True):  # the deadline of one client must not stop the reading
                    stamp, senders = await trio.to_thread.run_sync(_read_if_changed, self._path, self._stamp)
                if senders is not None:
                    self._stamp, self._senders = stamp, senders
            except (OSError, SendersError) as exc:
                self._journal.hook_failed(self.name, "on_mail", f"{exc}; the senders read before remain")
            return None if self.owns(user, sender) else NOT_OWNED

        return check()


def _stamp_of(path: FilePath) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read_if_changed(path: FilePath, stamp: object) -> tuple[object, Senders | None]:
    now = _stamp_of(path)
    return now, None if now == stamp else read_senders(path)


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, if it is wanted. Raise OSError or SendersError."""
    mode = settings.mode_of(settings.sender_login)
    if settings.sender_login is None or mode == "off":
        return []
    return [
        SenderLoginCheck(
            settings.sender_login, mode, data_dir=parts.data_dir, is_ours=parts.is_ours, journal=parts.journal
        )
    ]
