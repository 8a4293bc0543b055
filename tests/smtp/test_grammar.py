"""The grammar of arguments: what is taken, what is refused, and that the short way is the long way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.message import MailParameters
from penstock.reply import TOO_BIG, Reply
from penstock.smtp import grammar
from penstock.smtp.events import Mail, Rcpt
from penstock.smtp.extensions import Extensions
from tests.reference.grammar import read_mailbox

OFFER = Extensions(max_size=1000, mechanisms=("PLAIN",))


def mail(argument: str, *, tls: bool = False, esmtp: bool = True, offer: Extensions = OFFER) -> Mail | Reply:
    return grammar.parse_mail(argument.encode(), offer, esmtp=esmtp, tls=tls)


def rcpt(argument: str, *, smtputf8: bool = False) -> Rcpt | Reply:
    return grammar.parse_rcpt(argument.encode(), OFFER, esmtp=True, smtputf8=smtputf8)


@pytest.mark.parametrize(
    ("argument", "text", "local", "domain"),
    [
        ("FROM:<a@b>", "a@b", "a", "b"),
        ("from:<John.Doe@Example.ORG>", "John.Doe@Example.ORG", "John.Doe", "example.org"),
        ("FROM: \t<a@b>", "a@b", "a", "b"),
        ("FROM:<>", "", "", ""),
        ('FROM:<"a b"@c>', '"a b"@c', "a b", "c"),
        (r'FROM:<"a\"\\b"@c>', r'"a\"\\b"@c', 'a"\\b', "c"),
        ('FROM:<"a>b"@c>', '"a>b"@c', "a>b", "c"),
        ('FROM:<""@c>', '""@c', "", "c"),
        ("FROM:<@x,@y.z:a@b>", "a@b", "a", "b"),
        ("FROM:<a@[192.0.2.1]>", "a@[192.0.2.1]", "a", "[192.0.2.1]"),
        ("FROM:<a@[IPv6:2001:DB8::1]>", "a@[IPv6:2001:DB8::1]", "a", "[ipv6:2001:db8::1]"),
        ("FROM:<a@[tag:x@y]>", "a@[tag:x@y]", "a", "[tag:x@y]"),
    ],
)
def test_paths_that_are_taken(argument: str, text: str, local: str, domain: str) -> None:
    event = mail(argument)
    assert isinstance(event, Mail), event
    assert event.path == (text, local, domain)


@pytest.mark.parametrize(
    ("argument", "status"),
    [
        ("", "5.5.4"),
        ("TO:<a@b>", "5.5.4"),
        ("FROM:a@b", "5.1.7"),
        ("FROM:<a@b", "5.1.7"),
        ("FROM:<a b@c>", "5.1.7"),
        ("FROM:<a@b c>", "5.1.7"),
        ("FROM:<a@b>x", "5.5.4"),
        ("FROM:<a@@b>", "5.1.7"),
        ("FROM:<a@b.>", "5.1.7"),
        ("FROM:<@x:>", "5.1.7"),
        ("FROM:<@-x:a@b>", "5.1.7"),
        ('FROM:<"a"b@c>', "5.1.7"),
        ('FROM:<"a@c>', "5.1.7"),
        ("FROM:<a@[1.2.3]>", "5.1.7"),
        ("FROM:<a@[IPv6:fe80::1%eth0]>", "5.1.7"),
        ("FROM:<" + "a" * 65 + "@b>", "5.1.7"),
        ("FROM:<a@" + "b." * 127 + "bb>", "5.1.7"),
        ("FROM:<" + "a" * 64 + "@" + ("b" * 63 + ".") * 2 + "c" * 63 + ">", "5.1.7"),
        ("FROM:<a\u007f@b>", "5.1.7"),
        ("FROM:<a@b> SMTPUTF8 SMTPUTF8", "5.5.4"),
        ("FROM:<a@b> AUTH=", "5.5.4"),
        ("FROM:<a@b> AUTH=a+zz", "5.5.4"),
        ("FROM:<a@xn--\u00e9.example> SMTPUTF8", "5.1.7"),
        ("FROM:<a@\u2028.example> SMTPUTF8", "5.1.7"),
    ],
)
def test_arguments_that_are_501(argument: str, status: str) -> None:
    reply = mail(argument)
    assert isinstance(reply, Reply), reply
    assert (reply.code, reply.status) == (501, status)


def test_parameters_are_read_by_name_and_keep_their_case() -> None:
    event = mail("FROM:<a@b> size=10 Body=8bitmime SMTPUTF8 RET=hdrs ENVID=Ab+2B AUTH=x+2By REQUIRETLS", tls=True)
    assert isinstance(event, Mail), event
    assert event.parameters == MailParameters(10, "8BITMIME", True, "HDRS", "Ab+2B", "x+y", True)


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("FROM:<a@b> SIZE=1000", 250),
        ("FROM:<a@b> SIZE=1001", 552),
        ("FROM:<a@b> SIZE=1001 SMTPUTF8", 552),
        ("FROM:<a@b> REQUIRETLS", 555),
        ("FROM:<a@b> NOTIFY=NEVER", 555),
    ],
)
def test_parameters_are_checked(argument: str, code: int) -> None:
    event = mail(argument)
    assert (event.code if isinstance(event, Reply) else 250) == code


def test_without_a_limit_any_size_is_taken() -> None:
    assert isinstance(mail("FROM:<a@b> SIZE=99999999999999999999", offer=Extensions(max_size=0)), Mail)
    assert mail("FROM:<a@b> SIZE=99999999999999999999") == TOO_BIG


def test_orcpt_may_be_utf8_under_smtputf8() -> None:
    argument = "TO:<a@b> ORCPT=utf-8;jürgen@example.org"
    assert isinstance(rcpt(argument, smtputf8=True), Rcpt)
    assert isinstance(rcpt(argument), Reply)


octets = st.binary(max_size=80)
near_misses = st.lists(
    st.sampled_from(
        ["a", "b.c", ".", "@", "<", ">", '"', "\\", "[", "]", ":", "IPv6:", "1.2.3.4", "-", " ", "é", "x" * 60]
    ),
    max_size=12,
).map("".join)


@given(octets | near_misses.map(lambda text: b"FROM:<" + text.encode() + b">"), st.booleans(), st.booleans())
def test_no_argument_makes_the_grammar_raise(argument: bytes, esmtp: bool, flag: bool) -> None:
    for event in (
        grammar.parse_mail(argument, OFFER, esmtp=esmtp, tls=flag),
        grammar.parse_rcpt(argument.replace(b"FROM", b"TO"), OFFER, esmtp=esmtp, smtputf8=flag),
        grammar.parse_hello_name(argument),
    ):
        if isinstance(event, Reply):
            assert event.is_permanent


@settings(max_examples=500)
@given(near_misses)
def test_mailboxes_read_as_the_reference_does(text: str) -> None:
    path = grammar.parse_mailbox(text, smtputf8=False)
    assert (None if path is None else (path.local, path.domain)) == read_mailbox(text)


plain = st.from_regex(r"[a-z0-9.!+-]{1,70}@[A-Za-z0-9.-]{1,80}", fullmatch=True)
tails = st.sampled_from(
    ["", " SIZE=10", " SIZE=5000", " BODY=8BITMIME", " body=7bit", " SIZE=1 BODY=8bitmime", " BODY=7BIT SIZE=1", " X=1"]
)


@given(plain, tails, st.booleans(), st.booleans(), st.booleans())
def test_the_short_way_is_the_long_way(path: str, tail: str, esmtp: bool, tls: bool, eightbitmime: bool) -> None:
    offer = Extensions(max_size=1000, eightbitmime=eightbitmime)
    argument = f"FROM:<{path}>{tail}".encode()
    assert grammar.parse_mail(argument, offer, esmtp=esmtp, tls=tls) == grammar.parse_any_mail(
        argument, offer, esmtp=esmtp, tls=tls
    )
    argument = f"to:<{path}>".encode()
    assert grammar.parse_rcpt(argument, offer, esmtp=esmtp, smtputf8=tls) == grammar.parse_any_rcpt(
        argument, offer, esmtp=esmtp, smtputf8=tls
    )


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_xtext_comes_back_as_it_was(text: str) -> None:
    assert grammar.decode_xtext(grammar.encode_xtext(text)) == text
