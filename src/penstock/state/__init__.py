"""State that sessions share and that outlives a restart: rate limits and greylisting.

    tables.py     the tables: dictionaries, no I/O, one operation at a time
    snapshot.py   their copy in an SQLite file, written by a thread
    local.py      the state of a server that is one process: the tables are in it
    keeper.py     the state of several workers: the supervisor owns the tables and answers questions over sockets
    remote.py     the worker's end of such a socket

Checks use the interface `State` (base.py), which both implement.
"""

from __future__ import annotations

from penstock.state.base import Charge, GreylistTimes, Later, Learned, State, StateUnavailableError

__all__ = ("Charge", "GreylistTimes", "Later", "Learned", "State", "StateUnavailableError")
