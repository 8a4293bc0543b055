"""The page of a sink behind a real nginx, below a path, with nginx's default buffering."""

from __future__ import annotations

import re
import shutil
import smtplib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from bench import processes

from tests.e2e.running import Server, serving

_ORIGIN = {"origin": "http://mail.example.org"}


@contextmanager
def nginx(folder: Path, web: str) -> Iterator[httpx.Client]:
    """Run an nginx that passes /sink/ on to the page; yield a client of it."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin")
    assert program is not None
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {folder}/pid; error_log stderr notice;
        events {{}}
        http {{
            access_log off; {temporary}
            server {{
                listen unix:{folder}/socket;
                location /sink/ {{ proxy_pass {web}; }}
            }}
        }}
        """
    )
    out, errors = folder / "out", folder / "errors"
    with processes.started([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)], out, errors=errors) as run:
        Server(run, 0, folder, out, errors).said("event method")  # its socket is open by then
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=f"{folder}/socket"), base_url="http://mail.example.org/sink", timeout=30
        ) as client:
            yield client


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[Server, httpx.Client]]:
    options = ("--web", "127.0.0.1:0", "--keep", "last:10", "--web-origin", "http://mail.example.org/sink/")
    with serving(tmp_path / "data", "", "sink", *options) as server:
        web = re.search(r"http://127\.0\.0\.1:\d+", server.said(r"live page at (\S+)")[1])
        (tmp_path / "nginx").mkdir()
        with nginx(tmp_path / "nginx", web[0] if web else "") as client:
            yield server, client


def test_the_page_works_behind_nginx(page: tuple[Server, httpx.Client]) -> None:
    server, client = page
    with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as sender:
        sender.sendmail("a@example.com", ["b@example.org"], "Subject: hello\r\n\r\nhi")
    index = client.get("/")
    assert index.status_code == 200
    assert client.get("/page.js").status_code == client.get("/page.css").status_code == 200
    (listed,) = client.get("/api/messages").json()["messages"]
    assert listed["subject"] == "hello"
    assert client.put("/api/plan", content="", headers=_ORIGIN).status_code == 200
    assert client.put("/api/plan", content="", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.delete(f"/api/messages/{listed['id']}", headers=_ORIGIN).json() == {"deleted": 1}


def test_nginx_passes_events_on_as_they_come(page: tuple[Server, httpx.Client]) -> None:
    _, client = page
    with client.stream("GET", "/api/events") as answer:  # it never ends: a buffered one would give nothing
        assert any(line.startswith("data:") for line in answer.iter_lines())
