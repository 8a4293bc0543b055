"""Canonical forms of domains, IP addresses and networks.

A name that can be written in several ways is converted to one form where it is read (a command, the configuration, a
file, a socket, a PROXY header). All other code compares plain strings.

- A domain is a lower-case A-label form without a trailing dot (RFC 5890 2.3.2.1): `xn--bcher-kva.example`.
- An address literal is in lower case, and its IPv6 address compressed (RFC 5952): `[ipv6:2001:db8::1]`.
- An IPv4-mapped IPv6 address (RFC 4291 2.5.5.2) is the IPv4 address; a network of such addresses the IPv4 network.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import Final

import idna

MAX_DOMAIN: Final = 255
"""Octets of a domain in A-label form (RFC 5321 4.5.3.1.2, RFC 1035 2.3.4)."""
_CACHE: Final = 4096
"""Domains with U-labels whose A-label form is remembered: at most 2 KB each."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_LABEL_WITH_UNDERSCORE: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DOMAIN: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_DOMAIN_WITH_UNDERSCORE: Final = re.compile(rf"{_LABEL_WITH_UNDERSCORE}(?:\.{_LABEL_WITH_UNDERSCORE})*")
_GENERAL_LITERAL: Final = re.compile(r"([A-Za-z0-9-]*[A-Za-z0-9]):([\x21-\x5a\x5e-\x7e]+)")
_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")

UNSAFE_CHARACTERS: Final = (
    r"\x80-\x9f"  # C1 controls
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    r"\u2028\u2029"  # line and paragraph separators
    r"\xa0\u1680\u2000-\u200b\u202f\u205f\u3000\ufeff"  # spaces, and characters without width
    r"\ud800-\udfff"  # surrogates
    r"\ufdd0-\ufdef\ufff0-\uffff"  # noncharacters, interlinear annotation
    r"\U000e0000-\U000e0fff"  # tags
)
"""Non-ASCII characters that no address or name may have, as the inside of a regular expression's character class.

They cannot be seen, or they change how the text around them is shown. RFC 6532 3.1 allows them; mail with them is a
forgery or damaged.
"""


# ---- domains


def is_domain(text: str, *, underscores: bool = False) -> bool:
    """Return whether a text is an ASCII domain of at most 255 octets (RFC 5321 4.1.2).

    `underscores` also allows labels with an underscore, which host names do not have and DNS names do.
    """
    pattern = _DOMAIN_WITH_UNDERSCORE if underscores else _DOMAIN
    return len(text) <= MAX_DOMAIN and pattern.fullmatch(text) is not None


def domain_of(text: str, *, utf8: bool, underscores: bool = False) -> str | None:
    """Return the canonical form of a domain that has no trailing dot, None when it is not a domain.

    `utf8` allows U-labels (RFC 6531 3.3). The length is checked before the labels are converted.
    """
    if is_domain(text, underscores=underscores):
        return text.lower()
    if not utf8 or text.isascii() or len(text) > MAX_DOMAIN:
        return None
    return _from_u_labels(text, underscores)


@functools.lru_cache(maxsize=_CACHE)
def _from_u_labels(text: str, underscores: bool) -> str | None:
    """Return the canonical form of a domain with U-labels (RFC 5891 5), None when it is not a domain."""
    try:
        # UTS 46 maps case, width and the dots of other scripts. STD 3 is checked below, where underscores may pass.
        labels = idna.uts46_remap(text, std3_rules=False).split(".")
        domain = ".".join(label if label.isascii() else idna.alabel(label).decode() for label in labels)
    except (idna.IDNAError, UnicodeError):
        return None
    return domain.lower() if is_domain(domain, underscores=underscores) else None


def canonical_domain(text: str) -> str:
    """Return the canonical form of a domain in a configuration or a file.

    U-labels, underscores and one trailing dot are allowed. Raise ValueError for what is not a domain.
    """
    domain = domain_of(text.removesuffix("."), utf8=True, underscores=True)
    if domain is None:
        raise ValueError(f"{text!r} is not a domain")
    return domain


def comparable_domain(text: str) -> str:
    """Return the canonical form of what may be a domain or an address literal; of anything else, its lower case."""
    try:
        return canonical_domain(text)
    except ValueError:
        return literal_of(text) or text.lower()


def literal_of(text: str) -> str | None:
    """Return the canonical form of an address literal with its brackets (RFC 5321 4.1.3), None when it is not one."""
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MAX_DOMAIN:
        return None
    inner = text[1:-1]
    try:
        if inner[:5].lower() == "ipv6:":
            address = canonical_address(inner[5:])
            if "%" in inner or ":" not in inner[5:]:
                return None
            return f"[ipv6:{address}]" if ":" in address else f"[{address}]"
        if ":" not in inner:
            return f"[{ipaddress.IPv4Address(inner)}]"
    except ValueError:
        return None
    return text.lower() if _GENERAL_LITERAL.fullmatch(inner) else None


# ---- IP addresses


def parse_address(text: str) -> Address:
    """Return an IP address without its zone, an IPv4-mapped one as IPv4. Raise ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def canonical_address(text: str) -> str:
    """Return an IP address in its canonical form, "" as it is. Raise ValueError for what is not an IPv6 address.

    IPv4 addresses come from the system or were checked, and are returned as they are. A zone (`%eth0`) is kept.
    """
    if ":" not in text:
        return text
    address, percent, zone = text.partition("%")
    return f"{parse_address(address)}{percent}{zone}"


def literal_of_address(address: str) -> str:
    """Return the address literal of an IP address (RFC 5321 4.1.3), "[unix]" for ""."""
    if not address:
        return "[unix]"
    address = canonical_address(address)
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def parse_network(text: str) -> Network:
    """Return a network, one of IPv4-mapped addresses as IPv4. Raise ValueError, also when host bits are set."""
    network = ipaddress.ip_network(text)
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        address = network.network_address.ipv4_mapped
        assert address is not None
        return ipaddress.IPv4Network((address, network.prefixlen - 96))
    return network


@functools.lru_cache(maxsize=_CACHE)
def network_of(address: str) -> str:
    """Return what limits per client count by: the IPv4 address, the IPv6 /64, "" for a unix socket.

    The IPv6 loopback is counted alone: its /64 holds all IPv4-compatible addresses.
    """
    if ":" not in address:
        return address
    found = parse_address(address)
    if isinstance(found, ipaddress.IPv4Address) or found.is_loopback:
        return str(found)
    return f"{ipaddress.IPv6Address(int(found) >> 64 << 64)}/64"
