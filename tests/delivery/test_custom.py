"""Deliveries in Python: what an object that is no `Delivery` can do."""

from __future__ import annotations

from pathlib import Path

from penstock import reply as replies
from penstock.delivery.base import ChecksCapacity, Discards, Streams
from penstock.delivery.custom import load_delivery

_FILE = """
from penstock import Reply

class Full:
    async def accept(self, message, transaction):
        return Reply(250, "2.0.0", "Ok")
    def check_capacity(self, octets):
        return Reply(452, "4.3.1", "Insufficient system storage, please try again later")
    def discard(self, recipients, octets):
        return Reply(250, "2.0.0", f"Ok: {recipients} {octets}")
    def open(self, head):
        return None

class OwnOpen:
    async def accept(self, message, transaction):
        return Reply(250, "2.0.0", "Ok")
    def open(self):
        return "a file of its own"
"""


def test_an_adopted_delivery_has_the_interfaces_of_its_object(tmp_path: Path) -> None:
    file = tmp_path / "deliveries.py"
    file.write_text(_FILE)
    full = load_delivery(f"{file}:Full")
    assert isinstance(full, ChecksCapacity)
    assert full.check_capacity(1) == replies.DISK_FULL
    assert isinstance(full, Discards)
    assert full.discard(1, 2).text == "Ok: 1 2"
    assert isinstance(full, Streams)


def test_a_method_with_other_arguments_is_no_interface(tmp_path: Path) -> None:
    file = tmp_path / "deliveries.py"
    file.write_text(_FILE)
    delivery = load_delivery(f"{file}:OwnOpen")
    assert not isinstance(delivery, ChecksCapacity | Discards | Streams)
