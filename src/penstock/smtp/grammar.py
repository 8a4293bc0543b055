"""The grammar of arguments (RFC 5321 4.1.2): octets in, a checked event or the refusal out. Nothing here raises.

Almost every MAIL and RCPT is `FROM:<dot-string@domain>`, perhaps with SIZE and BODY. Those are read by compiled code
(ext/session.pyx); all others go the full way, which reads the path first and then, since only they tell whether UTF-8
is allowed in the path, the parameters before it judges the path.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Final, NamedTuple

import idna

from penstock import reply as replies
from penstock.message import NO_PARAMETERS, NULL_PATH, MailParameters, Path, Recipient
from penstock.reply import Reply
from penstock.smtp._grammar import BAD_RECIPIENT, BAD_SENDER, plain_mail, plain_rcpt
from penstock.smtp.events import Mail, Rcpt
from penstock.smtp.extensions import Extensions

SENDER_NOT_ASCII: Final = Reply(553, "5.6.7", "A sender address that is not ASCII needs SMTPUTF8")
RECIPIENT_NOT_ASCII: Final = Reply(553, "5.6.7", "A recipient address that is not ASCII needs SMTPUTF8")
FROM_EXPECTED: Final = Reply(501, "5.5.4", "Syntax: MAIL FROM:<address> [parameters]")
TO_EXPECTED: Final = Reply(501, "5.5.4", "Syntax: RCPT TO:<address> [parameters]")
BAD_HELLO: Final = Reply(501, "5.5.4", "Syntax: one domain or address literal")
BAD_PARAMETER_SYNTAX: Final = Reply(501, "5.5.4", "A parameter is KEYWORD or KEYWORD=value")

MAX_LOCAL_PART: Final = 64  # RFC 5321 4.5.3.1.1
MAX_DOMAIN: Final = 255  # RFC 5321 4.5.3.1.2
MAX_PATH: Final = 256  # RFC 5321 4.5.3.1.3, with its angle brackets
MAX_ENVID: Final = 100  # RFC 3461 4.4
MAX_ORCPT: Final = 500  # RFC 3461 4.2

_ATEXT: Final = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOT_STRING: Final = re.compile(rf"[{_ATEXT}]+(?:\.[{_ATEXT}]+)*")
_UTF8_DOT_STRING: Final = re.compile(rf"[{_ATEXT}\u0080-\U0010ffff]+(?:\.[{_ATEXT}\u0080-\U0010ffff]+)*")
_QUOTED: Final = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*)"')
_UTF8_QUOTED: Final = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e\u0080-\U0010ffff]|\\[\x20-\x7e])*)"')
_DOMAIN: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_GENERAL_LITERAL: Final = re.compile(r"([A-Za-z0-9-]*[A-Za-z0-9]):([\x21-\x5a\x5e-\x7e]+)")
_PARAMETER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([\x21-\x3c\x3e-\x7e\u0080-\U0010ffff]+))?")
_XTEXT: Final = re.compile(r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x7e]|\+[0-9A-F]{2})*")
_ORCPT: Final = re.compile(r"([A-Za-z0-9-]+);(.+)")
_HEX: Final = re.compile(r"\+([0-9A-F]{2})")
_HELLO: Final = re.compile(rb"[\x21-\x7e]{1,255}")


# ---- HELO EHLO LHLO


def parse_hello_name(argument: bytes) -> str | Reply:
    """Return the name a client gives itself. Odd names are tolerated (RFC 5321 4.1.4): it only has to be printable."""
    return argument.decode() if _HELLO.fullmatch(argument) else BAD_HELLO


# ---- MAIL


def parse_mail(argument: bytes, offer: Extensions, *, esmtp: bool, tls: bool) -> Mail | Reply:
    """Read what follows MAIL (RFC 5321 4.1.1.2)."""
    plain = plain_mail(argument, esmtp, offer.eightbitmime, offer.max_size)
    return parse_any_mail(argument, offer, esmtp=esmtp, tls=tls) if plain is None else plain


def parse_any_mail(argument: bytes, offer: Extensions, *, esmtp: bool, tls: bool) -> Mail | Reply:
    """Read what follows MAIL, the full way."""
    split = _split(argument, "FROM:", FROM_EXPECTED, BAD_SENDER)
    if isinstance(split, Reply):
        return split
    mailbox, words = split
    found = _parameters(words, esmtp=esmtp)
    if isinstance(found, Reply):
        return found
    parameters = _mail_parameters(found, offer, tls=tls)
    if isinstance(parameters, Reply):
        return parameters
    if not mailbox:
        return Mail(NULL_PATH, parameters)  # RFC 5321 4.5.5
    path = parse_mailbox(mailbox, smtputf8=parameters.smtputf8)
    if path is None:
        return BAD_SENDER if mailbox.isascii() or parameters.smtputf8 else SENDER_NOT_ASCII
    return Mail(path, parameters)


# ---- RCPT


def parse_rcpt(argument: bytes, offer: Extensions, *, esmtp: bool, smtputf8: bool) -> Rcpt | Reply:
    """Read what follows RCPT (RFC 5321 4.1.1.3). `smtputf8`: the MAIL of the transaction asked for it."""
    plain = plain_rcpt(argument)
    return parse_any_rcpt(argument, offer, esmtp=esmtp, smtputf8=smtputf8) if plain is None else plain


def parse_any_rcpt(argument: bytes, offer: Extensions, *, esmtp: bool, smtputf8: bool) -> Rcpt | Reply:
    """Read what follows RCPT, the full way."""
    split = _split(argument, "TO:", TO_EXPECTED, BAD_RECIPIENT)
    if isinstance(split, Reply):
        return split
    mailbox, words = split
    found = _parameters(words, esmtp=esmtp)
    if isinstance(found, Reply):
        return found
    if mailbox.lower() == "postmaster":  # RFC 5321 4.1.1.3: the one mailbox without a domain
        path: Path | None = Path(mailbox, mailbox, "")
    else:
        path = parse_mailbox(mailbox, smtputf8=smtputf8)
    if path is None:
        return BAD_RECIPIENT if mailbox.isascii() or smtputf8 else RECIPIENT_NOT_ASCII
    return _rcpt(path, found, offer, smtputf8=smtputf8)


# ---- paths


def _split(argument: bytes, word: str, expected: Reply, bad: Reply) -> tuple[str, list[str]] | Reply:
    """Cut `FROM:<path> A=1 B` into the mailbox, without brackets and source route, and the parameters."""
    try:
        text = argument.decode()
    except UnicodeDecodeError:
        return bad
    if text[: len(word)].upper() != word:
        return expected
    text = text[len(word) :].lstrip(" \t")  # RFC 5321 3.3 forbids these blanks, and clients send them
    if not text.startswith("<"):
        return bad
    end = _end_of_path(text)
    if end < 0 or len(text[: end + 1].encode()) > MAX_PATH:
        return bad
    mailbox = text[1:end]
    if mailbox.startswith("@"):  # RFC 5321 4.1.1.3, appendix C: a source route is ignored
        route, colon, mailbox = mailbox.partition(":")
        if not colon or not all(hop[:1] == "@" and _DOMAIN.fullmatch(hop[1:]) for hop in route.split(",")):
            return bad
        if not mailbox:
            return bad
    rest = text[end + 1 :]
    if rest and not rest.startswith((" ", "\t")):
        return BAD_PARAMETER_SYNTAX
    return mailbox, rest.split()


def _end_of_path(text: str) -> int:
    """Return where the > of a path stands: not one within quotes; -1 when there is none."""
    is_quoted = False
    i = 1
    while i < len(text):
        c = text[i]
        if is_quoted and c == "\\":
            i += 1
        elif c == '"':
            is_quoted = not is_quoted
        elif c == ">" and not is_quoted:
            return i
        i += 1
    return -1


def parse_mailbox(text: str, *, smtputf8: bool) -> Path | None:
    """Read `local-part@domain` (RFC 5321 4.1.2, RFC 6531 3.3); None when it is none."""
    local_text, at, domain_text = text.rpartition("@")
    if not at:
        return None
    if text.endswith("]"):  # a general address literal may hold an @
        start = text.rfind("@[")
        local_text, domain_text = text[:start], text[start + 1 :]
    local = _local_part(local_text, smtputf8=smtputf8)
    domain = parse_domain(domain_text, smtputf8=smtputf8)
    if local is None or domain is None:
        return None
    return Path(text, local, domain)


def _local_part(text: str, *, smtputf8: bool) -> str | None:
    """Return a local part without its quotes; None when it is none."""
    if len(text.encode()) > MAX_LOCAL_PART:
        return None
    if (_UTF8_DOT_STRING if smtputf8 else _DOT_STRING).fullmatch(text):
        return text
    quoted = (_UTF8_QUOTED if smtputf8 else _QUOTED).fullmatch(text)
    return None if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])


def parse_domain(text: str, *, smtputf8: bool) -> str | None:
    """Return a domain or address literal in lower case; None when it is none."""
    if text.startswith("["):
        return text.lower() if _is_literal(text) else None
    if len(text.encode()) > MAX_DOMAIN:
        return None
    if _DOMAIN.fullmatch(text):
        return text.lower()
    if smtputf8 and not text.isascii() and _is_u_labels(text):
        return text.lower()
    return None


def _is_u_labels(text: str) -> bool:
    """Say whether a domain is made of U-labels and LDH labels (RFC 5890 2.3, RFC 6531 3.3)."""
    try:
        ascii_form = idna.encode(text, uts46=True, std3_rules=True)
    except (idna.IDNAError, UnicodeError):
        return False
    return len(ascii_form) <= MAX_DOMAIN and not text.endswith(".")


def _is_literal(text: str) -> bool:
    """Say whether a text is an address literal: IPv4, IPv6 or general (RFC 5321 4.1.3)."""
    if not text.endswith("]") or len(text) > MAX_DOMAIN:
        return False
    inner = text[1:-1]
    try:
        if inner[:5].lower() == "ipv6:":
            return "%" not in inner and bool(ipaddress.IPv6Address(inner[5:]))
        if ":" not in inner:
            return bool(ipaddress.IPv4Address(inner))
    except ValueError:
        return False
    return _GENERAL_LITERAL.fullmatch(inner) is not None


# ---- parameters


class _Parameter(NamedTuple):
    keyword: str
    value: str | None


def _parameters(words: list[str], *, esmtp: bool) -> list[_Parameter] | Reply:
    """Read the parameters behind a path (RFC 5321 4.1.2): keywords in upper case, values as they are."""
    found: list[_Parameter] = []
    for word in words:
        match = _PARAMETER.fullmatch(word)
        if match is None:
            return BAD_PARAMETER_SYNTAX
        if not esmtp:
            return replies.BAD_PARAMETER  # RFC 5321 4.1.1.11: HELO has agreed on none
        keyword = match[1].upper()
        if any(keyword == other.keyword for other in found):
            return _bad_value(keyword)
        found.append(_Parameter(keyword, match[2]))
    return found


def _not_offered(keyword: str) -> Reply:
    return Reply(555, "5.5.4", f"Parameter {keyword} is not known or not offered")  # RFC 5321 4.1.1.11


def _bad_value(keyword: str) -> Reply:
    return Reply(501, "5.5.4", f"Bad value of parameter {keyword}")


def _is_offered(keyword: str, offer: Extensions, *, tls: bool) -> bool:
    """Say whether a parameter of MAIL belongs to an extension that is offered now."""
    return {
        "SIZE": True,
        "BODY": offer.eightbitmime or (offer.chunking and offer.binarymime),
        "SMTPUTF8": offer.smtputf8,
        "RET": offer.dsn,
        "ENVID": offer.dsn,
        "AUTH": bool(offer.mechanisms),
        "REQUIRETLS": offer.requiretls and tls,
    }.get(keyword, False)


def _mail_parameters(found: list[_Parameter], offer: Extensions, *, tls: bool) -> MailParameters | Reply:
    """Check the parameters of MAIL and return them by name."""
    values: dict[str, object] = {}
    for keyword, value in found:
        if not _is_offered(keyword, offer, tls=tls):
            return _not_offered(keyword)
        answer = _MAIL_CHECKS[keyword](value, offer)
        if isinstance(answer, Reply):
            return answer
        if answer is None:
            return _bad_value(keyword)
        name, checked = answer
        values[name] = checked
    return MailParameters(**values) if values else NO_PARAMETERS  # type: ignore[arg-type]  # names and types agree in _MAIL_CHECKS


_Checked = tuple[str, object] | Reply | None


def _check_size(value: str | None, offer: Extensions) -> _Checked:
    """SIZE=1*20DIGIT (RFC 1870 5), refused when it is above the limit (6.1)."""
    if value is None or not (value.isascii() and value.isdecimal()) or len(value) > 20:
        return None
    return replies.TOO_BIG if int(value) > offer.max_size > 0 else ("size", int(value))


def _check_body(value: str | None, offer: Extensions) -> _Checked:
    """BODY=7BIT, 8BITMIME (RFC 6152 2) or BINARYMIME (RFC 3030 3)."""
    body_type = (value or "").upper()
    if body_type not in ("7BIT", "8BITMIME", "BINARYMIME"):
        return None
    if (body_type == "8BITMIME" and not offer.eightbitmime) or (
        body_type == "BINARYMIME" and not (offer.chunking and offer.binarymime)
    ):
        return _not_offered(f"BODY={body_type}")
    return ("body_type", body_type)


def _check_flag(name: str) -> Callable[[str | None, Extensions], _Checked]:
    """SMTPUTF8 (RFC 6531 3.1) and REQUIRETLS (RFC 8689 2) have no value."""
    return lambda value, _: (name, True) if value is None else None


def _check_ret(value: str | None, _: Extensions) -> _Checked:
    """RET=FULL or HDRS (RFC 3461 4.3)."""
    ret = (value or "").upper()
    return ("ret", ret) if ret in ("FULL", "HDRS") else None


def _check_envid(value: str | None, _: Extensions) -> _Checked:
    """ENVID=xtext of at most 100 characters (RFC 3461 4.4)."""
    return ("envid", value) if value and len(value) <= MAX_ENVID and decode_xtext(value) is not None else None


def _check_auth(value: str | None, _: Extensions) -> _Checked:
    """AUTH=<> or a mailbox in xtext (RFC 4954 5)."""
    if value == "<>":
        return ("auth", "")
    decoded = decode_xtext(value) if value else None
    return ("auth", decoded) if decoded else None


_MAIL_CHECKS: Final[dict[str, Callable[[str | None, Extensions], _Checked]]] = {
    "SIZE": _check_size,
    "BODY": _check_body,
    "SMTPUTF8": _check_flag("smtputf8"),
    "RET": _check_ret,
    "ENVID": _check_envid,
    "AUTH": _check_auth,
    "REQUIRETLS": _check_flag("requiretls"),
}


def _rcpt(path: Path, found: list[_Parameter], offer: Extensions, *, smtputf8: bool) -> Rcpt | Reply:
    """Check the parameters of RCPT and return the event."""
    notify: frozenset[str] | None = None
    orcpt: str | None = None
    for keyword, value in found:
        if keyword not in ("NOTIFY", "ORCPT") or not offer.dsn:
            return _not_offered(keyword)
        if keyword == "NOTIFY":
            notify = _notify(value)
            if notify is None:
                return _bad_value(keyword)
        else:
            orcpt = _orcpt(value, smtputf8=smtputf8)
            if orcpt is None:
                return _bad_value(keyword)
    return Rcpt(Recipient(path, notify, orcpt))


def _notify(value: str | None) -> frozenset[str] | None:
    """NOTIFY=NEVER, or a list of SUCCESS, FAILURE, DELAY (RFC 3461 4.1)."""
    words = (value or "").upper().split(",")
    if words == ["NEVER"] or all(word in ("SUCCESS", "FAILURE", "DELAY") for word in words):
        return frozenset(words)
    return None


def _orcpt(value: str | None, *, smtputf8: bool) -> str | None:
    """ORCPT=addr-type;xtext (RFC 3461 4.2), or utf-8;... under SMTPUTF8 (RFC 6533 3)."""
    match = _ORCPT.fullmatch(value or "")
    if match is None or value is None or len(value.encode()) > MAX_ORCPT:
        return None
    if match[1].lower() == "utf-8":
        return value if smtputf8 or match[2].isascii() else None
    return value if decode_xtext(match[2]) is not None else None


def decode_xtext(text: str) -> str | None:
    """Decode xtext (RFC 3461 4); None when it is none, or does not decode to printable ASCII."""
    if not _XTEXT.fullmatch(text):
        return None
    decoded = _HEX.sub(lambda match: chr(int(match[1], 16)), text)
    return decoded if decoded.isascii() and decoded.isprintable() else None


def encode_xtext(text: str) -> str:
    """Encode ASCII text as xtext (RFC 3461 4)."""
    return "".join(c if "!" <= c <= "~" and c not in "+=" else f"+{ord(c):02X}" for c in text)
