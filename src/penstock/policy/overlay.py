"""A body with edits: octets left out, replaced or inserted when it is read, so that nothing is copied or rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from penstock.message import Body


class Edit(NamedTuple):
    """A range of octets of a body, and what takes its place."""

    start: int
    stop: int
    octets: bytes = b""


class EditedBody:
    """A body that reads as if it had been edited. It cannot be linked to a name: its file has the original."""

    __slots__ = ("_body", "_edits", "in_memory", "size")

    def __init__(self, body: Body, edits: Sequence[Edit]) -> None:
        """`edits` are in ascending order and do not overlap. Raise ValueError for others."""
        self._body = body
        self._edits = tuple(edits)
        self.in_memory = getattr(body, "in_memory", False)
        self.size = body.size
        at = 0
        for start, stop, octets in self._edits:
            if not at <= start <= stop <= body.size:
                raise ValueError(f"edits overlap or are not within {body.size} octets")
            at = stop
            self.size += len(octets) - (stop - start)

    def chunks(self) -> Iterator[bytes]:
        """Yield the edited body. May block on the disk as the original does."""
        edits = iter(self._edits)
        edit = next(edits, None)
        at = 0
        for chunk in self._body.chunks():
            end = at + len(chunk)
            done = at
            while edit is not None and edit.start < end:
                if edit.start > done:
                    yield chunk[done - at : edit.start - at]
                if edit.octets and edit.start >= at:
                    yield edit.octets
                done = min(max(done, edit.stop), end)
                if edit.stop > end:
                    break
                edit = next(edits, None)
            if done == at:
                yield chunk
            elif done < end:
                yield chunk[done - at :]
            at = end
        while edit is not None:  # insertions at the end
            if edit.octets and edit.start >= at:
                yield edit.octets
            edit = next(edits, None)

    def close(self) -> None:
        """Release the original."""
        self._body.close()
