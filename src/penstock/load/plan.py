"""What a run is to do."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock import sequence

Place = tuple[str | int | bytes, ...]
"""An address and a port, as the socket module has them."""


class PlanError(ValueError):
    """What is wrong with a plan; the text names the option and the right form."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server to send to."""

    host: str
    port: int
    path: str = ""
    """A unix socket, in place of both."""
    family: int = 0
    place: Place | None = None
    """One of the addresses of the host, once they were looked up (penstock.load.resolve)."""

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
    """Taken in turn by the sessions."""
    sessions: int = 10
    """Connections at a time."""
    messages: int | None = None
    """Messages in all; None is no limit."""
    duration: float | None = None
    """Seconds after which no message is started."""
    rate: float | None = None
    """Messages started in a second (open loop); None starts each when the session before it is free (closed loop)."""
    ramp: float = 0.0
    """Seconds in which the sessions, or the rate, grow to their full number."""
    per_connection: int = 1
    """Messages of a connection; 0 is no limit."""
    recipients: int = 1
    sender: str = ""
    """The reverse-path; "" makes one that carries the mark of the message."""
    to: Sequence[str] = ("load@load.invalid",)
    """Forward-paths, which messages take in turn; with several recipients, numbers are put before the @."""
    size: str = "4096"
    folder: Path | None = None
    """Where *.eml files are, in place of texts of `size`."""
    hello: str = "load.invalid"
    pipelining: bool = False
    chunking: bool = False
    lmtp: bool = False
    tls: Literal["none", "starttls", "implicit"] = "none"
    ca_file: Path | None = None
    """The authority to check certificates with; without it they are not checked."""
    resumption: bool = True
    user: str = ""
    password: str = ""
    sources: Sequence[str] = ()
    """IP addresses to come from, in turn."""
    header: bool = False
    """The mark stands in a header field, too."""
    run: str = "run"
    """Names the run in its marks."""
    seed: int = 1
    timeout: float = 60.0
    """Seconds to wait for an answer."""

    def check(self) -> None:
        """Raise PlanError for what does not fit together."""
        if self.messages is None and self.duration is None:
            raise PlanError("--messages or --duration says when the run ends")
        if self.tls == "none" and self.ca_file is not None:
            raise PlanError("--ca-file needs --tls")
        try:
            sequence.mark(self.run, 0)
        except ValueError as exc:
            raise PlanError(f"--run: {exc}") from exc
        if self.recipients > 1 and not all("@" in text for text in self.to):
            raise PlanError("--recipients puts numbers before the @ of --to, and there is none")
        for source in self.sources:
            try:
                ipaddress.ip_address(source)
            except ValueError as exc:
                raise PlanError(f"--source: {exc}") from exc
        said = [("--auth", self.user + self.password), ("--from", self.sender), ("--helo", self.hello)]
        for option, text in (*said, *(("--to", text) for text in self.to)):
            if not text.isprintable():
                raise PlanError(f"{option} {text!r}: this can not stand in a command")
