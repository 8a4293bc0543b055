"""Users, groups and capabilities: what a server may do, and giving it up."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522


class Account(NamedTuple):
    """A user and a group that a process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups."""


def find_account(user: str, group: str = "") -> Account:
    """Return the account of a user and a group, each a name or a number. Raise ValueError, which begins with the key.

    The group is by default the primary one of the user, with the user's supplementary groups.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isascii() and user.isdecimal() else pwd.getpwnam(user)
    except KeyError as exc:
        raise ValueError(f"server.user: there is no user {user!r}") from exc
    if not group:
        return Account(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    try:
        gid = int(group) if group.isascii() and group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise ValueError(f"server.group: there is no group {group!r}") from exc
    return Account(entry.pw_uid, gid, (gid,))


def is_root() -> bool:
    """Return whether this process runs as root."""
    return os.geteuid() == 0


@contextmanager
def acting_as(account: Account | None) -> Iterator[None]:
    """Access files as another account in this thread only (setfsuid(2)); None changes nothing.

    Root must not follow the links of a directory that belongs to another user: they could lead anywhere.
    """
    libc = ctypes.CDLL(None)
    if account is None or not is_root() or not hasattr(libc, "setfsuid"):
        yield
        return
    libc.setfsgid(account.gid)
    libc.setfsuid(account.uid)  # also takes the capabilities about files out of the effective set
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())
        libc.setfsgid(os.getegid())


def drop_capabilities() -> None:
    """Give up all capabilities of this process, and the right to get others by executing a file. Raise OSError.

    Call it in the main thread before others start: capabilities belong to threads. Linux only; elsewhere, nothing
    happens.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl") or not hasattr(libc, "capset"):
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: two words each
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # fails before Linux 4.3, which has none
    for result in (libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), libc.capset(header, nothing)):
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
