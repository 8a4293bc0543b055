"""The cost of a message as connections and messages grow: it has to stay flat, and linear in the size.

First 4 KB messages while 20 to 10,000 connections are open, then messages of 1 KB to 100 MB on 20 connections.

    python -m bench.scaling [--rounds 5]
"""

from __future__ import annotations

import argparse
from typing import Final

from bench.idle import idle_connections
from bench.measure import (
    PENSTOCK_SINK,
    Running,
    machine,
    raise_file_limit,
    ratio_of,
    running,
    smtp_source,
    summary,
    verdict,
)

BOUND: Final = 1.1
"""The cost with 10,000 open connections, relative to the cost with 20."""
_SIZES: Final = {1_000: 10_000, 10_000: 10_000, 100_000: 3_000, 1_000_000: 500, 10_000_000: 60, 100_000_000: 20}
"""Octets of a message, and how many messages are sent."""


def cost_with(server: Running, open_connections: int, rounds: int, messages: int = 10_000) -> list[float]:
    """Return the CPU time of a 4 KB message in each round, in microseconds, while connections are open."""
    with idle_connections(server, open_connections - 20):  # smtp-source has the others
        return [
            smtp_source(server, messages=messages, sessions=20, size=4096, extra=("-d",)).cpu_per_message
            for _ in range(rounds)
        ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    limit = raise_file_limit()
    print(machine(), "\n")
    with running(PENSTOCK_SINK) as server:
        smtp_source(server, messages=5_000, sessions=20, size=4096, extra=("-d",))  # warms up
        print("open connections     us/message   relative to 20")
        first: list[float] = []
        for count in (20, 200, 2_000, min(10_000, limit - 500)):
            costs = cost_with(server, count, arguments.rounds)
            first = first or costs
            ratio, low, high = ratio_of(costs, first)
            line = f"{count:>16} {summary(costs)[0]:>14.1f} {ratio:>10.2f} ({low:.2f} to {high:.2f})"
            print(line + (f", bound {BOUND}: {verdict(ratio <= BOUND)}" if count > 2_000 else ""), flush=True)
        print("\noctets of a message  us/message  ns per octet")
        for size, messages in _SIZES.items():
            cost = smtp_source(server, messages=messages, sessions=20, size=size, extra=("-d",)).cpu_per_message
            print(f"{size:>16} {cost:>14.1f} {cost * 1000 / size:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
