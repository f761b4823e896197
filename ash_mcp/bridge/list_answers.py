"""Answers to `tools/list`, other lists and `subscriptions/listen` while the hive starts.

A list is the hive's own if that comes soon. Otherwise it is that of a hive without sandboxes, and when the hive's own
list comes and is another, the host is told by `notifications/tools/list_changed`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ash_mcp._protocol import as_object, parse_message
from ash_mcp.bridge.frames import Frame, RequestId, error_line, notification_line, result_line
from ash_mcp.errors import AshError, AshTimeout, ConnectFailed

__all__ = ["ListAnswers"]

_CHANGED: Final = "notifications/tools/list_changed"
_ACKNOWLEDGED: Final = "notifications/subscriptions/acknowledged"
_SUBSCRIBABLE: Final = ("toolsListChanged", "promptsListChanged", "resourcesListChanged", "resourceSubscriptions")


@dataclass(slots=True)
class _Asked:
    """One list that the hive was asked for."""

    frame: Frame
    settled: anyio.Event = field(default_factory=anyio.Event)
    """Set when the hive has answered, or does not for now."""
    line: bytes | None = None
    given: Mapping[str, Any] | None = None
    """What the host was given instead."""
    tellings: int = 0
    """How often the host had been told of a change when it was given that."""


class ListAnswers:
    """Answers lists, and remembers who is to be told that one has changed.

    Args:
        ask: Returns the hive's answer to a request, once there is a hive.
        found: Returns when a hive that could not be found or started has been found after all.
        send: Sends a line to the host.
        streams: Runs what goes on after an answer.
        seconds: How long the hive has.
    """

    def __init__(
        self,
        ask: Callable[[Frame], Awaitable[bytes]],
        found: Callable[[], Awaitable[None]],
        send: Callable[[bytes], Awaitable[None]],
        streams: TaskGroup,
        seconds: float,
    ) -> None:
        self._ask = ask
        self._found = found
        self._send = send
        self._streams = streams
        self._seconds = seconds
        self._subscriptions: dict[RequestId, bool] = {}
        """Those that are acknowledged, each with whether it hears of tools."""
        self._unheard: dict[RequestId, bool] = {}
        """Those that the hive has not acknowledged yet, each with whether the host has asked for something since."""
        self._tellings = 0
        self._owed = False
        """Whether the tools changed while the host had no subscription yet."""

    async def answer(self, frame: Frame, known: Mapping[str, Any]) -> bytes:
        """Return the line that answers a request for a list; `known` is the result that needs no hive."""
        asked = _Asked(frame)
        self._streams.start_soon(self._settle, asked)
        with anyio.move_on_after(self._seconds):
            await asked.settled.wait()
        if asked.line is not None:
            return asked.line
        asked.given, asked.tellings = known, self._tellings
        return result_line(frame.id, known)

    async def acknowledge(self, frame: Frame) -> None:
        """Acknowledge a subscription before there is a hive: some hosts wait for that before they list anything.

        A hive grants all that it knows, so this does, too.
        """
        assert frame.id is not None
        asked = as_object(frame.params.get("notifications")) or {}
        granted = {name: asked[name] for name in _SUBSCRIBABLE if asked.get(name)}
        self._subscriptions[frame.id] = "toolsListChanged" in granted
        self._unheard[frame.id] = False
        await self._send(notification_line(_ACKNOWLEDGED, frame.id, {"notifications": granted}))
        await self._pay(frame.id)

    def note_request(self) -> None:
        """Note that the host sends a request, which may change the tools or list them."""
        self._unheard = dict.fromkeys(self._unheard, True)

    async def absorb_acknowledgement(self, frame: Frame, message: Mapping[str, Any]) -> bool:
        """Return whether `message` is the hive's acknowledgement of a subscription that `acknowledge` has answered.

        The host must not get it twice. Changes before the hive knew of the subscription reached nobody, so the host is
        told of them now.
        """
        if message.get("method") != _ACKNOWLEDGED or frame.id is None or frame.id not in self._subscriptions:
            return False
        if self._unheard.pop(frame.id, False) and self._subscriptions[frame.id]:
            await self._say_changed(frame.id)
        return True

    async def note_subscription(self, frame: Frame, message: Mapping[str, Any]) -> None:
        """Note the subscription that the hive has opened, if `message` acknowledges it."""
        if message.get("method") != _ACKNOWLEDGED or frame.id is None or frame.id in self._subscriptions:
            return
        granted = as_object((as_object(message.get("params")) or {}).get("notifications")) or {}
        self._subscriptions[frame.id] = granted.get("toolsListChanged") is True
        await self._pay(frame.id)

    def forget_subscription(self, request_id: RequestId) -> None:
        """Forget the subscription that a request had opened, if it had."""
        self._subscriptions.pop(request_id, None)
        self._unheard.pop(request_id, None)

    async def _pay(self, request_id: RequestId) -> None:
        if self._owed and self._subscriptions[request_id]:
            self._owed = False
            await self._say_changed(request_id)

    async def _settle(self, asked: _Asked) -> None:
        while asked.line is None:
            try:
                asked.line = await self._ask(asked.frame)
            except (ConnectFailed, AshTimeout):
                asked.settled.set()
                await self._found()
            except AshError as error:
                asked.line = error_line(asked.frame.id, error)
        asked.settled.set()
        if asked.given is None or self._tellings > asked.tellings:
            return
        if _tools(parse_message(asked.line)) not in (None, asked.given.get("tools")):
            await self._tell(asked.frame)

    async def _tell(self, frame: Frame) -> None:
        if frame.version is None:
            await self._say_changed()
            return
        hearing = [request_id for request_id, hears in self._subscriptions.items() if hears]
        self._owed = not hearing
        for request_id in hearing:
            await self._say_changed(request_id)

    async def _say_changed(self, subscription: RequestId | None = None) -> None:
        self._tellings += 1
        if subscription in self._unheard:
            self._unheard[subscription] = False
        await self._send(notification_line(_CHANGED, subscription))


def _tools(answer: Mapping[str, Any] | None) -> Any:
    return (as_object((answer or {}).get("result")) or {}).get("tools")
