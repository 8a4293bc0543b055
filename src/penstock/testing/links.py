"""The links of a message: what a user can click."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Final

_URL: Final = re.compile(r"https?://[^\s<>\"'`\\^{|}\x00-\x1f]+", re.IGNORECASE)
_AFTER: Final = ".,;:!?*_~"
"""Punctuation that ends a sentence rather than a URL."""
_PAIRS: Final = {")": "(", "]": "["}


class _Anchors(HTMLParser):
    """Collects the targets of links."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the target of a link."""
        if tag in ("a", "area"):
            self.found += [value.strip() for name, value in attrs if name == "href" and value]


def links_of(html: str, text: str) -> tuple[str, ...]:
    """Return the http and https links of a message in their order, each once: those of the HTML first.

    >>> links_of('<a href="https://example.org/?a=1&amp;b=2">Confirm</a>', "See https://example.org/help.")
    ('https://example.org/?a=1&b=2', 'https://example.org/help')
    """
    anchors = _Anchors()
    anchors.feed(html)
    anchors.close()
    found = [target for target in anchors.found if _URL.match(target)]
    found += [_trimmed(each) for each in _URL.findall(text)]
    return tuple(dict.fromkeys(found))


def _trimmed(url: str) -> str:
    """Return a URL of running text without the punctuation after it."""
    while url and (url[-1] in _AFTER or (url[-1] in _PAIRS and url.count(url[-1]) > url.count(_PAIRS[url[-1]]))):
        url = url[:-1]
    return url
