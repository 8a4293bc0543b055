"""Runs of the generator against Penstock's own worker, and against servers that misbehave."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from penstock.auth.users import UsersFile
from penstock.load.counts import Counts
from penstock.load.generator import Generator
from penstock.load.plan import Plan, PlanError, Target
from penstock.net.tls import TlsSettings, generated_certificate, server_context
from tests.ports import free_port
from tests.server.test_worker import LISTENER, running

TLS = LISTENER.replace('"none"', '"starttls"')


async def run(port: int, **words: Any) -> Counts:
    plan = Plan(targets=[Target("127.0.0.1", port)], **{"messages": 40, "sessions": 4, "per_connection": 0, **words})
    with trio.fail_after(60):
        return await Generator(plan).run()


def is_clean(counts: Counts, messages: int = 40) -> bool:
    """All were sent, all were accepted, and no connection ended otherwise than it should."""
    return (counts.attempted, counts.accepted, counts.failed, dict(counts.errors)) == (messages, messages, 0, {})


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"per_connection": 1},
        {"per_connection": 3},
        {"pipelining": True},
        {"chunking": True},
        {"pipelining": True, "chunking": True},
        {"recipients": 5},
        {"recipients": 5, "pipelining": True},
        {"size": "300000", "messages": 8},
        {"size": "300000", "messages": 8, "chunking": True, "header": True},
        {"size": "500-100000"},
        {"rate": 1000.0, "ramp": 0.01},
        {"ramp": 0.01},
    ],
)
async def test_all_that_is_sent_arrives_once(tmp_path: Path, words: dict[str, Any]) -> None:
    async with running(tmp_path) as server:
        counts = await run(server.port, **words)
    accepted = server.events("accepted")
    messages = words.get("messages", 40)
    assert is_clean(counts, messages), counts.as_report()
    marks = [record["from"].partition("@")[0] for record in accepted]
    assert sorted(marks) == sorted(f"seq-run-{number}" for number in range(1, messages + 1))
    assert {record["recipients"] for record in accepted} == {words.get("recipients", 1)}
    assert sum(record["size"] for record in accepted) == pytest.approx(counts.octets, rel=0.01)
    assert counts.phases["message"].count == counts.phases["dot"].count == messages
    assert counts.phases["session"].count == counts.connections
    assert counts.phases["connect"].count == counts.phases["greeting"].count == counts.connections
    per_connection = words.get("per_connection", 0)
    least = -(-messages // per_connection) if per_connection else 4
    assert least <= counts.connections < least + 4


async def test_a_connection_is_made_for_each_message_and_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        counts = await run(server.port, per_connection=1, messages=41)
    assert len(server.events("connected")) == counts.connections == 41


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
@pytest.mark.parametrize("words", [{}, {"per_connection": 1}, {"resumption": False, "per_connection": 1}])
async def test_mail_travels_in_tls_and_the_certificate_is_checked(
    tmp_path: Path, mode: str, words: dict[str, Any]
) -> None:
    async with running(tmp_path, TLS.replace("starttls", mode)) as server:
        counts = await run(server.port, tls=mode, ca_file=tmp_path / "tls" / "ca.pem", messages=8, **words)
    assert is_clean(counts, 8), counts.as_report()
    assert len(server.events("tls")) == counts.phases["tls"].count == counts.connections


async def test_a_certificate_of_somebody_else_ends_the_run(tmp_path: Path) -> None:
    async with running(tmp_path, TLS) as server:
        elsewhere = tmp_path / "elsewhere"
        async with running(elsewhere, TLS):
            counts = await run(server.port, tls="starttls", ca_file=elsewhere / "tls" / "ca.pem", sessions=1)
    assert counts.accepted == 0
    assert set(counts.errors) == {"tls"}


async def test_a_user_authenticates(tmp_path: Path) -> None:
    UsersFile(tmp_path / "users").add("alice", "secret", replace=False)
    async with running(tmp_path, f"{TLS}auth.required = true\n") as server:
        counts = await run(server.port, tls="starttls", user="alice", password="secret", messages=4)
        assert is_clean(counts, 4), counts.as_report()
        counts = await run(server.port, tls="starttls", user="alice", password="wrong", sessions=1)
        assert counts.accepted == 0
        assert counts.errors["refused"] > 0


@pytest.mark.parametrize("chunking", [False, True], ids=["DATA", "BDAT"])
@pytest.mark.parametrize("pipelining", [False, True], ids=["one by one", "in groups"])
async def test_lmtp_gets_an_answer_for_each_recipient(tmp_path: Path, chunking: bool, pipelining: bool) -> None:
    words = {"lmtp": True, "recipients": 3, "messages": 4, "chunking": chunking, "pipelining": pipelining}
    async with running(tmp_path, f'{LISTENER}kind = "lmtp"\n') as server:
        counts = await run(server.port, **words)
    assert is_clean(counts, 4)
    assert counts.phases["dot"].count == 12
    assert {record["recipients"] for record in server.events("accepted")} == {3}


async def test_refusals_are_counted_by_phase_and_code(tmp_path: Path) -> None:
    async with running(tmp_path, f'domains = ["example.org"]\n{LISTENER}') as server:
        counts = await run(server.port)
        assert (counts.accepted, counts.refused) == (0, 40)
        assert counts.replies.get(("rcpt", 554), 0) + counts.replies.get(("rcpt", 550), 0) == 40
        counts = await run(server.port, pipelining=True)
        assert (counts.accepted, counts.refused) == (0, 40)
        counts = await run(server.port, pipelining=True, chunking=True)
        assert (counts.accepted, counts.refused, dict(counts.errors)) == (0, 40, {})
        assert counts.replies["mail", 250] == counts.replies["rset", 250] == 40
        counts = await run(server.port, to=["bob@example.org"])
        assert is_clean(counts)


@pytest.mark.parametrize("pipelining", [False, True])
async def test_no_text_is_sent_before_a_recipient_is_accepted(pipelining: bool) -> None:
    received: list[bytes] = []

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 hello\r\n")
        buffer = b""
        while data := await stream.receive_some(65_536):
            received.append(data)
            buffer += data
            while b"\r\n" in buffer:
                line, _, buffer = buffer.partition(b"\r\n")
                reply = b"550 5.1.1 no\r\n" if line.startswith(b"RCPT") else b"250 ok\r\n"
                if line.startswith(b"EHLO"):
                    reply = b"250-me\r\n250-PIPELINING\r\n250 CHUNKING\r\n"
                await stream.send_all(b"221 bye\r\n" if line == b"QUIT" else reply)

    counts = await against(handler, sessions=1, messages=3, chunking=True, pipelining=pipelining)
    assert (counts.refused, counts.failed, dict(counts.errors)) == (3, 3, {})
    assert b"BDAT" not in b"".join(received)


async def test_a_duration_ends_the_run(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        counts = await run(server.port, messages=None, duration=0.1)
    assert counts.accepted == counts.attempted


class Names(trio.abc.HostnameResolver):
    """Knows one name, and its addresses."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, host: Any, port: Any, family: int = 0, *_: Any) -> Any:
        if host != b"mx.example.org":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        await trio.lowlevel.checkpoint()
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in self._addresses
        ]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


async def test_a_name_is_its_first_address_that_takes_a_connection(tmp_path: Path) -> None:
    trio.socket.set_custom_hostname_resolver(Names("127.0.0.2", "127.0.0.1"))
    async with running(tmp_path) as server:
        plan = Plan(targets=[Target("mx.example.org", server.port)], messages=4, sessions=2)
        counts = await Generator(plan).run()
    assert is_clean(counts, 4), counts.as_report()
    assert len(server.events("connected")) == 4, "the last address need not be tried"


async def test_a_certificate_is_checked_against_the_name_that_was_given(tmp_path: Path) -> None:
    trio.socket.set_custom_hostname_resolver(Names("127.0.0.1"))
    async with running(tmp_path, TLS) as server:
        plan = Plan(
            targets=[Target("mx.example.org", server.port)], messages=1, tls="starttls", ca_file=tmp_path / "tls/ca.pem"
        )
        assert is_clean(await Generator(plan).run(), 1)


async def test_a_name_without_an_address_is_an_error_before_the_run() -> None:
    trio.socket.set_custom_hostname_resolver(Names("::1"))
    for host, words in (("nobody.example", {}), ("mx.example.org", {"sources": ["127.0.0.1"]})):
        generator = Generator(Plan(targets=[Target(host, 25)], messages=1, **words))  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=f"{host} has no address"):
            await generator.run()


async def test_a_target_that_is_not_there_ends_the_run_with_an_error() -> None:
    counts = await run(free_port(), sessions=1)
    assert counts.accepted == 0
    assert set(counts.errors) <= {"connect refused", "reset"}


# ---- servers that misbehave

Handler = Callable[[trio.SocketStream], Awaitable[None]]


async def against(handler: Handler, **words: Any) -> Counts:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        counts = await run(listeners[0].socket.getsockname()[1], **words)
        nursery.cancel_scope.cancel()
    return counts


async def no_wait(_: bytes) -> None:
    """Let `serve_simply` answer at once."""


async def serve_simply(stream: trio.abc.Stream, before: Callable[[bytes], Awaitable[None]]) -> None:
    """Be a server that accepts everything; `before` is awaited before each answer."""
    await stream.send_all(b"220 simple\r\n")
    in_text, buffer = False, b""
    try:
        while data := await stream.receive_some(65_536):
            buffer += data
            while b"\r\n" in buffer:
                line, _, buffer = buffer.partition(b"\r\n")
                if in_text and line != b".":
                    continue
                verb = b"." if in_text else line[:4].upper()
                in_text = verb == b"DATA"
                await before(verb)
                await stream.send_all(
                    b"354 go on\r\n" if in_text else b"250 ok\r\n" if verb != b"QUIT" else b"221 bye\r\n"
                )
    except trio.BrokenResourceError:
        return


async def test_what_waits_behind_a_stall_is_charged_with_it() -> None:
    """No coordinated omission: one stalled answer delays all the messages that were to start meanwhile."""
    stalled = [False]

    async def stall_once(verb: bytes) -> None:
        if verb == b"." and not stalled[0]:
            stalled[0] = True
            await trio.sleep(0.2)

    async def handler(stream: trio.SocketStream) -> None:
        await serve_simply(stream, stall_once)

    counts = await against(handler, sessions=1, rate=1000.0, messages=300)
    assert counts.accepted == 300
    assert counts.late > 0
    assert counts.phases["late_start"].count == 300
    assert counts.phases["late_start"].max >= 100e6
    charged = sum(count for low, _, count in counts.phases["message"].buckets() if low >= 99e6)
    assert charged >= 100, (
        "the messages of the first 100 ms waited for at least 100 ms, though only one was answered late"
    )


async def test_what_was_to_start_before_the_end_starts_however_late() -> None:
    """A server that stalls at the end of a run is charged for the messages it kept from starting."""
    stalled = [False]

    async def stall_once(verb: bytes) -> None:
        if verb == b"." and not stalled[0]:
            stalled[0] = True
            await trio.sleep(0.4)

    async def handler(stream: trio.SocketStream) -> None:
        await serve_simply(stream, stall_once)

    counts = await against(handler, sessions=1, rate=200.0, messages=None, duration=0.3)
    assert counts.accepted == counts.attempted == 60
    assert counts.phases["message"].max >= 100e6


async def test_a_server_that_says_nothing_times_out() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)

    counts = await against(silent, sessions=1, messages=1, timeout=0.1)
    assert "timeout" in counts.errors


async def test_a_server_that_hangs_up_in_the_middle_loses_the_message() -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        async def before(verb: bytes) -> None:
            if verb == b"DATA":
                await stream.aclose()

        with_end = serve_simply(stream, before)
        try:
            await with_end
        except trio.ClosedResourceError:
            return

    counts = await against(hang_up, sessions=1, messages=3)
    assert counts.accepted == 0
    assert counts.lost == counts.attempted > 0
    assert set(counts.errors) <= {"closed", "reset"}


class FullListener:
    """A listener without room for another connection: the kernel drops what knocks, as on a slow way there."""

    def __init__(self) -> None:
        self._listener = trio.socket.socket()
        self._fillers: list[trio.socket.SocketType] = []

    async def __aenter__(self) -> FullListener:
        await self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port: int = self._listener.getsockname()[1]
        filler = trio.socket.socket()
        await filler.connect(("127.0.0.1", self.port))
        self._fillers.append(filler)
        return self

    async def accept(self) -> trio.SocketStream:
        """Make room, and return the connection that was kept out."""
        self._fillers.append((await self._listener.accept())[0])
        return trio.SocketStream((await self._listener.accept())[0])

    async def __aexit__(self, *_: object) -> None:
        for sock in (self._listener, *self._fillers):
            sock.close()


async def test_a_server_that_is_not_reached_times_out() -> None:
    async with FullListener() as server:
        counts = await run(server.port, sessions=1, messages=1, timeout=0.1)
    assert set(counts.errors) == {"connect timeout"}
    assert counts.phases["connect"].count == counts.phases["session"].count == 0


@pytest.mark.parametrize("tls", ["none", "implicit"])
async def test_a_slow_connection_is_told_apart_from_a_slow_greeting(tmp_path: Path, tls: str) -> None:
    async with FullListener() as server, trio.open_nursery() as nursery:
        generator = Generator(Plan(targets=[Target("127.0.0.1", server.port)], sessions=1, messages=1, tls=tls))  # type: ignore[arg-type]
        nursery.start_soon(generator.run)
        while generator.counts.connections == 0:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        stream: trio.abc.Stream = await server.accept()  # the kernel knocks again after a second
        if tls == "implicit":
            certificate = generated_certificate(tmp_path, ["localhost"]).certificate
            context = server_context(TlsSettings(mode="implicit"), certificate)
            stream = trio.SSLStream(stream, context, server_side=True)
        async with stream:
            await serve_simply(stream, no_wait)
    counts = generator.counts
    assert is_clean(counts, 1), counts.as_report()
    connect, greeting, session = (counts.phases[phase] for phase in ("connect", "greeting", "session"))
    assert (connect.count, greeting.count, session.count) == (1, 1, 1)
    assert connect.max >= 0.9e9
    assert connect.max + greeting.max <= session.max, "no time is in both"


@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (b"421 too busy\r\n", "refused"),
        (b"SSH-2.0 hello\r\n", "protocol"),
        (b"abc hello\r\n", "protocol"),
        (b"+12 hello\r\n", "protocol"),
        (b"999 hello\r\n", "protocol"),
        (b"354 hello\r\n", "protocol"),
        (b"", "closed"),
    ],
)
async def test_a_server_that_does_not_greet_is_told_apart(greeting: bytes, kind: str) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        await stream.send_eof()
        await stream.receive_some(100)

    counts = await against(handler, sessions=1, messages=2)
    assert set(counts.errors) == {kind}


@pytest.mark.parametrize(
    ("command", "answer"),
    [(b"RCPT", b"354 go\r\n"), (b"DATA", b"250 ok\r\n"), (b".", b"-12 ok\r\n"), (b".", b"100 ok\r\n")],
)
async def test_an_answer_that_does_not_fit_is_no_acceptance(command: bytes, answer: bytes) -> None:
    """RFC 5321 4.3.2: which answers a command has; whoever hears another does not know where the two are."""

    async def handler(stream: trio.SocketStream) -> None:
        async def before(verb: bytes) -> None:
            if verb == command:
                await stream.send_all(answer)

        await serve_simply(stream, before)

    counts = await against(handler, sessions=1, messages=1)
    assert set(counts.errors) == {"protocol"}
    assert (counts.accepted, counts.lost) == (0, 1)


@pytest.mark.parametrize("command", [b"MAIL", b"RCPT", b"DATA", b"."])
async def test_421_is_an_answer_and_the_end_of_the_connection(command: bytes) -> None:
    """RFC 5321 3.8: the message was answered; the next one has a connection of its own."""
    left = [1]

    async def handler(stream: trio.SocketStream) -> None:
        async def before(verb: bytes) -> None:
            if verb == command and left[0]:
                left[0] -= 1
                await stream.send_all(b"421 4.3.2 Closing\r\n")
                await stream.aclose()

        with suppress(trio.ClosedResourceError):
            await serve_simply(stream, before)

    counts = await against(handler, sessions=1, messages=4)
    assert (counts.accepted, counts.refused, counts.lost, counts.unsent) == (3, 1, 0, 0)
    assert counts.connections == 2


async def test_what_is_said_between_starttls_and_tls_is_no_answer() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 hello\r\n")
        await stream.receive_some(100)
        await stream.send_all(b"250-me\r\n250 STARTTLS\r\n")
        await stream.receive_some(100)
        await stream.send_all(b"220 go on\r\n250-injected")
        await stream.receive_some(1000)

    counts = await against(handler, sessions=1, messages=1, tls="starttls")
    assert set(counts.errors) == {"protocol"}


async def test_a_target_that_is_gone_keeps_no_message(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        targets = [Target("127.0.0.1", server.port), Target("127.0.0.1", free_port())]
        plan = Plan(targets=targets, messages=40, sessions=4, per_connection=0)
        with trio.fail_after(60):
            counts = await Generator(plan).run()
    assert (counts.accepted, counts.failed) == (40, 0)


async def test_messages_that_were_not_begun_have_failed() -> None:
    with trio.fail_after(60):
        counts = await run(free_port(), sessions=1)
    assert (counts.accepted, counts.unsent, counts.has_given_up) == (0, 40, True)


async def test_answers_in_pieces_and_of_many_lines_are_understood() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        pieces = [b"220-one\r\n220 two\r\n", b"250-a\r\n2", b"50-SIZE 100", b"0\r\n250 PIPELINING\r\n"]
        await stream.send_all(pieces[0])
        await stream.receive_some(100)
        for piece in pieces[1:]:
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        while data := await stream.receive_some(65_536):
            if data.startswith(b"MAIL"):
                await stream.send_all(b"250 o")
                await trio.testing.wait_all_tasks_blocked()
                await stream.send_all(b"k\r\n250 ok\r\n354 go\r\n")
            elif data.startswith(b"QUIT"):
                await stream.send_all(b"221 bye\r\n")
            elif data.endswith(b"\r\n.\r\n"):
                await stream.send_all(b"250-taken\r\n250 really\r\n")

    counts = await against(handler, sessions=1, messages=3, pipelining=True)
    assert is_clean(counts, 3), counts.as_report()


async def test_what_the_server_does_not_offer_is_not_used() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        async def before(_: bytes) -> None:
            await trio.lowlevel.checkpoint()

        await serve_simply(stream, before)

    counts = await against(handler, sessions=1, chunking=True, messages=1)
    assert set(counts.errors) == {"not offered"}


async def test_a_stopped_run_ends_with_what_is_under_way(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        plan = Plan(targets=[Target("127.0.0.1", server.port)], messages=1_000_000, per_connection=0)
        generator = Generator(plan)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generator.run)
            while generator.counts.accepted < 10:
                await trio.lowlevel.checkpoint()
            generator.stop()
    assert generator.counts.accepted == generator.counts.attempted == len(server.events("accepted"))
    assert generator.counts.failed == generator.counts.unsent == 1_000_000 - generator.counts.attempted


async def test_think_time_separates_the_messages_of_a_session(tmp_path: Path) -> None:
    for per_connection in (0, 1):
        async with running(tmp_path / str(per_connection)) as server:
            counts = await run(server.port, messages=4, sessions=1, think=0.05, per_connection=per_connection)
        assert is_clean(counts, 4), counts.as_report()
        assert counts.elapsed >= 0.15 + counts.phases["message"].mean * 4 / 1e9, "it is in no latency"


async def test_a_stop_ends_the_think_time(tmp_path: Path) -> None:
    async with running(tmp_path) as server, trio.open_nursery() as nursery:
        target = Target("127.0.0.1", server.port)
        generator = Generator(Plan(targets=[target], duration=1000.0, sessions=4, think=1000.0, per_connection=0))
        nursery.start_soon(generator.run)
        while generator.counts.accepted < 4:
            await trio.lowlevel.checkpoint()
        generator.stop()
    assert is_clean(generator.counts, 4)


async def test_a_stop_in_the_think_time_waits_for_the_reply_to_quit(mock_clock: trio.testing.MockClock) -> None:
    has_quit, may_reply = trio.Event(), trio.Event()

    async def before(verb: bytes) -> None:
        if verb == b"QUIT":
            has_quit.set()
            await may_reply.wait()

    async def handler(stream: trio.SocketStream) -> None:
        await serve_simply(stream, before)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        target = Target("127.0.0.1", listeners[0].socket.getsockname()[1])
        generator = Generator(Plan(targets=[target], duration=1000.0, sessions=1, think=5.0, per_connection=0))
        async with trio.open_nursery() as running_nursery:
            running_nursery.start_soon(generator.run)
            while not generator.counts.accepted:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            generator.stop()
            await has_quit.wait()
            mock_clock.jump(5)
            await trio.testing.wait_all_tasks_blocked()
            may_reply.set()
        nursery.cancel_scope.cancel()
    assert is_clean(generator.counts, 1)


async def test_the_warm_up_is_counted_apart(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with running(tmp_path) as server, trio.open_nursery() as nursery:
        target = Target("127.0.0.1", server.port)
        generator = Generator(Plan(targets=[target], duration=2.0, warm_up=1.0, per_connection=0))
        nursery.start_soon(generator.run)
        while generator.counts.accepted < 10:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(1)
        while generator.warm_up is None or generator.counts.accepted < 10:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(1)
    counts, warm_up = generator.counts, generator.warm_up
    assert min(counts.accepted, warm_up.accepted) >= 10
    assert warm_up.accepted + counts.accepted == len(server.events("accepted"))
    assert counts.attempted == counts.accepted == counts.phases["message"].count
    assert counts.unsent == counts.failed == 0


async def test_counts_of_several_processes_add_up_exactly(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        parts = [await run(server.port, sessions=3, workers=3, worker=worker, messages=41) for worker in range(3)]
    whole = Counts()
    for part in parts:
        whole.add(part.as_report())
    assert [part.accepted for part in parts] == [14, 14, 13]
    assert is_clean(whole, 41)
    for phase, histogram in whole.phases.items():
        assert histogram.count == sum(part.phases[phase].count for part in parts)
        assert histogram.max == max(part.phases[phase].max for part in parts)
    assert whole.replies["dot", 250] == 41
