"""The clients of milters, rspamd and policy servers against real ones."""

from __future__ import annotations

import base64
from pathlib import Path

import dkim  # type: ignore[import-untyped]
import msgspec
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from penstock.message import NO_PARAMETERS, Recipient
from penstock.policy.delegate import make_checks as make_delegates
from penstock.policy.evidence import evidence_of
from penstock.policy.milter import MilterCheck
from penstock.policy.rspamd import RspamdCheck
from penstock.policy.settings import MilterSettings, PolicySettings, RspamdSettings
from tests.policy.judging import (
    HEADER,
    PREFIX,
    TEXT,
    judge,
    judge_with,
    make_message,
    make_parts,
    make_transaction,
    octets_of,
    path_of,
)
from tests.policy.peers import clamav_milter, opendkim, postgrey, rspamd

GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X\r\n"


def check_for(port: int) -> MilterCheck:
    settings = msgspec.convert({"address": f"inet:127.0.0.1:{port}"}, MilterSettings)
    return MilterCheck(settings, "enforce", "mx.example.org")


async def test_rspamd_refuses_spam_and_marks_other_mail(tmp_path: Path) -> None:
    with rspamd(tmp_path) as (port, http):
        check = check_for(port)
        address = check._pool.addresses[0]
        assert await check._keeps_connections(address)
        check._pool.reusable.add(address)
        for _ in range(3):  # on one connection
            transaction = make_transaction()
            reply, message = await judge(check, transaction)
            assert reply is None
            octets = octets_of(message)
            assert octets.startswith(PREFIX + HEADER)
            assert octets.endswith(b"\r\n\r\n" + TEXT)
            assert b"\r\nX-Rspamd-Queue-Id: 1M8KRQ663CFG00000045\r\n" in octets
            reply, _ = await judge(check, transaction, make_message(transaction, HEADER + b"\r\n" + GTUBE))
            assert reply is not None
            assert reply.encoded == b"554 5.7.1 Gtube pattern\r\n"
        for verdict in (True, False):
            over_http = RspamdCheck(
                RspamdSettings(url=f"http://127.0.0.1:{http}", verdict=verdict), "enforce", "mx.example.org"
            )
            transaction = make_transaction()
            assert (await judge(over_http, transaction))[0] is None
            assert transaction.results.score == 0
            reply, _ = await judge(over_http, transaction, make_message(transaction, HEADER + b"\r\n" + GTUBE))
            assert (reply is not None and reply.encoded) == (verdict and b"550 5.7.1 Gtube pattern\r\n")
            assert verdict or transaction.results.scores == {"rspamd": 15.0}


async def test_opendkim_signs_what_is_delivered(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    record = b"v=DKIM1; k=rsa; p=" + base64.b64encode(public)
    with opendkim(tmp_path, pem) as port:
        check = check_for(port)
        assert await check._keeps_connections(check._pool.addresses[0]) is False
        for _ in range(2):
            transaction = make_transaction()
            message = make_message(transaction, HEADER + b"\r\n" + TEXT * 5000)
            reply, message = await judge(check, transaction, message)
            assert reply is None
            octets = octets_of(message)
            assert octets.count(b"DKIM-Signature:") == 1
            assert dkim.verify(octets, dnsfunc=lambda *_, **__: record)
        judging, _ = judge_with(check)  # opendkim replies to MAIL and RCPT: the same, as the envelope arrives
        transaction = make_transaction()
        for _ in range(2):
            assert await judging.on_mail(transaction, path_of("alice@example.com"), NO_PARAMETERS) is None
            assert await judging.on_rcpt(transaction, Recipient(path_of("bob@example.org"))) is None
            reply, message = await judging.on_message(transaction, make_message(transaction))
            assert reply is None
            assert dkim.verify(octets_of(message), dnsfunc=lambda *_, **__: record)
        assert check._pool._lent == 1, "all on one connection"
        judging.close(transaction, evidence_of(transaction))
        assert check._pool._lent == 0


async def test_clamav_milter_quarantines_viruses(tmp_path: Path) -> None:
    virus = b"not really a virus, but a text that the test calls one"
    with clamav_milter(tmp_path, virus) as port:
        check = check_for(port)
        transaction = make_transaction()
        reply, message = await judge(check, transaction)
        assert (reply, transaction.quarantine) == (None, "")
        assert b"X-Virus-Status: Clean\r\n" in octets_of(message)
        transaction = make_transaction()
        reply, message = await judge(check, transaction, make_message(transaction, HEADER + b"\r\n" + virus + b"\r\n"))
        assert (reply, transaction.quarantine) == (None, "hold")
        assert b"X-Virus-Status: Infected (Test.UNOFFICIAL)\r\n" in octets_of(message)


async def test_postgrey_defers_the_first_attempt(tmp_path: Path) -> None:
    with postgrey(tmp_path) as port:
        table = {"mode": "enforce", "delegate": [{"address": f"inet:127.0.0.1:{port}"}]}
        (check,) = make_delegates(msgspec.convert(table, PolicySettings), make_parts())
        judging, _ = judge_with(check)
        recipient = Recipient(path_of("bob@example.org"))
        reply = await judging.on_rcpt(make_transaction(), recipient)
        assert reply is not None
        assert reply.encoded.startswith(b"450 4.7.1 Greylisted"), reply.cause
        while await judging.on_rcpt(make_transaction(), recipient) is not None:
            await trio.lowlevel.checkpoint()
