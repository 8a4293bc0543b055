r"""Fixtures for tests of what sends mail: a real SMTP server in the test's process.

Every test has a server of its own, on a free port, with an empty inbox. With smtplib:

    import smtplib

    def test_a_welcome_is_sent(smtp_server):
        with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
            client.sendmail("shop@example.org", ["bob@example.org"], "Subject: Welcome\n\nHello Bob")
        message = smtp_server.inbox.last
        assert (message.sender, message.recipients, message.subject) == (
            "shop@example.org", ("bob@example.org",), "Welcome"
        )

With the options of penstock.testing.SmtpServer, in a marker of the test, its class or its module:

    import smtplib
    import pytest

    @pytest.mark.smtp_server(tls="starttls", users={"alice": "secret"}, require_auth=True)
    def test_mail_is_sent_safely(smtp_server):
        with smtplib.SMTP("localhost", smtp_server.port) as client:
            client.starttls(context=smtp_server.ssl_context())
            client.login("alice", "secret")
            client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Safe\n\nHello Bob")
        assert smtp_server.inbox.last.tls.version == "TLSv1.3"
        assert smtp_server.inbox.last.identity == "alice"

With a server that fails, once or by a whole plan (`penstock sink --describe-faults` prints what may stand in one):

    import smtplib
    import pytest

    def send(host, port):
        with smtplib.SMTP(host, port) as client:
            client.sendmail("shop@example.org", ["bob@example.org"], "Subject: Welcome\n\nHello Bob")

    def test_a_full_mailbox(smtp_server):
        smtp_server.fail_next("RCPT", 452, status="4.2.2", text="Mailbox full")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(smtp_server.host, smtp_server.port)
        send(smtp_server.host, smtp_server.port)  # another try
        assert len(smtp_server.inbox) == 1

    @pytest.mark.smtp_server(faults={"rule": [{"phase": "dot", "end": "reset"}]})
    def test_a_cable_that_is_cut(smtp_server):
        with pytest.raises(smtplib.SMTPServerDisconnected):
            send(smtp_server.host, smtp_server.port)
        assert [fault.action for fault in smtp_server.applied_faults] == ["reset"]

With Django (with pytest-django, set the same on its fixture `settings`):

    import pytest
    from django.core.mail import send_mail
    from django.test import override_settings

    @pytest.fixture
    def mailbox(smtp_server, monkeypatch):
        monkeypatch.setenv("SSL_CERT_FILE", str(smtp_server.ca_file))  # whom Django trusts; needed with TLS only
        with override_settings(**smtp_server.django_settings()):
            yield smtp_server.inbox

    @pytest.mark.smtp_server(tls="starttls", users={"shop": "secret"})
    def test_an_order_is_confirmed(mailbox):
        send_mail("Your order", "Thank you.", "shop@example.org", ["bob@example.org"])
        assert mailbox.last.text.strip() == "Thank you."

With aiosmtplib, in asyncio (here by anyio; pytest-asyncio does as well):

    import aiosmtplib
    import pytest

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.anyio
    async def test_a_report_is_mailed(smtp_server):
        await aiosmtplib.send(
            "Subject: Report\n\nAll is well.", sender="alice@example.org", recipients=["bob@example.org"],
            hostname=smtp_server.host, port=smtp_server.port,
        )
        message = await smtp_server.inbox.wait_for_async(subject="Report")
        assert message.text == "All is well.\n"

With trio, where smtplib has its place in a thread:

    import smtplib
    import pytest
    import trio

    def send(host, port):
        with smtplib.SMTP(host, port) as client:
            client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Report\n\nAll is well.")

    @pytest.mark.trio
    async def test_a_report_is_mailed(smtp_server, nursery):
        nursery.start_soon(trio.to_thread.run_sync, send, smtp_server.host, smtp_server.port)
        (message,) = await smtp_server.inbox.wait_async()
        assert message.subject == "Report"

When a test fails, its report has a section "smtp_server": what was received, and what was said at the end.

The fixtures are plain ones, so that they need no plugin for a loop, and tests may run at the same time (pytest-xdist).
Nothing of Penstock is imported here before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
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
    for node in request.node.listchain():
        for marker in _marks_of(node):
            if marker.name != "smtp_server":
                continue
            if marker.args:
                raise pytest.UsageError(
                    "the marker smtp_server takes keyword arguments only: smtp_server(tls='starttls')"
                )
            options.update(marker.kwargs)
    return smtp_server_factory(**options)


def _marks_of(node: pytest.Item | pytest.Collector) -> list[pytest.Mark]:
    """Return the marks of a node, the nearest at the end: a lower line, a derived class, a set of parameters.

    pytest has those of one decorated thing from its lowest line up, but those of base classes, and of the function that
    has parameters, before them.
    """
    own = node.own_markers
    groups: list[Sequence[pytest.Mark]] = []
    if isinstance(node, pytest.Class):
        groups = [_listed(kind.__dict__.get("pytestmark", ())) for kind in reversed(node.obj.__mro__)]
    elif isinstance(node, pytest.Function) and hasattr(node, "callspec"):
        groups = [_listed(node.callspec.marks)]
    grouped = [mark for group in groups for mark in reversed(group)]
    return [*(mark for mark in reversed(own) if mark not in grouped), *grouped]


def _listed(marks: Any) -> list[pytest.Mark]:
    """Return what `pytestmark` may be as a list of marks."""
    each = marks if isinstance(marks, list | tuple) else [marks]
    return [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in each]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Forget the servers of a test behind its last report: pytest keeps its items, and they would keep all mail."""
    try:
        return (yield)
    finally:
        item.stash.setdefault(_SERVERS, []).clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers of a test have received when it fails."""
    report = yield
    if report.failed:
        for server in item.stash.get(_SERVERS, ()):
            report.sections.append(("smtp_server", server.report()))
    return report
