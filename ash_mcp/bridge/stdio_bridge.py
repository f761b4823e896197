"""`ash up --stdio`: MCP on stdin and stdout for a hive that speaks streamable HTTP.

The bridge joins this user's hive, or starts one in the background, and passes messages on without knowing what they
mean, so that every call takes the one way through the hive. It speaks both eras, message by message: a request with
the envelope of the stateless era is one POST, and closing its stream cancels it; all others belong to the session
that `initialize` opened. A hive that has gone is looked for, or started, again at the next request.
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

from ash_mcp._frames import BadFrame, Frame, RequestId, answer_to, error_line, one_line, read_frame
from ash_mcp._hive_http import HiveHttp, Reply
from ash_mcp._legacy_session import LegacySession, SessionLost
from ash_mcp._stdio import StdinTooLong, stdio_lines
from ash_mcp.background import UserHive
from ash_mcp.errors import AshError, ConnectFailed, RemoteProtocolError, StreamBroken
from ash_mcp.settings import ClientSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["Bridge", "Whereabouts", "run_bridge"]

FindHive = Callable[[], Awaitable[str]]
"""Returns the URL of a hive that serves now, or raises an `AshError` that says why there is none."""

_DRAIN_SECONDS: Final = 10.0
"""How long answers are waited for after stdin has ended; a host that does not want them sends SIGTERM."""
_CLOSE_SECONDS: Final = 2.0
_TAIL_SECONDS: Final = 0.5
"""How long a stream may go on after its answer; read to its end, its connection can be used again."""
_SENT_SECONDS: Final = 1.0
_NOTIFICATION_SECONDS: Final = 10.0


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
        await Bridge(settings, Whereabouts(find), stdio.writer.send).run(stdio.reader)
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


def _say(words: str) -> None:
    """Tell the person behind the host; hosts show or keep what their servers write to stderr."""
    sys.stderr.write(f"ash: {words}\n")
    sys.stderr.flush()


class Whereabouts:
    """Where the hive is, looked up once and again after it was lost."""

    def __init__(self, find: FindHive) -> None:
        self._find = find
        self._url: str | None = None
        self._lock = anyio.Lock()
        self._round = 0
        self._failure: AshError | None = None

    async def get(self) -> str:
        """Return the hive's URL; those who wait for the same look-up share its outcome.

        Raises:
            AshError: There is no hive.
        """
        if self._url is not None:
            return self._url
        before = self._round
        async with self._lock:
            if self._url is not None:
                return self._url
            if self._failure is not None and self._round != before:
                raise self._failure
            try:
                self._url, self._failure = await self._find(), None
            except AshError as error:
                self._failure = error
                _say(error.message)
                raise
            finally:
                self._round += 1
            return self._url

    def lost(self, url: str) -> None:
        """Note that nothing answers at `url`."""
        if self._url == url:
            self._url = None


@dataclass(slots=True)
class _Call:
    """A request of the host's that is not answered yet."""

    frame: Frame
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    sent: anyio.Event = field(default_factory=anyio.Event)
    cancelled: bool = False
    """Whether the host has cancelled it and wants no answer."""


class Bridge:
    """Passes messages between a host and a hive.

    Args:
        settings: Token, scope and bounds; its URL says only whether TLS and proxies matter.
        where: Says where the hive is.
        send: Takes lines for the host.
        transport: Takes the place of the network, in tests.
    """

    def __init__(
        self,
        settings: ClientSettings,
        where: Whereabouts,
        send: Callable[[bytes], Awaitable[None]],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = HiveHttp(settings, transport)
        self._where = where
        self._send = send
        self._calls: dict[RequestId, _Call] = {}

    async def run(self, lines: AsyncIterable[bytes]) -> None:
        """Serve until `lines` end and what they asked is answered (bounded), then end the session with the hive."""
        async with anyio.create_task_group() as streams:
            self._session = LegacySession(self._http, self._send, streams)
            try:
                with anyio.CancelScope() as draining:
                    async with anyio.create_task_group() as calls:
                        streams.start_soon(self._look_ahead)
                        await self._take_all(lines, calls, streams)
                        draining.deadline = anyio.current_time() + _DRAIN_SECONDS
            finally:
                streams.cancel_scope.cancel()
                with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await self._close()

    async def _close(self) -> None:
        try:
            await self._session.close()
        except AshError as error:
            _say(f"the session was not ended: {error.message}")
        await self._http.aclose()

    async def _look_ahead(self) -> None:
        """Look for the hive before the first request needs it; that request reports a failure."""
        try:
            await self._where.get()
        except AshError:
            return

    async def _take_all(self, lines: AsyncIterable[bytes], calls: TaskGroup, streams: TaskGroup) -> None:
        try:
            async for line in lines:
                try:
                    frame = read_frame(line)
                except BadFrame as bad:
                    await self._send(bad.answer)
                    continue
                if not frame.is_request:
                    with anyio.move_on_after(_NOTIFICATION_SECONDS):
                        await self._pass_on(frame)
                    continue
                call = _Call(frame)
                assert frame.id is not None
                self._calls[frame.id] = call
                endless = frame.method == "subscriptions/listen"
                (streams if endless else calls).start_soon(self._serve, call, frame.id)
        except StdinTooLong as exc:
            _say(str(exc))

    async def _pass_on(self, frame: Frame) -> None:
        """Pass on what has no answer; in the stateless era only cancelling means anything."""
        try:
            if frame.method == "notifications/initialized":
                await self._session.note_initialized()
            elif frame.method != "notifications/cancelled" or await self._cancel(frame):
                await self._session.post(frame.raw)
        except AshError as error:
            _say(f"a message was lost: {error.message}")

    async def _cancel(self, frame: Frame) -> bool:
        """Cancel the request that a notification names; True if the hive must be told in words."""
        named: Any = frame.params.get("requestId")
        call = self._calls.get(named) if isinstance(named, str | int) else None
        if call is None:
            return True
        call.cancelled = True
        if call.frame.version is not None:
            call.scope.cancel()
            return False
        with anyio.move_on_after(_SENT_SECONDS):  # the hive ignores the cancelling of what it has not got yet
            await call.sent.wait()
        return True

    async def _serve(self, call: _Call, request_id: RequestId) -> None:
        """Get one request answered, whatever happens."""
        try:
            with call.scope:
                try:
                    await self._attempt(call)
                except BadFrame as bad:
                    await self._send(bad.answer)
                except AshError as error:
                    if not call.cancelled:
                        await self._send(error_line(request_id, error))
        finally:
            if self._calls.get(request_id) is call:
                del self._calls[request_id]

    async def _attempt(self, call: _Call) -> None:
        """Pass a request on; once more if it has certainly not run."""
        if call.frame.method == "initialize":
            async with self._session.lock:
                await self._twice(call, self._open_session)
        elif call.frame.version is not None:
            await self._twice(call, self._post_modern)
        else:
            await self._twice(call, self._post_in_session)

    async def _twice(self, call: _Call, post: Callable[[_Call, str], Awaitable[None]]) -> None:
        for again in (True, False):
            url = await self._where.get()
            try:
                return await post(call, url)
            except ConnectFailed:
                self._where.lost(url)
                if not again:
                    raise
            except SessionLost:
                if not again:
                    raise RemoteProtocolError("the hive lost the session twice; connect again") from None

    async def _post_modern(self, call: _Call, url: str) -> None:
        async with self._http.post(url, call.frame.raw, call.frame.modern_headers(), call.sent.set) as reply:
            await self._answer(call, reply)

    async def _open_session(self, call: _Call, url: str) -> None:
        async with self._http.post(url, call.frame.raw, {}, call.sent.set) as reply:

            def note(answer: Mapping[str, Any]) -> None:
                if "result" in answer:
                    self._session.opened(call.frame, url, reply.session_id, answer)

            await self._answer(call, reply, note)

    async def _post_in_session(self, call: _Call, url: str) -> None:
        headers = await self._session.ensure(url)
        async with self._http.post(url, call.frame.raw, headers, call.sent.set) as reply:
            if reply.head.status == 404 and headers:
                self._session.forget(headers["mcp-session-id"])
                raise SessionLost
            await self._answer(call, reply)

    async def _answer(self, call: _Call, reply: Reply, note: Callable[[Mapping[str, Any]], object] = bool) -> None:
        """Hand on a reply's messages, and the one that answers the request to `note` before the host has it."""
        answered = False
        tail = anyio.CancelScope()

        async def take(raw: bytes, message: Mapping[str, Any]) -> bool:
            nonlocal answered
            line = answer_to(call.frame, raw, message)
            if line is not None:
                answered = True
                note(message)
            await self._send(line or one_line(raw))
            if line is not None:
                tail.deadline = anyio.current_time() + _TAIL_SECONDS
            return False

        with tail:
            await reply.read(take)
        if not answered:
            raise StreamBroken("the hive's stream ended before the answer; whether the call ran is unknown")
