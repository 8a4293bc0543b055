"""One mail transaction with a next hop, as a client: what is said, and what each answer means for whom. Pure.

    RESET? -> MAIL -> RCPT ... -> DATA -> TEXT -> FINAL ... -> DONE

An exchange is told one answer after the other, in the order of its commands, and returns what is to be said next. With
PIPELINING all commands up to DATA have been said in its `opening` (RFC 2920), otherwise they come one by one; the way
through the phases is the same. With CHUNKING there is no DATA: the text is one BDAT, or one for each piece of a text
whose size is not known yet (RFC 3030).

The one moment of doubt
-----------------------
When the connection is lost after the whole text was sent and before it was answered, the hop may have taken the message
or not (RFC 1047). Its recipients are deferred, "in doubt": the message will be sent again, and may then arrive twice.
A duplicate is better than a loss, and there is no third way in SMTP.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import ClassVar, Final

from penstock.relay.hop import Outcome, Result
from penstock.relay.job import Job
from penstock.smtp.client import (
    Answer,
    Capabilities,
    ProtocolError,
    Stuffer,
    mail_command,
    rcpt_command,
)


class Phase(StrEnum):  # hashed faster than an Enum
    """Where a transaction is: the command whose answer comes next."""

    RESET = "RSET"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    TEXT = "the text"
    """The text is to be sent, or being sent."""
    FINAL = "the end of the text"
    DONE = "the transaction"


class BodyError(Exception):
    """A body is not what it was said to be. Ours to mend, not the hop's."""


class Closing(Exception):  # noqa: N818 - no mistake of ours
    """The hop has said 421: it closes the connection (RFC 5321 3.8)."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.text)
        self.answer = answer


_TOO_MANY: Final = frozenset({"4.5.3", "5.5.3", "4.0.0"})
"""Statuses of a 452 that means "too many recipients", the last for none at all (RFC 5321 4.5.3.1.10)."""


class Exchange:
    """A transaction of a job: for all its recipients, or as many of them as the hop takes at a time."""

    takers: ClassVar[dict[Phase, Callable[[Exchange, Answer], bytes]]] = {}

    def __init__(
        self,
        job: Job,
        offer: Capabilities,
        hop: str,
        *,
        recipients: int = 1000,
        is_lmtp: bool = False,
        resets: bool = False,
        chunks: bool = False,
        at_once: bool = False,
    ) -> None:
        """Take `recipients` of the job, at most.

        `resets`: the connection has to forget a transaction first. `chunks`: the text goes by BDAT. `at_once`: it
        leaves with the opening, before anything was answered.
        """
        self.job = job
        self.phase = Phase.RESET if resets else Phase.MAIL
        self.needs_reset = False
        """The hop still holds a transaction when this one is done."""
        self.is_spoiled = False
        """The connection can not be used any more: the text was refused while it was being sent."""
        self.is_answered = False
        """The hop has said something to MAIL."""
        self.uses_chunks = chunks
        self._hop = hop
        self._is_lmtp = is_lmtp
        self._pipelines = offer.pipelining
        self._reports = offer.dsn
        self._is_at_once = at_once
        self._places = job.take(min(offer.max_recipients, recipients))
        known = job.envelope.recipients
        self._mail = mail_command(job.envelope, job.size, offer)
        self._rcpts = [rcpt_command(known[place], offer) for place in self._places]
        self._asked = 0
        """Recipients that were answered."""
        self._is_refused = False
        """MAIL was refused: what the hop says to the commands behind it means nothing."""
        self.accepted: list[int] = []
        self._told = 0
        """Recipients that an LMTP server has answered at the end of the text (RFC 2033 4.2)."""
        self._pieces = 0
        """BDATs before the last one that were not answered."""
        self._stuffer = Stuffer()
        self._octets_left = job.size
        """Of the BDAT that was begun."""
        self._has_ended = False

    # ---- what is said

    def opening(self) -> bytes:
        """Return what is said first."""
        reset = b"RSET\r\n" if self.phase is Phase.RESET else b""
        if not self._pipelines:
            return reset or self._mail
        opening = b"".join([reset, self._mail, *self._rcpts])
        if self.job.is_question:
            return opening
        if self._is_at_once:
            return opening + self.text()
        return opening if self.uses_chunks else opening + b"DATA\r\n"

    def text(self) -> bytes:
        """Return the whole text as it is sent. Reads a body, so it has to be one in memory."""
        body = self.job.body
        assert body is not None
        said = [self.begin_text(), self.feed_text(self.job.prefix)]
        said += map(self.feed_text, body.chunks())
        said.append(self.finish_text())
        return b"".join(said)

    def begin_text(self) -> bytes:
        """Return what is said before the text."""
        if not self.uses_chunks or self.job.coming is not None:
            return b""
        if not self._octets_left:
            self.end_text()
        return b"BDAT %d LAST\r\n" % self.job.size

    def feed_text(self, chunk: bytes) -> bytes:
        """Return what is sent for the next octets of the text. Raise BodyError when there are too many."""
        if not self.uses_chunks:
            return self._stuffer.feed(chunk)
        if self.job.coming is not None:
            self._pieces += 1
            return b"BDAT %d\r\n%b" % (len(chunk), chunk)
        self._octets_left -= len(chunk)
        if self._octets_left < 0:
            raise BodyError("the body is longer than it was said to be")
        if not self._octets_left:
            self.end_text()
        return chunk

    def finish_text(self) -> bytes:
        """Return what is sent at the end of the text. Raise BodyError when octets are missing."""
        self.end_text()
        if not self.uses_chunks:
            return self._stuffer.end()
        if self.job.coming is not None:
            return b"BDAT 0 LAST\r\n"
        if self._octets_left:
            raise BodyError("the body is shorter than it was said to be")
        return b""

    def end_text(self) -> None:
        """Note that the end of the text is about to be sent: from here on the message may have been taken."""
        self._has_ended = True
        if self.phase is Phase.TEXT:
            self.phase = Phase.FINAL

    # ---- what is answered

    @property
    def wants_text(self) -> bool:
        """The text is to be sent now."""
        return self.phase is Phase.TEXT

    @property
    def is_done(self) -> bool:
        """There is nothing more to say or to hear."""
        return self.phase is Phase.DONE

    def take(self, answer: Answer) -> bytes:
        """Take the answer to the earliest command without one. Return what is to be said next, b"" for nothing.

        Raise Closing for 421, ProtocolError for an answer that makes no sense.
        """
        if answer.code == 421:
            raise Closing(answer)
        return self.takers[self.phase](self, answer)

    def _take_reset(self, _: Answer) -> bytes:
        self.phase = Phase.MAIL
        return b"" if self._pipelines else self._mail

    def _take_mail(self, answer: Answer) -> bytes:
        self.phase = Phase.RCPT
        self.is_answered = True
        if 200 <= answer.code < 300:
            return b"" if self._pipelines else self._rcpts[0]
        refusal = self._refusal(answer)
        if self.job.is_question:  # that the sender is not wanted says nothing of the recipients
            refusal = refusal._replace(kind=Outcome.DEFERRED)
        self._settle(self._places, refusal)
        self._is_refused = True
        if not self._pipelines:
            self.phase = Phase.DONE
        return b""

    def _take_rcpt(self, answer: Answer) -> bytes:
        place = self._places[self._asked]
        self._asked += 1
        if self._is_refused:
            pass
        elif 200 <= answer.code < 300:
            self.accepted.append(place)
            if self.job.is_question:
                self.job.settle(place, Result.of(answer, self._hop))
        elif self.accepted and self._is_too_many(answer):
            self.job.put_back([place])
        else:
            self._settle([place], self._refusal(answer))
        if self._asked < len(self._places):
            return b"" if self._pipelines else self._rcpts[self._asked]
        return self._end_recipients()

    def _is_too_many(self, answer: Answer) -> bool:
        """Say whether a recipient is one beyond what the hop takes in one transaction, to be sent in another.

        RFC 5321 4.5.3.1.10: 452, and 552 from servers of old.
        """
        return answer.code in (452, 552) and answer.status in _TOO_MANY

    def _end_recipients(self) -> bytes:
        """Go on when all recipients were answered."""
        if self.job.is_question:
            self.phase = Phase.DONE
            self.needs_reset = not self._is_refused
        elif self._is_at_once:
            self.phase = Phase.FINAL
        elif self._pipelines and not self.uses_chunks:
            self.phase = Phase.DATA
        elif not self.accepted:
            self.phase = Phase.DONE
            self.needs_reset = not self._is_refused
        elif self.uses_chunks:
            self.phase = Phase.TEXT
        else:
            self.phase = Phase.DATA
            return b"DATA\r\n"
        return b""

    def _take_data(self, answer: Answer) -> bytes:
        if 300 <= answer.code < 400:
            if self.accepted:
                self.phase = Phase.TEXT
                return b""
            self.phase = Phase.FINAL
            return b".\r\n"  # RFC 2920 3.1: a server that wants a text for nobody gets an empty one
        self._settle(self.accepted, self._refusal(answer))
        self.phase = Phase.DONE
        self.needs_reset = not self._is_refused
        return b""

    def _take_text(self, answer: Answer) -> bytes:
        """Take an answer that comes while the text is being sent: to a piece of it, or a refusal before its end."""
        if self._pieces and answer.code < 300:
            self._pieces -= 1
            return b""
        self._settle(self.accepted, self._refusal(answer))
        self.is_spoiled = True
        self.phase = Phase.DONE
        return b""

    def _take_final(self, answer: Answer) -> bytes:
        if self._pieces:
            return self._take_text(answer)
        if not self.accepted:
            self.needs_reset = True
        elif self._is_lmtp:
            self._settle([self.accepted[self._told]], self._final(answer))
            self._told += 1
            if self._told < len(self.accepted):
                return b""
        else:
            self._settle(self.accepted, self._final(answer))
        self.phase = Phase.DONE
        return b""

    # ---- what became of whom

    def _settle(self, places: list[int], result: Result) -> None:
        for place in places:
            self.job.settle(place, result)

    def _refusal(self, answer: Answer) -> Result:
        """Return what a refusal means. Raise ProtocolError when it is none."""
        if answer.code < 400:
            raise ProtocolError(f"{answer.code} is no answer to {self.phase}")
        return Result.of(answer, self._hop)

    def _final(self, answer: Answer) -> Result:
        """Return what an answer to the text means."""
        return Result.of(answer, self._hop, reports=self._reports) if answer.code < 300 else self._refusal(answer)

    def lose(self, text: str, said: Answer | None = None) -> None:
        """Give up: the connection is lost. Who has no result yet is deferred, whatever the hop has said before.

        `said` is the 421 with which the hop has closed. Recipients that no transaction has begun with keep waiting.
        """
        if said is not None:
            undone = Result(Outcome.DEFERRED, said.text, _temporary(said), self._hop)
        else:
            doubt = "in doubt, it may have been delivered: " if self._has_ended else ""
            undone = Result(
                Outcome.DEFERRED, f"{doubt}{text}", "4.4.2", self._hop, is_said=False, in_doubt=self._has_ended
            )
        for place in self._places:
            if place not in self.job.waiting:
                self.job.settle(place, undone)
        self.phase = Phase.DONE

    def withdraw(self) -> None:
        """Undo the transaction: nothing of it was answered, and the job may begin again on another connection."""
        self.job.put_back(self._places)
        self.phase = Phase.DONE


def _temporary(answer: Answer) -> str:
    return answer.status if answer.status.startswith("4") else "4.4.2"


Exchange.takers = {
    Phase.RESET: Exchange._take_reset,
    Phase.MAIL: Exchange._take_mail,
    Phase.RCPT: Exchange._take_rcpt,
    Phase.DATA: Exchange._take_data,
    Phase.TEXT: Exchange._take_text,
    Phase.FINAL: Exchange._take_final,
}
