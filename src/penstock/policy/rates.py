"""Rate limits.

Rules
-----
1. What is refused does not count. So a limit is taken at the end of a message, by one atomic step for all limits and
   after all other built-in checks; what refuses the message afterwards (a hook, the sum of the scores, the delivery)
   gives it back. Without that, a client that is greylisted could never send.
2. At RCPT it is looked up whether there is anything left, so that nearly all refusals come before the text. Only
   sessions that compete for the last units are deferred at the end of the message.
3. Without the state, mail is accepted (fail open).
4. A client that is authenticated is limited by the rules with `identity`, others by the other rules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from penstock.message import NULL_PATH, Message, Path, Recipient
from penstock.policy.check import Check, FindingOrAwaitable, Mode, Parts
from penstock.policy.greylist import make_key
from penstock.policy.settings import PolicySettings, RateSettings
from penstock.policy.units import parse_limit
from penstock.reply import Reply
from penstock.state import Charge, Later, State, StateUnavailableError
from penstock.transaction import Transaction

TOO_MUCH: Final = Reply(450, "4.7.1", "Rate limit exceeded, please try again later")
TOO_MANY_CONNECTIONS: Final = Reply(421, "4.7.1", "Too many connections, please try again later", closes=True)
"""In place of the greeting, where RFC 5321 3.1 and 3.8 allow no 450."""


def _address(path: Path | None) -> str:
    return "<>" if path is None or not path.text else f"{path.local}@{path.domain}".lower()


_KEYS: Final[dict[str, Callable[[Transaction, Path], str]]] = {
    "network": lambda transaction, _: transaction.peer.network,
    "listener": lambda transaction, _: transaction.listener,
    "identity": lambda transaction, _: (transaction.identity or "").casefold(),
    "sender": lambda transaction, _: _address(transaction.sender),
    "sender_domain": lambda transaction, _: transaction.sender.domain if transaction.sender else "<>",
    "recipient": lambda _, recipient: _address(recipient),
}


class Rule:
    """One limit."""

    def __init__(self, settings: RateSettings) -> None:
        self.settings = settings
        self.limit = parse_limit(settings.limit)
        self.count = settings.count
        self.is_for_authenticated = "identity" in settings.by
        self.is_by_recipient = "recipient" in settings.by
        self._name = f"{','.join(settings.by)}:{settings.count}:{settings.limit}"
        self._keys = tuple(_KEYS[key] for key in settings.by)

    def applies(self, transaction: Transaction) -> bool:
        """Return whether it limits a client."""
        return self.is_for_authenticated == (transaction.identity is not None)

    def charge(self, transaction: Transaction, recipient: Path, cost: int) -> Charge:
        """Return what something costs under this limit."""
        key = make_key(self._name, *[key(transaction, recipient) for key in self._keys])
        return Charge(key, self.limit.period, self.limit.units, cost)

    def _octets(self, size: int) -> int:
        """Return what a message of a size costs: one that is larger than the limit uses all of it."""
        return min(max(1, size), self.limit.units)

    def next_recipient(self, transaction: Transaction, recipient: Path) -> Charge | None:
        """Return what the message will cost at least, if this recipient is accepted."""
        if self.count == "null_senders" and transaction.sender not in (None, NULL_PATH):
            return None
        if self.is_by_recipient or self.count in ("messages", "null_senders", "refused"):
            cost = 1
        elif self.count == "recipients":
            cost = len(transaction.recipients) + 1
        else:
            cost = self._octets(transaction.parameters.size or 0)
        return self.charge(transaction, recipient, cost)

    def message(self, transaction: Transaction, message: Message) -> list[Charge]:
        """Return what a message costs."""
        if self.count == "refused" or (self.count == "null_senders" and transaction.sender not in (None, NULL_PATH)):
            return []
        cost = self._octets(message.body.size) if self.count == "octets" else 1
        if self.is_by_recipient:
            return [self.charge(transaction, each.path, cost) for each in transaction.recipients]
        if self.count == "recipients":
            cost = len(transaction.recipients)
        return [self.charge(transaction, NULL_PATH, cost)]


class RateCheck(Check):
    """All limits of one mode."""

    name = "rate"
    failure = None
    judges_authenticated = True

    def __init__(self, rules: Sequence[Rule], mode: Mode, state: State) -> None:
        self.mode = mode
        self._state = state
        self._result = f"rate ({mode})"
        """Where the charges of a message are kept: they are forgotten with the transaction."""
        self._of_connections = [rule for rule in rules if rule.count == "connections"]
        self._of_messages = [rule for rule in rules if rule.count not in ("connections", "refused")]
        self._of_refusals = [rule for rule in rules if rule.count == "refused"]
        self._at_rcpt = self._of_messages + self._of_refusals
        self._refusing: Transaction | None = None
        """Whose command is refused by this check right now."""

    def on_connect(self, transaction: Transaction) -> FindingOrAwaitable:
        """Count a connection, and dismiss the client if it has too many."""
        charges = [rule.charge(transaction, NULL_PATH, 1) for rule in self._of_connections]
        if not charges:
            return None
        return self._ask(self._state.take, charges, lambda refused: None if refused < 0 else TOO_MANY_CONNECTIONS)

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:
        """Defer a recipient if the message could not be accepted."""
        charges = []
        for rule in self._at_rcpt:
            if rule.applies(transaction):
                charge = rule.next_recipient(transaction, recipient.path)
                if charge is not None:
                    charges.append(charge)
        if not charges:
            return None
        return self._ask(
            self._state.available,
            charges,
            lambda refused: None if refused < 0 else self._refuse(transaction, charges[refused]),
        )

    def on_message(self, transaction: Transaction, message: Message) -> FindingOrAwaitable:
        """Take what a message costs, or defer it."""
        costs: dict[str, Charge] = {}
        for rule in self._of_messages:
            if rule.applies(transaction):
                for charge in rule.message(transaction, message):
                    costs[charge.key] = charge  # the same recipient twice counts once
        if not costs:
            return None
        charges = list(costs.values())

        def verdict(refused: int) -> Reply | None:
            if refused >= 0:
                return self._refuse(transaction, charges[refused])
            transaction.results[self._result] = charges
            return None

        return self._ask(self._state.take, charges, verdict)

    def on_refused(self, transaction: Transaction, hook_point: str) -> None:
        """Give back what a message has taken, and count the refusal."""
        if self._refusing is transaction:  # by this check
            self._refusing = None
            return
        if hook_point == "on_message" and transaction.has_results:
            charges = transaction.results.pop(self._result, None)
            if charges:
                self._state.give_back(charges)
        refused = [rule.charge(transaction, NULL_PATH, 1) for rule in self._of_refusals if rule.applies(transaction)]
        if refused:
            self._state.note(refused)

    def _ask(
        self,
        question: Callable[[Sequence[Charge]], Later],
        charges: Sequence[Charge],
        verdict: Callable[[int], Reply | None],
    ) -> FindingOrAwaitable:
        """Return the verdict on the answer to a question, at once if it comes at once."""
        try:
            answer = question(charges)
        except StateUnavailableError:
            return None
        return verdict(answer) if isinstance(answer, int) else self._await(answer, verdict)

    async def _await(self, answer: Awaitable[int], verdict: Callable[[int], Reply | None]) -> Reply | None:
        try:
            return verdict(await answer)
        except StateUnavailableError:
            return None

    def _refuse(self, transaction: Transaction, charge: Charge) -> Reply:
        if self.mode == "enforce":
            self._refusing = transaction
        return TOO_MUCH.because(charge.key.partition("\0")[0])


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the checks, one for each mode."""
    if parts.state is None:
        return []
    rules: dict[Mode, list[Rule]] = {}
    for rate in settings.rate:
        rules.setdefault(settings.mode_of(rate), []).append(Rule(rate))
    return [RateCheck(found, mode, parts.state) for mode, found in rules.items() if mode != "off"]
