"""Policy servers with Postfix's policy delegation protocol (SMTPD_POLICY_README): postgrey, policyd-spf, postfwd.

A question is a list of `name=value` lines and an empty line, the answer is `action=...` and an empty line. Attributes
and actions are those of Postfix 3.7, as far as they mean something here; names of restrictions cannot be answers.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Final, Literal

import trio

from penstock.message import NULL_PATH, MailParameters, Message, Path, Recipient
from penstock.policy.base import Mark
from penstock.policy.check import Check, Finding, Mode, Parts
from penstock.policy.filters import FilterConnection, FilterError, FilterPool
from penstock.policy.settings import DelegateSettings, PolicySettings
from penstock.policy.units import parse_addresses
from penstock.reply import CHECK_FAILED, Reply
from penstock.transaction import Transaction

_MOST_OCTETS: Final = 8192
"""Of an answer."""
_GRACE: Final = 5.0
_ACTION: Final = re.compile(r"action=\s*([A-Za-z0-9_]+)[ \t]*(.*)")
_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?:[ \t]+|\Z)")
_FIELD: Final = re.compile(r"([!-9;-~]{1,100}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]{1,900})")
_NO_OPINION: Final = frozenset({"DUNNO", "OK", "PERMIT", "PERMIT_AUTH_DESTINATION", "INFO", "WARN"})
_REFUSALS: Final = {
    "REJECT": (554, "5.7.1"),
    "DEFER": (450, "4.7.1"),
    "DEFER_IF_PERMIT": (450, "4.7.1"),
    "DEFER_IF_REJECT": (450, "4.7.1"),
}
_At = Literal["connect", "helo", "mail", "rcpt", "message"]
_STATES: Final[dict[_At, str]] = {
    "connect": "CONNECT", "helo": "EHLO", "mail": "MAIL", "rcpt": "RCPT", "message": "END-OF-MESSAGE",
}  # fmt: skip


def encode_question(state: str, transaction: Transaction, **facts: object) -> bytes:
    """Return a question about a client. What is not known yet is empty, as in Postfix."""
    peer, tls = transaction.peer, transaction.tls
    name = ""
    if transaction.has_results and transaction.results.iprev is not None:
        name = transaction.results.iprev.name
    attributes: dict[str, object] = {
        "request": "smtpd_access_policy",
        "protocol_state": state,
        "protocol_name": "LMTP" if transaction.is_lmtp else "ESMTP" if transaction.is_esmtp else "SMTP",
        "client_address": peer.address,
        "client_name": name or "unknown",
        "client_port": peer.port,
        "reverse_client_name": name or "unknown",
        "server_address": peer.local_address,
        "server_port": peer.local_port,
        "helo_name": transaction.hello,
        "sender": "",
        "recipient": "",
        "recipient_count": 0,
        "queue_id": "",
        "instance": _instance_of(transaction),
        "size": transaction.parameters.size or 0,
        "sasl_method": "",
        "sasl_username": transaction.identity or "",
        "sasl_sender": "",
        "encryption_protocol": "" if tls is None else tls.version,
        "encryption_cipher": "" if tls is None else tls.cipher,
        "encryption_keysize": 0 if tls is None else tls.bits,
        **facts,
    }
    # A line break would end the attribute; clients cannot send one, and NUL neither.
    lines = [f"{name}={str(value).translate(_BREAKS)}\n" for name, value in attributes.items()]
    return "".join([*lines, "\n"]).encode("utf-8", "surrogateescape")


_BREAKS: Final = dict.fromkeys((0, 10, 13), "?")
_INSTANCE: Final = "penstock.instance"
_numbers = itertools.count(1)


def _instance_of(transaction: Transaction) -> str:
    """Return the attributes of all requests about one message."""
    found: str = transaction.results.get(_INSTANCE, "")
    if not found:
        found = transaction.results[_INSTANCE] = f"{os.getpid():x}.{next(_numbers):x}"
    return found


async def read_answer(connection: FilterConnection) -> bytes:
    """Read an answer to its empty line, and what came with it. Raise FilterError."""
    answer = bytearray()
    searched = 0
    while answer.find(b"\n\n", searched) < 0:
        if len(answer) > _MOST_OCTETS:
            raise FilterError(f"the policy server answers more than {_MOST_OCTETS} octets")
        searched = max(0, len(answer) - 1)
        answer += await connection.receive()
    return bytes(answer)


def parse_answer(text: str) -> Finding:
    """Return what an answer means. Raise FilterError for one that means nothing here."""
    found = _ACTION.match(text)
    if found is None:
        raise FilterError(f"the policy server answers {text[:100]!r}")
    action, rest = found[1].upper(), found[2].strip()
    if action in _NO_OPINION:
        return None
    if action == "PREPEND":
        field = _FIELD.fullmatch(rest)
        if field is None:
            raise FilterError(f"the policy server prepends {rest[:100]!r}, which is not a header field")
        return Mark(header=(field[1], field[2]))
    if action in ("HOLD", "DISCARD"):  # mail is not dropped without a word
        return Mark(quarantine="hold")
    if action in _REFUSALS:
        code, status = _REFUSALS[action]
    elif action.isdecimal() and len(action) == 3 and action[0] in "45":
        code, status = int(action), f"{action[0]}.7.1"
    else:
        raise FilterError(f"the policy server wants the action {action[:40]}")
    given = _STATUS.match(rest)
    if given is not None and given[1][0] == str(code)[0]:
        status, rest = given[1], rest[given.end() :]
    return Reply(code, status, rest or "Refused by policy", closes=code == 421)


class DelegateCheck(Check):
    """One policy server."""

    def __init__(self, settings: DelegateSettings, mode: Mode, *, can_hold: bool = True) -> None:
        """`can_hold`: there is a spool where messages can be held. Otherwise they are refused."""
        addresses = parse_addresses(settings.address)
        self.name = f"delegate {addresses[0]}"
        self.mode = mode
        self.deadline = settings.deadline + _GRACE
        self.failure = CHECK_FAILED if settings.fail == "defer" else None
        self._can_hold = can_hold
        self._pool = FilterPool(addresses, connect=settings.connect, deadline=settings.deadline)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Close the connections at the end."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._pool.close()

    async def _ask(self, at: _At, transaction: Transaction, **facts: object) -> Finding:
        """Ask the server. Raise FilterError."""
        question = encode_question(_STATES[at], transaction, **facts)

        async def talk(connection: FilterConnection) -> Finding:
            await connection.send(question)
            answer = await read_answer(connection)
            text, _, rest = answer.partition(b"\n\n")
            finding = parse_answer(text.decode("utf-8", "replace"))
            connection.can_be_kept = not rest
            return finding

        finding = await self._pool.talk(talk)
        if isinstance(finding, Mark) and finding.quarantine and not self._can_hold:
            return Reply(554, "5.7.1", "Refused by policy", cause=f"{self.name} wants it held, and there is no spool")
        return finding


class ConnectDelegate(DelegateCheck):
    """Asks at the connection."""

    async def on_connect(self, transaction: Transaction) -> Finding:
        """Ask about a client. A refusal takes the place of the greeting."""
        finding = await self._ask("connect", transaction)
        if isinstance(finding, Reply) and not finding.accepts:  # RFC 5321 3.1: 421 or 554
            if finding.is_permanent:
                return Reply(554, finding.status, finding.text)
            return Reply(421, finding.status, finding.text, closes=True)
        return finding


class HeloDelegate(DelegateCheck):
    """Asks at HELO and EHLO."""

    async def on_helo(self, transaction: Transaction, name: str) -> Finding:
        """Ask about a name."""
        return await self._ask("helo", transaction, helo_name=name)


class MailDelegate(DelegateCheck):
    """Asks at MAIL."""

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Finding:
        """Ask about a sender."""
        return await self._ask("mail", transaction, sender=sender.text, size=parameters.size or 0)


class RcptDelegate(DelegateCheck):
    """Asks at RCPT."""

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Finding:
        """Ask about a recipient."""
        sender = transaction.sender or NULL_PATH
        return await self._ask("rcpt", transaction, sender=sender.text, recipient=recipient.path.text)


class MessageDelegate(DelegateCheck):
    """Asks at the end of the message."""

    async def on_message(self, transaction: Transaction, message: Message) -> Finding:
        """Ask about a message."""
        recipients = message.envelope.recipients
        return await self._ask(
            "message",
            transaction,
            sender=message.envelope.sender.text,
            recipient=recipients[0].path.text if len(recipients) == 1 else "",
            recipient_count=len(recipients),
            queue_id=message.id,
            size=message.body.size,
        )


_CLASSES: Final[dict[_At, type[DelegateCheck]]] = {
    "connect": ConnectDelegate,
    "helo": HeloDelegate,
    "mail": MailDelegate,
    "rcpt": RcptDelegate,
    "message": MessageDelegate,
}


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return a check for each server, in the order of the file."""
    found: list[Check] = []
    for delegate in settings.delegate:
        mode = settings.mode_of(delegate)
        if mode != "off":
            found.append(_CLASSES[delegate.at](delegate, mode, can_hold=parts.can_hold))
    return found
