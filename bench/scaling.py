"""`python -m bench.growth`: what a message costs as sessions and messages grow; it has to stay flat, and linear.

First 4 KB messages with 20 to 10,000 connections open and in use, then messages of 1 KB to 100 MB on 20 connections.
"""

from __future__ import annotations

import argparse
import resource

from bench.idle import idle_connections
from bench.measure import PENSTOCK_SINK, machine, running, smtp_source, summary


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(machine(), "\n")
    with running(PENSTOCK_SINK) as server:
        smtp_source(server, messages=5_000, sessions=20, size=4096, extra=("-d",))
        print("open connections     us/message   of that at 20")
        first: list[float] = []
        for count in (20, 200, 2_000, 10_000):
            open_count = min(count, hard - 500) - 20
            with idle_connections(server, open_count):
                costs = [
                    smtp_source(server, messages=10_000, sessions=20, size=4096, extra=("-d",)).cpu_per_message
                    for _ in range(arguments.rounds)
                ]
            first = first or costs
            ratio, low, high = summary([a / b for a, b in zip(costs, first, strict=True)])
            print(
                f"{open_count + 20:>16} {summary(costs)[0]:>14.1f} {ratio:>10.2f} ({low:.2f} to {high:.2f})", flush=True
            )
        print("\noctets of a message  us/message   ns an octet")
        for size, messages in ((1_000, 10_000), (10_000, 10_000), (100_000, 3_000), (1_000_000, 500), (10_000_000, 60),
                               (100_000_000, 20)):  # fmt: skip
            cost = smtp_source(server, messages=messages, sessions=20, size=size, extra=("-d",)).cpu_per_message
            print(f"{size:>16} {cost:>14.1f} {cost * 1000 / size:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
