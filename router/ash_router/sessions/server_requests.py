"""Requests of sandboxes to a client, in the handshake era: the hive replaces their ids, and restores them in answers.

A sandbox counts its requests for itself, so two of them may ask under the same id. On the client's side each request
has an id of the hive's, which nobody can guess; the answer to it goes to the session that asked, under its own id.
These ids, and those of resumable events, are all that is changed in a stream.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Final, cast

import orjson

from ash_router.http.bodies import Message
from ash_router.http.event_stream import EventSplitter
from ash_router.sessions.session_map import Ask, LegacySession, UpstreamSession

__all__ = ["SessionEvents", "answer_for_sandbox", "find_resumed", "rewrite_request_id"]

MAX_ASKS: Final = 256
"""The most unanswered requests to one client that are remembered; the oldest are forgotten."""

_DATA: Final = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
_EVENT_ID: Final = re.compile(rb"^id: ?([^\r\n]*)", re.MULTILINE)
_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]{1,512}")


class SessionEvents:
    """The `EventEditor` of one stream: replaces the ids of requests and of events."""

    def __init__(self, session: LegacySession, upstream: UpstreamSession) -> None:
        self._session = session
        self._upstream = upstream
        self._splitter = EventSplitter(self._edit)

    @property
    def between_events(self) -> bool:
        return self._splitter.between_events

    def feed(self, data: bytes, *, last: bool) -> bytes:
        return self._splitter.feed(data, last=last)

    def _edit(self, event: bytes) -> bytes:
        if b'"method"' in event:
            event = rewrite_request_id(self._session, self._upstream, event)
        if event.startswith(b"id:") or b"\nid:" in event or b"\rid:" in event:
            event = _EVENT_ID.sub(self._named, event, 1)
        return event

    def _named(self, found: re.Match[bytes]) -> bytes:
        if not found[1] or _PRINTABLE.fullmatch(found[1]) is None:
            return found[0]  # it can be no header, so no client can resume from it
        return b"id: " + _namespace(self._upstream) + found[1]


def rewrite_request_id(session: LegacySession, upstream: UpstreamSession, event: bytes) -> bytes:
    """Return an event with a fresh id for the request in it; unchanged if it holds no request."""
    text = b"\n".join(_DATA.findall(event))
    fields = _fields(text)
    if not isinstance(fields.get("method"), str):
        return event
    request_id: Any = fields.get("id")
    if isinstance(request_id, str | int) and not isinstance(request_id, bool):
        given = f"ash-{secrets.token_hex(12)}"
        edited = _replaced(event, "id", request_id, {**fields, "id": given}, given)
        if edited is not event:
            _remember(session, upstream, request_id, given)
        return edited
    if fields["method"] == "notifications/cancelled":
        return _cancelled(session, upstream, event, fields)
    return event


def answer_for_sandbox(session: LegacySession, message: Message) -> tuple[UpstreamSession, bytes] | None:
    """Return the upstream session that a client's answer is for, and the answer with the sandbox's own request id."""
    given: Any = message.fields.get("id")
    if not isinstance(given, str) or message.method is not None:
        return None
    ask = session.asks.pop(given, None)
    if ask is None:
        return None
    raw = message.raw
    spot = re.compile(rb'"id"\s*:\s*(' + re.escape(orjson.dumps(given)) + rb")")
    places = list(spot.finditer(raw))
    if len(places) == 1:
        return ask.upstream, raw[: places[0].start(1)] + orjson.dumps(ask.request_id) + raw[places[0].end(1) :]
    return ask.upstream, orjson.dumps({**message.fields, "id": ask.request_id})


def find_resumed(session: LegacySession, last_event_id: bytes) -> tuple[UpstreamSession, bytes] | None:
    """Return the upstream session that a client's `Last-Event-ID` is from, and the sandbox's own id of the event."""
    for upstream in session.upstreams.values():
        name = _namespace(upstream)
        if last_event_id.startswith(name) and len(last_event_id) > len(name):
            return upstream, last_event_id[len(name) :]
    return None


def _namespace(upstream: UpstreamSession) -> bytes:
    return f"{upstream.route.sandbox_id}.".encode()


def _remember(session: LegacySession, upstream: UpstreamSession, request_id: str | int, given: str) -> None:
    while len(session.asks) >= MAX_ASKS:
        session.asks.pop(next(iter(session.asks)))
    session.asks[given] = Ask(upstream, request_id)


def _cancelled(session: LegacySession, upstream: UpstreamSession, event: bytes, fields: dict[str, Any]) -> bytes:
    params: Any = fields.get("params")
    own: Any = cast("dict[str, Any]", params).get("requestId") if isinstance(params, dict) else None
    for given, ask in session.asks.items():
        if ask.upstream is upstream and ask.request_id == own and type(ask.request_id) is type(own):
            del session.asks[given]
            return _replaced(event, "requestId", own, {**fields, "params": {**params, "requestId": given}}, given)
    return event


def _replaced(event: bytes, key: str, old: str | int, fields: dict[str, Any], new: str) -> bytes:
    """Return `event` with `old` replaced by `new`; unchanged if that needs re-encoding and it is nested too deeply."""
    spot = re.compile(rb'"' + key.encode() + rb'"\s*:\s*(' + re.escape(orjson.dumps(old)) + rb")(?=\s*[,}])")
    places = list(spot.finditer(event))
    if len(places) == 1:
        return event[: places[0].start(1)] + orjson.dumps(new) + event[places[0].end(1) :]
    # the same words stand in its arguments too: the message is written anew, and all other lines stay
    try:
        written = orjson.dumps(fields)
    except TypeError:
        return event
    end = b"\r\n" if b"\r\n" in event else b"\n"
    others = [line for line in event.splitlines() if line and not line.startswith(b"data")]
    return b"".join(line + end for line in (*others, b"data: " + written, b""))


def _fields(text: bytes) -> dict[str, Any]:
    try:
        message: Any = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return cast("dict[str, Any]", message) if isinstance(message, dict) else {}
