"""The public validation suite of ARC."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from penstock.dns import Answer
from penstock.mailauth import MessageCheck
from penstock.mailauth.arc import ArcVerifier
from penstock.mailauth.dkim import BodyHashes
from penstock.mailauth.header import Header
from penstock.policy.authentication import decision_settings
from penstock.policy.settings import DmarcSettings, PolicySettings
from tests.conftest import NEEDED_SUITES, SUITES

DOCUMENTS = [
    document
    for document in yaml.safe_load_all((SUITES / NEEDED_SUITES["mailauth/test_arc_suite.py"]).read_text("utf-8"))
    if document
]
CASES = [pytest.param(document, case, id=name) for document in DOCUMENTS for name, case in document["tests"].items()]


def test_the_suite_is_whole() -> None:
    assert len(CASES) == 171


@pytest.mark.parametrize(("document", "case"), CASES)
def test_the_chain_is_judged_right(document: dict[str, Any], case: dict[str, Any]) -> None:
    message = case["message"].replace("\n", "\r\n").encode()
    head, _, body = (
        (message if message.startswith(b"\r\n") else b"\r\n" + message).removeprefix(b"\r\n").partition(b"\r\n\r\n")
    )
    hashes = BodyHashes()
    verifier = ArcVerifier(Header(head + b"\r\n"), hashes)
    hashes.feed(body)
    hashes.finish()
    keys = {str(name).lower(): text for name, text in (document.get("txt-records") or {}).items()}
    answers = {
        name: Answer("found", (keys[name].encode(),)) if name in keys else Answer("missing")
        for name in verifier.questions
    }
    result = verifier.finish(answers)
    # The suite says nothing of chains whose last seal says cv=fail; RFC 8617 5.2, step 2, does.
    assert result.result == (case["cv"] or "fail").lower(), result.cause


@pytest.mark.parametrize(
    ("trusted", "expected"),
    [((), "arc=pass"), (("Example.org.",), "arc=pass policy.sealers=trusted"), (("example.net",), "=untrusted")],
)
async def test_the_header_shows_whether_the_sealers_are_trusted(trusted: tuple[str, ...], expected: str) -> None:
    document = next(each for each in DOCUMENTS if "cv_pass_i1_1" in each["tests"])
    case = document["tests"]["cv_pass_i1_1"]
    head, _, body = case["message"].replace("\n", "\r\n").encode().partition(b"\r\n\r\n")
    keys = {str(name).lower(): text for name, text in document["txt-records"].items()}

    async def query(name: str, kind: str) -> Answer:
        return Answer("found", (keys[name].encode(),)) if name in keys else Answer("missing")

    policy = PolicySettings(dmarc=DmarcSettings(trusted_sealers=trusted))
    check = MessageCheck(head + b"\r\n", decision_settings(policy), now=0)
    check.feed(body)
    judgement = await check.finish(query, authserv_id="mx.example.org", spf=None, mail_from="", helo="")
    assert " ".join(judgement.header_field.decode().split()).endswith(expected)
