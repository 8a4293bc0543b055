"""Administration of a running sink's faults: what the HTTP API and the statistics ask of a fault engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import tomli_w

from penstock import schema
from penstock.files import open_private
from penstock.sink import faults
from penstock.sink.faults import AppliedFault, FaultEngine, FaultLog
from penstock.sink.magic import GRAMMAR
from penstock.sink.plan import PlanSettings, parse_plan
from penstock.sink.report import FaultCount

_MAX_UNWRITTEN: Final = 8192
"""Octets of lines that wait to be written to the fault log."""


class PlanExample(NamedTuple):
    """A fault plan to start from."""

    title: str
    text: str


EXAMPLES: Final = (
    PlanExample(
        "Mailbox full",
        """\
# One recipient has a full mailbox: refused for good at RCPT.
[[rule]]
name = "full"
phase = "rcpt"
match = { recipient = ["full@*"] }
reply = "552 5.2.2 Mailbox full"
""",
    ),
    PlanExample(
        "Greylisting",
        """\
# The first attempt of each client, sender and recipient is deferred for a minute.
[[rule]]
name = "greylist"
phase = "rcpt"
greylist = { wait = 60 }
""",
    ),
    PlanExample(
        "Slow server",
        """\
# Replies to the end of a message are late: half of them by 0.2 s, one in a hundred by 5 s.
[[rule]]
name = "slow"
phase = "dot"
delay = { percentiles = [[50, 0.2], [90, 1.0], [99, 5.0]] }
""",
    ),
    PlanExample(
        "Temporary failures",
        """\
# One message in ten is deferred, the same ones in each run with this seed.
seed = 1

[[rule]]
name = "busy"
phase = "dot"
match = { probability = 0.1 }
reply = "451 4.3.0 Temporary failure, please try again later"
""",
    ),
    PlanExample(
        "Lost acknowledgment",
        """\
# One message in twenty is accepted, but the connection ends before the reply: the client sends it again (RFC 1047).
[[rule]]
name = "lost-reply"
phase = "dot"
match = { every = 20 }
end = "drop"
keeps = true
""",
    ),
    PlanExample(
        "Rate limit",
        """\
# Each client address may open 10 connections per second; more are refused.
[[rule]]
name = "too-fast"
phase = "banner"
rate = { per = "address", count = 10, seconds = 1 }
""",
    ),
    PlanExample(
        "Outages",
        """\
# The server is down for 30 seconds in every 5 minutes.
[[rule]]
name = "outage"
phase = "connect"
end = "reset"
outage = { down = 30, every = 300 }
""",
    ),
)
"""Plans that a user can start from. Each is valid."""


class FaultAdmin:
    """The plan of a fault engine as text, and its counts (see penstock.sink.statistics)."""

    def __init__(self, engine: FaultEngine, log: FaultLog, *, seed: int | None = None) -> None:
        """`log` is the one the engine records its faults in; `seed` overrides that of every plan."""
        self._engine = engine
        self._log = log
        self._seed = seed
        self._text = ""
        """The plan in force as its author wrote it."""
        self._plan_of_text: PlanSettings | None = None

    @property
    def fails_next(self) -> bool:
        """Always true."""
        return True

    def check(self, text: str) -> list[str]:
        """Return the names of the rules of a plan. Raise PlanError that names the key."""
        return parse_plan(text).names()

    def plan(self) -> str:
        """Return the plan in force as TOML: with its comments if it came as text, else without default values."""
        if self._plan_of_text is self._engine.plan:
            return self._text
        return to_toml(self._engine.plan)

    def replace(self, text: str) -> None:
        """Put another plan in force, in open sessions too. Raise PlanError that names the key."""
        plan = parse_plan(text)
        if self._seed is not None:
            plan = msgspec.structs.replace(plan, seed=self._seed)
        self._engine.load(plan)
        self.note_text(text)

    def note_text(self, text: str) -> None:
        """Let `plan` return this text as long as the plan that is in force now stays in force."""
        self._text, self._plan_of_text = text, self._engine.plan

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        """Give the next commands of a phase this reply. Raise ValueError."""
        self._engine.fail_next(phase, reply, count)

    def pending(self) -> dict[str, int]:
        """Return how many commands of each phase are still to fail."""
        return self._engine.pending()

    def counted(self) -> Sequence[FaultCount]:
        """Return the number of faults by rule, phase and action."""
        return [
            FaultCount(rule=rule, phase=phase, action=action, count=count)
            for (rule, phase, action), count in sorted(self._log.counts.items())
        ]

    def reset(self) -> None:
        """Reset the counts, and restart the plan."""
        self._engine.reset()
        self._log.clear()


class FaultFile(FaultLog):
    """A log that also writes each fault to a file with its time, as one JSON object per line."""

    def __init__(self, path: Path) -> None:
        """Create or truncate the file. Raise OSError."""
        super().__init__()
        self._file = open(path, "wb", buffering=0, opener=open_private)  # noqa: SIM115 - addresses of people
        self._lines = bytearray()
        """Whole lines that are not written yet: several processes may share the file."""
        self.failure: OSError | None = None
        """The error that ended the writing; the sink continues."""

    def on_fault(self, fault: AppliedFault) -> None:
        """Count the fault, keep it and write it."""
        super().on_fault(fault)
        if self.failure is None:
            self._lines += msgspec.json.encode({"time": _now(), **fault._asdict()}) + b"\n"
            if len(self._lines) >= _MAX_UNWRITTEN:
                self._write()

    def _write(self) -> None:
        lines, self._lines = bytes(self._lines), bytearray()
        try:
            written = self._file.write(lines) if lines else 0
            if written != len(lines):
                self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # Remove the part of a line, which the next line of another process would continue. One that writes
                # just now may lose its line as well.
                self._file.seek(lines.rfind(b"\n", 0, written) + 1 - written, os.SEEK_CUR)
                self._file.truncate()
        except OSError as exc:  # a pipe cannot be cut
            self.failure = self.failure or exc

    @property
    def wants_message_ids(self) -> bool:
        """The file names the message of each fault."""
        return True

    def close(self) -> None:
        """Write what is left. Raise OSError if the file is incomplete."""
        if self.failure is None:
            self._write()
        try:
            self._file.close()
        except OSError as exc:
            self.failure = self.failure or exc
        if self.failure is not None:
            raise self.failure


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_toml(plan: PlanSettings) -> str:
    """Return a plan as TOML, without default values."""
    return tomli_w.dumps(_changed(plan))


def _changed(value: msgspec.Struct) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(value)):
        item = getattr(value, field.name)
        if item is None or (field.default is not msgspec.NODEFAULT and item == field.default):
            continue
        if isinstance(item, msgspec.Struct):
            item = _changed(item)
        elif isinstance(item, tuple):
            item = [_changed(each) if isinstance(each, msgspec.Struct) else each for each in item]
        changed[field.encode_name] = item
    return changed


def describe_faults() -> str:
    """Return the reference of fault plans and magic recipients: a plan of default values, with comments."""
    prose = "\n".join([(faults.__doc__ or "").partition("\n\n")[2].rstrip(), "", GRAMMAR.rstrip()])
    comments = "\n".join(f"# {line}".rstrip() for line in prose.splitlines())
    return f"{schema.describe(PlanSettings)}\n# ----\n\n{comments}\n"
