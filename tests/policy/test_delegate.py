"""The client of Postfix's policy delegation protocol, against a server that does what the tests tell it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import trio

from penstock.message import NO_PARAMETERS, Recipient
from penstock.policy.delegate import DelegateCheck, make_checks
from penstock.policy.settings import PolicySettings
from penstock.reply import CHECK_FAILED, Reply
from tests.policy.judging import count_in, counted, judge, judge_with, make_parts, make_transaction, path_of

BOB = Recipient(path_of("bob@example.org"))


class Server:
    """Answers all questions with one text."""

    def __init__(self, answer: str = "action=DUNNO\n\n", *, keeps: bool = True, breaks: str = "") -> None:
        self.answer = answer
        self.keeps = keeps
        self.breaks = breaks
        self.questions: list[dict[str, str]] = []
        self.connections = 0
        self.address = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.address = f"inet:127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        text = b""
        async with stream:
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    text += data
                    if text.endswith(b"\n\n"):
                        lines = text.decode().splitlines()[:-1]
                        self.questions.append(dict(line.split("=", 1) for line in lines))
                        text = b""
                        if self.breaks == "hang":
                            await trio.sleep_forever()
                        await stream.send_all(self.answer.encode())
                        if not self.keeps:
                            return


def check_for(server: Server, mode: str = "enforce", **settings: Any) -> DelegateCheck:
    table = {"mode": mode, "delegate": [{"address": server.address, **settings}]}
    (check,) = make_checks(msgspec.convert(table, PolicySettings), make_parts())
    assert isinstance(check, DelegateCheck)
    return check


async def asked(server: Server, **settings: Any) -> Reply | None:
    async with server.serving():
        transaction = make_transaction()
        return await judge_with(check_for(server, **settings))[0].on_rcpt(transaction, BOB)


async def test_the_attributes_of_postfix_are_sent_at_rcpt() -> None:
    server = Server()
    assert await asked(server) is None
    (question,) = server.questions
    expected = {
        "request": "smtpd_access_policy",
        "protocol_state": "RCPT",
        "protocol_name": "ESMTP",
        "client_address": "198.51.100.1",
        "client_name": "unknown",
        "helo_name": "client.example",
        "sender": "alice@example.com",
        "recipient": "bob@example.org",
        "recipient_count": "0",
        "encryption_protocol": "TLSv1.3",
        "encryption_keysize": "256",
        "sasl_username": "",
    }
    assert expected.items() <= question.items()


async def test_questions_about_one_message_have_one_instance() -> None:
    server = Server()
    async with server.serving():
        judge_ = judge_with(check_for(server))[0]
        transaction = make_transaction()
        for _ in range(2):
            await judge_.on_rcpt(transaction, BOB)
        transaction.reset()
        await judge_.on_rcpt(transaction, BOB)
    instances = [question["instance"] for question in server.questions]
    assert instances[0] == instances[1] != instances[2]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("action=DUNNO", None),
        ("action=OK", None),
        ("other=x\naction=dunno", None),
        ("action=REJECT", "554 5.7.1 Refused by policy"),
        ("action=REJECT 5.7.9 Go away", "554 5.7.9 Go away"),
        ("action=550 5.7.23 No", "550 5.7.23 No"),
        ("action=550 no such thing", "550 5.7.1 no such thing"),
        ("action=DEFER_IF_PERMIT Greylisted", "450 4.7.1 Greylisted"),
        ("action=451 4.2.0 Later", "451 4.2.0 Later"),
        ("action=421 4.3.2 Bye", "421 4.3.2 Bye"),
    ],
)
async def test_actions_are_obeyed(answer: str, reply: str | None) -> None:
    answer = answer.rsplit("\n", maxsplit=1)[-1] if answer.startswith("other") else answer
    found = await asked(Server(f"{answer}\n\n"))
    assert (found and found.encoded.decode().strip()) == reply


@pytest.mark.parametrize(
    "answer",
    ["action=FILTER smtp:x\n\n", "nonsense\n\n", "action=250 fine\n\n", "x" * 9000, "action=PREPEND no field\n\n", ""],
)
@pytest.mark.parametrize("fail", ["defer", "accept"])
async def test_answers_that_mean_nothing_are_failures(answer: str, fail: str) -> None:
    found = await asked(Server(answer, keeps=False), fail=fail)
    assert found == (CHECK_FAILED if fail == "defer" else None)


async def test_a_server_that_hangs_costs_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    assert await asked(Server(breaks="hang"), deadline=3) == CHECK_FAILED
    assert trio.current_time() - start == 3


async def test_a_server_that_closes_is_connected_again() -> None:
    server = Server("action=REJECT\n\n", keeps=False)
    async with server.serving():
        judge_ = judge_with(check_for(server))[0]
        for _ in range(5):
            found = await judge_.on_rcpt(make_transaction(), BOB)
            assert found is not None
            assert found.code == 554


async def test_fields_are_prepended_and_mail_is_held() -> None:
    server = Server("action=PREPEND X-Policy: passed (by it)\n\n")
    async with server.serving():
        transaction = make_transaction()
        assert await judge_with(check_for(server))[0].on_rcpt(transaction, BOB) is None
        assert transaction.added_fields == b"X-Policy: passed (by it)\r\n"
    server = Server("action=DISCARD\n\n")
    async with server.serving():
        transaction = make_transaction()
        assert (await judge(check_for(server, at="message"), transaction))[0] is None
        assert transaction.quarantine == "hold"


async def test_each_hook_point_can_be_chosen() -> None:
    server = Server("action=REJECT no\n\n")
    transaction = make_transaction()
    transaction.sender = None
    async with server.serving():
        questions: dict[str, Callable[..., object]] = {}
        for at in ("connect", "helo", "mail", "message"):
            judge_ = judge_with(check_for(server, at=at))[0]
            questions = {
                "connect": partial(judge_.on_connect, transaction),
                "helo": partial(judge_.on_helo, transaction, "new.example"),
                "mail": partial(judge_.on_mail, transaction, path_of("a@b.example"), NO_PARAMETERS),
            }
            if at == "message":
                found, _ = await judge(check_for(server, at=at))
            else:
                found = await questions[at]()  # type: ignore[misc]
            assert found == Reply(554, "5.7.1", "no")
    assert [question["protocol_state"] for question in server.questions] == [
        "CONNECT", "EHLO", "MAIL", "END-OF-MESSAGE",
    ]  # fmt: skip
    assert server.questions[1]["helo_name"] == "new.example"
    assert server.questions[2]["sender"] == "a@b.example"
    assert server.questions[3]["recipient_count"] == "1"


async def test_nothing_happens_in_monitor_mode() -> None:
    server = Server("action=REJECT\n\n")
    async with server.serving():
        judge_, journal = judge_with(check_for(server, "monitor"), "monitor")
        counters = count_in(journal)
        assert await judge_.on_rcpt(make_transaction(), BOB) is None
        assert list(counted(counters, "policy_would_total").values()) == [1]
