"""The grammar of arguments: what each mode accepts, and that the plain grammar is a subset of the whole one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.message import MailParameters
from penstock.reply import TOO_BIG, Reply
from penstock.smtp import _grammar, grammar
from penstock.smtp.events import Mail, Rcpt
from penstock.smtp.extensions import Extensions
from tests.reference.grammar import read_mailbox
from tests.steps import steps_of

STRICT = Extensions(max_size=1000, mechanisms=("PLAIN",), tolerant_addresses=False)
TOLERANT = Extensions(max_size=1000)
UNDERSCORE = "domain-underscore"


def parse_mail(argument: bytes, offer: Extensions, *, esmtp: bool, tls: bool) -> Mail | Reply:
    """Read a MAIL like a session: with the plain grammar, otherwise with the whole one."""
    plain = _grammar.plain_mail(argument, esmtp, offer.eightbitmime, offer.max_size)
    return grammar.parse_mail(argument, offer, esmtp=esmtp, tls=tls) if plain is None else plain


def parse_rcpt(argument: bytes, offer: Extensions, *, esmtp: bool, smtputf8: bool) -> Rcpt | Reply:
    """Read a RCPT like a session: with the plain grammar, otherwise with the whole one."""
    plain = _grammar.plain_recipient(argument)
    return grammar.parse_rcpt(argument, offer, esmtp=esmtp, smtputf8=smtputf8) if plain is None else Rcpt(plain)


def mail(argument: str, *, tls: bool = False, esmtp: bool = True, offer: Extensions = STRICT) -> Mail | Reply:
    return parse_mail(argument.encode(), offer, esmtp=esmtp, tls=tls)


def rcpt(argument: str, *, smtputf8: bool = False, offer: Extensions = STRICT) -> Rcpt | Reply:
    return parse_rcpt(argument.encode(), offer, esmtp=True, smtputf8=smtputf8)


@pytest.mark.parametrize(
    ("argument", "text", "local", "domain"),
    [
        ("FROM:<a@b>", "a@b", "a", "b"),
        ("from:<John.Doe@Example.ORG>", "John.Doe@Example.ORG", "John.Doe", "example.org"),
        ("FROM:<>", "", "", ""),
        ('FROM:<"a b"@c>', '"a b"@c', "a b", "c"),
        (r'FROM:<"a\"\\b"@c>', r'"a\"\\b"@c', 'a"\\b', "c"),
        ('FROM:<"a>b"@c>', '"a>b"@c', "a>b", "c"),
        ('FROM:<""@c>', '""@c', "", "c"),
        ("FROM:<@x,@y.z:a@b>", "a@b", "a", "b"),
        ("FROM:<a@[192.0.2.1]>", "a@[192.0.2.1]", "a", "[192.0.2.1]"),
        ("FROM:<a@[IPv6:2001:DB8::1]>", "a@[IPv6:2001:DB8::1]", "a", "[ipv6:2001:db8::1]"),
        ("FROM:<a@[tag:x@y]>", "a@[tag:x@y]", "a", "[tag:x@y]"),
        ("FROM:<a@[IPv6:::ffff:192.0.2.1]>", "a@[IPv6:::ffff:192.0.2.1]", "a", "[192.0.2.1]"),
        ("FROM:<" + "a" * 400 + "@b>", "a" * 400 + "@b", "a" * 400, "b"),
        ("FROM:<grüße@BÜCHER.example> SMTPUTF8", "grüße@BÜCHER.example", "grüße", "xn--bcher-kva.example"),
        ("FROM:<a@bücher。example> SMTPUTF8", "a@bücher。example", "a", "xn--bcher-kva.example"),
    ],
)
def test_accepted_paths_have_canonical_domains(argument: str, text: str, local: str, domain: str) -> None:
    for offer in (STRICT, TOLERANT):
        event = mail(argument, offer=offer)
        assert isinstance(event, Mail), event
        assert event.path == (text, local, domain)
        assert event.tolerated == ()


@pytest.mark.parametrize(
    ("argument", "text", "domain", "tolerated"),
    [
        ("FROM:<user..name@docomo.ne.jp>", "user..name@docomo.ne.jp", "docomo.ne.jp", "local-part-dots"),
        ("FROM:<.user@docomo.ne.jp>", ".user@docomo.ne.jp", "docomo.ne.jp", "local-part-dots"),
        ("FROM:<user.@docomo.ne.jp>", "user.@docomo.ne.jp", "docomo.ne.jp", "local-part-dots"),
        ("FROM:<ü..x@b> SMTPUTF8", "ü..x@b", "b", "local-part-dots"),
        (
            "FROM:<root@mail_server.Example.com>",
            "root@mail_server.Example.com",
            "mail_server.example.com",
            "domain-underscore",
        ),
        ("FROM:<a@_x.bücher.example> SMTPUTF8", "a@_x.bücher.example", "_x.xn--bcher-kva.example", UNDERSCORE),
        ("FROM:<a@b.example.>", "a@b.example", "b.example", "domain-trailing-dot"),
        ("FROM:<root>", "root", "", "no-domain"),
        ('FROM:<"the root">', '"the root"', "", "no-domain"),
        ("FROM: \t<a@b>", "a@b", "b", "blank-after-colon"),
        ("FROM:<a@b> AUTH=<>", "a@b", "b", "ignored-parameter"),
        ("FROM:<a@b> AUTH=", "a@b", "b", "ignored-parameter"),
        ("FROM:<a@b> ENVID=a+zz", "a@b", "b", "ignored-parameter"),
        ("FROM:<a@b> RET=ALL  ", "a@b", "b", "ignored-parameter"),
    ],
)
def test_irregular_senders_pass_in_tolerant_mode_only(argument: str, text: str, domain: str, tolerated: str) -> None:
    event = mail(argument, offer=TOLERANT)
    assert isinstance(event, Mail), event
    assert (event.path.text, event.path.domain, event.tolerated) == (text, domain, (tolerated,))
    assert event.parameters in (MailParameters(), MailParameters(smtputf8=True))
    refusal = mail(argument, offer=Extensions(tolerant_addresses=False))
    assert isinstance(refusal, Reply)
    assert refusal.is_permanent


def test_tolerated_xtext_is_brought_into_the_strict_form() -> None:
    event = mail("FROM:<a@b> ENVID=X:+3d=y", offer=TOLERANT)
    assert isinstance(event, Mail), event
    assert (event.parameters.envid, event.tolerated) == ("X:+3D+3Dy", ("irregular-xtext",))
    recipient = rcpt("TO:<a@b> ORCPT=rfc822;SRS0=x+2by@c", offer=TOLERANT)
    assert isinstance(recipient, Rcpt), recipient
    assert (recipient.recipient.orcpt, recipient.tolerated) == ("rfc822;SRS0+3Dx+2By@c", ("irregular-xtext",))


@pytest.mark.parametrize("hint", ["ORCPT=bob", "NOTIFY=SOMETIMES", "NOTIFY=", "NOTIFY=NEVER,DELAY", "ORCPT=rfc822;a+z"])
def test_a_malformed_hint_does_not_cost_a_recipient(hint: str) -> None:
    event = rcpt(f"TO:<a@b> {hint}", offer=TOLERANT)
    assert isinstance(event, Rcpt), event
    assert event.recipient[1:] == (None, None)
    assert event.tolerated == ("ignored-parameter",)
    assert isinstance(rcpt(f"TO:<a@b> {hint}"), Reply)


def test_names_without_a_domain_get_our_own() -> None:
    offer = Extensions(own_domain="example.org")
    sender, recipient = mail("FROM:<root>", offer=offer), rcpt("TO:<PostMaster>", offer=offer)
    assert isinstance(sender, Mail)
    assert sender.path == ("root@example.org", "root", "example.org")
    assert isinstance(recipient, Rcpt)
    assert recipient.recipient.path == ("PostMaster@example.org", "PostMaster", "example.org")
    assert isinstance(rcpt("TO:<bob>", offer=offer), Reply)


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
        ("FROM:<a@" + "b." * 127 + "bb>", "5.1.7"),
        ("FROM:<a@" + ("b" * 63 + ".") * 4 + ">", "5.1.7"),
        ("FROM:<a\u007f@b>", "5.1.7"),
        ("FROM:<a@b> SMTPUTF8 SMTPUTF8", "5.5.4"),
        ("FROM:<a@b> AUTH=", "5.5.4"),
        ("FROM:<a@b> AUTH=a+zz", "5.5.4"),
        ("FROM:<a@xn--\u00e9.example> SMTPUTF8", "5.1.7"),
        ("FROM:<a@\u2028.example> SMTPUTF8", "5.1.7"),
    ],
)
def test_malformed_arguments_are_501_in_strict_mode(argument: str, status: str) -> None:
    reply = mail(argument)
    assert isinstance(reply, Reply), reply
    assert (reply.code, reply.status) == (501, status)


@pytest.mark.parametrize(
    "mailbox",
    [
        "a@b@c", '"a@c', 'a"b@c', '"a"b@c', "a b@c", "a@b c", "a@", "@b", ".@b", "..@b", "a@b..c", "a@.b", "a@-b",
        "a@b..", "a@b.]", "a@b]", "a@[1.2.3.4", "a\tb@c", "a\x00b@c", "a\x7f@c", '"a\x01"@c', "a\\@b", "a,b@c", "a;b@c",
        "(x)a@b",
    ],
)  # fmt: skip
def test_malformed_mailboxes_are_refused_in_tolerant_mode(mailbox: str) -> None:
    for reply in (mail(f"FROM:<{mailbox}>", offer=TOLERANT), rcpt(f"TO:<{mailbox}>", offer=TOLERANT)):
        assert isinstance(reply, Reply), reply
        assert reply.code == 501


UNSAFE = [
    0x80,
    0x85,
    0x9F,
    0xA0,
    0x61C,
    0x200B,
    0x200E,
    0x2028,
    0x2029,
    0x202E,
    0x2066,
    0x3000,
    0xFEFF,
    0xFFFE,
    0xE0041,
]


@pytest.mark.parametrize("code", UNSAFE, ids=hex)
def test_characters_that_deceive_are_refused_everywhere(code: int) -> None:
    character = chr(code)
    for text in (f"a{character}b@c", f'"a{character}b"@c', f"a@x{character}.example"):
        path = grammar.parse_mailbox(text, smtputf8=True, tolerant=True)
        assert path is None or character not in path.domain + path.local
    assert grammar.parse_mailbox(f"a{character}b@c", smtputf8=True, tolerant=True) is None
    assert isinstance(grammar.parse_hello_name(f"a{character}b".encode()), Reply)
    assert isinstance(rcpt(f"TO:<a@b> ORCPT=utf-8;{character}@b", smtputf8=True, offer=TOLERANT), Reply)


def test_a_lone_surrogate_is_refused() -> None:
    argument = "FROM:<a\ud800b@c> SMTPUTF8".encode("utf-8", "surrogatepass")
    assert parse_mail(argument, TOLERANT, esmtp=True, tls=False) == mail("FROM:<a@b@c>")


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        (b"client.example", "client.example"),
        (b"[192.0.2.1]", "[192.0.2.1]"),
        (b"my_windows_pc", "my_windows_pc"),
        (b"Z170-D3H Gentoo", "Z170-D3H Gentoo"),
        ("café".encode(), "café"),
        (b"caf\xe9", "caf\\xe9"),
    ],
)
def test_hello_names_may_be_odd_in_tolerant_mode(argument: bytes, name: str) -> None:
    assert grammar.parse_hello_name(argument) == name
    is_one_word = argument.isascii() and b" " not in argument
    assert isinstance(grammar.parse_hello_name(argument, tolerant=False), str) is is_one_word


@pytest.mark.parametrize("argument", [b"", b"a\x00b", b"a\x1bb", b"a\tb", b"a\x7f", b"x" * 256, b"\xc2\x85"])
def test_hello_names_have_no_controls_and_255_octets(argument: bytes) -> None:
    assert grammar.parse_hello_name(argument) == grammar.BAD_HELLO


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
    assert isinstance(
        mail("FROM:<a@b> SIZE=99999999999999999999", offer=Extensions(max_size=0, tolerant_addresses=False)), Mail
    )
    assert mail("FROM:<a@b> SIZE=99999999999999999999") == TOO_BIG


def test_orcpt_may_be_utf8_under_smtputf8() -> None:
    argument = "TO:<a@b> ORCPT=utf-8;jürgen@example.org"
    assert isinstance(rcpt(argument, smtputf8=True), Rcpt)
    assert isinstance(rcpt(argument), Reply)


octets = st.binary(max_size=80)
near_misses = st.lists(
    st.sampled_from(
        ["a", "b.c", ".", "@", "<", ">", '"', "\\", "[", "]", ":", "IPv6:", "1.2.3.4", "-", " ", "é", "_", "x" * 60]
    ),
    max_size=12,
).map("".join)
offers = st.sampled_from([STRICT, TOLERANT, Extensions(own_domain="example.org", mechanisms=("PLAIN",))])


@given(octets | near_misses.map(lambda text: b"FROM:<" + text.encode() + b">"), st.booleans(), st.booleans(), offers)
def test_no_argument_makes_the_grammar_raise(argument: bytes, esmtp: bool, flag: bool, offer: Extensions) -> None:
    for event in (
        parse_mail(argument, offer, esmtp=esmtp, tls=flag),
        parse_rcpt(argument.replace(b"FROM", b"TO"), offer, esmtp=esmtp, smtputf8=flag),
        grammar.parse_hello_name(argument, tolerant=flag),
    ):
        if isinstance(event, Reply):
            assert event.is_permanent


@settings(max_examples=500)
@given(near_misses)
def test_mailboxes_read_as_the_reference_does(text: str) -> None:
    path = grammar.parse_mailbox(text, smtputf8=False)
    assert (None if path is None else (path.local, path.domain)) == read_mailbox(text)


@settings(max_examples=500)
@given(near_misses, st.booleans())
def test_the_tolerant_mode_only_adds_to_the_strict_one(text: str, smtputf8: bool) -> None:
    strict = grammar.parse_mailbox(text, smtputf8=smtputf8)
    tolerant = grammar.parse_mailbox(text, smtputf8=smtputf8, tolerant=True)
    assert strict in (None, tolerant)


plain = st.from_regex(r"[a-z0-9.!+-]{1,70}@[A-Za-z0-9._-]{1,80}", fullmatch=True)
tails = st.sampled_from(
    ["", " SIZE=10", " SIZE=5000", " BODY=8BITMIME", " body=7bit", " SIZE=1 BODY=8bitmime", " BODY=7BIT SIZE=1", " X=1"]
)


@given(plain, tails, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_the_plain_grammar_is_a_subset_of_the_whole(
    path: str, tail: str, esmtp: bool, tls: bool, eightbitmime: bool, tolerant: bool
) -> None:
    offer = Extensions(max_size=1000, eightbitmime=eightbitmime, tolerant_addresses=tolerant)
    argument = f"FROM:<{path}>{tail}".encode()
    assert parse_mail(argument, offer, esmtp=esmtp, tls=tls) == grammar.parse_mail(
        argument, offer, esmtp=esmtp, tls=tls
    )
    argument = f"to:<{path}>".encode()
    assert parse_rcpt(argument, offer, esmtp=esmtp, smtputf8=tls) == grammar.parse_rcpt(
        argument, offer, esmtp=esmtp, smtputf8=tls
    )


@pytest.mark.parametrize("length", [1, 64, 65, 255, 256, 257, 1000])
def test_plain_and_whole_grammar_agree_about_lengths(length: int) -> None:
    for mailbox in ("a" * length + "@b", "a@" + "b." * (length // 2) + "c", "a@" + "b" * length):
        argument = f"FROM:<{mailbox}>".encode()
        plain, whole = (parse(argument, TOLERANT, esmtp=True, tls=False) for parse in PARSERS)
        assert plain == whole
        assert isinstance(plain, Mail) is (len(mailbox.partition("@")[2]) <= 255 and "b" * 64 not in mailbox)


PARSERS = (parse_mail, grammar.parse_mail)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_encoded_xtext_is_decoded(text: str) -> None:
    encoded = "".join(c if "!" <= c <= "~" and c not in "+=" else f"+{ord(c):02X}" for c in text)
    assert grammar.decode_xtext(encoded) == text


# ---- no argument costs more than its length


@pytest.mark.parametrize(
    "pattern",
    [
        "FROM:<{a*N}@b>", "FROM:<{a.*N}@b>", "FROM:<{.*N}@b>", "FROM:<{a@*N}b>", "FROM:<\"{x*N}\"@b>",
        "FROM:<\"{\\a*N}@b>", "FROM:<{@a,*N}:a@b>", "FROM:<a@{b.*N}>", "FROM:<a@{b-*N}>", "FROM:<a@{é.*N}> SMTPUTF8",
        "FROM:<{é*N}@b> SMTPUTF8", "FROM:<a@b> {X=1 *N}", "FROM:<a@b> {A*N}=1", "FROM:<a@b>{ *N}SIZE=1",
        "FROM:{ *N}<a@b>", "FROM:<a@b> ENVID={+3d*N}", "FROM:<a@b> AUTH={=*N}", "FROM:<a@[{x*N}]>",
        "FROM:<a@[IPv6:{1:*N}]>", "FROM:<{<*N}", "FROM:<a@b> {SIZE=1 *N}",
    ],
)  # fmt: skip
def test_twice_the_argument_costs_at_most_twice_the_steps(pattern: str) -> None:
    def argument(times: int) -> bytes:
        start, _, rest = pattern.partition("{")
        repeated, _, end = rest.partition("*N}")
        return (start + repeated * times + end).encode()

    def steps(times: int) -> int:
        return steps_of(lambda: grammar.parse_mail(argument(times), TOLERANT, esmtp=True, tls=False))

    steps(1)  # what is made once is made before
    assert steps(400) <= 2 * steps(200) + 50
