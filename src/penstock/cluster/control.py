"""What operators have requested of all nodes: which domains and next hops are suspended, and which nodes drain.

It is one record of the bucket NAME-shared. It survives every restart, and a node reads it before it relays anything.
Who changes it says so on a subject of core NATS; a node that does not hear that reads it again with its next renewal of
leases.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from penstock.cluster.jetstream import ApiError, JetStream
from penstock.cluster.layout import WRONG_LAST_SEQUENCE, Layout
from penstock.net.nats import NatsError
from penstock.spool.store import SpoolError

_TRIES: Final = 20
_MOST_NAMES: Final = 1000
"""Names of each kind."""


class Control(msgspec.Struct, frozen=True):
    """The record."""

    suspended: tuple[str, ...] = ()
    """Domains and next hops, in lower case."""
    draining: tuple[str, ...] = ()
    """Nodes."""


async def _read(jetstream: JetStream, layout: Layout) -> tuple[Control, int]:
    found = await jetstream.last(f"KV_{layout.shared}", layout.control)
    if found is None:
        return Control(), 0
    try:
        return msgspec.json.decode(found.data, type=Control), found.sequence
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise NatsError(f"{layout.control} cannot be read: {exc}") from exc


async def read_control(jetstream: JetStream, layout: Layout) -> Control:
    """Return the record. Raise NatsError."""
    return (await _read(jetstream, layout))[0]


async def change_control(jetstream: JetStream, layout: Layout, change: Callable[[Control], Control]) -> bool:
    """Change the record, and tell the nodes. Return whether it is another one now. Raise NatsError or SpoolError."""
    for _ in range(_TRIES):
        before, sequence = await _read(jetstream, layout)
        after = change(before)
        if after == before:
            return False
        if max(len(after.suspended), len(after.draining)) > _MOST_NAMES:
            raise SpoolError(f"at most {_MOST_NAMES} names can be suspended")
        headers = b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n" % sequence
        try:
            await jetstream.publish(layout.control, msgspec.json.encode(after), headers)
        except ApiError as exc:
            if exc.number != WRONG_LAST_SEQUENCE:
                raise
            continue  # another operator was faster
        with suppress(NatsError):
            jetstream.client.publish(layout.control_changed)
            await jetstream.client.flush(timeout=1)
        return True
    raise NatsError("the record of the operators is changed by others again and again")


def _with(names: tuple[str, ...], name: str, *, is_in: bool) -> tuple[str, ...]:
    return tuple(sorted({*names, name} if is_in else {*names} - {name}))


async def suspend(jetstream: JetStream, layout: Layout, name: str, *, undo: bool = False) -> bool:
    """Suspend a domain or a next hop on all nodes, or resume it. Return False if it was so already."""

    def change(control: Control) -> Control:
        names = _with(control.suspended, name.lower(), is_in=not undo)
        return msgspec.structs.replace(control, suspended=names)

    return await change_control(jetstream, layout, change)


async def set_draining(jetstream: JetStream, layout: Layout, node: str, *, undo: bool = False) -> bool:
    """Have a node own no partitions, also after a restart, or undo that. Return False if it was so already."""

    def change(control: Control) -> Control:
        names = _with(control.draining, node, is_in=not undo)
        return msgspec.structs.replace(control, draining=names)

    return await change_control(jetstream, layout, change)
