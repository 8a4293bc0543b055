"""Runs NSD, a real name server, on the loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

CONFIG = """\
server:
    ip-address: 127.0.0.1@{port}
    do-ip6: no
    username: ""
    zonesdir: "{folder}"
    database: ""
    pidfile: "{folder}/nsd.pid"
    xfrdfile: "{folder}/xfrd.state"
    zonelistfile: "{folder}/zone.list"
    server-count: 1
    rrl-ratelimit: 0
    rrl-whitelist-ratelimit: 0
    minimal-responses: no
remote-control:
    control-enable: no
"""
ZONE = 'zone:\n    name: "{name}"\n    zonefile: "{folder}/{number}.zone"\n'
HEAD = "$ORIGIN {name}\n$TTL 300\n@ SOA ns.invalid. hostmaster.invalid. 1 3600 600 86400 60\n@ NS ns.invalid.\n"
QUESTION = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"
"""The name servers of the root: any answer says that the server has started."""


@contextmanager
def running_nsd(folder: Path, zones: Mapping[str, str]) -> Iterator[str]:
    """Serve zones, given by name as lines without SOA; yield the address once it answers."""
    port = free_port()
    config = CONFIG.format(port=port, folder=folder)
    for number, (name, lines) in enumerate(zones.items()):
        (folder / f"{number}.zone").write_text(HEAD.format(name=f"{name.rstrip('.')}.") + lines)
        config += ZONE.format(name=name, folder=folder, number=number)
    (folder / "nsd.conf").write_text(config)
    log = folder / "nsd.log"
    command = ["/usr/sbin/nsd", "-d", "-c", str(folder / "nsd.conf")]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _wait(process, port, log)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.1)
        client.connect(("127.0.0.1", port))
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.send(QUESTION)
                client.recv(512)
            except OSError:  # refused, or no answer yet
                continue
            return
    raise AssertionError(f"NSD does not start: {log.read_text()}")
