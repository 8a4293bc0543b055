"""Whether the servers write a message to stable storage before they acknowledge it.

The default of nats-server is to sync every two minutes: after a power failure, acknowledged messages are lost. Clients
cannot see the setting; the monitoring port (/varz) shows it. A node gives its mail to the cluster once it has seen that
a majority of the servers syncs always, and not any more when it sees one that does not.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from penstock.cluster.layout import MINIMUM_VERSION
from penstock.spool.store import SpoolError

_TIMEOUT: Final = 3.0
"""Timeout of each socket operation."""
_LONGEST: Final = 5.0
"""Timeout of a whole request."""
_INTERVAL: Final = 30.0
_IMPATIENCE: Final = 1.0
"""Seconds between two looks: when a majority is known to sync, and before."""


class _Config(msgspec.Struct, frozen=True):
    sync_always: bool = False


class _JetStream(msgspec.Struct, frozen=True):
    config: _Config | None = None


class ServerState(msgspec.Struct, frozen=True):
    """The response of a monitoring port (/varz)."""

    server_name: str = ""
    version: str = ""
    jetstream: _JetStream = _JetStream()

    @property
    def problem(self) -> str:
        """Why messages cannot be given to this server; "" if they can."""
        if self.jetstream.config is None:
            return f"{self.server_name} does not run JetStream"
        if parse_version(self.version) < MINIMUM_VERSION:
            wanted = ".".join(map(str, MINIMUM_VERSION))
            return f"{self.server_name} has version {self.version}, expected {wanted} or newer"
        if not self.jetstream.config.sync_always:
            return (
                f"{self.server_name} acknowledges messages before they are on stable storage; set "
                "jetstream {{ sync_interval: always }} in its configuration".replace("{{", "{").replace("}}", "}")
            )
        return ""


class DurabilityError(SpoolError):
    """A server must not be given messages."""


def parse_version(text: str) -> tuple[int, ...]:
    """Return a version such as 2.15.1-RC.1 as numbers; () for something else."""
    try:
        return tuple(int(word) for word in text.partition("-")[0].split("."))
    except ValueError:
        return ()


def read_monitor(url: str) -> ServerState:
    """Return the response of the monitoring port of a server. Blocks. Raise OSError or ValueError."""
    address = f"{url.rstrip('/')}/varz"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:  # noqa: S310 - http or https, checked
            return msgspec.json.decode(answer.read(1 << 20), type=ServerState)
    except (http.client.HTTPException, RecursionError) as exc:
        raise ValueError(f"not a monitoring port: {exc!r}") from exc


class Durability:
    """Looks at the monitoring ports."""

    def __init__(self, monitors: Sequence[str], *, is_trusted: bool = False) -> None:
        """With `is_trusted` the servers are not looked at."""
        self._monitors = monitors
        self._is_trusted = is_trusted
        self._good: set[str] = set()
        self._limiter = trio.CapacityLimiter(len(monitors) or 1)
        """Threads that were given up take the place of those of the next looks, and not of everything else."""
        self.problem = "" if is_trusted else "no monitoring port was asked yet"
        """Why no messages are given to the cluster; "" if they are."""

    async def look(self) -> None:
        """Ask all servers. Raise DurabilityError if one does not sync, or is too old."""
        if self._is_trusted:
            return
        wrong: list[str] = []
        errors: list[str] = []

        async def ask(url: str) -> None:
            try:
                with trio.fail_after(_LONGEST):
                    state = await trio.to_thread.run_sync(
                        read_monitor, url, abandon_on_cancel=True, limiter=self._limiter
                    )
            except trio.TooSlowError:
                errors.append(f"{url}: no response within {_LONGEST:.0f} s")
                return
            except (OSError, ValueError) as exc:
                errors.append(f"{url}: {exc}")
                return
            if state.problem:
                wrong.append(state.problem)
                self._good.discard(url)
            else:
                self._good.add(url)

        async with trio.open_nursery() as nursery:
            for url in self._monitors:
                nursery.start_soon(ask, url)
        if wrong:
            self.problem = "; ".join(wrong)
            raise DurabilityError(self.problem)
        is_majority = len(self._good) * 2 > len(self._monitors)
        self.problem = "" if is_majority else f"not known whether a majority of the servers syncs: {'; '.join(errors)}"

    async def run(self) -> None:
        """Check periodically until cancelled, and set `problem`."""
        while not self._is_trusted:
            await trio.sleep(_IMPATIENCE if self.problem else _INTERVAL)
            try:
                await self.look()
            except DurabilityError:
                continue
