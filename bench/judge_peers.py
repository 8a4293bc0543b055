"""What the checks of a message add, beside Postfix with opendkim and with rspamd as milters.

    python -m bench.judge_peers [--rounds 3] [--messages 1000] [--sessions 20]

All servers take the same signed message of 4 KB from smtp-source and file it into a Maildir; the name server is NSD on
the loopback. They take turns, each with its checks and without. What the filters and the checks have found is asserted
in every delivered header: rspamd, for example, skips clients with local addresses unless it is configured not to.
opendkim verifies DKIM only, and gets its key from a file.

No file is removed before the end: for seconds after many were, ext4 looks at each of their inodes again for each file
that is made (`recently_deleted`), and the server whose turn is next pays for that.

The bounds are for what the checks add to a message in Penstock: a share of the filter alone, and of the filter together
with what the dialog adds to Postfix. Postfix needs root.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import rsa
from tests.dns.nsd import running_nsd
from tests.policy.peers import give_to_nobody, wait_for
from tests.ports import free_port

from bench.gateway import POSTFIX_VIRTUAL, penstock_with
from bench.judge import body_of, key_record, sign, text_record
from bench.measure import Peer, Running, cpu_of, machine, running, summary, verdict
from bench.processes import ENVIRONMENT, started

FILTER_BOUND: Final = 1 / 8
DIALOG_BOUND: Final = 1 / 12
_TIMEOUT: Final = 300.0
"""Seconds for the messages of a round to arrive."""
_RSPAMD: Final = """
options {{
    pidfile = "{folder}/pid"; tempdir = "{folder}"; rrd = "{folder}/rrd"; history_file = "{folder}/history";
    hs_cache_dir = "{folder}"; control_socket = "{folder}/control mode=0600"; url_tld = "{folder}/tld";
    filters = "dkim"; local_addrs = "192.0.2.1/32";
    dns {{ nameserver = ["{dns}"]; timeout = 2s; }}
}}
logging {{ type = "file"; filename = "{folder}/log"; level = "error"; }}
actions {{ reject = 150; add_header = 60; greylist = 40; }}
worker "rspamd_proxy" {{
    bind_socket = "127.0.0.1:{port}"; milter = yes; count = 1;
    upstream "local" {{ default = yes; self_scan = yes; }}
}}
modules {{
    path = "/usr/share/rspamd/plugins/spf.lua"; path = "/usr/share/rspamd/plugins/dmarc.lua";
    path = "/usr/share/rspamd/plugins/milter_headers.lua";
}}
spf {{ check_local = true; check_authed = true; }}
dkim {{ check_local = true; check_authed = true; }}
dmarc {{ check_local = true; check_authed = true; }}
milter_headers {{ use = ["authentication-results"]; skip_local = false; }}
"""
_OPENDKIM: Final = """
Mode v
Socket inet:{port}@127.0.0.1
AuthservID mx.example.org
TestPublicKeys {folder}/keys
RequireSafeKeys no
AlwaysAddARHeader yes
Syslog no
"""
_PENSTOCK: Final = """
hostname = "mx.example.org"
[[listener]]
address = "127.0.0.1:{port}"
[delivery]
kind = "maildir"
"""
_CHECKS: Final = """
[resolver]
servers = ["{dns}"]
[policy]
mode = "enforce"
trusted = []
"""


class Setup(NamedTuple):
    """A server, the filter that it asks, and what its headers must say."""

    name: str
    server: Running
    filter_pid: int
    """0 without a filter."""
    results: Sequence[bytes]


class Cost(NamedTuple):
    """Microseconds of CPU for a message."""

    server: float
    filter: float


def postfix(milter: int) -> Peer:
    """Return a Postfix that asks a milter."""

    def command(port: int, folder: Path) -> Sequence[str]:
        start = POSTFIX_VIRTUAL.command(port, folder)
        main = folder / "config" / "main.cf"
        main.write_text(
            f"{main.read_text()}smtpd_milters = inet:127.0.0.1:{milter}\nmilter_default_action = tempfail\n"
        )
        return start

    return Peer("postfix", command, "postfix")


@contextmanager
def rspamd(folder: Path, dns: str) -> Iterator[tuple[int, int]]:
    """Run rspamd with SPF, DKIM and DMARC; yield its process and its port."""
    port = free_port()
    (folder / "tld").write_text("com\norg\nexample\n")
    (folder / "rspamd.conf").write_text(_RSPAMD.format(folder=folder, port=port, dns=dns))
    give_to_nobody(folder)
    command = ["rspamd", "-f", "-i", "-c", str(folder / "rspamd.conf"), "-u", "nobody", "-g", "nogroup"]
    command += [f"--var={name}={folder}" for name in ("DBDIR", "RUNDIR", "LOGDIR")]
    with started(command, folder / "out") as process:
        wait_for(port)
        yield process.pid, port


@contextmanager
def opendkim(folder: Path, record: str) -> Iterator[tuple[int, int]]:
    """Run opendkim, which verifies; yield its process and its port."""
    port = free_port()
    (folder / "keys").write_text(f"s1._domainkey.sender.example {record}\n")
    (folder / "opendkim.conf").write_text(_OPENDKIM.format(port=port, folder=folder))
    with started(["opendkim", "-f", "-x", str(folder / "opendkim.conf")], folder / "out") as process:
        wait_for(port)
        yield process.pid, port
        process.kill()  # libmilter looks for SIGTERM every five seconds


def files_of(server: Running) -> list[Path]:
    """Return the messages in the Maildir of a server."""
    return [each for each in server.folder.glob("maildir/**/new/*") if each.is_file()]


def play(setup: Setup, message: Path, messages: int, sessions: int) -> Cost:
    """Send messages, wait until they are filed, assert what their headers say. Raise RuntimeError."""
    server = setup.server
    before, filter_before = cpu_of(server.pid), cpu_of(setup.filter_pid) if setup.filter_pid else None
    subprocess.run(
        ["smtp-source", "-s", str(sessions), "-m", str(messages), "-d", "-F", str(message),
         "-f", "joe@sender.example", "-t", "ann@example.org", server.address],
        check=True, env=ENVIRONMENT, timeout=600, capture_output=True,
    )  # fmt: skip
    deadline = time.monotonic() + _TIMEOUT
    while len(files := files_of(server)) < messages and time.monotonic() < deadline:
        time.sleep(0.05)
    if len(files) != messages:
        raise RuntimeError(f"{setup.name}: {len(files)} of {messages} messages arrived")
    used = (cpu_of(server.pid) - before).total
    used_by_filter = 0 if filter_before is None else (cpu_of(setup.filter_pid) - filter_before).total
    for file in files:
        header = file.read_bytes().partition(b"\n\n")[0]
        missing = [each for each in setup.results if each not in header]
        if missing:
            raise RuntimeError(f"{setup.name}: {missing} not in a delivered header:\n{header.decode(errors='replace')}")
        file.rename(file.parents[1] / "cur" / file.name)  # not removed: see above
    return Cost(used / messages, used_by_filter / messages)


@contextmanager
def setups() -> Iterator[tuple[list[Setup], Path]]:
    """Run all servers; yield them, and the file with the message."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    zone = f'@ TXT "v=spf1 ip4:127.0.0.1 -all"\n_dmarc TXT "v=DMARC1; p=reject"\n{text_record("s1._domainkey", key)}'
    body = body_of(4_000)
    with ExitStack() as stack:

        def folder() -> Path:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
            made.chmod(0o755)
            return made

        def run(peer: Peer) -> Running:
            return stack.enter_context(running(peer))

        dns = stack.enter_context(running_nsd(folder(), {"sender.example": zone}))
        message = folder() / "message"
        message.write_bytes((sign(key, body) + b"\r\n" + body).replace(b"\r\n", b"\n"))
        dkim_pid, dkim_port = stack.enter_context(opendkim(folder(), key_record(key).decode()))
        rspamd_pid, rspamd_port = stack.enter_context(rspamd(folder(), dns))
        ours = (b"Authentication-Results: mx.example.org", b"spf=pass", b"dkim=pass", b"dmarc=pass")
        yield (
            [
                Setup("penstock", run(penstock_with(_PENSTOCK)), 0, ()),
                Setup("penstock, SPF DKIM DMARC", run(penstock_with(_PENSTOCK + _CHECKS.format(dns=dns))), 0, ours),
                Setup("postfix", run(POSTFIX_VIRTUAL), 0, ()),
                Setup("postfix, opendkim", run(postfix(dkim_port)), dkim_pid, (b"dkim=pass",)),
                Setup(
                    "postfix, rspamd", run(postfix(rspamd_port)), rspamd_pid, (b"spf=pass", b"dkim=pass", b"dmarc=pass")
                ),
            ],
            message,
        )


def ratios(costs: dict[str, Cost], name: str) -> tuple[float, float]:
    """Return what our checks add, as a share of a filter, and of the filter with Postfix's dialog."""
    added = costs["penstock, SPF DKIM DMARC"].server - costs["penstock"].server
    theirs = costs[name]
    return added / theirs.filter, added / (theirs.filter + theirs.server - costs["postfix"].server)


def print_table(rounds: Sequence[dict[str, Cost]]) -> None:
    """Print the costs, and the shares with their bounds."""
    for name in rounds[0]:
        server, low, high = summary([each[name].server for each in rounds])
        filter_cost, _, _ = summary([each[name].filter for each in rounds])
        more = f"   filter {filter_cost:7.0f}" if filter_cost else ""
        print(f"  {name:<28} {server:7.0f} us of CPU ({low:.0f} to {high:.0f}){more}")
    for name in ("postfix, opendkim", "postfix, rspamd"):
        for what, bound, place in (("filter", FILTER_BOUND, 0), ("filter and dialog", DIALOG_BOUND, 1)):
            share, low, high = summary([ratios(each, name)[place] for each in rounds])
            shares = f"1/{1 / share:.1f} (1/{1 / high:.1f} to 1/{1 / low:.1f})"
            of = f"checks, share of {what} ({name.partition(', ')[2]})"
            print(f"  {of:<44} {shares}, bound 1/{1 / bound:.0f}: {verdict(share <= bound)}")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=20)
    arguments = parser.parse_args()
    print(machine(), flush=True)
    rounds: list[dict[str, Cost]] = []
    with setups() as (servers, message):
        for number in range(arguments.rounds + 1):
            messages = arguments.messages if number else max(20, arguments.messages // 10)
            costs = {each.name: play(each, message, messages, arguments.sessions) for each in servers}
            if number:  # the first round warms up
                rounds.append(costs)
    print(f"{arguments.messages} messages of 4 KB in {arguments.sessions} sessions, {arguments.rounds} rounds")
    print_table(rounds)


if __name__ == "__main__":
    main()
