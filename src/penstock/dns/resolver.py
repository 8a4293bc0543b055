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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import trio
from trio.lowlevel import wait_readable

from penstock.dns import _codec as codec
from penstock.dns.server import NoResponseError, Server
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
_ANSWERS: Final = (codec.NOERROR, codec.NXDOMAIN)
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
    """Validated by DNSSEC, according to a server whose AD bit is trusted, when it was received."""
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


Begun = tuple[Server, codec.UdpQuery]
"""A server that was sent a question, and what waits for its response."""


class _Waiting:
    """Tasks that wait for the answer to a question which another task has asked: few do."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.done = trio.Event()


class Batch:
    """Questions of one task that were sent together."""

    __slots__ = ("_begun", "_deadline", "_keys", "_resolver")

    def __init__(
        self, resolver: Resolver, keys: list[tuple[str, Kind]], begun: list[Begun | None], deadline: float
    ) -> None:
        """`begun` has the question of each key that waits for its response."""
        self._resolver = resolver
        self._deadline = deadline
        self._keys = keys
        self._begun = begun

    async def answers(self, *, are_due: bool = False) -> list[Answer]:
        """Return the answers, in the order of the questions.

        `are_due`: the task has waited for something else meanwhile, so that they are looked for before they are waited
        for.
        """
        resolver, found = self._resolver, []
        begun_all, end = self._begun, resolver.end
        try:
            for at, key in enumerate(self._keys):
                begun = begun_all[at]
                if begun is None:
                    left = self._deadline - trio.current_time()
                    found.append(await resolver.query(*key, left, most=MAX_QUESTIONS_OF_CHECKS))
                    continue
                answer = resolver.answer_of(key, begun) if are_due else None
                if answer is None:
                    answer = await resolver.resolve(key, self._deadline, begun)
                    are_due = True
                begun_all[at] = None
                end(key, answer)
                found.append(answer)
        except BaseException:
            self.abandon()
            raise
        return found

    def abandon(self) -> None:
        """Forget the questions that were not answered; nothing after `answers`."""
        for at, begun in enumerate(self._begun):
            if begun is not None:
                self._begun[at] = None
                begun[1].abandon()
                self._resolver.end(self._keys[at], None)


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
        self._probe_interval = probe_interval
        limits = self._settings
        self._cache: codec.Cache[Answer] = codec.Cache(
            Answer,
            clock,
            most=limits.cache_entries,
            least=limits.ttl_least,
            longest=limits.ttl_most,
            negative=limits.ttl_negative,
            stale=limits.stale,
        )
        self._pending: dict[tuple[str, Kind], _Waiting | None] = {}
        """The questions under way."""
        self._nursery: trio.Nursery | None = None
        self._has_begun = trio.Event()
        """Questions are under way; the sweeper waits for it."""
        self._statistics = ResolverStatistics()

    @property
    def statistics(self) -> ResolverStatistics:
        """What was done so far."""
        self._statistics.hits = self._cache.hits
        return self._statistics

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
        return self._cache.get(name, kind)

    async def query(self, name: str, kind: Kind, seconds: float = math.inf, *, most: int = _MAX_QUESTIONS) -> Answer:
        """Return the answer to a question, after at most `lifetime` or `seconds`. A cached one is no checkpoint.

        While `most` questions are under way, it fails at once.

        Tasks that want the same answer share one question, and the time of the task that has asked first. What is not a
        name of the DNS is "missing". Raise RuntimeError when the resolver does not run.
        """
        key = self._cache.key(name, kind)
        answer = self._cache.find(key)
        while answer is None and key in self._pending:
            waiting = self._pending[key]
            if waiting is None:
                waiting = self._pending[key] = _Waiting()
            await waiting.done.wait()
            answer = waiting.answer or self._cache.find(key)  # just asked for, however short its life is
        if answer is not None:
            return answer
        if len(self._pending) >= most:
            self._statistics.failures += 1
            return Answer("failed", name=key[0], cause="too many DNS questions at once")
        if self._nursery is None:
            raise RuntimeError("the resolver is not running")
        now, left = trio.current_time(), min(self._settings.lifetime, seconds)
        self._pending[key] = None
        try:
            begun = self._begin_first(key, self._first_server(), now + self._patience(left)) if left > 0 else None
            answer = await self.resolve(key, now + left, begun)
        finally:
            self.end(key, answer)
        return answer

    async def query_all(self, questions: Sequence[tuple[str, Kind]], seconds: float = math.inf) -> list[Answer]:
        """Return the answers to several questions of a check, asked at once by one task. As `query` otherwise."""
        return await self.begin_all(questions, seconds).answers()

    def begin_all(self, questions: Sequence[tuple[str, Kind]], seconds: float = math.inf) -> Batch:
        """Send several questions without waiting; `answers` of the result must follow soon, or `abandon`.

        Raise RuntimeError when the resolver does not run.
        """
        if self._nursery is None:
            raise RuntimeError("the resolver is not running")
        now, left = trio.current_time(), min(self._settings.lifetime, seconds)
        keys = [self._cache.key(*each) for each in questions]
        begun: list[Begun | None] = []
        server, until = self._first_server() if left > 0 else None, now + self._patience(left)
        pending, find = self._pending, self._cache.find
        for key in keys:
            sent: Begun | None = None
            if key not in pending and len(pending) < MAX_QUESTIONS_OF_CHECKS and find(key) is None:
                sent = self._begin_first(key, server, until)
                if sent is not None:  # otherwise `query` finds out what is wrong
                    pending[key] = None
            begun.append(sent)
        return Batch(self, keys, begun, now + left)

    def end(self, key: tuple[str, Kind], answer: Answer | None) -> None:
        """Forget a question, and wake those who wait for its answer."""
        waiting = self._pending.pop(key)
        if waiting is not None:
            waiting.answer = answer
            waiting.done.set()

    async def resolve(self, key: tuple[str, Kind], deadline: float, begun: Begun | None) -> Answer:
        """Ask, and cache the answer. `begun` is the question to the first server, if it could be sent."""
        if begun is None:
            return await self._resolve_further(key, deadline, None)
        server, used = begun
        try:
            if not used.is_due:
                await wait_readable(used.fd)
                answer = self.answer_of(key, begun)
                if answer is not None:
                    return answer
        except trio.ClosedResourceError:
            pass  # it has expired, as `finish` finds
        except BaseException:
            used.abandon()
            raise
        self._statistics.questions += 1
        try:
            response = await server.finish(used, key[0], KINDS[key[1]])
        except NoResponseError as exc:
            return await self._resolve_further(key, deadline, _Tried(server, str(exc)))
        if response[0] not in _ANSWERS or not response[3]:
            tried = _Tried(server, _describe(server, response), is_useless=True)
            return await self._resolve_further(key, deadline, tried)
        answer = self._cache.keep_response(key, response, server.trust_ad, math.inf)
        if answer is not None:
            return answer
        return await self._resolve_further(key, deadline, None, (response, server.trust_ad))

    def answer_of(self, key: tuple[str, Kind], begun: Begun) -> Answer | None:
        """Return the answer to a question if the first server has sent one; None where `resolve` has more to do."""
        server, used = begun
        answer = used.answer(self._cache, key, server.trust_ad)
        if answer is not None:
            self._statistics.questions += 1
            server.succeeded()
        return answer

    async def _resolve_further(
        self,
        key: tuple[str, Kind],
        deadline: float,
        tried: _Tried | None,
        first: tuple[codec.Decoded, bool] | None = None,
    ) -> Answer:
        """Ask other servers, the same one again, or for the aliases that the server did not follow for us.

        `first` is the response to begin with.
        """
        name, kind = asked, _ = key
        longest, authentic = math.inf, True
        for _ in range(codec.MAX_ALIASES):
            try:
                response, trust_ad = first or await self._ask(asked, kind, deadline, tried)
            except NoResponseError as exc:
                return self._failed(key, str(exc))
            except ValueError:
                return Answer("missing", name=name)
            authentic = authentic and trust_ad and response[2]  # a forged alias leads anywhere
            first = tried = None
            found = response[4]
            if response[5] or response[0] == codec.NXDOMAIN or found == asked or response[6] is not None:
                # To the cache, it is a response about the name that was asked for.
                response = (*response[:2], authentic, *response[3:])
                if found == asked and not response[5] and response[6] is None:
                    response = (*response[:6], 0)
                answer = self._cache.keep_response(key, response, authentic, longest)
                assert answer is not None
                return answer
            asked, longest = found, _FOLLOWED_TTL
        return self._failed(key, f"the aliases of {name} do not come to an end")

    def _failed(self, key: tuple[str, Kind], cause: str) -> Answer:
        """Return the last answer as a stale one, or a failure."""
        self._statistics.failures += 1
        answer = self._cache.stale_answer(key, _STALE_TTL)
        if answer is not None:
            self._statistics.stale += 1
            return answer
        answer = Answer("failed", name=key[0], cause=cause)
        self._cache.keep(key, answer, _FAILURE_TTL, 0)
        return answer

    # ---- the servers

    def _first_server(self) -> Server | None:
        """Return the server that is asked first; None while all breakers are open."""
        for server in self._servers or self._open_servers():
            if not server.is_open:
                return server
        return None

    def _begin_first(self, key: tuple[str, Kind], server: Server | None, until: float) -> Begun | None:
        """Send a question to the first server. None if that is not possible; `_ask` finds out why."""
        if server is not None:
            try:
                return server, server.begin(key[0], KINDS[key[1]], until)
            except (OSError, ValueError):
                pass
        return None

    async def _ask(
        self, name: str, kind: Kind, deadline: float, tried: _Tried | None = None
    ) -> tuple[codec.Decoded, bool]:
        """Return the first usable response, and whether its AD bit is trusted. Raise NoResponseError, ValueError.

        `tried` has been asked already.
        """
        cause = "no DNS server answers"
        useless: list[Server] = []
        servers = self._rounds()
        if tried is not None:
            self._start_probe(tried.server)
            cause = tried.cause
            servers = [each for each in servers if not (tried.is_useless and each is tried.server)]
            if not tried.is_useless and servers and servers[0] is tried.server:
                del servers[0]
        patience = self._patience(deadline - trio.current_time())
        for server in servers:
            now = trio.current_time()
            if now >= deadline:
                break
            if server.is_open or server in useless:
                continue
            self._statistics.questions += 1
            try:
                used = server.begin_or_fail(name, KINDS[kind], min(now + patience, deadline))
                response = await server.finish(used, name, KINDS[kind])
            except NoResponseError as exc:
                cause = str(exc)
                self._start_probe(server)
                continue
            if response[0] in _ANSWERS and response[3]:
                return response, server.trust_ad
            useless.append(server)  # only silence is worth a second question
            cause = _describe(server, response)
        raise NoResponseError(cause)

    def _start_probe(self, server: Server) -> None:
        """Probe a server whose breaker has opened."""
        if server.needs_probe and self._nursery is not None:
            server.needs_probe = False
            self._nursery.start_soon(server.probe, self._probe_interval, self._settings.timeout)

    def _patience(self, left: float) -> float:
        """Return how long to wait for one answer: less where time is short, to ask again for a lost one."""
        timeout = self._settings.timeout
        if left >= timeout * _ROUNDS:
            return timeout
        return min(timeout, max(_LEAST_PATIENCE, left / _ROUNDS), left)

    def _begin(self) -> None:
        self._has_begun.set()

    def _open_servers(self) -> list[Server]:
        """Find the servers, when the first question is asked."""
        found = self._addresses or system_servers()
        trust_ad = self._settings.trust_ad
        self._servers = [Server(host, port, trust_ad=trust_ad, began=self._begin) for host, port in found]
        return self._servers

    def _rounds(self) -> list[Server]:
        """Return the servers to ask, in order, again and again; those whose breaker is open are left out."""
        return [server for server in self._servers or self._open_servers() if not server.is_open] * _ROUNDS


class _Tried(NamedTuple):
    """A server that was asked, and that has not answered the question."""

    server: Server
    cause: str
    is_useless: bool = False
    """It has answered, and is not to be asked again."""


def _describe(server: Server, response: codec.Decoded) -> str:
    """Return why a response of a server is of no use."""
    rcode, _, _, is_recursive = response[:4]
    names = {codec.FORMERR: "FORMERR", codec.SERVFAIL: "SERVFAIL", codec.NOTIMP: "NOTIMP", codec.REFUSED: "REFUSED"}
    what = names.get(rcode, f"RCODE {rcode}") if is_recursive else "a referral instead of an answer"
    return f"{server.text}: {what}"
