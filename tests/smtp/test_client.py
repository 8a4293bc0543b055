import base64
import itertools

import pytest
import scramp
from hypothesis import given
from hypothesis import strategies as st

from penstock.message import NULL_PATH, Envelope, Path, Recipient
from penstock.smtp.client import (
    AuthExchange,
    CannotSendError,
    Capabilities,
    Credentials,
    ProtocolError,
    ReplyReader,
    ServerReply,
    check_sendable,
    mail_command,
    rcpt_command,
    stuffed,
)
from tests.reference.text import read_text

SENDER = Path("a@example.com", "a", "example.com")
BOB = Recipient(Path("bob@example.org", "bob", "example.org"))
BOBS = Credentials("bob", "secret")
FULL = Capabilities.of(
    ServerReply(250, ("mx", "SIZE 1000", "8BITMIME", "SMTPUTF8", "DSN", "CHUNKING", "BINARYMIME", "AUTH PLAIN LOGIN"))
)


def read(data: bytes) -> list[ServerReply]:
    reader = ReplyReader()
    reader.feed(data)
    return list(iter(reader.next, None))


def test_answers_are_the_same_however_they_are_cut() -> None:
    data = b"220 hello\r\n250-mx\r\n250-SIZE 10\r\n250 DSN\r\n354\r\n"
    whole = read(data)
    assert [(answer.code, answer.lines) for answer in whole] == [
        (220, ("hello",)),
        (250, ("mx", "SIZE 10", "DSN")),
        (354, ("",)),
    ]
    for place in range(len(data)):
        reader = ReplyReader()
        reader.feed(data[:place])
        found = list(iter(reader.next, None))
        reader.feed(data[place:])
        assert found + list(iter(reader.next, None)) == whole
        assert reader.is_empty


def test_blank_lines_are_skipped() -> None:
    data = b"\r\n\n\r\r\n220 hello\r\n\r\n250-mx\r\n\r\n250 DSN\r\n\n"
    assert read(data) == [ServerReply(220, ("hello",)), ServerReply(250, ("mx", "DSN"))]


@pytest.mark.parametrize("data", [b"hello\r\n", b"199 no\r\n", b"250 " + b"x" * 5000, b"250-a\r\n" * 600])
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"hello\r\n250 ok\r\n", "hello"),
        (b"250-a\r\nno\0\x1b[2J \xc3\xbc\xff\n", "no\\x00\\x1b[2J \xfc\ufffd"),
        (b"2\r5\xe2\x80\xae\r\n", "2\\r5\\u202e"),
        (b"x" * 5000, "x" * 100),
        (b"\0" * 500 + b"\n", "\\x00" * 25),
        ("\U0001f4e8".encode() * 200 + b"\n", "\U0001f4e8" * 100),
    ],
)
def test_of_what_is_no_answer_the_first_line_is_shown(data: bytes, shown: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(data)
    assert str(caught.value) == f"this is not a reply: {shown}"


def test_a_reply_has_its_enhanced_status_if_there_is_one() -> None:
    assert ServerReply(550, ("5.1.1 no such user",)).status == "5.1.1"
    assert ServerReply(550, ("no such user",)).status == "5.0.0"
    assert ServerReply(450, ("4.2.0",)).status == "4.2.0"
    assert ServerReply(550, ("a", "b")).text == "550 a / b"


def test_capabilities_are_read_whatever_their_case() -> None:
    offer = Capabilities.of(ServerReply(250, ("mx", "size", "pipelining", "auth=plain", "LIMITS RCPTMAX=7 MAILMAX=3")))
    assert (offer.size, offer.pipelining, offer.mechanisms, offer.max_recipients) == (0, True, ("PLAIN",), 7)
    assert Capabilities.of(ServerReply(250, ("mx",))).size is None


def test_mail_has_only_parameters_that_the_server_offers() -> None:
    envelope = Envelope(SENDER, (BOB,), "8BITMIME", smtputf8=True, ret="HDRS", envid="x+20y")
    assert mail_command(envelope, 7, FULL) == (
        b"MAIL FROM:<a@example.com> SIZE=7 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=x+20y\r\n"
    )
    assert mail_command(envelope, 7, Capabilities()) == b"MAIL FROM:<a@example.com>\r\n"
    assert mail_command(Envelope(NULL_PATH, ()), 0, FULL) == b"MAIL FROM:<>\r\n"


def test_rcpt_hands_the_wishes_for_notifications_on() -> None:
    bob = BOB._replace(notify=frozenset({"SUCCESS", "FAILURE"}), orcpt="rfc822;bob@example.org")
    assert rcpt_command(bob, FULL) == (
        b"RCPT TO:<bob@example.org> NOTIFY=FAILURE,SUCCESS ORCPT=rfc822;bob@example.org\r\n"
    )
    assert rcpt_command(bob, Capabilities()) == b"RCPT TO:<bob@example.org>\r\n"


def test_without_smtputf8_addresses_and_orcpt_are_in_ascii() -> None:
    """RFC 6533 3: utf-8-addr-xtext; RFC 5890: a domain in A-labels is the same domain."""
    path = Path("bob@bücher.example", "bob", "xn--bcher-kva.example")
    bob = Recipient(path, orcpt="utf-8;bü@example.org")
    envelope = Envelope(path, (bob,), smtputf8=True)
    offer = Capabilities(dsn=True)
    check_sendable(envelope, 1, offer)
    assert mail_command(envelope, 0, offer) == b"MAIL FROM:<bob@xn--bcher-kva.example>\r\n"
    assert rcpt_command(bob, offer) == b"RCPT TO:<bob@xn--bcher-kva.example> ORCPT=utf-8;b\\x{FC}@example.org\r\n"
    assert rcpt_command(bob, Capabilities(dsn=True, smtputf8=True)) == (
        "RCPT TO:<bob@bücher.example> ORCPT=utf-8;bü@example.org\r\n".encode()
    )


@pytest.mark.parametrize(
    ("envelope", "size", "offer", "status"),
    [
        (Envelope(SENDER, (BOB,)), 1001, FULL, "5.3.4"),
        (Envelope(Path("ä@x.org", "ä", "x.org"), (BOB,), smtputf8=True), 1, Capabilities(), "5.6.7"),
        (Envelope(SENDER, (BOB,), "BINARYMIME"), 1, Capabilities(eightbitmime=True), "5.6.3"),
        (Envelope(SENDER, (BOB,), requiretls=True), 1, FULL, "5.7.30"),
    ],
)
def test_a_message_that_the_server_cannot_accept_is_not_sent(
    envelope: Envelope, size: int, offer: Capabilities, status: str
) -> None:
    with pytest.raises(CannotSendError) as caught:
        check_sendable(envelope, size, offer)
    assert caught.value.status == status


def test_an_ascii_message_with_smtputf8_goes_to_a_server_without_it() -> None:
    check_sendable(Envelope(SENDER, (BOB,), smtputf8=True), 1, Capabilities())


texts = st.lists(st.sampled_from([b".", b"\r\n", b"\r", b"\n", b"a", b"..", b"\r\n."])).map(b"".join)


@given(texts, st.lists(st.integers(1, 5)))
def test_a_stuffed_text_is_read_back_as_it_was(text: bytes, cuts: list[int]) -> None:
    edges = [0, *itertools.accumulate(cuts), len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(sorted(min(edge, len(text)) for edge in edges))]
    wire = b"".join(stuffed(chunks))
    whole = text if not text or text.endswith(b"\r\n") else text + b"\r\n"
    read = read_text(wire)
    assert (read.outcome, read.body, read.rest) == ("end", whole, b"")


def test_login_and_plain_are_only_said_in_private() -> None:
    dialog = AuthExchange(BOBS, FULL, is_private=True)
    assert dialog.start() == b"AUTH PLAIN AGJvYgBzZWNyZXQ=\r\n"
    with pytest.raises(CannotSendError):
        AuthExchange(BOBS, FULL, is_private=False)
    login = AuthExchange(BOBS, Capabilities(mechanisms=("LOGIN",)), is_private=True)
    assert login.start() == b"AUTH LOGIN\r\n"
    assert login.respond(ServerReply(334, ("VXNlcm5hbWU6",))) == b"Ym9i\r\n"
    assert login.respond(ServerReply(334, ("UGFzc3dvcmQ6",))) == b"c2VjcmV0\r\n"
    with pytest.raises(ProtocolError):
        login.respond(ServerReply(334, ("",)))


def test_scram_proves_who_both_are() -> None:
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    info = mechanism.make_auth_info("secret", iteration_count=4096)
    server = mechanism.make_server(lambda _: info)
    dialog = AuthExchange(BOBS, Capabilities(mechanisms=("SCRAM-SHA-256",)), is_private=False)

    first = dialog.start().split()[2]
    server.set_client_first(base64.b64decode(first).decode())
    final = dialog.respond(ServerReply(334, (base64.b64encode(server.get_server_first().encode()).decode(),)))
    server.set_client_final(base64.b64decode(final).decode())
    assert dialog.respond(ServerReply(334, (base64.b64encode(server.get_server_final().encode()).decode(),))) == b"\r\n"


def test_a_reply_is_shown_in_one_printable_line() -> None:
    assert ServerReply(550, ("a\x1b[2J", "b\u202ec")).text == "550 a?[2J / b?c"
    assert len(ServerReply(550, ("x" * 4000,) * 500).text) == 1000
