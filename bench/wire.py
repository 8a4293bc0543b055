"""Octets per second of the compiled parser on message bodies, beside memcpy and a reader in Python.

The bodies resemble real mail: ordinary text, a base64 attachment, short lines, lines that begin with dots. Each is read
as the text after a 354, in blocks of 64 KB, 1 MB in all, so that it stays in the cache of the processor; memcpy copies
the same blocks. The wire copies each block into its buffer before parsing it, as `recv` would.

    python -m bench.wire
"""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable

from bench.measure import machine, summary, verdict
from penstock.smtp import _wire
from penstock.smtp._wire import Wire

BLOCK = 65_536
SIZE = 1 << 20


def bodies() -> dict[str, bytes]:
    """Return the bodies by name."""
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(1, 11))) for _ in range(2000)]

    def fill(line: Callable[[], bytes]) -> bytes:
        lines: list[bytes] = []
        size = 0
        while size < SIZE:
            lines.append(line() + b"\r\n")
            size += len(lines[-1])
        return b"".join(lines)

    return {
        "ordinary text": fill(lambda: " ".join(rng.choices(words, k=12)).encode()[:76]),
        "base64": fill(lambda: base64.b64encode(rng.randbytes(57))),
        "short lines": fill(lambda: rng.choice(words).encode()),
        "a dot each line": fill(lambda: b".." + " ".join(rng.choices(words, k=6)).encode()),
    }


def by_wire(body: bytes, *, discard: bool) -> None:
    """Read a body with the compiled wire."""
    wire = Wire()
    wire.discard = discard
    wire.expect_text()
    view = memoryview(body)
    for start in range(0, len(body), BLOCK):
        wire.feed(view[start : start + BLOCK])
        while wire.next() != _wire.NEED_DATA:
            pass
    wire.feed(b".\r\n")
    while wire.next() != _wire.TEXT_END:
        pass


def by_memcpy(body: bytes) -> None:
    """Copy a body, block by block, into one buffer."""
    target = bytearray(BLOCK)
    view = memoryview(body)
    for start in range(0, len(body) - BLOCK, BLOCK):
        target[:] = view[start : start + BLOCK]


def by_python(body: bytes) -> None:
    """Read a body as servers in Python do: line by line."""
    lines = []
    for line in body.splitlines(keepends=True):
        lines.append(line[1:] if line.startswith(b".") else line)  # noqa: PERF401 - such readers are written like this
    b"".join(lines)


def rate(read: Callable[[bytes], None], body: bytes) -> float:
    """Return octets per second, for at least a tenth of a second."""
    count = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.1:
        read(body)
        count += 1
    return count * len(body) / seconds


def main() -> None:
    """Measure and print."""
    print(machine())
    print(f"{'':<17} {'memcpy':>10} {'counted':>10} {'to bytes':>10} {'Python':>10}   GB/s, medians of 9 rounds")
    for name, body in bodies().items():
        readers: list[Callable[[bytes], None]] = [
            by_memcpy,
            lambda b: by_wire(b, discard=True),
            lambda b: by_wire(b, discard=False),
            by_python,
        ]
        rounds = [[rate(read, body) for read in readers] for _ in range(9)]
        medians = [summary([each[i] for each in rounds])[0] for i in range(len(readers))]
        share, low, high = summary([each[1] / each[0] for each in rounds])
        print(
            f"{name:<17} " + " ".join(f"{median / 1e9:>10.2f}" for median in medians) + f"   counted is {share:.2f} of"
            f" memcpy ({low:.2f} to {high:.2f})"
            + (f", bound 0.25: {verdict(share >= 0.25)}" if name == "ordinary text" else "")
        )


if __name__ == "__main__":
    main()
