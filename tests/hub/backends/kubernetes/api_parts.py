"""A stand-in for the Kubernetes API: objects with versions, JSON patches and preconditions, as documents use them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from ash_hub.backends.kubernetes.api import METADATA, METADATA_LIST, ApiRefusal, Json


class StandInApi:
    """Answers as `Api` does; every call lets other tasks go first."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.refusals: list[Exception] = []
        """What the next calls raise."""
        self.may_watch = True
        self._versions = itertools.count(1)
        self._history: list[tuple[int, str, str, Json]] = []
        self._news = anyio.Event()

    async def get(self, path: str, *, accept: str = "", labelSelector: str = "") -> Json | None:
        await self._turn()
        if labelSelector:
            assert accept == METADATA_LIST
            pairs = [pair.partition("=") for pair in labelSelector.split(",")]
            within = [found for at, found in self.objects.items() if at.startswith(f"{path}/")]
            items = [_metadata(found) for found in within if _has(found["metadata"]["labels"], pairs)]
            return {"items": items or None}
        found = copy.deepcopy(self.objects.get(path))
        return _metadata(found) if found is not None and accept == METADATA else found

    async def create(self, path: str, body: Json) -> Json:
        await self._turn()
        at = f"{path}/{body['metadata']['name']}"
        if at in self.objects:
            raise ApiRefusal(409, {"reason": "AlreadyExists", "message": "it exists"})
        version = str(next(self._versions))
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": f"u{version}", "resourceVersion": version}
        self.objects[at] = made
        self._tell("ADDED", at, made)
        return made

    async def patch(self, path: str, operations: list[Json], *, accept: str = "") -> Json:
        await self._turn()
        if path not in self.objects:
            raise ApiRefusal(404, {"reason": "NotFound"})
        changed = copy.deepcopy(self.objects[path])
        for operation in operations:
            *parents, last = operation["path"].removeprefix("/").split("/")
            place: Any = changed
            for parent in parents:
                place = place[parent]
            if operation["op"] == "add":
                place[last] = operation["value"]
            elif place.get(last) != operation["value"]:
                raise ApiRefusal(422, {"reason": "Invalid"})
        changed["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[path] = changed
        self._tell("MODIFIED", path, changed)
        return _metadata(changed) if accept == METADATA else changed

    async def delete(self, path: str, *, uid: str | None = None, resource_version: str | None = None) -> bool:
        await self._turn()
        metadata = self.objects.get(path, {"metadata": {}})["metadata"]
        wanted = ((uid, metadata.get("uid")), (resource_version, metadata.get("resourceVersion")))
        if path not in self.objects or any(asked not in (None, found) for asked, found in wanted):
            return False
        gone = copy.deepcopy(self.objects.pop(path))
        gone["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("DELETED", path, gone)
        return True

    async def pages(self, path: str, *, fieldSelector: str) -> AsyncGenerator[Json]:
        await self._turn()
        found = self.objects.get(_selected(path, fieldSelector))
        items = [] if found is None else [copy.deepcopy(found)]
        yield {"metadata": {"resourceVersion": str(next(self._versions))}, "items": items}

    @asynccontextmanager
    async def watch(
        self, path: str, *, fieldSelector: str, resourceVersion: str, timeoutSeconds: str
    ) -> AsyncGenerator[AsyncGenerator[Json]]:
        del timeoutSeconds
        await self._turn()
        if not self.may_watch:
            raise ApiRefusal(403, {"reason": "Forbidden", "message": "cannot watch"})
        yield self._events(_selected(path, fieldSelector), int(resourceVersion))

    async def _events(self, path: str, since: int) -> AsyncGenerator[Json]:
        told = 0
        while True:
            news = self._news
            for version, kind, at, found in self._history[told:]:
                if version > since and at == path:
                    yield {"type": kind, "object": copy.deepcopy(found)}
            told = len(self._history)
            if news is self._news:
                await news.wait()

    def _tell(self, kind: str, path: str, found: Json) -> None:
        self._history.append((int(found["metadata"]["resourceVersion"]), kind, path, copy.deepcopy(found)))
        self._news.set()
        self._news = anyio.Event()

    async def _turn(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)


def _has(labels: Json, pairs: list[tuple[str, str, str]]) -> bool:
    return all(name in labels and (not equals or labels[name] == value) for name, equals, value in pairs)


def _selected(path: str, field_selector: str) -> str:
    return f"{path}/{field_selector.removeprefix('metadata.name=')}"


def _metadata(found: Json) -> Json:
    return {"metadata": copy.deepcopy(found["metadata"])}
