"""The report of a sink: one JSON document, whose shape is versioned and described here.

`penstock sink --describe-report` prints the JSON Schema made from these classes. All latencies are nanoseconds.

What the clocks mean
--------------------
A verb's latency (`MAIL`, `RCPT`, `DATA`: the 354 ...) runs from the moment the server has the octets that end the
command to the moment the reply is given to the kernel: it holds whatever the server waited for (a delay of the fault
plan, a disk), and the turns of the sockets that were served in between, but not the network. What was pipelined came at
once, so it includes the commands before it. Octets that a plan sends slowly (`write_rate`, `split`) count as `think`.

    banner    accept to greeting, without the handshake of implicit TLS
    text      the first octets behind the 354 (or of the first BDAT) to those with the end of the text
    message   those to the reply: what accepting took
    tls       ready for the ClientHello to the end of the handshake
    think     a reply to the next octets of the client: its own time, and the network's
    unasked   what answers nothing, as a 421 at a time-out, or a reply in the midst of a text; it has no latency of its
              own worth reading

What becomes of a message
-------------------------
A message whose text has begun is counted once, by what the sink made of it and what its client can know:

    accepted  the sink took it, and a whole reply 2yz went out: the client could read it, dressed or not
    unheard   the sink took it, and no such reply went out: the end of the connection in its place, garbage, a reply
              that does not end, another code (a `wrong-code`, or a 4yz where the rule says `keeps`). The client can not
              know and may send it again: that is no fault of its own (RFC 1047)
    refused   the sink did not take it and made a 4yz or 5yz, whatever went out of that; in LMTP one a recipient
    lost      neither: its connection ended before the sink had made a reply, or its client gave it up (RSET, QUIT or
              EHLO behind a BDAT)

Whether the client has read what went out, nobody knows. Marks, recipients, octets and what `--messages` waits for are
those of `accepted` and `unheard` together: what the sink has.

Replies are counted as they went out. One that went out wrong says how in `garbled`; its code is what the client can
read of it, 0 where it is no reply, or not a whole one. `none` is the end of the connection in the place of a reply.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from penstock.metrics._histogram import Histogram

VERSION: Final = 1
"""Goes up whenever a reader of an older report would be misled; new keys do not raise it."""
Meta = msgspec.Meta


class SessionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections."""

    total: Annotated[int, Meta(description="Connections so far, those that were turned away among them")]
    open: Annotated[int, Meta(description="Connections that are open now")]
    peak: Annotated[int, Meta(description="The most that were open at a time")]
    tls: Annotated[int, Meta(description="Handshakes that came to their end")]
    tls_failed: Annotated[int, Meta(description="Handshakes that came to nothing, for whatever reason")]
    ends: Annotated[dict[str, int], Meta(description="Why connections ended; beyond 64 causes, `others`")]


class MessageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Messages."""

    accepted: Annotated[int, Meta(description="Messages that were taken, and answered with a 2yz that can be read")]
    unheard: Annotated[
        int,
        Meta(description="Messages that were taken, and whose clients can not know: a fault stood in the place of 2yz"),
    ] = 0
    refused: Annotated[
        int, Meta(description="Refusals after a text, whatever a fault made of the reply; in LMTP one a recipient")
    ]
    lost: Annotated[int, Meta(description="Messages that had begun, and ended with their connection")]
    lost_by: Annotated[dict[str, int], Meta(description="Why those were lost")]
    recipients: Annotated[int, Meta(description="Recipients of the messages that were taken")]
    octets: Annotated[int, Meta(description="Octets of their texts, dots un-stuffed")]


class OctetCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Octets on the sockets."""

    received: Annotated[int, Meta(description="As they came from the sockets, TLS records as they are")]
    sent: Annotated[int, Meta(description="Of replies as they went out, before TLS")]


class ReplyCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often a phase was answered with a code, or with something else."""

    phase: Annotated[str, Meta(description="A verb, or one of: unknown, message, banner, unasked")]
    code: Annotated[int, Meta(description="The reply code as a client can read it; 0 for a reply that has none")]
    status: Annotated[str | None, Meta(description="The enhanced status code, such as 2.1.0")]
    garbled: Annotated[
        str | None,
        Meta(description="How it went out wrong, as a fault plan calls it; none: the connection ended in its place"),
    ] = None
    count: Annotated[int, Meta(description="Exact")]


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
        Meta(description="Buckets that are not empty as [least, count]; at most 1.6 % of their value wide"),
    ] = None


class RunCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The messages of one run, told apart by their numbers."""

    run: Annotated[str, Meta(description="What the mark calls the run")]
    received: Annotated[int, Meta(description="Messages that were taken, duplicates among them")]
    distinct: Annotated[int, Meta(description="Numbers that have come at least once")]
    duplicates: Annotated[int, Meta(description="Messages whose number had come before")]
    duplicate_examples: Annotated[list[int], Meta(description="Up to 100 of their numbers")]
    out_of_order: Annotated[int, Meta(description="Messages behind one with a higher number, and no duplicates")]
    first: Annotated[int, Meta(description="Where the numbers begin: 0 when 0 has come, else 1")]
    highest: Annotated[int, Meta(description="The highest number that has come")]
    missing: Annotated[int, Meta(description="Numbers that have not come, up to `highest`, or of the `expected`")]
    missing_examples: Annotated[list[int], Meta(description="The first 100 of them")]


class SequenceCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Loss and duplicates, by the marks of the messages (penstock.sequence)."""

    source: Annotated[str, Meta(description="Where the marks were looked for")]
    expected: Annotated[int | None, Meta(description="How many messages a run has, as --expect says")]
    unmarked: Annotated[int, Meta(description="Messages that were taken, without a mark")]
    further: Annotated[int, Meta(description="Marks there was no room to tell apart: beyond 64 runs or 64 MiB")]
    runs: list[RunCounts]


class FaultCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often a rule of the fault plan did something."""

    rule: str
    phase: str
    action: str
    count: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One second."""

    at: Annotated[float, Meta(description="Seconds since the start, at its end")]
    seconds: Annotated[float, Meta(description="How long it was")]
    messages: Annotated[int, Meta(description="Taken, heard or not")]
    replies: int
    sessions: Annotated[int, Meta(description="Open at its end")]
    connected: Annotated[int, Meta(description="New connections")]
    received: Annotated[int, Meta(description="Octets from the sockets")]
    octets: Annotated[int, Meta(description="Octets of their texts")]
    faults: Annotated[int, Meta(description="Faults applied")]
    codes: Annotated[dict[str, int], Meta(description="Replies by code, 0 for those that were none")]
    p50: Annotated[int, Meta(description="Of `message`, in nanoseconds; 0 when there was none")]
    p90: int
    p99: int
    max: int
    reply_p50: Annotated[int, Meta(description="Of all replies")]
    reply_p99: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink has received."""

    schema: Literal["penstock-receipts"] = "penstock-receipts"
    version: Annotated[int, Meta(description="Of this shape")] = VERSION
    made_by: str
    listen: Annotated[list[str], Meta(description="Where clients came in")]
    started_at: Annotated[str, Meta(description="ISO 8601, UTC: the start, or the last reset of the counters")]
    seconds: Annotated[float, Meta(description="Since then")]
    sessions: SessionCounts
    messages: MessageCounts
    octets: OctetCounts
    replies: Annotated[list[ReplyCount], Meta(description="By phase, code, status and garbling")]
    further_replies: Annotated[int, Meta(description="Of kinds beyond the 1,024th")]
    latencies: Annotated[dict[str, Latency], Meta(description="By phase; those that never were are not there")]
    sequences: SequenceCounts
    faults: Annotated[list[FaultCount], Meta(description="Applied faults")]
    samples: Annotated[list[Sample], Meta(description="The last seconds, the newest at the end")]


def latency_of(histogram: Histogram, *, with_buckets: bool) -> Latency:
    """Return what the report says of a histogram."""
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
    """Return a report as JSON for people and machines."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def decode(data: bytes) -> Report:
    """Read a report. Raise ValueError for what is none, or is of a version that is not known here."""
    try:
        report = msgspec.json.decode(data, type=Report)
    except msgspec.DecodeError as exc:
        raise ValueError(f"this is no report of a sink: {exc}") from exc
    if report.version != VERSION:
        raise ValueError(f"this report is of version {report.version}; version {VERSION} is what can be read here")
    return report


def json_schema() -> bytes:
    """Return the JSON Schema of the report."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report)), indent=2) + b"\n"
