"""One collection of the API server, followed: what there is, then every change, over broken connections too."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Final

import anyio

from ash_hub.backends.kubernetes.api import Api, ApiRefusal, Json
from ash_mcp.errors import AshError

__all__ = ["Informer"]

_WATCH_SECONDS: Final = 60
"""The server ends a watch after it; so a connection that has gone silently is noticed soon after."""
_LEAST_PAUSE_SECONDS: Final = 0.1
_MOST_PAUSE_SECONDS: Final = 2.0
_DOUBT_SECONDS: Final = 1.0
"""A watch that said something so recently is not doubted."""
_log = logging.getLogger("ash.hub")


class Informer:
    """Follows one collection. A list comes first, and again where changes were missed.

    Args:
        selector: The query that picks the objects.
        listed: Told the uids of all objects of a list, and its version, once `changed` was told each as `ADDED`.
        changed: Told `ADDED`, `MODIFIED` or `DELETED` and the object. An error in it is logged and is that object's.
        recovered: Told when it hears again after it heard nothing.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        selector: dict[str, str],
        listed: Callable[[set[str], int], None],
        changed: Callable[[str, Json], None],
        recovered: Callable[[], None] = lambda: None,
    ) -> None:
        self._api = api
        self._path = path
        self._selector = selector
        self._listed = listed
        self._changed = changed
        self._recovered = recovered
        self._version = ""
        self._watching = anyio.CancelScope()
        self._heard_at = 0.0
        self.heard_to = 0
        """The version up to which everything has been told."""
        self.problem: str | None = None
        """Why it hears nothing now."""
        self.synced = asyncio.Event()
        """Set once the first list came."""

    def doubt(self) -> None:
        """Ask for the watch anew, since another request was not answered: its connection may be as dead."""
        if time.monotonic() - self._heard_at > _DOUBT_SECONDS:
            self._watching.cancel()

    async def run(self) -> None:
        """Follow the collection until cancelled."""
        pause = _LEAST_PAUSE_SECONDS
        while True:
            wanted = 0.0
            try:
                await self._follow()
                pause = _LEAST_PAUSE_SECONDS
                continue
            except ApiRefusal as refusal:
                self._version = ""  # 410, or whatever else it may be: a new list is right
                if refusal.status != 410:
                    self._note(f"the Kubernetes API refuses {self._path}: {refusal.message}")
            except AshError as error:
                self._note(error.message)
                wanted = float(error.data.get("retry_after_seconds", 0.0))
            except Exception as error:
                _log.exception("following %s failed", self._path)
                self._version = ""
                self._note(f"{type(error).__name__}: {error}")
            await asyncio.sleep(max(wanted, pause * random.uniform(0.5, 1.0)))
            pause = min(pause * 2, _MOST_PAUSE_SECONDS)

    async def _follow(self) -> None:
        if not self._version:
            await self._list()
        query = {**self._selector, "resourceVersion": self._version, "timeoutSeconds": str(_WATCH_SECONDS)}
        async with self._api.watch(self._path, **query) as events:
            had_problem, self.problem = self.problem is not None, None
            if had_problem:
                _log.info("the Kubernetes API answers again")
                self._recovered()
            self.synced.set()
            self._heard_at = time.monotonic()
            with anyio.CancelScope() as self._watching:
                async for event in events:
                    self._heard_at = time.monotonic()
                    self._version = str(event["object"]["metadata"]["resourceVersion"])
                    self.heard_to = int(self._version)
                    if event["type"] != "BOOKMARK":
                        self._tell(event["type"], event["object"])

    async def _list(self) -> None:
        uids: set[str] = set()
        version = ""
        async for page in self._api.pages(self._path, **self._selector):
            version = str(page["metadata"]["resourceVersion"])
            for found in page["items"]:
                uids.add(str(found["metadata"]["uid"]))
                self._tell("ADDED", found)
        self.heard_to = int(version)
        self._listed(uids, self.heard_to)
        self._version = version

    def _tell(self, kind: str, found: Json) -> None:
        try:
            self._changed(kind, found)
        except Exception:
            _log.exception("%s of %s could not be understood", kind, self._path)

    def _note(self, problem: str) -> None:
        if self.problem is None:
            _log.warning(problem)
        self.problem = problem
