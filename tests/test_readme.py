"""The examples of README.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio

from penstock.config import parse
from penstock.delivery.custom import load_delivery
from penstock.message import NO_PARAMETERS, NULL_PATH, CountedBody, Envelope, Message, MessageId
from penstock.message import Path as MailPath
from penstock.policy.hooks import load_hook
from penstock.reply import Reply
from penstock.sink.plan import parse_plan
from penstock.transaction import Peer, Transaction

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def example(name: str) -> str:
    """Return the block of code whose first line names a file."""
    found: str
    (found,) = [text for _, text in BLOCKS if text.startswith(f"# {name}")]
    return found


async def test_the_policy_refuses_a_blocked_domain(tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(example("policies.py"))
    (tmp_path / "blocked.txt").write_text("spam.example\n")
    policy: Any = load_hook(f"{tmp_path}/policies.py:Blocklist", {"file": str(tmp_path / "blocked.txt")})
    transaction = Transaction(Peer("192.0.2.1", 25))
    bad, good = (MailPath(f"a@{domain}", "a", domain) for domain in ("spam.example", "example.com"))
    assert await policy.on_mail(transaction, bad, NO_PARAMETERS) == Reply(
        550, "5.7.1", "Mail from your domain is not accepted"
    )
    assert await policy.on_mail(transaction, good, NO_PARAMETERS) is None


async def test_the_delivery_writes_every_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deliveries.py").write_text(example("deliveries.py"))
    delivery = load_delivery(f"{tmp_path}/deliveries.py:Archive")
    await delivery.start()
    message = Message(
        MessageId("1M8KRQ663CFG00000045"), Envelope(NULL_PATH, ()), b"Received: test\r\n", CountedBody(0), 0.0
    )
    reply = await delivery.accept(message, Transaction(Peer("192.0.2.1", 25)))
    assert reply == Reply(250, "2.0.0", f"Archived as {message.id}")
    file = trio.Path(tmp_path) / "archive" / f"{message.id}.eml"
    assert await file.read_bytes() == b"Received: test\r\n"


def test_the_configuration_is_valid() -> None:
    settings = parse(example("penstock.toml"))
    assert [listener.address for listener in settings.listener] == [":25", ":465"]


def test_the_parts_of_configurations_are_valid() -> None:
    settings = parse("\n".join(example(name) for name in ("filter.toml", "server.toml", "cluster.toml")))
    assert settings.policy is not None
    assert settings.policy.mode == "enforce"
    assert settings.delivery.kind == "jetstream"
    assert settings.server.user == "penstock"


def test_the_fault_plan_is_valid() -> None:
    (rule,) = parse_plan(example("plan.toml")).rule
    assert rule.name == "busy"


def test_the_tests_of_the_fixture_are_python() -> None:
    tests = [text for language, text in BLOCKS if language == "python" and "smtp_server" in text]
    assert len(tests) == 1
    compile(tests[0], "README.md", "exec")
