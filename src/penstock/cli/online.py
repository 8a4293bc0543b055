"""`penstock config check --online`: asks every DNS server, list and filter that a configuration names, once."""

from __future__ import annotations

import msgspec
import trio

from penstock.config import Settings
from penstock.dns import Resolver
from penstock.policy.dnsbl import find_problem
from penstock.policy.filterprobe import Probe, probes

_REFUSED = "not a recursive server for us"
_SECONDS = 10.0
"""For all questions together."""


def problems(settings: Settings) -> tuple[list[str], list[str]]:
    """Return what does not answer as it should, each with its key, and warnings. Takes ten seconds at most."""
    found = trio.run(_ask_all, settings)
    refused = [each for each in found if _REFUSED in each]
    return [each for each in found if each not in refused], refused


async def _ask_all(settings: Settings) -> list[str]:
    found: dict[str, str] = {}
    with trio.move_on_after(_SECONDS):
        async with trio.open_nursery() as nursery:
            for key, server in _servers(settings):
                found[key] = "no answer"
                nursery.start_soon(_ask_server, settings, key, server, found)
            policy = settings.policy
            for number, each in enumerate(policy.dnsbl if policy is not None else ()):
                key = f"policy.dnsbl[{number}].zone"
                found[key] = f"{each.zone}: no answer"
                nursery.start_soon(_ask_list, settings, key, each.zone, found)
            for key, probe in probes(policy) if policy is not None else ():
                found[key] = "no answer"
                nursery.start_soon(_ask_filter, key, probe, found)
    return [f"{key}: {problem}" for key, problem in found.items() if problem]


def _servers(settings: Settings) -> list[tuple[str, str]]:
    servers = settings.resolver.servers
    if not servers:
        return [("resolver.servers", "")]
    return [(f"resolver.servers[{number}]", server) for number, server in enumerate(servers)]


async def _ask_server(settings: Settings, key: str, server: str, found: dict[str, str]) -> None:
    """Ask a server (all of resolv.conf for "") for the name servers of the root: the answer shows whether it works."""
    servers = (server,) if server else ()
    lifetime = min(settings.resolver.lifetime, _SECONDS / 2)
    given = msgspec.structs.replace(settings.resolver, servers=servers, lifetime=lifetime)
    resolver = Resolver(given)
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        answer = await resolver.query("", "NS")
        nursery.cancel_scope.cancel()
    found[key] = ""
    if answer.is_failure:
        # An authoritative server that only has the zones in use refuses the root, and is of use nevertheless.
        answered = any(word in answer.cause for word in ("REFUSED", "SERVFAIL", "RCODE", "referral"))
        found[key] = f"{server or 'resolv.conf'}: {f'{_REFUSED}: ' if answered else ''}{answer.cause}"


async def _ask_list(settings: Settings, key: str, zone: str, found: dict[str, str]) -> None:
    """Make the self-test of a list (RFC 5782 5)."""
    lifetime = min(settings.resolver.lifetime, _SECONDS / 3)
    resolver = Resolver(msgspec.structs.replace(settings.resolver, lifetime=lifetime))
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        problem = await find_problem(resolver, zone)
        nursery.cancel_scope.cancel()
    found[key] = f"{zone}: {problem}" if problem else ""


async def _ask_filter(key: str, probe: Probe, found: dict[str, str]) -> None:
    """Ask a milter, rspamd or a policy server; of several addresses, the first problem is reported."""
    problem = await probe()
    found[key] = problem if found[key] in ("", "no answer") else found[key]
