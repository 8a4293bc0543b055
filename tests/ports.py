"""Ports for programs that can not be asked which one they took, and for what is not there."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_OURS = range(10_000, 32_768)
"""Below those that Linux gives to whoever asks for any (ip_local_port_range): the other tests, which run meanwhile."""


def free_port() -> int:
    """Return a port that is free now, and that nobody gets by chance."""
    for port in random.SystemRandom().sample(_OURS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
