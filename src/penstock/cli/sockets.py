"""The listening sockets of a server of several processes: bound, inherited, added, and closed at the end.

There is a set of sockets for each worker (SO_REUSEPORT). A set is never closed while its listener exists: that would
reset the clients in its queues. With fewer workers than sets, workers accept from several.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from penstock.app import bind_listener
from penstock.cli.notify import ServiceManager
from penstock.config import ListenerSettings, Settings
from penstock.net.listen import ListenAddress, close_listener, name_of, share

_Key = tuple[str, str, str, int]
_UNKNOWN: Final = "unknown"


class ListeningSockets:
    """The sockets of all listeners and workers."""

    def __init__(self, passed: Mapping[str, Sequence[socket.socket]], manager: ServiceManager) -> None:
        """`passed` are sockets that the service manager has passed on, by their names."""
        self._passed = {name: list(sockets) for name, sockets in passed.items()}
        self._manager = manager
        self._sets: dict[_Key, list[list[socket.socket]]] = {}
        self.unused: list[str] = []
        """Addresses of sockets that were passed and belong to no listener."""

    def prepare(self, settings: Settings, workers: int) -> Callable[[], None]:
        """Bind what is missing for `workers` workers; return what undoes that.

        Raise OSError, which names the key; then nothing has changed.
        """
        made: list[socket.socket] = []
        sets: dict[_Key, list[list[socket.socket]]] = {}
        try:
            for number, (key, listener) in enumerate(_keyed(settings.listener)):
                sets[key] = self._prepare(number, key, listener, workers, made)
        except OSError:
            for sock in made:
                sock.close()
            raise
        before = dict(self._sets)
        self._sets |= sets

        def undo() -> None:
            self._sets = before
            for sock in made:
                close_listener(sock)

        for key, listener in _keyed(settings.listener):
            new = [sock for each in sets[key] for sock in each if sock in made]
            self._manager.store(store_name(listener), new)
        return undo

    def _prepare(
        self, number: int, key: _Key, listener: ListenerSettings, workers: int, made: list[socket.socket]
    ) -> list[list[socket.socket]]:
        sets = [list(each) for each in self._sets.get(key, ())] or self._adopt(listener)
        try:
            if not sets:
                sets = [bind_listener(listener)]
                made += sets[0]
            if len(sets) < workers:
                more = share(sets[0], 1 + workers - len(sets))[1:]
                made += [sock for each in more for sock in each if sock.family != socket.AF_UNIX]
                sets += more
        except OSError as exc:
            text = f"listener[{number}].address: {exc.strerror or exc}"
            raise (OSError(text) if exc.errno is None else OSError(exc.errno, text)) from exc
        return sets

    def _adopt(self, listener: ListenerSettings) -> list[list[socket.socket]]:
        """Return the sockets that were passed for a listener: by its name, or by its address."""
        by_place: dict[str, list[socket.socket]] = {}
        for name in (store_name(listener), _UNKNOWN):
            fitting = [sock for sock in self._passed.get(name, ()) if _fits(sock, listener, is_named=name != _UNKNOWN)]
            for sock in fitting:
                self._passed[name].remove(sock)
                by_place.setdefault(name_of(sock), []).append(sock)
        most = max(map(len, by_place.values()), default=0)
        return [[sockets[place] for sockets in by_place.values() if place < len(sockets)] for place in range(most)]

    def close_unused(self) -> None:
        """Close the sockets that were passed and that no listener uses, and remove them from the store."""
        for name, sockets in self._passed.items():
            self.unused += [name_of(sock) for sock in sockets]
            for sock in sockets:
                sock.close()
            if sockets:
                self._manager.forget(name)
        self._passed.clear()

    def of_worker(self, settings: Settings, index: int, workers: int) -> list[list[socket.socket]]:
        """Return the sockets of each listener that worker `index` accepts from."""
        if index >= workers:
            return [[] for _ in settings.listener]  # it only delivers what others have left in its part of the spool
        found = []
        for key, _ in _keyed(settings.listener):
            sets = self._sets.get(key, [])[index::workers]
            found.append(list(dict.fromkeys(sock for each in sets for sock in each)))
        return found

    def addresses(self, settings: Settings) -> list[str]:
        """Return where the listeners of the settings listen."""
        return [name_of(sock) for key, _ in _keyed(settings.listener) for sock in self._sets[key][0]]

    def keep_only(self, settings: Settings) -> None:
        """Close the sockets of listeners that the settings do not have."""
        kept = {key for key, _ in _keyed(settings.listener)}
        for key in [key for key in self._sets if key not in kept]:
            self._close(key)

    def close(self, *, leaves_stored: bool = False) -> None:
        """Close all sockets. With `leaves_stored`, unix sockets that the service manager has, too, keep their paths."""
        for key in list(self._sets):
            self._close(key, unlinks=not (leaves_stored and self._manager.exists))

    def _close(self, key: _Key, *, unlinks: bool = True) -> None:
        for sock in {sock for each in self._sets.pop(key) for sock in each}:
            close_listener(sock, unlinks=unlinks)


def _keyed(listeners: Sequence[ListenerSettings]) -> Iterator[tuple[_Key, ListenerSettings]]:
    """Yield listeners with what their sockets depend on. Port 0 may be there several times."""
    seen: dict[tuple[str, str, str], int] = {}
    for listener in listeners:
        place = (listener.address, listener.mode, listener.group)
        seen[place] = seen.get(place, 0) + 1
        yield (*place, seen[place]), listener


def store_name(listener: ListenerSettings) -> str:
    """Return the name of a listener in the service manager: FDNAME allows neither colons nor control characters."""
    return re.sub(r"[^A-Za-z0-9._\[\]/-]", "_", listener.name or listener.address)[:255]


def _fits(sock: socket.socket, listener: ListenerSettings, *, is_named: bool) -> bool:
    """Return whether a socket that was passed is what a listener would bind."""
    address = ListenAddress.parse(listener.address)
    if address.path:
        return sock.family == socket.AF_UNIX and sock.getsockname() == address.path
    if sock.family == socket.AF_UNIX:
        return False
    if address.port == 0:
        return is_named  # a free port, which the one before has chosen
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return any(sock.family == family and sock.getsockname()[:2] == place[:2] for family, _, _, _, place in found)
