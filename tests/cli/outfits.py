"""What `Operations` of tests are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.cli.certificates import Certificates
from penstock.cli.logfile import LogFile
from penstock.cli.notify import ServiceManager
from penstock.cli.operating import Outfit
from penstock.config import Settings, from_table
from penstock.journal import Journal, JournalSettings


def settings_of(folder: Path, **table: Any) -> Settings:
    listener = [{"address": "127.0.0.1:0", "tls": {"mode": "none"}}]
    return from_table({"hostname": "mx.example.org", "data_dir": str(folder), "listener": listener, **table})


class Written:
    """An outfit, and what was written to its journal."""

    def __init__(self, settings: Settings, load: Callable[[], Settings] | None = None) -> None:
        self._lines: list[bytes] = []
        journal = Journal(JournalSettings(format="json"))
        self.outfit = Outfit(
            settings,
            load or (lambda: settings),
            Certificates(settings),
            LogFile(settings),
            journal,
            self._lines.append,
            ServiceManager(),
        )

    def events(self) -> list[str]:
        """Return the kinds of all events."""
        return [json.loads(line)["event"] for line in b"".join(self._lines).splitlines()]
