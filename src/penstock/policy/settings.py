"""The `[policy]` tables: one settings class for each built-in check."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

Mode = Literal["off", "monitor", "enforce"]
_MODE: Final = (
    "off: the check is not made; monitor: its result is journaled and in the header, without other effect; "
    "enforce: its verdict counts. If absent: the mode of [policy]"
)
OwnMode = Annotated[Mode | None, Meta(description=_MODE)]
LOOPBACK: Final = ("127.0.0.0/8", "::1")
_ZONE: Final = re.compile(r"(?=.{1,200}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_-]{1,63})*")


class SpfSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SPF (RFC 7208): may this client send for the domain of the sender? Refuses on its own only without DMARC."""

    mode: OwnMode = None


class DkimSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """DKIM (RFC 6376): the signatures of a message."""

    mode: OwnMode = None
    require_aligned: Annotated[
        bool, Meta(description="Refuse messages without a valid signature of their From domain, or one above or below")
    ] = False


class DmarcActions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The action after a fail of DMARC, for each policy that a domain can publish."""

    reject: Literal["reject", "quarantine", "accept"] = "reject"
    quarantine: Literal["reject", "quarantine", "accept"] = "quarantine"
    none: Literal["reject", "quarantine", "accept"] = "accept"


class DmarcSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """DMARC (RFC 9989): the policy of the From domain for mail that is not authenticated."""

    mode: OwnMode = None
    on_fail: Annotated[DmarcActions, Meta(description="Action for each policy of a domain")] = DmarcActions()
    temperror: Annotated[
        Literal["defer", "accept"],
        Meta(description="Action if a result that could refuse the message is temporarily unavailable; defer: 451"),
    ] = "defer"
    reports: Annotated[
        Literal["off", "daily"],
        Meta(description="daily: send aggregate reports (RFC 9990) to the domains that ask for them; needs contact"),
    ] = "off"
    contact: Annotated[str, Meta(description="Sender of the reports, and address for questions about them")] = ""
    trusted_sealers: Annotated[
        tuple[str, ...],
        Meta(
            max_length=1000,
            description="Domains (d=) whose ARC seals are trusted (RFC 8617): the header says arc=pass "
            "policy.sealers=trusted if all seals of a message are theirs, else untrusted. They decide nothing",
        ),
    ] = ()


class FcrdnsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forward-confirmed reverse DNS: a name of the client's address resolves to that address (iprev, RFC 8601)."""

    mode: OwnMode = None
    score: Annotated[
        float, Meta(ge=-1000, le=1000, description="Added to the score if no name resolves to the address")
    ] = 0.0


class PregreetSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Refuse clients that send data before the greeting. Networks that have passed do not wait again."""

    mode: OwnMode = None
    wait: Annotated[float, Meta(gt=0, le=60, description="Seconds before the greeting")] = 2.0
    remember: Annotated[
        float, Meta(ge=0, le=31_536_000, description="Seconds for which a network that has passed does not wait")
    ] = 604_800.0


class DnsblSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list of addresses in the DNS (RFC 5782): a blocklist, or with negative scores a list of good senders."""

    zone: Annotated[str, Meta(min_length=1, description="Domain of the list")]
    mode: OwnMode = None
    answers: Annotated[
        dict[str, float],
        Meta(
            description='Scores by answer: "127.0.0.2", "127.0.0.2-127.0.0.9" or "127.0.*.1-3"; several that match are '
            "added up. Answers outside 127.0.0.0/8, 127.0.0.1 and 127.255.255.* are errors and never count. If empty: "
            '"127.0.0.2-127.0.0.254" = 10.0'
        ),
    ] = {}


class DnsblAtSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where listed clients are refused."""

    reject: Annotated[
        Literal["rcpt", "connect"],
        Meta(description="rcpt: at RCPT, except for postmaster@ and abuse@; connect: in place of the greeting"),
    ] = "rcpt"


class GreylistSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greylisting: an unknown client receives 451; programs that send spam often do not try again.

    What has passed once is recognized by the network of the client (IPv4 /24, IPv6 /64), the sender and the recipient,
    or by the domain that SPF has authenticated. Durations are a number with a unit: s, m, h, d or w.
    """

    mode: OwnMode = None
    when: Annotated[
        Literal["suspicious", "always"],
        Meta(
            description="suspicious: clients with a score of at least 2, without a name that resolves to their "
            "address (policy.fcrdns), or whose domain has no SPF record; always: all clients. DKIM does not matter: "
            "it is not known at RCPT, where greylisting is decided"
        ),
    ] = "suspicious"
    delay: Annotated[str, Meta(description="Time after which another attempt passes")] = "60s"
    window: Annotated[str, Meta(description="Time after which an attempt that was not repeated is forgotten")] = "2d"
    remember: Annotated[str, Meta(description="Time for which what has passed is not delayed again")] = "35d"


RateKey = Literal["network", "sender", "sender_domain", "recipient", "identity", "listener"]
RateCount = Literal["connections", "messages", "recipients", "octets", "null_senders", "refused"]


class RateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rate limit: at most `limit` units at once, refilled evenly over its period. Excess is deferred with 450.

    A limit by identity is for authenticated clients, all others for the clients that are judged. Only what is accepted
    counts, except for connections and refused.
    """

    mode: OwnMode = None
    by: Annotated[
        tuple[RateKey, ...],
        Meta(
            min_length=1,
            max_length=6,
            description="What is limited: network (IPv4 address or IPv6 /64), sender, sender_domain, recipient, "
            "identity (the authenticated user), listener; each combination of several has a limit of its own",
        ),
    ]
    count: Annotated[
        RateCount,
        Meta(
            description="connections, messages, recipients, octets, null_senders (messages with an empty sender), or "
            "refused (commands and messages that a check has refused)"
        ),
    ] = "messages"
    limit: Annotated[str, Meta(description='"100/h", "2000/10m", "500M/d": units per period; s, m, h, d or w')]


Fail = Annotated[
    Literal["defer", "accept"],
    Meta(description="If it is unavailable: defer mail with 451, or accept it without this check"),
]
Deadline = Annotated[float, Meta(gt=0, le=600, description="Maximum seconds for all its answers about a message")]
ConnectTime = Annotated[float, Meta(gt=0, le=600, description="Maximum seconds to connect to it")]
FilterAddress = Annotated[
    str | tuple[str, ...],
    Meta(description="inet:HOST:PORT or unix:/path; the addresses of an array are tried in turn"),
]


class MilterSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mail filter that speaks the milter protocol, version 6: rspamd, opendkim, clamav-milter and others."""

    mode: OwnMode = None
    address: FilterAddress
    fail: Fail = "defer"
    deadline: Deadline = 30.0
    connect: ConnectTime = 10.0


class RspamdSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rspamd over HTTP: a worker of type "normal"."""

    mode: OwnMode = None
    url: Annotated[str, Meta(description="http://HOST:PORT")] = "http://127.0.0.1:11333"
    scores: Annotated[bool, Meta(description="Add its score to that of the other checks")] = True
    verdict: Annotated[
        bool,
        Meta(
            description="Apply its actions: reject (550 5.7.1), soft reject and greylist (451 4.7.1), add header and "
            "rewrite subject (quarantine)"
        ),
    ] = False
    fail: Fail = "defer"
    deadline: Deadline = 30.0
    connect: ConnectTime = 10.0


class DelegateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy server that speaks Postfix's policy delegation protocol: postgrey, policyd-spf, postfwd and others."""

    mode: OwnMode = None
    address: FilterAddress
    at: Annotated[
        Literal["connect", "helo", "mail", "rcpt", "message"],
        Meta(description="When it is asked; message: at the end of the data, with the size and number of recipients"),
    ] = "rcpt"
    fail: Fail = "defer"
    deadline: Deadline = 30.0
    connect: ConnectTime = 10.0


class SenderLoginSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which senders an authenticated user may use. Others are refused with 553 5.7.1; the null sender is allowed."""

    mode: OwnMode = None
    file: Annotated[
        str,
        Meta(
            description='File with lines "USER: ADDRESS, @DOMAIN ...", * for every sender; relative to data_dir, read '
            "again when it changes. Without it, and besides it, users may use the address that is their name"
        ),
    ] = ""
    check_from: Annotated[
        bool, Meta(description="Also check the addresses of the From field; refused with 550 5.7.1")
    ] = True


class SignSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A DKIM key: mail of authenticated and trusted clients whose From is in the domain, or below it, is signed.

    Several tables of one domain make several signatures, such as one with RSA and one with Ed25519.
    """

    domain: Annotated[str, Meta(min_length=1, description="d= of the signature")]
    selector: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*$",
            description="s= of the signature: the key is at SELECTOR._domainkey.DOMAIN",
        ),
    ]
    key: Annotated[str, Meta(min_length=1, description="PEM file with an RSA or Ed25519 key, relative to data_dir")]


class PolicySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Built-in checks. A check is made when its table is present; SPF, DKIM and DMARC unless their mode is off."""

    mode: Annotated[Mode, Meta(description="Mode of checks without one of their own: off, monitor or enforce")] = (
        "monitor"
    )
    trusted: Annotated[
        tuple[str, ...], Meta(description="Networks whose clients are not judged; authenticated clients never are")
    ] = LOOPBACK
    reject_above: Annotated[
        float, Meta(gt=0, le=100_000, description="Score of all checks at which a message is refused")
    ] = 10.0
    quarantine_above: Annotated[
        float, Meta(gt=0, le=100_000, description="Score of all checks at which a message is quarantined")
    ] = 6.0
    quarantine: Annotated[
        str,
        Meta(
            description="tag: deliver with X-Spam-Flag and X-Spam-Score; hold: keep in the spool until `penstock spool "
            "release`; route:NAME: send to the next hop of the route of this name"
        ),
    ] = "tag"
    spf: SpfSettings | None = None
    dkim: DkimSettings | None = None
    dmarc: DmarcSettings | None = None
    fcrdns: FcrdnsSettings | None = None
    pregreet: PregreetSettings | None = None
    dnsbl: Annotated[tuple[DnsblSettings, ...], Meta(max_length=64, description="May be repeated.")] = ()
    dnsbl_at: DnsblAtSettings = DnsblAtSettings()
    greylist: GreylistSettings | None = None
    rate: Annotated[tuple[RateSettings, ...], Meta(max_length=64, description="May be repeated.")] = ()
    milter: Annotated[tuple[MilterSettings, ...], Meta(max_length=16, description="May be repeated.")] = ()
    rspamd: RspamdSettings | None = None
    delegate: Annotated[tuple[DelegateSettings, ...], Meta(max_length=16, description="May be repeated.")] = ()
    sender_login: SenderLoginSettings | None = None
    sign: Annotated[tuple[SignSettings, ...], Meta(max_length=1000, description="May be repeated.")] = ()

    def mode_of(self, check: object, *, by_default: bool = False) -> Mode:
        """Return the mode of a check by its table; `by_default`: it is also made without a table."""
        if check is None:
            return self.mode if by_default else "off"
        own: Mode | None = getattr(check, "mode", None)
        return self.mode if own is None else own


def is_zone(text: str) -> bool:
    """Return whether a text can be the domain of a list."""
    return _ZONE.fullmatch(text) is not None


DEFAULT: Final = PolicySettings()
"""That of public listeners with `domains`, without a [policy] table: SPF, DKIM and DMARC in monitor mode."""
