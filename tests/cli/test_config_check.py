"""`penstock config check`: the files that a configuration names, and warnings."""

from __future__ import annotations

import datetime
import re
import resource
import socket
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from penstock.cli.main import main

HOST = "mx.example.org"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with certificates, keys, and a text that is none of them."""
    ca = trustme.CA()
    now = datetime.datetime.now(datetime.UTC)
    for name, host, days in (
        ("good", HOST, 90),
        ("other", HOST, 90),
        ("wildcard", "*.example.org", 90),
        ("ending", HOST, 3),
        ("expired", HOST, -1),
        ("stranger", "mx.example.net", 90),
    ):
        leaf = ca.issue_cert(host, not_after=now + datetime.timedelta(days=days))
        leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
        leaf.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        leaf.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
    key = load_pem_private_key((tmp_path / "good.key").read_bytes(), None)
    sealed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "encrypted.key").write_bytes(sealed)
    (tmp_path / "text").write_text("this is text\n")
    (tmp_path / "exit.py").write_text("raise SystemExit(3)\n")
    return tmp_path


def check(folder: Path, toml: str, *arguments: str) -> Result:
    """Check a configuration whose data directory is the folder."""
    file = folder / "penstock.toml"
    file.write_text(f"hostname = '{HOST}'\ndata_dir = '.'\n{toml}")
    return CliRunner().invoke(main, ["config", "check", str(file), *arguments])


def with_tls(certificate: str, key: str = "") -> str:
    return f"[[listener]]\ntls.certificate = '{certificate}'" + (f"\ntls.key = '{key}'" if key else "")


AUTH = "[[listener]]\nauth = { required = true }"
CLUSTER = "[delivery]\nkind = 'jetstream'\n[jetstream]\nservers = ['tls://127.0.0.1:4222']\ntrust_durability = true\n"
ROUTE = "[[route]]\nnext_hop = 'smtp://a'\n"
FILES = [
    (with_tls("gone"), r"listener\[0\]\.tls\.certificate: .*/gone: No such file"),
    (with_tls("text"), r"listener\[0\]\.tls\.certificate: .*/text has no PEM certificate"),
    (with_tls("good.crt"), r"listener\[0\]\.tls\.certificate: .* has no PEM private key, and tls\.key is not set"),
    (with_tls("good.crt", "gone"), r"listener\[0\]\.tls\.key: .*/gone: No such file"),
    (with_tls("good.crt", "text"), r"listener\[0\]\.tls\.key: .*/text has no PEM private key"),
    (with_tls("good.crt", "other.key"), r"listener\[0\]\.tls\.key: .*/other\.key is not the private key of"),
    (with_tls("good.crt", "encrypted.key"), r"listener\[0\]\.tls\.key: the private key in .* is encrypted"),
    (CLUSTER + "password_file = 'gone'", r"jetstream\.password_file: .*/gone: No such file"),
    (CLUSTER + "nkey_file = 'text'", r"jetstream\.nkey_file: "),
    (CLUSTER + "tls.ca_file = 'text'", r"jetstream\.tls\.ca_file: .*/text"),
    (CLUSTER + "tls.certificate = 'good.crt'\ntls.key = 'gone'", r"jetstream\.tls\.key: .*/gone: No such file"),
    (with_tls("expired.pem"), r"listener\[0\]\.tls\.certificate: .* expired on \d{4}-"),
    ("[[listener]]\nauth.users = 'text'", r"listener\[0\]\.auth\.users: .*text:1: "),
    ("[recipients]\nfile = 'gone'", r"recipients\.file: .*/gone: No such file"),
    ("[recipients]\nfile = '.'", r"recipients\.file: .*: Is a directory"),
    ("[spool]\npath = 'text'", r"spool\.path: .*/text is not a directory"),
    ("[journal]\nfile = 'gone/log'", r"journal\.file: .*/gone: no such directory"),
    ("[journal]\nfile = '.'", r"journal\.file: .* is a directory"),
    ("[[listener]]\naddress = 'unix:/no/where/socket'", r"listener\[0\]\.address: /no/where: no such directory"),
    (f"[[listener]]\naddress = 'unix:/tmp/{'x' * 104}'", r"listener\[0\]\.address: .* is longer than 107 octets"),
    (f"{ROUTE}tls = {{ mode = 'verify', ca_file = 'gone' }}", r"route\[0\]\.tls\.ca_file: .*/gone: No such file"),
    ("[relay.tls]\nca_file = 'text'", r"relay\.tls\.ca_file: .*/text"),
    (
        f"{ROUTE}tls.mode = 'require'\nauth = {{ user = 'me', password_file = 'gone' }}",
        r"route\[0\]\.auth\.password_file: .*/gone: No such file",
    ),
    ("[[check]]\nhook = 'no.such.module:Policy'", r"check\[0\]\.hook: "),
    ("[[check]]\nhook = 'exit.py:Policy'", r"check\[0\]\.hook: it has ended the program with code 3"),
    ("[metrics]\ntoken_file = 'gone'", r"metrics\.token_file: .*/gone"),
    ("[metrics]\ntoken_file = 'text'", r"metrics\.token_file: .*/text: a token has 16 to 1024 characters"),
    (f"[control]\nsocket = '{'x' * 100}'", r"control\.socket: .* is longer than 107 octets"),
    ("[[trace]]\nsender = '*'\nfile = 'gone/trace'", r"trace\[0\]\.file: .*/gone: no such directory"),
]


@pytest.mark.parametrize(("toml", "expected"), FILES)
def test_unusable_files_are_reported_with_their_keys(folder: Path, toml: str, expected: str) -> None:
    result = check(folder, toml)
    assert result.exit_code == 1
    assert re.search(expected, result.output)
    assert check(folder, toml, "--no-files").exit_code == 0


def test_an_address_of_a_listener_is_not_free_for_metrics(folder: Path) -> None:
    result = check(folder, "[metrics]\naddress = '127.0.0.1:2525'")
    assert (result.exit_code, "metrics.address: '127.0.0.1:2525' is used by listener[0]" in result.output) == (1, True)


def test_a_state_directory_that_is_a_file_is_reported(folder: Path) -> None:
    file = folder / "penstock.toml"
    file.write_text("data_dir = 'text'")
    result = CliRunner().invoke(main, ["config", "check", str(file)])
    assert (result.exit_code, "data_dir: " in result.output) == (1, True)


def test_a_deep_state_directory_costs_only_the_control_socket(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text(f"data_dir = '{'x' * 90}'")
    result = CliRunner().invoke(main, ["config", "check", str(file)])
    assert (result.exit_code, "warning: control.socket: " in result.output) == (0, True)


def test_all_unusable_files_are_reported_at_once(folder: Path) -> None:
    output = check(folder, f"{with_tls('gone')}\n[recipients]\nfile = 'gone'").output
    assert "listener[0].tls.certificate" in output
    assert "recipients.file" in output


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (with_tls("ending.pem"), r"listener\[0\]\.tls\.certificate: .*ending\.pem expires on \d{4}-"),
        (with_tls("stranger.pem"), rf"listener\[0\]\.tls\.certificate: .* does not name the host {HOST}"),
        (AUTH, r"listener\[0\]\.auth\.users: .*/users has no users, so no client can send mail"),
        ("[admission]\nconnections = 999999999", r"admission\.connections: .* descriptors"),
    ],
)
def test_foreseeable_trouble_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, toml: str, expected: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    result = check(folder, toml)
    assert result.exit_code == 0
    assert re.search(f"^warning: {expected}", result.output, re.MULTILINE)


@pytest.mark.parametrize("toml", ["", with_tls("good.pem"), with_tls("good.crt", "good.key"), with_tls("wildcard.pem")])
def test_a_good_configuration_has_no_warnings(folder: Path, monkeypatch: pytest.MonkeyPatch, toml: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert check(folder, toml).output == f"{folder / 'penstock.toml'}: ok\n"


def test_serve_refuses_an_encrypted_key_without_a_prompt(folder: Path) -> None:
    file = folder / "penstock.toml"
    file.write_text(f"data_dir = '.'\n{with_tls('good.crt', 'encrypted.key')}\naddress = '127.0.0.1:0'")
    result = CliRunner().invoke(main, ["serve", "--config", str(file)])
    assert result.exit_code == 1
    assert "listener[0].tls.key: the private key in" in result.output


def test_a_port_in_use_is_not_hidden_by_a_file_that_stops_no_start(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file = folder / "penstock.toml"
        file.write_text(
            f"data_dir = '.'\n[[listener]]\naddress = '{address}'\n[relay.tls]\nca_file = 'gone'\n"
            "[[trace]]\nsender = '*'\nfile = 'gone/trace'\n"
        )
        result = CliRunner().invoke(main, ["serve", "--config", str(file)])
    assert result.exit_code == 1
    assert f"cannot listen on {address}: Address already in use" in result.output
