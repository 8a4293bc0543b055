"""Thresholds: conditions on a report that decide whether a run has passed, as in k6.

dot.p99<50ms      a latency: PHASE.STATISTIC, with a unit of us, ms or s
error_rate<0.1%   failed messages of all messages, as a percentage or a fraction
rate>=1000        accepted messages per second
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from penstock.load.counts import PHASES
from penstock.load.plan import PlanError
from penstock.load.units import milliseconds, parse_duration

STATISTICS: Final = ("p50", "p90", "p95", "p99", "p99.9", "max", "mean", "min")
"""Statistics of a phase. The keys in a report have _ in place of the dot."""
_OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip
_FORM: Final = re.compile(r"\s*([A-Za-z_]+)(?:\.([A-Za-z0-9.]+))?\s*(<=|>=|<|>)\s*(\S+)\s*", re.ASCII)
_NUMBER: Final = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(%|/s)?", re.ASCII)


class Result(NamedTuple):
    """What became of a threshold."""

    threshold: str
    value: float | None
    """The measured value in seconds, messages per second, or as a fraction; None if nothing was measured."""
    passed: bool
    shown: str
    """The value for a person."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A condition on a report."""

    text: str
    metric: str
    statistic: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read "dot.p99<50ms", "error_rate<0.1%" or "rate>=1000". Raise PlanError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise PlanError(f"a threshold looks like dot.p99<50ms, error_rate<0.1% or rate>=1000, not {text!r}")
        metric, statistic, sign, bound = found[1], found[2] or "", found[3], found[4]
        if metric in ("rate", "error_rate"):
            if statistic:
                raise PlanError(f"threshold {text!r}: {metric} has no statistics; write {metric}{sign}{bound}")
            return cls(text.strip(), metric, "", sign, _number(text, metric, bound))
        if metric not in PHASES:
            raise PlanError(
                f"threshold {text!r}: unknown metric {metric}; expected one of: {', '.join(PHASES)}, rate, error_rate"
            )
        if statistic not in STATISTICS:
            raise PlanError(
                f"threshold {text!r}: {metric} needs one of its statistics: "
                + ", ".join(f"{metric}.{name}" for name in STATISTICS)
            )
        try:
            return cls(text.strip(), metric, statistic.replace(".", "_"), sign, parse_duration(bound, needs_unit=True))
        except ValueError as exc:
            raise PlanError(f"threshold {text!r}: {exc}") from exc

    def check(self, report: Mapping[str, Any]) -> Result:
        """Compare a report with the threshold. What was not measured does not pass."""
        value: float | None
        if self.metric in ("rate", "error_rate"):
            value = report[self.metric]
        else:
            value = report["phases"].get(self.metric, {}).get(self.statistic)
        if value is None:
            return Result(self.text, None, False, "not measured")
        return Result(self.text, value, _OPERATORS[self.operator](value, self.bound), self._shown(value))

    def _shown(self, value: float) -> str:
        if self.metric == "rate":
            return f"{value:,.1f}/s"
        return f"{value:.3%}" if self.metric == "error_rate" else f"{milliseconds(value)} ms"


def _number(text: str, metric: str, bound: str) -> float:
    """Return the bound of a rate or of an error rate. Raise PlanError."""
    found = _NUMBER.fullmatch(bound)
    unit = "/s" if metric == "rate" else "%"
    if found is None or found[2] not in (None, unit):
        example = "rate>=1000" if metric == "rate" else "error_rate<0.1%"
        raise PlanError(f"threshold {text!r}: {bound!r} is not a bound of {metric}; write for example {example}")
    number = float(found[1]) / (100 if found[2] == "%" else 1)
    if metric == "error_rate" and number > 1:
        raise PlanError(f"threshold {text!r}: an error rate is at most 100%; without %, it is a fraction of 1")
    return number
