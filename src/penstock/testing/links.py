"""The links of a message: what a user can click.

The HTML of a message is foreign text. html.parser of the standard library needs time that grows with the square of an
unfinished tag or comment (CVE-2025-6069), so tags are read here, each octet once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from html.entities import html5
from typing import Final

_URL: Final = re.compile(r"https?://[^\s<>\"'`\\^{|}\x00-\x1f]+", re.IGNORECASE)
_AFTER: Final = ".,;:!?*_~"
"""Punctuation that ends a sentence rather than a URL."""
_PAIRS: Final = {")": "(", "]": "["}

_NAME: Final = re.compile(r"</?([A-Za-z][^\s/>]*+)")
_ATTRIBUTE: Final = re.compile(
    r"""[\s/]*+ ([^\s/>][^\s/>=]*+) (?:\s*+=\s*+ (?: "([^"]*+)" | '([^']*+)' | (?!["'])([^\s>]*+) ) | (?!\s*+=) )""",
    re.VERBOSE,
)
_REFERENCE: Final = re.compile(r"&(?:#(?:[0-9]++|[xX][0-9A-Fa-f]++);?|[A-Za-z][A-Za-z0-9]*+(?:;|(?!=)))")
_MAX_REFERENCE: Final = 20
"""Characters of a numeric character reference; html.unescape fails for thousands of digits."""
_TAG_END: Final = re.compile(r"[\s/]*+>")
_COMMENT_END: Final = re.compile(r"--!?>")
_TEXT_END: Final = {
    name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
}
"""Elements whose content has no tags, and what ends them (HTML 13.1.2)."""


def links_of(html: str, text: str) -> tuple[str, ...]:
    """Return the http and https links of a message in their order, each once: those of the HTML first.

    >>> links_of('<a href="https://example.org/?a=1&amp;b=2">Confirm</a>', "See https://example.org/help.")
    ('https://example.org/?a=1&b=2', 'https://example.org/help')
    """
    found = [target for target in _targets(html) if _URL.match(target)]
    found += [_trimmed(each) for each in _URL.findall(text)]
    return tuple(dict.fromkeys(found))


def _targets(html: str) -> Iterator[str]:
    """Yield the targets of <a> and <area>. What is unfinished at the end of the text is no tag (HTML 13.2.5)."""
    at = html.find("<")
    while at >= 0:
        if name := _NAME.match(html, at):
            kind = "" if html.startswith("</", at) else name[1].lower()
            at, target = _read_tag(html, name.end())
            if target and at >= 0 and kind in ("a", "area"):
                yield target
            if kind in _TEXT_END and at >= 0:
                end = _TEXT_END[kind].search(html, at)
                at = end.start() if end else -1
        elif html.startswith("<!--", at):
            end = _COMMENT_END.search(html, at + 2)
            at = end.end() if end else -1
        elif html.startswith(("<!", "<?", "</"), at):
            at = html.find(">", at)
        else:
            at += 1
        at = html.find("<", at) if at >= 0 else -1


def _read_tag(html: str, at: int) -> tuple[int, str]:
    """Read the attributes of a tag. Return where it ends, -1 if it does not, and the target of its first href."""
    target: str | None = None
    while not (end := _TAG_END.match(html, at)):
        attribute = _ATTRIBUTE.match(html, at)
        if attribute is None:
            return -1, ""
        at = attribute.end()
        if target is None and attribute[1].lower() == "href":
            value = attribute[2] or attribute[3] or attribute[4] or ""
            target = _REFERENCE.sub(_character, value).strip()
    return end.end(), target or ""


def _character(reference: re.Match[str]) -> str:
    """Return what a character reference in an attribute stands for.

    Without a semicolon, a name that is followed by = or by further letters and digits is text (HTML 13.2.5.73).
    """
    text = reference[0]
    if text[1] == "#":
        return unescape(text) if len(text) <= _MAX_REFERENCE else "\ufffd"
    return html5.get(text[1:], text)


def _trimmed(url: str) -> str:
    """Return a URL of running text without the punctuation after it."""
    counts = {letter: url.count(letter) for letter in "()[]"}
    end = len(url)
    while end:
        last = url[end - 1]
        if last in _PAIRS and counts[last] > counts[_PAIRS[last]]:
            counts[last] -= 1
        elif last not in _AFTER:
            break
        end -= 1
    return url[:end]
