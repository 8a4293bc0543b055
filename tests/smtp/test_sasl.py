"""SASL exchanges, against scramp's client and against garbage."""

from __future__ import annotations

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
    Success,
    VerifyPassword,
    start_exchange,
)

BINDING = ChannelBinding("tls-server-end-point", b"b" * 32)
KEYS = ScramKeys(*scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info("pencil", iteration_count=4096))


def exchange(mechanism: str, binding: ChannelBinding | None = BINDING) -> Exchange:
    return start_exchange(mechanism, scram_keys=lambda _: KEYS, binding=binding)


def scram(mechanism: str, password: str, server: Exchange, binding: ChannelBinding | None) -> object:
    """Play a whole SCRAM exchange and return its last step."""
    client = scramp.ScramClient([mechanism], "user", password, channel_binding=binding)
    step: object = server.start(client.get_client_first().encode())
    if not isinstance(step, Challenge):
        return step
    client.set_server_first(step.data.decode())
    step = server.respond(client.get_client_final().encode())
    if not isinstance(step, Challenge):
        return step
    client.set_server_final(step.data.decode())
    return server.respond(b"")


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])
def test_scram_proves_a_user(mechanism: str) -> None:
    binding = BINDING if mechanism.endswith("PLUS") else None
    assert scram(mechanism, "pencil", exchange(mechanism), binding) == Success("user")


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])
def test_a_wrong_scram_password_is_535(mechanism: str) -> None:
    binding = BINDING if mechanism.endswith("PLUS") else None
    step = scram(mechanism, "pen", exchange(mechanism), binding)
    assert isinstance(step, Failure)
    assert step.reply.code == 535


def test_a_binding_to_another_channel_fails() -> None:
    step = scram("SCRAM-SHA-256-PLUS", "pencil", exchange("SCRAM-SHA-256-PLUS"), BINDING._replace(data=b"c" * 32))
    assert isinstance(step, Failure)


def test_a_client_that_was_told_there_is_no_plus_finds_out() -> None:
    # "y": the client could bind, and believes that the server can not (RFC 5802 6)
    assert isinstance(exchange("SCRAM-SHA-256").start(b"y,,n=user,r=abcdefghijkl"), Failure)


def test_scram_takes_its_first_message_after_an_empty_challenge() -> None:
    server = exchange("SCRAM-SHA-256", None)
    assert server.start(None) == Challenge(b"")
    assert isinstance(server.respond(b"n,,n=user,r=abcdefghijkl"), Challenge)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"\0tim\0tanstaaftanstaaf", VerifyPassword("tim", "tanstaaftanstaaf")),
        (b"tim\0tim\0secret", VerifyPassword("tim", "secret")),
        ("\0jürgen\0geheim".encode(), VerifyPassword("jürgen", "geheim")),
        (b"kurt\0tim\0secret", 535),
        (b"tim\0secret", 501),
        (b"\0tim\0a\0b", 501),
        (b"\0\0secret", 501),
        (b"\0tim\0", 501),
        (b"\0\xff\0secret", 501),
        (b"\0tim\0" + b"x" * 1025, 501),
        (b"\0" + b"x" * 256 + b"\0secret", 501),
    ],
)
def test_plain(message: bytes, expected: VerifyPassword | int) -> None:
    step = exchange("PLAIN").start(message)
    assert (step.reply.code if isinstance(step, Failure) else step) == expected
    prompted = exchange("PLAIN")
    assert prompted.start(None) == Challenge(b"")
    assert prompted.respond(message) == step


def test_login_asks_for_what_it_does_not_have() -> None:
    server = exchange("LOGIN")
    assert server.start(None) == Challenge(b"Username:")
    assert server.respond(b"tim") == Challenge(b"Password:")
    assert server.respond(b"secret") == VerifyPassword("tim", "secret")
    server = exchange("LOGIN")
    assert server.start(b"tim") == Challenge(b"Password:")
    assert isinstance(server.respond(b""), Failure)


def test_an_unknown_mechanism_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        exchange("CRAM-MD5")


messages = st.binary(max_size=60) | st.sampled_from(
    [
        b"n,,n=user,r=abc",
        b"p=tls-server-end-point,,n=u,r=a",
        b"c=biws,r=abc,p=AAAA",
        b"n,a=x,n=u,r=a",
        b"n,,n=,r=,",
        b",,,",
    ]
)


@given(st.sampled_from(MECHANISMS), st.lists(messages, min_size=1, max_size=4), st.booleans())
def test_no_messages_make_an_exchange_raise_or_succeed(mechanism: str, sent: list[bytes], prompted: bool) -> None:
    server = exchange(mechanism)
    step = server.start(None if prompted else sent[0])
    for message in sent[not prompted :]:
        if not isinstance(step, Challenge):
            break
        step = server.respond(message)
    assert not isinstance(step, Success)
