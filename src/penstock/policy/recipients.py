"""Recipient verification: unknown recipients are refused at RCPT.

A server that accepts mail for unknown recipients has to send reports later, and most senders of such mail are forged.
So recipients are checked at RCPT: in a file, or by asking the next hop that the mail would go to ("call-ahead"), whose
answers are cached.

Rules
-----
1. Only the file, or a 5xx reply of the next hop to RCPT, refuses a recipient: 550 5.1.1. Without an answer it is 451.
2. Postmaster is always known (RFC 5321 4.5.1), and so is a recipient in a domain that is not ours: the listener has
   decided before that such mail may pass.
3. A question is asked once, however many clients wait for its answer; each of them waits until its deadline.
4. A domain whose questions are not answered is not asked about for a while. The reply is 451 meanwhile: mail waits for
   the check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
import trio

from penstock.journal import Journal
from penstock.message import Path, Recipient
from penstock.reply import Reply
from penstock.smtp.grammar import parse_domain, parse_mailbox
from penstock.transaction import Transaction

UNKNOWN: Final = Reply(550, "5.1.1", "No such user here")
CANNOT_SAY: Final = Reply(451, "4.4.3", "Cannot verify the recipient now, please try again later")
_LOOK_AGAIN: Final = 1.0
"""Seconds after which the file is checked for changes again."""
_COMMENT: Final = re.compile(r"(?:^|\s)#.*", re.DOTALL)
_MOST_OCTETS: Final = 256 << 20
"""Of the file."""


class RecipientSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Recipient verification. Without a file and without `verify`, all recipients are accepted."""

    file: Annotated[
        str,
        msgspec.Meta(
            description="File with an address, @domain or domain per line, relative to data_dir; read again when it "
            "changes. Other recipients are refused"
        ),
    ] = ""
    verify: Annotated[
        Literal["", "next-hop"],
        msgspec.Meta(description="next-hop: ask the next hop of the recipient (MAIL FROM:<>, RCPT, RSET)"),
    ] = ""
    positive_ttl: Annotated[
        float, msgspec.Meta(ge=0, le=2_678_400, description="Seconds for which a known recipient is cached")
    ] = 21_600.0
    negative_ttl: Annotated[
        float, msgspec.Meta(ge=0, le=2_678_400, description="Seconds for which an unknown recipient is cached")
    ] = 600.0
    cache: Annotated[int, msgspec.Meta(ge=0, le=10_000_000, description="Cached answers")] = 100_000
    deadline: Annotated[
        float, msgspec.Meta(gt=0, le=300, description="Seconds a client waits for an answer; then the reply is 451")
    ] = 10.0
    breaker_failures: Annotated[
        int,
        msgspec.Meta(
            ge=1, description="Consecutive questions without an answer after which a domain is not asked about"
        ),
    ] = 10
    breaker_pause: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Seconds it is not asked about; the reply is 451 meanwhile")
    ] = 30.0


class RecipientsError(ValueError):
    """The file has a line that is neither an address nor a domain."""


class AsksNextHop(Protocol):
    """Asks the next hop of a recipient (penstock.relay.ahead)."""

    async def ask(self, recipient: Recipient) -> Reply | None:
        """Return None when the recipient is known, the hop's reply when not, a 4xx reply without an answer."""


def _is_postmaster(path: Path) -> bool:
    return path.local.lower() == "postmaster"


def _key(local: str, domain: str) -> str:
    """Return how an address is compared: a local part without quotes and case, a domain in its canonical form."""
    return f"{local.lower()}@{domain}"


class FileRecipients:
    """A policy: accept only the recipients of a file."""

    def __init__(self, path: FilePath, is_ours: Callable[[str], bool], journal: Journal) -> None:
        """Read the file. Raise OSError or RecipientsError.

        When reading it again fails later, that is journaled, and the recipients read before remain.
        """
        self._path = path
        self._is_ours = is_ours
        self._journal = journal
        self._known, self._stamp = _read(path)
        self._look_at = 0.0
        self._is_reading = False

    def on_rcpt(self, _: Transaction, recipient: Recipient) -> Reply | Coroutine[Any, Any, Reply | None] | None:
        """Refuse a recipient that is not in the file."""
        now = trio.current_time()
        if now >= self._look_at and not self._is_reading:
            self._look_at = now + _LOOK_AGAIN
            return self._refresh_and_check(recipient.path)
        return self._check(recipient.path)

    async def _refresh_and_check(self, path: Path) -> Reply | None:
        """Read the file again when it has changed, then check a recipient."""
        self._is_reading = True
        try:
            with trio.CancelScope(shield=True):  # the deadline of one client must not stop the reading
                read = await trio.to_thread.run_sync(_read_if_changed, self._path, self._stamp)
            if read is not None:
                self._known, self._stamp = read
        except (OSError, RecipientsError) as exc:
            self._journal.hook_failed("recipients", "on_rcpt", f"{exc}; the recipients read before remain")
        finally:
            self._is_reading = False
        return self._check(path)

    def _check(self, path: Path) -> Reply | None:
        if not path.domain or not self._is_ours(path.domain) or _is_postmaster(path):
            return None
        known = self._known
        return None if path.domain in known or _key(path.local, path.domain) in known else UNKNOWN


_Stamp = tuple[int, int, int]


def _stamp_of(path: FilePath) -> _Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read_if_changed(path: FilePath, stamp: _Stamp) -> tuple[frozenset[str], _Stamp] | None:
    return None if _stamp_of(path) == stamp else _read(path)


def _read(path: FilePath) -> tuple[frozenset[str], _Stamp]:
    """Return the names in a file, and its stamp. Raise OSError, RecipientsError."""
    stamp = _stamp_of(path)
    if stamp[1] > _MOST_OCTETS:
        raise RecipientsError(f"{path}: a recipients file has at most {_MOST_OCTETS >> 20} MB")
    names: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = _COMMENT.sub("", line).strip()  # not each #: a local part may contain it
                if not text:
                    continue
                name = _read_name(text)
                if name is None:
                    raise RecipientsError(f"{path}:{number}: a line is an address, @domain or domain, not {text!r}")
                names.add(name)
    except UnicodeDecodeError as exc:
        raise RecipientsError(f"{path}: a recipients file is UTF-8 text") from exc
    return frozenset(names), stamp


def _read_name(text: str) -> str | None:
    """Return an address as `_key` writes it, or a domain without its @; None for anything else."""
    if "@" not in text.removeprefix("@"):
        return parse_domain(text.removeprefix("@").removesuffix("."), smtputf8=True, tolerant=True)
    path = parse_mailbox(text, smtputf8=True, tolerant=True)
    return None if path is None else _key(path.local, path.domain)


class _Question:
    """A question to a next hop that is under way."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.verdict: Reply | None = CANNOT_SAY


class NextHopRecipients:
    """A policy: accept only the recipients that the next hop accepts."""

    def __init__(
        self,
        settings: RecipientSettings,
        hops: AsksNextHop,
        is_ours: Callable[[str], bool],
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._settings = settings
        self._hops = hops
        self._is_ours = is_ours
        self._clock = clock
        self.on_answer: Callable[[str, float, str | None], None] = _ignore
        """Gets an address, for how many seconds the answer is kept, and why it is unknown, None if it is known."""
        self._answers: dict[str, tuple[float, Reply | None]] = {}
        """Address -> its expiry and the verdict; the oldest first."""
        self._asking: dict[str, _Question] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        """Domain -> consecutive questions without an answer, and until when it is not asked about. At most as many as
        answers."""

    def on_rcpt(self, _: Transaction, recipient: Recipient) -> Reply | Coroutine[Any, Any, Reply | None] | None:
        """Refuse a recipient that the hop does not know."""
        path = recipient.path
        if not path.domain or not self._is_ours(path.domain) or _is_postmaster(path):
            return None
        key = f"{path.local}@{path.domain}"
        kept = self._answers.get(key)
        now = self._clock()
        if kept is not None and now < kept[0]:
            return kept[1]
        if key not in self._asking and now < self._failures.get(path.domain, (0, 0.0))[1]:
            return CANNOT_SAY.because(f"questions about {path.domain} are unanswered")
        return self._ask_once(key, recipient)

    async def _ask_once(self, key: str, recipient: Recipient) -> Reply | None:
        """Ask, or wait for the answer to the same question of another session."""
        question = self._asking.get(key)
        if question is not None:
            with trio.move_on_after(self._settings.deadline):
                await question.answered.wait()
            return question.verdict
        question = self._asking[key] = _Question()
        try:
            question.verdict = await self._ask(key, recipient)
        finally:
            del self._asking[key]
            question.answered.set()
        return question.verdict

    async def _ask(self, key: str, recipient: Recipient) -> Reply | None:
        cause = f"no answer within {self._settings.deadline} s"
        answer: Reply | None = CANNOT_SAY
        try:
            with trio.move_on_after(self._settings.deadline):
                answer = await self._hops.ask(recipient)
                cause = "" if answer is None else answer.cause or answer.text
        except Exception as exc:  # noqa: BLE001 - the DNS or a route: in any case there is no answer
            cause = f"{type(exc).__name__}: {exc}"
        if answer is None:
            self._keep(key, recipient.path.domain, self._settings.positive_ttl, None)
            return None
        if answer.is_permanent:
            verdict = UNKNOWN.because(cause)
            self._keep(key, recipient.path.domain, self._settings.negative_ttl, verdict)
            return verdict
        if answer.code == 452:  # the mailbox is full: the hop has answered, and may answer otherwise next time
            return answer
        self._note_failure(recipient.path.domain)
        return CANNOT_SAY.because(cause)

    def learn(self, key: str, seconds: float, cause: str | None) -> None:
        """Take over the answer that another server got; `cause` says why the recipient is unknown."""
        self._remember(key, seconds, None if cause is None else UNKNOWN.because(cause))

    def _keep(self, key: str, domain: str, seconds: float, verdict: Reply | None) -> None:
        """Cache an answer."""
        self._failures.pop(domain, None)
        self._remember(key, seconds, verdict)
        self.on_answer(key, seconds, None if verdict is None else verdict.cause)

    def _remember(self, key: str, seconds: float, verdict: Reply | None) -> None:
        """Cache an answer, in the place of the oldest when the cache is full."""
        self._answers.pop(key, None)
        if self._settings.cache and seconds:
            while len(self._answers) >= self._settings.cache:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = (self._clock() + seconds, verdict)

    def _note_failure(self, domain: str) -> None:
        failures, until = self._failures.pop(domain, (0, 0.0))
        failures += 1
        if failures >= self._settings.breaker_failures:
            failures, until = 0, self._clock() + self._settings.breaker_pause
        while len(self._failures) >= max(1000, self._settings.cache):
            del self._failures[next(iter(self._failures))]
        self._failures[domain] = (failures, until)


def _ignore(_key: str, _seconds: float, _cause: str | None) -> None:
    """Without other servers."""
