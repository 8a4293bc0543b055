"""Name resolution: each target is resolved once, before the run, to one of its addresses.

That is what wrk and h2load do: a run measures one server. Several addresses are tried in order, and the first that
accepts a connection is used; the last one is used without trying it. So `localhost` works whichever address family a
server listens on.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace

import trio

from penstock.load.plan import Place, PlanError, Target


async def resolved(target: Target, sources: Sequence[str], timeout: float) -> Target:  # noqa: ASYNC109 - of each address
    """Return a target with an address of the family of the sources. Raise PlanError if it has none."""
    if target.path:
        return target
    try:
        found = await trio.socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise PlanError(f"{target.host} has no address: {reason}") from exc
    families = {socket.AF_INET6 if ":" in source else socket.AF_INET for source in sources}
    places = [
        (family, (str(place[0]), *place[1:]))
        for family, _, _, _, place in found
        if family in (families or {socket.AF_INET, socket.AF_INET6})
    ]
    if not places:
        raise PlanError(f"{target.host} has no address that {', '.join(sources)} can reach")
    for family, place in places[:-1]:
        if await _accepts(family, place, timeout):
            return replace(target, family=family, place=place)
    return replace(target, family=places[-1][0], place=places[-1][1])


async def _accepts(family: int, place: Place, timeout: float) -> bool:  # noqa: ASYNC109
    with trio.move_on_after(timeout), trio.socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            await sock.connect(place)
        except OSError:
            return False
        return True
    return False
