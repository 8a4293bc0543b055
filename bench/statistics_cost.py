"""The cost of a sink's statistics: one sink keeps all of them, the other counts only messages.

python -m bench.statistics_cost [--rounds 7] [--sessions 20]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import Peer, machine, running, smtp_source


def _sink(*options: str) -> Peer:
    def command(port: int, _: Path) -> Sequence[str]:
        return [sys.executable, "-m", "penstock", "sink", "--listen", f"127.0.0.1:{port}", *options]

    return Peer(" ".join(("sink", *options)), command, sys.executable)


CASES = {
    "4 KB, reused": (4096, 20_000, ("-d",)),
    "4 KB, new connection": (4096, 8_000, ()),
    "100 KB, reused": (100_000, 4_000, ("-d",)),
}


def main() -> None:
    """Let the sinks take turns, and print medians and the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=20)
    wanted = parser.parse_args()
    print(f"{machine()}; smtp-source -s {wanted.sessions}, microseconds of CPU per message")
    print(f"{'':24}{'without':>9}{'with':>9}{'ratio':>8}{'minimum':>13}")
    with running(_sink("--no-receipts")) as without, running(_sink()) as counting:
        for name, (size, messages, extra) in CASES.items():
            pairs = []
            for number in range(wanted.rounds + 1):
                both = (without, counting) if number % 2 else (counting, without)
                rounds = {
                    server.pid: smtp_source(
                        server, messages=messages, sessions=wanted.sessions, size=size, extra=extra
                    ).cpu_per_message
                    for server in both
                }
                if number:  # the first round warms up
                    pairs.append((rounds[without.pid], rounds[counting.pid]))
            ratios = [after / before for before, after in pairs]
            before, after = (statistics.median(each) for each in zip(*pairs, strict=True))
            print(f"{name:24}{before:9.1f}{after:9.1f}{statistics.median(ratios):8.3f}{min(ratios):13.3f}")


if __name__ == "__main__":
    main()
