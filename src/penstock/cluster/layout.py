"""What is where in the cluster: streams, subjects, and how a message and its state are written.

    stream NAME-MAIL-k          the partitions p with p mod streams = k
      NAME.m.P.ID               a message; at its end a marker in its place, or nothing
      NAME.b.P.ID.N             pieces of a body that is too large for one message, published before it
      NAME.b.P.ID.eN            pieces of an envelope that is too large even then
      NAME.s.P.ID               what has become of its recipients; absent as long as nothing has
      NAME.o.k.NODE             the marker of a node: what was published before it is in the stream where it is read
    bucket NAME-lease           P: which node relays a partition
    bucket NAME-node            NODE: the nodes that live
    bucket NAME-state           what nodes have found beside mail (penstock.cluster.exchange)
    bucket NAME-shared          what operators have requested of all nodes (penstock.cluster.control)
    NAME.op.NODE                requests of operators to a node (core NATS)
    NAME.control                the record of the operators has changed (core NATS)
    NAME.rates                  what was taken from rate limits within the last second (core NATS)
    NAME.new.P                  a node that does not relay the partition has put a message into it (core NATS)

A subject has one message at most. A message is published with the condition that its subject has none
(Nats-Expected-Last-Subject-Sequence: 0), so that publishing it again, after whatever was lost, changes nothing; a state
on the condition that the one it follows is the last, so that a node that has lost its partition cannot write over what
the next owner has written.

The envelope and the place of the body are in headers: the queue is rebuilt without reading bodies. What headers have no
space for, as there are many recipients, is in the payload: an envelope before the body, a state compressed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from penstock.message import Envelope, Message, MessageId
from penstock.net.natswire import parse_headers
from penstock.spool.entry import DUE, HELD
from penstock.spool.store import PLACES

MINIMUM_VERSION: Final = (2, 15, 1)
"""Of the servers: see README, *What Jepsen found*."""
VERSION: Final = 1
PIECE: Final = 512 * 1024
"""Octets of a piece."""
MARGIN: Final = 64 * 1024
"""Octets of a payload that are left for headers."""
_MOST_HEADER: Final = 32 * 1024
"""Octets of an envelope or a state in the headers, which have 64 KiB; a longer one is in the payload."""
_REPLY_OCTETS: Final = (1 << 20, 200, 0)
"""Characters of a last reply in a state: fewer if it does not fit otherwise."""
_MOST_STATE: Final = 256 << 20
"""Octets of a state that was compressed."""
FULL: Final = 0.9
"""Share of max_octets from which on mail is refused, so that states can still be written."""
WRONG_LAST_SEQUENCE: Final = 10071
STREAM_FULL: Final = (10047, 10077)
"""Error codes: insufficient storage; maximum bytes exceeded."""
TOMBSTONE_SECONDS: Final = 3600
"""How long it is known that a message whose acknowledgment may have been lost was relayed."""
PIECES_WAIT: Final = 24 * 3600.0
"""Seconds after which pieces without a message are deleted."""
_NANO: Final = 10**9

_FIELDS: Final = re.compile(
    rb"\r\nP-V: (\d{1,9})\r\nP-Env: (.*)\r\nP-At: (\S{1,40})\r\nP-Size: (\d{1,9}) (\d{1,9}) (\d{1,18}) (\d{1,9})\r\n"
    rb"P-CRC: ([0-9a-f]{8})\r\n"
)
"""The headers of a message, as `message_headers` writes them, with numbers that fit into the index."""
_RECEIVED: Final = re.compile(rb"\r\nP-At: (\S{1,40})\r\n")
_VERSION: Final = b"%d" % VERSION
_LATEST: Final = 1e15
"""Of times in seconds."""
_MOST_ATTEMPTS: Final = 1 << 31
_MOST_RECIPIENTS: Final = 1 << PLACES
_encode = msgspec.json.encode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


class RecipientState(NamedTuple):
    """The state of a recipient that is not finished."""

    place: int
    state: int
    """DUE or HELD of penstock.spool.entry."""
    due_at: float
    attempts: int
    delay_told: bool
    last_reply: str


_decode_states = msgspec.json.Decoder(list[RecipientState]).decode


class Place(NamedTuple):
    """Where a message is."""

    partition: int
    sequence: int
    pieces: int
    crc: int
    """CRC-32C of the prefix and the body."""
    envelope_octets: int
    """Octets of the payload before the prefix."""
    prefix_octets: int
    state_sequence: int
    """Sequence of its last state; 0 without one."""
    is_uncertain: bool
    """It was found in the stream: the one who accepted it may not know that it is there, and publish it again."""


class StoredMessage(NamedTuple):
    """A message, as its headers describe it."""

    id: MessageId
    envelope: Envelope | None
    """None if it is in the payload."""
    received_at: float
    size: int
    """Octets of the body."""
    place: Place


class LayoutError(ValueError):
    """A message in the stream cannot be read: another version, or damaged."""


class Layout:
    """The names of streams, subjects and buckets."""

    def __init__(self, name: str, *, streams: int, partitions: int) -> None:
        self.name = name
        self.streams = streams
        self.partitions = partitions

    def stream_of(self, partition: int) -> str:
        """Return the stream of a partition."""
        return self.stream(partition % self.streams)

    def stream(self, number: int) -> str:
        """Return the name of a stream."""
        return f"{self.name}-MAIL-{number}"

    def message(self, partition: int, message_id: str) -> str:
        """Return the subject of a message."""
        return f"{self.name}.m.{partition}.{message_id}"

    def state(self, partition: int, message_id: str) -> str:
        """Return the subject of the state of a message."""
        return f"{self.name}.s.{partition}.{message_id}"

    def piece(self, partition: int, message_id: str, number: int | str) -> str:
        """Return the subject of a piece of a message; "*" for all."""
        return f"{self.name}.b.{partition}.{message_id}.{number}"

    def marker(self, stream: int, node: str) -> str:
        """Return the subject of the marker of a node."""
        return f"{self.name}.o.{stream}.{node}"

    def announcement(self, partition: int | str) -> str:
        """Return the subject that announces new mail in a partition to its owner; "*" for all."""
        return f"{self.name}.new.{partition}"

    def operations(self, node: str) -> str:
        """Return the subject of requests to a node."""
        return f"{self.name}.op.{node}"

    @staticmethod
    def spool_queue(partition: int) -> str:
        """Return the queue of the local spool for messages that were, or may be, in a partition."""
        return f"cluster-{partition}"

    def spooled_partition(self, queue: str, message_id: str) -> int:
        """Return the partition for a message of the local spool: the same for each try."""
        word = queue.removeprefix("cluster-")
        if word != queue and word.isdecimal():
            return int(word) % self.partitions
        return zlib.crc32(message_id.encode()) % self.partitions  # it was spooled before there was a cluster

    @property
    def leases(self) -> str:
        """The bucket of the leases."""
        return f"{self.name}-lease"

    @property
    def nodes(self) -> str:
        """The bucket of the living nodes."""
        return f"{self.name}-node"

    @property
    def shared(self) -> str:
        """The bucket of what operators have requested of all nodes."""
        return f"{self.name}-shared"

    @property
    def state_bucket(self) -> str:
        """The bucket of what nodes have found beside mail."""
        return f"{self.name}-state"

    @property
    def rates(self) -> str:
        """The subject of what was taken from rate limits."""
        return f"{self.name}.rates"

    @property
    def control(self) -> str:
        """The subject of the record of the operators."""
        return f"$KV.{self.shared}.control"

    @property
    def control_changed(self) -> str:
        """The subject on which nodes hear that the record of the operators has changed."""
        return f"{self.name}.control"

    def subjects(self, stream: int) -> list[str]:
        """Return the subjects of a stream."""
        if self.streams == 1:
            return [f"{self.name}.{kind}.>" for kind in "mbso"]
        mine = range(stream, self.partitions, self.streams)
        return [f"{self.name}.{kind}.{partition}.>" for kind in "mbs" for partition in mine] + [
            f"{self.name}.o.{stream}.>"
        ]

    def stream_configuration(self, stream: int, *, replicas: int, max_octets: int) -> dict[str, Any]:
        """Return the configuration of a stream, as the API of JetStream has it."""
        return {
            "name": self.stream(stream),
            "subjects": self.subjects(stream),
            "storage": "file",
            "num_replicas": replicas,
            "retention": "limits",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_bytes": max_octets,
            "max_age": 0,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "duplicate_window": 120 * _NANO,
            "metadata": {"penstock_partitions": str(self.partitions), "penstock_streams": str(self.streams)},
            # With s2, 2.15.1 fails to recover a stream after SIGKILL: "smb.truncate: error reading compression reader:
            # s2: corrupt input" (python -m bench.cluster finds it within some rounds).
            "compression": "none",
        }

    def bucket_configurations(self, *, replicas: int, lease: float) -> list[dict[str, Any]]:
        """Return the configurations of the streams of the buckets."""
        common = {
            "storage": "file",
            "num_replicas": replicas,
            "discard": "new",
            "max_msgs_per_subject": 1,
            "compression": "none",
            "allow_direct": True,
            "allow_msg_ttl": True,
            "deny_delete": True,
            "allow_rollup_hdrs": True,
            "max_bytes": 64 << 20,
        }
        age = int(lease * _NANO)
        ages = {self.leases: age, self.nodes: age, self.shared: 0, self.state_bucket: 0}
        # What nodes have found expires, and the oldest goes when there is too much.
        special = {self.state_bucket: {"discard": "old", "max_bytes": 256 << 20}}
        return [
            {
                **common,
                **special.get(bucket, {}),
                "name": f"KV_{bucket}",
                "subjects": [f"$KV.{bucket}.>"],
                "max_age": age,
                "duplicate_window": min(age or 120 * _NANO, 120 * _NANO),
            }
            for bucket, age in ages.items()
        ]


# ---- messages


def encode_envelope(envelope: Envelope) -> tuple[bytes, bytes]:
    """Return an envelope for the headers, and what comes before the prefix in the payload. One of them is empty."""
    encoded = _encode(envelope)
    return (encoded, b"") if len(encoded) <= _MOST_HEADER else (b"", encoded)


def message_headers(message: Message, envelope: bytes, before: bytes, *, crc: int, pieces: int) -> bytes:
    """Return the headers of a message; `envelope` and `before` are those of `encode_envelope`."""
    return (
        b"NATS/1.0\r\nNats-Msg-Id: %s\r\nNats-Expected-Last-Subject-Sequence: 0\r\nP-V: %d\r\nP-Env: %s\r\n"
        b"P-At: %r\r\nP-Size: %d %d %d %d\r\nP-CRC: %08x\r\n\r\n"
        % (
            message.id.encode(),
            VERSION,
            envelope,
            message.received_at,
            len(before),
            len(message.prefix),
            message.body.size,
            pieces,
            crc,
        )
    )


def is_marker(headers: bytes) -> bool:
    """Return whether this is a marker in the place of a message that is finished."""
    return b"\r\nP-Done:" in headers


def read_message(subject: str, sequence: int, headers: bytes) -> StoredMessage | None:
    """Return a message that was found in the stream; None for a marker in its place. Raise LayoutError."""
    found = _FIELDS.search(headers)
    if found is None:
        if is_marker(headers):
            return None
        raise LayoutError(f"{subject} at sequence {sequence} cannot be read: {headers[:200]!r}")
    version, encoded, at, before, prefix, size, pieces, crc = found.groups()
    if version != _VERSION:
        raise LayoutError(f"{subject} has version {version.decode()}, expected {VERSION}")
    try:
        _, partition, message_id = subject.rsplit(".", 2)
        envelope = _decode_envelope(encoded) if encoded else None
        place = Place(int(partition), sequence, int(pieces), int(crc, 16), int(before), int(prefix), 0, True)
        message = StoredMessage(MessageId(message_id), envelope, float(at), int(size), place)
    except (ValueError, msgspec.MsgspecError, RecursionError) as exc:
        raise LayoutError(f"{subject} at sequence {sequence} cannot be read: {exc!r}") from exc
    if not 0 <= message.received_at < _LATEST:
        raise LayoutError(f"{subject} at sequence {sequence} cannot be read: its time is {message.received_at}")
    return message


def read_envelope(data: bytes) -> Envelope:
    """Return an envelope that was in a payload. Raise LayoutError."""
    try:
        return _decode_envelope(data)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise LayoutError(f"the envelope cannot be read: {exc}") from exc


def tombstone_headers(sequence: int) -> bytes:
    """Return the headers of the marker that takes the place of a message that is finished."""
    return b"NATS/1.0\r\nP-Done: 1\r\nNats-TTL: %ds\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n" % (
        TOMBSTONE_SECONDS,
        sequence,
    )


# ---- states


def state_record(
    states: Sequence[RecipientState], last: int, *, received_at: float | None = None, most: int = 1 << 19
) -> tuple[bytes, bytes]:
    """Return payload and headers of a state that follows the one with sequence `last`; 0 for the first.

    `received_at` is when the message was received, as its node knows now: the clock may have been set since. A payload
    of more than `most` octets gets shorter last replies.
    """
    data, encoded = b"", _encode(states)
    if len(encoded) > _MOST_HEADER:
        for length in _REPLY_OCTETS:
            shorter = [each._replace(last_reply=each.last_reply[:length]) for each in states]
            data, encoded = zlib.compress(_encode(shorter), 1), b""
            if len(data) <= most:
                break
    return data, b"NATS/1.0\r\nP-V: %d\r\nNats-Expected-Last-Subject-Sequence: %d\r\n%sP-State: %s\r\n\r\n" % (
        VERSION,
        last,
        b"" if received_at is None else b"P-At: %r\r\n" % received_at,
        encoded,
    )


def read_received_at(headers: bytes) -> float | None:
    """Return when the message of a state was received; None if the state does not say."""
    found = _RECEIVED.search(headers)
    try:
        received_at = -1.0 if found is None else float(found[1])
    except ValueError:
        return None
    return received_at if 0 <= received_at < _LATEST else None


def has_state_in_payload(headers: bytes) -> bool:
    """Return whether the payload is needed to read a state."""
    return b"\r\nP-State: \r\n" in headers


def read_state(headers: bytes, data: bytes = b"") -> list[RecipientState]:
    """Return the state of the recipients that are left. Raise LayoutError."""
    try:
        encoded: str | bytes = parse_headers(headers)["P-State"]
        states = _decode_states(encoded or zlib.decompressobj().decompress(data, _MOST_STATE))
    except (KeyError, msgspec.MsgspecError, RecursionError, zlib.error) as exc:
        raise LayoutError(f"a state cannot be read: {exc!r}") from exc
    for each in states:
        is_known = each.state in (DUE, HELD) and 0 <= each.place < _MOST_RECIPIENTS
        if not is_known or not 0 <= each.attempts < _MOST_ATTEMPTS or not abs(each.due_at) < _LATEST:
            raise LayoutError(f"a state cannot be read: {each!r}")
    return states
