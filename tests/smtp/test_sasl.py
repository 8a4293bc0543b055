"""SASL exchanges: what each message leads to, and that nothing leads past a failure."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import scramp
from hypothesis import given
from hypothesis import strategies as st

from penstock.smtp.sasl import (
    MECHANISMS,
    Challenge,
    ChannelBinding,
    Exchange,
    Failure,
    ScramKeys,
    Step,
    Success,
    VerifyPassword,
    decode_response,
    start_exchange,
)
from tests.steps import steps_of

BINDING = ChannelBinding("tls-server-end-point", bytes(range(32)))
OTHER_BINDING = ChannelBinding("tls-server-end-point", bytes(32))
_MADE = scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info("pencil", iteration_count=4096, salt=b"0123456789abcdef")
PENCIL = ScramKeys(*_MADE)


def pencil_for_all(name: str) -> ScramKeys:
    return PENCIL


def begin(mechanism: str, binding: ChannelBinding | None = BINDING) -> Exchange:
    return start_exchange(mechanism, scram_keys=pencil_for_all, binding=binding)


def challenge_of(step: Step) -> bytes:
    assert isinstance(step, Challenge), step
    return step.data


def code_of(step: Step) -> int:
    assert isinstance(step, Failure), step
    assert step.cause
    return step.reply.code


def client(
    mechanism: str, password: str = "pencil", binding: ChannelBinding | None = BINDING, name: str = "alice"
) -> Any:
    return scramp.ScramClient(
        [mechanism], name, password, channel_binding=binding if mechanism.endswith("-PLUS") else None
    )


def converse(exchange: Exchange, peer: Any) -> Step:
    """Play SCRAM up to the step that answers the client's proof."""
    first = exchange.start(peer.get_client_first().encode())
    peer.set_server_first(challenge_of(first).decode())
    return exchange.respond(peer.get_client_final().encode())


# ---- which exchange


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_exchange_has_its_mechanism(mechanism: str) -> None:
    assert begin(mechanism).mechanism == mechanism
    assert begin(mechanism).name == ""


def test_an_unknown_mechanism_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        begin("CRAM-MD5")


def test_plus_without_a_binding_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        begin("SCRAM-SHA-256-PLUS", None)


# ---- base64


@pytest.mark.parametrize(
    ("line", "data"),
    [
        (b"YWxpY2U=", b"alice"),
        (b"YWxpY2U= \t ", b"alice"),
        (b"", b""),
        (b" ", b""),
        (b" YWxpY2U=", None),
        (b"YWxp Y2U=", None),
        (b"YWxpY2U", None),
        (b"*", None),
        (b"YWxpY2U=\r", None),
    ],
)
def test_lines_are_strict_base64_with_blanks_at_the_end(line: bytes, data: bytes | None) -> None:
    assert decode_response(line) == data


# ---- PLAIN


def test_plain_with_an_initial_response_verifies_the_password() -> None:
    assert begin("PLAIN").start(b"\0alice\0secret") == VerifyPassword("", "alice", "secret")


def test_plain_without_an_initial_response_prompts_with_nothing() -> None:
    exchange = begin("PLAIN")
    assert exchange.start(None) == Challenge(b"")
    assert exchange.respond(b"\0alice\0secret") == VerifyPassword("", "alice", "secret")


def test_plain_may_act_for_oneself() -> None:
    assert begin("PLAIN").start(b"alice\0alice\0secret") == VerifyPassword("alice", "alice", "secret")


def test_plain_refuses_another_authorization_identity() -> None:
    assert code_of(begin("PLAIN").start(b"bob\0alice\0secret")) == 535


def test_plain_takes_utf_8() -> None:
    assert begin("PLAIN").start("\0jürgen\0größe".encode()) == VerifyPassword("", "jürgen", "größe")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"alice",
        b"\0alice",
        b"\0alice\0sec\0ret",
        b"\0\0secret",
        b"\0alice\0",
        b"\0al\xffice\0secret",
        b"\0alice\0\xc3",
        b"\0" + b"a" * 256 + b"\0secret",
        b"\0alice\0" + b"s" * 1025,
    ],
)
def test_plain_that_cannot_be_read_is_a_mistake_and_no_guess(message: bytes) -> None:
    assert code_of(begin("PLAIN").start(message)) == 501


def test_names_and_passwords_may_be_as_long_as_they_may_be() -> None:
    step = begin("PLAIN").start(b"\0" + b"a" * 255 + b"\0" + b"s" * 1024)
    assert step == VerifyPassword("", "a" * 255, "s" * 1024)


# ---- LOGIN


def test_login_prompts_for_the_name_and_the_password() -> None:
    exchange = begin("LOGIN")
    assert exchange.start(None) == Challenge(b"Username:")
    assert exchange.respond(b"alice") == Challenge(b"Password:")
    assert exchange.respond(b"secret") == VerifyPassword("", "alice", "secret")


def test_login_takes_an_initial_response_as_the_name() -> None:
    exchange = begin("LOGIN")
    assert exchange.start(b"alice") == Challenge(b"Password:")
    assert exchange.respond(b"secret") == VerifyPassword("", "alice", "secret")


@pytest.mark.parametrize("name", [b"", b"a\0b", b"\xff", b"a" * 256])
def test_login_asks_no_password_of_a_name_that_cannot_be_read(name: bytes) -> None:
    assert code_of(begin("LOGIN").start(name)) == 501


@pytest.mark.parametrize("password", [b"", b"a\0b", b"\xff", b"a" * 1025])
def test_login_refuses_a_password_that_cannot_be_read(password: bytes) -> None:
    exchange = begin("LOGIN")
    exchange.start(b"alice")
    assert code_of(exchange.respond(password)) == 501


# ---- SCRAM


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])
def test_scram_proves_the_client_and_the_server(mechanism: str) -> None:
    exchange, peer = begin(mechanism), client(mechanism)
    final = challenge_of(converse(exchange, peer))
    peer.set_server_final(final.decode())  # raises when the server has not proved itself
    assert exchange.respond(b"") == Success("alice", "")


def test_scram_follows_the_example_of_rfc_7677(monkeypatch: pytest.MonkeyPatch) -> None:
    nonce = scramp.core.Nonce("%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    monkeypatch.setattr(scramp.core.Nonce, "create", lambda: nonce)
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    keys = ScramKeys(*scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info("pencil", salt=salt))
    exchange = start_exchange("SCRAM-SHA-256", scram_keys=lambda name: keys, binding=None)
    assert exchange.start(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO") == Challenge(
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    proof = (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    assert exchange.respond(proof) == Challenge(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    assert exchange.respond(b"") == Success("user", "")


def test_scram_without_an_initial_response_prompts_with_nothing() -> None:
    exchange, peer = begin("SCRAM-SHA-256"), client("SCRAM-SHA-256")
    assert exchange.start(None) == Challenge(b"")
    peer.set_server_first(challenge_of(exchange.respond(peer.get_client_first().encode())).decode())
    challenge_of(exchange.respond(peer.get_client_final().encode()))
    assert exchange.respond(b"") == Success("alice", "")


def test_scram_with_a_wrong_password_is_535_and_stays_refused() -> None:
    exchange = begin("SCRAM-SHA-256")
    assert code_of(converse(exchange, client("SCRAM-SHA-256", "wrong"))) == 535
    assert code_of(exchange.respond(b"")) == 501


def test_scram_that_could_not_be_read_never_succeeds_later() -> None:
    exchange = begin("SCRAM-SHA-256")
    assert [code_of(exchange.respond(data)) for data in (b"garbage", b"garbage", b"", b"")] == [501] * 4


def test_scram_lets_nothing_but_silence_follow_its_last_message() -> None:
    exchange = begin("SCRAM-SHA-256")
    challenge_of(converse(exchange, client("SCRAM-SHA-256")))
    assert code_of(exchange.respond(b"v=more")) == 501
    assert code_of(exchange.respond(b"")) == 501


def test_scram_succeeds_once() -> None:
    exchange = begin("SCRAM-SHA-256")
    challenge_of(converse(exchange, client("SCRAM-SHA-256")))
    assert isinstance(exchange.respond(b""), Success)
    assert code_of(exchange.respond(b"")) == 501


def test_scram_plus_over_another_tls_is_a_wrong_proof() -> None:
    step = converse(begin("SCRAM-SHA-256-PLUS"), client("SCRAM-SHA-256-PLUS", binding=OTHER_BINDING))
    assert code_of(step) == 535


def test_scram_plus_takes_no_client_that_binds_nothing() -> None:
    assert code_of(begin("SCRAM-SHA-256-PLUS").start(b"n,,n=alice,r=abc")) == 535


def test_scram_plus_takes_no_binding_of_another_kind() -> None:
    assert code_of(begin("SCRAM-SHA-256-PLUS").start(b"p=tls-unique,,n=alice,r=abc")) == 501


def test_a_downgrade_from_plus_is_detected() -> None:
    assert code_of(begin("SCRAM-SHA-256").start(b"y,,n=alice,r=abc")) == 535  # RFC 5802 6


def test_a_client_that_could_bind_is_welcome_where_plus_is_not_offered() -> None:
    challenge_of(begin("SCRAM-SHA-256", None).start(b"y,,n=alice,r=abc"))


@pytest.mark.parametrize("authzid", [b"a=bob", b"a=alice"])
def test_scram_refuses_an_authorization_identity(authzid: bytes) -> None:
    assert code_of(begin("SCRAM-SHA-256").start(b"n," + authzid + b",n=alice,r=abc")) == 535


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"n,,",
        b"n,,n=alice",
        b"n,,r=abc,n=alice",
        b"n,,n=,r=abc",
        b"n,,n=al\0ice,r=abc",
        b"n,,n=a=b,r=abc",
        b"x,,n=alice,r=abc",
        b"n,,m=ext,n=alice,r=abc",
        b"n,,n=alice,r=\xff",
        "n,,n=\u0627a,r=abc".encode(),  # SASLprep: letters of both directions
    ],
)
def test_scram_that_cannot_be_read_is_a_mistake_and_no_guess(message: bytes) -> None:
    assert code_of(begin("SCRAM-SHA-256").start(message)) == 501


def test_scram_asks_for_the_name_without_its_escapes() -> None:
    asked = []

    def look_up(name: str) -> ScramKeys:
        asked.append(name)
        return PENCIL

    start_exchange("SCRAM-SHA-256", scram_keys=look_up, binding=None).start(b"n,,n=a=2Cb=3Dc,r=abc")
    assert asked == ["a,b=c"]


# One letter that SASLprep writes as 18: the octets on the wire are few, those to look up are not.
@pytest.mark.parametrize("name", ["a" * 256, "\ufdfa" * 16])
def test_scram_looks_up_no_name_that_is_too_long(name: str) -> None:
    def look_up(name: str) -> ScramKeys:
        raise AssertionError(name)

    exchange = start_exchange("SCRAM-SHA-256", scram_keys=look_up, binding=None)
    step = exchange.start(f"n,,n={name},r=abc".encode())
    assert code_of(step) == 501
    assert isinstance(step, Failure) and step.cause == "the name is too long"


@pytest.mark.parametrize("length", [256, 9000, 1_000_000])
def test_scram_checks_lengths_before_saslprep(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(text: str) -> str:
        raise AssertionError(len(text))

    monkeypatch.setattr(scramp.core, "saslprep", prepare)
    for message in ("n,,n=" + "a" * length + ",r=abc", "n,,x=y,n=" + "é" * length, "n,,n=" + "=2C" * length + ",r=a"):
        assert code_of(begin("SCRAM-SHA-256").start(message.encode())) == 501


def test_scram_accepts_a_name_of_255_octets_with_escapes() -> None:
    challenge_of(begin("SCRAM-SHA-256").start(b"n,,n=" + b"=2C" * 255 + b",r=abc"))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("repeated", [b"a", b"\0", b",", b"n=a,", b"=2C", "é".encode(), b"x=y,", b"p="])
def test_twice_the_message_costs_at_most_twice_the_steps(mechanism: str, repeated: bytes) -> None:
    def steps(times: int) -> int:
        return steps_of(lambda: begin(mechanism).start(b"n,,n=" + repeated * times))

    steps(1)
    assert steps(400) <= 2 * steps(200) + 100
    assert steps(100_000) <= steps(1) + 100


def test_scram_whose_keys_cannot_be_looked_up_is_a_temporary_failure() -> None:
    def look_up(name: str) -> ScramKeys:
        raise OSError("the disk is on fire")

    step = start_exchange("SCRAM-SHA-256", scram_keys=look_up, binding=None).start(b"n,,n=alice,r=abc")
    assert code_of(step) == 454
    assert isinstance(step, Failure) and "the disk is on fire" in step.cause
    assert "disk" not in step.reply.text


# ---- all of them


@pytest.mark.parametrize(("mechanism", "messages"), [("PLAIN", [b"\0alice\0secret"]), ("LOGIN", [b"alice", b"secret"])])
def test_a_question_ends_an_exchange(mechanism: str, messages: list[bytes]) -> None:
    exchange = begin(mechanism)
    steps = [exchange.respond(message) for message in messages]
    assert isinstance(steps[-1], VerifyPassword)
    assert [code_of(exchange.respond(message)) for message in messages] == [501] * len(messages)


OCTETS = st.binary(max_size=60) | st.text(alphabet="npycrv=,a\0-é\ufdfa", max_size=30).map(str.encode)


@given(mechanism=st.sampled_from(MECHANISMS), initial=st.none() | OCTETS, messages=st.lists(OCTETS, max_size=5))
def test_random_octets_raise_nothing_and_authenticate_no_client(
    mechanism: str, initial: bytes | None, messages: list[bytes]
) -> None:
    exchange = begin(mechanism)
    steps = [exchange.start(initial), *(exchange.respond(message) for message in messages)]
    assert not any(isinstance(step, Success) for step in steps)
    ends = [number for number, step in enumerate(steps) if not isinstance(step, Challenge)]
    if ends:
        assert all(isinstance(step, Failure) for step in steps[ends[0] + 1 :])


@given(
    damage=st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)),
    mechanism=st.sampled_from(["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]),
)
def test_a_scram_message_that_was_changed_on_the_way_proves_nothing(
    damage: tuple[int, float, int, bytes], mechanism: str
) -> None:
    which, where, gone, new = damage

    def changed(number: int, message: bytes) -> bytes:
        at = int(where * len(message))
        return message[:at] + new + message[at + gone :] if number == which else message

    exchange, peer = begin(mechanism), client(mechanism)
    first = peer.get_client_first().encode()
    step = exchange.start(changed(0, first))
    was_changed = changed(0, first) != first
    if isinstance(step, Challenge):
        try:
            peer.set_server_first(step.data.decode())
        except scramp.ScramException:  # the nonce is not the client's any more
            return
        final = peer.get_client_final().encode()
        was_changed |= changed(1, final) != final
        exchange.respond(changed(1, final))
        step = exchange.respond(b"")
    assert isinstance(step, Failure if was_changed else Success)
