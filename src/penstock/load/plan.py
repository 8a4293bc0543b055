"""The plan of a run: targets, load, messages, protocol."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock import sequence
from penstock.load.schedule import Schedule, Stage

Place = tuple[str | int | bytes, ...]
"""A socket address, as the socket module has it."""


class PlanError(ValueError):
    """The plan cannot be used; the text names the option and the right form."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server to send to."""

    host: str
    port: int
    path: str = ""
    """Path of a unix socket, in place of both."""
    family: int = 0
    place: Place | None = None
    """One of the addresses of the host, set by penstock.load.resolve."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "127.0.0.1:2525", "[::1]:25", "mx.example.org" or "unix:/run/lmtp". Raise PlanError."""
        if text.startswith("unix:"):
            return cls("", 0, text.removeprefix("unix:"))
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host and not host.startswith("[")):
            host, port = text, "25"
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise PlanError(
                f"a target looks like 127.0.0.1:2525, [::1]:25, mx.example.org:25 or unix:/path, not {text!r}"
            )
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run depends on."""

    targets: Sequence[Target]
    """Assigned to the sessions round robin."""
    sessions: int = 10
    """Concurrent connections."""
    messages: int | None = None
    """Messages of the run; None is no limit."""
    duration: float | None = None
    """Seconds after which no message is started."""
    rate: float | None = None
    """Messages started per second (open loop). None: each session starts its next message when it is free (closed
    loop)."""
    ramp: float = 0.0
    """Seconds in which the sessions, or the rate, grow to their full number."""
    stages: Sequence[Stage] = ()
    """Rates that change over time (open loop), in place of `rate`, `ramp` and `duration`."""
    think: float = 0.0
    """Seconds that a session pauses after each message (closed loop)."""
    warm_up: float = 0.0
    """Seconds at the begin of the run that are not counted."""
    per_connection: int = 1
    """Messages per connection; 0 is no limit."""
    recipients: int = 1
    sender: str = ""
    """The reverse-path; "" makes one that carries the sequence tag of the message."""
    to: Sequence[str] = ("load@load.invalid",)
    """Recipients, assigned to the messages round robin; with several per message, numbers are put before the @."""
    size: str = "4096"
    folder: Path | None = None
    """Directory of *.eml files to send, in place of messages of `size`."""
    hello: str = "load.invalid"
    pipelining: bool = False
    chunking: bool = False
    lmtp: bool = False
    tls: Literal["none", "starttls", "implicit"] = "none"
    ca_file: Path | None = None
    """CA certificates to verify the server with; without it certificates are not verified."""
    resumption: bool = True
    user: str = ""
    password: str = ""
    sources: Sequence[str] = ()
    """Source IP addresses, assigned to the sessions round robin."""
    header: bool = False
    """Write the sequence tag into a header field as well."""
    run: str = "run"
    """Name of the run in its sequence tags."""
    seed: int = 1
    timeout: float = 60.0
    """Seconds to wait for a reply."""
    give_up_at: int | None = None
    """Messages waiting for a session at which the run is stopped: the server has fallen behind (search)."""
    worker: int = 0
    """Which of the `workers` processes this one is: it runs every `workers`-th session and message, from this one."""
    workers: int = 1

    @property
    def is_open_loop(self) -> bool:
        """Messages start at a given rate."""
        return self.rate is not None or bool(self.stages)

    @property
    def schedule(self) -> Schedule:
        """When the messages of all processes are due (open loop)."""
        if self.stages:
            return Schedule(self.stages)
        assert self.rate is not None
        return Schedule.constant(self.rate, self.ramp, self.duration)

    @property
    def total(self) -> int | None:
        """Messages that this process starts; None when only the time decides. An open loop starts all that are due."""
        total = self.messages
        if self.is_open_loop and (due := self.schedule.total) is not None:
            total = due if total is None else min(total, due)
        return None if total is None else len(range(self.worker, total, self.workers))

    @property
    def seconds(self) -> float | None:
        """The intended length of the run; None when it depends on the server."""
        return math.fsum(stage.seconds for stage in self.stages) if self.stages else self.duration

    def check(self) -> None:
        """Raise PlanError for settings that do not fit together."""
        if self.messages is None and self.seconds is None:
            raise PlanError("a run needs an end: --messages, --duration or --stages")
        if self.stages and (self.rate is not None or self.ramp or self.duration is not None):
            raise PlanError("--stages replaces --rate, --ramp and --duration")
        if self.think and self.is_open_loop:
            raise PlanError("--think is for a closed loop, in which sessions decide when to send; drop --rate/--stages")
        if self.warm_up and (self.seconds is None or self.warm_up >= self.seconds):
            raise PlanError("--warm-up must be shorter than --duration or --stages")
        if self.workers > 1 and self.workers > min(self.sessions, self.messages or self.sessions):
            raise PlanError(f"--workers {self.workers} needs as many --sessions and --messages")
        if self.tls == "none" and self.ca_file is not None:
            raise PlanError("--ca-file needs --tls")
        if self.tls == "none" and not self.resumption:
            raise PlanError("--no-resumption needs --tls")
        self._check_names()

    def _check_names(self) -> None:
        try:
            sequence.mark(self.run, 0)
        except ValueError as exc:
            raise PlanError(f"--run: {exc}") from exc
        if self.recipients > 1 and not all("@" in text for text in self.to):
            raise PlanError("--recipients puts numbers before the @ of --to, which has none")
        for source in self.sources:
            try:
                ipaddress.ip_address(source)
            except ValueError as exc:
                raise PlanError(f"--source: {exc}") from exc
        texts = [("--auth", self.user + self.password), ("--from", self.sender), ("--helo", self.hello)]
        for option, text in (*texts, *(("--to", text) for text in self.to)):
            if not text.isprintable():
                raise PlanError(f"{option} {text!r}: not allowed in a command")
