"""The signals of a server, from its first moment: none but SIGTERM and SIGINT ends it.

Imports next to nothing: it runs before everything else does. See `Operations` (penstock.cli.operating) for what the
signals do.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

_HELD: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_IGNORED: Final = (
    *(signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR, signal.SIGXCPU, signal.SIGSTKFLT),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
"""All others whose default ends a process. Those of errors in the program, such as SIGSEGV and SIGABRT, still do."""
_SERVERS: Final = ("serve", "sink")


def stderr() -> int:
    """Return the descriptor of standard error; -1 if it is closed or not a file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # sys.stderr is None if it was closed before Python started
        return -1


def survive_signals(arguments: Sequence[str] = _SERVERS) -> None:
    """Have no signal end a server but SIGTERM and SIGINT; do nothing if the arguments are those of another command.

    Log rotation and terminals that close send SIGHUP or SIGUSR1, whose default would cut every session. SIGQUIT prints
    the stacks of all threads, unless the process hangs in compiled code; SIGABRT, which the watchdog sends, does so
    even then, and ends the process. SIGHUP, SIGUSR1 and SIGUSR2 wait for `accept_signals`.
    """
    if not arguments or arguments[0] not in _SERVERS:
        return
    for number in (*_HELD, *_IGNORED):
        signal.signal(number, signal.SIG_IGN)
    # A blocked signal waits even if it is ignored: who asks for a reload during the start gets it afterwards.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    descriptor = stderr()
    if descriptor >= 0:
        faulthandler.enable(descriptor, all_threads=True)

        # Not `faulthandler.register`, which reads the stacks of threads while these run and has crashed servers that
        # way. A Python handler runs with the lock of the interpreter; the thread that it interrupts goes on afterwards.
        def print_stacks(_number: int, _frame: FrameType | None) -> None:
            faulthandler.dump_traceback(descriptor, all_threads=True)

        signal.signal(signal.SIGQUIT, print_stacks)
    else:
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def accept_signals() -> None:
    """Let signals that have waited arrive: handlers are installed, or they are to be ignored."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
