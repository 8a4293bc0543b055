"""Filters are asked once, for `penstock config check --online`."""

from __future__ import annotations

import msgspec

from penstock.policy.filterprobe import probes
from penstock.policy.settings import PolicySettings
from tests.policy import test_delegate, test_rspamd
from tests.policy.fakemilter import FakeMilter


async def test_only_filters_that_do_not_answer_are_reported() -> None:
    milter, server, rspamd = FakeMilter(), test_delegate.Server(), test_rspamd.Server(test_rspamd.answer("pong"))
    async with milter.serving(), server.serving():
        old = FakeMilter(0x800000)
        async with old.serving(), rspamd.serving():
            table = {
                "milter": [{"address": [milter.address, "unix:/nonexistent"]}, {"address": old.address}],
                "delegate": [{"address": server.address}],
                "rspamd": {"url": rspamd.url},
            }
            policy = msgspec.convert(table, PolicySettings)
            found = [(key, await probe()) for key, probe in probes(policy)]
        closed = [(key, await probe()) for key, probe in probes(policy)]
    assert [problem for _, problem in found[:1] + found[3:]] == [""] * 3
    assert "cannot connect" in found[1][1]
    assert found[2][0] == "policy.milter[1].address"
    assert "asks for version 6" in found[2][1]
    assert [("cannot connect" in problem) for _, problem in closed] == [False, True, True, False, True]
    assert closed[4][0] == "policy.rspamd.url"
