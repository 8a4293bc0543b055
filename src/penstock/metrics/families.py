"""The metrics of a server: their names, types, labels and meanings. Durations are seconds, sizes octets.

Labels have closed sets of values, except for `destination` and `hop` (bounded by `metrics.destinations`; the others are
"other") and what an operator names in the configuration (listeners, checks).
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

PREFIX: Final = "penstock_"
OTHER: Final = "other"
"""The destination of all that have no series of their own."""

Type = Literal["counter", "gauge", "histogram"]


class Family(NamedTuple):
    """One metric: all its series."""

    type: Type
    help: str
    unit: Literal["s", "o", "n"] = "n"
    """Of a histogram: seconds (counted in nanoseconds), octets, or a number."""


def _counter(text: str) -> Family:
    return Family("counter", text)


def _gauge(text: str) -> Family:
    return Family("gauge", text)


FAMILIES: Final[dict[str, Family]] = {
    # sessions
    "sessions_total": _counter("Ended connections, by listener and cause"),
    "sessions": _gauge("Connections that are open, by listener"),
    "admission_refused_total": _counter("Connections refused before the greeting, by limit"),
    "accept_errors_total": _counter("Failures to accept a connection, such as missing descriptors"),
    "commands_total": _counter("Replies to commands, by verb and class of the reply; message: after the final dot"),
    "replies_total": _counter("Replies, by code"),
    "messages_accepted_total": _counter("Messages answered with 250, by listener and kind of delivery"),
    "messages_refused_total": _counter("Messages refused after the final dot, by phase, code and enhanced status"),
    "recipients_refused_total": _counter("Recipients refused, by code and enhanced status"),
    "message_octets_total": _counter("Octets of accepted messages"),
    "message_size_octets": Family("histogram", "Sizes of accepted messages", "o"),
    "accept_seconds": Family("histogram", "Time from the final dot to the 250", "s"),
    "policy_results_total": _counter("Results of checks for messages, by check, result and mode"),
    "policy_verdicts_total": _counter("Verdicts of checks that counted, by check and verdict"),
    "policy_would_total": _counter("Verdicts of checks in monitor mode, which had no effect, by check and verdict"),
    "policy_seconds": Family("histogram", "Duration of a policy call, by check and hook point", "s"),
    "policy_failures_total": _counter(
        "Policies that raised an exception, timed out or returned an invalid value, by check"
    ),
    "auth_total": _counter("Authentications, by mechanism and result"),
    "tls_handshakes_total": _counter("TLS handshakes of clients, by version and result"),
    "tls_certificate_not_after_seconds": _gauge("Expiry of the certificate of a listener, as a Unix time"),
    "body_memory_octets": _gauge("Octets of message bodies in memory"),
    # spool
    "spool_messages": _gauge("Messages in the spool"),
    "spool_recipients": _gauge("Recipients in the spool"),
    "spool_octets": _gauge("Octets of the messages in the spool"),
    "spool_oldest_seconds": _gauge("Age of the oldest message in the spool"),
    "spool_free_octets": _gauge("Free octets of the file system of the spool, without the reserve"),
    "spool_commit_seconds": Family("histogram", "Duration of a transaction of the spool, including its fsync", "s"),
    "spool_batch": Family("histogram", "Requests of a transaction of the spool", "n"),
    "spool_waiting": _gauge("Messages that wait to be written to the spool"),
    # relay
    "relay_attempts_total": _counter("Attempts to deliver to a recipient, by outcome"),
    "relay_attempts_by_destination_total": _counter("Attempts by domain of the recipient and outcome"),
    "relay_seconds": Family("histogram", "Time from the arrival of a message to its delivery", "s"),
    "relay_queue": _gauge("Recipients in the spool, by domain"),
    "relay_hop_up": _gauge("1 if a next hop is used, 0 while it is backing off after failures"),
    "relay_connections": _gauge("Connections to a next hop"),
    "reports_total": _counter("Delivery reports, by kind"),
    # the server
    "journal_dropped_total": _counter("Journal lines that could not be written"),
    "workers": _gauge("Worker processes that accept mail"),
    "worker_restarts_total": _counter("Restarted workers, by cause"),
    "reload_total": _counter("Reloads of the configuration or of its files, by result"),
    "reload_last_success_seconds": _gauge("Time of the last reload that succeeded, as a Unix time"),
    "clock_jumps_total": _counter("Jumps of the clock of the machine"),
    "draining": _gauge("1 while the server is drained"),
    "build_info": _gauge("Version of Penstock and of Python; always 1"),
    # the replicated queue
    "jetstream_acks_total": _counter("Messages sent to the cluster, by result: stored by a majority, full, failed"),
    "jetstream_ack_seconds": Family("histogram", "Time until a majority of the cluster has stored a message", "s"),
    "jetstream_in_flight": _gauge("Messages that wait for the cluster"),
    "jetstream_resent_total": _counter("Messages sent to the cluster again"),
    "jetstream_fallback_total": _counter("Messages written to the local spool because the cluster did not answer"),
    "jetstream_connected": _gauge("1 while the cluster is connected"),
    "jetstream_leases": _gauge("Partitions of the replicated queue that this node relays"),
    "jetstream_takeovers_total": _counter("Leases taken over from other nodes"),
    "jetstream_forward_waiting": _gauge("Messages of the local spool that wait to be forwarded to the cluster"),
    "jetstream_forwarded_total": _counter("Messages moved from the local spool into the replicated queue"),
    "jetstream_damaged_total": _counter("Messages of the replicated queue whose checksum was wrong"),
}
"""The families by name, without the prefix."""

PROCESS_FAMILIES: Final[dict[str, Family]] = {
    "process_cpu_seconds_total": _counter("CPU time of the supervisor and its workers"),
    "process_resident_memory_bytes": _gauge("Resident memory of the supervisor and its workers"),
    "process_virtual_memory_bytes": _gauge("Virtual memory of the supervisor and its workers"),
    "process_open_fds": _gauge("Open descriptors of the supervisor and its workers"),
    "process_max_fds": _gauge("Limit of open descriptors of a process"),
    "process_start_time_seconds": _gauge("Start of the supervisor, as a Unix time"),
}
"""Metrics with the standard names of Prometheus, without our prefix."""

OUTCOMES: Final = ("delivered", "deferred", "failed")
REFUSED_BY: Final = ("connections", "per_network", "per_minute", "descriptors")
SERIES_FROM_THE_START: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("accept_errors_total", {}),
    ("message_octets_total", {}),
    ("spool_waiting", {}),
    ("body_memory_octets", {}),
    ("journal_dropped_total", {}),
    ("clock_jumps_total", {}),
    *(("admission_refused_total", {"reason": reason}) for reason in REFUSED_BY),
    *(("relay_attempts_total", {"outcome": outcome}) for outcome in OUTCOMES),
    *(("reports_total", {"kind": kind}) for kind in ("failed", "delayed", "delivered", "relayed")),
)
"""Series that have a value before anything happens: a rate needs a first sample."""


_MOST_LABEL: Final = 64
"""Characters of a label that are kept of what a worker counts itself."""


def series(name: str, labels: dict[str, str], most: int = _MOST_LABEL) -> str:
    """Return the name of a series with its labels, without the prefix: sessions{listener="smtp"}.

    At most `most` characters of a value are kept.
    """
    if not labels:
        return name
    inside = ",".join(f'{key}="{escape_label(value, most)}"' for key, value in labels.items())
    return f"{name}{{{inside}}}"


def escape_label(value: str, most: int = _MOST_LABEL) -> str:
    """Return the value of a label as the text format wants it, at most `most` characters of it."""
    value = value if len(value) <= most else value[: most - 3] + "..."
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
