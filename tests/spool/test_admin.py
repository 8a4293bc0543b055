"""Administration of the spool, with and without a running server."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.message import Body
from penstock.spool import admin as admin_module
from penstock.spool.admin import Filter, QueueAdmin
from penstock.spool.admins import QueueAdmins
from penstock.spool.entry import HopState, Outcome
from penstock.spool.store import SpoolError
from tests.contracts.delivery import make_message
from tests.spool.test_spool import NOW, opened, settled, take_all


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a relay: no test here runs one."""
    monkeypatch.setattr(admin_module, "_ANSWER_WAIT", 0)


async def fill(folder: Path) -> list[str]:
    """Put three messages: one due, one deferred, one to two recipients of which one is being attempted."""
    ids = []
    async with opened(folder) as spool:
        for recipients, sender in (
            (("a@x.org",), "s@example.com"),
            (("b@y.org",), ""),
            (("c@x.org", "d@z.org"), "s@o"),
        ):
            message = make_message(b"Subject: one\r\n\r\nbody\r\n", recipients=recipients, sender=sender)
            ids.append(str(message.id))
            await spool.put(message, [to.partition("@")[2] for to in recipients])
        (entry,) = await spool.take("y.org", NOW, 10, 1 << 20)
        await spool.record(settled(entry, Outcome.DEFERRED, "451 not now", NOW + 100))
        await spool.take("z.org", NOW, 10, 1 << 20)
    return ids


def found(folder: Path, **what: object) -> list[str]:
    with QueueAdmin.opened(folder, lambda: NOW) as admin:
        return [to.address for message in admin.find(Filter(**what), 0) for to in message.recipients]  # type: ignore[arg-type]


async def test_filters_find_what_they_say(tmp_path: Path) -> None:
    ids = await fill(tmp_path)
    assert found(tmp_path) == ["a@x.org", "b@y.org", "c@x.org", "d@z.org"]
    assert found(tmp_path, ids=(ids[0], ids[2])) == ["a@x.org", "c@x.org", "d@z.org"]
    assert found(tmp_path, sender="S@EXAMPLE.*") == ["a@x.org"]
    assert found(tmp_path, sender="<>") == ["b@y.org"]
    assert found(tmp_path, recipient="?@x.org") == ["a@x.org", "c@x.org"]
    assert found(tmp_path, domain="X.org") == ["a@x.org", "c@x.org"]
    assert found(tmp_path, state="attempting") == ["d@z.org"]
    assert found(tmp_path, older=NOW + 1) == []
    assert found(tmp_path, newer=NOW + 1) == ["a@x.org", "b@y.org", "c@x.org", "d@z.org"]


async def test_a_limit_counts_messages(tmp_path: Path) -> None:
    await fill(tmp_path)
    with QueueAdmin.opened(tmp_path) as admin:
        assert len(list(admin.find(Filter(), 2))) == 2
        assert len(list(admin.find(Filter(), 3))) == 3


async def test_retried_recipients_are_due_for_a_server_that_runs(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with opened(tmp_path) as spool:
        assert {entry.queue for entry in await take_all(spool)} == {"x.org", "z.org"}
        with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
            assert admin.retry(Filter(domain="y.org")).changed == 1
            assert admin.retry(Filter(domain="x.org")).changed == 0, "what is being attempted is left alone"
        assert [entry.queue for entry in await take_all(spool)] == ["y.org"]


async def test_the_server_sees_when_the_operator_asked(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with opened(tmp_path) as spool:
        assert [entry.asked_at for entry in await take_all(spool)] == [0, 0, 0]
        with QueueAdmin.opened(tmp_path, lambda: NOW - 5) as admin:
            assert admin.retry(Filter()).changed == 1
            (waiting,) = [to for message in admin.find(Filter(state="due"), 0) for to in message.recipients]
            assert waiting.due_at == NOW - 5
            assert admin.stats().due == 1
        (entry,) = await take_all(spool)
        assert entry.asked_at == NOW - 5
        await spool.record(settled(entry, Outcome.DEFERRED, "451 not now", NOW + 100))
        with QueueAdmin.opened(tmp_path, lambda: NOW + 1) as admin:
            assert (admin.hold(Filter()).changed, admin.release(Filter()).changed) == (1, 1)
        assert [entry.asked_at for entry in await take_all(spool, NOW + 1)] == [NOW + 1]


async def test_filters_know_the_case_of_all_letters(tmp_path: Path) -> None:
    addresses = ("Ö@ü.test", "ö@Ü.test", "o@x.test")
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x", recipients=addresses, sender="Å@ß.test"), ["l"] * 3)
    for word in addresses[:2]:
        assert found(tmp_path, recipient=word) == list(addresses[:2])
        assert found(tmp_path, domain=word[2:]) == list(addresses[:2])
    for sender in ("Å@ß.test", "å@*"):
        assert found(tmp_path, sender=sender) == list(addresses)
    assert found(tmp_path, domain="\u0130.test") == [], "a letter that is two when it is small"
    with QueueAdmin.opened(tmp_path) as admin:
        assert admin.hold(Filter(recipient="Ö@*")).changed == 2
        assert admin.drop(Filter(domain="Ü.test")).changed == 2


async def test_held_recipients_wait_for_their_release(tmp_path: Path) -> None:
    await fill(tmp_path)
    with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
        assert admin.hold(Filter(domain="x.org")).changed == 2
    async with opened(tmp_path) as spool:
        assert {entry.queue for entry in await take_all(spool)} == {"z.org"}
        with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
            assert admin.release(Filter(recipient="c@*")).changed == 1
        assert [str(to) for entry in await take_all(spool) for to in entry.envelope.recipients] == ["c@x.org"]
    assert found(tmp_path, state="held") == ["a@x.org"]


async def test_dropping_all_recipients_removes_message_and_file(tmp_path: Path) -> None:
    async with opened(tmp_path, body_in_file=1) as spool:
        await spool.put(make_message(b"x" * 100, recipients=("a@x", "b@y")), ["x", "y"])
    with QueueAdmin.opened(tmp_path) as admin:
        assert admin.drop(Filter(domain="x")).changed == 1
        assert [message.recipients[0].address for message in admin.find(Filter(), 0)] == ["b@y"]
        assert admin.drop(Filter()).changed == 1
        assert list(admin.find(Filter(), 0)) == []
        assert list(admin.check()) == []
    assert [path for path in (tmp_path / "bodies").rglob("*") if path.is_file()] == []


async def test_what_is_being_delivered_is_not_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"], is_taken=True)
        with QueueAdmin.opened(tmp_path) as admin:
            assert admin.drop(Filter()).changed == 0
    with QueueAdmin.opened(tmp_path) as admin:
        assert admin.drop(Filter()).changed == 1


@pytest.mark.parametrize("page", [1, 2, 3, 100])
async def test_reading_and_changing_in_slices_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(admin_module, "_PAGE", page)
    monkeypatch.setattr(admin_module, "_SLICE", page)
    monkeypatch.setattr(admin_module, "_PAUSE", 0)
    await fill(tmp_path)
    assert found(tmp_path) == ["a@x.org", "b@y.org", "c@x.org", "d@z.org"]
    async with opened(tmp_path) as spool:
        await take_all(spool)
        with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
            await spool.put(make_message(b"x", recipients=("e@x.org", "f@x.org", "g@y.org")), ["x.org"] * 2 + ["y.org"])
            assert admin.hold(Filter()).changed == 4, "and not what is being attempted"
            assert await take_all(spool) == []
            assert admin.release(Filter()).changed == 4
            assert sorted(entry.queue for entry in await take_all(spool)) == ["x.org", "y.org", "y.org"]
    with QueueAdmin.opened(tmp_path) as admin:
        assert admin.drop(Filter(domain="x.org")).changed == 4
        assert admin.drop(Filter()).changed == 3
        assert admin.stats().messages == 0


async def test_a_domain_is_no_pattern(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x", recipients=("a@[192.0.2.1]", "b@1", "c@sub.x.org")), ["l"] * 3)
    assert found(tmp_path, domain="[192.0.2.1]") == ["a@[192.0.2.1]"]
    assert found(tmp_path, domain="x.org") == []


async def put_for(folder: Path, *recipients: str) -> None:
    async with opened(folder) as spool:
        await spool.put(make_message(b"x", recipients=recipients), ["queue"] * len(recipients))


@pytest.mark.parametrize(
    "name", ["bücher.example", "BÜCHER.example", "xn--bcher-kva.example", "XN--BCHER-KVA.example."]
)
async def test_a_domain_is_meant_in_all_spellings(tmp_path: Path, name: str) -> None:
    addresses = ["a@bücher.example", "b@xn--bcher-kva.example", "c@Bücher.EXAMPLE"]
    await put_for(tmp_path, *addresses, "d@other.example", "postmaster")
    assert found(tmp_path, domain=name) == addresses
    with QueueAdmin.opened(tmp_path) as admin:
        assert admin.suspend(name)
        assert admin.suspended() == ["xn--bcher-kva.example"]
        assert admin.resume("bücher.example.")


async def test_an_address_literal_is_meant_in_all_spellings(tmp_path: Path) -> None:
    await put_for(tmp_path, "a@[IPv6:2001:db8:0::1]", "b@[192.0.2.1]")
    assert found(tmp_path, domain="[ipv6:2001:DB8::1]") == ["a@[IPv6:2001:db8:0::1]"]


async def test_json_has_no_character_that_controls_a_terminal(tmp_path: Path) -> None:
    address = "a\x7f\x9b\u2028\u202e\U000e0001\\é@x.org"
    await put_for(tmp_path / "spool", address)
    printed = CliRunner().invoke(main, ["spool", "list", "--json", "--data", str(tmp_path)]).output
    assert printed.strip().isprintable()
    assert r"a\u007f\u009b\u2028\u202e\udb40\udc01" in printed
    assert json.loads(printed)[0]["recipients"][0]["address"] == address


async def test_check_finds_what_is_inconsistent(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with opened(tmp_path, body_in_file=1) as spool:
        await spool.put(make_message(b"x" * 100), ["x"])
    with QueueAdmin.opened(tmp_path) as admin:
        assert list(admin.check()) == []
    (file,) = [path for path in (tmp_path / "bodies").rglob("*") if path.is_file()]
    file.write_bytes(b"short")
    with sqlite3.connect(tmp_path / "spool.db") as database:
        database.execute("DELETE FROM message WHERE number = 1")
        database.execute("UPDATE queue SET due_at = NULL")
    database.close()
    with QueueAdmin.opened(tmp_path) as admin:
        wrong = "\n".join(admin.check())
    assert "5 octets, expected 100" in wrong
    assert "recipients without a message: 1" in wrong
    assert "found due too late" in wrong


def test_there_has_to_be_a_spool(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="no spool in"), QueueAdmin.opened(tmp_path):
        pass


async def test_a_spool_of_version_2_is_upgraded(tmp_path: Path) -> None:
    ids = await fill(tmp_path)
    with sqlite3.connect(tmp_path / "spool.db") as database:
        for table in ("instruction", "admin_event", "suspended", "hop"):
            database.execute(f"DROP TABLE {table}")
        database.execute("ALTER TABLE queue RENAME TO lane")
        database.execute("ALTER TABLE recipient RENAME COLUMN queue TO lane")
        database.execute("DROP INDEX queue_due")
        database.execute("CREATE INDEX lane_due ON lane (due_at) WHERE due_at IS NOT NULL")
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(SpoolError, match="version 2, expected 3; start the server"), QueueAdmin.opened(tmp_path):
        pass
    async with opened(tmp_path) as spool:
        assert sorted(entry.id for entry in await take_all(spool, NOW + 100)) == sorted([*ids, ids[2]])
    with QueueAdmin.opened(tmp_path) as admin:
        assert list(admin.check()) == []


async def test_ages_are_counted_by_domain(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for minutes, to in ((0, "a@x.org"), (4, "b@x.org"), (5, "c@x.org"), (300, "a@y.org"), (9999, "b@y.org")):
            message = make_message(b"x", recipients=(to,))._replace(received_at=NOW - minutes * 60)
            await spool.put(message, [to.partition("@")[2]])
    with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
        assert admin.ages() == [
            ("x.org", [2, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            ("y.org", [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]),
        ]
        assert [each.domain for each in admin.ages(1)] == ["x.org"]


async def test_a_server_that_does_not_answer_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "_ANSWER_WAIT", 0)
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x", recipients=("a@x",)), ["x"], is_taken=True)
        with QueueAdmin.opened(tmp_path) as admin:
            assert admin.hold(Filter()) == (0, 1, 0)
            assert admin.bounce(Filter()) == (0, 1, 0)
        assert (await spool.admin_input()).instructions == []


async def test_what_is_returned_without_a_server_is_done_by_the_next(tmp_path: Path) -> None:
    ids = await fill(tmp_path / "spool")
    assert run(tmp_path, "bounce", ids[0]) == (
        "0 recipients returned to the sender\n1 recipient will be changed when the server is started\n"
    )
    async with opened(tmp_path / "spool") as spool:
        asked = await spool.admin_input()
        assert [(each.action, each.queue) for each in asked.instructions] == [("bounce", "x.org")]
        assert [(event.action, event.id, event.recipients) for event in asked.events] == [("bounce", ids[0], 1)]
        (entry,) = await spool.take_rows([each.row for each in asked.instructions])
        assert (entry.id, entry.rows[0].attempts) == (ids[0], 0)


async def test_changes_are_noted_for_the_journal(tmp_path: Path) -> None:
    ids = await fill(tmp_path)
    with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
        admin.hold(Filter(domain="x.org"))
        admin.release(Filter(ids=(ids[0],)))
        admin.retry(Filter(ids=(ids[1],)))
        admin.drop(Filter(ids=(ids[2],)))
    async with opened(tmp_path) as spool:
        assert [tuple(event) for event in (await spool.admin_input()).events] == [
            ("hold", ids[0], 1),
            ("hold", ids[2], 1),
            ("release", ids[0], 1),
            ("retry", ids[1], 1),
            ("drop", ids[2], 2),
        ]
        assert (await spool.admin_input()).events == []


async def test_events_for_the_journal_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "_MAX_EVENTS", 1)
    ids = await fill(tmp_path)
    with QueueAdmin.opened(tmp_path, lambda: NOW) as admin:
        admin.hold(Filter())
    async with opened(tmp_path) as spool:
        assert [tuple(event) for event in (await spool.admin_input()).events] == [("hold", ids[0], 1), ("hold", "", 3)]


# ---- the command


def run(folder: Path, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["spool", words[0], "--data", str(folder), *words[1:]])
    assert result.exit_code == code, result.output
    return result.output


async def test_the_command_line_shows_and_changes(tmp_path: Path) -> None:
    ids = await fill(tmp_path / "spool")
    assert "<b@y.org> due, 1 attempts" in run(tmp_path, "list")
    listed = json.loads(run(tmp_path, "list", "--json", "--state", "attempting"))
    assert [message["id"] for message in listed] == [ids[2]]
    assert listed[0]["recipients"][0]["address"] == "d@z.org"
    assert "Subject: one" in run(tmp_path, "show", ids[0])
    assert run(tmp_path, "show", ids[0], "--body") == "Received: by test\nSubject: one\n\nbody\n"
    assert json.loads(run(tmp_path, "show", ids[1], "--json"))["header"][1] == ["Subject", "one"]
    assert run(tmp_path, "hold", "--domain", "x.org") == "2 recipients held\n"
    assert json.loads(run(tmp_path, "stats", "--json"))["held"] == 2
    assert "held" in run(tmp_path, "stats")
    assert run(tmp_path, "release", "--all") == "2 recipients due now\n"
    assert run(tmp_path, "retry", ids[1]) == "1 recipient due now\n"
    assert "consistent" in run(tmp_path, "check")
    assert run(tmp_path, "drop", "--all", "--yes") == "4 recipients dropped\n"


@pytest.mark.parametrize("action", ["drop", "hold", "retry"])
async def test_what_was_taken_before_an_instruction_is_obeyed_is_not_changed(tmp_path: Path, action: str) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(recipients=("a@x.org", "b@y.org")), ["x.org", "y.org"])
        ((row, _, _, _),) = [each.rows[0] for each in await spool.take("x.org", NOW, 10, 1 << 20)]
        rows = [row, row + 1]  # both were at rest when the instruction was read
        with sqlite3.connect(tmp_path / "spool.db") as database:
            database.executemany("INSERT INTO instruction VALUES (?, ?, NULL)", [(number, action) for number in rows])
        database.close()
        await spool.carry_out(action, [], rows)

        def look(store: Any) -> list[Any]:
            execute = store._database.execute
            states = execute("SELECT number, state, due_at < 0 FROM recipient ORDER BY number").fetchall()
            answers = execute("SELECT recipient, is_done FROM instruction ORDER BY recipient").fetchall()
            return [*states, *answers]

        changed = {"drop": [], "hold": [(row + 1, 2, 0)], "retry": [(row + 1, 0, 1)]}[action]
        assert await spool._committer.do(look) == [(row, 1, 0), *changed, (row, 0), (row + 1, 1)]


async def test_a_message_delivered_while_it_is_shown_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await fill(tmp_path / "spool")
    read = QueueAdmins.text

    def read_and_lose(admins: QueueAdmins, message_id: str) -> tuple[bytes, Body]:
        found = read(admins, message_id)
        admins.drop(Filter(ids=(message_id,)))
        return found

    monkeypatch.setattr(QueueAdmins, "text", read_and_lose)
    assert f"Error: no message {ids[0]} in the spool; " in run(tmp_path, "show", ids[0], code=1)
    message = make_message(b"x" * 100)
    async with opened(tmp_path / "spool", body_in_file=1) as spool:
        await spool.put(message, ["x"])
    for words in ((), ("--body",)):
        async with opened(tmp_path / "spool", body_in_file=1) as spool:
            await spool.put(message, ["x"])
        assert f"Error: no message {message.id} in the spool; " in run(tmp_path, "show", message.id, *words, code=1)


async def test_a_header_in_utf_8_is_shown_as_it_is(tmp_path: Path) -> None:
    message = make_message("Subject: Grüße, \U0001f4e8\r\nX-Latin: ".encode() + b"\xfc\r\n\r\n")
    async with opened(tmp_path / "spool") as spool:
        await spool.put(message, ["x"])
    assert "\nSubject: Grüße, \U0001f4e8\nX-Latin: \ufffd\n" in run(tmp_path, "show", message.id)
    header = json.loads(run(tmp_path, "show", message.id, "--json"))["header"]
    assert header[1:] == [["Subject", "Grüße, \U0001f4e8"], ["X-Latin", "\ufffd"]]


@pytest.mark.parametrize("word", ["list", "show", "body", "stats", "check"])
async def test_output_errors_are_one_line_and_a_closed_pipe_none(tmp_path: Path, word: str) -> None:
    ids = await fill(tmp_path / "spool")
    words = {"show": ["show", ids[0]], "body": ["show", "--body", ids[0]]}.get(word, [word])
    command = [sys.executable, "-m", "penstock", "spool", *words, "--data", str(tmp_path)]
    reading, pipe = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    for output, said in ((pipe, b""), (full, b"Error: [Errno 28] No space left on device\n")):
        ended = await trio.run_process(command, stdout=output, capture_stderr=True, check=False)
        os.close(output)
        assert (ended.returncode, ended.stderr) == (1, said)


async def test_the_command_line_refuses_mistakes(tmp_path: Path) -> None:
    await fill(tmp_path / "spool")
    assert "or --all" in run(tmp_path, "drop", "--yes", code=2)
    assert "30s, 10m" in run(tmp_path, "list", "--older", "soon", code=2)
    assert "no message" in run(tmp_path, "show", "NOSUCH", code=1)
    for name in ("", " ", "a b", "a\nb"):
        assert "expected a domain, a host or the name of a next hop" in run(tmp_path, "suspend", name, code=2)
    assert "no spool in" in run(tmp_path / "elsewhere", "stats", code=1)
    assert "Aborted" in run(tmp_path, "drop", "--all", code=1)


@pytest.mark.parametrize("words", [["list"], ["hold"], ["retry"], ["release"], ["drop", "--yes"], ["bounce"]], ids=str)
async def test_an_unknown_id_is_an_error(tmp_path: Path, words: list[str]) -> None:
    ids = await fill(tmp_path / "spool")
    assert "no message NOSUCH in the spool" in run(tmp_path, *words, ids[0], "NOSUCH", code=1)
    assert "no message" not in run(tmp_path, "list")


async def test_the_command_line_suspends_and_resumes(tmp_path: Path) -> None:
    await fill(tmp_path / "spool")
    assert run(tmp_path, "hops") == "no next hop is down or suspended\n"
    assert run(tmp_path, "suspend", "X.org") == "X.org suspended\n"
    assert run(tmp_path, "suspend", "x.org") == "x.org was already suspended\n"
    assert run(tmp_path, "hops") == "x.org suspended\n"
    assert json.loads(run(tmp_path, "hops", "--json")) == {"down": [], "suspended": ["x.org"]}
    assert run(tmp_path, "resume", "x.org") == "x.org resumed\n"
    assert "not suspended; suspended: none" in run(tmp_path, "resume", "x.org", code=1)


async def test_the_command_line_shows_hops_that_are_down(tmp_path: Path) -> None:
    await fill(tmp_path / "spool")
    async with opened(tmp_path / "spool") as spool:
        await spool.write_hops([HopState("mx.example.org:25", 0.0, 1e12, "Connection\nrefused")])
        shown = run(tmp_path, "hops")
        assert shown.startswith("mx.example.org:25 down for")
        assert shown.endswith(r": Connection\nrefused" + "\n")
    assert run(tmp_path, "hops") == "no next hop is down or suspended\n", "no server, no state"


async def test_the_command_line_shows_ages(tmp_path: Path) -> None:
    await fill(tmp_path / "spool")
    head, total, *domains = run(tmp_path, "ages").splitlines()
    assert head.split() == ["total", "5", "10", "20", "40", "80", "160", "320", "640", "1280", "1280+"]
    assert total.split()[:2] == ["TOTAL", "4"]
    assert [line.split()[:2] for line in domains] == [["x.org", "2"], ["y.org", "1"], ["z.org", "1"]]
    assert [each["domain"] for each in json.loads(run(tmp_path, "ages", "--json", "--limit", "1"))] == ["x.org"]
