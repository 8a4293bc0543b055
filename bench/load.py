"""`python -m bench.load`: CPU per message of the generator, compared with Postfix's smtp-source on the same work.

Both send to the same sink, in turn. The CPU of the start is excluded: each is also run with few messages, and the
difference counts. smtp-source has neither PIPELINING nor STARTTLS: `penstock load` with these is compared with
smtp-source without.

`--pace` measures the open loop instead: how late messages start, and the CPU that it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure import PENSTOCK_SINK, Running, machine, running, summary
from bench.processes import ENVIRONMENT

_FEW = 200
_RATES = (100, 1000, 5000)
_EDGES = (50, 100, 200, 500, 1000, 2000, 5000, 1_000_000)
"""Microseconds."""


@dataclass(frozen=True)
class Work:
    """The work of both."""

    title: str
    ours: Sequence[str]
    theirs: Sequence[str]
    messages: int
    target: float | None = None
    """Messages per second of CPU to reach, relative to smtp-source."""


WORKS = [
    Work("connections kept", ("--reuse",), ("-d",), 20_000, 1.0),
    Work("a new connection each", (), (), 10_000, 1.0),
    Work("pipelined", ("--reuse", "--pipeline"), ("-d",), 20_000, 1.0),
    Work("STARTTLS, connections kept", ("--reuse", "--tls", "starttls"), ("-d",), 20_000),
]


def _cpu(command: Sequence[str]) -> float:
    """Run a command and return the seconds of CPU that it used."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def _cost(command: Sequence[str], count: str, messages: int) -> float:
    """Return the microseconds of CPU per message."""
    few = _cpu([*command, count, str(_FEW)])
    return (_cpu([*command, count, str(messages)]) - few) / (messages - _FEW) * 1e6


def measure(work: Work, server: Running, rounds: int) -> None:
    """Measure one work and print the result."""
    ours = [sys.executable, "-m", "penstock", "load", "--sessions", "20", "--size", "4096", *work.ours, server.address]
    theirs = ["smtp-source", "-s", "20", "-l", "4096", *work.theirs]
    pairs = []
    for _ in range(rounds):
        pair = _cost(ours, "--messages", work.messages), _cost_of_theirs(theirs, server, work.messages)
        pairs.append(pair)
    a, b = (summary([pair[which] for pair in pairs])[0] for which in (0, 1))
    ratio, low, high = summary([pair[1] / pair[0] for pair in pairs])
    line = (
        f"  {work.title:<27} penstock load {a:6.1f} us, smtp-source {b:6.1f} us: {ratio:.2f} of its messages per second"
    )
    line += f" ({low:.2f} to {high:.2f})"
    if work.target is not None:
        line += f", target {work.target}: {'reached' if ratio >= work.target else 'MISSED'}"
    print(line, flush=True)


def _cost_of_theirs(command: Sequence[str], server: Running, messages: int) -> float:
    few = _cpu([*command, "-m", str(_FEW), server.address])
    return (_cpu([*command, "-m", str(messages), server.address]) - few) / (messages - _FEW) * 1e6


def measure_pace(server: Running, rate: int) -> None:
    """Print how late messages start at a rate."""
    seconds = 5
    command = [sys.executable, "-m", "penstock", "load", "--json", "--reuse", "--sessions", "50"]
    command += ["--rate", str(rate), "--duration", str(seconds), server.address]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    late = report["phases"]["late_start"]
    cpu = (usage.ru_utime + usage.ru_stime) / seconds
    shown = "  ".join(
        f"{name} {late[key] * 1e6:6,.0f}" for name, key in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"))
    )
    print(
        f"  {rate:6,} per second: us from the intended start to MAIL: {shown}; {cpu:4.0%} of a core, start included",
        flush=True,
    )
    buckets = [0] * len(_EDGES)
    for least, count in late["histogram"]["buckets"]:
        buckets[sum(least / 1e3 >= edge for edge in _EDGES[:-1])] += count
    for edge, count in zip(_EDGES, buckets, strict=True):
        print(
            f"      < {edge:7,} us {count / late['count']:6.1%} {'#' * round(60 * count / late['count'])}", flush=True
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pace", action="store_true", help="measure how late messages of an open loop start")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    with running(PENSTOCK_SINK) as server:
        if arguments.pace:
            for rate in _RATES:
                measure_pace(server, rate)
            return
        for work in WORKS:
            measure(work, server, arguments.rounds)


if __name__ == "__main__":
    main()
