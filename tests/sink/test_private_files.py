"""Kept mail can be read by its owner only."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.sink.stores import DumpStore, JsonLinesStore, MaildirStore, MboxStore, Store
from tests.contracts.delivery import make_message

TRACE = b"Received: from client ([192.0.2.1])\r\n\tby mx (Penstock) with ESMTP id X;\r\n\tnow\r\n"
STORES: dict[str, Callable[[Path], Store]] = {
    "mbox": MboxStore,
    "jsonl": JsonLinesStore,
    "maildir": MaildirStore,
    "dump": lambda path: DumpStore(str(path), is_single=False),
    "dumps": lambda path: DumpStore(str(path), is_single=True),
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_a_new_file_of_kept_mail_has_mode_0600(tmp_path: Path, kind: str, umask: int) -> None:
    store: Store = STORES[kind](tmp_path / "kept")
    before = os.umask(umask)
    try:
        store.open()
        store.write([make_message(b"Subject: x\r\n\r\ntext\r\n")._replace(prefix=TRACE)])
        store.close()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
