"""The cost of the metrics: the instructions that a server spends on its counters for each message.

    python -m bench.metrics [--messages 100] [--delivery discard]

Counted by callgrind, in the compiled code of the counters (ext/shared.pyx). Time, and the instructions of two servers,
differ by more than the bound from one run to the next, as a turn costs less the more clients it serves; what is spent
on counters for a message does not. The ratio is that of all instructions to those without the counters. Needs valgrind
and smtp-source. Exit code 1 above the bound of 1.03.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import trio
from tests.ports import free_port

from bench.measure import machine, verdict
from bench.processes import ENVIRONMENT, started
from penstock.app import Overrides, open_server
from penstock.config import from_table
from penstock.metrics.segment import private_segment
from penstock.operations.observation import start_counting

BOUND: Final = 1.03
_CASES: Final = {"4 KB, connections kept": ("-d",), "4 KB, a new connection each": ()}
_WARM_UP: Final = 100
_PATIENCE: Final = 900.0
"""Seconds: valgrind makes a server about fifty times slower."""


async def serve(port: int, folder: str, delivery: str) -> None:
    """Serve as `penstock serve` does until SIGTERM."""
    settings = from_table(
        {
            "hostname": "bench.example",
            "data_dir": folder,
            "delivery": {"kind": delivery},
            "listener": [{"address": f"127.0.0.1:{port}", "tls": {"mode": "none"}}],
        }
    )
    segment = private_segment()
    counters = start_counting(segment, segment.claim())
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        # Without the report of each second: at this speed there would be one for every few messages.
        async with open_server(settings, overrides=Overrides(counters=counters)):
            async for _ in signals:
                break


def instructions(delivery: str, messages: int) -> dict[str, tuple[float, float]]:
    """Return the instructions of the counters for a message in each case, and all instructions for it."""
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder, port = Path(name), free_port()
        own = [sys.executable, "-m", "bench.metrics", "--delivery", delivery, "--serve", str(port), "--data", name]
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'out'}",
            *own,
        ]  # fmt: skip
        with started(command, folder / "log", environment=ENVIRONMENT) as process:
            _wait_for_greeting(port, process, folder / "log")
            for place, (case, options) in enumerate(_CASES.items(), 1):
                _send(port, _WARM_UP, options)
                _control(process.pid, "--instr=on", folder)  # what came before is not counted, and fast
                _control(process.pid, "--zero", folder)
                _send(port, messages, options)
                _control(process.pid, "--dump", folder)
                _control(process.pid, "--instr=off", folder)
                found[case] = _read(sorted(folder.glob("out.*"))[place - 1], messages)
    return found


def _read(dump: Path, messages: int) -> tuple[float, float]:
    """Return the instructions of the counters for a message, and all of them."""
    command = ["callgrind_annotate", "--threshold=100", str(dump)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE).stdout.splitlines()
    counted = [(int(line.split()[0].replace(",", "")), line) for line in lines if re.match(r" *[0-9,]+ \(", line)]
    own = sum(count for count, line in counted if "7_shared_" in line or "/_shared." in line)
    total = next(count for count, line in counted if "PROGRAM TOTALS" in line)
    return own / messages, total / messages


def _control(pid: int, what: str, folder: Path) -> None:
    subprocess.run(
        ["callgrind_control", what, str(pid)], check=True, capture_output=True, cwd=folder, timeout=_PATIENCE
    )


def _send(port: int, messages: int, options: tuple[str, ...]) -> None:
    command = ["smtp-source", "-s", "10", "-m", str(messages), "-l", "4096", *options, f"127.0.0.1:{port}"]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=_PATIENCE, capture_output=True)


def _wait_for_greeting(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                sock.settimeout(_PATIENCE)
                if sock.recv(512).startswith(b"220"):
                    sock.sendall(b"QUIT\r\n")
                    return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def main() -> None:
    """Print the instructions for a message, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--delivery", default="discard", choices=("discard", "maildir", "spool"))
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.serve:
        trio.run(lambda: serve(wanted.serve, wanted.data, wanted.delivery))
        return
    print(f"{machine()}; delivery {wanted.delivery}; instructions for a message")
    missed = False
    print(f"{'':30}{'counters':>10}{'all':>10}{'ratio':>8}")
    for case, (own, total) in instructions(wanted.delivery, wanted.messages).items():
        ratio = total / (total - own)
        missed = missed or ratio > BOUND
        print(f"{case:30}{own:10.0f}{total:10.0f}{ratio:8.3f}  {verdict(ratio <= BOUND)} ({BOUND})")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
