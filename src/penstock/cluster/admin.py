"""`penstock spool --cluster`: operators ask every node about the messages that it relays, over core NATS.

A request is a JSON object; the answer is one or more of them, the last of which says so. A node answers from its index,
and has the relay do what changes something (penstock.relay.operators): so it is in the stream as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from penstock.cluster.control import Control, read_control, set_draining, suspend
from penstock.cluster.jetstream import JetStream
from penstock.cluster.layout import Layout, read_message
from penstock.cluster.leases import read_leases, read_nodes
from penstock.journal import Journal
from penstock.message import Body
from penstock.net.nats import Message, NatsClient, NatsError
from penstock.spool.admin import Ages, Filter, ListedMessage, QueueAdmin, Stats, add_functions, no_message
from penstock.spool.admin import Change as Changed
from penstock.spool.admins import QueueAdmins
from penstock.spool.bodies import StoredBody
from penstock.spool.entry import ATTEMPTING, DUE, HELD, HopState
from penstock.spool.store import SpoolError, connect

_CHUNK: Final = 200
"""Messages in one answer."""
_ANSWER: Final = 20.0
"""Seconds to wait for a node; what it changes takes up to ten."""
_CONCURRENT: Final = 4


class _Request(msgspec.Struct, frozen=True):
    action: str
    filter: Filter = Filter()
    limit: int = 0
    ids: tuple[str, ...] = ()


class _Answer(msgspec.Struct, frozen=True):
    result: Any = None
    is_last: bool = True
    error: str = ""


# ---- the side of a node


class IndexAdmin(QueueAdmin):
    """The index of a node that runs: the relay makes all changes."""

    def _change(self, action: str, change: str, values: Sequence[object], states: list[int], what: Filter) -> Changed:  # noqa: ARG002 - the interface
        among = {"release": [HELD], "drop": [DUE, ATTEMPTING, HELD]}.get(action, [DUE, ATTEMPTING])
        numbers = [row[0] for row in self._rows(what, f"state IN ({','.join(map(str, among))})")]
        done = self._instruct(action, numbers)
        if done.changed:
            self._note_events(action, numbers, done.changed)
        return done

    def check(self) -> Iterator[str]:
        """Yield a line for each inconsistency; there are no files."""
        yield from self._check_rows()


class AdminService:
    """Answers the requests to a node."""

    def __init__(
        self, client: NatsClient, subject: str, folder: Path, journal: Journal, settle: Callable[[], Awaitable[None]]
    ) -> None:
        """`folder` has the index; `settle` returns once all that was accepted before is in it."""
        self._client = client
        self._subject = subject
        self._folder = folder
        self._journal = journal
        self._settle = settle

    async def run(self) -> None:
        """Answer until cancelled."""
        limit = trio.CapacityLimiter(_CONCURRENT)
        async with self._client.subscribed(self._subject, limit=100) as requests, trio.open_nursery() as nursery:
            async for message in requests:
                nursery.start_soon(self._answer, message, limit)

    async def _answer(self, message: Message, limit: trio.CapacityLimiter) -> None:
        try:
            request = msgspec.json.decode(message.data, type=_Request)
            await self._settle()
            answers = await trio.to_thread.run_sync(self._act, request, limiter=limit, abandon_on_cancel=True)
        except Exception as exc:  # noqa: BLE001 - whatever a request does, the node goes on
            self._journal.error(0, "operators", exc)
            answers = [_Answer(error=f"{type(exc).__name__}: {exc}")]
        try:
            for answer in answers:
                self._client.publish(message.reply, msgspec.json.encode(answer))
                await trio.lowlevel.checkpoint()
        except NatsError:
            return  # the operator asks again

    def _act(self, request: _Request) -> list[_Answer]:
        with closing(connect(self._folder / "spool.db", timeout=30)) as database:
            add_functions(database)
            admin = IndexAdmin(self._folder, database, time.time)
            if request.action == "find":
                found = [message._asdict() for message in admin.find(request.filter, request.limit)]
                chunks = [found[start : start + _CHUNK] for start in range(0, len(found), _CHUNK)] or [[]]
                return [_Answer(chunk, is_last=chunk is chunks[-1]) for chunk in chunks]
            if request.action in ("retry", "hold", "release", "drop", "bounce"):
                return [_Answer(getattr(admin, request.action)(request.filter)._asdict())]
            if request.action == "stats":
                return [_Answer(admin.stats(100)._asdict())]
            if request.action == "unknown":
                return [_Answer(admin.unknown(request.ids))]
            results: dict[str, Callable[[], Any]] = {
                "ages": lambda: [each._asdict() for each in admin.ages()],
                "hops": lambda: [each._asdict() for each in admin.hops()],
                "check": lambda: list(admin.check()),
            }
            if request.action not in results:
                raise ValueError(f"unknown action {request.action!r}: this node has another version")
            return [_Answer(results[request.action]())]


# ---- the side of an operator


async def ask(jetstream: JetStream, subject: str, node: str, **fields: Any) -> list[Any]:
    """Ask a node for something; return its answers. Raise SpoolError or NatsError."""
    inbox = f"_INBOX.{os.urandom(12).hex()}"
    results: list[Any] = []
    async with jetstream.client.subscribed(inbox, limit=100_000) as answers:
        jetstream.client.publish(subject, msgspec.json.encode(fields), reply=inbox)
        while True:
            message = None
            with trio.move_on_after(_ANSWER):
                message = await answers.receive()
            if message is None or message.status:
                raise SpoolError(f"node {node} does not answer")
            answer = msgspec.json.decode(message.data, type=_Answer)
            if answer.error:
                raise SpoolError(f"node {node}: {answer.error}")
            results.append(answer.result)
            if answer.is_last:
                return results


Runner = Callable[[Callable[[JetStream], Any]], Any]
"""Runs something with a connection to the cluster."""


class RemoteAdmin(QueueAdmin):
    """A node, for an operator: each call is a request."""

    def __init__(self, run: Runner, layout: Layout, node: str) -> None:
        self._clock = time.time
        self._run = run
        self._layout = layout
        self._node = node

    def _ask(self, action: str, **fields: Any) -> list[Any]:
        if not self._node:
            raise SpoolError("no node of the cluster runs")
        subject = self._layout.operations(self._node)
        found: list[Any] = self._run(lambda jetstream: ask(jetstream, subject, self._node, action=action, **fields))
        return found

    def find(self, what: Filter, limit: int) -> Iterator[ListedMessage]:
        """Yield messages, the oldest first."""
        for chunk in self._ask("find", filter=what, limit=limit):
            yield from msgspec.convert([list(each.values()) for each in _flat(chunk)], list[ListedMessage])

    def text(self, message_id: str) -> tuple[bytes, Body]:
        """Return the header fields added to a message, and its body, from the stream."""
        found: tuple[bytes, bytes] | None = self._run(lambda jetstream: read_text(jetstream, self._layout, message_id))
        if found is None:
            raise SpoolError(no_message(message_id))
        return found[0], StoredBody(found[1])

    def stats(self, queues: int = 10) -> Stats:  # noqa: ARG002 - the interface
        """Count messages and recipients."""
        (found,) = self._ask("stats")
        return Stats(**{**found, "queues": [(name, count) for name, count in found["queues"]]})

    def ages(self, limit: int = 0) -> list[Ages]:  # noqa: ARG002 - the interface
        """Return the recipients by domain and age."""
        return [Ages(**each) for each in self._ask("ages")[0]]

    def hops(self) -> list[HopState]:
        """Return the next hops that are backing off."""
        return [HopState(**each) for each in self._ask("hops")[0]]

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Return those of the message ids that the node does not relay."""
        return list(self._ask("unknown", ids=tuple(ids))[0]) if ids else []

    def check(self) -> Iterator[str]:
        """Yield a line for each inconsistency."""
        yield from self._ask("check")[0]

    def _change(self, action: str, change: str, values: Sequence[object], states: list[int], what: Filter) -> Changed:  # noqa: ARG002 - the interface
        return Changed(**self._ask(action, filter=what)[0])

    def _at_rest(self, *states: int) -> list[int]:
        return [*states, ATTEMPTING]

    def bounce(self, what: Filter) -> Changed:
        """Have the node return recipients to their sender now."""
        return Changed(**self._ask("bounce", filter=what)[0])


class ClusterAdmins(QueueAdmins):
    """All nodes together; what is suspended is one record for all of them."""

    def __init__(self, run: Runner, layout: Layout) -> None:
        """Without a node that runs, only what is suspended can be asked for."""
        self._run = run
        self._layout = layout
        nodes = run(lambda jetstream: living_nodes(jetstream, layout))
        super().__init__([(node, RemoteAdmin(run, layout, node)) for node in nodes or [""]])

    def suspended(self) -> list[str]:
        """Return the domains and next hops that are suspended."""
        control: Control = self._run(lambda jetstream: read_control(jetstream, self._layout))
        return list(control.suspended)

    def suspend(self, name: str) -> bool:
        """Send nothing to a domain or a next hop, from any node, until it is resumed."""
        return bool(self._run(lambda jetstream: suspend(jetstream, self._layout, name)))

    def resume(self, name: str) -> bool:
        """Undo `suspend`."""
        return bool(self._run(lambda jetstream: suspend(jetstream, self._layout, name, undo=True)))


def _flat(chunk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return listed messages with their recipients as lists of values."""
    return [{**each, "recipients": [list(to) for to in each["recipients"]]} for each in chunk]


async def read_text(jetstream: JetStream, layout: Layout, message_id: str) -> tuple[bytes, bytes] | None:
    """Return the prefix and the body of a message in the stream; None if it is not there. Raise NatsError."""
    for number in range(layout.streams):
        stream = layout.stream(number)
        found = await jetstream.last(stream, f"{layout.name}.m.*.{message_id}")
        message = None if found is None else read_message(found.subject, found.sequence, found.headers)
        if found is None or message is None:
            continue
        place = message.place
        data = found.data[place.envelope_octets :]
        for piece in range(place.pieces):
            stored = await jetstream.last(stream, layout.piece(place.partition, message_id, piece))
            data += b"" if stored is None else stored.data
        return data[: place.prefix_octets], data[place.prefix_octets :]
    return None


async def living_nodes(jetstream: JetStream, layout: Layout) -> list[str]:
    """Return the names of the nodes that live. Raise NatsError."""
    return sorted(await read_nodes(jetstream, layout))


async def drain(jetstream: JetStream, layout: Layout, node: str, *, undo: bool = False) -> None:
    """Have a node give up its partitions, and wait until it has none; or undo that. Raise SpoolError or NatsError."""
    nodes = await read_nodes(jetstream, layout)
    if node not in nodes and not undo:
        raise SpoolError(f"node {node} does not run; nodes: {', '.join(sorted(nodes)) or 'none'}")
    await set_draining(jetstream, layout, node, undo=undo)
    if not undo:
        while any(  # noqa: ASYNC110 - it is in another process
            lease.node == node for lease in (await read_leases(jetstream, layout)).values()
        ):
            await trio.sleep(0.2)
