"""The report of a sink: one JSON document with a version, described by the classes below.

`penstock sink --describe-report` prints their JSON Schema. All latencies are in nanoseconds.

Latencies
---------
The latency of a command (`MAIL`, `RCPT`, `DATA` up to its 354 ...) starts when the server has received the octets that
end the command and stops when the reply is passed to the kernel. It includes everything the server waited for (a delay
of the fault plan, a disk) and the turns of other sessions in between, but not the network. Pipelined commands arrive
together, so their latency includes that of the commands before them. Replies that a plan sends slowly (`write_rate`,
`split`) count as `think`.

    banner    accept to greeting, without the handshake of implicit TLS
    text      first octets after the 354 (or of the first BDAT) to the octets that end the text
    message   end of the text to the reply: the time that accepting took
    tls       ready for the ClientHello to the end of the handshake
    think     a reply to the next octets of the client: client and network
    unasked   replies to no command, such as 421 after a timeout or a reply in the middle of a text; its latency has no
              meaning

Outcomes of a message
---------------------
Every message whose text has begun is counted once, by what the sink did and what the client can know:

    accepted  accepted, and a complete 2xx reply was sent, corrupted or not, that the client could read
    unheard   accepted, but no such reply was sent: the connection was closed instead, or the reply was garbage, not
              terminated, or had another code (`wrong-code`, or a 4xx with `keeps`). The client cannot know and may send
              the message again without being at fault (RFC 1047)
    refused   not accepted and answered with 4xx or 5xx, whatever was sent of that; in LMTP one for each recipient
    lost      neither: the connection ended before the sink had a reply, or the client gave up the message (RSET, QUIT
              or EHLO after a BDAT)

Whether the client has read what was sent is unknown. Sequence tags, recipients, octets and `--messages` refer to
`accepted` and `unheard` together: all messages that the sink has.

Replies are counted as they were sent. `garbled` names the fault of a corrupted reply, `none` means that the connection
was closed instead; `code` is the code that the client can read in it, 0 if it is no reply or incomplete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec

from penstock.metrics._histogram import Histogram

VERSION: Final = 1
"""Increased when a change would mislead existing readers; new keys do not increase it."""
Meta = msgspec.Meta


class SessionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections."""

    total: Annotated[int, Meta(description="Connections, including refused ones")]
    open: Annotated[int, Meta(description="Connections that are open now")]
    peak: Annotated[int, Meta(description="Maximum number of simultaneous connections")]
    tls: Annotated[int, Meta(description="Completed TLS handshakes")]
    tls_failed: Annotated[int, Meta(description="Failed TLS handshakes")]
    ends: Annotated[dict[str, int], Meta(description="Connections by cause of their end; after 64 causes, `others`")]


class MessageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Messages."""

    accepted: Annotated[int, Meta(description="Accepted messages with a readable 2xx reply")]
    unheard: Annotated[
        int,
        Meta(description="Accepted messages whose clients received no readable 2xx reply because of a fault"),
    ] = 0
    refused: Annotated[int, Meta(description="Messages refused after their text; in LMTP one for each recipient")]
    lost: Annotated[int, Meta(description="Messages that began and did not end")]
    lost_by: Annotated[dict[str, int], Meta(description="Lost messages by cause")]
    recipients: Annotated[int, Meta(description="Recipients of accepted and unheard messages")]
    octets: Annotated[int, Meta(description="Octets of their texts, without dot-stuffing")]


class OctetCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Octets on the sockets."""

    received: Annotated[int, Meta(description="Octets received from the sockets, TLS records included")]
    sent: Annotated[int, Meta(description="Octets of replies as sent, before TLS")]


class ReplyCount(msgspec.Struct, frozen=True, kw_only=True):
    """Number of replies of one kind."""

    phase: Annotated[str, Meta(description="A command, or one of: unknown, message, banner, unasked")]
    code: Annotated[int, Meta(description="Reply code that a client can read; 0 without a reply code")]
    status: Annotated[str | None, Meta(description="Enhanced status code, such as 2.1.0")]
    garbled: Annotated[
        str | None,
        Meta(description="Fault that corrupted the reply; none: the connection was closed instead"),
    ] = None
    count: Annotated[int, Meta(description="Number of replies")]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """The latencies of a phase, in nanoseconds."""

    count: int
    min: int
    mean: int
    p50: int
    p90: int
    p99: int
    p999: int
    max: int
    histogram: Annotated[
        dict[str, Any] | None,
        Meta(description="Non-empty buckets as [lower bound, count]; relative width at most 1.6 %"),
    ] = None


class RunCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Numbered messages of one run."""

    run: Annotated[str, Meta(description="Name of the run in the sequence tags")]
    received: Annotated[int, Meta(description="Received messages, including duplicates")]
    distinct: Annotated[int, Meta(description="Distinct numbers received")]
    duplicates: Annotated[int, Meta(description="Messages whose number was received before")]
    duplicate_examples: Annotated[list[int], Meta(description="Up to 100 of their numbers")]
    out_of_order: Annotated[
        int, Meta(description="Messages received after one with a higher number, without duplicates")
    ]
    first: Annotated[int, Meta(description="First number of the run: 0 if 0 was received, otherwise 1")]
    highest: Annotated[int, Meta(description="Highest number received")]
    missing: Annotated[int, Meta(description="Numbers not received, up to `highest`, or of the `expected` ones")]
    missing_examples: Annotated[list[int], Meta(description="The first 100 of them")]


class MessageIdCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Duplicates by Message-ID, of messages without a sequence tag; counted where messages are kept (--keep)."""

    distinct: Annotated[int, Meta(description="Different Message-IDs")]
    duplicates: Annotated[int, Meta(description="Messages whose Message-ID had arrived before")]
    duplicate_examples: Annotated[list[str], Meta(description="Up to 100 of them")]
    missing_id: Annotated[int, Meta(description="Messages without a Message-ID")]
    further: Annotated[int, Meta(description="Messages beyond the limit of 500,000 Message-IDs, which are not tracked")]


class SequenceCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Missing and duplicate messages, by their sequence tags (penstock.sequence)."""

    source: Annotated[str, Meta(description="Where sequence tags were looked for")]
    expected: Annotated[int | None, Meta(description="Expected messages of each run (--expect)")]
    unmarked: Annotated[int, Meta(description="Messages without a sequence tag")]
    further: Annotated[int, Meta(description="Tags beyond the limits of 64 runs and 64 MiB, which are not tracked")]
    runs: list[RunCounts]
    message_ids: MessageIdCounts | None = None


class FaultCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often a rule injected a fault."""

    rule: str
    phase: str
    action: str
    count: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One second."""

    at: Annotated[float, Meta(description="End of the sample, in seconds since the start")]
    seconds: Annotated[float, Meta(description="Length in seconds")]
    messages: Annotated[int, Meta(description="Accepted and unheard messages")]
    replies: int
    sessions: Annotated[int, Meta(description="Open connections at its end")]
    connected: Annotated[int, Meta(description="New connections")]
    received: Annotated[int, Meta(description="Octets received from the sockets")]
    octets: Annotated[int, Meta(description="Octets of message texts")]
    faults: Annotated[int, Meta(description="Injected faults")]
    codes: Annotated[dict[str, int], Meta(description="Replies by code, 0 for unreadable ones")]
    p50: Annotated[int, Meta(description="Latency of `message` in nanoseconds; 0 without messages")]
    p90: int
    p99: int
    max: int
    reply_p50: Annotated[int, Meta(description="Latency of all replies")]
    reply_p99: int


SUMS: Final = ("messages", "replies", "connected", "received", "octets", "faults")
"""What is added where samples are merged, besides the codes."""


def codes_of(samples: Sequence[Sample]) -> Counter[str]:
    """Return the sum of the codes."""
    codes: Counter[str] = Counter()
    for each in samples:
        codes.update(each.codes)
    return codes


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of a sink."""

    schema: Literal["penstock-receipts"] = "penstock-receipts"
    version: Annotated[int, Meta(description="Version of the format")] = VERSION
    made_by: str
    listen: Annotated[list[str], Meta(description="Listening addresses")]
    started_at: Annotated[str, Meta(description="Start or last reset of the counters (ISO 8601, UTC)")]
    seconds: Annotated[float, Meta(description="Seconds since then")]
    sessions: SessionCounts
    messages: MessageCounts
    octets: OctetCounts
    replies: Annotated[list[ReplyCount], Meta(description="Replies by phase, code, status and corruption")]
    further_replies: Annotated[int, Meta(description="Replies of kinds after the first 1,024")]
    latencies: Annotated[
        dict[str, Latency], Meta(description="Latencies by phase; phases that did not occur are omitted")
    ]
    sequences: SequenceCounts
    faults: Annotated[list[FaultCount], Meta(description="Injected faults by rule")]
    samples: Annotated[list[Sample], Meta(description="The last 600 seconds, newest last")]


def percentiles_of(messages: Histogram, replies: Histogram) -> dict[str, int]:
    """Return the latencies of a sample."""
    return {
        **{f"p{p}": messages.percentile(p) for p in (50, 90, 99)},
        **{f"reply_p{p}": replies.percentile(p) for p in (50, 99)},
        "max": messages.max,
    }


def latency_of(histogram: Histogram, *, with_buckets: bool) -> Latency:
    """Return the summary of a histogram."""
    return Latency(
        count=histogram.count,
        min=histogram.min,
        mean=round(histogram.mean),
        p50=histogram.percentile(50),
        p90=histogram.percentile(90),
        p99=histogram.percentile(99),
        p999=histogram.percentile(99.9),
        max=histogram.max,
        histogram=histogram.to_dict() if with_buckets else None,
    )


def encode(report: Report) -> bytes:
    """Return a report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def decode(data: bytes) -> Report:
    """Parse a report. Raise ValueError for anything else, or for another version."""
    try:
        report = msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ValueError(f"not a report of a sink: {exc}") from exc
    if report.version != VERSION:
        raise ValueError(f"the report has version {report.version}; only version {VERSION} is supported")
    return report


def json_schema() -> bytes:
    """Return the JSON Schema of the report."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report)), indent=2) + b"\n"
