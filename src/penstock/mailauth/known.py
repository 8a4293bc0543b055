"""All checks of one message, as far as the answers of the DNS are known.

This file is compiled as it stands (known.pxd has the C types): nearly every message is from a domain whose records are
in the cache, and is judged here without a task, a deadline or a wait. message.py asks for what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from penstock.mailauth import dmarc
from penstock.mailauth.arc import ArcResult, ArcVerifier
from penstock.mailauth.decision import Decisions, DecisionSettings, Findings, decide
from penstock.mailauth.dkim import BodyHashes, DkimResult, DkimVerifier
from penstock.mailauth.header import Field, Header, author_domains
from penstock.mailauth.lookup import Answer, Cached, Kind, known_query, run_now
from penstock.mailauth.results import Method, authentication_results, forged_fields
from penstock.mailauth.spf import SpfResult

_MAX_KEYS_AHEAD: Final = 8
"""Keys that are asked for ahead; a message with more signatures and seals waits for the others."""
_NO_ARC: Final = ArcResult("none")


class Judgement(NamedTuple):
    """What was found, what is decided, and what the message gets."""

    findings: Findings
    arc: ArcResult
    decisions: Decisions
    header_field: bytes
    """Authentication-Results, with CRLF, for the top of the message."""
    forged: Sequence[Field]
    """Fields to leave out: octet ranges `start` to `stop` of the header."""


class Told(NamedTuple):
    """What a judgement needs besides the message."""

    authserv_id: str
    """Our name, at the beginning of the header field."""
    spf: SpfResult | None
    mail_from: str
    helo: str
    first: Sequence[Method] = ()
    """Results that come before ours in the field: iprev, auth."""


class KnownCheck:
    """The checks of one message. See `penstock.mailauth` for the order of the calls."""

    def __init__(self, header: bytes, settings: DecisionSettings, *, now: int, arc: bool = True) -> None:
        """`header` are the lines before the empty line, with CRLF. `now` is in seconds since 1970."""
        self._settings = settings
        self.header = Header(header)
        self.authors = author_domains(self.header)
        self._hashes = BodyHashes()
        self.author = self.authors[0] if self.authors else ""
        """The domain of the first author; "" without one."""
        self.from_fields = len(self.header.by_name.get(b"from", ()))
        self.asks_dmarc = settings.dmarc != "off" and self.from_fields == 1 and len(self.authors) == 1
        """There is one author, about whose domain DMARC is asked."""
        self._dkim = DkimVerifier(self.header, now=now, author=self.author, hashes=self._hashes)
        self._arc = ArcVerifier(self.header, self._hashes) if arc else None
        self.questions = self._dkim.questions
        """The names whose TXT records are the keys."""
        if self._arc is not None and self._arc.questions:
            self.questions = list(dict.fromkeys([*self.questions, *self._arc.questions]))

    @property
    def hints(self) -> list[tuple[str, Kind]]:
        """Questions that `finish` will ask, 16 at most; asking them together before saves waits.

        The domain of From may have no record of its own if it is a subdomain: then those above it are asked as well.
        """
        found: list[tuple[str, Kind]] = [(name, "TXT") for name in self.questions[:_MAX_KEYS_AHEAD]]
        author = self.author
        if author and self._settings.dmarc != "off":
            names = dmarc.names_to_ask(author) if author.count(".") > 1 else [author]
            for name in names:
                found.append(("_dmarc." + name, "TXT"))  # noqa: PERF401 - compiled, a generator costs more
        return found

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next piece of the body, with CRLF, without dot-stuffing. About 3.5 us for 4 KB, 1 ms for 1 MB."""
        self._hashes.feed(chunk)

    def finish_known(self, cached: Cached, told: Told) -> Judgement | None:
        """Return the judgement; None if it needs an answer that is not cached. The body must be complete."""
        answers: dict[str, Answer] = {}
        for name in self.questions:
            answer = cached(name, "TXT")
            if answer is None:
                return None
            answers[name] = answer
        if not self.asks_dmarc:
            return self.conclude(answers, self.verify(answers), None, told)
        author = self.author
        answer = cached("_dmarc." + author, "TXT") if author else None
        if author and answer is None:
            return None
        dkim = self.verify(answers)
        found = None
        if answer is not None:
            found = dmarc.pass_of_own_record(dmarc.only_record(answer.records), author, told.spf, dkim)
        if found is None:
            found = run_now(dmarc.check(known_query(cached), author, told.spf, dkim))
            if found is None:
                return None
        return self.conclude(answers, dkim, found, told)

    def verify(self, answers: Mapping[str, Answer]) -> list[DkimResult]:
        """Return the results of DKIM, from the answers to `questions`. The body must be complete."""
        self._hashes.finish()
        return [] if self._settings.dkim == "off" else self._dkim.finish(answers)

    def conclude(
        self, answers: Mapping[str, Answer], dkim: list[DkimResult], found: dmarc.DmarcResult | None, told: Told
    ) -> Judgement:
        """Return the judgement. `found` is the result of DMARC if `asks_dmarc`."""
        settings = self._settings
        arc = _NO_ARC
        if self._arc is not None and self._arc.is_present:
            arc = self._arc.finish(answers)
        if found is None and settings.dmarc != "off":
            cause = "no author" if not self.authors else "several authors"
            found = dmarc.DmarcResult("permerror", self.author, cause=cause)
        findings = Findings(self.authors, self.from_fields, told.spf, tuple(dkim), found)
        field = authentication_results(told.authserv_id, self._methods(dkim, found, arc, told))
        forged = forged_fields(self.header, told.authserv_id)
        return Judgement(findings, arc, decide(findings, settings), field, forged)

    def _methods(
        self, dkim: list[DkimResult], found: dmarc.DmarcResult | None, arc: ArcResult, told: Told
    ) -> list[Method]:
        methods = list(told.first)
        spf = told.spf
        if spf is not None:
            is_sender = spf.identity == "mailfrom"
            name, value = ("smtp.mailfrom", told.mail_from) if is_sender else ("smtp.helo", told.helo)
            methods.append(("spf", spf.result, ((name, value),)))
        for each in dkim:
            properties = ("header.d", each.domain), ("header.s", each.selector)
            methods.append(("dkim", each.result, properties))
        if not dkim and self._settings.dkim != "off":
            methods.append(("dkim", "none", ()))
        if found is not None:
            methods.append(("dmarc", found.result, (("header.from", found.domain),)))
        if self._arc is not None:
            methods.append(("arc", arc.result, self._trust_in(arc)))
        return methods

    def _trust_in(self, arc: ArcResult) -> tuple[tuple[str, str], ...]:
        """Return whether all who have sealed a chain are trusted, where it is known who is (RFC 8617 7.2)."""
        trusted = self._settings.trusted_sealers
        if not trusted or arc.result != "pass":
            return ()
        return (("policy.sealers", "trusted" if trusted.issuperset(arc.sealers) else "untrusted"),)
