"""The DNS: a stub resolver with a cache (RFC 1035, 2308, 5452, 6891, 7766, 8767).

    resolver = Resolver(settings)
    await nursery.start(resolver.run)
    answer = await resolver.query("example.org", "MX")

The resolver asks recursive servers; it validates nothing itself. `answer.status` says what is known; a DNS that does
not work is the status "failed", not an exception.

- settings.py: the `[resolver]` table and resolv.conf
- budget.py: a bound for what one client can make it do
- resolver.py: the order in which servers are asked, and what becomes of their answers
- exchangers.py: the hosts that accept the mail of a domain
- server.py: one server: UDP sockets, TCP, breaker
- ext/dns.pyx: messages, UDP sockets, cached answers
"""

from penstock.dns.budget import Budget
from penstock.dns.exchangers import Exchanger, MailExchangers, ResolveError
from penstock.dns.resolver import Answer, Batch, Kind, Resolver, ResolverStatistics
from penstock.dns.settings import ResolverSettings, parse_server

__all__ = [
    "Answer",
    "Batch",
    "Budget",
    "Exchanger",
    "Kind",
    "MailExchangers",
    "ResolveError",
    "Resolver",
    "ResolverSettings",
    "ResolverStatistics",
    "parse_server",
]
