"""`python -m bench.dead`: how much mail for an unreachable next hop slows down the mail for others.

Messages for a working next hop (a sink) are sent through a gateway twice: with an empty spool, and with many messages
waiting for a next hop that is unreachable. The rates at which they arrive at the sink are printed, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.ports import free_port

from bench.measure import Peer, Running, machine, running

_CONFIG = """hostname = "bench.example"
data_dir = "data"
journal = { events = "errors" }
[[route]]
domains = ["dead.example"]
next_hop = "smtp://127.0.0.1:9"
tls.mode = "none"
[[route]]
next_hop = "smtp://127.0.0.1:{sink}"
tls.mode = "none"
[[listener]]
address = "127.0.0.1:{port}"
tls.mode = "none"
"""


def _gateway(sink: int) -> Peer:
    def command(port: int, folder: Path) -> Sequence[str]:
        (folder / "penstock.toml").write_text(_CONFIG.replace("{port}", str(port)).replace("{sink}", str(sink)))
        return [sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml")]

    return Peer("gateway", command, sys.executable)


def _send(server: Running, count: int, to: str) -> None:
    command = [sys.executable, "-m", "penstock", "load", server.address, "--sessions", "50", "--reuse"]
    subprocess.run([*command, "--messages", str(count), "--to", to], check=True, capture_output=True)


def _arrive(server: Running, sink_port: int, count: int) -> float:
    """Send messages to the working hop, and return how many arrive there per second."""
    sink = subprocess.Popen(
        [sys.executable, "-m", "penstock", "sink", "--listen", f"127.0.0.1:{sink_port}", "--messages", str(count)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(2)  # it must be up, or the relay backs off
    begun = time.monotonic()
    _send(server, count, "bob@live.example")
    sink.wait(timeout=300)
    return count / (time.monotonic() - begun)


def _waiting(server: Running) -> int:
    command = [sys.executable, "-m", "penstock", "spool", "stats", "--config", str(server.folder / "penstock.toml")]
    found: int = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)["messages"]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dead", type=int, default=100_000)
    parser.add_argument("--live", type=int, default=10_000)
    arguments = parser.parse_args()
    print(machine(), flush=True)
    sink_port = free_port()
    with running(_gateway(sink_port)) as server:
        _arrive(server, sink_port, 1_000)  # warm
        before = _arrive(server, sink_port, arguments.live)
        print(f"  {before:8.0f}/s arrive with an empty spool", flush=True)
        _send(server, arguments.dead, "bob@dead.example")
        print(f"  {_waiting(server):,} messages wait for an unreachable hop", flush=True)
        after = _arrive(server, sink_port, arguments.live)
        print(f"  {after:8.0f}/s arrive meanwhile: {after / before:.2f} of it; {_waiting(server):,} still wait")


if __name__ == "__main__":
    main()
