"""Pinned toolsets by digest: documents of the backend, cached in the store, and in memory while a sandbox uses them.

So any replica has the tools of a sandbox that another one made, also after the store was emptied and every hub ended.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

import anyio

from ash_hub.backends.base import Backend, Phase, Snapshots
from ash_hub.backends.documents import MAX_DOCUMENT_BYTES, DocumentKind
from ash_hub.spawning.toolsets import PinnedTool, Toolset, digest_of
from ash_mcp.errors import AshError, ConnectFailed, StartFailed
from ash_router.store.base import Shelf, Store

__all__ = ["CACHE", "GRACE_SECONDS", "ToolsetShelf"]

CACHE: Final = Shelf("toolsets", most=256, most_bytes=16 * 1024 * 1024, seconds=86_400.0)
"""What the store has of them."""

GRACE_SECONDS: Final = 3600.0
"""How long a document that no sandbox uses is kept. Much less passes from keeping one to the record that names it."""

_KEEP_AGAIN_SECONDS: Final = 600.0
"""After which a spawn notes anew that it uses a document; must leave most of the grace."""
_PRUNE_EVERY_SECONDS: Final = 600.0
_CACHE_SECONDS: Final = 0.5
"""How long the store is asked before the backend is."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
log = logging.getLogger("ash.hub")


class ToolsetShelf:
    """The toolsets of one hive."""

    def __init__(self, backend: Backend, store: Store, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._store = store
        self._clock = clock
        self._known: WeakValueDictionary[str, Toolset] = WeakValueDictionary()
        self._kept_at: dict[str, float] = {}
        """When this process last had the backend note the use of a document; the longest ago first."""
        self._seen_at: dict[str, float] = {}
        """When a living sandbox was last seen to use a document."""

    async def put(self, toolset: Toolset) -> Toolset:
        """Keep a toolset and return the one instance of its digest.

        Raises:
            StartFailed: It is too large, or cannot be kept: a hub that took over could not serve its sandboxes.
        """
        is_kept = self._clock() < self._kept_at.get(toolset.digest, -math.inf) + _KEEP_AGAIN_SECONDS
        if is_kept and self._known.get(toolset.digest) is toolset:
            return toolset
        text = _text_of(toolset)
        size = len(text.encode())
        if size > MAX_DOCUMENT_BYTES:
            raise StartFailed(
                f"its tool list takes {size} bytes, and {MAX_DOCUMENT_BYTES} can be kept of one", step="tools"
            )
        if not is_kept:
            try:
                await self._backend.documents.keep(DocumentKind.TOOLSETS, toolset.digest, text.encode())
            except ConnectFailed as error:
                raise StartFailed(f"its tools cannot be kept: {error.message}", step="tools") from error
            self._note_kept(toolset.digest)
            await self._cache(toolset.digest, text)
        return self._known.setdefault(toolset.digest, toolset)

    def _note_kept(self, digest: str) -> None:
        now = self._clock()
        self._kept_at.pop(digest, None)
        self._kept_at[digest] = now
        while self._kept_at[oldest := next(iter(self._kept_at))] <= now - _KEEP_AGAIN_SECONDS:
            del self._kept_at[oldest]

    async def get(self, digest: str) -> Toolset | None:
        """Return a kept toolset, or None if there is none, or what is there is not it.

        Raises:
            ConnectFailed: Neither the store nor the backend can say now.
        """
        if _DIGEST.fullmatch(digest) is None:
            return None
        found = self._known.get(digest) or await self._cached(digest)
        if found is None:
            body = await self._backend.documents.read(DocumentKind.TOOLSETS, digest)
            found = _read(digest, body) if body is not None else None
            if found is not None:
                await self._cache(digest, _text_of(found))
        return self._known.setdefault(digest, found) if found is not None else None

    async def _cached(self, digest: str) -> Toolset | None:
        with anyio.move_on_after(_CACHE_SECONDS):
            try:
                text = (await self._store.kept(CACHE, digest)).get(digest)
            except AshError:
                return None  # the backend knows as well
            return _read(digest, text.encode()) if text is not None else None
        return None

    async def _cache(self, digest: str, text: str) -> None:
        with anyio.move_on_after(_CACHE_SECONDS):
            try:
                await self._store.keep(CACHE, digest, text)
            except AshError as error:
                log.info("a toolset is not in the store", extra={"why": error.message})

    # -- pruning

    async def run(self) -> None:
        """Prune until cancelled."""
        while True:
            try:
                await self.prune()
            except AshError as error:
                log.info("old toolsets could not be looked for", extra={"why": error.message})
            except Exception:
                log.exception("old toolsets could not be looked for")
            await anyio.sleep(_PRUNE_EVERY_SECONDS)

    async def prune(self) -> None:
        """Drop documents that no sandbox or snapshot has used for `GRACE_SECONDS`. Any replica may, at any time.

        A spawn keeps its document before a record names it. If that was before we looked, it is younger than the
        grace; if later, `drop` finds that it was used since.
        """
        if self._backend.unready() is not None:
            return
        documents = self._backend.documents
        used = await documents.used(DocumentKind.TOOLSETS)
        instances = await self._backend.list()
        living = [instance.record for instance in instances if instance.phase is not Phase.ENDED]
        if not all("toolset" in record for record in living):
            return  # a newer replica wrote it, and may name toolsets otherwise
        now, named = self._clock(), {record["toolset"] for record in living}
        if isinstance(self._backend, Snapshots):
            named |= {snapshot.record["toolset"] for snapshot in await self._backend.snapshots()}
        self._seen_at = {
            digest: now if digest in named else max(at, self._seen_at.get(digest, at)) for digest, at in used.items()
        }
        for digest, at in used.items():
            if now - self._seen_at[digest] >= GRACE_SECONDS:
                await documents.drop(DocumentKind.TOOLSETS, digest, used_at=at)


def _text_of(toolset: Toolset) -> str:
    body = {"tools": [tool.fields() for tool in toolset.tools]}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False)


def _read(digest: str, body: bytes) -> Toolset | None:
    """Return a toolset as it was written; None where it has another digest, or is none."""
    try:
        tools = tuple(PinnedTool(**tool) for tool in json.loads(body)["tools"])
        if digest_of(tools) == digest:
            return Toolset(digest, tools)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    log.warning("a kept toolset is damaged, and counts as absent", extra={"digest": digest})
    return None
