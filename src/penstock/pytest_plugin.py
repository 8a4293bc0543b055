"""Fixtures for tests of what sends mail: a real SMTP server in the test's process.

    def test_a_welcome_is_sent(smtp_server):
        register("bob@example.org", mail_host=smtp_server.host, mail_port=smtp_server.port)
        assert smtp_server.inbox.wait_for(recipient="bob@example.org").subject == "Welcome"

    @pytest.mark.smtp_server(tls="starttls", users={"alice": "secret"}, require_auth=True)
    def test_mail_is_sent_safely(smtp_server): ...

When a test fails, its report has a section "smtp_server": what was received, and what was said at the end.

The fixtures are plain ones: they work for tests without a loop and for those of pytest-trio, anyio and pytest-asyncio.
Every test has a server of its own, on a free port, so that tests may run at the same time (pytest-xdist). Nothing of
Penstock is imported here before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from penstock.testing import Authority, SmtpServer

_SERVERS = pytest.StashKey[list["SmtpServer"]]()
"""The servers of a test, for its report."""


class SmtpServerFactory(Protocol):
    """What the fixture `smtp_server_factory` is."""

    def __call__(self, **options: Any) -> SmtpServer:
        """Start a server with the options of penstock.testing.SmtpServer; it is stopped at the end of the test."""


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        'smtp_server(**options): the options of the test\'s smtp_server, as of penstock.testing.SmtpServer: tls="none" '
        '(or "starttls", "implicit"), users={"name": "password"}, require_auth, require_tls, lmtp, max_size, ...',
    )


@pytest.fixture(scope="session")
def smtp_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return the certificate authority of all servers of the session: `ca_file`, and `ssl_context()` for clients."""
    from penstock.testing import Authority  # noqa: PLC0415 - runs without such a test do not pay for it

    return Authority(tmp_path_factory.mktemp("penstock-authority"))


@pytest.fixture
def smtp_server_factory(request: pytest.FixtureRequest) -> Iterator[SmtpServerFactory]:
    """Return a function that starts servers, for tests that need several."""
    from penstock.testing import SmtpServer  # noqa: PLC0415 - runs without such a test do not pay for it

    servers: list[SmtpServer] = []
    request.node.stash[_SERVERS] = servers
    with ExitStack() as running:

        def start(**options: Any) -> SmtpServer:
            if options.get("tls", "none") != "none":
                options.setdefault("authority", request.getfixturevalue("smtp_authority"))
            server = running.enter_context(SmtpServer(**options))
            servers.append(server)
            return server

        yield start


@pytest.fixture
def smtp_server(request: pytest.FixtureRequest, smtp_server_factory: SmtpServerFactory) -> SmtpServer:
    """Return a server with an empty inbox, with the options of the test's marker `smtp_server`.

    Markers of a class or a module hold for all of its tests; of an option that several give, the nearest wins.
    """
    options: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers("smtp_server"))):
        if marker.args:
            raise pytest.UsageError("the marker smtp_server takes keyword arguments only: smtp_server(tls='starttls')")
        options.update(marker.kwargs)
    return smtp_server_factory(**options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers of a test have received when it fails."""
    report = yield
    if report.failed:
        for server in item.stash.get(_SERVERS, ()):
            report.sections.append(("smtp_server", server.report()))
    return report
