r"""pytest fixtures for tests of code that sends mail: a real SMTP server in the process of the test.

`smtp_server` gives each test its own server, on a free port, with an empty inbox. With smtplib:

    import smtplib

    def test_a_welcome_is_sent(smtp_server):
        with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
            client.sendmail("shop@example.org", ["bob@example.org"], "Subject: Welcome\n\nHello Bob")
        [message] = smtp_server.assert_sent(to="bob@example.org", subject="Welcome", count=1)
        assert message.sender == "shop@example.org"

A marker of the test, its class or its module gives options of penstock.testing.SmtpServer:

    import smtplib
    import pytest

    @pytest.mark.smtp_server(tls="starttls", users={"alice": "secret"}, require_auth=True)
    def test_mail_is_sent_safely(smtp_server):
        with smtplib.SMTP("localhost", smtp_server.port) as client:
            client.starttls(context=smtp_server.ssl_context())
            client.login("alice", "secret")
            client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Safe\n\nHello Bob")
        assert smtp_server.latest().tls.version == "TLSv1.3"
        assert smtp_server.latest().identity == "alice"

A server for a module, a package or the whole session: call `smtp_server_factory` in a fixture of that scope. The server
stops when the fixture ends; a server that a test itself starts stops with the test.

    import smtplib
    import pytest

    @pytest.fixture(scope="session")
    def mail_server(smtp_server_factory):
        return smtp_server_factory(tls="implicit")

    @pytest.fixture(autouse=True)
    def empty_inbox(mail_server):
        mail_server.reset()

    @pytest.mark.parametrize("name", ["bob", "eve"])
    def test_a_welcome_is_sent(mail_server, name):
        with smtplib.SMTP_SSL("localhost", mail_server.port, context=mail_server.ssl_context()) as client:
            client.sendmail("shop@example.org", [f"{name}@example.org"], f"Subject: Welcome\n\nHello {name}")
        mail_server.assert_sent(count=1)

A server that fails, once or by a fault plan (`penstock sink --describe-faults` prints its keys):

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
    def test_a_connection_that_is_reset(smtp_server):
        with pytest.raises(smtplib.SMTPServerDisconnected):
            send(smtp_server.host, smtp_server.port)
        assert [fault.action for fault in smtp_server.applied_faults] == ["reset"]

Snapshots: `smtp_snapshot` compares text and HTML with files beside the test, in `__snapshots__`. Write them with
`pytest --smtp-snapshot-update`, review them, and commit them. `replace` hides what differs from run to run.

    import smtplib
    from email.message import EmailMessage

    def test_the_receipt_looks_as_before(smtp_server, smtp_snapshot):
        mail = EmailMessage()
        mail["Subject"] = "Your receipt"
        mail.set_content("Order 4711: 12 EUR")
        mail.add_alternative("<p>Order 4711: <b>12 EUR</b></p>", subtype="html")
        with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
            client.send_message(mail, "shop@example.org", ["bob@example.org"])
        smtp_snapshot(smtp_server.latest(), replace={r"Order \d+": "Order N"})

With Django (with pytest-django, set the same on its fixture `settings`):

    import pytest
    from django.core.mail import send_mail
    from django.test import override_settings

    @pytest.fixture
    def mailbox(smtp_server, monkeypatch):
        monkeypatch.setenv("SSL_CERT_FILE", str(smtp_server.ca_file))  # the CA that Django trusts, for TLS
        with override_settings(**smtp_server.django_settings()):
            yield smtp_server.inbox

    @pytest.mark.smtp_server(tls="starttls", users={"shop": "secret"})
    def test_an_order_is_confirmed(mailbox):
        send_mail("Your order", "Thank you.", "shop@example.org", ["bob@example.org"])
        assert mailbox.latest().text.strip() == "Thank you."

With Flask-Mail:

    from flask import Flask
    from flask_mail import Mail, Message

    def test_a_password_is_reset(smtp_server):
        app = Flask("shop")
        app.config.update(MAIL_SERVER=smtp_server.host, MAIL_PORT=smtp_server.port)
        mail = Mail(app)

        @app.post("/reset")
        def reset():
            html = '<a href="https://shop.example/reset?token=abc">Reset</a>'
            mail.send(Message("Reset", sender="shop@example.org", recipients=["bob@example.org"], html=html))
            return "sent"

        assert app.test_client().post("/reset").text == "sent"
        [link] = smtp_server.latest(to="bob@example.org").links
        assert link.endswith("?token=abc")

With FastAPI and aiosmtplib; a background task may still run when the response is there, so wait for the message:

    import aiosmtplib
    import httpx
    import pytest
    from fastapi import BackgroundTasks, FastAPI

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.anyio
    async def test_an_invitation_is_sent(smtp_server):
        app = FastAPI()

        async def invite(address: str) -> None:
            await aiosmtplib.send(
                "Subject: Invitation\n\nJoin us: https://shop.example/join", sender="shop@example.org",
                recipients=[address], hostname=smtp_server.host, port=smtp_server.port,
            )

        @app.post("/invite/{address}")
        async def post(address: str, tasks: BackgroundTasks) -> None:
            tasks.add_task(invite, address)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop.example") as client:
            response = await client.post("/invite/bob@example.org")
        assert response.status_code == 200
        message = await smtp_server.inbox.wait_for_async(recipient="bob@example.org", subject="Invitation")
        assert message.links == ("https://shop.example/join",)

With Celery, in a worker thread; a worker in another process does as well:

    import smtplib
    import pytest
    from celery import Celery
    from celery.contrib.testing.worker import start_worker

    app = Celery(broker="memory://", backend="cache+memory://")

    @app.task
    def send_report(host, port):
        with smtplib.SMTP(host, port) as client:
            client.sendmail("shop@example.org", ["bob@example.org"], "Subject: Report\n\nAll is well.")

    @pytest.mark.filterwarnings("default")
    def test_a_task_sends_the_report(smtp_server):
        with start_worker(app, perform_ping_check=False):
            send_report.delay(smtp_server.host, smtp_server.port)
            message = smtp_server.inbox.wait_for(subject="Report", timeout=30)
        assert message.text.strip() == "All is well."

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

With trio, where smtplib runs in a thread:

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

With Playwright: show the HTML of a message in a browser, and follow its link (`pip install playwright`; set
`executable_path` to a Chromium that is installed, or run `playwright install chromium`):

    import smtplib
    from email.message import EmailMessage
    from playwright.sync_api import sync_playwright

    def test_the_confirmation_link_works(smtp_server):
        mail = EmailMessage()
        mail["Subject"] = "Confirm"
        mail.add_alternative('<h1>Hello</h1><a href="http://shop.example/confirm?id=7">Confirm</a>', subtype="html")
        with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
            client.send_message(mail, "shop@example.org", ["bob@example.org"])
        message = smtp_server.latest()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page()
            page.route("http://shop.example/**", lambda route: route.fulfill(body="confirmed"))
            page.set_content(message.html)
            page.get_by_role("link", name="Confirm").click()
            assert page.url == message.links[0]
            assert page.inner_text("body") == "confirmed"
            browser.close()

When a test fails, its report has a section "smtp_server": the received messages and the end of the SMTP dialog.

The fixtures are synchronous, so that they need no plugin for an event loop, and tests may run in parallel
(pytest-xdist). Nothing of Penstock is imported before a test requests a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest

if TYPE_CHECKING:
    from penstock.testing import Authority, SmtpServer
    from penstock.testing.snapshot import Snapshots


class _Running(NamedTuple):
    """A server, and what it was started for."""

    server: SmtpServer
    node: object
    """The node of the fixture or test."""
    fixture: str | None
    """The fixture that started it; None for a test."""


class _State:
    """What the plugin knows of the run of pytest."""

    def __init__(self) -> None:
        self.setups: list[pytest.FixtureRequest] = []
        """The fixtures that are being set up, the innermost last."""
        self.item: pytest.Item | None = None
        """The test that is run."""
        self.servers: list[_Running] = []


_STATE = pytest.StashKey[_State]()


class SmtpServerFactory(Protocol):
    """The type of the fixture `smtp_server_factory`."""

    def __call__(self, **options: Any) -> SmtpServer:
        """Start a server with the options of penstock.testing.SmtpServer.

        It stops at the end of the fixture that called, or of the test.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the snapshots."""
    parser.getgroup("penstock").addoption(
        "--smtp-snapshot-update", action="store_true", help="Write the snapshots of messages rather than compare them."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.stash[_STATE] = _State()
    config.addinivalue_line(
        "markers",
        'smtp_server(**options): options of the smtp_server of a test, as for penstock.testing.SmtpServer: tls="none" '
        '(or "starttls", "implicit"), users={"name": "password"}, require_auth, require_tls, lmtp, max_size, ...',
    )


@pytest.fixture(scope="session")
def smtp_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return the certificate authority of all servers of the session: `ca_file`, and `ssl_context()` for clients."""
    from penstock.testing import Authority  # noqa: PLC0415 - other runs do not pay for it

    return Authority(tmp_path_factory.mktemp("penstock-authority"))


@pytest.fixture(scope="session")
def smtp_server_factory(request: pytest.FixtureRequest) -> SmtpServerFactory:
    """Return a function that starts servers, for fixtures of any scope and for tests that need several servers."""
    from penstock.testing import SmtpServer  # noqa: PLC0415 - other runs do not pay for it

    state = request.config.stash[_STATE]

    def start(**options: Any) -> SmtpServer:
        if options.get("tls", "none") != "none":
            options.setdefault("authority", request.getfixturevalue("smtp_authority"))
        server = SmtpServer(**options).start()
        if state.setups:
            owner = state.setups[-1]
            owner.addfinalizer(server.stop)
            state.servers.append(_Running(server, owner.node, owner.fixturename))
        else:
            item = state.item or request.session
            item.addfinalizer(server.stop)
            state.servers.append(_Running(server, item, None))
        return server

    return start


@pytest.fixture
def smtp_snapshot(request: pytest.FixtureRequest) -> Snapshots:
    """Return a function that compares the text and the HTML of a message with the snapshot of the test."""
    from penstock.testing.snapshot import Snapshots  # noqa: PLC0415 - other runs do not pay for it

    update: bool = request.config.getoption("smtp_snapshot_update")
    return Snapshots(request.path, request.node.name, update=update)


@pytest.fixture
def smtp_server(request: pytest.FixtureRequest, smtp_server_factory: SmtpServerFactory) -> SmtpServer:
    """Return a server with an empty inbox, with the options of the test's marker `smtp_server`.

    Markers of a class or a module apply to all of its tests; the nearest value of an option wins.
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
    """Return the marks of a node, the nearest last: of a lower line, a derived class, a set of parameters.

    pytest orders the marks of one decorated object from its lowest line up, but those of base classes, and of a
    function with parameters, come first.
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
    """Return the marks of a `pytestmark`, which may be one or several."""
    each = marks if isinstance(marks, list | tuple) else [marks]
    return [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in each]


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Note which fixture is being set up: a server that it starts stops with it."""
    setups = request.config.stash[_STATE].setups
    setups.append(request)
    try:
        return (yield)
    finally:
        setups.pop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Forget stopped servers after the last report of a test: pytest keeps its items, and they would keep all mail."""
    state = item.config.stash[_STATE]
    state.item = item
    try:
        return (yield)
    finally:
        state.item = None
        state.servers = [each for each in state.servers if each.server.is_running]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers of a test have received when it fails."""
    report = yield
    if report.failed:
        names: Sequence[str] = getattr(item, "fixturenames", ())
        for server, node, fixture in item.config.stash[_STATE].servers:
            if node is item or fixture in names:
                report.sections.append(("smtp_server", server.report()))
    return report
