"""`penstock cluster`, and `penstock spool --cluster`, as operators use them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from bench.nats_servers import NatsServers
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.cluster.leases import read_nodes
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_layout
from penstock.config import to_toml
from penstock.reply import Reply
from tests.cluster.nodes import PATIENCE, NextHop, gateway, gateway_settings, made, next_hop, owns, send, until


class Operator:
    """Runs commands with a configuration file."""

    def __init__(self, folder: Path, settings: JetStreamSettings, **jetstream: object) -> None:
        self._file = folder / "operator.toml"
        table = gateway_settings(folder, settings, "smtp://127.0.0.1:25", "operator")
        self._file.write_text(to_toml(table, only_changed=True))

    async def run(self, *words: str, code: int = 0) -> str:
        """Run a command, and return its output."""
        arguments = [*words, "--config", str(self._file)]
        done = await trio.to_thread.run_sync(partial(CliRunner().invoke, main, arguments, catch_exceptions=False))
        assert done.exit_code == code, done.output
        return done.output

    async def until_said(self, text: str, *words: str) -> None:
        """Run a command until it prints something: a replica may be behind for a moment."""
        done = None
        with trio.fail_after(PATIENCE):
            while done is None or text not in done.output or done.exit_code:
                arguments = [*words, "--config", str(self._file)]
                done = await trio.to_thread.run_sync(partial(CliRunner().invoke, main, arguments))


async def test_streams_are_made_checked_and_shown(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path) as (jetstream, settings):
        operator = Operator(tmp_path, settings)
        for name in (f"{settings.name}-MAIL-0", f"KV_{settings.name}-lease"):
            await jetstream.api(f"STREAM.DELETE.{name}")
        assert f"stream {settings.name}-MAIL-0" in await operator.run("cluster", "check", code=1)
        output = await operator.run("cluster", "init")
        assert f"{settings.name}-MAIL-0: made" in output
        assert f"KV_{settings.name}-node: as it should be" in output
        assert "sync_interval: always" in output
        await operator.until_said("the cluster is as it should be", "cluster", "check")
        async with gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server:
            await owns(server, 4)
            shown = await operator.run("cluster", "status")
            assert "node g1: version 0.1.0, 4 partitions" in shown
            assert f"{settings.name}-MAIL-0: " in shown
            await operator.until_said("node g1: version 0.1.0, 4 partitions", "cluster", "check")


async def test_the_number_of_partitions_cannot_be_changed(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path) as (_, settings):
        operator = Operator(tmp_path, msgspec.structs.replace(settings, partitions=8))
        assert "created with 4" in await operator.run("cluster", "init", code=1)


async def test_the_number_of_streams_cannot_be_changed(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path, streams=2) as (_, settings):
        for streams in (1, 3):
            operator = Operator(tmp_path, msgspec.structs.replace(settings, streams=streams))
            assert "created with 2" in await operator.run("cluster", "init", code=1)


async def test_an_init_that_was_interrupted_can_be_repeated(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path, streams=3) as (jetstream, settings):
        for number in (1, 2):
            await jetstream.api(f"STREAM.DELETE.{settings.name}-MAIL-{number}")
        output = await Operator(tmp_path, settings).run("cluster", "init")
        assert f"{settings.name}-MAIL-0: as it should be" in output
        assert f"{settings.name}-MAIL-2: made" in output


async def test_operators_change_mail_of_all_nodes(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={f"{n}@example.org": Reply(450, "4.2.1", "Mailbox busy") for n in range(4)})
    async with made(servers, tmp_path, partitions=2) as (_, settings), next_hop(tmp_path, hop) as url:
        operator = Operator(tmp_path, settings)
        async with gateway(tmp_path, settings, url, "g1") as first, gateway(tmp_path, settings, url, "g2") as second:
            await owns(first, 1)
            await owns(second, 1)
            ids = [
                (await send(server, f"{number}", to=(f"{number}@example.org",))).split()[-1]
                for number, server in enumerate((first, second, first, second))
            ]
            await until(lambda: hop.asked == 4)

            async def states() -> dict[str, str]:
                listed = json.loads(await operator.run("spool", "list", "--cluster", "--json"))
                return {message["id"]: message["recipients"][0]["state"] for message in listed}

            while set((await states()).values()) != {"due"}:  # until all results are written
                pass
            assert list(await states()) == ids
            assert "1 recipient held" in await operator.run("spool", "hold", "--cluster", ids[1])
            assert "1 recipient dropped" in await operator.run("spool", "drop", "--cluster", "--yes", ids[2])
            assert await states() == {ids[0]: "due", ids[1]: "held", ids[3]: "due"}
            assert "Subject: test" in await operator.run("spool", "show", "--cluster", ids[0])
            assert json.loads(await operator.run("spool", "stats", "--cluster", "--json"))["held"] == 1
            hop.replies.clear()
            await operator.run("spool", "retry", "--cluster", "--all")
            await hop.until(lambda: len(hop.seen) == 2)
            await operator.run("spool", "release", "--cluster", ids[1])
            await hop.until(lambda: len(hop.seen) == 3)
            await operator.run("spool", "show", "--cluster", ids[2], code=1)
        assert set(hop.seen.values()) == {1}


async def test_a_held_message_is_held_by_the_next_owner(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={"b@example.org": Reply(450, "4.2.1", "Mailbox busy")})
    async with made(servers, tmp_path, lease=60) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        operator = Operator(tmp_path, settings)
        async with gateway(tmp_path, settings, url, "g1") as first:
            await owns(first, 4)
            name = (await send(first, "text")).split()[-1]
            await until(lambda: hop.asked == 1)
            while "1 recipient held" not in await operator.run("spool", "hold", "--cluster", name):
                pass
            hop.replies.clear()
        with trio.fail_after(30):  # one that has ended is not asked, long before its record expires
            while await read_nodes(jetstream, make_layout(settings)):
                pass
        async with gateway(tmp_path, settings, url, "g2") as second:
            await owns(second, 4)
            await operator.until_said("held", "spool", "list", "--cluster", name)
        assert hop.begun == 0


async def test_what_was_accepted_just_now_is_listed(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.index._DELAY", PATIENCE)
    hop = NextHop(waits=trio.Event())
    async with (
        made(servers, tmp_path, lease=60, patience=PATIENCE) as (_, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 4)
        name = (await send(server, "text")).split()[-1]
        assert name in await Operator(tmp_path, settings).run("spool", "list", "--cluster")
        assert hop.waits is not None
        hop.waits.set()


async def test_what_is_suspended_is_suspended_on_all_nodes_for_good(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path, partitions=2) as (_, settings), next_hop(tmp_path, hop) as url:
        operator = Operator(tmp_path, settings)
        assert "Example.org suspended" in await operator.run("spool", "suspend", "--cluster", "Example.org")
        assert "already" in await operator.run("spool", "suspend", "--cluster", "example.org")
        for _ in range(2):  # the second time, both nodes have forgotten everything
            async with (
                gateway(tmp_path, settings, url, "g1") as first,
                gateway(tmp_path, settings, url, "g2") as second,
            ):
                await owns(first, 1)
                await owns(second, 1)
                for server in (first, second):
                    await send(server, "waits")
                    assert "replicated" in await send(server, f"{hop.asked}", to=("b@example.net",))
                    await hop.until(lambda: hop.asked == sum(hop.seen.values()))
                assert "suspended: example.org" in await operator.run("cluster", "status")
        assert {address for address, _ in hop.seen} == {"b@example.net"}
        async with gateway(tmp_path, settings, url, "g1"):
            assert "resumed" in await operator.run("spool", "resume", "--cluster", "example.org")
            await hop.until(lambda: hop.seen["b@example.org", "waits"] == 4)


async def test_a_drained_node_gives_its_partitions_to_the_others(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path) as (_, settings), next_hop(tmp_path, hop) as url:
        operator = Operator(tmp_path, settings)
        async with gateway(tmp_path, settings, url, "g1") as first, gateway(tmp_path, settings, url, "g2") as second:
            await owns(second, 2)
            assert await operator.run("cluster", "drain", "g1") == "g1 has no partitions\n"
            await owns(second, 4)
            assert "replicated" in await send(first, "text")
            await hop.until(lambda: hop.seen)
        async with gateway(tmp_path, settings, url, "g1") as first, gateway(tmp_path, settings, url, "g2") as second:
            await owns(second, 4)  # as before the restart
            await operator.run("cluster", "drain", "--undo", "g1")
            await owns(first, 2)
        await operator.run("cluster", "drain", "unknown", code=1)


def test_wrong_settings_are_reported_with_their_key(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    wrong = {
        "": "jetstream.servers",
        'servers = ["http://n1"]': "jetstream.servers[0]",
        'servers = ["nats://n1"]': "jetstream.monitors",
        'servers = ["nats://n1"]\nmonitors = ["n1"]': "jetstream.monitors[0]",
        'servers = ["nats://n1"]\ntrust_durability = true\nname = "a.b"': "jetstream.name",
        'servers = ["nats://n1"]\ntrust_durability = true\nuser = "a"': "jetstream.password_file",
    }
    for text, key in wrong.items():
        file.write_text(f'[delivery]\nkind = "jetstream"\n[jetstream]\n{text}\n')
        done = CliRunner().invoke(main, ["cluster", "check", "--config", str(file)])
        assert done.exit_code == 2
        assert f"{key}: " in done.output
    file.write_text("")
    assert "has no cluster" in CliRunner().invoke(main, ["cluster", "check", "--config", str(file)]).output
    assert CliRunner().invoke(main, ["spool", "list", "--cluster"]).exit_code == 2


@pytest.mark.parametrize("command", ["init", "check", "status"])
def test_a_cluster_that_cannot_be_reached_is_one_line(command: str, tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text(
        '[delivery]\nkind = "jetstream"\n[jetstream]\nservers = ["nats://127.0.0.1:1"]\ntrust_durability = true\n'
        'user = "a"\npassword_file = "missing"\n'
    )
    done = CliRunner().invoke(main, ["cluster", command, "--config", str(file)])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "No such file" in done.output
