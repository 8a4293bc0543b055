"""Makes and attaches the memory that the processes of a server share (ext/shared.pyx)."""

from __future__ import annotations

import mmap
import os
from typing import Final

from penstock.metrics._shared import Segment, SharedTable, segment_octets

_KEY_OCTETS: Final = 16


def pages_for(workers: int) -> int:
    """Return the pages for a number of workers: while they are replaced one by one, the old and the new ones live."""
    return 2 * workers + 2


def private_segment(pages: int = 1) -> Segment:
    """Make a segment for this process alone."""
    return Segment(mmap.mmap(-1, segment_octets(pages)), pages, os.urandom(_KEY_OCTETS))


def private_table() -> SharedTable:
    """Make a table for this process alone."""
    segment = private_segment()
    return SharedTable(segment.page(segment.claim()))


def shared_segment(pages: int) -> tuple[Segment, int]:
    """Make a segment for this process and those it starts; return it and its descriptor, which they inherit.

    Pages that are not used take no memory. Raise OSError.
    """
    descriptor = os.memfd_create("penstock", os.MFD_CLOEXEC)
    try:
        size = segment_octets(pages)
        os.ftruncate(descriptor, size)
        return Segment(mmap.mmap(descriptor, size), pages, os.urandom(_KEY_OCTETS)), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def attach_segment(descriptor: int) -> Segment:
    """Use the segment of an inherited descriptor, and close that. Raise OSError or ValueError."""
    try:
        return Segment(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)
