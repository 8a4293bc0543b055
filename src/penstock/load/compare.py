"""Comparison of two reports: what changed, and whether the change is more than noise.

Each value gets a bound of its noise, at about 95 %, taken from the run itself:

    percentiles   the order statistics that enclose the percentile (exact for independent messages)
    rate          the spread of the message latencies, of which a closed loop's rate is the inverse
    both          the spread of the values of the seconds, if there are at least five
    both          a floor of 10 % (p99: 20 %) for a run of one second, less with the square root of the seconds: the
                  least that runs on a quiet machine differ, of which one run knows nothing

The largest counts. The bound of a change is the root of the sum of both squares. A change within its bound is "same";
others are "better" or "worse".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev
from typing import Any, Final, Literal, NamedTuple

from penstock.load.counts import PHASES
from penstock.metrics._histogram import Histogram

Report = Mapping[str, Any]
Verdict = Literal["better", "worse", "same"]
_SIGMAS: Final = 1.96
"""Standard errors on either side that enclose 95 % of the cases."""
_FLOOR: Final = {"rate": 0.1, "p50": 0.1, "p99": 0.2}
"""The least relative noise of a run of one second."""
_MAX_FLOOR: Final = 0.5
_MIN_SECONDS: Final = 5
_WHOLE: Final = 0.9
"""A second of the timeline that is shorter is not compared with the others."""
_COLUMNS: Final = {
    ("dot", "p50"): "dot_p50",
    ("dot", "p99"): "dot_p99",
    ("message", "p50"): "p50",
    ("message", "p99"): "p99",
}
"""The judged latencies, and the columns of the timeline that have them by second."""
VERDICTS: Final = {
    "better": "The second run is better.",
    "worse": "The second run is worse.",
    "same": "No difference beyond the noise.",
    "mixed": "Some values are better, others worse.",
}


class Change(NamedTuple):
    """One value of two runs."""

    metric: str
    unit: Literal["messages", "messages/s", "s"]
    first: float
    second: float
    change: float | None
    """The relative change; None where the first value is 0."""
    noise: float | None
    """The bound of the noise, relative to the first value; None for values that are not judged."""
    verdict: Verdict | None


def compare(first: Report, second: Report) -> list[Change]:
    """Return the changes from the first run to the second."""
    changes = [
        _plain("accepted", first["accepted"], second["accepted"]),
        _plain("failed", *map(failed, (first, second))),
    ]
    bounds = _rate_noise(first), _rate_noise(second)
    changes.append(_judged("rate", "messages/s", first["rate"], second["rate"], bounds, is_more_better=True))
    for phase in PHASES:
        a, b = first["phases"].get(phase), second["phases"].get(phase)
        if a is None or b is None:
            continue
        for name in ("p50", "p99"):
            metric = f"{phase}.{name}"
            if (phase, name) in _COLUMNS:
                bounds = _latency_noise(first, phase, name), _latency_noise(second, phase, name)
                changes.append(_judged(metric, "s", a[name], b[name], bounds, is_more_better=False))
            else:
                changes.append(Change(metric, "s", a[name], b[name], _relative(a[name], b[name]), None, None))
    return changes


def regressions(changes: Sequence[Change], limit: float) -> list[Change]:
    """Return the judged values that became worse, beyond their noise, by more than a fraction."""
    return [each for each in changes if each.verdict == "worse" and (each.change is None or abs(each.change) > limit)]


def overall(changes: Sequence[Change]) -> Literal["better", "worse", "same", "mixed"]:
    """Return the verdict on all judged values."""
    verdicts = {each.verdict for each in changes} - {None, "same"}
    if not verdicts:
        return "same"
    return "mixed" if len(verdicts) > 1 else "worse" if "worse" in verdicts else "better"


def failed(report: Report) -> int:
    """Return how many messages were not accepted. Reports of earlier versions have no `unsent`."""
    count: int = report["refused"] + report["lost"] + report["dropped"] + report.get("unsent", 0)
    return count


def seconds_of(report: Report) -> list[dict[str, Any]]:
    """Return the timeline; rows of earlier versions are lists without the later columns."""
    names = ("second", "accepted", "failed", "sessions", "p50", "p99", "max")
    return [
        row if isinstance(row, dict) else {"length": 1.0, "errors": {}, **dict(zip(names, row, strict=False))}
        for row in report["timeline"]
    ]


def _relative(first: float, second: float) -> float | None:
    return (second - first) / first if first else None


def _plain(metric: str, first: float, second: float) -> Change:
    return Change(metric, "messages", first, second, _relative(first, second), None, None)


def _judged(
    metric: str,
    unit: Literal["messages/s", "s"],
    first: float,
    second: float,
    bounds: tuple[float, float],
    *,
    is_more_better: bool,
) -> Change:
    noise = math.hypot(*bounds)
    verdict: Verdict = "same"
    if abs(second - first) > noise:
        verdict = "better" if (second > first) is is_more_better else "worse"
    return Change(metric, unit, first, second, _relative(first, second), noise / first if first else None, verdict)


def _latency_noise(report: Report, phase: str, name: str) -> float:
    """Return the noise of a percentile in seconds."""
    histogram = Histogram.from_dict(report["phases"][phase]["histogram"])
    part, count = float(name[1:]) / 100, histogram.count
    reach = _SIGMAS * math.sqrt(part * (1 - part) / count)
    low, high = (histogram.percentile(100 * min(1.0, max(0.0, part + side * reach))) for side in (-1, 1))
    column = _COLUMNS[phase, name]
    spread = _spread([row[column] for row in _whole(report) if column in row])
    value: float = report["phases"][phase][name]
    return max((high - low) / 2e9, spread, value * _floor(report, name))


def _rate_noise(report: Report) -> float:
    """Return the noise of the rate in messages per second."""
    rate: float = report["rate"]
    spread = _spread([row["accepted"] / row["length"] for row in _whole(report)])
    noise = max(spread, rate * _floor(report, "rate"))
    message = report["phases"].get("message")
    if message is None:
        return noise
    count: int = message["count"]
    mean: float = message["mean"]
    buckets: list[list[int]] = message["histogram"]["buckets"]
    variance = math.fsum(number * (low / 1e9 - mean) ** 2 for low, number in buckets) / count
    return max(noise, rate * _SIGMAS * math.sqrt(variance / count) / mean if mean else 0.0)


def _floor(report: Report, name: str) -> float:
    seconds: float = report["seconds"]
    return min(_MAX_FLOOR, _FLOOR[name] / math.sqrt(max(seconds, 1e-3)))


def _whole(report: Report) -> Iterator[dict[str, Any]]:
    """Yield the whole seconds in which messages were accepted, but for the first, which has the connecting."""
    return (row for row in seconds_of(report)[1:] if row["length"] >= _WHOLE and row["accepted"])


def _spread(values: Sequence[float]) -> float:
    """Return the noise of the mean of values; 0 for too few of them."""
    if len(values) < _MIN_SECONDS:
        return 0.0
    return _SIGMAS * stdev(values) / math.sqrt(len(values))
