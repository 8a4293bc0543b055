"""HTML of mail, made fit for a frame without scripts, without the network, and with an origin of its own.

What keeps the page safe is the sandbox of the frame and the Content-Security-Policy (penstock.sink.web.guard): nothing
here has to recognize what is dangerous. This module makes links open a new tab, and shows images of the same message.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from penstock.sink.web import charset
from penstock.sink.web.mime import Part, Structure, Work

MAX_HTML: Final = 8 << 20
"""Octets of HTML that are shown."""
MAX_IMAGES: Final = 16 << 20
"""Octets of the images that are shown within an HTML text; those beyond are with the attachments."""
_MAX_REFERENCES: Final = 1000

_URL: Final = r"\s*+[\"']?\s*+(?:https?:)?//"
_LOADING_TAG: Final = re.compile(
    r"(?:(?:img|source|video|audio|input|table|tr|td|th|body|embed|iframe)\b[^>]*?\s(?:src|srcset|poster|background)"
    rf"|(?:link|image|use)\b[^>]*?\s(?:xlink:)?href)\s*+={_URL}",
    re.IGNORECASE,
)
"""A tag, without its "<", that loads something: matched at its beginning, so that it takes linear time."""
_LOADING_STYLE: Final = re.compile(rf"\burl\({_URL}|@import\b{_URL}", re.IGNORECASE)
_IMAGE_TYPE: Final = re.compile(r"image/[a-z0-9.+-]+")
_CID: Final = re.compile(r"""\bcid:([^"'\s<>)]+)""", re.IGNORECASE)
_TARGET: Final = re.compile(r"<(?:a|area|form|base)\b[^<>]*+>", re.IGNORECASE)
_TARGET_ATTRIBUTE: Final = re.compile(r"""\starget\s*+=\s*+(?:"[^"]*"|'[^']*'|[^\s>]+)""", re.IGNORECASE)
_HEAD: Final = re.compile(r"\s*+(?:<!--.*?-->\s*+)?(?:<!doctype[^>]*+>)?", re.IGNORECASE | re.DOTALL)
_BASE: Final = '<base target="_blank">'


def has_remote_content(html: str) -> bool:
    """Return whether HTML loads anything from the network when it is shown."""
    return any(map(_LOADING_TAG.match, html.split("<"))) or _LOADING_STYLE.search(html) is not None


def for_frame(part: Part, structure: Structure, work: Work) -> bytes:
    """Return an HTML part as UTF-8. Links have no other target than a new tab; images of the message are in it."""
    data = part.content(work, MAX_HTML)
    html = charset.decode(data, part.charset, is_cut=len(data) >= MAX_HTML)
    html = _TARGET.sub(lambda tag: _TARGET_ATTRIBUTE.sub("", tag[0]), html)
    images = {each.content_id: each for each in structure.parts if each.content_id and _IMAGE_TYPE.fullmatch(each.type)}
    html = _with_images(html, images, work)
    head = _HEAD.match(html)
    at = head.end() if head else 0
    return (html[:at] + _BASE + html[at:]).encode("utf-8", "replace")


def _with_images(html: str, images: Mapping[str, Part], work: Work) -> str:
    """Replace references to images (RFC 2392) by the images: a frame with its own origin may not ask for them."""
    made: dict[str, str] = {}
    room, count = MAX_IMAGES, 0

    def image(found: re.Match[str]) -> str:
        nonlocal room, count
        name = unquote(found[1])
        count += 1
        if name not in images or count > _MAX_REFERENCES:
            return found[0]
        if name not in made:
            part = images[name]
            data = part.content(work, room + 1)
            made[name] = ""
            if len(data) <= room:
                made[name] = f"data:{part.type};base64,{base64.b64encode(data).decode()}"
        room -= len(made[name])
        return made[name] if room >= 0 and made[name] else found[0]

    return _CID.sub(image, html) if images else html
