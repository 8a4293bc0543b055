"""The grammar of arguments (RFC 5321 4.1.2): octets in, a checked event or the refusal out. No function here raises.

Almost every MAIL and RCPT is `FROM:<dot-string@domain>`, perhaps with SIZE and BODY. Those are read by compiled code
(ext/grammar.pyx). All others are read here: first the path is cut out, then the parameters are read, because they tell
whether the path may be UTF-8, then the path is checked.

Local parts and paths have no limit of their own: the lengths in RFC 5321 4.5.3.1 are what every server must accept, and
forwarding services use longer ones. The length of the command line bounds them. Domains keep the limits of the DNS.

Two modes
---------
`Extensions.tolerant_addresses` chooses between the syntax of the RFCs and what mail servers accept in practice. The
tolerant mode also accepts

- paths without angle brackets, as Postfix does unless strict_rfc821_envelopes is set,
- local parts with dots at the start, at the end or in a row,
- domains with underscores or one trailing dot (which is removed),
- `MAIL FROM:<root>`, a sender without a domain,
- xtext with lower-case hexadecimal digits or an = (brought into the strict form, because the next hop may be strict),
- parameters that are only hints (RET, ENVID, AUTH, NOTIFY, ORCPT) when they are not offered or malformed: ignored,
- EHLO names of several words or with unusual characters.

Events name what was tolerated. Control characters, unbalanced quotes and a second unquoted @ are refused in both modes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from penstock import reply as replies
from penstock.addresses import UNSAFE_CHARACTERS, domain_of, is_domain, literal_of
from penstock.message import NO_PARAMETERS, NULL_PATH, MailParameters, Path, Recipient
from penstock.reply import Reply
from penstock.smtp._grammar import BAD_RECIPIENT, BAD_SENDER
from penstock.smtp.events import Mail, Rcpt
from penstock.smtp.extensions import Extensions

SENDER_NOT_ASCII: Final = Reply(553, "5.6.7", "A sender address that is not ASCII needs SMTPUTF8")
RECIPIENT_NOT_ASCII: Final = Reply(553, "5.6.7", "A recipient address that is not ASCII needs SMTPUTF8")
FROM_EXPECTED: Final = Reply(501, "5.5.4", "Syntax: MAIL FROM:<address> [parameters]")
TO_EXPECTED: Final = Reply(501, "5.5.4", "Syntax: RCPT TO:<address> [parameters]")
BAD_HELLO: Final = Reply(501, "5.5.4", "Syntax: one domain or address literal")
BAD_PARAMETER_SYNTAX: Final = Reply(501, "5.5.4", "A parameter is KEYWORD or KEYWORD=value")

MAX_HELLO: Final = 255
"""Octets of the argument of EHLO: a domain has no more (RFC 5321 4.5.3.1.2)."""
MAX_ENVID: Final = 100  # RFC 3461 4.4
MAX_ORCPT: Final = 500  # RFC 3461 4.2

# Irregularities that the tolerant mode accepts, as events and metrics name them.
BLANK_AFTER_COLON: Final = "blank-after-colon"
MISSING_BRACKETS: Final = "missing-brackets"
LOCAL_PART_DOTS: Final = "local-part-dots"
DOMAIN_UNDERSCORE: Final = "domain-underscore"
DOMAIN_TRAILING_DOT: Final = "domain-trailing-dot"
NO_DOMAIN: Final = "no-domain"
IRREGULAR_XTEXT: Final = "irregular-xtext"
IGNORED_PARAMETER: Final = "ignored-parameter"
TOLERATED: Final = (
    BLANK_AFTER_COLON,
    MISSING_BRACKETS,
    LOCAL_PART_DOTS,
    DOMAIN_UNDERSCORE,
    DOMAIN_TRAILING_DOT,
    NO_DOMAIN,
    IRREGULAR_XTEXT,
    IGNORED_PARAMETER,
)
"""All of them."""

_ATEXT: Final = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_UTF8: Final = rf"(?:(?![{UNSAFE_CHARACTERS}])[\u0080-\U0010ffff])"
_DOT_STRING: Final = re.compile(rf"[{_ATEXT}]+(?:\.[{_ATEXT}]+)*")
_UTF8_DOT_STRING: Final = re.compile(rf"(?:[{_ATEXT}]|{_UTF8})+(?:\.(?:[{_ATEXT}]|{_UTF8})+)*")
_DOTS: Final = re.compile(r"\.+")
_QUOTED: Final = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*)"')
_UTF8_QUOTED: Final = re.compile(rf'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|{_UTF8}|\\[\x20-\x7e])*)"')
_PARAMETER: Final = re.compile(rf"([A-Za-z0-9][A-Za-z0-9-]*)(?:=((?:[\x21-\x7e]|{_UTF8})*))?")
_XTEXT: Final = re.compile(r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x7e]|\+[0-9A-Fa-f]{2})*")
_HEX: Final = re.compile(r"\+([0-9A-Fa-f]{2})")
_ORCPT: Final = re.compile(r"([A-Za-z0-9-]+);(.+)")
_HELLO: Final = re.compile(rb"[\x21-\x7e]{1,255}")
_TOLERANT_HELLO: Final = re.compile(rf"(?:[\x20-\x7e]|{_UTF8})+")


class _Notes:
    """The irregularities that were tolerated in one argument."""

    def __init__(self, offer: Extensions) -> None:
        self.is_tolerant = offer.tolerant_addresses
        self.kinds: tuple[str, ...] = ()

    def tolerate(self, kind: str) -> bool:
        """Note an irregularity and return whether it is tolerated."""
        if self.is_tolerant and kind not in self.kinds:
            self.kinds += (kind,)
        return self.is_tolerant


# ---- HELO EHLO LHLO


def parse_hello_name(argument: bytes, *, tolerant: bool = True) -> str | Reply:
    r"""Return the name a client gives itself, or the refusal.

    A name that is not a domain is no reason to refuse mail (RFC 5321 4.1.4). The strict mode accepts one printable
    ASCII word, the tolerant mode all printable text; octets that are not UTF-8 become `\xNN`. Both accept at most 255
    octets and no control characters.
    """
    if _HELLO.fullmatch(argument):
        return argument.decode("ascii")
    if not tolerant or len(argument) > MAX_HELLO:
        return BAD_HELLO
    text = argument.decode("utf-8", "backslashreplace")
    return text if _TOLERANT_HELLO.fullmatch(text) and not text.isspace() else BAD_HELLO


# ---- MAIL


def parse_mail(argument: bytes, offer: Extensions, *, esmtp: bool, tls: bool) -> Mail | Reply:
    """Read the argument of MAIL (RFC 5321 4.1.1.2)."""
    notes = _Notes(offer)
    split = _split(argument, "FROM:", FROM_EXPECTED, BAD_SENDER, notes)
    if isinstance(split, Reply):
        return split
    mailbox, words = split
    found = _parameters(words, _MAIL_HINTS, notes, esmtp=esmtp)
    if isinstance(found, Reply):
        return found
    parameters = _mail_parameters(found, offer, notes, tls=tls)
    if isinstance(parameters, Reply):
        return parameters
    if not mailbox:
        return Mail(NULL_PATH, parameters, notes.kinds)  # RFC 5321 4.5.5
    if "@" in mailbox:
        path = _mailbox(mailbox, notes, smtputf8=parameters.smtputf8)
    else:
        path = _without_domain(mailbox, offer.own_domain, notes, smtputf8=parameters.smtputf8)
    if path is None:
        return BAD_SENDER if mailbox.isascii() or parameters.smtputf8 else SENDER_NOT_ASCII
    return Mail(path, parameters, notes.kinds)


# ---- RCPT


def parse_rcpt(argument: bytes, offer: Extensions, *, esmtp: bool, smtputf8: bool) -> Rcpt | Reply:
    """Read the argument of RCPT (RFC 5321 4.1.1.3). `smtputf8`: the MAIL of the transaction requested it."""
    notes = _Notes(offer)
    split = _split(argument, "TO:", TO_EXPECTED, BAD_RECIPIENT, notes)
    if isinstance(split, Reply):
        return split
    mailbox, words = split
    found = _parameters(words, _RCPT_HINTS, notes, esmtp=esmtp)
    if isinstance(found, Reply):
        return found
    path: Path | None
    if mailbox.lower() == "postmaster":  # RFC 5321 4.1.1.3: the one recipient without a domain
        path = _qualified(mailbox, mailbox, offer.own_domain)
    else:
        path = _mailbox(mailbox, notes, smtputf8=smtputf8)
    if path is None:
        return BAD_RECIPIENT if mailbox.isascii() or smtputf8 else RECIPIENT_NOT_ASCII
    return _rcpt(path, found, offer, notes, smtputf8=smtputf8)


# ---- paths


def _split(argument: bytes, word: str, expected: Reply, bad: Reply, notes: _Notes) -> tuple[str, list[str]] | Reply:
    """Split `FROM:<path> A=1 B` into the mailbox, without brackets and source route, and the parameters."""
    try:
        text = argument.decode()
    except UnicodeDecodeError:
        return bad
    if text[: len(word)].upper() != word:
        return expected
    text = text[len(word) :]
    if text.startswith((" ", "\t")):  # RFC 5321 3.3 forbids these blanks, and clients send them
        text = text.lstrip(" \t")
        if not notes.tolerate(BLANK_AFTER_COLON):
            return bad
    if not text.startswith("<"):
        mailbox, _, rest = text.partition(" ")
        if not mailbox or "<" in mailbox or ">" in mailbox or not notes.tolerate(MISSING_BRACKETS):
            return bad
        return mailbox, [word for word in rest.split(" ") if word]
    end = _end_of_path(text)
    if end < 0:
        return bad
    mailbox = text[1:end]
    if mailbox.startswith("@"):  # RFC 5321 4.1.1.3, appendix C: a source route is ignored
        route, colon, mailbox = mailbox.partition(":")
        hops = route.split(",")
        if not colon or not mailbox or not all(_is_hop(hop, underscores=notes.is_tolerant) for hop in hops):
            return bad
    rest = text[end + 1 :]
    if rest and not rest.startswith((" ", "\t")):
        return BAD_PARAMETER_SYNTAX
    return mailbox, rest.replace("\t", " ").strip(" ").split(" ") if rest.strip(" \t") else []


def _is_hop(text: str, *, underscores: bool) -> bool:
    return text[:1] == "@" and is_domain(text[1:], underscores=underscores)


def _end_of_path(text: str) -> int:
    """Return the index of the > that ends a path, which is not inside quotes; -1 if it is missing."""
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


def parse_mailbox(text: str, *, smtputf8: bool, tolerant: bool = False) -> Path | None:
    """Read `local-part@domain` (RFC 5321 4.1.2, RFC 6531 3.3). Return None when it is not a mailbox."""
    return _mailbox(text, _Notes(_TOLERANT if tolerant else _STRICT), smtputf8=smtputf8)


_TOLERANT: Final = Extensions()
_STRICT: Final = Extensions(tolerant_addresses=False)


def _mailbox(text: str, notes: _Notes, *, smtputf8: bool) -> Path | None:
    local_text, at, domain_text = text.rpartition("@")
    if not at:
        return None
    if text.endswith("]"):  # a general address literal may contain an @
        start = text.rfind("@[")
        if start < 0:
            return None
        local_text, domain_text = text[:start], text[start + 1 :]
    if domain_text.endswith(".") and notes.is_tolerant:
        text, domain_text = text[:-1], domain_text[:-1]
        notes.tolerate(DOMAIN_TRAILING_DOT)
    local = _local_part(local_text, notes, smtputf8=smtputf8)
    domain = _domain(domain_text, notes, smtputf8=smtputf8)
    return None if local is None or domain is None else Path(text, local, domain)


def _local_part(text: str, notes: _Notes, *, smtputf8: bool) -> str | None:
    """Return a local part without its quotes, None when it is not one."""
    pattern = _UTF8_DOT_STRING if smtputf8 else _DOT_STRING
    if pattern.fullmatch(text):
        return text
    if notes.is_tolerant and pattern.fullmatch(_DOTS.sub(".", text).strip(".")):
        notes.tolerate(LOCAL_PART_DOTS)
        return text
    quoted = (_UTF8_QUOTED if smtputf8 else _QUOTED).fullmatch(text)
    return None if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])


def _domain(text: str, notes: _Notes, *, smtputf8: bool) -> str | None:
    """Return the canonical form of a domain or address literal (penstock.addresses), None when it is neither."""
    if text.startswith("["):
        return literal_of(text)
    domain = domain_of(text, utf8=smtputf8, underscores=notes.is_tolerant)
    if domain is not None and "_" in domain:
        notes.tolerate(DOMAIN_UNDERSCORE)
    return domain


def parse_domain(text: str, *, smtputf8: bool, tolerant: bool = False) -> str | None:
    """Return the canonical form of a domain or address literal, None when it is neither."""
    return _domain(text, _Notes(_TOLERANT if tolerant else _STRICT), smtputf8=smtputf8)


def _without_domain(text: str, own_domain: str, notes: _Notes, *, smtputf8: bool) -> Path | None:
    """Read a sender without a domain, as programs on a host send it: it is in our own domain, as in Postfix."""
    local = _local_part(text, notes, smtputf8=smtputf8)
    if local is None or not notes.tolerate(NO_DOMAIN):
        return None
    return _qualified(text, local, own_domain)


def _qualified(text: str, local: str, own_domain: str) -> Path:
    """Return the path of a local part in our own domain; without one, the path has no domain."""
    return Path(f"{text}@{own_domain}" if own_domain else text, local, own_domain)


# ---- parameters


class _Parameter(NamedTuple):
    keyword: str
    value: str | None


_MAIL_HINTS: Final = frozenset({"RET", "ENVID", "AUTH"})
_RCPT_HINTS: Final = frozenset({"NOTIFY", "ORCPT"})
"""Parameters that can be ignored; the others change how a message must be treated."""


def _parameters(words: list[str], hints: frozenset[str], notes: _Notes, *, esmtp: bool) -> list[_Parameter] | Reply:
    """Read the parameters after a path (RFC 5321 4.1.2): keywords in upper case, values unchanged."""
    found: dict[str, _Parameter] = {}
    for word in words:
        if not word:  # several blanks in a row
            continue
        match = _PARAMETER.fullmatch(word)
        if match is None:
            return BAD_PARAMETER_SYNTAX
        if not esmtp:
            return replies.BAD_PARAMETER  # RFC 5321 4.1.1.11: there are no extensions after HELO
        keyword = match[1].upper()
        if keyword in found:
            return _bad_value(keyword)
        value = match[2]
        if (value == "" or "=" in (value or "")) and not (keyword in hints and notes.is_tolerant):
            return BAD_PARAMETER_SYNTAX
        found[keyword] = _Parameter(keyword, value)
    return list(found.values())


_SHOWN: Final = 64
"""Characters of an unknown keyword that a reply repeats."""


def _not_offered(keyword: str) -> Reply:
    return Reply(555, "5.5.4", f"Parameter {keyword[:_SHOWN]} is not known or not offered")  # RFC 5321 4.1.1.11


def _bad_value(keyword: str) -> Reply:
    return Reply(501, "5.5.4", f"Bad value of parameter {keyword[:_SHOWN]}")


def _is_offered(keyword: str, offer: Extensions, *, tls: bool) -> bool:
    """Return whether a parameter of MAIL belongs to an extension that is offered now."""
    return {
        "SIZE": True,
        "BODY": offer.eightbitmime or (offer.chunking and offer.binarymime),
        "SMTPUTF8": offer.smtputf8,
        "RET": offer.dsn,
        "ENVID": offer.dsn,
        "AUTH": bool(offer.mechanisms),
        "REQUIRETLS": offer.requiretls and tls,
    }.get(keyword, False)


def _mail_parameters(found: list[_Parameter], offer: Extensions, notes: _Notes, *, tls: bool) -> MailParameters | Reply:
    """Check the parameters of MAIL and return them by name."""
    values: dict[str, object] = {}
    for keyword, value in found:
        is_offered = _is_offered(keyword, offer, tls=tls)
        answer = _MAIL_CHECKS[keyword](value, offer, notes) if is_offered else _not_offered(keyword)
        if not isinstance(answer, tuple):
            if keyword not in _MAIL_HINTS or not notes.tolerate(IGNORED_PARAMETER):
                return answer or _bad_value(keyword)
            continue
        name, checked = answer
        values[name] = checked
    return MailParameters(**values) if values else NO_PARAMETERS  # type: ignore[arg-type]  # names and types agree in _MAIL_CHECKS


_Checked = tuple[str, object] | Reply | None
"""The field of `MailParameters` and its value, a refusal, or None for a malformed value."""
_Check = Callable[[str | None, Extensions, _Notes], _Checked]


def _check_size(value: str | None, offer: Extensions, _: _Notes) -> _Checked:
    """SIZE=1*20DIGIT (RFC 1870 5), refused when it is above the limit (6.1)."""
    if value is None or not (value.isascii() and value.isdecimal()) or len(value) > 20:
        return None
    return replies.TOO_BIG if int(value) > offer.max_size > 0 else ("size", int(value))


def _check_body(value: str | None, offer: Extensions, _: _Notes) -> _Checked:
    """BODY=7BIT, 8BITMIME (RFC 6152 2) or BINARYMIME (RFC 3030 3)."""
    body_type = (value or "").upper()
    if body_type not in ("7BIT", "8BITMIME", "BINARYMIME"):
        return None
    if (body_type == "8BITMIME" and not offer.eightbitmime) or (
        body_type == "BINARYMIME" and not (offer.chunking and offer.binarymime)
    ):
        return _not_offered(f"BODY={body_type}")
    return ("body_type", body_type)


def _check_flag(name: str) -> _Check:
    """SMTPUTF8 (RFC 6531 3.1) and REQUIRETLS (RFC 8689 2) have no value."""
    return lambda value, _offer, _notes: (name, True) if value is None else None


def _check_ret(value: str | None, _: Extensions, _notes: _Notes) -> _Checked:
    """RET=FULL or HDRS (RFC 3461 4.3)."""
    ret = (value or "").upper()
    return ("ret", ret) if ret in ("FULL", "HDRS") else None


def _check_envid(value: str | None, _: Extensions, notes: _Notes) -> _Checked:
    """ENVID=xtext of at most 100 characters (RFC 3461 4.4)."""
    xtext = _xtext(value, notes) if value and len(value) <= MAX_ENVID else None
    return None if xtext is None else ("envid", xtext)


def _check_auth(value: str | None, _: Extensions, notes: _Notes) -> _Checked:
    """AUTH=<> or a mailbox in xtext (RFC 4954 5)."""
    if value == "<>":
        return ("auth", "")
    xtext = _xtext(value, notes) if value else None
    decoded = decode_xtext(xtext) if xtext else None
    return ("auth", decoded) if decoded else None


_MAIL_CHECKS: Final[dict[str, _Check]] = {
    "SIZE": _check_size,
    "BODY": _check_body,
    "SMTPUTF8": _check_flag("smtputf8"),
    "RET": _check_ret,
    "ENVID": _check_envid,
    "AUTH": _check_auth,
    "REQUIRETLS": _check_flag("requiretls"),
}


def _rcpt(path: Path, found: list[_Parameter], offer: Extensions, notes: _Notes, *, smtputf8: bool) -> Rcpt | Reply:
    """Check the parameters of RCPT and return the event."""
    notify: frozenset[str] | None = None
    orcpt: str | None = None
    for keyword, value in found:
        refusal: Reply | None = None
        if keyword not in ("NOTIFY", "ORCPT") or not offer.dsn:
            refusal = _not_offered(keyword)
        elif keyword == "NOTIFY":
            notify = _notify(value)
            refusal = _bad_value(keyword) if notify is None else None
        else:
            orcpt = _orcpt(value, notes, smtputf8=smtputf8)
            refusal = _bad_value(keyword) if orcpt is None else None
        if refusal is not None and (keyword not in _RCPT_HINTS or not notes.tolerate(IGNORED_PARAMETER)):
            return refusal
    return Rcpt(Recipient(path, notify, orcpt), notes.kinds)


def _notify(value: str | None) -> frozenset[str] | None:
    """NOTIFY=NEVER, or a list of SUCCESS, FAILURE, DELAY (RFC 3461 4.1)."""
    words = (value or "").upper().split(",")
    if words == ["NEVER"] or all(word in ("SUCCESS", "FAILURE", "DELAY") for word in words):
        return frozenset(words)
    return None


def _orcpt(value: str | None, notes: _Notes, *, smtputf8: bool) -> str | None:
    """ORCPT=addr-type;xtext (RFC 3461 4.2), or utf-8;... under SMTPUTF8 (RFC 6533 3)."""
    match = _ORCPT.fullmatch(value or "")
    if match is None or value is None or len(value.encode()) > MAX_ORCPT:
        return None
    if match[1].lower() == "utf-8":
        return value if smtputf8 or match[2].isascii() else None
    xtext = _xtext(match[2], notes)
    return None if xtext is None else f"{match[1]};{xtext}"


def _xtext(text: str, notes: _Notes) -> str | None:
    """Return xtext as RFC 3461 4 writes it, None when it is malformed.

    The tolerant mode accepts lower-case hexadecimal digits and an = (as in `SRS0=...`).
    """
    strict = _HEX.sub(lambda match: match[0].upper(), text.replace("=", "+3D"))
    if decode_xtext(strict) is None:
        return None
    return strict if strict == text or notes.tolerate(IRREGULAR_XTEXT) else None


def decode_xtext(text: str) -> str | None:
    """Decode xtext (RFC 3461 4), with hexadecimal digits in either case.

    Return None when it is malformed, or does not decode to printable ASCII.
    """
    if not _XTEXT.fullmatch(text):
        return None
    decoded = _HEX.sub(lambda match: chr(int(match[1], 16)), text)
    return decoded if decoded.isascii() and decoded.isprintable() else None
