"""The public test suite of RFC 7208."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import yaml

from penstock.dns import Answer
from penstock.mailauth import spf
from tests.conftest import NEEDED_SUITES, SUITES
from tests.mailauth.zone import run

DOCUMENTS = list(yaml.safe_load_all((SUITES / NEEDED_SUITES["mailauth/test_spf_suite.py"]).read_text("utf-8")))
CASES = [pytest.param(document, case, id=name) for document in DOCUMENTS for name, case in document["tests"].items()]


class Zone:
    """The zone data of a document, as its comments explain it: SPF records are TXT records where there are none."""

    def __init__(self, data: dict[str, list[Any]]) -> None:
        self.data = {str(name).lower(): records for name, records in (data or {}).items()}

    def records(self, name: str) -> list[tuple[str, Any]]:
        found = self.data.get(name, [])
        has_txt = any(isinstance(record, dict) and "TXT" in record for record in found)
        records: list[tuple[str, Any]] = []
        for record in found:
            if record == "TIMEOUT":
                records.append(("TIMEOUT", None))
                continue
            ((kind, value),) = record.items()
            if kind == "SPF" and not has_txt:
                records.append(("TXT", value))
            elif not (kind == "TXT" and value == "NONE"):
                records.append((kind, value))
        return records

    async def query(self, name: str, kind: str, depth: int = 0) -> Answer:
        name = name.lower().rstrip(".")
        records = self.records(name)
        found: list[Any] = []
        for each, value in records:
            if (each == "TIMEOUT" and kind not in {other for other, _ in records}) or (each, value) == (
                kind,
                "TIMEOUT",
            ):
                return Answer("failed")
            if each == "CNAME":
                return Answer("failed") if depth > 8 else await self.query(value, kind, depth + 1)
            if each == kind:
                found.append(self.form(kind, value))
        return Answer("found" if found else "empty" if records else "missing", tuple(found), name)

    @staticmethod
    def form(kind: str, value: Any) -> object:
        if kind == "TXT":
            return (value if isinstance(value, str) else "".join(value)).encode()
        if kind == "A":
            return socket.inet_pton(socket.AF_INET, value)
        if kind == "AAAA":
            return socket.inet_pton(socket.AF_INET6, value)
        if kind == "MX":
            return value[0], value[1].rstrip(".").lower()
        return value


def test_the_suite_is_whole() -> None:
    assert len(CASES) == 203


@pytest.mark.parametrize(("document", "case"), CASES)
def test_the_result_and_the_explanation_are_right(document: dict[str, Any], case: dict[str, Any]) -> None:
    zone = Zone(document["zonedata"])
    party = {
        "address": case["host"],
        "sender": case["mailfrom"],
        "helo": case["helo"],
        "receiver": "receiver.example",
    }
    result = run(spf.check(zone.query, **party))
    assert spf.check_known(lambda *question: run(zone.query(*question)), **party) == result
    expected = case["result"] if isinstance(case["result"], list) else [case["result"]]
    assert result.result in expected, result.cause
    if "explanation" in case and result.result == "fail":
        assert result.explanation == (case["explanation"] if case["explanation"] != "DEFAULT" else "")
