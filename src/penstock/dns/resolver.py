"""The stub resolver: questions to recursive servers, and a cache.

Rules
-----
1. Only an answer can say that something does not exist. A server that fails, refuses or keeps silent says nothing:
   the answer is then FAILED, a temporary state, and never an exception.
2. Answers are cached as long as their TTL says, within bounds: a TTL of 0 is not a question for each message, and one
   of a year is asked again. Absences are cached by their SOA (RFC 2308), failures for a second (RFC 9520 3.2).
3. Each question is asked once at a time; those who want the same answer wait for the same question.
4. While no server answers, an expired answer serves for a while (RFC 8767), and is asked again every 30 seconds.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import trio

from penstock.dns import _codec as codec
from penstock.dns.server import NoResponseError, Question, Response, Server
from penstock.dns.settings import ResolverSettings, parse_server, system_servers

Kind = Literal["A", "AAAA", "CNAME", "MX", "NS", "PTR", "TLSA", "TXT"]
KINDS: Final[dict[Kind, int]] = {
    "A": 1, "NS": 2, "CNAME": 5, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28, "TLSA": 52,
}  # fmt: skip
Status = Literal["found", "empty", "missing", "failed"]
_MAX_QUESTIONS: Final = 1024
"""Questions under way; more are answered FAILED at once."""
MAX_QUESTIONS_OF_CHECKS: Final = _MAX_QUESTIONS * 3 // 4
"""Questions under way at which those that clients cause are answered FAILED: the rest is for the relay."""
_ROUNDS: Final = 3
"""How often each server is asked the same."""
_LEAST_PATIENCE: Final = 1.0
"""Seconds to wait for one answer at least, if `timeout` is not shorter."""
_SWEEP: Final = 0.05
"""Seconds between two looks at the queries under way: they may wait so much longer."""
_FAILURE_TTL: Final = 1.0
_STALE_TTL: Final = 30.0
_FOLLOWED_TTL: Final = 300.0
"""Seconds an answer is kept at most whose aliases the server did not follow for us."""


class Answer(NamedTuple):
    """The answer to a question: a value, also when the DNS does not work."""

    status: Status
    """"found"; "empty": the name exists, without such records; "missing": no such name; "failed": not known now."""
    records: tuple[Any, ...] = ()
    """A and AAAA: 4 and 16 octets. TXT: joined octets. PTR, NS, CNAME: names. MX: (preference, name); "" is the root.
    TLSA: (usage, selector, matching type, data). Names are in lower case, without the final dot."""
    name: str = ""
    """The name the records belong to: that asked for, or that at the end of its aliases."""
    authentic: bool = False
    """Validated by DNSSEC, said by a server whose AD bit is trusted."""
    is_stale: bool = False
    """Expired, and used because no server answers."""
    cause: str = ""
    """Why it failed."""

    @property
    def is_failure(self) -> bool:
        """Nothing is known, for the time being."""
        return self.status == "failed"


@dataclass(slots=True)
class ResolverStatistics:
    """What a resolver has done."""

    questions: int = 0
    """Questions asked of servers."""
    hits: int = 0
    """Answers from the cache."""
    stale: int = 0
    failures: int = 0
    """Questions that no server answered."""


class _Entry:
    """A cached answer."""

    __slots__ = ("answer", "expires", "stale_until")

    def __init__(self, answer: Answer, expires: float, stale_until: float) -> None:
        self.answer = answer
        self.expires = expires
        self.stale_until = stale_until


class _Pending:
    """A question under way."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.done: trio.Event | None = None
        """Made by the first task that waits for the answer of another: few do."""


class Resolver:
    """Asks recursive servers, for one trio loop. `run` must be running."""

    def __init__(
        self,
        settings: ResolverSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        probe_interval: float = 5.0,
    ) -> None:
        """`probe_interval` is the time in seconds between two probes of a server that has stopped answering.

        Raise ValueError for a server that cannot be parsed. resolv.conf is read when the first question is asked.
        """
        self._settings = settings or ResolverSettings()
        self._addresses = [parse_server(server) for server in self._settings.servers]
        self._servers: list[Server] = []
        self._clock = clock
        self._probe_interval = probe_interval
        self._cache: OrderedDict[tuple[str, Kind], _Entry] = OrderedDict()
        self._pending: dict[tuple[str, Kind], _Pending] = {}
        self._nursery: trio.Nursery | None = None
        self._has_begun = trio.Event()
        """Questions are under way; the sweeper waits for it."""
        self.statistics = ResolverStatistics()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read responses until cancelled; then questions under way fail."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await self._sweep()
            finally:
                self._nursery = None
                for server in self._servers:
                    server.close()

    async def _sweep(self) -> None:
        """End the queries whose time is over, while there are any; they have no timers of their own (server.py)."""
        interval = min(_SWEEP, self._settings.timeout / 10)
        while True:
            await self._has_begun.wait()
            while any(server.is_waiting for server in self._servers):
                await trio.sleep(interval)
                now = trio.current_time()
                for server in self._servers:
                    server.expire(now)
            self._has_begun = trio.Event()

    def cached(self, name: str, kind: Kind) -> Answer | None:
        """Return an answer that is known without asking."""
        return self._cached((name.lower().rstrip("."), kind))

    async def query(self, name: str, kind: Kind, seconds: float = math.inf, *, most: int = _MAX_QUESTIONS) -> Answer:
        """Return the answer to a question, after at most `lifetime` or `seconds`. A cached one is no checkpoint.

        While `most` questions are under way, it fails at once.

        Tasks that want the same answer share one question, and the time of the task that has asked first. What is not a
        name of the DNS is "missing". Raise RuntimeError when the resolver does not run.
        """
        key = (name.lower().rstrip("."), kind)
        while True:
            answer = self._cached(key)
            if answer is not None:
                return answer
            pending = self._pending.get(key)
            if pending is None:
                break
            if pending.done is None:
                pending.done = trio.Event()
            await pending.done.wait()
            if pending.answer is not None:
                return pending.answer  # just asked for, however short its life is
        if len(self._pending) >= most:
            self.statistics.failures += 1
            return Answer("failed", name=key[0], cause="too many DNS questions at once")
        pending = self._pending[key] = _Pending()
        try:
            pending.answer = await self._resolve(key, trio.current_time() + min(self._settings.lifetime, seconds))
        finally:
            self._end(key, pending)
        return pending.answer

    async def query_all(self, questions: Sequence[tuple[str, Kind]], seconds: float = math.inf) -> list[Answer]:
        """Return the answers to several questions of a check, asked at once by one task. As `query` otherwise."""
        deadline = trio.current_time() + min(self._settings.lifetime, seconds)
        server = next(self._rounds(), None)
        begun: dict[tuple[str, Kind], tuple[_Pending, Question]] = {}
        keys: list[tuple[str, Kind]] = [(name.lower().rstrip("."), kind) for name, kind in questions]
        answers: list[Answer] = []
        try:
            for key in keys:
                is_known = self._cached(key) is not None or key in self._pending
                if is_known or server is None or len(self._pending) >= MAX_QUESTIONS_OF_CHECKS:
                    continue
                with suppress(ValueError):
                    until = min(trio.current_time() + self._patience(deadline), deadline)
                    question = server.begin(key[0], KINDS[key[1]], until)
                    pending = self._pending[key] = _Pending()
                    begun[key] = pending, question
            for key in keys:
                if key not in begun:
                    seconds = deadline - trio.current_time()
                    answers.append(await self.query(*key, seconds, most=MAX_QUESTIONS_OF_CHECKS))
                    continue
                pending, question = begun[key]
                pending.answer = await self._resolve(key, deadline, question)
                self._end(key, begun.pop(key)[0])
                answers.append(pending.answer)
        finally:
            for key, (pending, question) in begun.items():
                question.server.abandon(question)
                self._end(key, pending)
        return answers

    def _end(self, key: tuple[str, Kind], pending: _Pending) -> None:
        """Forget a question, and wake those who wait for its answer."""
        del self._pending[key]
        if pending.done is not None:
            pending.done.set()

    # ---- the cache

    def _cached(self, key: tuple[str, Kind]) -> Answer | None:
        entry = self._cache.get(key)
        if entry is None or entry.expires <= self._clock():
            return None
        self._cache.move_to_end(key)
        self.statistics.hits += 1
        return entry.answer

    def _keep(self, key: tuple[str, Kind], answer: Answer, seconds: float, stale: float) -> None:
        now = self._clock()
        self._cache[key] = _Entry(answer, now + seconds, now + seconds + stale)
        self._cache.move_to_end(key)
        while len(self._cache) > self._settings.cache_entries:
            self._cache.popitem(last=False)

    async def _resolve(self, key: tuple[str, Kind], deadline: float, begun: Question | None = None) -> Answer:
        """Ask, and cache the answer. `begun` is the question to the first server, if it was sent already."""
        name, kind = asked, _ = key
        longest = self._settings.ttl_most
        for _ in range(codec.MAX_ALIASES):
            try:
                response, authentic = await self._ask(asked, kind, deadline, begun)
                begun = None
            except NoResponseError as exc:
                return self._failed(key, str(exc))
            except ValueError:
                return Answer("missing", name=name)
            if response.records or response.rcode == codec.NXDOMAIN or response.name == asked:
                break
            if response.ttl is not None:
                break  # an SOA: the name at the end of the aliases has no such records
            asked, longest = response.name, min(longest, _FOLLOWED_TTL)
        else:
            return self._failed(key, f"the aliases of {name} do not come to an end")
        if response.records:
            answer = Answer("found", response.records, response.name, authentic)
        else:
            answer = Answer("missing" if response.rcode == codec.NXDOMAIN else "empty", (), response.name, authentic)
            longest = min(longest, self._settings.ttl_negative)
        seconds = min(max(response.ttl or 0, self._settings.ttl_least), longest)
        self._keep(key, answer, seconds, self._settings.stale)
        return answer

    def _failed(self, key: tuple[str, Kind], cause: str) -> Answer:
        """Return the last answer as a stale one, or a failure."""
        self.statistics.failures += 1
        now = self._clock()
        entry = self._cache.get(key)
        if entry is not None and now < entry.stale_until:
            self.statistics.stale += 1
            entry.answer = entry.answer._replace(is_stale=True, authentic=False)
            entry.expires = min(now + _STALE_TTL, entry.stale_until)
            return entry.answer
        answer = Answer("failed", name=key[0], cause=cause)
        self._keep(key, answer, _FAILURE_TTL, 0)
        return answer

    # ---- the servers

    async def _ask(
        self, name: str, kind: Kind, deadline: float, begun: Question | None = None
    ) -> tuple[Response, bool]:
        """Return the first usable response, and whether it is authentic. Raise NoResponseError, ValueError."""
        nursery = self._nursery
        if nursery is None:
            raise RuntimeError("the resolver is not running")
        cause = "no DNS server answers"
        useless: list[Server] = []
        patience = self._patience(deadline)
        for server in self._rounds():
            now = trio.current_time()
            if now >= deadline:
                break
            if server in useless:
                continue
            self.statistics.questions += 1
            try:
                if begun is not None and begun.server is not server:  # its breaker has opened meanwhile
                    begun.server.abandon(begun)
                    begun = None
                if begun is None:
                    begun = server.begin(name, KINDS[kind], min(now + patience, deadline))
                question, begun = begun, None
                response = await server.finish(question)
            except NoResponseError as exc:
                cause = str(exc)
                if server.needs_probe:
                    server.needs_probe = False
                    nursery.start_soon(server.probe, self._probe_interval, self._settings.timeout)
                continue
            if response.rcode in (codec.NOERROR, codec.NXDOMAIN) and response.recursive:
                return response, response.authentic and server.trust_ad
            useless.append(server)  # only silence is worth a second question
            cause = f"{server.text}: {_describe(response)}"
        raise NoResponseError(cause)

    def _patience(self, deadline: float) -> float:
        """Return how long to wait for one answer: less where time is short, to ask again for a lost one."""
        return min(self._settings.timeout, max(_LEAST_PATIENCE, (deadline - trio.current_time()) / _ROUNDS))

    def _begin(self) -> None:
        self._has_begun.set()

    def _rounds(self) -> Iterator[Server]:
        """Yield the servers to ask, in order, again and again; those whose breaker is open are left out."""
        if not self._servers:
            found = self._addresses or system_servers()
            trust_ad = self._settings.trust_ad
            self._servers = [Server(host, port, trust_ad=trust_ad, began=self._begin) for host, port in found]
        for _ in range(_ROUNDS):
            yield from (server for server in self._servers if not server.is_open)


def _describe(response: Response) -> str:
    """Return why a response is of no use."""
    if not response.recursive:
        return "a referral instead of an answer"
    names = {codec.FORMERR: "FORMERR", codec.SERVFAIL: "SERVFAIL", codec.NOTIMP: "NOTIMP", codec.REFUSED: "REFUSED"}
    return names.get(response.rcode, f"RCODE {response.rcode}")
