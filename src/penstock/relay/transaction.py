"""What a mail transaction with a next hop means for the recipients of a message. No I/O.

The one moment of doubt
-----------------------
If the connection is lost after the whole text was sent and before the reply was read, the hop may have taken the
message or not (RFC 1047). Its recipients are deferred, "in doubt": the message will be sent again, and may then arrive
twice. A duplicate is better than a loss, and SMTP has no third way.
"""

from __future__ import annotations

import re
from typing import Final

from penstock.relay.hop import Outcome, Result
from penstock.relay.job import Job
from penstock.smtp.client import Capabilities, ServerReply, mail_command, rcpt_command
from penstock.smtp.client_session import ClientTransaction, Step, means_too_many

_NEEDS_TLS: Final = frozenset({523, 530, 538})
"""Replies of a hop that wants STARTTLS first (RFC 3207 4, RFC 5248 2.4)."""
_WANTS_TLS: Final = re.compile(
    r"\b(?:start)?tls(?:v?1(?:\.\d)?)?\b|\bssl\b|\b(?:un)?encrypt(?:ed|ion)?\b", re.IGNORECASE
)
"""In a refusal with another code: hops say 550 and 554 as well."""
_NAMES: Final = re.compile(r"<[^<>]*>|(?<!\S)\S*(?:@|://)\S*")
"""Addresses and URLs, in which such a word means nothing."""


class HopTransaction:
    """A transaction for all recipients of a job, or for as many of them as the hop takes at a time."""

    __slots__ = ("_capabilities", "_hop", "_positions", "is_recorded", "job", "transaction", "wants_tls")

    def __init__(
        self, job: Job, capabilities: Capabilities, hop: str, *, recipients: int, lmtp: bool, chunking: bool
    ) -> None:
        """`hop` is the name of the next hop; `recipients`: at most; `chunking`: send the text with BDAT."""
        self.job = job
        self.is_recorded = False
        self.wants_tls = False
        """The hop wants STARTTLS first."""
        self._capabilities = capabilities
        self._hop = hop
        self._positions = job.take(recipients)
        addresses = job.envelope.recipients
        self.transaction = ClientTransaction(
            mail_command(job.envelope, job.size, capabilities),
            [rcpt_command(addresses[position], capabilities) for position in self._positions],
            pipelining=capabilities.pipelining,
            chunking=chunking,
            lmtp=lmtp,
            is_question=job.is_question,
            size=None if job.coming is not None else job.size,
        )

    @property
    def recipient_limit(self) -> int | None:
        """Recipients that the hop accepts in a transaction, if it has refused some as too many."""
        return len(self.transaction.accepted) if self.transaction.too_many else None

    def text(self) -> bytes:
        """Return the whole text of a body in memory as it is sent. Raise BodyError."""
        job, transaction = self.job, self.transaction
        assert job.body is not None
        output = [transaction.begin_text(), transaction.feed_text(job.prefix)]
        output += map(transaction.feed_text, job.body.chunks())
        output.append(transaction.finish_text())
        return b"".join(output)

    def record(self, *, is_fallback: bool = False) -> None:
        """Record the results of a transaction that is over.

        Recipients beyond what the hop takes wait for another transaction, and all that were accepted if the hop does
        not know BDAT. `is_fallback`: TLS failed, and the connection goes on in clear text; a hop that wants TLS then
        defers the mail.
        """
        self.is_recorded = True
        transaction = self.transaction
        again = list(transaction.too_many)
        if transaction.chunking_refused:
            again += [position for position in transaction.accepted if transaction.outcomes[position] is None]
        if again:
            self.job.put_back([self._positions[position] for position in sorted(again)])
        for position in range(len(self._positions)):
            reply = transaction.outcomes[position]
            if reply is not None:
                self.job.record(self._positions[position], self._result(position, reply, is_fallback=is_fallback))

    def _result(self, position: int, reply: ServerReply, *, is_fallback: bool) -> Result:
        transaction = self.transaction
        result = Result.of(reply, self._hop, reports=reply.code < 300 and self._capabilities.dsn)
        if result.kind is Outcome.FAILED:
            if is_fallback and _needs_tls(reply):
                self.wants_tls = True
                return result._replace(kind=Outcome.DEFERRED)
            if transaction.is_question and reply is transaction.mail_reply:
                return result._replace(kind=Outcome.DEFERRED)  # about our sender, not about the recipient
            is_for_one = reply is not transaction.mail_reply and position not in transaction.accepted
            if is_for_one and means_too_many(reply):
                return result._replace(kind=Outcome.DEFERRED, status="4.5.3")
        return result

    def lose(self, text: str, closing: ServerReply | None = None, *, status: str = "4.4.2") -> None:
        """Record the loss of the connection: recipients without a result are deferred.

        `status` is 4.3.0 if it was not the hop that failed. `closing` is the 421 with which the hop has closed it.
        Recipients that wait for another transaction remain waiting.
        """
        if not self.is_recorded:
            self.record()
        if closing is not None:
            status = closing.status if closing.status.startswith("4") else "4.4.2"
            lost = Result(Outcome.DEFERRED, closing.text, status, self._hop)
        else:
            doubt = "in doubt, it may have been delivered: " if self.transaction.is_in_doubt else ""
            lost = Result(
                Outcome.DEFERRED,
                f"{doubt}{text}",
                status,
                self._hop,
                is_said=False,
                in_doubt=self.transaction.is_in_doubt,
            )
        for place in self._positions:
            if place not in self.job.waiting:
                self.job.record(place, lost)

    def withdraw(self) -> None:
        """Undo a transaction of which nothing was answered: the job may begin again on another connection."""
        self.job.put_back(self._positions)

    @property
    def is_unanswered(self) -> bool:
        """The hop has not replied to MAIL."""
        return self.transaction.mail_reply is None

    @property
    def is_sending(self) -> bool:
        """The text is being sent, or its reply is awaited."""
        return self.transaction.step in (Step.TEXT, Step.FINAL)


def _needs_tls(reply: ServerReply) -> bool:
    """Return whether a refusal asks for TLS: by its code, by its status, or in words."""
    if reply.code in _NEEDS_TLS or reply.enhanced_status == "5.7.10":
        return True
    if reply.status.startswith("5.1."):  # about an address (RFC 3463 3.2)
        return False
    return _WANTS_TLS.search(_NAMES.sub("", reply.text)) is not None
