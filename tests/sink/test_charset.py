"""Character sets: labels of the WHATWG, and texts without a usable label."""

from __future__ import annotations

import pytest
import webencodings
from hypothesis import given
from hypothesis import strategies as st

from penstock.sink.web.charset import decode, name_of


@pytest.mark.parametrize(
    ("data", "label", "text"),
    [
        ("grüße".encode(), "", "grüße"),
        ("grüße".encode(), "us-ascii", "grüße"),
        ("grüße".encode(), "x-unknown", "grüße"),
        (b"gr\xfc\xdfe \x80", "", "grüße €"),
        (b"Spa\xdf", "", "Spaß"),
        (b"gr\xfc\xdfe \x80", "US-ASCII", "grüße €"),
        (b"\x93quoted\x94", "unknown-8bit", "\u201cquoted\u201d"),
        (b"\x93quoted\x94 \x80", "iso-8859-1", "\u201cquoted\u201d €"),
        ("①髙".encode("cp932"), "windows-31j", "①髙"),
        ("①髙".encode("cp932"), "shift_jis", "①髙"),
        (b"\x1b$B-!F|K\\\x1b(B a", "iso-2022-jp", "①日本 a"),
        (b"\x1b$BF|\r\nF|\x1b(B", "ISO-2022-JP", "日\r\n日"),
        (b"\x1b(I1\x1b(B", "iso-2022-jp", "ｱ"),
        (b"\xad\xa1", "euc-jp", "①"),
        ("한글".encode("cp949"), "ks_c_5601-1987", "한글"),
        ("한글".encode("iso2022_kr"), "iso-2022-kr", "한글"),
        ("漢字€".encode("gb18030"), "gb2312", "漢字€"),
        ("привет".encode("koi8-r"), "koi8-r", "привет"),
        ("שלום".encode("iso8859-8"), "iso-8859-8-i", "שלום"),
        (b"\xff\xfea\x00", "utf-16", "a"),
        (b"\xef\xbb\xbftext", "iso-8859-1", "text"),
        (b"+2AA-", "utf-7", "+2AA-"),
        (b"xn--bad", "punycode", "xn--bad"),
    ],
)
def test_labels_mean_what_the_encoding_standard_says(data: bytes, label: str, text: str) -> None:
    assert decode(data, label) == text


def test_a_cut_text_may_end_within_a_character() -> None:
    data = "grü".encode()[:-1]
    assert (decode(data, "", is_cut=True), name_of(data, "", is_cut=True)) == ("gr", "utf-8")
    assert (decode(data, ""), name_of(data, "")) == ("grÃ", "windows-1252")


@given(
    data=st.binary(max_size=64),
    label=st.sampled_from(["", "iso-2022-jp", "euc-jp", "big5", "utf-16", "hz-gb-2312", "\0"]),
)
def test_every_text_can_be_decoded_and_sent(data: bytes, label: str) -> None:
    decode(data, label).encode()


def test_a_codec_that_cannot_be_imported_is_an_unknown_label(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(label: str) -> object:
        raise LookupError(f"unknown encoding: {label}")

    monkeypatch.setattr(webencodings, "lookup", lookup)
    assert name_of("grüße".encode(), "koi8-r") == "utf-8"
    assert name_of(b"gr\xfc\xdfe", "koi8-r") == "windows-1252"
