"""Recipients that ask for a fault, without a plan.

GRAMMAR is printed by `penstock sink --describe-faults`. An ordinary recipient costs one comparison of its beginning
with those of the magic ones, in compiled code (`SessionCore.watched_prefixes`).
"""

from __future__ import annotations

import re
from typing import Any, Final

from penstock.sink.faults import Rule
from penstock.sink.memory import Memory
from penstock.sink.plan import DelaySettings, GreylistSettings, MatchSettings, RuleSettings

GRAMMAR: Final = """\
Magic recipients need no plan; the local part asks for the fault, in lower case, whatever the domain:

    [PHASE-]FAULT[+ANYTHING]@domain

PHASE    rcpt (when it is left out), data, body (right behind the 354) or dot (the end of the text)
FAULT    CODE              4yz or 5yz: 450@, dot-451@, data-452@; 421 ends the connection
         CODE-STATUS       550-5.1.1@, dot-552-5.2.2@
         delay-N[ms|s]     delay-2s@, dot-delay-500ms@: the reply comes so much later, at most an hour
         drop  reset       the connection is closed, or reset (RST), in the place of the reply
         half-close        the server says nothing more, and reads on
         stall[-N[ms|s]]   silence, then the connection is closed
         greylist[-N[ms|s]]  451 4.7.1 until so long after the first attempt [60s]
         flaky-N           451 4.3.0 for N in a hundred attempts, by the seed
         slow-N            from now on so many octets a second are read
         garbage           the reply is none

With several of them in a message, what the plan says comes first, then each recipient in its order: delays add up,
and the first verdict counts. Other recipients are taken as ever, and so is what only looks like magic (452x@).
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
"""How the local parts of magic recipients begin."""

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
"""Seconds of a greylist that names none."""
_MOST_KNOWN: Final = 4096


class Magic:
    """Reads recipients, and keeps the rules that they ask for: a greylist has something to remember."""

    def __init__(self) -> None:
        self._known: Memory[Rule | None] = Memory(_MOST_KNOWN)

    def rule(self, local: str) -> Rule | None:
        """Return the rule that a local part asks for; None when it asks for nothing."""
        asked = local.partition("+")[0]
        if asked in self._known:
            return self._known.get(asked, None)
        settings = settings_of(asked)
        rule = None if settings is None else Rule("magic", settings, _MOST_KNOWN)
        self._known.put(asked, rule)
        return rule


def settings_of(asked: str) -> RuleSettings | None:
    """Return the rule that a local part up to its "+" asks for; None when it asks for nothing."""
    found = _SHAPE.match(asked)
    does = None if found is None else _wish(found.groupdict())
    if found is None or does is None:
        return None
    try:
        phase: Any = found["phase"] or "rcpt"
        return RuleSettings(phase=phase, **does)
    except ValueError:  # the status is of another class than the code, or the phase knows no such fault
        return None


def _wish(asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the keys of a rule; None when there is none like that."""
    if asked["code"]:
        return {"reply": f"{asked['code']} {asked['status'] or asked['code'][0] + '.0.0'} As the recipient asks for"}
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
