"""Durations, limits and addresses as the `[policy]` tables have them: text to values, and errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from penstock.addresses import canonical_domain
from penstock.policy.settings import PolicySettings, RateSettings

_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhdw])")
_LIMIT: Final = re.compile(r"([0-9]{1,12})([kMGT]?)/(?:([0-9]{1,6}))?([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_FACTORS: Final = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LONGEST: Final = 10 * 365 * 86_400
"""Seconds."""
_NANO: Final = 1_000_000_000
CONNECTION_KEYS: Final = frozenset({"network", "listener"})
"""What is known of a client before MAIL."""


class Limit(NamedTuple):
    """So many units per period."""

    units: int
    period: int
    """Nanoseconds."""


class Address(NamedTuple):
    """Where a filter listens. A path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"inet:[{self.host}]:{self.port}" if ":" in self.host else f"inet:{self.host}:{self.port}"


def parse_duration(text: str) -> int:
    """Return the nanoseconds of "60s", "1.5h" or "35d". Raise ValueError."""
    found = _DURATION.fullmatch(text)
    seconds = 0.0 if found is None else float(found[1]) * _SECONDS[found[2]]
    if not 0 < seconds <= _LONGEST:
        raise ValueError(f'expected a duration such as "60s", "5m", "12h" or "35d", not {text!r}')
    return round(seconds * _NANO)


def parse_limit(text: str) -> Limit:
    """Return the units and the period of "100/h", "2000/10m" or "500M/d". Raise ValueError."""
    found = _LIMIT.fullmatch(text)
    units = 0 if found is None else int(found[1]) * _FACTORS[found[2]]
    seconds = 0 if found is None else int(found[3] or 1) * _SECONDS[found[4]]
    if not units or not 0 < seconds <= _LONGEST:
        raise ValueError(f'expected a limit such as "100/h", "2000/10m" or "500M/d", not {text!r}')
    return Limit(units, seconds * _NANO)


def parse_addresses(text: str | tuple[str, ...]) -> list[Address]:
    """Return where a filter listens: at least one address. Raise ValueError."""
    texts = (text,) if isinstance(text, str) else text
    if not texts:
        raise ValueError('expected "inet:HOST:PORT" or "unix:/path", not an empty array')
    return [_parse_address(each) for each in texts]


def _parse_address(text: str) -> Address:
    kind, _, rest = text.partition(":")
    if kind in ("unix", "local") and rest.startswith("/"):
        return Address(path=rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind == "inet" and host and port.isdecimal() and 0 < int(port) < 65_536:
        return Address(host=host, port=int(port))
    raise ValueError(f'expected "inet:HOST:PORT" or "unix:/path", not {text!r}')


def parse_url(text: str) -> tuple[Address, str]:
    """Return where an HTTP server listens, and the path of a URL without its last slash. Raise ValueError."""
    url = urlsplit(text)
    try:
        port = url.port or 80
    except ValueError:
        port = 0
    if url.scheme != "http" or not url.hostname or not port or url.query or url.fragment or url.username:
        raise ValueError(f"expected http://HOST:PORT, not {text!r}")
    return Address(host=url.hostname, port=port), url.path.rstrip("/")


def needs_state(policy: PolicySettings) -> bool:
    """Return whether checks need the shared state."""
    return any(each is not None and policy.mode_of(each) != "off" for each in (policy.greylist, *policy.rate))


def problems(policy: PolicySettings) -> Iterator[str]:
    """Yield the errors in the tables, each with its key."""
    for key, check in _checks(policy):
        try:
            check()
        except ValueError as exc:
            yield f"policy.{key}: {exc}"


def _checks(policy: PolicySettings) -> Iterator[tuple[str, Callable[[], object]]]:
    if policy.greylist is not None:
        for name in ("delay", "window", "remember"):
            yield f"greylist.{name}", partial(parse_duration, getattr(policy.greylist, name))
    for number, rate in enumerate(policy.rate):
        yield f"rate[{number}].limit", partial(parse_limit, rate.limit)
        yield f"rate[{number}].by", partial(_check_keys, rate)
    for number, milter in enumerate(policy.milter):
        yield f"milter[{number}].address", partial(parse_addresses, milter.address)
    for number, delegate in enumerate(policy.delegate):
        yield f"delegate[{number}].address", partial(parse_addresses, delegate.address)
    for number, sign in enumerate(policy.sign):
        yield f"sign[{number}].domain", partial(canonical_domain, sign.domain)
    if policy.rspamd is not None:
        yield "rspamd.url", partial(parse_url, policy.rspamd.url)


def _check_keys(rate: RateSettings) -> None:
    wrong = [key for key in rate.by if key not in CONNECTION_KEYS]
    if rate.count in ("connections", "refused") and wrong:
        raise ValueError(f'count = "{rate.count}" can be limited by network and listener, not by {", ".join(wrong)}')
