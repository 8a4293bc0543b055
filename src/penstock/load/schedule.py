"""The schedule of an open loop: when each message is due.

A schedule is a list of pieces in which the rate changes linearly, as the stages of k6's ramping-arrival-rate do. The
message with number n (from 0) is due at the time t at which the area below the rate is n. A constant rate is one piece,
a ramp is two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from penstock.load.units import parse_duration

MAX_RATE = 1e6
"""The highest rate, in messages per second."""
_ROUNDING = 1e-9
"""Messages by which a sum of products may miss a whole number."""


class Stage(NamedTuple):
    """A part of a run, at the end of which the rate is reached linearly. A stage of 0 s is a jump."""

    seconds: float
    rate: float


class _Piece(NamedTuple):
    begin: float
    seconds: float
    first_rate: float
    last_rate: float
    before: float
    """Messages due before it."""

    @property
    def area(self) -> float:
        if self.first_rate == self.last_rate == 0:
            return 0.0
        return (self.first_rate + self.last_rate) / 2 * self.seconds


class Schedule:
    """When the messages of an open loop are due."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Begin at rate 0, or, where the first stage takes no time, at its rate. The last stage may be endless."""
        self._pieces: list[_Piece] = []
        begin = before = rate = 0.0
        for stage in stages:
            if stage.seconds:
                piece = _Piece(begin, stage.seconds, rate, stage.rate, before)
                self._pieces.append(piece)
                begin, before = begin + stage.seconds, before + piece.area
            rate = stage.rate
        self.seconds = begin
        """Its duration; may be infinite."""
        self._area = before

    @classmethod
    def constant(cls, rate: float, ramp: float, seconds: float | None) -> Schedule:
        """Grow to a rate within `ramp` seconds and keep it until `seconds` are over; None is without end."""
        end = math.inf if seconds is None else seconds
        if ramp >= end:
            return cls([Stage(end, rate * end / ramp)])
        return cls([Stage(ramp, rate), Stage(end - ramp, rate)])

    @property
    def total(self) -> int | None:
        """Messages due before its end; None when it has none."""
        return None if math.isinf(self._area) else math.ceil(self._area - _ROUNDING)

    def due(self, number: int) -> float:
        """Return when a message is due, in seconds from the begin; infinity beyond the end."""
        for piece in self._pieces:
            wanted = number - piece.before
            if wanted < piece.area:
                if piece.first_rate == piece.last_rate:
                    return piece.begin + wanted / piece.first_rate
                # The quadratic formula in the form that loses no digits where the rate hardly changes.
                slope = (piece.last_rate - piece.first_rate) / piece.seconds
                root = math.sqrt(max(0.0, piece.first_rate**2 + 2 * slope * wanted))
                return piece.begin + (2 * wanted / (piece.first_rate + root) if wanted > 0 else 0.0)
        return math.inf


def parse_stages(text: str) -> list[Stage]:
    """Read "10s:100,60s:1000,10s:0": durations and the rates at their ends. Raise ValueError."""
    stages = []
    for part in text.split(","):
        duration, colon, rate = part.strip().partition(":")
        if not colon or not rate.replace(".", "", 1).isdecimal() or not rate.isascii() or len(rate) > 12:
            raise ValueError(f"stages look like 10s:100,60s:1000,10s:0 (DURATION:RATE,...), not {text!r}")
        if float(rate) > MAX_RATE:
            raise ValueError(f"{part.strip()}: the highest rate is {MAX_RATE:,.0f}/s")
        stages.append(Stage(parse_duration(duration), float(rate)))
    if not Schedule(stages).total:
        raise ValueError(f"{text}: these stages start no message")
    return stages
