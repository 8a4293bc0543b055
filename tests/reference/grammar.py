"""A slow, simple reader of mailboxes, written after the ABNF: the reference for the strict grammar."""

from __future__ import annotations

import ipaddress
import string

ATEXT = set(string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~")
LET_DIG = set(string.ascii_letters + string.digits)


def is_dot_string(text: str) -> bool:
    """Dot-string = Atom *("." Atom)."""
    return all(atom and set(atom) <= ATEXT for atom in text.split("."))


def unquote(text: str) -> str | None:
    """Return the contents of a Quoted-string, None when it is not one."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return None
    result = ""
    characters = iter(text[1:-1])
    for c in characters:
        if c == "\\":
            c = next(characters, "")
            if not c or not " " <= c <= "~":
                return None
        elif c == '"' or not " " <= c <= "~":
            return None
        result += c
    return result


def is_domain(text: str) -> bool:
    """Domain = sub-domain *("." sub-domain)."""
    if len(text) > 255:
        return False
    for label in text.split("."):
        if not 1 <= len(label) <= 63 or not set(label) <= LET_DIG | {"-"}:
            return False
        if label[0] == "-" or label[-1] == "-":
            return False
    return True


def is_literal(text: str) -> bool:
    """address-literal = "[" (IPv4 / IPv6 / General) "]"."""
    if not (text.startswith("[") and text.endswith("]")) or len(text) > 255:
        return False
    inner = text[1:-1]
    tag, colon, content = inner.partition(":")
    try:
        if not colon:
            ipaddress.IPv4Address(inner)
        elif tag.lower() == "ipv6":
            ipaddress.IPv6Address(content)
            return "%" not in content
        else:
            dcontent = {chr(i) for i in (*range(33, 91), *range(94, 127))}
            return (
                bool(content)
                and set(content) <= dcontent
                and bool(tag)
                and set(tag) <= LET_DIG | {"-"}
                and tag[-1] != "-"
            )
    except ValueError:
        return False
    return True


def canonical_literal(text: str) -> str:
    """Return an address literal with its IPv6 address compressed, and one that is IPv4-mapped as IPv4."""
    tag, colon, content = text[1:-1].partition(":")
    if tag != "ipv6" or not colon:
        return text
    address = ipaddress.IPv6Address(content)
    return f"[{address.ipv4_mapped}]" if address.ipv4_mapped else f"[ipv6:{address}]"


def read_mailbox(text: str) -> tuple[str, str] | None:
    """Return the local part and the domain of an ASCII mailbox, None when it is not one."""
    for i, c in enumerate(text):
        if c != "@":
            continue
        local, domain = text[:i], text[i + 1 :]
        name = local if is_dot_string(local) else unquote(local)
        if name is None:
            continue
        if is_domain(domain):
            return name, domain.lower()
        if is_literal(domain):
            return name, canonical_literal(domain.lower())
    return None
