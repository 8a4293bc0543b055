"""Which recipients a client may send to."""

from __future__ import annotations

import pytest

from penstock import reply as replies
from penstock.reply import Reply
from penstock.server.domains import ROUTING_DENIED, Domains, RelayControl, has_routing
from penstock.smtp.grammar import parse_mailbox

OURS = RelayControl(Domains(["bücher.example", "example.org", ".sub.example.net"]), own_domain="example.org")


def refusal(control: RelayControl, text: str, *, may_relay: bool = False) -> Reply | None:
    path = parse_mailbox(text, smtputf8=True, tolerant=True)
    assert path is not None
    return control.refusal(path, may_relay=may_relay, own_literal="[192.0.2.25]")


@pytest.mark.parametrize(
    ("recipient", "expected"),
    [
        ("bob@example.org", None),
        ("bob@EXAMPLE.org.", None),
        ("bob@xn--bcher-kva.example", None),
        ("bob@BÜCHER.example", None),
        ("bob@a.sub.example.net", None),
        ("bob@sub.example.net", replies.RELAY_DENIED),
        ("bob@example.com", replies.RELAY_DENIED),
        ("bob@notexample.org", replies.RELAY_DENIED),
        ("postmaster@[192.0.2.25]", None),
        ("Postmaster@[IPv6:::ffff:192.0.2.25]", None),
        ("bob@[192.0.2.25]", replies.RELAY_DENIED),
        ("victim%remote.example@example.org", ROUTING_DENIED),
        ('"victim@remote.example"@example.org', ROUTING_DENIED),
        ("remote.example!victim@example.org", ROUTING_DENIED),
        ("victim%remote.example@example.com", replies.RELAY_DENIED),
        ("postmaster%remote.example@example.org", ROUTING_DENIED),
    ],
)
def test_strangers_may_send_to_our_domains(recipient: str, expected: Reply | None) -> None:
    assert refusal(OURS, recipient) == expected
    assert refusal(OURS, recipient, may_relay=True) is None
    assert refusal(RelayControl(None), recipient) is None


def test_untrusted_routing_can_be_allowed_in_our_domains_only() -> None:
    control = RelayControl(OURS.domains, "example.org", allow_untrusted_routing=True)
    assert refusal(control, "victim%remote.example@example.org") is None
    assert refusal(control, "victim%remote.example@example.com") == replies.RELAY_DENIED


def test_postmaster_of_the_hostname_is_always_accepted() -> None:
    control = RelayControl(Domains([".example.net"]), own_domain="mx.example.org")
    assert refusal(control, "PostMaster@mx.example.org") is None
    assert refusal(control, "bob@mx.example.org") == replies.RELAY_DENIED


@pytest.mark.parametrize("local", ["a%b", "a!b", "a@b", "a%", "!a", "a\uff05b", "a\uff20b", "a\ufe6bb", "a\uff01b"])
def test_routing_is_seen_in_every_form(local: str) -> None:
    assert has_routing(local)


@pytest.mark.parametrize("local", ["a", "a+b", "a=b", "a.b", "grüße", "bounce+a=b.example", "a#b", "a/b", ""])
def test_other_local_parts_are_no_routing(local: str) -> None:
    assert not has_routing(local)


def test_a_name_that_is_not_a_domain_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="is not a domain"):
        Domains(["*.example.org"])
