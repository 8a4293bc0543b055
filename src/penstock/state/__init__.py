"""State that sessions share and that outlives a restart: rate limits and greylisting.

    tables.py     the tables: dictionaries, no I/O, one operation at a time
    snapshot.py   their copy in an SQLite file, written by a thread
    local.py      the state of a server that is one process: the tables are in it
    keeper.py     the state of several workers: the supervisor owns the tables and answers questions over sockets
    remote.py     the worker's end of such a socket

`State` (base.py) is what checks use; they cannot tell which of the two it is.
"""

from __future__ import annotations

from penstock.state.base import Charge, GreylistTimes, Later, State, StateUnavailableError

__all__ = ("Charge", "GreylistTimes", "Later", "State", "StateUnavailableError")
