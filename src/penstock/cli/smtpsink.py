"""The options of Postfix's smtp-sink: its users switch by changing the name of the program.

`penstock sink` has each of these letters; its help shows them in one table, made from LETTERS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import click
import msgspec

from penstock.config import Settings
from penstock.sink.plan import DelaySettings, Phase, PlanSettings, RuleSettings, reply_of
from penstock.sink.stores import DumpStore, unescape

F = TypeVar("F", bound=Callable[..., Any])
_replace = msgspec.structs.replace

_HARD: Final = "500 5.3.0 Error: command failed"
_SOFT: Final = "450 4.3.0 Error: command failed"
_CLOSING: Final = "421 4.0.0 Server closing connection"
_VIOLATION: Final = "550 5.0.0 This violates SMTP"
_UNKNOWN: Final = "500 5.5.1 Error: unknown command"
_PHASES: Final[dict[str, Phase]] = {
    "CONNECT": "banner",
    "HELO": "helo",
    "EHLO": "ehlo",
    "LHLO": "ehlo",
    "MAIL": "mail",
    "RCPT": "rcpt",
    "VRFY": "vrfy",
    "DATA": "data",
    ".": "dot",
    "RSET": "rset",
    "NOOP": "noop",
    "QUIT": "quit",
    "STARTTLS": "starttls",
    "AUTH": "auth",
    "EXPN": "expn",
    "HELP": "help",
}


@dataclass(frozen=True)
class Letter:
    """An option of smtp-sink."""

    letter: str
    argument: str
    """Its argument; "" for none."""
    meaning: str
    """What it does."""
    many: bool = False


LETTERS: Final = (
    Letter("4", "", "listen on IPv4 only, if the address has no host"),
    Letter("6", "", "listen on IPv6 only, if the address has no host"),
    Letter("8", "", "do not offer 8BITMIME"),
    Letter("a", "", "do not offer AUTH (the default without --auth)"),
    Letter("A", "SECONDS", "answer 550 SECONDS after the 354, without reading"),
    Letter("b", "REPLY", "reply of the commands listed with -r"),
    Letter("B", "REPLY", "reply of the commands listed with -f"),
    Letter("c", "", "print counters while running"),
    Letter("C", "", "do not offer XCLIENT (never offered)"),
    Letter("d", "TEMPLATE", "write each message to a file named by strftime(3) and a number"),
    Letter("D", "TEMPLATE", "append messages to files named by strftime(3)"),
    Letter("e", "", "no ESMTP: EHLO is an unknown command"),
    Letter("E", "", "do not offer ENHANCEDSTATUSCODES"),
    Letter("f", "COMMANDS", "answer these commands with a 5xx reply; implies -p"),
    Letter("F", "", "do not offer XFORWARD (never offered)"),
    Letter("h", "NAME", "host name in the greeting; without a name, print this help"),
    Letter("H", "SECONDS", "wait SECONDS after the 354 before reading"),
    Letter("L", "", "speak LMTP"),
    Letter("m", "COUNT", "maximum connections at once; further clients receive 421"),
    Letter("M", "COUNT", "stop after COUNT messages"),
    Letter("n", "COUNT", "stop after COUNT sessions"),
    Letter("N", "", "do not offer DSN"),
    Letter("p", "", "do not offer PIPELINING"),
    Letter("P", "", "Cisco PIX: greeting 220 ********; implies -e"),
    Letter("q", "COMMANDS", "close the connection at these commands"),
    Letter("Q", "COMMANDS", "answer these commands with 421"),
    Letter("r", "COMMANDS", "answer these commands with a 4xx reply; implies -p"),
    Letter("R", "DIR", "refused: use `systemd RootDirectory=` or chroot"),
    Letter("s", "COMMANDS", "journal all mail events, not only these commands"),
    Letter("S", "STRING", "text before each message of -d and -D, with C escapes"),
    Letter("t", "SECONDS", "time limit between commands and for a message"),
    Letter("T", "OCTETS", "TCP receive buffer"),
    Letter("u", "USER", "run as this user after the addresses are bound"),
    Letter("v", "", "journal all events"),
    Letter("w", "SECONDS", "delay before the reply to DATA"),
    Letter("W", "COMMAND:SECONDS[:ODDS]", "delay before the reply to a command", many=True),
)


_ELSEWHERE: Final = frozenset({"c"})
"""Letters that `penstock sink` defines itself."""


def smtp_sink_letters(command: F) -> F:
    """Add the letters, and the address and the backlog that smtp-sink takes, to a click command."""
    for letter in reversed(LETTERS):
        if letter.letter in _ELSEWHERE:
            continue
        names = (f"-{letter.letter}", f"letter_{ord(letter.letter)}")
        if letter.letter == "h":
            option = click.option(*names, hidden=True, is_flag=False, flag_value="", metavar="NAME")
        elif letter.argument:
            kind: Any = {"SECONDS": click.FloatRange(0, 86_400), "COUNT": click.IntRange(1)}.get(letter.argument)
            kind = click.IntRange(1, 1 << 30) if letter.argument == "OCTETS" else kind
            option = click.option(*names, hidden=True, metavar=letter.argument, type=kind, multiple=letter.many)
        else:
            option = click.option(*names, hidden=True, is_flag=True)
        command = option(command)
    command = click.argument("backlog", required=False, type=click.IntRange(min=0))(command)
    return click.argument("address", required=False)(command)


def smtp_sink_help() -> str:
    """Return the table of the letters."""
    lines = [f"  -{each.letter} {each.argument:<24}{each.meaning}".rstrip() for each in LETTERS]
    return "Options of smtp-sink, which also takes [inet:][host]:port and a backlog:\n" + "\n".join(lines)


@dataclass
class SmtpSinkOptions:
    """The values of the letters."""

    given: dict[str, Any]
    """Values by letter, of the letters that were given."""
    address: str | None = None
    backlog: int | None = None
    notes: list[str] = field(default_factory=list)
    """Differences from smtp-sink that the user should know."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> SmtpSinkOptions:
        """Remove the letters from the options of a command."""
        given = {}
        for letter in LETTERS:
            if letter.letter in _ELSEWHERE:
                continue
            value = options.pop(f"letter_{ord(letter.letter)}")
            if value is not None and value is not False and value != ():
                given[letter.letter] = value
        return cls(given, options.pop("address"), options.pop("backlog"))

    @property
    def stores(self) -> list[DumpStore]:
        """The files of -d and -D."""
        start = unescape(self.given.get("S", ""))
        return [
            DumpStore(self.given[letter], is_single=letter == "d", start=start)
            for letter in ("d", "D")
            if letter in self.given
        ]

    # ---- checking

    def check(self) -> None:
        """Raise UsageError, with an alternative, for a letter that is not supported."""
        for letter in LETTERS:
            if letter.letter in self.given and letter.meaning.startswith("refused:"):
                what = letter.meaning.removeprefix("refused: ")
                raise click.UsageError(f"-{letter.letter} of smtp-sink is not supported: {what}")
        if "S" in self.given and not self.stores:
            raise click.UsageError("-S requires -d or -D")
        if "4" in self.given and "6" in self.given:
            raise click.UsageError("-4 and -6 are mutually exclusive")
        if "m" in self.given:
            self.notes.append(f"-m: clients beyond {self.given['m']} receive 421; smtp-sink lets them wait")
        if "s" in self.given:
            self.commands("s")
            self.notes.append("-s: all mail events are journaled on standard error, not only those commands")

    def commands(self, letter: str) -> list[str]:
        """Return the commands that a letter lists. Raise UsageError for an unknown one."""
        return [self._command(letter, word) for word in re.split(r"[\s,]+", self.given.get(letter, "")) if word]

    def _command(self, letter: str, word: str) -> str:
        name = word.upper()
        if name not in _PHASES:
            raise click.UsageError(f"-{letter}: unknown command {word!r}; expected one of: {', '.join(_PHASES)}")
        return name

    # ---- translating

    def listen(self) -> tuple[str, ...]:
        """Return the address to listen on, in Penstock's form."""
        if self.address is None:
            return ()
        address = self.address.removeprefix("inet:")
        if address.startswith(":"):
            host = "0.0.0.0" if "4" in self.given else "[::]" if "6" in self.given else ""  # noqa: S104 - --open asks
            address = host + address
        return (address,)

    def apply(self, settings: Settings) -> Settings:
        """Return the settings as changed by the letters."""
        given = self.given
        off = {"8": "eightbitmime", "N": "dsn", "p": "pipelining", "E": "enhancedstatuscodes"}
        changed = {key: False for letter, key in off.items() if letter in given}
        if "f" in given or "r" in given:
            changed["pipelining"] = False
        clocks = {}
        if "t" in given:
            seconds = max(given["t"], 0.001)
            clocks = {"command_timeout": seconds, "data_timeout": seconds}
        listeners = tuple(
            _replace(
                each,
                extensions=_replace(each.extensions, **changed),
                limits=_replace(each.limits, **clocks),
                kind="lmtp" if "L" in given else each.kind,
            )
            for each in settings.listener
        )
        events = "all" if "v" in given else "mail" if "s" in given else settings.journal.events
        return _replace(
            settings,
            hostname=given.get("h") or settings.hostname,
            listener=listeners,
            admission=_replace(settings.admission, connections=given.get("m", settings.admission.connections)),
            journal=_replace(settings.journal, events=events),
        )

    def plan(self, plan: PlanSettings, hostname: str) -> PlanSettings:
        """Return a plan with the rules of the letters after its own. Raise UsageError."""
        try:
            rules = [*self._greetings(hostname), *self._delays(), *self._replies(), *self._bodies()]
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc
        return _replace(plan, rule=(*plan.rule, *rules))

    def _greetings(self, hostname: str) -> list[RuleSettings]:
        given = self.given
        if "P" not in given and "e" not in given:
            return []
        greeting = "220 ********" if "P" in given else f"220 {hostname}"
        return [
            RuleSettings(phase="banner", reply=greeting, name="-P" if "P" in given else "-e"),
            RuleSettings(phase="ehlo", reply=_UNKNOWN, name="EHLO"),
        ]

    def _delays(self) -> list[RuleSettings]:
        rules = []
        if "w" in self.given:
            rules.append(RuleSettings(phase="data", delay=DelaySettings(seconds=self.given["w"]), name="-w"))
        for number, text in enumerate(self.given.get("W", ()), 1):
            found = re.fullmatch(r"([A-Za-z.]+):([0-9]+(?:\.[0-9]+)?)(?::([1-9][0-9]?))?", text)
            if found is None:
                raise ValueError(f"-W takes COMMAND:SECONDS or COMMAND:SECONDS:ODDS with odds of 1 to 99, not {text!r}")
            delay = DelaySettings(seconds=float(found[2]), odds=int(found[3] or 0))
            phase = _PHASES[self._command("W", found[1])]
            rules.append(RuleSettings(phase=phase, delay=delay, name=f"-W {number}"))
        return rules

    def _replies(self) -> list[RuleSettings]:
        given = self.given
        hard, soft = given.get("B", _HARD), given.get("b", _SOFT)
        for letter, reply in (("-B", hard), ("-b", soft)):
            if reply_of(reply).code < 400:
                raise ValueError(f"{letter}: {reply!r} is not a 4xx or 5xx reply")
        end_phases: dict[str, Phase] = {**_PHASES, "CONNECT": "connect"}
        rules = [RuleSettings(phase=end_phases[each], end="drop", name=f"-q {each}") for each in self.commands("q")]
        for letter, reply in (("Q", _CLOSING), ("f", hard), ("r", soft)):
            rules += [
                RuleSettings(phase=_PHASES[command], reply=reply, name=f"-{letter} {command}")
                for command in self.commands(letter)
            ]
        return rules

    def _bodies(self) -> list[RuleSettings]:
        rules = []
        if "H" in self.given:
            rules.append(RuleSettings(phase="body", delay=DelaySettings(seconds=self.given["H"]), name="-H"))
        if "A" in self.given:
            delay = DelaySettings(seconds=self.given["A"])
            rules.append(RuleSettings(phase="body", delay=delay, reply=_VIOLATION, name="-A"))
        return rules
