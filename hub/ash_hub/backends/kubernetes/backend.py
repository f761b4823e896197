"""The Kubernetes backend: makes and deletes pods, and follows them by one watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import anyio

from ash_hub.backends._broadcast import Broadcast
from ash_hub.backends.base import BackendEvent, Exit, Instance, Phase
from ash_hub.backends.kubernetes.api import ApiRefusal, Json, open_api
from ash_hub.backends.kubernetes.documents import KubernetesDocuments
from ash_hub.backends.kubernetes.egress import POLICY_SECONDS, ways_out
from ash_hub.backends.kubernetes.informer import Informer
from ash_hub.backends.kubernetes.pods import (
    CONTAINER,
    instance_of,
    is_pod_of,
    network_label,
    pod_of,
    policy_of,
    record_patch,
    selector,
)
from ash_hub.backends.kubernetes.probe import UNSEEN_NETWORK
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.backends.kubernetes.variables import VariableSecrets
from ash_mcp.errors import AshError, CapacityExceeded, ConfigError, Conflict, ConnectFailed, StartFailed, Unsupported
from ash_mcp.types import Cause, SandboxId, SandboxSpec

__all__ = ["KubernetesBackend"]

_SYNC_SECONDS: Final = 15.0
_CLEAN_UP_SECONDS: Final = 10.0
_DELETE_SECONDS: Final = 30.0
"""What a kubelet may take beside the grace until a pod is gone."""
_LOG_LINES: Final = 2000
_LOG_BYTES: Final = 4 * 1024 * 1024
_MOST_ABANDONED: Final = 1000
_MOST_BURIED: Final = 1000
_REMOVE_PAUSE_SECONDS: Final = 1.0
_QUOTA_TRIES: Final = 4
_QUOTA_PAUSE_SECONDS: Final = 0.05
_MOST_WORDS: Final = 1000
T = TypeVar("T")
_log = logging.getLogger("ash.hub")


@dataclass(frozen=True, slots=True)
class _Seen:
    """A pod as it was last seen."""

    instance: Instance
    version: int
    uid: str
    is_replacement: bool = False
    """Whether it took the name of a pod that was there before; whose sandbox has ended with that."""


class KubernetesBackend:
    """The Kubernetes backend. Entering it finds the pods of its hive; leaving it ends none."""

    kind = "kubernetes"

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._events = Broadcast()
        self._pods: dict[SandboxId, _Seen] = {}
        self._gone: dict[str, asyncio.Event] = {}
        """Who waits for a pod to be gone, by its uid."""
        self._buried: dict[SandboxId, str] = {}
        """The last pods that went, with their uids: what is still on its way about them comes too late."""
        self._abandoned: deque[SandboxId] = deque(maxlen=_MOST_ABANDONED)
        """Pods whose creation was given up, and which may come to be all the same."""
        self._words: dict[str, str] = {}
        """What the cluster's events say of pods that do not run yet, by the pod's name."""
        self._evictions: dict[str, str] = {}
        """Why nodes evicted pods, by the pod's name."""
        self._classes: list[str] | None = None
        self._version = ""

    async def __aenter__(self) -> Self:
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            self._api = api = await stack.enter_async_context(open_api(settings.kubeconfig, settings.context))
            self.namespace = namespace = settings.namespace or api.namespace
            self._path = f"/api/v1/namespaces/{namespace}/pods"
            self.documents = KubernetesDocuments(
                api, hive=settings.hive, namespace=namespace, key_namespace=settings.system_namespace or namespace
            )
            await self._look_around()
            self._ways_out = await stack.enter_async_context(ways_out(settings, self.documents, self._policy))
            pods = {"labelSelector": selector(settings.hive)}
            self._news = Informer(api, self._path, pods, self._listed, self._changed, self._tell_again)
            self._variables = VariableSecrets(api, hive=settings.hive, namespace=namespace, uid_of=self._uid_of)
            warnings = {"fieldSelector": "involvedObject.kind=Pod,type=Warning"}
            events = f"/api/v1/namespaces/{namespace}/events"
            words = Informer(api, events, warnings, lambda _, __: None, self._heard)
            self._tasks = await anyio.create_task_group().__aenter__()
            stack.push_async_callback(self._end_tasks)
            self._tasks.start_soon(self._news.run)
            self._tasks.start_soon(words.run)
            try:
                async with asyncio.timeout(_SYNC_SECONDS):
                    await self._news.synced.wait()
            except TimeoutError as error:
                raise ConfigError(f"the pods of {namespace} cannot be followed: {self._news.problem}") from error
            self._tasks.start_soon(self._variables.run)
            self._opened = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._events.close()
        await self._opened.aclose()

    async def _end_tasks(self) -> None:
        # Not given the exception in flight: a task group would wrap it into an exception group.
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def _look_around(self) -> None:
        """Learn what the cluster is and has.

        Raises:
            ConfigError: It does not answer, does not let the hive in, or lacks its namespace.
        """
        try:
            version = await self._api.get("/version")
            self._version = str((version or {}).get("gitVersion", ""))
            self._classes = await self._runtime_classes()
            await self._api.get(self._path, limit="1", labelSelector=selector(self._settings.hive))
        except ApiRefusal as refusal:
            raise ConfigError(
                f"this hive may not see the pods of namespace {self.namespace}: {refusal.message}"
            ) from refusal
        except ConnectFailed as error:
            raise ConfigError(f"{error.message}; is the cluster of this kubeconfig up?") from error

    async def _runtime_classes(self) -> list[str] | None:
        """Return the names of the cluster's runtime classes; None where this hive may not see them."""
        with contextlib.suppress(ApiRefusal):
            found = await self._api.get("/apis/node.k8s.io/v1/runtimeclasses")
            return sorted(str(each["metadata"]["name"]) for each in (found or {}).get("items", ()))
        return None

    async def create(self, spec: SandboxSpec) -> Instance:
        """Make a sandbox's pod and return it as it is then: a node has yet to take it."""
        way_out = await self._ways_out.of(spec) if self._ways_out is not None else None
        pod = pod_of(spec, self._settings, way_out)
        if spec.id in self._pods:
            raise Conflict(f"sandbox {spec.id} exists")
        async with self._variables.kept_for(spec) as secret_uid:
            try:
                made = await self._make(pod)
            except ApiRefusal as refusal:
                raise await self._explained(spec, refusal) from refusal
            except ConnectFailed as error:
                self._abandon(spec.id)
                said = f"the sandbox could not start: {error.message}"
                raise StartFailed(said, step="pod", retryable=True) from error
            except asyncio.CancelledError:
                self._abandon(spec.id)
                with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
                    await self._remove(spec.id)
                raise
        if secret_uid is not None:
            self._tasks.start_soon(self._variables.give, spec.id, secret_uid, str(made["metadata"]["uid"]))
        self._take(made)
        if (seen := self._pods.get(spec.id)) is None:  # the news was faster than the answer
            raise StartFailed("its pod was deleted as soon as it was made", step="pod")
        return seen.instance

    async def _make(self, pod: Json) -> Json:
        for tries_left in reversed(range(_QUOTA_TRIES)):
            try:
                return await self._doubting(self._api.create(self._path, pod))
            except ApiRefusal as refusal:
                # Not the pod but its namespace's quota, which another creation has just changed.
                if refusal.reason != "Conflict" or not tries_left:
                    raise
            await asyncio.sleep(_QUOTA_PAUSE_SECONDS * (_QUOTA_TRIES - tries_left))
        raise AssertionError("the last try returns or raises")

    async def _explained(self, spec: SandboxSpec, refusal: ApiRefusal) -> AshError:
        """Return what the API server's refusal of a pod means to whoever spawns."""
        said = refusal.message
        if refusal.reason == "AlreadyExists":
            return Conflict(f"sandbox {spec.id} exists")
        if "exceeded quota" in said:
            return CapacityExceeded(f"the namespace's quota is used up: {said}")
        if refusal.reason == "Conflict" or "status unknown for quota" in said:
            return CapacityExceeded(f"the namespace's quota changes all the time: {said}")
        if "RuntimeClass" in said and "not found" in said:
            classes = await self._runtime_classes()
            known = f"; this cluster has: {', '.join(classes) or 'none'}" if classes is not None else ""
            return ConfigError(f"the cluster has no such runtime class: {said}{known}")
        return ConfigError(f"the cluster refuses the pod ({refusal.reason or refusal.status}): {said}")

    async def get(self, sandbox_id: SandboxId) -> Instance | None:
        seen = self._pods.get(sandbox_id)
        if seen is not None:
            return seen.instance
        if sandbox_id in self._buried:  # no id comes twice; should it, the watch tells
            return None
        pod = await self._asked(self._api.get(f"{self._path}/{sandbox_id}"))
        return None if pod is None or not self._is_ours(pod) else self._instance(pod)

    async def list(self) -> list[Instance]:
        pages = self._api.pages(self._path, labelSelector=selector(self._settings.hive))
        found: list[Instance] = []
        while (page := await self._asked(anext(pages, None))) is not None:
            found += [self._instance(pod) for pod in page["items"] if self._is_ours(pod)]
        return found

    async def annotate(self, sandbox_id: SandboxId, record: Mapping[str, Any], *, revision: int) -> None:
        await self._patch(sandbox_id, record_patch(record, revision), revision)

    async def set_network(
        self, sandbox_id: SandboxId, network: str | tuple[str, ...], record: Mapping[str, Any], *, revision: int
    ) -> None:
        network_label(network, self._settings)
        pod = await self._pod_now(sandbox_id)
        if pod is None or self._instance(pod).phase is Phase.ENDED:
            raise Conflict(f"the sandbox {sandbox_id} does not run")
        if self._ways_out is None or policy_of(pod, self._settings) is None:
            raise Unsupported(
                f"the network of {sandbox_id} stays as it is: it goes out by no egress proxy, as sandboxes on "
                "Kubernetes do that were spawned with a list of domains, and open connections would outlive the change"
            )
        await self._patch(sandbox_id, record_patch(record, revision, network=network), revision)
        await asyncio.sleep(POLICY_SECONDS)

    async def _policy(self, sandbox_id: SandboxId) -> Mapping[str, Any] | None:
        """Return what an egress proxy is told of a sandbox."""
        pod = await self._pod_now(sandbox_id)
        return None if pod is None else policy_of(pod, self._settings)

    async def _pod_now(self, sandbox_id: SandboxId) -> Json | None:
        """Return a pod that is ours as it is now, whatever the news has told so far."""
        pod = await self._asked(self._api.get(f"{self._path}/{sandbox_id}"))
        return pod if pod is not None and self._is_ours(pod) else None

    async def _patch(self, sandbox_id: SandboxId, operations: list[Json], revision: int) -> None:
        try:
            self._take(await self._doubting(self._api.patch(f"{self._path}/{sandbox_id}", operations)))
        except ApiRefusal as refusal:
            if refusal.status in (404, 409, 422):
                await self._look_again(sandbox_id)
                raise Conflict(f"the record of sandbox {sandbox_id} is not at revision {revision}") from refusal
            raise ConnectFailed(f"the record of {sandbox_id} cannot be written: {refusal.message}") from refusal

    async def _look_again(self, sandbox_id: SandboxId) -> _Seen | None:
        """See a pod as it is now, whatever the news has told so far."""
        before = self._pods.get(sandbox_id)
        pod = await self._asked(self._api.get(f"{self._path}/{sandbox_id}"))
        if pod is not None:
            self._take(pod)
        elif before is not None:
            self._forget(sandbox_id, before.uid, "its pod is gone")
        return self._pods.get(sandbox_id)

    async def delete(self, sandbox_id: SandboxId, *, grace_seconds: float = 2.0) -> None:
        seen = self._pods.get(sandbox_id) or await self._look_again(sandbox_id)
        if seen is None:
            return
        gone = self._gone.setdefault(seen.uid, asyncio.Event())
        path = f"{self._path}/{sandbox_id}"
        # A grace of 0 would take the pod off the API while its processes may still run.
        grace = max(1, math.ceil(grace_seconds))
        if await self._asked(self._api.delete(path, uid=seen.uid, grace_seconds=grace)):
            with anyio.move_on_after(grace + _DELETE_SECONDS):
                await gone.wait()
                return
            found = await self._asked(self._api.get(path))
            if found is not None and found["metadata"]["uid"] == seen.uid:
                raise ConnectFailed(f"the pod of {sandbox_id} is still ending; its node will remove it")
        self._forget(sandbox_id, seen.uid, "deleted")

    async def logs(self, sandbox_id: SandboxId, *, tail_bytes: int = 65_536) -> bytes:
        if tail_bytes <= 0:
            return b""
        query = {"container": CONTAINER, "tailLines": str(_LOG_LINES), "limitBytes": str(_LOG_BYTES)}
        try:
            return (await self._doubting(self._api.text(f"{self._path}/{sandbox_id}/log", **query)))[-tail_bytes:]
        except ApiRefusal as refusal:
            if refusal.status in (400, 404):  # no container yet, or no pod any more
                return b""
            raise ConnectFailed(f"the log of {sandbox_id} cannot be read: {refusal.message}") from refusal

    def watch(self) -> AsyncIterator[BackendEvent]:
        return self._events.watch()

    def unready(self) -> str | None:
        return self._news.problem

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "version": self._version,
            "cluster": self._api.address,
            "namespace": self.namespace,
            "runtime_classes": self._classes,
            "image_servers": True,
            "egress_proxy": self._settings.egress_proxy,
            "warnings": [] if self._settings.canary is not None else [UNSEEN_NETWORK],
        }

    # -- news

    def _listed(self, uids: set[str], version: int) -> None:
        for sandbox_id, seen in list(self._pods.items()):
            if seen.uid not in uids and seen.version <= version:
                self._forget(sandbox_id, seen.uid, "its pod is gone")

    def _changed(self, kind: str, pod: Json) -> None:
        if kind != "DELETED" and self._is_ours(pod):
            self._take(pod, is_news=True)
            return
        self._take(pod, is_news=True)  # its last state says why it ended
        self._forget(SandboxId(str(pod["metadata"]["name"])), str(pod["metadata"]["uid"]), "its pod was deleted")

    def _tell_again(self) -> None:
        """Tell what is known, so that what could not be done meanwhile is tried at once.

        Not that events are lost: how pods have ended meanwhile is about to be told, and must not be overtaken.
        """
        for seen in self._pods.values():
            self._events.publish(seen.instance)

    def _take(self, pod: Json, *, is_news: bool = False) -> None:
        """Take note of a pod that is ours, unless more is known than this.

        Args:
            is_news: Whether the watch told it, or else an answer, which may be older than what the watch told.
        """
        metadata = pod["metadata"]
        sandbox_id, uid = SandboxId(str(metadata["name"])), str(metadata["uid"])
        version, before = int(metadata["resourceVersion"]), self._pods.get(sandbox_id)
        known = before.version if before is not None else 0 if is_news else self._news.heard_to
        if version <= known or self._buried.get(sandbox_id) == uid or not self._is_ours(pod):
            return
        instance = self._instance(pod)
        is_replacement = before is not None and (before.is_replacement or before.uid != uid)
        if is_replacement:
            replaced = Exit("its pod was replaced by another of the same name", Cause.OPERATOR)
            instance = replace(instance, phase=Phase.ENDED, endpoint=None, waits_for=None, exit=replaced)
        self._pods[sandbox_id] = _Seen(instance, version, uid, is_replacement)
        if before is None or before.instance != instance:
            self._events.publish(instance)
        if before is not None and before.uid != uid:
            self._bury(sandbox_id, before.uid)
        if sandbox_id in self._abandoned:
            self._abandoned.remove(sandbox_id)
            self._tasks.start_soon(self._remove, sandbox_id)

    def _instance(self, pod: Json) -> Instance:
        name = str(pod["metadata"]["name"])
        return instance_of(pod, self._words.get(name), self._evictions.get(name))

    def _uid_of(self, sandbox_id: SandboxId) -> str | None:
        seen = self._pods.get(sandbox_id)
        return seen.uid if seen is not None and not seen.is_replacement else None

    def _is_ours(self, pod: Json) -> bool:
        return is_pod_of(pod, self._settings.hive)

    def _forget(self, sandbox_id: SandboxId, uid: str, why: str) -> None:
        """Drop a pod that is gone, and tell that its sandbox has ended if nobody has yet."""
        self._bury(sandbox_id, uid)
        seen = self._pods.get(sandbox_id)
        if seen is None or seen.uid != uid:
            return
        del self._pods[sandbox_id]
        self._words.pop(sandbox_id, None)
        self._evictions.pop(sandbox_id, None)
        if seen.instance.phase is not Phase.ENDED:
            gone = Exit(why, Cause.OPERATOR)
            self._events.publish(replace(seen.instance, phase=Phase.ENDED, endpoint=None, waits_for=None, exit=gone))

    def _bury(self, sandbox_id: SandboxId, uid: str) -> None:
        self._buried[sandbox_id] = uid
        if len(self._buried) > _MOST_BURIED:
            del self._buried[next(iter(self._buried))]
        if (gone := self._gone.pop(uid, None)) is not None:
            gone.set()

    def _abandon(self, sandbox_id: SandboxId) -> None:
        """Remove the pod of a start that was given up, if it is there or once it is."""
        if sandbox_id in self._pods:
            self._tasks.start_soon(self._remove, sandbox_id)
        else:
            self._abandoned.append(sandbox_id)

    def _heard(self, kind: str, event: Json) -> None:
        """Take note of why a pod does not run, as that its network cannot be made, and of why its node evicts it."""
        about: Json = event["involvedObject"]
        name = SandboxId(str(about.get("name")))
        seen = self._pods.get(name)
        if kind == "DELETED" or seen is None or seen.uid != about.get("uid"):
            return
        if event.get("reason") == "Evicted":  # said before the pod is ended
            if len(self._evictions) >= _MOST_WORDS:
                self._evictions.clear()
            self._evictions[name] = str(event.get("message"))
            return
        if seen.instance.phase is not Phase.STARTING:
            return
        before, said = self._words.get(name), f"{event.get('reason')}: {event.get('message')}"
        if len(self._words) >= _MOST_WORDS:
            self._words.clear()
        self._words[name] = said
        if seen.instance.waits_for in (None, before):  # else the pod itself says it better
            told = replace(seen.instance, waits_for=said)
            self._pods[name] = replace(seen, instance=told)
            self._events.publish(told)

    async def _remove(self, sandbox_id: SandboxId) -> None:
        """Delete the pod of a start that was given up, however long the API server is away."""
        while True:
            try:
                seen = await self._look_again(sandbox_id)
                if seen is not None:
                    await self._asked(self._api.delete(f"{self._path}/{sandbox_id}", uid=seen.uid, grace_seconds=1))
                return
            except Exception as error:  # this task must not take the others with it
                _log.warning("the pod of %s, whose start was given up, stays for now: %s", sandbox_id, error)
            await asyncio.sleep(_REMOVE_PAUSE_SECONDS)

    async def _asked(self, answer: Awaitable[T]) -> T:
        """Return the answer of the API server.

        Raises:
            ConnectFailed: It refused, which here only the hive's rights can be the reason of.
        """
        try:
            return await self._doubting(answer)
        except ApiRefusal as refusal:
            raise ConnectFailed(f"the Kubernetes API refuses it: {refusal.message}") from refusal

    async def _doubting(self, answer: Awaitable[T]) -> T:
        """Return the answer of the API server; where none comes, have the watch prove that it still hears it."""
        try:
            return await answer
        except ConnectFailed:
            self._news.doubt()
            raise
