"""The page of a sink in a real browser, without a screen."""

from __future__ import annotations

import re
import shutil
import smtplib
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from penstock.sink.web.app import MAX_STREAMS
from penstock.testing import SmtpServer
from tests.e2e.running import Server, serving
from tests.sink.mails import FORWARDED, INVITATION, PNG, encoded, mixed
from tests.tagged import marked, send_marked

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PHONE, _TABLET, _DESKTOP = (390, 844), (820, 1180), (1280, 900)
_PLAN = """\
# a comment
[[rule]]
name = "full"
phase = "rcpt"
match = { recipient = ["full@*"] }
reply = "452 4.2.2 Full"
"""
_REFUSING = """
const ask = window.fetch, headers = {"content-type": "application/json"};
const refused = () => Promise.resolve(new Response('{"error": "not from this page"}', {status: 403, headers}));
window.fetch = (path, options) => options?.method === "POST" ? refused() : ask(path, options);
"""
_CONTRASTS = (Path(__file__).parent / "contrast.js").read_text()


@contextmanager
def browser(width: int, height: int, scheme: str = "light") -> Iterator[webdriver.Chrome]:
    """Open a browser that prefers a scheme and has a screen of this size."""
    with tempfile.TemporaryDirectory(prefix="penstock-browser-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            driver.set_page_load_timeout(60)
            yield driver
        finally:
            driver.quit()


class Page:
    """The page, as a user sees it."""

    def __init__(self, driver: webdriver.Chrome, server: Server, path: str = "") -> None:
        found = re.search(r"live page at (http://\S+)", server.journal.read_text())
        assert found is not None
        self.driver = driver
        self.url = found[1]
        self.port = int(found[1].rpartition(":")[2].strip("/"))
        driver.get(found[1] + path)

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.wait(lambda: self.find(selector).is_displayed())
        self.find(selector).click()

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def wait(self, is_so: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 60).until(lambda _: is_so())

    def run(self, script: str) -> object:
        return self.driver.execute_script(f"return {script}")

    def fits(self) -> bool:
        return bool(self.run("document.documentElement.scrollWidth <= innerWidth"))

    def low_contrasts(self) -> object:
        """Return the visible texts whose contrast is below AA (WCAG 2.1, 1.4.3)."""
        return self.driver.execute_script(_CONTRASTS)

    def press(self, key: str) -> None:
        ActionChains(self.driver).send_keys(key).perform()

    def complaints(self) -> list[object]:
        """Return what the browser has logged about the page."""
        return list(self.driver.get_log("browser"))  # type: ignore[no-untyped-call]


@contextmanager
def sink(folder: Path, *options: str, web: str = "127.0.0.1:0") -> Iterator[Server]:
    with serving(folder / "data", "", "sink", "--web", web, "--keep", "last:200", *options) as server:
        yield server


def send(
    server: Server, count: int, text: str = "Subject: hello\r\n\r\nhi\r\n", recipient: str = "b@example.org"
) -> None:
    send_marked(server.port, [marked("page", number, recipient=recipient, text=text) for number in range(1, count + 1)])


def send_raw(server: Server, raw: bytes, *recipients: str) -> None:
    with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
        client.sendmail("a@example.com", recipients or ["b@example.org"], raw)


def letter(html: str, *attachments: bytes) -> bytes:
    """Return a message with HTML, an image within it, and attachments."""
    page = f"Content-Type: text/html; charset=utf-8\r\n\r\n{html}".encode()
    image = encoded(PNG, b"Content-Type: image/png\r\nContent-ID: <logo>\r\n")
    header = b"From: =?utf-8?q?J=C3=BCrgen?= <j@example.com>\r\nSubject: =?utf-8?q?gr=C3=BC=C3=9Fe?= <b>\r\n"
    return mixed(mixed(page, image, kind=b"related", boundary=b"r"), *attachments, header=header, boundary=b"outer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [_PHONE, _TABLET, _DESKTOP])
def test_all_views_fit_the_screen_and_can_be_read(tmp_path: Path, size: tuple[int, int], scheme: str) -> None:
    (tmp_path / "plan.toml").write_text(_PLAN)
    options = ("--faults", str(tmp_path / "plan.toml"))
    with sink(tmp_path, *options) as server, browser(*size, scheme) as driver:
        page = Page(driver, server)
        page.wait(lambda: page.text("#state") == "live")
        send(server, 7)
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server, 1, recipient="full@example.org")
        page.wait(lambda: "Accepted\n7\n" in page.text("#facts") and "full rcpt" in page.text("#faults"))
        page.wait(lambda: page.count(".plot .line.s-a"))
        assert "None missing, no duplicates" in page.text("#sequences")
        assert "message 250 2.0.0 7" in page.text("#replies")
        assert "message 7" in page.text("#latencies")
        assert "Deferred (4xx)\n1\nRCPT 1" in page.text("#facts")
        page.wait(lambda: page.find("#plan-text").get_attribute("value") == _PLAN)
        assert page.fits()
        assert page.low_contrasts() == []
        send_raw(server, letter("<p>text</p>", FORWARDED), "b@example.org", "c@example.org")
        page.click("#to-mail")
        page.wait(lambda: page.count("#list li") == 8)
        assert page.fits()
        assert page.low_contrasts() == []
        for word in ("Jürgen", "grüße <b>", "1"):
            assert word in page.text("#list li")
        page.click("#list a")
        page.wait(lambda: page.count("#panel iframe"))
        for tab in ("html", "source", "headers", "raw", "parts"):
            page.click(f"#tab-{tab}")
            assert page.fits(), tab
            assert page.low_contrasts() == [], tab
        red, green, blue = map(
            int, re.findall(r"\d+", str(page.run("getComputedStyle(document.body).backgroundColor")))[:3]
        )
        assert (red + green + blue < 150) == (scheme == "dark")
        assert page.complaints() == []


# ---- the connection


def test_a_page_without_a_stream_asks_once_a_second(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver, ExitStack() as streams:
        page = Page(driver, server)
        connection = "document.documentElement.dataset.connection"
        page.wait(lambda: page.run(connection) == "events")
        driver.get("about:blank")
        for _ in range(MAX_STREAMS):
            stream = streams.enter_context(socket.create_connection(("127.0.0.1", page.port), 60))
            stream.sendall(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert stream.recv(1024).startswith(b"HTTP/1.1 200")
        driver.back()
        page.wait(lambda: page.run(connection) == "polling" and page.text("#state") == "live")
        send(server, 3)
        page.wait(lambda: "message 250 2.0.0 3" in page.text("#replies"))


def test_a_page_continues_with_a_restarted_sink(tmp_path: Path) -> None:
    with browser(*_DESKTOP) as driver:
        with sink(tmp_path) as server:
            page = Page(driver, server)
            send(server, 3)
            page.wait(lambda: "message 250 2.0.0 3" in page.text("#replies"))
        page.wait(lambda: page.text("#state") == "no connection to the sink")
        with sink(tmp_path, web=f"127.0.0.1:{page.port}") as server:
            page.wait(lambda: page.text("#state") == "live" and "message" not in page.text("#replies"))
            send(server, 2)
            page.wait(lambda: "message 250 2.0.0 2" in page.text("#replies"))


# ---- the run


def test_a_plot_is_read_with_the_keyboard(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        plot = page.find(".plot svg")
        page.wait(lambda: "now" in str(plot.get_attribute("aria-label")))
        page.wait(lambda: page.count(".plot .line.s-a"))
        driver.execute_script("arguments[0].focus()", plot)
        plot.send_keys(Keys.ARROW_LEFT)
        page.wait(lambda: re.search(r", at \d+:\d\d: messages", str(plot.get_attribute("aria-label"))))
        plot.send_keys(Keys.ESCAPE)
        page.wait(lambda: ", now: messages" in str(plot.get_attribute("aria-label")))


def test_the_whole_run_is_shown(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        send(server, 3)
        page.find("#window").send_keys("the whole run")
        page.wait(lambda: "Whole run: 3," in page.text("#facts") and page.count(".plot .line.s-a"))


def test_duplicates_without_tags_are_found_by_message_id(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        for _ in range(2):
            send_raw(server, b"Message-ID: <one@example.com>\r\n\r\nhi\r\n")
        send_raw(server, b"\r\nhi\r\n")
        page = Page(driver, server)
        page.wait(lambda: "duplicated 1 1 1" in page.text("#sequences"))
        assert "1 duplicates" in page.text("#facts")


def test_the_fault_plan_is_edited(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        plan = page.find("#plan-text")
        page.wait(lambda: "No plan is in force" in page.text("#plan-state"))
        plan.send_keys("[[rule]]\nfase = 1\n")
        page.wait(lambda: "fase" in page.text("#plan-state"))
        assert plan.get_attribute("aria-invalid") == "true"
        driver.execute_script("arguments[0].value = arguments[1]", plan, _PLAN)
        plan.send_keys("\n")
        page.wait(lambda: page.text("#plan-state") == "Valid: 1 rule (full), not yet in force.")
        page.click("#plan [type=submit]")
        page.wait(lambda: page.text("#plan-state") == "This plan is in force.")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server, 1, recipient="full@example.org")
        driver.refresh()
        plan = page.find("#plan-text")
        page.wait(lambda: str(plan.get_attribute("value")).startswith("# a comment\n[[rule]]"))
        page.find("#plan-example").send_keys("Outages")
        page.click("#plan-insert")
        page.wait(lambda: page.text("#plan-state") == "Valid: 2 rules (full, outage), not yet in force.")
        page.click("#fail [type=submit]")
        page.wait(lambda: "will be answered with 450" in page.text("#fail-state"))
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server, 1)
        page.wait(lambda: "full rcpt" in page.text("#faults") and "fail-next" in page.text("#faults"))


def test_the_counters_are_reset(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        send(server, 3)
        page.wait(lambda: "message 250 2.0.0 3" in page.text("#replies"))
        page.click("#reset")
        driver.switch_to.alert.accept()
        page.wait(lambda: "message" not in page.text("#replies"))


def test_an_error_of_the_api_is_shown(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        page.wait(lambda: page.text("#state") == "live")
        driver.execute_script(_REFUSING)
        page.click("#reset")
        driver.switch_to.alert.accept()
        page.wait(lambda: page.text("#alert-text") == "Error: not from this page")
        page.click("#alert-close")
        assert not page.find("#alert").is_displayed()


# ---- the mail


def test_html_is_shown_without_scripts_and_without_the_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tracker, sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        tracker.setblocking(False)
        place = f"http://127.0.0.1:{tracker.getsockname()[1]}"
        send_raw(
            server,
            letter(
                f"<h1>hi</h1><img id=own src='cid:logo'><img src='{place}/x.png'>"
                f"<a href='{page_of(server)}api/health'>link</a>"
                f"<script>parent.location='{place}'; document.title='run'</script>"
            ),
        )
        page = Page(driver, server, "#/mail")
        page.click("#list a")
        page.wait(lambda: page.text("#message-title") == "grüße <b>")
        frame = page.find("#panel iframe")
        driver.switch_to.frame(frame)
        page.wait(lambda: page.text("h1") == "hi")
        assert page.run("document.getElementById('own').naturalWidth") == 1
        assert page.run("document.title") == ""
        page.find("a").click()
        page.wait(lambda: len(driver.window_handles) == 2)
        driver.switch_to.window(driver.window_handles[1])
        page.wait(lambda: "ok" in page.text("body"))
        driver.switch_to.window(driver.window_handles[0])
        assert page.text("#message-title") == "grüße <b>"
        with pytest.raises(BlockingIOError):
            tracker.accept()
        page.click("#panel .remote")
        tracker.settimeout(60)
        tracker.accept()[0].close()


def page_of(server: Server) -> str:
    found = re.search(r"live page at (http://\S+)", server.journal.read_text())
    assert found is not None
    return found[1]


def test_a_message_is_shown_in_the_widths_of_devices(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        send_raw(server, letter("<p>text</p>"))
        page = Page(driver, server, "#/mail")
        page.click("#list a")
        page.wait(lambda: page.count("#panel iframe"))
        for number, width in ((2, 768), (3, 375)):
            page.click(f"#panel .group button:nth-child({number})")
            assert page.find("#panel iframe").rect["width"] == width


def test_every_part_can_be_viewed_or_saved(tmp_path: Path) -> None:
    attachments = (
        FORWARDED,
        INVITATION,
        b"Content-Type: message/rfc822\r\n\r\nFrom: i@example.net\r\nSubject: inner\r\n\r\ninner text",
        b'Content-Type: text/plain\r\nContent-Disposition: attachment; filename="notes.txt"\r\n\r\nsome notes',
        encoded(PNG, b"Content-Type: image/png\r\nContent-Disposition: attachment; filename=a b.png\r\n"),
    )
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        send_raw(server, letter("<p>text</p>", *attachments))
        page = Page(driver, server, "#/mail")
        page.click("#list a")
        page.wait(lambda: page.count("#attachments li") == 4)
        for name in ("inner", "notes.txt", "a b.png"):
            assert name in page.text("#attachments")
        for link in driver.find_elements(By.CSS_SELECTOR, "#attachments a[download]"):
            status = driver.execute_async_script(
                "fetch(arguments[0]).then((answer) => arguments[1](answer.status))", link.get_attribute("href")
            )
            assert status == 200
        page.click("#tab-text")
        assert "You are invited" in page.text("#panel")
        for view in driver.find_elements(By.CSS_SELECTOR, "#attachments button")[-1:]:
            view.click()
        page.wait(lambda: "inner text" in page.text("#panel"))
        for summary in driver.find_elements(By.CSS_SELECTOR, "#panel details:not([open]) summary"):
            summary.click()
        page.wait(
            lambda: page.run("[...document.querySelectorAll('#panel .tree img')].every((each) => each.naturalWidth)")
        )
        assert "some notes" in page.text("#panel")
        assert "Kick, off" in page.text("#panel")


def test_many_texts_are_shown_some_at_a_time(tmp_path: Path) -> None:
    texts = [b"Content-Type: text/html\r\n\r\n<p>text %d</p>" % number for number in range(50)]
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        send_raw(server, mixed(*texts))
        page = Page(driver, server, "#/mail")
        page.click("#list a")
        page.wait(lambda: page.count("#panel iframe") == 20 and page.text("#panel .more") == "Show more: 30 parts")
        page.click("#panel .more")
        page.click("#panel .more")
        page.wait(lambda: page.count("#panel iframe") == 50 and not page.count("#panel .more"))


def test_mail_is_read_with_the_keyboard(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        for number in (1, 2, 3):
            send(server, 1, f"Subject: number {number}\r\n\r\nhi\r\n")
        page = Page(driver, server, "#/mail")
        page.wait(lambda: page.count("#list .unread") == 3)
        page.press("j")
        page.press("j")
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        page.wait(lambda: page.text("#message-title") == "number 2")
        assert str(page.run("location.hash")).startswith("#/mail/")
        page.press(Keys.ARROW_RIGHT)
        page.wait(lambda: page.text("#message-title") == "number 1")
        page.press(Keys.ARROW_LEFT)
        page.wait(lambda: page.text("#message-title") == "number 2")
        page.press(Keys.DELETE)
        page.wait(lambda: page.text("#message-title") == "number 1")
        page.press(Keys.ESCAPE)
        page.wait(lambda: page.count("#list li") == 2 and page.count("#list .unread") == 1)
        driver.back()
        page.wait(lambda: page.text("#message-title") == "number 1")
        page.click("#unread")
        page.wait(lambda: page.count("#list .unread") == 2)


def test_a_message_has_a_url_of_its_own(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        send(server, 2)
        page = Page(driver, server, "#/mail")
        page.click("#list li:last-child a")
        page.wait(lambda: page.text("#message-title") == "hello")
        url = driver.current_url
        driver.get("about:blank")
        driver.get(url)
        page.wait(lambda: page.text("#message-title") == "hello" and page.text("#position") == "2 of 2")
        assert str(page.find("#save").get_attribute("download")).endswith(".eml")
        driver.get("about:blank")
        driver.get(f"{page.url}#/mail/NOWHERE")
        page.wait(lambda: page.text("#trouble") == "this message is not kept, or no longer")


def test_the_list_is_true_while_mail_arrives_and_is_deleted(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server, "#/mail")
        send(server, 3, "Subject: first\r\n\r\nneedle\r\n")
        send(server, 70)
        rows = "#list li"
        page.wait(lambda: page.count(rows) == 50)
        page.click("#more")
        page.wait(lambda: page.count(rows) == 73)
        send(server, 1)
        page.wait(lambda: page.count(rows) == 74)
        page.find("#query").send_keys("needle -nothing")
        page.wait(lambda: page.count(rows) == 3 and page.text("#messages-said") == "3 found among 74 messages")
        assert driver.current_url.endswith("#/mail?q=needle%20-nothing")
        send(server, 1, "Subject: late\r\n\r\nneedle\r\n")
        page.wait(lambda: page.count(rows) == 4)
        page.click("#delete-all")
        driver.switch_to.alert.accept()
        page.wait(lambda: page.text("#messages-said") == "Nothing found among 71 messages")
        assert page.count(rows) == 0
        page.find("#query").clear()
        page.find("#query").send_keys("size:x")
        page.wait(lambda: "expected one like size:>1M" in page.text("#messages-said"))
        page.find("#query").clear()
        page.find("#query").send_keys(Keys.ENTER)
        page.wait(lambda: page.count(rows) == 50)
        page.click("#delete-all")
        driver.switch_to.alert.accept()
        page.wait(lambda: page.text("#messages-said") == "No message so far.")


def test_a_message_is_released(tmp_path: Path) -> None:
    with ExitStack() as stack:
        hop = stack.enter_context(SmtpServer())
        server = stack.enter_context(sink(tmp_path, "--release", f"{hop.host}:{hop.port}"))
        send(server, 1)
        page = Page(stack.enter_context(browser(*_PHONE)), server, "#/mail")
        page.click("#list a")
        page.click("#release")
        page.find("#release-to").send_keys("real@example.org", Keys.ENTER)
        page.wait(lambda: page.text("#release-said") == "Released to real@example.org.")
        assert hop.inbox.last.recipients == ("real@example.org",)
        assert hop.inbox.last.subject == "hello"


def test_a_page_works_below_a_prefix(tmp_path: Path) -> None:
    with sink(tmp_path, "--web-origin", "http://localhost/a/sink/") as server, browser(*_DESKTOP) as driver:
        send_raw(server, letter("<p>text</p>"))
        page = Page(driver, server, "a/sink/#/mail")
        page.click("#list a")
        page.wait(lambda: page.count("#panel iframe") and page.text("#state") == "live")
        driver.switch_to.frame(page.find("#panel iframe"))
        page.wait(lambda: page.text("p") == "text")
        driver.switch_to.default_content()
        page.click("#delete")
        page.wait(lambda: page.text("#messages-said") == "No message so far.")
        assert page.complaints() == []
