"""The live page of a sink in a real browser, without a screen."""

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
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from penstock.sink.web.app import MOST_STREAMS
from tests.e2e.running import Server, serving
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
_OPEN, _CLOSED = 1, 2  # readyState of an EventSource
_PHONE, _DESKTOP = (390, 844), (1280, 900)
_PLAN = '[[rule]]\nname = "full"\nphase = "rcpt"\nmatch = { recipient = ["full@*"] }\nreply = "452 4.2.2 Full"\n'


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
    """The page, as somebody sees it."""

    def __init__(self, driver: webdriver.Chrome, server: Server) -> None:
        found = re.search(r"live page at (http://\S+)", server.journal.read_text())
        assert found is not None
        self.driver = driver
        self.port = int(found[1].rpartition(":")[2].strip("/"))
        driver.get(found[1])

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def wait(self, is_so: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 60).until(lambda _: is_so())

    def run(self, script: str) -> object:
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[object]:
        """Return what the browser had to say about the page."""
        return list(self.driver.get_log("browser"))  # type: ignore[no-untyped-call]


@contextmanager
def sink(folder: Path, *options: str, web: str = "127.0.0.1:0") -> Iterator[Server]:
    with serving(folder / "data", "", "sink", "--web", web, "--keep", "last:50", *options) as server:
        yield server


def send(
    server: Server, count: int, text: str = "Subject: hello\r\n\r\nhi\r\n", recipient: str = "b@example.org"
) -> None:
    send_marked(server.port, [marked("page", number, recipient=recipient, text=text) for number in range(1, count + 1)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [_PHONE, _DESKTOP])
def test_the_page_shows_what_arrives(tmp_path: Path, size: tuple[int, int], scheme: str) -> None:
    with sink(tmp_path) as server, browser(*size, scheme) as driver:
        page = Page(driver, server)
        page.wait(lambda: page.text("#state") == "live")
        send(server, 7)
        page.wait(lambda: "7\n" in page.text("#facts") and len(driver.find_elements(By.CSS_SELECTOR, "#list li")) == 7)
        page.wait(lambda: driver.find_elements(By.CSS_SELECTOR, ".plot .line.s-a"))
        assert "Nothing missing, nothing twice" in page.text("#sequences")
        assert "message 250 2.0.0 7" in page.text("#replies")
        assert "message 7" in page.text("#latencies")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
        red, green, blue = map(
            int, re.findall(r"\d+", str(page.run("getComputedStyle(document.body).backgroundColor")))[:3]
        )
        assert (red + green + blue < 150) == (scheme == "dark")
        assert page.complaints() == []


def test_a_page_that_finds_no_stream_left_asks_once_a_second(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver, ExitStack() as streams:
        page = Page(driver, server)
        page.wait(lambda: page.run("state.source.readyState") == _OPEN)
        driver.get("about:blank")
        for _ in range(MOST_STREAMS):
            stream = streams.enter_context(socket.create_connection(("127.0.0.1", page.port), 60))
            stream.sendall(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert stream.recv(1024).startswith(b"HTTP/1.1 200")
        driver.back()
        page.wait(lambda: page.run("state.source.readyState") == _CLOSED and page.text("#state") == "live")
        send(server, 3)
        page.wait(lambda: "message 250 2.0.0 3" in page.text("#replies"))


def test_a_page_goes_on_with_a_sink_that_was_started_anew(tmp_path: Path) -> None:
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


def test_a_plot_is_read_with_the_keyboard(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        plot = driver.find_element(By.CSS_SELECTOR, ".plot svg")
        page.wait(lambda: "now" in str(plot.get_attribute("aria-label")))
        page.wait(lambda: page.run("state.samples.length") != 1)
        driver.execute_script("arguments[0].focus()", plot)
        plot.send_keys(Keys.ARROW_LEFT)
        page.wait(lambda: "1 s ago: messages" in str(plot.get_attribute("aria-label")))
        plot.send_keys(Keys.ESCAPE)
        page.wait(lambda: ", now: messages" in str(plot.get_attribute("aria-label")))


def test_a_message_is_opened_with_the_keyboard_and_does_no_harm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tracker, sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        tracker.setblocking(False)
        place = f"http://127.0.0.1:{tracker.getsockname()[1]}"
        html = f"<h1>hi</h1><img src='{place}/x.png'><script>parent.location='{place}'; document.title='run'</script>"
        head = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?= <b>\r\nMIME-Version: 1.0\r\nContent-Type: text/html\r\n"
        page = Page(driver, server)
        send(server, 1, f"{head}\r\n{html}\r\n")
        page.wait(lambda: driver.find_elements(By.CSS_SELECTOR, "#list button"))
        driver.find_element(By.CSS_SELECTOR, "#list button").send_keys(Keys.ENTER)
        page.wait(lambda: page.text("#viewer-title") == "grüße <b>")
        frame = driver.find_element(By.CSS_SELECTOR, "#viewer iframe")
        assert frame.get_attribute("sandbox") == ""
        driver.switch_to.frame(frame)
        page.wait(lambda: page.text("h1") == "hi")
        driver.switch_to.default_content()
        driver.find_element(By.ID, "viewer-close").send_keys(Keys.ESCAPE)
        page.wait(lambda: not page.run("document.getElementById('viewer').open"))
        assert page.text("#messages-title").startswith("Messages")
        with pytest.raises(BlockingIOError):
            tracker.accept()


def test_messages_are_found_and_forgotten(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        send(server, 3, "Subject: first\r\n\r\nneedle\r\n")
        send(server, 20)
        rows = "#list li"
        page.wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, rows)) == 12)
        driver.find_element(By.ID, "query").send_keys("needle")
        page.wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, rows)) == 3)
        driver.find_element(By.ID, "query").clear()
        driver.find_element(By.ID, "query").send_keys(Keys.ENTER)
        page.wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, rows)) == 12)
        driver.find_element(By.ID, "more").click()
        page.wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, rows)) == 23)
        driver.find_element(By.ID, "forget").click()
        driver.switch_to.alert.accept()
        page.wait(lambda: page.text("#kept").startswith("0 of"))


def test_what_goes_wrong_is_changed_on_the_page(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        page.wait(lambda: driver.find_element(By.ID, "control").is_displayed())
        driver.find_element(By.CSS_SELECTOR, "#control summary").click()
        plan = driver.find_element(By.ID, "plan-text")
        page.wait(plan.is_displayed)
        driver.execute_script("arguments[0].value = arguments[1]", plan, "[[rule]]\nfase = 1\n")
        driver.find_element(By.CSS_SELECTOR, "#plan [type=submit]").click()
        page.wait(lambda: "fase" in page.text("#control-said"))
        driver.execute_script("arguments[0].value = arguments[1]", plan, _PLAN)
        driver.find_element(By.CSS_SELECTOR, "#plan [type=submit]").click()
        page.wait(lambda: page.text("#control-said") == "The plan is in force")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server, 1, recipient="full@example.org")
        driver.find_element(By.CSS_SELECTOR, "#fail [type=submit]").click()
        page.wait(lambda: "will hear 450" in page.text("#control-said"))
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server, 1)
        page.wait(lambda: "full rcpt" in page.text("#faults") and "fail-next" in page.text("#faults"))


def test_the_counters_start_over(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        send(server, 3)
        page.wait(lambda: "message 250 2.0.0 3" in page.text("#replies"))
        driver.find_element(By.ID, "reset").click()
        driver.switch_to.alert.accept()
        page.wait(lambda: "message" not in page.text("#replies"))


def test_a_sink_that_ends_is_said_to_be_gone(tmp_path: Path) -> None:
    with sink(tmp_path) as server, browser(*_DESKTOP) as driver:
        page = Page(driver, server)
        page.wait(lambda: page.text("#state") == "live")
        assert server.stop() == 0
        page.wait(lambda: page.text("#state") == "no connection to the sink")
