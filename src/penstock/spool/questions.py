"""Queries of `penstock status` and `penstock ctl` about a part of the spool. All functions block.

Every function raises OSError, sqlite3.Error or SpoolError if the spool cannot be read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from penstock.control import SpoolState
from penstock.spool.admin import Filter, QueueAdmin

_MOST_DOMAINS: Final = 10_000
"""Domains that are looked at when a next hop is to be retried."""


def count_spool(folder: Path) -> SpoolState:
    """Count what is in a part of the spool."""
    with QueueAdmin.opened(folder) as admin:
        stats = admin.stats(0)
    return SpoolState(
        messages=stats.messages,
        recipients=stats.recipients,
        octets=stats.octets,
        oldest_seconds=0.0 if stats.oldest is None else max(0.0, time.time() - stats.oldest),
    )


def is_spool_empty(folder: Path) -> bool:
    """Return whether a part of the spool has no mail."""
    with QueueAdmin.opened(folder) as admin:
        return admin.is_empty


def suspend_hop(folder: Path, hop: str, is_wanted: bool) -> int:
    """Suspend or resume a next hop or domain; return 0 if it was so already."""
    with QueueAdmin.opened(folder) as admin:
        return int(admin.suspend(hop) if is_wanted else admin.resume(hop))


def domains_in(folder: Path) -> list[str]:
    """Return the domains that have mail in a part of the spool, those with the most first."""
    with QueueAdmin.opened(folder) as admin:
        return [domain for domain, _ in admin.stats(_MOST_DOMAINS).queues]


def retry_domains(folder: Path, domains: Sequence[str]) -> int:
    """Make the mail for some domains due; return the number of recipients."""
    with QueueAdmin.opened(folder) as admin:
        return sum(admin.retry(Filter(domain=domain)).changed for domain in domains)
