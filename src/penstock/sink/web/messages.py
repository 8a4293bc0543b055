"""The part of the HTTP API that is about kept mail (see penstock.sink.web.app)."""

from __future__ import annotations

from typing import Annotated, Final
from urllib.parse import quote

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.sink.kept import KeptMessage, KeptMessages
from penstock.sink.web import html, mime, view
from penstock.sink.web.answers import (
    Refused,
    as_json,
    encoded,
    in_thread,
    number_of,
    read_json,
    releasing_limiter,
    route,
)
from penstock.sink.web.charset import decode
from penstock.sink.web.guard import PART_POLICY, PDF_POLICY, REMOTE_PART_POLICY
from penstock.sink.web.mime import Work
from penstock.sink.web.release import Hop, ReleaseError
from penstock.sink.web.search import Query, QueryError

MAX_LISTED: Final = 1000
_LISTED: Final = 50
_MAX_TEXT: Final = 8 << 20
"""Octets of a text part that are shown in a tab of its own."""

Meta = msgspec.Meta


class MarkRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of PATCH /api/messages/ID."""

    is_read: bool


class ReleaseRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /api/messages/ID/release."""

    recipients: Annotated[list[Annotated[str, Meta(min_length=3, max_length=320)]], Meta(min_length=1, max_length=100)]
    sender: Annotated[str, Meta(max_length=320)] | None = None
    """Instead of the message's own sender; empty for the null sender."""


class MessagesApi:
    """The handlers of kept messages."""

    def __init__(self, shelf: KeptMessages | None, hop: Hop | None) -> None:
        self._kept_messages = shelf
        self._hop = hop

    def routes(self) -> list[Route]:
        """Return the routes of the handlers."""
        one = "/api/messages/{name}"
        return [
            route("/api/messages", self.find, "q", "limit", "before"),
            route("/api/messages", self.delete_matching, "q", method="DELETE"),
            route(one, self.show),
            route(one, self.mark, method="PATCH"),
            route(one, self.delete, method="DELETE"),
            route(f"{one}/raw", self.raw),
            route(f"{one}/release", self.release, method="POST"),
            route(f"{one}/parts/{{number:int}}", self.part),
            route(f"{one}/parts/{{number:int}}/view", self.view_part, "remote"),
        ]

    def _kept_or_refuse(self) -> KeptMessages:
        if self._kept_messages is None:
            raise Refused(409, "this sink keeps no messages: start it with --keep last:1000")
        return self._kept_messages

    def _message(self, request: Request) -> KeptMessage:
        message = None if self._kept_messages is None else self._kept_messages.get(request.path_params["name"])
        if message is None:
            raise Refused(404, "this message is not kept, or no longer")
        return message

    async def find(self, request: Request) -> Response:
        """List the messages that match a query, the newest first."""
        shelf, query = self._kept_or_refuse(), _query(request.query_params.get("q", ""))
        limit = number_of(request, "limit", _LISTED, 1, MAX_LISTED)
        changes = shelf.changes
        wanted = limit + 1 if query.is_empty else shelf.count
        candidates = shelf.newest(wanted, request.query_params.get("before"))

        def answer(work: Work) -> bytes:
            found = candidates if query.is_empty else query.find(candidates, limit + 1, work)
            lines = [view.line(each, work) for each in found[:limit]]
            return msgspec.json.encode(
                {
                    "kept": len(shelf),
                    "keeps": shelf.count,
                    "changes": changes,
                    "has_more": len(found) > limit,
                    "messages": lines,
                }
            )

        return encoded(await in_thread(request, answer))

    async def delete_matching(self, request: Request) -> Response:
        """Delete the messages that match a query; without one, all of them."""
        shelf, text = self._kept_or_refuse(), request.query_params.get("q")
        if text is None:
            return as_json({"deleted": shelf.clear()})
        query = _query(text)
        if query.is_empty:
            raise Refused(400, "q is empty; leave it out to delete all messages")
        candidates = shelf.newest(shelf.count)
        found = await in_thread(request, lambda work: query.find(candidates, shelf.count, work))
        return as_json({"deleted": sum(shelf.delete(each.id) for each in found)})

    async def show(self, request: Request) -> Response:
        """Return a message with its header and parts."""
        message = self._message(request)
        return encoded(await in_thread(request, lambda work: msgspec.json.encode(view.view(message, work))))

    async def mark(self, request: Request) -> Response:
        """Mark a message as read or unread."""
        message = self._message(request)
        wanted = await read_json(request, MarkRequest)
        self._kept_or_refuse().mark(message.id, is_read=wanted.is_read)
        return as_json({"is_read": wanted.is_read})

    async def delete(self, request: Request) -> Response:
        """Delete a message."""
        self._kept_or_refuse().delete(self._message(request).id)
        return as_json({"deleted": 1})

    async def raw(self, request: Request) -> Response:
        """Return a message as it was received."""
        message = self._message(request)
        if message.is_cut:
            raise Refused(409, _cut(message))
        headers = {"content-disposition": f'inline; filename="{message.id}.eml"'}
        return Response(message.raw, media_type="text/plain; charset=utf-8", headers=headers)

    async def release(self, request: Request) -> Response:
        """Send a message on to addresses that the user names."""
        message, hop = self._message(request), self._hop
        if hop is None:
            raise Refused(409, "this sink releases no messages: start it with --release HOST:PORT")
        if message.is_cut:
            raise Refused(409, _cut(message))
        wanted = await read_json(request, ReleaseRequest)
        sender = message.sender if wanted.sender is None else wanted.sender
        for address in (sender, *wanted.recipients):
            if any(character.isspace() or character in "<>\x7f" or character < " " for character in address):
                raise Refused(400, f"{address!r} is not an address")
        try:
            refused = await trio.to_thread.run_sync(
                hop.send, message, sender, wanted.recipients, limiter=releasing_limiter()
            )
        except ReleaseError as exc:
            raise Refused(502, str(exc)) from exc
        return as_json({"released": [each for each in wanted.recipients if each not in refused], "refused": refused})

    async def _content(self, request: Request) -> view.PartContent:
        message, number = self._message(request), request.path_params["number"]
        found = await in_thread(request, lambda work: view.content(message, number, work))
        if found is None:
            raise Refused(404, "this message has no part of this number")
        if not view.is_whole(message, found.part):
            raise Refused(409, _cut(message))
        return found

    async def part(self, request: Request) -> Response:
        """Return a part whole, decoded, in its own charset."""
        found = await self._content(request)
        policy = PDF_POLICY if found.media_type == "application/pdf" else PART_POLICY
        way = "inline" if found.is_inline else "attachment"
        headers = {
            "content-security-policy": policy,
            "content-disposition": f"{way}; filename*=UTF-8''{quote(found.filename, safe='')}",
        }
        return Response(found.data, media_type=found.media_type, headers=headers)

    async def view_part(self, request: Request) -> Response:
        """Return an HTML part for a frame, or a text part as UTF-8."""
        remote = request.query_params.get("remote", "false")
        if remote not in ("true", "false"):
            raise Refused(400, f"remote is true or false, not {remote[:40]!r}")
        message, number = self._message(request), request.path_params["number"]

        def made(work: Work) -> tuple[str, bytes] | None:
            structure = mime.read(message.raw, work)
            part = structure.parts[number] if number < len(structure.parts) else None
            kind = None if part is None else view.shown_as(part)
            if part is None or kind not in ("html", "text", "calendar"):
                return None
            if kind == "html":
                return "text/html; charset=utf-8", html.for_frame(part, structure, work)
            data = part.content(work, _MAX_TEXT)
            text = decode(data, part.charset, is_cut=len(data) >= _MAX_TEXT)
            return "text/plain; charset=utf-8", text.encode()

        found = await in_thread(request, made)
        if found is None:
            raise Refused(404, "this message has no text of this number")
        policy = REMOTE_PART_POLICY if remote == "true" else PART_POLICY
        return Response(found[1], media_type=found[0], headers={"content-security-policy": policy})


def _query(text: str) -> Query:
    try:
        return Query(text)
    except QueryError as exc:
        raise Refused(400, str(exc)) from exc


def _cut(message: KeptMessage) -> str:
    return (
        f"only the first {len(message.raw):,} of {message.size:,} octets of this message are kept: it is larger than "
        "the room for mail in memory; --keep maildir:DIR keeps messages of any size"
    )
