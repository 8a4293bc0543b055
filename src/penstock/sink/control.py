"""The desk where a running sink's faults are seen to: what the HTTP API and the receipts ask an engine for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from penstock import schema
from penstock.sink import faults
from penstock.sink.faults import AppliedFault, FaultEngine, FaultLog
from penstock.sink.magic import GRAMMAR
from penstock.sink.plan import PlanSettings, parse_plan
from penstock.sink.report import FaultCount


class FaultDesk:
    """The plan of an engine as text, and its counts as the report has them (see penstock.sink.statistics)."""

    def __init__(self, engine: FaultEngine, log: FaultLog, *, seed: int | None = None) -> None:
        """`log` is what the engine tells its faults; `seed` has the last word over that of every plan."""
        self._engine = engine
        self._log = log
        self._seed = seed

    def plan(self) -> str:
        """Return the plan in force, as TOML, without what is the default."""
        return to_toml(self._engine.plan)

    def replace(self, text: str) -> None:
        """Put another plan in force, in open sessions, too. Raise PlanError that names the key."""
        plan = parse_plan(text)
        if self._seed is not None:
            plan = msgspec.structs.replace(plan, seed=self._seed)
        self._engine.load(plan)

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        """Give the next commands of a phase this reply. Raise ValueError."""
        self._engine.fail_next(phase, reply, count)

    def pending(self) -> dict[str, int]:
        """Return how many commands of each phase are still to fail."""
        return self._engine.pending()

    def counted(self) -> Sequence[FaultCount]:
        """Return how often each rule did what."""
        return [
            FaultCount(rule=rule, phase=phase, action=action, count=count)
            for (rule, phase, action), count in sorted(self._log.counts.items())
        ]

    def reset(self) -> None:
        """Start over: the counts, and the plan."""
        self._engine.reset()
        self._log.clear()


class FaultFile(FaultLog):
    """A log that also writes each fault to a file with its time, as one JSON object per line."""

    def __init__(self, path: Path) -> None:
        """Create or truncate the file. Raise OSError."""
        super().__init__()
        self._file = path.open("wb")
        self.failure: OSError | None = None
        """The error that ended the writing; the sink continues."""

    def on_fault(self, fault: AppliedFault) -> None:
        """Count the fault, keep it and write it."""
        super().on_fault(fault)
        if self.failure is None:
            try:
                self._file.write(msgspec.json.encode({"time": _now(), **fault._asdict()}) + b"\n")
            except OSError as exc:
                self.failure = exc

    @property
    def wants_message_ids(self) -> bool:
        """The file names the message of each fault."""
        return True

    def close(self) -> None:
        """Write what is left. Raise OSError if the file is incomplete."""
        try:
            self._file.close()
        except OSError as exc:
            self.failure = self.failure or exc
        if self.failure is not None:
            raise self.failure


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_toml(plan: PlanSettings) -> str:
    """Return a plan as TOML, without what is the default."""
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
    """Return all that there is to know of plans and magic recipients: a plan that means the defaults, with comments."""
    prose = "\n".join([(faults.__doc__ or "").partition("\n\n")[2].rstrip(), "", GRAMMAR.rstrip()])
    comments = "\n".join(f"# {line}".rstrip() for line in prose.splitlines())
    return f"{schema.describe(PlanSettings)}\n# ----\n\n{comments}\n"
