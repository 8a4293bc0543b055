"""`penstock config unit`, `alerts` and `dashboard`: files that other programs read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.config import parse
from penstock.metrics.families import FAMILIES, PREFIX, PROCESS_FAMILIES

SAMPLES = {
    name + suffix
    for name, family in {**{PREFIX + name: family for name, family in FAMILIES.items()}, **PROCESS_FAMILIES}.items()
    for suffix in (("_bucket", "_sum", "_count") if family.type == "histogram" else ("",))
}


def printed(command: str) -> str:
    result = CliRunner().invoke(main, ["config", command])
    assert result.exit_code == 0
    return result.output


def metrics_in(expression: str) -> set[str]:
    """Return the names of metrics in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:penstock|process)_\w+", bare))


def test_the_unit_starts_the_server_and_restricts_it(tmp_path: Path) -> None:
    unit = printed("unit")
    fields = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert fields["ExecStart"].endswith("/penstock serve --config /etc/penstock/penstock.toml")
    assert fields["ExecStartPre"].endswith("/penstock config check /etc/penstock/penstock.toml")
    assert (fields["Type"], fields["NotifyAccess"], fields["AmbientCapabilities"]) == (
        "notify",
        "main",
        "CAP_NET_BIND_SERVICE",
    )
    assert parse("").admission.connections < int(fields["LimitNOFILE"])
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:  # systems without systemd have no use for the unit
        file = tmp_path / "penstock.service"
        file.write_text(unit)
        found = subprocess.run([analyze, "verify", str(file)], capture_output=True, text=True, check=False, timeout=60)
        assert (found.returncode, found.stderr) == (0, "")


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    (group,) = yaml.safe_load(printed("alerts"))["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len(set(names)) >= 8
    used: set[str] = set()
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
        used |= metrics_in(rule["expr"])
    assert used <= SAMPLES
    assert {
        "penstock_accept_seconds_bucket",
        "penstock_spool_oldest_seconds",
        "penstock_tls_certificate_not_after_seconds",
        "penstock_reload_total",
        "penstock_relay_hop_up",
        "penstock_worker_restarts_total",
        "penstock_journal_dropped_total",
        "penstock_jetstream_fallback_total",
    } <= used


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard: dict[str, Any] = json.loads(printed("dashboard"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers)) and len(panels) > 15
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            used = metrics_in(target["expr"])
            assert used and used <= SAMPLES, target["expr"]
