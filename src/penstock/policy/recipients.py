"""Which recipients there are, known while the client is still there to hear it.

A server that takes mail for everybody and finds out later has to send reports to senders that are mostly forged. So
RCPT is answered with what is known: from a file, or from the next hop that the mail would go to, which is asked
beforehand ("call-ahead") and whose answers are kept for a while.

Rules
-----
1. Only the file, or an explicit 5yz of the hop to RCPT, refuses a recipient: 550 5.1.1. When nobody can say, it is 451.
2. Postmaster is always known (RFC 5321 4.5.1), and so is a recipient in a domain that is not ours: that such mail may
   pass was decided before, by the listener.
3. A question is asked once, however many clients wait for its answer; each of them waits until its deadline.
4. A domain whose questions go unanswered is left alone for a while, with 451: its mail waits, it does not go around.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
import trio

from penstock.journal import Journal
from penstock.message import Path, Recipient
from penstock.reply import Reply
from penstock.transaction import Transaction

UNKNOWN: Final = Reply(550, "5.1.1", "No such user here")
CANNOT_SAY: Final = Reply(451, "4.4.3", "Cannot verify the recipient now, please try again later")
_LOOK_AGAIN: Final = 1.0
"""Seconds after which the file is looked at again."""
_MOST_OCTETS: Final = 256 << 20
"""Of the file."""


class RecipientSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Recipients that are known at RCPT. Without a file and without `verify`, all are."""

    file: Annotated[
        str,
        msgspec.Meta(
            description="File with an address, @domain or domain in each line, relative to data_dir; read again when "
            "it changes. Whoever is not in it is refused"
        ),
    ] = ""
    verify: Annotated[
        Literal["", "next-hop"],
        msgspec.Meta(description="next-hop: ask the hop that the mail would go to (MAIL FROM:<>, RCPT, RSET)"),
    ] = ""
    positive_ttl: Annotated[
        float, msgspec.Meta(ge=0, le=2_678_400, description="Seconds that a recipient stays known")
    ] = 21_600.0
    negative_ttl: Annotated[
        float, msgspec.Meta(ge=0, le=2_678_400, description="Seconds that a recipient stays unknown")
    ] = 600.0
    cache: Annotated[int, msgspec.Meta(ge=0, le=10_000_000, description="Answers that are kept")] = 100_000
    deadline: Annotated[
        float, msgspec.Meta(gt=0, le=300, description="Seconds a client waits for an answer; then it hears 451")
    ] = 10.0
    breaker_failures: Annotated[
        int, msgspec.Meta(ge=1, description="Questions in a row without an answer after which a domain is left alone")
    ] = 10
    breaker_pause: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Seconds it is left alone; the answer is 451 meanwhile")
    ] = 30.0


class RecipientsError(ValueError):
    """The file has a line that is no address and no domain."""


class AsksNextHop(Protocol):
    """What can ask the next hop of a recipient (penstock.relay.ahead)."""

    async def ask(self, recipient: Recipient) -> Reply | None:
        """Return None when the recipient is known, what the hop said when not, 4yz when nobody can say."""


def _is_postmaster(path: Path) -> bool:
    return path.local.lower() == "postmaster"


class FileRecipients:
    """A policy: the recipients of a file."""

    def __init__(self, path: FilePath, is_ours: Callable[[str], bool], journal: Journal) -> None:
        """Read the file. Raise OSError or RecipientsError when it is of no use.

        One that is of no use later leaves things as they were, and is journaled.
        """
        self._path = path
        self._is_ours = is_ours
        self._journal = journal
        self._known, self._stamp = _read(path)
        self._look_at = 0.0
        self._is_reading = False

    def on_rcpt(self, _: Transaction, recipient: Recipient) -> Reply | Coroutine[Any, Any, Reply | None] | None:
        """Refuse whoever is not in the file."""
        now = trio.current_time()
        if now >= self._look_at and not self._is_reading:
            self._look_at = now + _LOOK_AGAIN
            return self._look_first(recipient.path)
        return self._judge(recipient.path)

    async def _look_first(self, path: Path) -> Reply | None:
        """Read the file again when it has changed, then judge."""
        self._is_reading = True
        try:
            with trio.CancelScope(shield=True):  # one client's deadline is not the file's
                read = await trio.to_thread.run_sync(_read_if_changed, self._path, self._stamp)
            if read is not None:
                self._known, self._stamp = read
        except (OSError, RecipientsError) as exc:
            self._journal.hook_failed("recipients", "on_rcpt", f"{exc}; what was read before still holds")
        finally:
            self._is_reading = False
        return self._judge(path)

    def _judge(self, path: Path) -> Reply | None:
        if not path.domain or not self._is_ours(path.domain) or _is_postmaster(path):
            return None
        known = self._known
        return None if path.domain in known or f"{path.local.lower()}@{path.domain}" in known else UNKNOWN


_Stamp = tuple[int, int, int]


def _stamp_of(path: FilePath) -> _Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read_if_changed(path: FilePath, stamp: _Stamp) -> tuple[frozenset[str], _Stamp] | None:
    return None if _stamp_of(path) == stamp else _read(path)


def _read(path: FilePath) -> tuple[frozenset[str], _Stamp]:
    """Return the names in a file, domains without their @, and what it looked like. Raise OSError, RecipientsError."""
    stamp = _stamp_of(path)
    if stamp[1] > _MOST_OCTETS:
        raise RecipientsError(f"{path}: it has more than {_MOST_OCTETS >> 20} MB")
    names: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = line.partition("#")[0].strip().lower()
                if not text:
                    continue
                name = text.removeprefix("@")
                local, at, domain = name.rpartition("@")
                if not domain or (at and not local) or any(c.isspace() for c in domain):
                    raise RecipientsError(f"{path}:{number}: a line is an address, @domain or domain, not {text!r}")
                names.add(name)
    except UnicodeDecodeError as exc:
        raise RecipientsError(f"{path}: a file of recipients is UTF-8 text") from exc
    return frozenset(names), stamp


class _Question:
    """A question that is being asked."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.verdict: Reply | None = CANNOT_SAY


class NextHopRecipients:
    """A policy: the recipients that the next hop knows."""

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
        self._answers: dict[str, tuple[float, Reply | None]] = {}
        """Address -> until when it holds, and the verdict; the oldest first."""
        self._asking: dict[str, _Question] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        """Domain -> questions in a row without an answer, and until when it is left alone; as many as answers."""

    def on_rcpt(self, _: Transaction, recipient: Recipient) -> Reply | Coroutine[Any, Any, Reply | None] | None:
        """Refuse whom the hop does not know."""
        path = recipient.path
        if not path.domain or not self._is_ours(path.domain) or _is_postmaster(path):
            return None
        key = f"{path.local}@{path.domain}"
        kept = self._answers.get(key)
        now = self._clock()
        if kept is not None and now < kept[0]:
            return kept[1]
        if key not in self._asking and now < self._failures.get(path.domain, (0, 0.0))[1]:
            return CANNOT_SAY.because(f"questions about {path.domain} go unanswered")
        return self._find_out(key, recipient)

    async def _find_out(self, key: str, recipient: Recipient) -> Reply | None:
        """Ask, or wait for the answer to somebody else's question."""
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
        said: Reply | None = CANNOT_SAY
        try:
            with trio.move_on_after(self._settings.deadline):
                said = await self._hops.ask(recipient)
                cause = "" if said is None else said.cause or said.text
        except Exception as exc:  # noqa: BLE001 - the DNS, a route: whatever it is, nobody can say
            cause = f"{type(exc).__name__}: {exc}"
        if said is None:
            self._keep(key, recipient.path.domain, self._settings.positive_ttl, None)
            return None
        if said.is_permanent:
            verdict = UNKNOWN.because(cause)
            self._keep(key, recipient.path.domain, self._settings.negative_ttl, verdict)
            return verdict
        if said.code == 452:  # the mailbox is full: the hop has answered, and may answer otherwise next time
            return said
        self._note_failure(recipient.path.domain)
        return CANNOT_SAY.because(cause)

    def _keep(self, key: str, domain: str, seconds: float, verdict: Reply | None) -> None:
        """Keep an answer; the oldest goes where there are too many."""
        self._failures.pop(domain, None)
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
