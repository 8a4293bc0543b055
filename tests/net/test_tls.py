"""Certificates of our own making, contexts, channel bindings."""

from __future__ import annotations

import datetime
import ssl
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from scramp.core import CBindData

from penstock.net.tls import TlsSettings, end_point_binding, generated_certificate, server_context


def leaf_of(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def test_a_certificate_is_made_once_and_then_used_again(tmp_path: Path) -> None:
    made = generated_certificate(tmp_path / "tls", ["mx.example.org", "localhost"])
    before = made.certificate.read_bytes()
    assert stat.S_IMODE(made.certificate.stat().st_mode) == 0o600
    assert generated_certificate(tmp_path / "tls", ["localhost"]) == made
    assert made.certificate.read_bytes() == before


def test_another_name_makes_another_certificate(tmp_path: Path) -> None:
    made = generated_certificate(tmp_path / "tls", ["a.example.org"])
    before = made.certificate.read_bytes()
    generated_certificate(tmp_path / "tls", ["b.example.org"])
    assert made.certificate.read_bytes() != before


@pytest.mark.parametrize(("days", "renewed"), [(6, True), (8, False)])
def test_a_certificate_that_ends_soon_is_renewed(tmp_path: Path, days: int, renewed: bool) -> None:
    made = generated_certificate(tmp_path / "tls", ["localhost"])
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    old = trustme.CA().issue_cert("localhost", not_after=end).private_key_and_cert_chain_pem.bytes()
    made.certificate.write_bytes(old)
    generated_certificate(tmp_path / "tls", ["localhost"])
    assert (made.certificate.read_bytes() != old) is renewed


def test_a_broken_file_is_replaced(tmp_path: Path) -> None:
    made = generated_certificate(tmp_path / "tls", ["localhost"])
    made.certificate.write_text("nonsense")
    generated_certificate(tmp_path / "tls", ["localhost"])
    assert leaf_of(made.certificate).not_valid_after_utc > datetime.datetime.now(datetime.UTC)


def _make(folder: Path) -> bytes:
    return generated_certificate(folder, ["localhost"]).certificate.read_bytes()


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_make, [tmp_path / "tls"] * 4))) == 1


def test_the_binding_is_the_one_scram_clients_compute(tmp_path: Path) -> None:
    made = generated_certificate(tmp_path / "tls", ["localhost"])
    der = leaf_of(made.certificate).public_bytes(Encoding.DER)
    assert end_point_binding(made.certificate) == bytes(CBindData.from_der(der))


@pytest.mark.parametrize(("minimum", "version"), [("1.2", ssl.TLSVersion.TLSv1_2), ("1.3", ssl.TLSVersion.TLSv1_3)])
def test_old_versions_are_refused(tmp_path: Path, minimum: str, version: ssl.TLSVersion) -> None:
    made = generated_certificate(tmp_path / "tls", ["localhost"])
    settings = TlsSettings(minimum="1.3" if minimum == "1.3" else "1.2")
    assert server_context(settings, made.certificate).minimum_version == version


def test_a_missing_certificate_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        server_context(TlsSettings(), tmp_path / "none.pem")
