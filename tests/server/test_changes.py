"""What a running server changes in place: new certificates and new policies, whatever the state of other files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench.operations import make_pair

from penstock.app import Overrides, Server, assemble
from penstock.auth.users import UsersFileError
from penstock.cluster.node import Node
from penstock.config import Settings, from_table
from penstock.journal import Journal
from penstock.loading import HookError
from penstock.net.tls import KeyPair
from penstock.policy.recipients import NextHopRecipients

POLICY = "class Check:\n    def on_helo(self, transaction, name):\n        return None\n"


@contextmanager
def assembled(folder: Path, key_pairs: list[KeyPair | None], **table: Any) -> Iterator[Server]:
    settings = from_table({"hostname": "mx.example.org", "data_dir": str(folder), **table})
    server = assemble(settings, Journal(settings.journal), lambda _: None, overrides=Overrides(key_pairs=key_pairs))
    try:
        yield server
    finally:
        server.close()


def pair_of(folder: Path) -> KeyPair:
    make_pair(folder)
    return KeyPair.read(folder / "cert.pem", folder / "key.pem")


@contextmanager
def submission(folder: Path) -> Iterator[Server]:
    """Give a server with TLS and AUTH, whose users file breaks after the start, and with a policy of its own."""
    (folder / "policy.py").write_text(POLICY)
    listener = {
        "address": "127.0.0.1:0",
        "tls": {"mode": "starttls", "certificate": "cert.pem", "key": "key.pem"},
        "auth": {"users": "users"},
    }
    check = {"hook": f"{folder / 'policy.py'}:Check"}
    with assembled(folder, [pair_of(folder)], listener=[listener], check=[check]) as server:
        (folder / "users").write_text("this is no line of a users file\n")
        (folder / "secret").write_bytes(b"too short")
        yield server


async def test_a_new_certificate_needs_no_users_file(tmp_path: Path) -> None:
    with submission(tmp_path) as server:
        before = server.listeners[0].listener
        pair = pair_of(tmp_path)
        server.use_key_pairs([pair])
        after = server.listeners[0].listener
        assert after.binding is not None
        assert before.binding is not None
        assert after.binding.data == pair.binding() != before.binding.data
        assert after.tls not in (None, before.tls)
        assert after.certificate_not_after == pair.not_after()
        assert after.authenticator is before.authenticator


async def test_new_policies_need_no_users_file(tmp_path: Path) -> None:
    with submission(tmp_path) as server:
        before = server.listeners[0].listener
        (tmp_path / "policy.py").write_text(
            POLICY.replace("on_helo(self, transaction, name)", "on_reset(self, transaction)")
        )
        assert await server.check_policies()
        after = server.listeners[0].listener
        assert (bool(before.pipeline.helo), bool(before.pipeline.reset)) == (True, False)
        assert (bool(after.pipeline.helo), bool(after.pipeline.reset)) == (False, True)
        assert after.authenticator is before.authenticator
        assert (after.tls, after.binding) == (before.tls, before.binding)


async def test_a_reload_reads_the_users_file(tmp_path: Path) -> None:
    with submission(tmp_path) as server, pytest.raises((UsersFileError, ValueError)):
        server.reload(server.settings, [pair_of(tmp_path)])


# ---- recipients that a cluster shares


def verifying(server: Server) -> tuple[Node, NextHopRecipients]:
    assert server.shared.node is not None
    assert server.shared.recipients is not None
    return server.shared.node, server.shared.recipients


@contextmanager
def clustered(folder: Path) -> Iterator[Server]:
    with assembled(
        folder,
        [None],
        listener=[{"address": "127.0.0.1:0", "tls": {"mode": "none"}}],
        delivery={"kind": "jetstream"},
        jetstream={"servers": ["nats://127.0.0.1:4222"], "trust_durability": True},
        route=[{"next_hop": "smtp://127.0.0.1:25"}],
        recipients={"verify": "next-hop"},
    ) as server:
        yield server


def learnt(node: Node, recipients: NextHopRecipients) -> bool:
    """Return whether recipients get what another node has asked."""
    recipients._answers.clear()
    node.exchange.on_recipient("bob@example.org", 60.0, None)
    return "bob@example.org" in recipients._answers


def changed(settings: Settings, **table: Any) -> Settings:
    """Return settings with other tables."""
    found = from_table({"hostname": "mx.example.org", **table})
    return msgspec.structs.replace(settings, **{name: getattr(found, name) for name in table})


async def test_a_refused_reload_leaves_the_shared_recipients(tmp_path: Path) -> None:
    with clustered(tmp_path) as server:
        node, recipients = verifying(server)
        assert learnt(node, recipients)
        with pytest.raises(HookError):
            server.reload(changed(server.settings, check=[{"hook": "nowhere.py:Nothing"}]), [None])
        assert server.shared.recipients is recipients
        assert learnt(node, recipients)
        assert recipients.on_answer == node.exchange.note_recipient


async def test_a_reload_shares_the_new_recipients_only(tmp_path: Path) -> None:
    with clustered(tmp_path) as server:
        node, before = verifying(server)
        server.reload(changed(server.settings, recipients={"verify": "next-hop", "cache": 10}), [None])
        _, after = verifying(server)
        assert learnt(node, after)
        assert not learnt(node, before)
        assert after.on_answer == node.exchange.note_recipient


async def test_without_verification_no_recipients_are_shared(tmp_path: Path) -> None:
    with clustered(tmp_path) as server:
        node, before = verifying(server)
        server.reload(changed(server.settings, recipients={}), [None])
        assert server.shared.recipients is None
        assert not learnt(node, before)
