"""`python -m bench.load`: what a message costs the generator, beside Postfix's smtp-source on the same work.

Both send to the same sink, in turn; compared is the CPU of the generator's process for each message, its start left
out: each is also run with few messages, and the difference counts. smtp-source knows neither PIPELINING nor STARTTLS:
for these `penstock load` is compared with smtp-source without.

`--pace` measures the open loop instead: how late messages start, and what that costs.
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
    """What both are given to do."""

    title: str
    ours: Sequence[str]
    theirs: Sequence[str]
    messages: int
    target: float | None = None
    """Messages for each second of CPU, of smtp-source's, that we mean to reach."""


WORKS = [
    Work("connections kept", ("--reuse",), ("-d",), 20_000, 0.7),
    Work("a new connection each", (), (), 10_000, 0.7),
    Work("pipelined", ("--reuse", "--pipeline"), ("-d",), 20_000),
    Work("STARTTLS, connections kept", ("--reuse", "--tls", "starttls"), ("-d",), 20_000),
]


def _cpu(command: Sequence[str]) -> float:
    """Run a command, and return the seconds of CPU it has used."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def _cost(command: Sequence[str], count: str, messages: int) -> float:
    """Return the microseconds of CPU of a message."""
    few = _cpu([*command, count, str(_FEW)])
    return (_cpu([*command, count, str(messages)]) - few) / (messages - _FEW) * 1e6


def measure(work: Work, server: Running, rounds: int) -> None:
    """Print what a work costs both."""
    ours = [sys.executable, "-m", "penstock", "load", "--sessions", "20", "--size", "4096", *work.ours, server.address]
    theirs = ["smtp-source", "-s", "20", "-l", "4096", *work.theirs]
    pairs = []
    for _ in range(rounds):
        pair = _cost(ours, "--messages", work.messages), _cost_of_theirs(theirs, server, work.messages)
        pairs.append(pair)
    a, b = (summary([pair[which] for pair in pairs])[0] for which in (0, 1))
    ratio, low, high = summary([pair[1] / pair[0] for pair in pairs])
    line = (
        f"  {work.title:<27} penstock load {a:6.1f} us, smtp-source {b:6.1f} us: {ratio:.2f} of its messages a second"
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
    told = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    late = told["phases"]["late_start"]
    cpu = (usage.ru_utime + usage.ru_stime) / seconds
    words = "  ".join(
        f"{name} {late[key] * 1e6:6,.0f}" for name, key in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"))
    )
    print(
        f"  {rate:6,} a second: us from the intended start to MAIL: {words}; {cpu:4.0%} of a core, its start included",
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
    parser.add_argument("--pace", action="store_true", help="how late messages of an open loop start")
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
