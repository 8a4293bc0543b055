"""All checks of one message, in the order its parts arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.mailauth import dmarc
from penstock.mailauth.known import Judgement, KnownCheck, Told
from penstock.mailauth.lookup import Answer, Query
from penstock.mailauth.results import Method
from penstock.mailauth.spf import SpfResult

__all__ = ["Judgement", "MessageCheck", "Told"]


class MessageCheck(KnownCheck):
    """The checks of one message. See `penstock.mailauth` for the order of the calls."""

    __slots__ = ()

    async def finish(
        self,
        query: Query,
        *,
        authserv_id: str,
        spf: SpfResult | None,
        mail_from: str,
        helo: str,
        first: Sequence[Method] = (),
    ) -> Judgement:
        """Return the judgement; may be repeated. `first`: results that come before ours in the field: iprev, auth."""
        answers: Mapping[str, Answer] = {name: await query(name, "TXT") for name in self.questions}
        dkim = self.verify(answers)
        found = await dmarc.check(query, self.author, spf, dkim) if self.asks_dmarc else None
        return self.conclude(answers, dkim, found, Told(authserv_id, spf, mail_from, helo, first))
