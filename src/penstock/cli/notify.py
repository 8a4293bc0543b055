"""The service manager: readiness, reloads, its watchdog, and sockets that outlive a process (sd_notify(3))."""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

_FIRST_PASSED: Final = 3
"""The first descriptor that is passed by socket activation (sd_listen_fds(3))."""
_MOST_AT_ONCE: Final = 200
"""Descriptors in a datagram; the kernel allows 253."""


class ServiceManager:
    """Sends datagrams to $NOTIFY_SOCKET. Without one, nothing happens. Errors are ignored, as sd_notify(3) advises."""

    def __init__(self) -> None:
        """Take the address, and remove it from the environment: workers must not notify the service manager."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        is_ours = not pid or pid == str(os.getpid())
        is_number = microseconds.isascii() and microseconds.isdecimal()
        self.watchdog = int(microseconds) / 1e6 if is_number and is_ours else 0.0
        """Seconds between two signs of life that it expects; 0: none."""

    @property
    def exists(self) -> bool:
        """Someone listens."""
        return bool(self._address)

    def tell(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        """Send lines such as "READY=1" in one datagram."""
        if not self._address:
            return
        data = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)  # a service manager that does not read must not delay the server
            sock.connect(self._address)
            sock.sendmsg(["\n".join(lines).encode()], data)

    def reloading(self) -> None:
        """A reload has begun; `tell("READY=1")` ends it (Type=notify-reload)."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def store(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Keep listening sockets in the service manager: after a restart they are passed with this name."""
        numbers = [sock.fileno() for sock in sockets]
        for start in range(0, len(numbers), _MOST_AT_ONCE):
            self.tell("FDSTORE=1", f"FDNAME={name}", descriptors=numbers[start : start + _MOST_AT_ONCE])

    def forget(self, name: str) -> None:
        """Remove sockets from the store."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")


def passed_sockets() -> dict[str, list[socket.socket]]:
    """Return the sockets that were passed to this process, by their names; and remove them from the environment.

    Those without a name are "unknown". Descriptors that are no listening sockets are closed.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    passed: dict[str, list[socket.socket]] = {}
    if pid != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
        return passed
    for place in range(int(count)):
        descriptor = _FIRST_PASSED + place
        name = names[place] if place < len(names) and names[place] else "unknown"
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            with suppress(OSError):
                os.close(descriptor)
            continue
        if not is_listening:
            sock.close()
            continue
        sock.setblocking(False)
        passed.setdefault(name, []).append(sock)
    return passed
