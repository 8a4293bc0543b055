"""Mail authentication: SPF, DKIM, DMARC, ARC and Authentication-Results. Pure: no socket, no clock, no loop.

A server calls, for a client that is judged:

    connect     nothing
    MAIL        spf_result = await spf.check(query, address=..., sender=..., helo=..., receiver=hostname, now=...)
                (`query` is that of a `penstock.dns.Budget`, which bounds questions and time; the result is needed at
                the end of the message, so that the check may run while the client goes on)
    header      check = MessageCheck(header, settings, now=...)
                for name, kind in check.hints: start `query(name, kind)` in the background, or do nothing
    body chunk  check.feed(chunk)      with CRLF, dots removed; in a thread for bodies of megabytes
    end         judgement = await check.finish(query, authserv_id=hostname, spf=spf_result, mail_from=..., helo=...)
                (or, without waiting, check.finish_known(resolver.cached, Told(...)), which is None if something has
                to be asked; the same for spf.check_known at MAIL)
                judgement.decisions.enforced says what to do, .monitored what would be done
                judgement.header_field goes on top, judgement.forged are the fields to leave out

- spf.py, dkim.py, dmarc.py, arc.py: one check each
- decision.py: what the results mean for the message
- results.py: the Authentication-Results field
- header.py, ext/mailauth.pyx: the header and the canonical forms
- known.py: all of it for one message, as far as the answers are known
- message.py: the same, where something has to be asked
"""

from penstock.mailauth.decision import Decision, Decisions, DecisionSettings, Findings
from penstock.mailauth.known import Judgement, Told
from penstock.mailauth.message import MessageCheck
from penstock.mailauth.results import MethodResult

__all__ = [
    "Decision",
    "DecisionSettings",
    "Decisions",
    "Findings",
    "Judgement",
    "MessageCheck",
    "MethodResult",
    "Told",
]
