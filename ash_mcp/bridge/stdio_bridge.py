"""`ash up --stdio`: MCP on stdin and stdout for a hive that speaks streamable HTTP.

The bridge joins this user's hive, or starts one in the background, and forwards messages unread, so that every call
takes the same path through the hive. It answers `initialize`, `server/discover` and `ping` itself, at once
(`hive_face.py`). While the hive starts, a list that it does not answer soon is that of a hive without sandboxes, and
the host is told if the hive's own is another (`list_answers.py`). All other requests wait for the hive.

The bridge speaks both eras, message by message: a request with the envelope of the stateless era is one POST, and
closing its stream cancels it; all others belong to the session that `initialize` begins (`legacy_session.py`). A hive
that has ended is looked for, or started, again at the next request.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio.abc import TaskGroup

from ash_mcp.bridge.background import UserHive
from ash_mcp.bridge.frames import BadFrame, Frame, RequestId, answer_to, error_line, one_line, read_frame, result_line
from ash_mcp.bridge.hive_face import HiveFace
from ash_mcp.bridge.hive_http import HiveHttp, Reply
from ash_mcp.bridge.legacy_session import LegacySession, SessionLost
from ash_mcp.bridge.list_answers import ListAnswers
from ash_mcp.bridge.stdio import StdinTooLong, stdio_lines
from ash_mcp.errors import AshError, ConnectFailed, RemoteProtocolError, StreamBroken
from ash_mcp.settings import ClientSettings
from ash_mcp.wire import MODERN_VERSION

if TYPE_CHECKING:
    import httpx

__all__ = ["Bridge", "HiveLocator", "run_bridge"]

FindHive = Callable[[], Awaitable[str]]
"""Returns the URL of a hive that serves now, or raises an `AshError` that says why there is none."""

_LISTEN: Final = "subscriptions/listen"
_DRAIN_SECONDS: Final = 10.0
"""How long to wait for answers after stdin has ended; a host that does not want them sends SIGTERM."""
_CLOSE_SECONDS: Final = 2.0
_TAIL_SECONDS: Final = 0.5
"""How long a stream may go on after its answer; read to its end, its connection can be used again."""
_NOTIFICATION_SECONDS: Final = 10.0
_LIST_SECONDS: Final = 0.1
"""How long a list waits for the hive. A running hive needs less; some hosts go on without the tools of a server that
takes a second.
"""


async def run_bridge(*, url: str | None = None, find: FindHive | None = None) -> None:
    """Serve MCP on this process's stdin and stdout until stdin ends or SIGTERM or SIGINT comes.

    Args:
        url: The hive; None is `ASH_URL`, and without that this user's own. `ASH_TOKEN` and `ASH_SCOPE` count, too.
        find: Finds or starts the hive where no URL names one.

    Raises:
        ConfigError: The URL, the token or the scope cannot be used.
    """
    settings = ClientSettings.from_environment(url=url)
    if find is None:
        named = url or os.environ.get("ASH_URL")
        find = _always(settings.url) if named else UserHive().find_or_start
    async with stdio_lines() as stdio, anyio.create_task_group() as group:
        group.start_soon(_end_on_signal, group.cancel_scope)
        group.start_soon(_run_then_end, stdio.writer.run, group.cancel_scope)
        await Bridge(settings, HiveLocator(find), stdio.writer.send).run(stdio.reader)
        stdio.writer.close()
        group.cancel_scope.deadline = anyio.current_time() + _CLOSE_SECONDS


def _always(url: str) -> FindHive:
    async def find() -> str:
        return url

    return find


async def _end_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _run_then_end(work: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
    await work()
    scope.cancel()


def _log(message: str) -> None:
    """Write a message for the user to stderr, which hosts show or log."""
    sys.stderr.write(f"ash: {message}\n")
    sys.stderr.flush()


class HiveLocator:
    """The URL of the hive, looked up once, and again after it was lost."""

    def __init__(self, find: FindHive) -> None:
        self.has_answered = False
        """Whether the hive that was found has answered a request."""
        self._find = find
        self._url: str | None = None
        self._found = anyio.Event()
        self._lock = anyio.Lock()
        self._lookups = 0
        """How many look-ups have ended."""
        self._failure: AshError | None = None

    async def wait_until_found(self) -> None:
        """Wait until a `get` has found a hive; starts no look-up itself."""
        await self._found.wait()

    def note_answer(self) -> None:
        """Note that the hive has answered a request."""
        self.has_answered = True

    async def get(self) -> str:
        """Return the hive's URL; those who wait for the same look-up share its outcome.

        Raises:
            AshError: There is no hive.
        """
        if self._url is not None:
            return self._url
        before = self._lookups
        async with self._lock:
            if self._url is not None:
                return self._url
            if self._failure is not None and self._lookups != before:
                raise self._failure
            try:
                self._url, self._failure = await self._find(), None
                self._found.set()
            except AshError as error:
                self._failure = error
                _log(error.message)
                raise
            finally:
                self._lookups += 1
            return self._url

    def forget(self, url: str) -> None:
        """Forget `url`: nothing answers there."""
        if self._url == url:
            self._url, self._found, self.has_answered = None, anyio.Event(), False


@dataclass(slots=True)
class _Call:
    """A request of the host that has no answer yet."""

    frame: Frame
    send: Callable[[bytes], Awaitable[None]]
    """Takes each message of the hive's reply, as a line."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    sent: anyio.Event = field(default_factory=anyio.Event)
    """Set when the request was sent to the hive."""
    cancelled: bool = False
    """Whether the host has cancelled it, and gets no error for it."""


class Bridge:
    """Passes messages between a host and a hive.

    Args:
        settings: Token, scope and bounds; its URL says only whether TLS and proxies matter.
        locator: Finds the hive.
        send: Sends a line to the host.
        transport: Takes the place of the network, in tests.
        list_seconds: How long a list waits for a hive that has not answered any request yet.
    """

    def __init__(
        self,
        settings: ClientSettings,
        locator: HiveLocator,
        send: Callable[[bytes], Awaitable[None]],
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        list_seconds: float = _LIST_SECONDS,
    ) -> None:
        self._http = HiveHttp(settings, transport)
        self._locator = locator
        self._send = send
        self._face = HiveFace.load()
        self._list_seconds = list_seconds
        self._calls: dict[RequestId, _Call] = {}

    async def run(self, lines: AsyncIterable[bytes]) -> None:
        """Serve until `lines` end and what they asked is answered (bounded), then end the session with the hive."""
        try:
            async with anyio.create_task_group() as streams:
                self._streams = streams
                self._session = LegacySession(self._http, self._send, streams)
                self._lists = ListAnswers(
                    self._ask, self._locator.wait_until_found, self._send, streams, self._list_seconds
                )
                with anyio.CancelScope() as draining:
                    async with anyio.create_task_group() as calls:
                        streams.start_soon(self._connect)
                        await self._dispatch_lines(lines, calls, streams)
                        draining.deadline = anyio.current_time() + _DRAIN_SECONDS
                streams.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self._close()

    async def _close(self) -> None:
        try:
            await self._session.close()
        except AshError as error:
            _log(f"the session was not ended: {error.message}")
        await self._http.aclose()

    async def _connect(self) -> None:
        """Find or start the hive and open the session ahead of the first call, which reports a failure."""
        try:
            await self._session.ensure(await self._locator.get())
        except AshError:
            return

    async def _dispatch_lines(self, lines: AsyncIterable[bytes], calls: TaskGroup, streams: TaskGroup) -> None:
        try:
            async for line in lines:
                try:
                    frame = read_frame(line)
                except BadFrame as bad:
                    await self._send(bad.answer)
                    continue
                if not frame.is_request:
                    with anyio.move_on_after(_NOTIFICATION_SECONDS):
                        await self._forward_notification(frame)
                    continue
                call = _Call(frame, self._send)
                assert frame.id is not None
                self._calls[frame.id] = call
                endless = frame.method == _LISTEN
                (streams if endless else calls).start_soon(self._serve, call, frame.id)
        except StdinTooLong as exc:
            _log(str(exc))

    async def _forward_notification(self, frame: Frame) -> None:
        """Forward a notification, or an answer to the hive, in the session; without a session it is dropped.

        `notifications/cancelled` also cancels a stateless request, by closing its stream.
        """
        try:
            if frame.method == "notifications/initialized":
                await self._session.note_initialized()
            elif frame.method != "notifications/cancelled" or await self._cancel(frame):
                await self._session.post(frame.raw)
        except AshError as error:
            _log(f"a message was lost: {error.message}")

    async def _cancel(self, frame: Frame) -> bool:
        """Cancel the request that a notification names; True if the notification must reach the hive as well."""
        named: Any = frame.params.get("requestId")
        call = self._calls.get(named) if isinstance(named, str | int) else None
        if call is None:
            return True
        call.cancelled = True
        if call.frame.version is not None or not call.sent.is_set():
            call.scope.cancel()
        return call.frame.version is None

    async def _serve(self, call: _Call, request_id: RequestId) -> None:
        """Answer one request, with the hive's answer or an error."""
        try:
            with call.scope:
                try:
                    await self._answer_or_forward(call)
                except BadFrame as bad:
                    await self._send(bad.answer)
                except AshError as error:
                    if not call.cancelled:
                        await self._send(error_line(request_id, error))
        finally:
            if self._calls.get(request_id) is call:
                del self._calls[request_id]
            self._lists.forget_subscription(request_id)

    async def _answer_or_forward(self, call: _Call) -> None:
        """Answer `initialize` and its like, and a list while no hive has answered yet; forward all other requests."""
        frame = call.frame
        if frame.method != _LISTEN:
            self._lists.note_request()
        if (greeting := self._face.greeting(frame)) is not None:
            if frame.method == "initialize":
                self._session.begin(frame)
                self._streams.start_soon(self._connect)
            await self._send(result_line(frame.id, greeting))
        elif not self._locator.has_answered and (known := self._face.listing(frame)) is not None:
            await self._send(await self._lists.answer(frame, known))
        else:
            if frame.method == _LISTEN and frame.version == MODERN_VERSION and not self._locator.has_answered:
                await self._lists.acknowledge(frame)
            await self._forward(call)

    async def _ask(self, frame: Frame) -> bytes:
        """Return the last message of the hive's reply, the answer, and send the host nothing; raises as `_forward`."""
        lines: list[bytes] = []

        async def keep(line: bytes) -> None:
            lines.append(line)

        await self._forward(_Call(frame, keep))
        return lines[-1]

    async def _forward(self, call: _Call) -> None:
        """Forward a request; once more if it certainly did not run: nothing listened, or the session was unknown.

        Raises:
            AshError: There is no hive, or it refused, or broke off.
        """
        post = self._post_in_session if call.frame.version is None else self._post_modern
        for again in (True, False):
            url = await self._locator.get()
            try:
                return await post(call, url)
            except ConnectFailed:
                self._locator.forget(url)
                if not again:
                    raise
            except SessionLost:
                if not again:
                    raise RemoteProtocolError("the hive lost the session twice; connect again") from None

    async def _post_modern(self, call: _Call, url: str) -> None:
        async with self._http.post(url, call.frame.raw, call.frame.modern_headers(), call.sent.set) as reply:
            await self._forward_reply(call, reply)

    async def _post_in_session(self, call: _Call, url: str) -> None:
        headers = await self._session.ensure(url)
        async with self._http.post(url, call.frame.raw, headers, call.sent.set) as reply:
            if reply.head.status == 404 and headers:
                self._session.forget(headers["mcp-session-id"])
                raise SessionLost
            await self._forward_reply(call, reply)

    async def _forward_reply(self, call: _Call, reply: Reply) -> None:
        """Forward a reply's messages to the host."""
        self._locator.note_answer()
        answered = False
        tail = anyio.CancelScope()

        async def forward_message(raw: bytes, message: Mapping[str, Any]) -> bool:
            nonlocal answered
            line = answer_to(call.frame, raw, message)
            if line is not None:
                answered = True
            if await self._lists.absorb_acknowledgement(call.frame, message):
                return False
            await call.send(line or one_line(raw))
            if line is not None:
                tail.deadline = anyio.current_time() + _TAIL_SECONDS
            await self._lists.note_subscription(call.frame, message)
            return False

        with tail:
            await reply.read(forward_message)
        if not answered:
            raise StreamBroken("the hive's stream ended before the answer; whether the call ran is unknown")
