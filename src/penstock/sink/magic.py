"""Magic recipients: addresses that request a fault, without a plan.

`penstock sink --describe-faults` prints GRAMMAR. For ordinary recipients, compiled code only compares the beginning of
the local part with WATCHED_PREFIXES.
"""

from __future__ import annotations

import re
from typing import Any, Final

from penstock.sink.faults import Rule
from penstock.sink.memory import Memory
from penstock.sink.plan import DelaySettings, GreylistSettings, MatchSettings, RuleSettings

GRAMMAR: Final = """\
Magic recipients request a fault without a plan. The local part, in lower case, names the fault; any domain is allowed:

    [PHASE-]FAULT[+ANYTHING]@domain

PHASE    rcpt (default), data, body (right after the 354) or dot (end of the text)
FAULT    CODE              4xx or 5xx reply: 450@, dot-451@, data-452@; 421 also closes the connection
         CODE-STATUS       550-5.1.1@, dot-552-5.2.2@
         delay-N[ms|s]     delay the reply: delay-2s@, dot-delay-500ms@; at most one hour
         drop  reset       close or reset (RST) the connection instead of a reply
         half-close        send FIN, then read on
         stall[-N[ms|s]]   send nothing, then close the connection
         greylist[-N[ms|s]]  451 4.7.1 until N after the first attempt [60s]
         flaky-N           451 4.3.0 for N percent of the attempts, by the seed
         slow-N            read N octets per second from now on
         garbage           send random octets instead of a reply

If a message has several of them, the rules of the plan come first, then each recipient in order: delays add up, and the
first verdict counts. Other recipients are accepted, and so are those that only look like magic ones (452x@).
"""

WATCHED_PREFIXES: Final = (
    "4",
    "5",
    "delay-",
    "drop",
    "reset",
    "half-close",
    "stall",
    "greylist",
    "flaky-",
    "slow-",
    "garbage",
    "rcpt-",
    "data-",
    "body-",
    "dot-",
)
"""Beginnings of the local parts of magic recipients."""

_SHAPE: Final = re.compile(
    r"(?:(?P<phase>rcpt|data|body|dot)-)?"
    r"(?:(?P<code>[45][0-9]{2})(?:-(?P<status>[45](?:\.[0-9]{1,3}){2}))?"
    r"|(?P<end>drop|reset|half-close)"
    r"|(?P<timed>delay|stall|greylist)(?:-(?P<number>[0-9]{1,7})(?P<unit>ms|s)?)?"
    r"|flaky-(?P<flaky>[0-9]{1,3})"
    r"|slow-(?P<slow>[1-9][0-9]{0,8})"
    r"|(?P<garbage>garbage))\Z",
    re.ASCII,
)
_LONGEST: Final = 3600.0
_GREYLISTED: Final = 60.0
"""Seconds of a greylist without a number."""
_MAX_KNOWN: Final = 4096


class Magic:
    """Parses recipients and caches their rules, because a greylist has state."""

    def __init__(self) -> None:
        self._known: Memory[Rule | None] = Memory(_MAX_KNOWN)

    def rule(self, local: str) -> Rule | None:
        """Return the rule that a local part requests; None for an ordinary recipient."""
        asked = local.partition("+")[0]
        if asked in self._known:
            return self._known.get(asked, None)
        settings = settings_of(asked)
        rule = None if settings is None else Rule("magic", settings, _MAX_KNOWN)
        self._known.put(asked, rule)
        return rule


def settings_of(asked: str) -> RuleSettings | None:
    """Return the rule that a local part, up to its "+", requests; None for an ordinary recipient."""
    found = _SHAPE.match(asked)
    does = None if found is None else _fault(found.groupdict())
    if found is None or does is None:
        return None
    try:
        phase: Any = found["phase"] or "rcpt"
        return RuleSettings(phase=phase, **does)
    except ValueError:  # the status does not fit the code, or the phase has no such fault
        return None


def _fault(asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the keys of the rule; None if the fault is invalid."""
    if asked["code"]:
        return {"reply": f"{asked['code']} {asked['status'] or asked['code'][0] + '.0.0'} Requested by the recipient"}
    if asked["end"]:
        return {"end": asked["end"]}
    if asked["garbage"]:
        return {"dress": "garbage"}
    if asked["slow"]:
        return {"read_rate": int(asked["slow"])}
    if asked["flaky"]:
        probability = int(asked["flaky"]) / 100
        return {"match": MatchSettings(probability=probability), "reply": "451"} if probability <= 1 else None
    return _timed(asked["timed"], asked["number"], asked["unit"])


def _timed(what: str, number: str | None, unit: str | None) -> dict[str, Any] | None:
    seconds = None if number is None else min(int(number) / (1000 if unit == "ms" else 1), _LONGEST)
    if what == "greylist":
        return {"greylist": GreylistSettings(wait=_GREYLISTED if seconds is None else seconds)}
    if what == "stall":
        return {"end": "stall"} if seconds is None else {"delay": DelaySettings(seconds=seconds), "end": "drop"}
    return None if seconds is None else {"delay": DelaySettings(seconds=seconds)}
