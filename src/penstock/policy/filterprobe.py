"""Asks every filter of a configuration once, without a message: for `penstock config check --online`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final

from penstock.policy import milterwire
from penstock.policy.filters import FilterConnection, FilterError, FilterPool
from penstock.policy.milterwire import Reader
from penstock.policy.rspamd import read_answer
from penstock.policy.settings import PolicySettings
from penstock.policy.units import Address, parse_addresses, parse_url

_SECONDS: Final = 5.0
Talk = Callable[[FilterConnection], Awaitable[object]]
Probe = Callable[[], Awaitable[str]]
"""Returns the error, "" without one."""


def probes(policy: PolicySettings) -> Iterator[tuple[str, Probe]]:
    """Yield the keys of all filters, with a function that asks one."""
    for number, milter in enumerate(policy.milter):
        for address in parse_addresses(milter.address):
            yield f"policy.milter[{number}].address", partial(_probe, address, _negotiate)
    for number, delegate in enumerate(policy.delegate):
        for address in parse_addresses(delegate.address):
            yield f"policy.delegate[{number}].address", partial(_probe, address, _connect_only)
    if policy.rspamd is not None:
        address, path = parse_url(policy.rspamd.url)
        yield "policy.rspamd.url", partial(_probe, address, partial(_ping, address, path))


async def _probe(address: Address, talk: Talk) -> str:
    pool = FilterPool([address], connect=_SECONDS, deadline=_SECONDS)
    try:
        await pool.talk(talk)
    except FilterError as exc:
        return str(exc)
    finally:
        pool.close()
    return ""


async def _negotiate(connection: FilterConnection) -> None:
    reader = Reader()
    await connection.send(milterwire.negotiation())
    while (found := reader.next()) is None:
        reader.feed(await connection.receive())
    milterwire.parse_negotiation(found)
    await connection.send(milterwire.packet(b"Q"))


async def _connect_only(_: FilterConnection) -> None:
    """Ask nothing: a policy server would count the question."""


async def _ping(address: Address, path: str, connection: FilterConnection) -> None:
    host = str(address).removeprefix("inet:")
    await connection.send(f"GET {path}/ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    await read_answer(connection)
