"""Free ports, for programs that cannot report which port they got, and for servers that do not exist."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_OURS = range(10_000, 32_768)
"""Below the ephemeral ports of Linux (ip_local_port_range), which tests that run at the same time may be given."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now and not given out as an ephemeral port."""
    for port in random.SystemRandom().sample(_OURS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
