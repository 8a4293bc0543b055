"""The sums over all workers, kept by the supervisor. They survive the death of a worker; what it had open does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.metrics._shared import BUCKETS, Segment
from penstock.metrics.busiest import Busiest
from penstock.metrics.counters import Report
from penstock.metrics.families import OTHER, OUTCOMES, series

_MOST_RETIRED: Final = 20_000
"""Series of workers that have ended: those of listeners and checks that are not configured any more stay."""

LONGEST_NAME: Final = 300
"""Characters of a domain or the name of a next hop."""

Value = int | list[int]
Sums = dict[tuple[str, str], Value]
"""By kind and name; see `Page.series`."""


class Collector:
    """Reads the pages of all workers."""

    def __init__(
        self, segment: Segment, *, destinations: int = 100, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """At most `destinations` of them, and as many next hops, have series of their own."""
        self.segment = segment
        self._retired: Sums = {}
        self.most = destinations
        """Destinations, and next hops, with series of their own."""
        self._destinations = Busiest(destinations, len(OUTCOMES), clock)
        self._hops: dict[int, dict[str, tuple[int, int]]] = {}
        """By worker."""

    def use(self, destinations: int) -> None:
        """Change the maximum number of destinations, and of next hops, with their own series."""
        self.most = destinations
        self._destinations.use(destinations)

    def update(self) -> None:
        """Take the reports of the workers. To be called about once a second."""
        for index in self.segment.in_use:
            self._take_report(index)

    def _take_report(self, index: int) -> None:
        text = self.segment.page(index).receive()
        if not text:
            return
        try:
            report = msgspec.json.decode(text, type=Report)
        except msgspec.DecodeError:  # the worker died while it wrote
            return
        for name, counts in report.destinations.items():
            self._destinations.add(name, counts)
        self._hops[index] = report.hops

    def retire(self, index: int) -> None:
        """Keep what a worker that has ended has counted, and free its page."""
        self._take_report(index)
        self._hops.pop(index, None)
        for kind, name, value in self.segment.page(index).series():
            if kind != "g" and ((kind, name) in self._retired or len(self._retired) < _MOST_RETIRED):
                _add(self._retired, kind, name, value)
        self.segment.free(index)

    def sums(self) -> Sums:
        """Return the sums of all series, those of destinations and next hops among them."""
        self.update()
        found: Sums = {key: value if isinstance(value, int) else list(value) for key, value in self._retired.items()}
        for index in self.segment.in_use:
            for kind, name, value in self.segment.page(index).series():
                _add(found, kind, name, value)
        for destination, counts in self._destinations.sums().items():
            for outcome, count in zip(OUTCOMES, counts, strict=True):
                labels = {"destination": destination, "outcome": outcome}
                found["c", series("relay_attempts_by_destination_total", labels, LONGEST_NAME)] = count
        for hop, (is_up, connections) in self.hops().items():
            found["g", series("relay_hop_up", {"hop": hop}, LONGEST_NAME)] = is_up
            found["g", series("relay_connections", {"hop": hop}, LONGEST_NAME)] = connections
        return found

    def of_page(self, index: int) -> Sums:
        """Return the series of one worker."""
        return {(kind, name): value for kind, name, value in self.segment.page(index).series()}

    def hops(self) -> dict[str, tuple[int, int]]:
        """Return the next hops: whether all workers use it, and the connections of all.

        Beyond the bound, those that work and have the fewest connections are summed up as "other".
        """
        merged: dict[str, tuple[int, int]] = {}
        for hops in self._hops.values():
            for name, (is_up, connections) in hops.items():
                was_up, before = merged.get(name, (1, 0))
                merged[name] = (min(is_up, was_up), before + connections)
        if len(merged) <= self.most:
            return merged
        order = sorted(merged.items(), key=lambda each: (each[1][0], -each[1][1], each[0]))
        rest = order[self.most :]
        total = (min(is_up for _, (is_up, _) in rest), sum(connections for _, (_, connections) in rest))
        return {**dict(order[: self.most]), OTHER: total}


def _add(sums: Sums, kind: str, name: str, value: Value) -> None:
    """Add a series to sums. If two workers report the expiry of a certificate, the earlier one counts."""
    before = sums.get((kind, name))
    if isinstance(value, list):
        old = before if isinstance(before, list) else [0] * (BUCKETS + 1)
        sums[kind, name] = [one + two for one, two in zip(old, value, strict=True)]
        return
    old_value = before if isinstance(before, int) else 0
    if before is not None and name.startswith("tls_certificate_not_after_seconds"):
        sums[kind, name] = min(old_value, value)
    else:
        sums[kind, name] = old_value + value
