"""The replies to HELP (RFC 5321 4.1.1.8): the list of verbs, or the syntax of one verb."""

from __future__ import annotations

from typing import Final

from penstock.reply import Reply

TOPICS: Final[dict[str, str]] = {
    "HELO": "HELO <host>: begin a session without extensions (RFC 5321 4.1.1.1)",
    "EHLO": "EHLO <host>: begin a session and list the extensions (RFC 5321 4.1.1.1)",
    "LHLO": "LHLO <host>: begin an LMTP session and list the extensions (RFC 2033 4.1)",
    "MAIL": "MAIL FROM:<address> [SIZE=n] [BODY=7BIT|8BITMIME|BINARYMIME] [SMTPUTF8] [RET=FULL|HDRS]\n"
    "  [ENVID=xtext] [AUTH=xtext] [REQUIRETLS]: begin a transaction; MAIL FROM:<> for a bounce (RFC 5321 4.1.1.2)",
    "RCPT": "RCPT TO:<address> [NOTIFY=NEVER|SUCCESS,FAILURE,DELAY] [ORCPT=type;xtext]:\n"
    "  name a recipient (RFC 5321 4.1.1.3)",
    "DATA": "DATA: the message follows, up to <CR><LF>.<CR><LF> (RFC 5321 4.1.1.4)",
    "BDAT": "BDAT <octets> [LAST]: the given number of octets of the message follows (RFC 3030 2)",
    "RSET": "RSET: drop the transaction (RFC 5321 4.1.1.5)",
    "VRFY": "VRFY <user>: verify a user (RFC 5321 4.1.1.6)",
    "EXPN": "EXPN <list>: expand a list (RFC 5321 4.1.1.7)",
    "HELP": "HELP [verb]: list the verbs, or explain one (RFC 5321 4.1.1.8)",
    "NOOP": "NOOP: do nothing (RFC 5321 4.1.1.9)",
    "QUIT": "QUIT: end the session (RFC 5321 4.1.1.10)",
    "AUTH": "AUTH <mechanism> [initial-response]: authenticate (RFC 4954)",
    "STARTTLS": "STARTTLS: begin TLS (RFC 3207)",
}

_EXPLANATIONS: Final = {verb: Reply(214, "2.0.0", text) for verb, text in TOPICS.items()}
_UNKNOWN_TOPIC: Final = Reply(504, "5.5.4", "No help on that; HELP lists the verbs")
_NOT_IN_SMTP: Final = frozenset({"LHLO"})
_NOT_IN_LMTP: Final = frozenset({"HELO", "EHLO"})

_DATA_OF_LMTP: Final = Reply(214, "2.0.0", f"{TOPICS['DATA']},\n  answered once for each recipient (RFC 2033 4.2)")


def _list_of_verbs(hidden: frozenset[str]) -> Reply:
    verbs = [verb for verb in TOPICS if verb not in hidden]
    return Reply(214, "2.0.0", f"Verbs: {' '.join(verbs)}\nHELP <verb> explains one of them")


_VERBS_OF_SMTP: Final = _list_of_verbs(_NOT_IN_SMTP)
_VERBS_OF_LMTP: Final = _list_of_verbs(_NOT_IN_LMTP)


def help_reply(argument: bytes, *, is_lmtp: bool) -> Reply:
    """Return the reply to HELP with an argument."""
    if not argument:
        return _VERBS_OF_LMTP if is_lmtp else _VERBS_OF_SMTP
    verb = argument.decode("ascii", "replace").upper()
    if verb in (_NOT_IN_LMTP if is_lmtp else _NOT_IN_SMTP):
        return _UNKNOWN_TOPIC
    if verb == "DATA" and is_lmtp:
        return _DATA_OF_LMTP
    return _EXPLANATIONS.get(verb, _UNKNOWN_TOPIC)
