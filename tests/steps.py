"""The cost of a parser, for tests that bound it: the steps of Python, and what grows with the square of its input."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_SHORT: Final = 0.02
"""Seconds that are too few to be a square."""


def steps_of(function: Callable[[], object]) -> int:
    """Return how many lines of Python a call executes, in every function that it calls.

    Work inside C functions is not counted; regular expressions and `str` methods are bounded by their own tests.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # what other tests have left behind may have finalizers, whose lines are not those of the call
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def is_square(small: Callable[[], object], large: Callable[[], object]) -> bool:
    """Return whether work inside C functions, such as regular expressions, grows with the square of its octets.

    `large` has eight times the octets of `small`: a square costs 64 times the CPU time. A busy machine disturbs what is
    measured, so that a work is a square only if it always looks like one.
    """
    for _ in range(10):
        spent = _cpu_of(large)
        if spent < _SHORT or spent < 40 * _cpu_of(small):
            return False
    return True


def _cpu_of(function: Callable[[], object]) -> float:
    began = time.thread_time()
    function()
    return time.thread_time() - began
