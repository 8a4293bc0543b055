"""A Maildir on a failing disk: a message that cannot be written fails alone, and leaves nothing behind."""

from __future__ import annotations

from errno import EIO, EMFILE, ENOSPC

import pytest

from tests.delivery.failing import Case, Ended, run

CASES = {
    "none": Case(None),
    "no syncfs": Case(None, without_syncfs=True),
    "single": Case(None, messages=1),
    "write": Case(("writev", ENOSPC, 2, 2)),
    "sync": Case(("fdatasync", EIO, 2, 2), without_syncfs=True),
    "sync of a single one": Case(("fdatasync", EIO, 0, 0), messages=1),
    "second copy": Case(("fdatasync", ENOSPC, 3, 3), folders=2, without_syncfs=True),
    "syncfs": Case(("syncfs", EIO, 0, 99)),
    "rename": Case(("renameat", EIO, 1, 1)),
    "second rename": Case(("renameat", EIO, 3, 3), folders=2),
    "all writes": Case(("writev", ENOSPC, 0, 99), folders=2),
    "folder": Case(("fsync", EIO, 0, 0)),
    "no descriptor": Case(("open a folder", EMFILE, 1, 1), messages=1),
    "many folders": Case(None, messages=2, folders=300),
    "late write of many": Case(("writev", ENOSPC, 280, 280), messages=1, folders=300),
    "late sync of many": Case(("fdatasync", EIO, 280, 280), messages=1, folders=300, without_syncfs=True),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    return run(CASES, tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("name", ["none", "no syncfs", "syncfs"])
def test_a_batch_is_written_whether_it_is_synced_together_or_not(ended: dict[str, Ended], name: str) -> None:
    assert ended[name] == Ended([0] * 6, 6, 0)
    assert ended["single"] == Ended([0], 1, 0)


@pytest.mark.parametrize(("name", "error", "place"), [("write", ENOSPC, 2), ("sync", EIO, 2), ("rename", EIO, 1)])
def test_a_message_that_fails_affects_no_other(ended: dict[str, Ended], name: str, error: int, place: int) -> None:
    assert ended[name] == Ended([0] * place + [error] + [0] * (5 - place), 5, 0)


def test_a_copy_that_cannot_be_synced_keeps_back_the_other(ended: dict[str, Ended]) -> None:
    assert ended["second copy"] == Ended([0, ENOSPC, 0, 0, 0, 0], 10, 0)


def test_a_copy_that_cannot_be_renamed_takes_back_the_other(ended: dict[str, Ended]) -> None:
    assert ended["second rename"] == Ended([0, EIO, 0, 0, 0, 0], 10, 0)


def test_a_single_message_that_cannot_be_synced_leaves_nothing(ended: dict[str, Ended]) -> None:
    assert ended["sync of a single one"] == Ended([EIO], 0, 0)


def test_a_late_failure_keeps_back_the_copies_of_all_recipients(ended: dict[str, Ended]) -> None:
    assert ended["many folders"] == Ended([0, 0], 600, 0)
    assert ended["late write of many"] == Ended([ENOSPC], 0, 0)
    assert ended["late sync of many"] == Ended([EIO], 0, 0)


def test_a_full_disk_refuses_all_and_leaves_nothing(ended: dict[str, Ended]) -> None:
    assert ended["all writes"] == Ended([ENOSPC] * 6, 0, 0)


def test_a_folder_is_synced_also_when_descriptors_have_run_out(ended: dict[str, Ended]) -> None:
    assert ended["no descriptor"] == Ended([0], 1, 0)


def test_a_folder_that_cannot_be_synced_is_no_success(ended: dict[str, Ended]) -> None:
    assert ended["folder"].errors == [EIO] * 6
