"""Real mail filters of Debian, each configured for one test run without a network."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import processes

from tests.ports import free_port

RSPAMD = """
options {{
    pidfile = "{folder}/pid"; tempdir = "{folder}"; rrd = "{folder}/rrd"; history_file = "{folder}/history";
    hs_cache_dir = "{folder}"; control_socket = "{folder}/control mode=0600"; url_tld = "{folder}/tld"; filters = "";
    dns {{ nameserver = ["127.0.0.1:9"]; timeout = 0.1s; retransmits = 1; }}
}}
logging {{ type = "file"; filename = "{folder}/log"; level = "error"; }}
actions {{ reject = 15; add_header = 6; greylist = 4; }}
worker "rspamd_proxy" {{
    bind_socket = "127.0.0.1:{milter}"; milter = yes; count = 1;
    upstream "local" {{ default = yes; self_scan = yes; }}
}}
worker "normal" {{ bind_socket = "127.0.0.1:{http}"; count = 1; }}
modules {{ path = "/usr/share/rspamd/plugins/milter_headers.lua"; }}
milter_headers {{ use = ["x-spamd-bar"]; skip_local = false; extended_spam_headers = true; }}
"""
OPENDKIM = """
Mode s
Socket inet:{port}@127.0.0.1
Domain example.com
Selector s1
KeyFile {folder}/key.pem
RequireSafeKeys no
InternalHosts 198.51.100.0/24
Canonicalization relaxed/simple
Syslog no
"""

CLAMD = """
LocalSocket {folder}/clamd.sock
DatabaseDirectory {folder}
TemporaryDirectory {folder}
Foreground yes
"""
CLAMAV_MILTER = """
MilterSocket inet:{port}@127.0.0.1
ClamdSocket unix:{folder}/clamd.sock
TemporaryDirectory {folder}
Foreground yes
OnInfected Quarantine
OnClean Accept
AddHeader Replace
"""


def wait_for(port: int) -> None:
    """Wait until a port accepts connections."""
    _wait_for(socket.AF_INET, ("127.0.0.1", port))


def _wait_for(family: int, address: str | tuple[str, int]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket(family) as sock, suppress(OSError):
            sock.connect(address)
            return
        time.sleep(0.02)
    raise AssertionError(f"no program listens on {address}")


@contextmanager
def rspamd(folder: Path) -> Iterator[tuple[int, int]]:
    """Run rspamd with its built-in rules only; yield the ports of the milter and of HTTP."""
    command = ["rspamd", "-f", "-i", "-c", str(folder / "rspamd.conf")]
    command += [f"--var={name}={folder}" for name in ("DBDIR", "RUNDIR", "LOGDIR")]
    if os.getuid() == 0:
        give_to_nobody(folder)
        command += ["-u", "nobody", "-g", "nogroup"]
    milter, http = free_port(), free_port()
    (folder / "tld").write_text("com\norg\nexample\n")
    (folder / "rspamd.conf").write_text(RSPAMD.format(folder=folder, milter=milter, http=http))
    with processes.started(command, folder / "out"):
        wait_for(milter)
        wait_for(http)
        yield milter, http


@contextmanager
def opendkim(folder: Path, key: bytes) -> Iterator[int]:
    """Run opendkim, which signs for example.com; yield its port."""
    port = free_port()
    (folder / "key.pem").write_bytes(key)
    (folder / "opendkim.conf").write_text(OPENDKIM.format(folder=folder, port=port))
    with processes.started(["opendkim", "-f", "-x", str(folder / "opendkim.conf")], folder / "out") as process:
        wait_for(port)
        yield port
        process.kill()  # libmilter looks for SIGTERM every five seconds


@contextmanager
def clamav_milter(folder: Path, virus: bytes) -> Iterator[int]:
    """Run clamd with one signature, and clamav-milter, which quarantines; yield its port."""
    port = free_port()
    (folder / "test.ndb").write_text(f"Test:0:*:{virus.hex()}\n")
    (folder / "clamd.conf").write_text(CLAMD.format(folder=folder))
    (folder / "milter.conf").write_text(CLAMAV_MILTER.format(folder=folder, port=port))
    with processes.started(["clamd", "-c", str(folder / "clamd.conf")], folder / "clamd.out"):
        _wait_for(socket.AF_UNIX, str(folder / "clamd.sock"))
        command = ["clamav-milter", "-c", str(folder / "milter.conf")]
        with processes.started(command, folder / "milter.out") as process:
            wait_for(port)
            yield port
            process.kill()


@contextmanager
def postgrey(folder: Path) -> Iterator[int]:
    """Run postgrey with a delay of one second; yield its port."""
    port = free_port()
    user = pwd.getpwuid(os.getuid() or pwd.getpwnam("nobody").pw_uid)
    _give_to(folder, user)
    command = ["postgrey", f"--inet=127.0.0.1:{port}", f"--dbdir={folder}", "--delay=1", f"--user={user.pw_name}"]
    command += ["--group=nogroup" if os.getuid() == 0 else f"--group={grp.getgrgid(user.pw_gid).gr_name}"]
    with processes.started(command, folder / "out"):
        wait_for(port)
        yield port


def give_to_nobody(folder: Path) -> None:
    """Let a program that gives up root for nobody use a folder."""
    _give_to(folder, pwd.getpwnam("nobody"))


def _give_to(folder: Path, user: pwd.struct_passwd) -> None:
    """Let a program that gives up root use a folder."""
    if os.getuid() == 0:
        os.chown(folder, user.pw_uid, user.pw_gid)
        for parent in folder.parents[:3]:
            with suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o011)
