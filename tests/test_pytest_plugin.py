"""The fixtures, in their own runs of pytest: each kind of test, libraries that send mail, pytest-xdist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import penstock.pytest_plugin
import penstock.testing  # a run within this one must not import compiled modules for the first time

pytest_plugins = ["pytester"]

SEND = """
import smtplib

def send(server, subject="Hello", recipient="bob@example.org"):
    with smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("alice@example.org", [recipient], f"Subject: {subject}\\n\\nHow are you?\\n")
"""


@pytest.fixture
def tests(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return a directory for tests, with a module that sends mail."""
    pytester.makepyfile(sending=SEND)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error\n")
    return pytester


def run(tests: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest in this process, which is quick."""
    return tests.runpytest_inprocess(*arguments)


def run_apart(tests: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest as users do, in its own process."""
    return tests.runpytest_subprocess(*arguments)


def test_each_test_has_a_server_of_its_own(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import pytest
        from sending import send

        @pytest.mark.parametrize("subject", ["one", "two"])
        def test_mail_arrives(smtp_server, subject):
            assert len(smtp_server.inbox) == 0
            send(smtp_server, subject)
            assert smtp_server.inbox.last.subject == subject
    """)
    run(tests).assert_outcomes(passed=2)


def test_the_nearest_marker_wins_option_by_option(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import smtplib
        import pytest
        from sending import send

        pytestmark = pytest.mark.smtp_server(max_size=1000, users={"alice": "secret"})

        @pytest.mark.smtp_server(require_auth=True)
        class TestClass:
            def test_of_the_class(self, smtp_server):
                with pytest.raises(smtplib.SMTPSenderRefused, match="Authentication required"):
                    send(smtp_server)

            @pytest.mark.smtp_server(require_auth=False, max_size=5)
            def test_of_the_function(self, smtp_server):
                with pytest.raises(smtplib.SMTPSenderRefused, match="Message too big"):
                    send(smtp_server)

        def test_of_the_module(smtp_server):
            send(smtp_server)
            with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
                client.ehlo()
            assert client.esmtp_features["size"] == "1000"
    """)
    run(tests).assert_outcomes(passed=3)


def test_the_nearest_of_classes_and_parameters_wins(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import smtplib
        import pytest

        def named(name):
            return pytest.mark.smtp_server(hostname=name)

        def name_of(server):
            with smtplib.SMTP(server.host, server.port) as client:
                return client.ehlo()[1].partition(b"\\n")[0].partition(b" ")[0]

        @named("base.example")
        class Base:
            pass

        @named("upper.example")
        @named("derived.example")
        class TestDerived(Base):
            def test_of_the_class(self, smtp_server):
                assert name_of(smtp_server) == b"derived.example"

        class TestPlain(Base):
            pytestmark = named("list.example")

            def test_of_the_class(self, smtp_server):
                assert name_of(smtp_server) == b"list.example"

        @named("upper.example")
        @named("function.example")
        @pytest.mark.parametrize("name", [
            b"function.example", pytest.param(b"parameter.example", marks=named("parameter.example"))
        ])
        def test_of_parameters(smtp_server, name):
            assert name_of(smtp_server) == name

        def test_of_a_marker_that_a_hook_adds(smtp_server):
            assert name_of(smtp_server) == b"hook.example"
    """)
    tests.makeconftest("""
        import pytest

        def pytest_collection_modifyitems(items):
            items[-1].add_marker(pytest.mark.smtp_server(hostname="hook.example"))
    """)
    run(tests).assert_outcomes(passed=5)


def test_received_mail_is_forgotten_after_the_report(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import gc
        import weakref
        from sending import send

        inboxes = []

        def test_one(smtp_server):
            send(smtp_server)
            inboxes.append(weakref.ref(smtp_server.inbox))

        def test_other():
            gc.collect()
            assert inboxes[0]() is None
    """)
    run(tests).assert_outcomes(passed=2)


def test_wrong_options_are_named(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import pytest

        @pytest.mark.smtp_server("starttls")
        def test_position(smtp_server):
            pass

        @pytest.mark.smtp_server(tsl="starttls")
        def test_misspelt(smtp_server):
            pass

        @pytest.mark.smtp_server(require_auth=True)
        def test_unfit(smtp_server):
            pass
    """)
    result = run(tests)
    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines_random(
        [
            "*the marker smtp_server takes keyword arguments only: smtp_server(tls='starttls')*",
            "*unexpected keyword argument 'tsl'*",
            "*require_auth=True needs users*",
        ]
    )


def test_several_servers_and_one_authority(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import smtplib
        from sending import send

        def test_several(smtp_server_factory, smtp_authority):
            plain = smtp_server_factory()
            safe = smtp_server_factory(tls="implicit")
            send(plain)
            with smtplib.SMTP_SSL("localhost", safe.port, context=smtp_authority.ssl_context()) as client:
                client.sendmail("alice@example.org", ["eve@example.org"], "Subject: Safe")
            assert plain.inbox.last.recipients == ("bob@example.org",)
            assert safe.inbox.last.tls.version == "TLSv1.3"
            assert safe.ca_file == smtp_authority.ca_file
    """)
    run(tests).assert_outcomes(passed=1)


def test_a_failing_test_shows_what_was_received_and_said(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        from sending import send

        def test_passes(smtp_server):
            send(smtp_server, "not shown")

        def test_fails(smtp_server):
            send(smtp_server, "A wrong subject")
            assert smtp_server.inbox.last.subject == "The right subject"

        def test_nobody_sends(smtp_server):
            smtp_server.inbox.wait(timeout=0)
    """)
    result = run(tests)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ test_fails _*",
            "*- smtp_server -*",
            "<SmtpServer 127.0.0.1:*>: 1 received",
            "[[]0[]] <alice@example.org> -> <bob@example.org>",
            "    Subject: A wrong subject (* octets, ESMTP)",
            "dialog:",
            "#1 -- connected from *",
            "#1 C: RCPT [Tt][Oo]:<bob@example.org>",
            "#1 S: 250 2.1.5 Recipient ok",
            "*_ test_nobody_sends _*",
            "E *TimeoutError: waited 0 s for 1 message; 0 messages in the inbox",
            "*- smtp_server -*",
            "no client has connected",
        ]
    )
    result.stdout.no_fnmatch_line("*not shown*")


def test_a_failed_assertion_is_shown_at_the_line_of_the_test(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        def test_sent(smtp_server):
            smtp_server.assert_sent(subject="Welcome")

        def test_latest(smtp_server):
            smtp_server.latest()

        def test_wait(smtp_server):
            smtp_server.inbox.wait_for(subject="Welcome", timeout=0)

        async def _wait(server):
            await server.inbox.wait_async(timeout=0)

        def test_wait_async(smtp_server):
            import trio
            trio.run(_wait, smtp_server)
    """)
    result = run(tests)
    result.assert_outcomes(failed=4)
    result.stdout.no_fnmatch_line("*inbox.py:*")
    result.stdout.fnmatch_lines(
        [">*smtp_server.assert_sent*", "E *expected at least 1 message with subject 'Welcome'*"]
    )


def test_a_failure_of_the_server_is_an_error_of_the_test(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import smtplib
        import pytest
        from penstock.testing import Inbox
        from sending import send

        def test_server_breaks(smtp_server, monkeypatch):
            monkeypatch.setattr(Inbox, "put", lambda inbox, message: 1 / 0)
            with pytest.raises(smtplib.SMTPDataError):
                send(smtp_server)
    """)
    result = run(tests)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["E *RuntimeError: the server has failed: ZeroDivisionError: division by zero", "*- smtp_server -*"]
    )


def test_processes_of_xdist_do_not_disturb_each_other(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import smtplib
        import pytest

        @pytest.mark.smtp_server(tls="starttls")
        @pytest.mark.parametrize("number", range(16))
        def test_mail_arrives(smtp_server, number):
            with smtplib.SMTP("localhost", smtp_server.port) as client:
                client.starttls(context=smtp_server.ssl_context())
                client.sendmail("alice@example.org", ["bob@example.org"], f"Subject: {number}")
            assert [message.subject for message in smtp_server.inbox] == [str(number)]
            assert number != 7
    """)
    result = run_apart(tests, "-n", "2")
    result.assert_outcomes(passed=15, failed=1)
    result.stdout.fnmatch_lines(["*- smtp_server -*", "    Subject: 7 (* octets, ESMTPS, TLSv1.3)"])


def test_anyio_tests_wait_in_asyncio_and_in_trio(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import anyio
        import pytest
        from sending import send

        pytestmark = pytest.mark.anyio

        @pytest.fixture(params=["asyncio", "trio"])
        def anyio_backend(request):
            return request.param

        async def test_mail_arrives(smtp_server):
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.to_thread.run_sync, send, smtp_server)
                message = await smtp_server.inbox.wait_for_async(recipient="bob@example.org")
            assert message.subject == "Hello"
    """)
    run(tests, "-p", "anyio").assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["trio_mode = true", "trio_mode = false"])
def test_trio_tests_wait_with_and_without_the_mode(tests: pytest.Pytester, mode: str) -> None:
    tests.makeini(f"[pytest]\n{mode}\n")
    tests.makepyfile("""
        import pytest
        import trio
        from sending import send

        @pytest.mark.trio
        async def test_mail_arrives(smtp_server, nursery):
            nursery.start_soon(trio.to_thread.run_sync, send, smtp_server)
            (message,) = await smtp_server.inbox.wait_async()
            assert message.subject == "Hello"

        def test_without_a_loop(smtp_server):
            send(smtp_server)
            assert len(smtp_server.inbox) == 1
    """)
    run(tests).assert_outcomes(passed=2)


def test_aiosmtplib_sends(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        from email.message import EmailMessage

        import aiosmtplib
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        @pytest.mark.smtp_server(tls="starttls", users={"alice": "secret"}, require_auth=True)
        async def test_a_report_is_mailed(smtp_server):
            message = EmailMessage()
            message["From"], message["To"], message["Subject"] = "alice@example.org", "bob@example.org", "Report"
            message.set_content("All is well.")
            await aiosmtplib.send(
                message,
                hostname="localhost",
                port=smtp_server.port,
                username="alice",
                password="secret",
                tls_context=smtp_server.ssl_context(),
            )
            assert smtp_server.inbox.last.text == "All is well.\\n"
            assert smtp_server.inbox.last.identity == "alice"
    """)
    run(tests).assert_outcomes(passed=1)


@pytest.mark.parametrize(("tls", "protocol"), [("none", "ESMTPA"), ("starttls", "ESMTPSA"), ("implicit", "ESMTPSA")])
def test_django_sends(tests: pytest.Pytester, tls: str, protocol: str) -> None:
    tests.makepyfile(f"""
        import pytest
        from django.conf import settings
        from django.core.mail import EmailMultiAlternatives, send_mail
        from django.test import override_settings

        settings.configure()

        @pytest.fixture
        def mailbox(smtp_server, monkeypatch):
            monkeypatch.setenv("SSL_CERT_FILE", str(smtp_server.ca_file))
            with override_settings(**smtp_server.django_settings()):
                yield smtp_server.inbox

        @pytest.mark.smtp_server(tls="{tls}", users={{"shop": "secret"}}, require_auth=True)
        def test_an_order_is_confirmed(mailbox):
            assert send_mail("Your order", "Thank you.", "shop@example.org", ["bob@example.org"]) == 1
            mail = EmailMultiAlternatives("Grüße", "plain", "shop@example.org", ["eve@example.org"])
            mail.attach_alternative("<p>html</p>", "text/html")
            mail.send()
            first, second = mailbox
            assert (first.subject, first.text.strip()) == ("Your order", "Thank you.")
            assert (second.subject, second.html.strip()) == ("Grüße", "<p>html</p>")
            assert (second.sender, second.identity) == ("shop@example.org", "shop")
            assert second.protocol == "{protocol}"
    """)
    run_apart(tests).assert_outcomes(passed=1)


@pytest.mark.parametrize("scope", ["session", "package", "module", "class"])
def test_a_server_lives_as_long_as_its_fixture(tests: pytest.Pytester, scope: str) -> None:
    tests.makepyfile(f"""
        import pytest
        from sending import send

        servers = []

        @pytest.fixture(scope="{scope}")
        def shared(smtp_server_factory):
            server = smtp_server_factory(tls="starttls")
            yield server
            assert server.is_running, "it stops after the teardown of the fixture"
            send(server)

        class TestClass:
            @pytest.mark.parametrize("number", [1, 2])
            def test_shared(self, shared, number):
                send(shared)
                servers.append(shared)
                assert len(shared.inbox) == number

        def test_after(request):
            assert servers[0] is servers[1]
            assert servers[0].is_running is ("{scope}" != "class")
    """)
    run(tests).assert_outcomes(passed=3)


def test_a_server_started_by_a_test_stops_with_the_test(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import pytest

        servers = []

        @pytest.fixture
        def inner(smtp_server_factory):
            servers.append(smtp_server_factory())
            yield

        def test_starts(smtp_server_factory, inner):
            servers.append(smtp_server_factory())
            assert all(server.is_running for server in servers)

        def test_after():
            assert [server.is_running for server in servers] == [False, False]
    """)
    run(tests).assert_outcomes(passed=2)


def test_a_failing_test_shows_the_shared_server_it_uses(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import pytest
        from sending import send

        @pytest.fixture(scope="module")
        def shared(smtp_server_factory):
            return smtp_server_factory()

        def test_uses_it(shared):
            send(shared, "shown")
            assert False

        def test_uses_none():
            assert False
    """)
    result = run(tests)
    result.assert_outcomes(failed=2)
    assert result.stdout.str().count("- smtp_server -") == 1
    result.stdout.fnmatch_lines(["    Subject: shown (*"])


SNAPSHOT = """
    import smtplib
    from email.message import EmailMessage
    import pytest

    @pytest.mark.parametrize("name", ["a b", "a/b"])
    def test_mail(smtp_server, smtp_snapshot, name):
        for number in (1, 2):
            mail = EmailMessage()
            mail.set_content(f"TEXT {name} {number} at 12:34\\n")
            mail.add_alternative("<p>Grüße</p>", subtype="html")
            with smtplib.SMTP(smtp_server.host, smtp_server.port) as client:
                client.send_message(mail, "a@example.org", ["b@example.org"])
            smtp_snapshot(smtp_server.latest(), replace={r"\\d\\d:\\d\\d": "HH:MM"})
"""


def test_snapshots_are_written_compared_and_updated(tests: pytest.Pytester) -> None:
    tests.makepyfile(test_snap=SNAPSHOT)
    result = run_apart(tests)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*there is no snapshot *test_mail_a_b_*.txt; *--smtp-snapshot-update"])
    run_apart(tests, "--smtp-snapshot-update").assert_outcomes(passed=2)
    files = sorted((tests.path / "__snapshots__" / "test_snap").iterdir())
    assert len(files) == 8, "text and HTML, two messages, two tests with names alike"
    assert "HH:MM" in files[1].read_text()
    run_apart(tests).assert_outcomes(passed=2)
    tests.makepyfile(test_snap=SNAPSHOT.replace("TEXT", "Other"))
    result = run_apart(tests)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["*the message differs from its snapshot*", "*-TEXT a b 1 at HH:MM", "*+Other a b 1 at HH:MM"]
    )


def test_html_that_is_gone_differs_from_its_snapshot(tests: pytest.Pytester) -> None:
    tests.makepyfile(test_snap=SNAPSHOT)
    run_apart(tests, "--smtp-snapshot-update").assert_outcomes(passed=2)
    plain = "\n".join(line for line in SNAPSHOT.splitlines() if "alternative" not in line)
    tests.makepyfile(test_snap=plain)
    result = run_apart(tests)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*-<p>Grüße</p>"])
    run_apart(tests, "--smtp-snapshot-update").assert_outcomes(passed=2)
    assert not list((tests.path / "__snapshots__" / "test_snap").glob("*.html"))


EXAMPLES = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", penstock.pytest_plugin.__doc__ or "")
"""The indented parts of the documentation."""
LIBRARIES = {"flask", "flask_mail", "fastapi", "celery", "playwright"}
"""Libraries that examples use and that this machine need not have."""


def can_run(example: str) -> bool:
    """Return whether the libraries of an example, and its browser, are installed."""
    used = {name for name in LIBRARIES if re.search(rf"(?m)^ *(?:import|from) {name}\b", example)}
    browsers = re.findall(r'executable_path="([^"]+)"', example)
    return all(map(importlib.util.find_spec, used)) and all(Path(browser).exists() for browser in browsers)


def test_the_documentation_has_its_examples() -> None:
    assert len(EXAMPLES) == 12


@pytest.mark.parametrize(
    "example", [each for each in EXAMPLES if can_run(each)], ids=lambda example: example.split()[-1]
)
def test_the_examples_of_the_documentation_run(tests: pytest.Pytester, example: str) -> None:
    tests.makepyfile(textwrap.dedent(example))
    if "django" in example:
        tests.makeconftest("from django.conf import settings\n\nsettings.configure()\n")
    if "smtp_snapshot" in example:
        run_apart(tests, "--smtp-snapshot-update").assert_outcomes(passed=1)
    passed = run_apart(tests).parseoutcomes()
    assert set(passed) <= {"passed", "warnings"}
    assert passed["passed"] >= example.count("def test_")


def test_unittest_uses_the_server_without_a_fixture(tests: pytest.Pytester) -> None:
    tests.makepyfile("""
        import unittest
        from penstock.testing import SmtpServer
        from sending import send

        class TestMail(unittest.TestCase):
            def setUp(self):
                self.server = self.enterContext(SmtpServer())

            def test_mail_arrives(self):
                send(self.server)
                self.assertEqual(self.server.inbox.last.subject, "Hello")
    """)
    run(tests).assert_outcomes(passed=1)


def test_the_marker_and_the_fixtures_are_listed(tests: pytest.Pytester) -> None:
    run(tests, "--markers").stdout.fnmatch_lines(["@pytest.mark.smtp_server(*options): options of *"])
    run(tests, "--fixtures").stdout.fnmatch_lines_random(
        [
            "smtp_authority *session scope*",
            "smtp_server --*",
            "smtp_server_factory *session scope*",
            "smtp_snapshot --*",
        ]
    )


def test_a_run_that_needs_no_server_imports_nothing_of_it() -> None:
    script = "import sys, pytest, penstock.pytest_plugin; print(*sorted(m for m in sys.modules if 'penstock' in m))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["penstock", "penstock.pytest_plugin"]
