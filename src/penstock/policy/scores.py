"""Marks and scores: what they add up to at the end of a message."""

from __future__ import annotations

from contextlib import suppress
from typing import Final, Literal, NamedTuple

from penstock import reply as replies
from penstock.policy.base import Mark
from penstock.policy.evidence import Evidence
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.transaction import Transaction

BEFORE_MAIL: Final = frozenset({"on_connect", "on_helo", "on_auth"})
"""Hook points whose marks are for all messages of the connection."""


class Sum(NamedTuple):
    """What follows from the scores of a message."""

    action: Literal["accept", "quarantine", "reject"]
    score: float


class Thresholds(NamedTuple):
    """From which score on a message is quarantined and refused."""

    reject: float = 10.0
    quarantine: float = 6.0
    how: str = "tag"
    """What quarantine means: "tag", "hold" or "route:NAME"."""
    monitors_hooks: bool = False
    """Scores of policies in Python decide nothing; those of built-in checks have modes of their own."""
    can_hold: bool = True
    """The delivery can hold a message, or send it to the route of a name."""

    @classmethod
    def of(cls, settings: PolicySettings | None, *, can_hold: bool = True) -> Thresholds:
        """Return those of the settings. Without a [policy] table, scores of policies in Python count in full."""
        if settings is None:
            return cls(can_hold=can_hold)
        monitors_hooks = settings.mode == "monitor"
        return cls(settings.reject_above, settings.quarantine_above, settings.quarantine, monitors_hooks, can_hold)

    def add_up(self, score: float) -> Sum:
        """Return what follows from a score."""
        if score >= self.reject:
            return Sum("reject", score)
        return Sum("quarantine" if score >= self.quarantine else "accept", score)


DEFAULT_THRESHOLDS: Final = Thresholds()


def apply_mark(transaction: Transaction, name: str, mark: Mark, *, is_monitored: bool) -> None:
    """Add a mark to the open transaction; one of a check that monitors only notes its score.

    Raise ValueError for what is no header field.
    """
    results = transaction.results
    if is_monitored:
        if mark.score:
            results.monitored_scores[name] = results.monitored_scores.get(name, 0.0) + mark.score
        return
    if mark.score:
        results.scores[name] = results.scores.get(name, 0.0) + mark.score
    if mark.header is not None:
        field = mark.header
        field_name, value = field.partition(":")[::2] if isinstance(field, str) else field
        transaction.add_field(field_name.strip(), value.strip())
    if mark.quarantine and results.quarantine != "hold":
        results.quarantine = mark.quarantine if isinstance(mark.quarantine, str) else "yes"


def settle(transaction: Transaction, thresholds: Thresholds) -> Reply | None:
    """Apply the marks made before MAIL, and decide by the sum of the scores. Return a refusal or None.

    A quarantine is left in `transaction.results.quarantine`.
    """
    evidence = transaction.evidence
    if isinstance(evidence, Evidence) and evidence.marks:
        for name, mark, is_monitored in evidence.marks:
            with suppress(TypeError, ValueError):  # not a header field: the mark is left out
                apply_mark(transaction, name, mark, is_monitored=is_monitored)
    if not transaction.has_results:
        return None
    results = transaction.results
    score = results.score
    if score < thresholds.reject and score < thresholds.quarantine and not results.quarantine:
        return None
    found = thresholds.add_up(score)
    if found.action == "reject":
        text = f"The message is refused as spam (score {found.score:g})"
        causes = ", ".join(f"{name}={score:g}" for name, score in results.scores.items())
        return Reply(550, "5.7.1", text, cause=causes)
    if results.quarantine == "yes" or (not results.quarantine and found.action == "quarantine"):
        results.quarantine = thresholds.how
    if results.quarantine not in ("", "tag") and not thresholds.can_hold:
        return replies.TRY_LATER.because(f"the delivery cannot quarantine messages: {results.quarantine}")
    if results.quarantine == "tag":
        transaction.add_field("X-Spam-Flag", "YES")
        transaction.add_field("X-Spam-Score", f"{found.score:g}")
    return None
