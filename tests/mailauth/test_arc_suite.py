"""The public validation suite of ARC."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from penstock.dns import Answer
from penstock.mailauth.arc import ArcVerifier
from penstock.mailauth.dkim import BodyHashes
from penstock.mailauth.header import Header
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
