"""The letters of Postfix's smtp-sink, so that its users switch by changing the name.

Each letter is an option of `penstock sink` that its help does not list one by one; LETTERS says what it is here.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import click
import msgspec

from penstock.config import Settings
from penstock.sink.plan import DelaySettings, Ending, Phase, PlanSettings, RuleSettings, reply_of
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
    """What it takes; "" is nothing."""
    meaning: str
    """What it does."""
    ours: str
    """How the same is said in Penstock's own words."""
    many: bool = False


LETTERS: Final = (
    Letter("4", "", "IPv4 only, where the address names no host", "--listen 0.0.0.0:PORT"),
    Letter("6", "", "IPv6 only, where the address names no host", "--listen [::]:PORT"),
    Letter("8", "", "no 8BITMIME", "[listener.extensions] eightbitmime = false"),
    Letter("a", "", "no AUTH, which is so without --auth", "without --auth"),
    Letter("A", "SECONDS", "550 so long behind the 354, and no more is read", 'phase = "body", delay, reply = "550"'),
    Letter("b", "REPLY", "what -r says", 'reply = "REPLY"'),
    Letter("B", "REPLY", "what -f says", 'reply = "REPLY"'),
    Letter("c", "", "counters while it runs", "-c, --counters"),
    Letter("C", "", "no XCLIENT, which is so anyway", "as it is"),
    Letter("d", "TEMPLATE", "a file for each message, named by strftime(3) and a number", "--keep maildir:DIR"),
    Letter("D", "TEMPLATE", "a file for many messages, named by strftime(3)", "--keep mbox:FILE, --keep jsonl:FILE"),
    Letter("e", "", "no ESMTP: EHLO is unknown", 'phase = "ehlo", reply = "500"'),
    Letter("E", "", "no ENHANCEDSTATUSCODES", "[listener.extensions] enhancedstatuscodes = false"),
    Letter("f", "COMMANDS", "a 5yz to these commands; implies -p", 'phase, reply = "500"'),
    Letter("F", "", "no XFORWARD, which is so anyway", "as it is"),
    Letter("h", "NAME", "the name in the greeting; without a name, this help", "hostname"),
    Letter("H", "SECONDS", "so long nothing is read behind the 354", 'phase = "body", delay'),
    Letter("L", "", "LMTP", '[[listener]] kind = "lmtp"'),
    Letter("m", "COUNT", "connections at a time; those beyond hear 421", "[admission] connections"),
    Letter("M", "COUNT", "the end after so many messages", "--messages COUNT"),
    Letter("n", "COUNT", "the end after so many sessions", "--sessions COUNT"),
    Letter("N", "", "no DSN", "[listener.extensions] dsn = false"),
    Letter("p", "", "no PIPELINING", "[listener.extensions] pipelining = false"),
    Letter("P", "", "a Cisco PIX: 220 ********, implies -e", 'phase = "banner", reply = "220 ********"'),
    Letter("q", "COMMANDS", "the connection is closed at these commands", 'phase, end = "drop"'),
    Letter("Q", "COMMANDS", "421 to these commands", 'phase, reply = "421"'),
    Letter("r", "COMMANDS", "a 4yz to these commands; implies -p", 'phase, reply = "450"'),
    Letter(
        "R",
        "DIR",
        "refused: have a service manager change the root, `systemd RootDirectory=`",
        "chroot, systemd RootDirectory=",
    ),
    Letter("s", "COMMANDS", "mail events are journaled, whatever their commands", "[journal] events"),
    Letter("S", "STRING", "what stands before each message of -d and -D, with the escapes of C", "as it is"),
    Letter("t", "SECONDS", "seconds between two commands, and for a message", "[listener.limits] command_timeout"),
    Letter("T", "OCTETS", "the TCP window", "-T, or read_rate in a plan"),
    Letter("u", "USER", "refused, unless it is the user who runs it", "setpriv --reuid=USER, systemd User="),
    Letter("v", "", "all events are journaled", "[journal] events"),
    Letter("w", "SECONDS", "so long before the reply to DATA", 'phase = "data", delay'),
    Letter("W", "COMMAND:SECONDS[:ODDS]", "so long before the reply to a command", "phase, delay, odds", many=True),
)


_ELSEWHERE: Final = frozenset({"c"})
"""Letters that are options of `penstock sink` in any case."""


def smtp_sink_letters(command: F) -> F:
    """Give a click command the letters, and the address and the backlog that smtp-sink takes."""
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


def letters_help() -> str:
    """Return the table of the letters."""
    lines = [f"  -{each.letter} {each.argument:<24}{each.meaning}".rstrip() for each in LETTERS]
    return "The letters of smtp-sink, [inet:][host]:port and backlog among them:\n" + "\n".join(lines)


@dataclass
class LetterWishes:
    """What the letters ask for."""

    given: dict[str, Any]
    """The values by their letters; those that were not given are not here."""
    address: str | None = None
    backlog: int | None = None
    notes: list[str] = field(default_factory=list)
    """What the user should know of them."""

    @classmethod
    def take(cls, options: dict[str, Any]) -> LetterWishes:
        """Take the letters out of the options of a command."""
        given = {}
        for letter in LETTERS:
            if letter.letter in _ELSEWHERE:
                continue
            value = options.pop(f"letter_{ord(letter.letter)}")
            if value is not None and value is not False and value != ():
                given[letter.letter] = value
        return cls(given, options.pop("address"), options.pop("backlog"))

    @property
    def messages(self) -> int | None:
        """Messages after which to end."""
        return self.given.get("M")

    @property
    def sessions(self) -> int | None:
        """Sessions after which to end."""
        return self.given.get("n")

    @property
    def window(self) -> int | None:
        """Octets of the TCP window."""
        return self.given.get("T")

    @property
    def stores(self) -> list[DumpStore]:
        """Files that messages are written to."""
        start = unescape(self.given.get("S", ""))
        return [
            DumpStore(self.given[letter], is_single=letter == "d", start=start)
            for letter in ("d", "D")
            if letter in self.given
        ]

    # ---- checking

    def check(self) -> None:
        """Raise UsageError, with Penstock's way, for a letter that can not be obeyed."""
        for letter in LETTERS:
            if letter.letter in self.given and letter.meaning.startswith("refused:"):
                what = letter.meaning.removeprefix("refused: ")
                raise click.UsageError(f"-{letter.letter} of smtp-sink is not done here: {what}")
        user = self.given.get("u")
        if user is not None and user != pwd.getpwuid(os.geteuid()).pw_name:
            raise click.UsageError(
                f"-u of smtp-sink is not done here: run it as that user, "
                f"`setpriv --reuid={user} --init-groups penstock sink ...`; no privileges are needed from port 1024 on"
            )
        if "S" in self.given and not self.stores:
            raise click.UsageError("-S goes with -d or -D")
        if "4" in self.given and "6" in self.given:
            raise click.UsageError("-4 and -6 leave nothing")
        if "m" in self.given:
            self.notes.append(f"-m: clients beyond {self.given['m']} hear 421; smtp-sink lets them wait")
        if "s" in self.given:
            self.commands("s")
            self.notes.append("-s: all mail events are journaled on standard error, not those commands alone")

    def commands(self, letter: str) -> list[str]:
        """Return the commands that a letter names. Raise UsageError for one that there is not."""
        return [self._command(letter, word) for word in re.split(r"[\s,]+", self.given.get(letter, "")) if word]

    def _command(self, letter: str, word: str) -> str:
        name = word.upper()
        if name not in _PHASES:
            raise click.UsageError(f"-{letter}: there is no command {word!r}; there are {', '.join(_PHASES)}")
        return name

    # ---- what becomes of them

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
        """Return the settings as the letters have them."""
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
        """Return a plan with the rules of the letters behind its own. Raise UsageError."""
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
                raise ValueError(f"{letter}: {reply!r} is no refusal")
        rules = [self._end("q", command) for command in self.commands("q")]
        for letter, reply in (("Q", _CLOSING), ("f", hard), ("r", soft)):
            rules += [
                RuleSettings(phase=_PHASES[command], reply=reply, name=f"-{letter} {command}")
                for command in self.commands(letter)
            ]
        return rules

    def _end(self, letter: str, command: str) -> RuleSettings:
        drop: Ending = "drop"
        phase = "connect" if command == "CONNECT" else _PHASES[command]
        return RuleSettings(phase=phase, end=drop, name=f"-{letter} {command}")

    def _bodies(self) -> list[RuleSettings]:
        rules = []
        if "H" in self.given:
            rules.append(RuleSettings(phase="body", delay=DelaySettings(seconds=self.given["H"]), name="-H"))
        if "A" in self.given:
            delay = DelaySettings(seconds=self.given["A"])
            rules.append(RuleSettings(phase="body", delay=delay, reply=_VIOLATION, name="-A"))
        return rules
