"""A stand-in for an API server's pods: versions, uids, watches with a history. Every call lets others go first."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ash_hub.backends.kubernetes import backend as module
from ash_hub.backends.kubernetes.api import ApiRefusal, Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_mcp.errors import ConnectFailed
from tests.hub.backends.kubernetes.api_parts import StandInApi

NAMESPACE = "n"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"


class PodServer:
    """Answers as `Api` does.

    Args:
        seed: Of how many turns of the loop a request and its answer take.
    """

    namespace = NAMESPACE
    address = "https://stand-in"

    def __init__(self, seed: int = 0) -> None:
        self.pods: dict[str, Json] = {}
        self.version = 100
        self.is_away = False
        self.refusals: list[Exception] = []
        """What the next creations raise."""
        self.pod_refusals: list[Exception] = []
        """The same of pods alone."""
        self.lost_answers = 0
        """So many of the next creations are done, and nobody hears of it."""
        self.held: asyncio.Event | None = None
        """While it is not set, answers to creations and changes are done but on their way."""
        self.deaf: asyncio.Event | None = None
        """While it is not set, watches tell nothing."""
        self.asked: list[str] = []
        self.others = StandInApi()
        """Objects that are no pods. Those that a pod owns go with it."""
        self._history: list[tuple[int, str, Json]] = []
        self._news = asyncio.Event()
        self._too_old = 0
        self._chance = random.Random(seed)

    # -- what happens to the cluster

    def put(self, name: str, labels: dict[str, str], **more: Any) -> Json:
        """Have somebody make a pod."""
        return self._add({"metadata": {"name": name, "labels": labels, **more}})

    def take(self, name: str) -> None:
        """Have somebody delete a pod; it is gone at once."""
        pod = self.pods.pop(name, None)
        if pod is not None:
            self._collect(str(pod["metadata"]["uid"]))
            self._tell("DELETED", pod)

    def change(self, name: str, status: Json) -> None:
        """Have the kubelet report."""
        if name in self.pods:
            self.pods[name]["status"] = status
            self._tell("MODIFIED", self.pods[name])

    def event(self, name: str, reason: str, message: str) -> None:
        """Have the cluster say something about a pod."""
        about = {"kind": "Pod", "name": name, "uid": self.pods[name]["metadata"]["uid"]}
        self._tell("EVENT", {"metadata": {"name": "e"}, "involvedObject": about, "reason": reason, "message": message})

    def forget_history(self) -> None:
        """End all watches, so that they have to list again."""
        self.version += 1
        self._too_old = self.version
        self._ring()

    def go_away(self) -> None:
        self.is_away = True
        self._ring()

    # -- what the backend asks

    async def get(self, path: str, **query: str) -> Json | None:
        await self._turn()
        self.asked.append(f"get {path}")
        if _is_other(path):
            return await self.others.get(path, **query)
        if path == PODS:
            found: Json = {"items": list(self.pods.values()), "metadata": {"resourceVersion": str(self.version)}}
        elif path.startswith(PODS):
            found = self.pods.get(path.removeprefix(f"{PODS}/"), {})
        else:
            found = {"items": [], "metadata": {"resourceVersion": str(self.version)}, "gitVersion": "v1"}
        found = copy.deepcopy(found)
        await self._turn()
        return found or None

    async def pages(self, path: str, **query: str) -> AsyncGenerator[Json]:
        found = await self.get(path, **query)
        assert found is not None
        pods = found["items"]
        for begin in range(0, max(1, len(pods)), 2):
            await self._turn()
            yield {**found, "items": pods[begin : begin + 2]}

    async def create(self, path: str, body: Json) -> Json:
        await self._turn()
        self.asked.append(f"create {body['metadata']['name']}")
        if self.refusals:
            raise self.refusals.pop(0)
        if _is_other(path):
            return await self.others.create(path, body)
        if self.pod_refusals:
            raise self.pod_refusals.pop(0)
        if body["metadata"]["name"] in self.pods:
            raise ApiRefusal(409, {"reason": "AlreadyExists", "message": "it exists"})
        made = copy.deepcopy(self._add(body))
        if self.lost_answers:
            self.lost_answers -= 1
            raise ConnectFailed("the Kubernetes API does not answer: lost")
        await self._answer()
        return made

    async def patch(self, path: str, operations: list[Json], **more: str) -> Json:
        await self._turn()
        if _is_other(path):
            return await self.others.patch(path, operations, **more)
        name = path.removeprefix(f"{PODS}/")
        if name not in self.pods:
            raise ApiRefusal(404, {"reason": "NotFound"})
        annotations = self.pods[name]["metadata"]["annotations"]
        for operation in operations:
            key = operation["path"].removeprefix("/metadata/annotations/").replace("~1", "/")
            if operation["op"] == "test" and annotations.get(key) != operation["value"]:
                raise ApiRefusal(422, {"reason": "Invalid"})
            annotations[key] = operation["value"]
        self._tell("MODIFIED", self.pods[name])
        changed = copy.deepcopy(self.pods[name])
        await self._answer()
        return changed

    async def delete(self, path: str, *, uid: str | None = None, grace_seconds: int | None = None) -> bool:
        await self._turn()
        if _is_other(path):
            return await self.others.delete(path, uid=uid)
        name = path.removeprefix(f"{PODS}/")
        self.asked.append(f"delete {name}")
        if name not in self.pods or uid not in (None, self.pods[name]["metadata"]["uid"]):
            return False
        self.pods[name]["metadata"]["deletionTimestamp"] = "now"
        self._tell("MODIFIED", self.pods[name])
        if grace_seconds != 0:
            await self._turn()
        self.take(name)
        await self._answer()
        return True

    async def text(self, path: str, **query: str) -> bytes:
        await self._turn()
        return b""

    @asynccontextmanager
    async def watch(self, path: str, **query: str) -> AsyncGenerator[AsyncGenerator[Json]]:
        await self._turn()
        since = int(query["resourceVersion"])
        if since < self._too_old:
            raise ApiRefusal(410, {"message": "too old"})
        yield self._events(path, since)

    async def _events(self, path: str, since: int) -> AsyncGenerator[Json]:
        while True:
            if self.deaf is not None:
                await self.deaf.wait()
            self._away()
            if since < self._too_old:
                raise ApiRefusal(410, {"message": "too old"})
            for version, kind, found in [each for each in self._history if each[0] > since]:
                await self._turn()
                since = version
                if (kind == "EVENT") == (path == EVENTS):
                    yield {"type": "ADDED" if kind == "EVENT" else kind, "object": copy.deepcopy(found)}
            news = self._news
            if since == self.version:
                await news.wait()

    def _collect(self, pod_uid: str) -> None:
        for at, found in list(self.others.objects.items()):
            if pod_uid in [owner["uid"] for owner in found["metadata"].get("ownerReferences", ())]:
                del self.others.objects[at]

    def _add(self, body: Json) -> Json:
        made = copy.deepcopy(body)
        self.pods[made["metadata"]["name"]] = made
        made["metadata"]["uid"] = f"u{self.version + 1}"
        self._tell("ADDED", made)
        return made

    def _tell(self, kind: str, found: Json) -> None:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self._history.append((self.version, kind, copy.deepcopy(found)))
        self._ring()

    def _ring(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _turn(self) -> None:
        for _ in range(self._chance.randint(1, 4)):
            await asyncio.sleep(0)
        self._away()

    async def _answer(self) -> None:
        await self._turn()
        if self.held is not None:
            await self.held.wait()

    def _away(self) -> None:
        if self.is_away:
            raise ConnectFailed("the Kubernetes API does not answer: gone")


def _is_other(path: str) -> bool:
    return path.startswith((SECRETS, CONFIG_MAPS))


@asynccontextmanager
async def following(
    server: PodServer, patch: pytest.MonkeyPatch, *, hive: str = "h", **more: Any
) -> AsyncGenerator[KubernetesBackend]:
    """Enter a backend of a hive on this server, with more settings than that needs."""

    @asynccontextmanager
    async def opened(*_: Any) -> AsyncGenerator[PodServer]:
        yield server

    patch.setattr(module, "open_api", opened)
    settings = KubernetesSettings.model_validate({"hive": hive, "image": "i", "namespace": NAMESPACE, **more})
    async with KubernetesBackend(settings) as backend:
        yield backend
