"""What bench/operations.py measures, in short: reloads and restarts under load lose and refuse nothing."""

from __future__ import annotations

from pathlib import Path

from bench import operations


def test_reloads_under_load_disturb_no_session(tmp_path: Path) -> None:
    assert "5 reloads: 0 refused" in operations.reloads(tmp_path, 5)


def test_replaced_workers_lose_no_mail(tmp_path: Path) -> None:
    assert "0 lost, 0 duplicated" in operations.rolls(tmp_path, 1)


def test_certificates_replaced_under_load_fail_no_handshake(tmp_path: Path) -> None:
    assert "0 refused, new one after" in operations.certificates(tmp_path, 1)


def test_draining_under_load_loses_nothing(tmp_path: Path) -> None:
    assert "drained, exit code 0" in operations.drain(tmp_path)


def test_a_restart_with_stored_sockets_refuses_no_client(tmp_path: Path) -> None:
    assert "0 lost, 0 duplicated" in operations.restarts(tmp_path, 1)
