"""Fixtures of the whole suite, and the programs it needs.

Some files test with other mail programs. A file whose program is not installed is not collected, and the header of the
report says so. With PENSTOCK_PEERS=required, as in .ci/run, a missing program is an error.
"""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest
import trustme
from bench.other_servers import is_haraka_there
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no failure

PROGRAMS = {
    "e2e/test_swaks.py": ["swaks"],
    "e2e/test_postfix.py": ["postfix", "smtp-source"],
    "e2e/test_page.py": ["chromium", "chromedriver"],
    "e2e/test_nginx.py": ["nginx"],
    "e2e/test_gateway.py": ["smtp-source", "smtp-sink"],
    "e2e/test_sink_faults.py": ["postfix", "swaks"],
    "e2e/test_haraka.py": [],
    "e2e/test_dumps.py": ["smtp-sink"],
    "relay/test_smtp_sink.py": ["smtp-sink"],
    "dns/test_nsd.py": ["nsd"],
    "e2e/test_filters.py": ["rspamd"],
    "policy/test_filter_peers.py": ["rspamd", "opendkim", "clamd", "clamav-milter", "postgrey"],
    "e2e/test_mail_authentication.py": ["nsd"],
    "e2e/test_reputation.py": ["nsd"],
}
"""The programs that a file needs, from Debian packages; Haraka comes from npm."""
TESTS = Path(__file__).parent
SUITES = TESTS.parents[1] / "shared" / "suites"
NEEDED_SUITES = {
    "mailauth/test_spf_suite.py": "spf/rfc7208-tests.yml",
    "mailauth/test_arc_suite.py": "arc/arc-draft-validation-tests.yml",
    "mailauth/test_dkim_vectors.py": "dkim/rfc6376.signed.msg",
}
"""The public test suites that a file needs. They are no part of the project; without them the file is left out."""


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing(name: str) -> list[str]:
    """Return what a file needs and this machine does not have."""
    programs = PROGRAMS.get(name, [])
    found = [program for program in programs if _find(program) is None]
    if "postfix" in programs and os.geteuid() != 0:
        found.append("root (to start Postfix)")
    if name == "e2e/test_haraka.py" and not is_haraka_there():
        found.append("Haraka (python -m bench.other_servers haraka)")
    return found


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the files whose programs are missing."""
    name = str(collection_path.relative_to(TESTS)) if collection_path.is_relative_to(TESTS) else ""
    if name in NEEDED_SUITES and not (SUITES / NEEDED_SUITES[name]).exists():
        return True
    lacking = missing(name)
    if lacking and os.environ.get("PENSTOCK_PEERS") == "required":
        raise pytest.UsageError(f"{name} needs {', '.join(lacking)}")
    return True if lacking else None


def pytest_report_header() -> list[str]:
    """Report the files that are left out."""
    left_out = {name: lacking for name in PROGRAMS if (lacking := missing(name))}
    left_out |= {name: [suite] for name, suite in NEEDED_SUITES.items() if not (SUITES / suite).exists()}
    return [f"not collected: {name}, missing: {', '.join(lacking)}" for name, lacking in left_out.items()]


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context
