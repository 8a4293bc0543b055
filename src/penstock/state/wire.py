"""What workers and the keeper say to each other: one packet for each question, and one for each answer."""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.state.base import Charge, GreylistTimes, Learned

MOST_OCTETS: Final = 1 << 20
"""Of a question, and of what waits in a socket."""
ANSWER_OCTETS: Final = 64


class Available(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """`State.available`."""

    number: int
    charges: tuple[Charge, ...]


class Take(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """`State.take`."""

    number: int
    charges: tuple[Charge, ...]


class GiveBack(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """`State.give_back`; it has no answer."""

    charges: tuple[Charge, ...]


class Note(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """`State.note`; it has no answer."""

    charges: tuple[Charge, ...]


class Learn(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """`State.learn`; it has no answer."""

    entries: tuple[Learned, ...]


class Greylist(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """`State.greylist`."""

    number: int
    key: str
    times: GreylistTimes


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an operation has returned."""

    number: int
    value: int


Question = Available | Take | GiveBack | Note | Greylist | Learn
encode: Final = msgspec.msgpack.Encoder().encode
decode_question: Final = msgspec.msgpack.Decoder(Question).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
