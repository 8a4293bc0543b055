"""MTA-STS: a domain publishes, over HTTPS, its MX hosts and that they have valid certificates (RFC 8461).

A TXT record says that there is a policy, and changes when it does. The policy is fetched once and kept in a file for as
long as it says (`max_age`): an attacker who removes the record, or blocks the HTTPS server, cannot remove it.

Rules
-----
1. A policy that is in force is used, whatever the DNS or the HTTPS server says or does not say (RFC 8461 5.1). It is
   fetched again in the background (`run`); mail that has begun this waits two seconds for the result, other mail does
   not wait.
2. Without one, mail waits for the first fetch, which takes no more than `deadline` seconds, and goes out as if there
   was no policy if it fails. A failed fetch is not repeated for five minutes.
3. One fetch at a time for a domain, and a bounded number in all. Further domains without a policy wait for their turn;
   if too many do already, their mail is deferred: what waits here keeps the scheduler from looking up other routes.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec
import trio

from penstock.addresses import domain_of
from penstock.dns import ResolveError, Resolver
from penstock.files import remove_leftovers, write_atomically
from penstock.journal import Journal
from penstock.relay.https import FetchError

Fetch = Callable[[str], Awaitable[bytes]]
"""Fetches the policy text of a domain. Raises FetchError."""
MAX_POLICY: Final = 65_536
"""Octets of a policy (RFC 8461 3.2 suggests this limit)."""
_MAX_MX: Final = 256
_MAX_AGE: Final = 31_557_600
"""Seconds; RFC 8461 3.2 allows no more."""
_REFRESH: Final = 86_400.0
"""Seconds after which a policy in use is fetched again although its id is the same, so that it never expires."""
_PAUSE: Final = 300.0
"""Seconds without another fetch after one has failed (RFC 8461 3.3)."""
_MAX_FETCHES: Final = 20
"""First fetches at a time, and as many in the background."""
_MAX_WAITING: Final = 20
"""Domains that wait for their turn; with `_MAX_FETCHES`, fewer than the routes that are looked up at a time."""
_PATIENCE: Final = 2.0
"""Seconds that mail waits for another version of a policy in force."""
_MAX_KNOWN: Final = 4000
"""Domains in memory; the largest policies take some 20 KB each."""
_MAX_FILES: Final = 100_000
_RECORD: Final = re.compile(rb"v=STSv1[ \t]*;[ \t]*id=([A-Za-z0-9]{1,32})[ \t]*(?:;.*)?", re.DOTALL)
_FIELD: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,31})[ \t]*:(.*)")


class StsPolicy(msgspec.Struct, frozen=True):
    """The policy of a domain."""

    domain: str
    id: str
    """That of the TXT record when it was fetched."""
    mode: Literal["enforce", "testing", "none"]
    mx: tuple[str, ...]
    """Names of MX hosts; "*.example.org" matches one more label."""
    max_age: int
    fetched_at: float
    """Unix time."""

    def allows(self, host: str) -> bool:
        """Return whether an MX host is one of the policy (RFC 8461 4.1)."""
        _, _, above = host.partition(".")
        return host in self.mx or (bool(above) and f"*.{above}" in self.mx)

    def is_live(self, now: float) -> bool:
        """Return whether it has not expired."""
        return now < self.fetched_at + self.max_age

    def lines(self) -> list[str]:
        """Return it in the form of a policy, for reports."""
        head = ["version: STSv1", f"mode: {self.mode}"]
        return [*head, *(f"mx: {each}" for each in self.mx), f"max_age: {self.max_age}"]


def record_id(records: Iterable[bytes]) -> str | None:
    """Return the id of the TXT records at _mta-sts.DOMAIN; None unless exactly one is of MTA-STS (RFC 8461 3.1)."""
    found = [each for each in records if re.match(rb"v=STSv1[ \t]*;", each)]
    match = _RECORD.fullmatch(found[0]) if len(found) == 1 else None
    return None if match is None else match[1].decode()


def parse_policy(domain: str, ident: str, text: bytes, now: float) -> StsPolicy:
    """Read a policy (RFC 8461 3.2). Raise ValueError."""
    fields: dict[str, str] = {}
    mx: list[str] = []
    for line in text.decode("utf-8").splitlines():
        if not line.strip():
            continue
        match = _FIELD.fullmatch(line)
        if match is None:
            raise ValueError(f"not a field: {line[:80]!r}")
        value = match[2].strip(" \t")  # an expression would take time in proportion to the square of the blanks
        if match[1] == "mx":
            mx.append(_pattern(value))
        else:
            fields.setdefault(match[1], value)  # the first of several is used
    mode, age = fields.get("mode"), fields.get("max_age", "")
    if fields.get("version") != "STSv1":
        raise ValueError("version: expected STSv1")
    if mode not in ("enforce", "testing", "none"):
        raise ValueError(f"mode: expected enforce, testing or none, not {str(mode)[:40]!r}")
    if not re.fullmatch(r"[0-9]{1,10}", age):
        raise ValueError(f"max_age: expected seconds, not {age[:40]!r}")
    if len(mx) > _MAX_MX or (mode != "none" and not mx):
        raise ValueError(f"mx: expected 1 to {_MAX_MX} hosts, not {len(mx)}")
    return StsPolicy(domain, ident, mode, tuple(mx), min(int(age), _MAX_AGE), now)  # type: ignore[arg-type]


def _pattern(text: str) -> str:
    """Return a host name, or "*." and a domain, in the form of the DNS. Raise ValueError."""
    below = "*." if text.startswith("*.") else ""
    name = domain_of(text[len(below) :].rstrip("."), utf8=True)
    if name is None or name.startswith("["):
        raise ValueError(f"mx: {text[:80]!r} is not a host name")
    return below + name


class _Known:
    """What is known of a domain."""

    __slots__ = ("failed_at", "failed_id", "policy")

    def __init__(self, policy: StsPolicy | None) -> None:
        self.policy = policy
        self.failed_at = 0.0
        self.failed_id = ""


class StsPolicies:
    """The policies of all domains, for one trio loop."""

    def __init__(
        self,
        resolver: Resolver,
        fetch: Fetch,
        folder: Path,
        journal: Journal,
        *,
        clock: Callable[[], float] = time.time,
        on_failure: Callable[[str, str, str], None] | None = None,
    ) -> None:
        """`folder` keeps the policies; it is made when needed. `clock` returns the Unix time.

        `on_failure` gets a domain, the result type of a TLS report and the cause when a policy cannot be had.
        """
        self._resolver = resolver
        self._fetch = fetch
        self._folder = folder
        self._journal = journal
        self._clock = clock
        self._on_failure = on_failure
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._busy: dict[str, trio.Event] = {}
        self._fetching = trio.CapacityLimiter(_MAX_FETCHES)
        """First fetches."""
        self._renewing: dict[str, trio.Event] = {}
        """Domains whose policy is fetched in the background."""
        self._nursery: trio.Nursery | None = None
        self._files: int | None = None
        """Files in the folder; None before the first look."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew policies in the background until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def find(self, domain: str) -> StsPolicy | None:
        """Return the policy in force for a domain, also one with the mode "none"; None without one.

        Raise ResolveError, a temporary one, if it has to be fetched and too many domains wait for that already.
        """
        while (busy := self._busy.get(domain)) is not None:
            await busy.wait()
        self._busy[domain] = done = trio.Event()
        try:
            return await self._find(domain)
        finally:
            del self._busy[domain]
            done.set()

    async def _find(self, domain: str) -> StsPolicy | None:
        known = await self._recall(domain)
        answer = await self._resolver.query(f"_mta-sts.{domain}", "TXT")
        now = self._clock()
        policy = known.policy if known.policy is not None and known.policy.is_live(now) else None
        ident = record_id(answer.records)
        if ident is None:
            return policy  # rule 1
        if policy is not None and policy.id == ident:
            age = now - policy.fetched_at  # negative if the clock was set back: it is fetched again
            if 0 <= age < min(_REFRESH, policy.max_age / 2):
                return policy
        if known.failed_id == ident and 0 <= now - known.failed_at < _PAUSE:
            return policy
        if policy is None:
            if self._fetching.statistics().tasks_waiting >= _MAX_WAITING:
                raise ResolveError("4.4.3", "too many MTA-STS policies are being fetched", is_permanent=False)
            async with self._fetching:
                return await self._renew(known, domain, ident)
        await self._begin_renewal(known, domain, ident)
        assert known.policy is not None
        return known.policy

    async def _begin_renewal(self, known: _Known, domain: str, ident: str) -> None:
        """Fetch a policy in the background, and wait for it for a moment; neither if that is going on already."""
        if self._nursery is None or domain in self._renewing or len(self._renewing) >= _MAX_FETCHES:
            return
        self._renewing[domain] = done = trio.Event()
        self._nursery.start_soon(self._renew_in_background, known, domain, ident, done)
        with trio.move_on_after(_PATIENCE):
            await done.wait()

    async def _renew_in_background(self, known: _Known, domain: str, ident: str, done: trio.Event) -> None:
        try:
            await self._renew(known, domain, ident)
        except Exception as exc:  # noqa: BLE001 - the policy in force stays, and no other domain is concerned
            known.failed_at, known.failed_id = self._clock(), ident
            self._journal.error(0, "mta-sts", exc)
        finally:
            del self._renewing[domain]
            done.set()

    async def _renew(self, known: _Known, domain: str, ident: str) -> StsPolicy | None:
        """Fetch a policy and keep it. Return None if that fails."""
        try:
            text = await self._fetch(domain)
            policy = parse_policy(domain, ident, text, self._clock())
        except (FetchError, ValueError) as exc:
            known.failed_at, known.failed_id = self._clock(), ident
            kind = "sts-policy-invalid" if isinstance(exc, ValueError) else "sts-policy-fetch-error"
            if isinstance(exc, FetchError) and exc.is_certificate:
                kind = "sts-webpki-invalid"
            self._journal.sts_failed(domain, str(exc))
            if self._on_failure is not None:
                self._on_failure(domain, kind, str(exc))
            return None
        known.policy = policy
        try:
            await trio.to_thread.run_sync(self._write, policy)
        except OSError as exc:  # it is still in memory
            self._journal.error(0, "mta-sts", exc)
        return policy

    # ---- the files

    async def _recall(self, domain: str) -> _Known:
        """Return what is known of a domain, from its file if it is not in memory."""
        known = self._known.get(domain)
        if known is None:
            known = self._known[domain] = _Known(await trio.to_thread.run_sync(self._read, domain))
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(domain)
        return known

    def _path(self, domain: str) -> Path:
        return self._folder / f"{hashlib.sha256(domain.encode()).hexdigest()[:40]}.json"

    def _read(self, domain: str) -> StsPolicy | None:
        try:
            policy = msgspec.json.decode(self._path(domain).read_bytes(), type=StsPolicy)
        except (OSError, msgspec.MsgspecError, RecursionError):  # the policy of a damaged file is fetched again
            return None
        return policy if policy.domain == domain else None

    def _write(self, policy: StsPolicy) -> None:
        """Write a file. Raise OSError. Beyond a bound, those that are no longer in force make room."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        path = self._path(policy.domain)
        if self._files is None or self._files >= _MAX_FILES:
            self._files = self._tidy()
        if not path.exists():
            if self._files >= _MAX_FILES:
                raise OSError(f"{self._folder} has {_MAX_FILES} policies already")
            self._files += 1
        write_atomically(path, msgspec.json.encode(policy))

    def _tidy(self) -> int:
        """Remove expired policies; return the number of remaining files."""
        left, now = 0, self._clock()
        remove_leftovers(self._folder)
        for path in self._folder.glob("*.json"):
            with suppress(OSError, msgspec.MsgspecError, RecursionError):
                if msgspec.json.decode(path.read_bytes(), type=StsPolicy).is_live(now):
                    left += 1
                    continue
            with suppress(OSError):
                path.unlink()
        return left
