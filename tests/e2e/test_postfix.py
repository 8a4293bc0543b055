"""Postfix relays real mail to Penstock, and its load generator finds nothing to complain about."""

from __future__ import annotations

import shutil
import smtplib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.running import ENVIRONMENT, Server, body_of, digest, hard_bodies, serving
from tests.ports import free_port

MAIN_CF = """
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
multi_instance_enable = yes
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = relay.example.com
mydestination =
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
relayhost = [127.0.0.1]:{next_hop}
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
smtp_tls_security_level = {tls}
smtp_tls_CAfile = {ca_file}
smtp_tls_secure_cert_match = localhost
message_size_limit = 200000000
mailbox_size_limit = 0
smtp_line_length_limit = 0
disable_dns_lookups = yes
"""
MASTER_CF = """
127.0.0.1:{port} inet n - n - - smtpd
pickup    unix n - n 60 1 pickup
cleanup   unix n - n - 0 cleanup
qmgr      unix n - n 300 1 qmgr
tlsmgr    unix - - n 1000? 1 tlsmgr
rewrite   unix - - n - - trivial-rewrite
bounce    unix - - n - 0 bounce
defer     unix - - n - 0 bounce
trace     unix - - n - 0 bounce
smtp      unix - - n - - smtp
relay     unix - - n - - smtp
error     unix - - n - - error
retry     unix - - n - - error
scache    unix - - n - 1 scache
anvil     unix - - n - 1 anvil
proxymap  unix - - n - - proxymap
postlog   unix-dgram n - n - 1 postlogd
"""


@contextmanager
def postfix(next_hop: Server, *, tls: bool, settings: str = "") -> Iterator[int]:
    """Run a Postfix of our own that relays everything to the server; yield its port. `settings` go to its main.cf."""
    # Not below pytest's folder: other users' processes have to get in, and paths of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="penstock-postfix-"))
    folder.chmod(0o755)
    port = free_port()
    try:
        for name in ("config", "queue", "data"):
            (folder / name).mkdir(mode=0o755)
        shutil.chown(folder / "data", "postfix")
        level = "encrypt" if tls else "none"
        main_cf = MAIN_CF.format(folder=folder, next_hop=next_hop.port, tls=level, ca_file=next_hop.ca_file)
        (folder / "config" / "main.cf").write_text(main_cf + settings)
        (folder / "config" / "master.cf").write_text(MASTER_CF.format(port=port))
        control(folder, "start")
        try:
            wait_for(port)
            yield port
        except Exception as exc:
            exc.add_note((folder / "log").read_text()[-20_000:])  # what became of the mail
            raise
        finally:
            control(folder, "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def control(folder: Path, command: str) -> None:
    done = subprocess.run(
        ["postfix", "-c", str(folder / "config"), command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        timeout=60,
    )
    log = folder / "log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("Postfix did not start")


def relay(tmp_path: Path, *, tls: bool) -> list[bytes]:
    """Send hard bodies through Postfix and return what arrived."""
    toml = 'hostname = "localhost"\n[[listener]]\naddress = "127.0.0.1:0"\n'
    with serving(tmp_path / "data", toml) as server, postfix(server, tls=tls) as port:
        bodies = hard_bodies()
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            for name, body in bodies.items():
                mail = (
                    f"Subject: {name}\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n".encode()
                )
                client.sendmail("a@example.com", ["b@example.org"], mail + body, ["BODY=8BITMIME"])
        received = server.messages(len(bodies))
        assert sorted(digest(body_of(m)) for m in received) == sorted(map(digest, bodies.values()))
        return received


def test_mail_relayed_by_postfix_arrives_byte_for_byte(tmp_path: Path) -> None:
    for message in relay(tmp_path, tls=False):
        assert b"with ESMTP id" in message


def test_mail_relayed_by_postfix_over_starttls_arrives_byte_for_byte(tmp_path: Path) -> None:
    for message in relay(tmp_path, tls=True):
        assert b"with ESMTPS id" in message


def test_mail_relayed_by_postfix_over_bdat_arrives_byte_for_byte(tmp_path: Path) -> None:
    # Postfix sends DATA; the octets of a BDAT come from here, in chunks that cut lines and CR LF pairs.
    body = b"".join(hard_bodies().values())
    mail = b"Subject: chunks\r\n\r\n" + body
    with serving(tmp_path / "data") as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            client.ehlo()
            client.mail("a@example.com", ["BODY=8BITMIME"])
            client.rcpt("b@example.org")
            step = 997
            pieces = [mail[i : i + step] for i in range(0, len(mail), step)]
            for number, piece in enumerate(pieces):
                last = b" LAST" if number == len(pieces) - 1 else b""
                client.send(b"BDAT %d%s\r\n" % (len(piece), last) + piece)
                assert client.getreply()[0] == 250
        (received,) = server.messages(1)
        assert digest(body_of(received)) == digest(body)


def test_mail_from_postfix_to_postfix_is_unchanged(tmp_path: Path) -> None:
    last_toml = '[delivery]\nkind = "maildir"\n[[listener]]\naddress = "127.0.0.1:0"\n'
    with serving(tmp_path / "last", last_toml) as last, postfix(last, tls=False) as inner:
        toml = f'[[listener]]\naddress = "127.0.0.1:0"\n[[route]]\nnext_hop = "smtp://127.0.0.1:{inner}"\n'
        with serving(tmp_path / "gateway", toml) as gateway, postfix(gateway, tls=False) as outer:
            bodies = hard_bodies()
            with smtplib.SMTP("127.0.0.1", outer, timeout=60) as client:
                for body in bodies.values():
                    mail = b"Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n" + body
                    client.sendmail("a@example.com", ["b@example.org"], mail, ["BODY=8BITMIME"])
            received = last.messages(len(bodies))
            assert sorted(digest(body_of(m)) for m in received) == sorted(map(digest, bodies.values()))


def test_smtp_source_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--json") as server:
        for arguments in (["-d"], [], ["-d", "-r", "5"]):
            subprocess.run(
                ["smtp-source", "-s", "50", "-m", "1000", "-l", "4096", *arguments, server.address],
                env=ENVIRONMENT,
                check=True,
                capture_output=True,
                timeout=120,
            )
        assert server.stop() == 0
        assert '"messages":3000' in server.out.read_text()


TRICKS = [
    "victim%remote.example@example.org", "remote.example!victim@example.org", '"victim@remote.example"@example.org',
    '"victim%remote.example"@example.org', '"remote.example!victim"@example.org', "a%b%remote.example@example.org",
    "one!two!victim@example.org", "victim%remote.example@EXAMPLE.ORG", "victim%remote.example@example.org.",
    "@example.org:victim%remote.example@example.org", '@example.org:"victim@remote.example"@example.org',
    r'"victim\@remote.example"@example.org', r'"\v\i\c\t\i\m\@remote.example"@example.org',
    '"victim"%remote.example@example.org', "victim@remote.example", '"remote.example!victim%other.example"@example.org',
    "victim%[127.0.0.1]@example.org", '"victim@[127.0.0.1]"@example.org', "%remote.example@example.org",
    "@remote.example:victim@remote.example",
]  # fmt: skip


def test_postfix_after_a_gateway_relays_no_sender_specified_route(tmp_path: Path) -> None:
    """Postfix trusts its gateway and obeys % and ! (swap_bangpath, allow_percent_hack): what passes is relayed."""
    obeys = (
        "allow_percent_hack = yes\nswap_bangpath = yes\nallow_untrusted_routing = yes\nresolve_dequoted_address = yes\n"
    )
    with serving(tmp_path / "target") as target, postfix(target, tls=False, settings=obeys) as port:
        gateway_toml = f'domains = ["example.org"]\n[[route]]\nnext_hop = "smtp://127.0.0.1:{port}"\n'
        with serving(tmp_path / "gateway", gateway_toml) as gateway:
            refused = []
            for trick in TRICKS:
                with smtplib.SMTP("127.0.0.1", gateway.port) as client:
                    client.ehlo("client.example")
                    client.mail("a@example.com")
                    refused.append(client.docmd("RCPT", f"TO:<{trick}>")[0] >= 500)
            assert refused == [True] * len(TRICKS)
            with smtplib.SMTP("127.0.0.1", gateway.port) as client:
                client.sendmail("a@example.com", ["user@example.org"], "Subject: x\r\n\r\nThe only one\r\n")
            (arrived,) = target.messages(1)
            assert b"Delivered-To: user@example.org" in arrived
