"""`ash bench --kubernetes`: spawns of a hive on a cluster, beside bare pods of the same image, in turns.

Two pods are compared. One runs the least that can run: what Kubernetes itself takes. The other runs the runner, as a
sandbox does, and is asked for its health: that is all that a spawn needs of the cluster.
"""

from __future__ import annotations

import base64
import os
import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any, Final

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.backends.kubernetes.api import Api, Json, open_api
from ash_hub.backends.kubernetes.informer import Informer
from ash_hub.backends.kubernetes.pods import HIVE_LABEL, instance_of, pod_of
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.bench.api_requests import CountedAccount, open_account
from ash_hub.bench.rows import Row, median
from ash_hub.bench.target import open_target
from ash_hub.settings import HubSettings
from ash_hub.spawning.runner_client import RunnerClient
from ash_mcp.client import Hive
from ash_mcp.errors import ConfigError, StartFailed
from ash_mcp.sandbox import Sandbox
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["measure"]

_RECIPE: Final = "general"
_SERVER: Final = {"python": "ash_recipes.general.server:build"}
_LABEL: Final = "ash/bench"
_LEAST: Final = ["sh", "-c", "trap 'exit 0' TERM; sleep infinity & wait"]
"""Runs until it is told to end, and ends then at once."""
_GRACE_SECONDS: Final = 2
_WAIT_SECONDS: Final = 180.0
_COUNTED: Final = 3
_CPU: Final = "cat /proc/[0-9]*/stat"
_TICKS: Final = 100
"""Of processor time a second, in /proc."""


async def measure(in_a_row: int, at_once: int, step: Callable[[str], None]) -> list[Row]:
    """Measure a hive of its own, with the settings of the environment.

    Raises:
        ConfigError: These settings are not those of a hive on a cluster, or the cluster cannot be found.
        AshError: A spawn failed.
    """
    options = HubSettings().backend
    if options.get("kind") != "kubernetes":
        raise ConfigError("no cluster is chosen: set ASH_HUB_BACKEND__KIND=kubernetes and ASH_HUB_BACKEND__IMAGE")
    settings = KubernetesSettings.model_validate(options)
    name = f"ash-bench-{secrets.token_hex(4)}"
    async with _open_bench(settings, name, step) as bench:
        step("a first spawn, which is not counted")
        await _kill(await _spawn(bench))
        rows = await _in_turns(bench, in_a_row, step)
        if at_once:
            rows += await _many_at_once(bench, at_once, step)
        return rows + await _count_requests(bench, step)


@dataclass(frozen=True, slots=True)
class _Bench:
    hive: Hive
    pods: _Pods
    account: CountedAccount | None


@asynccontextmanager
async def _open_bench(settings: KubernetesSettings, name: str, step: Callable[[str], None]) -> AsyncGenerator[_Bench]:
    """Start a hive by this name, which sees no other hive's sandboxes, and leave nothing of it."""
    step("starting a hive")
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(open_api(settings.kubeconfig, settings.context))
        namespace = settings.namespace or api.namespace
        key_namespace = settings.system_namespace or namespace
        own = [f"/api/v1/namespaces/{namespace}/{kind}" for kind in ("pods", "configmaps")]
        own.append(f"/api/v1/namespaces/{key_namespace}/secrets")
        stack.push_async_callback(_remove_all, api, own, f"{HIVE_LABEL}={name}")
        account = await stack.enter_async_context(
            open_account(api, name, namespace=namespace, key_namespace=key_namespace)
        )
        environ = {"ASH_HUB_BACKEND__HIVE": name, "ASH_HUB_BACKEND__NAMESPACE": namespace}
        if account is not None:
            environ["ASH_HUB_BACKEND__KUBECONFIG"] = str(account.kubeconfig)
        target = await stack.enter_async_context(open_target(private=True, environ=environ))
        hive = await stack.enter_async_context(Hive(target.url))
        pods = await stack.enter_async_context(_follow(api, namespace, settings, name))
        yield _Bench(hive, pods, account)


async def _remove_all(api: Api, collections: Sequence[str], selector: str) -> None:
    with anyio.CancelScope(shield=True):
        for collection in collections:
            for found in ((await api.get(collection, labelSelector=selector)) or {}).get("items", ()):
                await api.delete(f"{collection}/{found['metadata']['name']}")


# -- bare pods


@dataclass(slots=True)
class _Pods:
    """Pods of no hive, and their news as a hive hears them."""

    api: Api
    path: str
    settings: KubernetesSettings
    label: str
    tokens: CallTokens = field(default_factory=lambda: CallTokens(Ed25519PrivateKey.generate()))
    _seen: dict[str, Json] = field(default_factory=dict[str, Json])
    _news: anyio.Event = field(default_factory=anyio.Event)

    async def least(self) -> SandboxId:
        """Make a pod of the least that runs; return when it is ready."""
        pod = self._pod()
        del pod["spec"]["volumes"]
        for container in pod["spec"]["containers"]:
            for part in ("env", "volumeMounts", "workingDir"):
                container.pop(part, None)
            container["command"] = _LEAST
        sandbox_id = await self._make(pod)
        await self._until(lambda: _is_ready(self._seen.get(sandbox_id)))
        return sandbox_id

    async def runner(self) -> SandboxId:
        """Make a pod of the runner; return when it says that it is ready."""
        sandbox_id = await self._make(self._pod())
        await self._until(lambda: self._endpoint(sandbox_id) is not None)
        endpoint = self._endpoint(sandbox_id)
        assert endpoint is not None
        await RunnerClient(endpoint, self.tokens, sandbox_id).wait_ready(_WAIT_SECONDS)
        return sandbox_id

    async def delete(self, sandbox_id: SandboxId) -> None:
        """Delete a pod; return when it is gone."""
        await self.api.delete(f"{self.path}/{sandbox_id}", grace_seconds=_GRACE_SECONDS)
        await self._until(lambda: sandbox_id not in self._seen)

    def _endpoint(self, sandbox_id: SandboxId) -> Any:
        pod = self._seen.get(sandbox_id)
        return instance_of(pod).endpoint if pod is not None else None

    def _pod(self) -> Json:
        sandbox_id = new_sandbox_id()
        spec = SandboxSpec(
            id=sandbox_id,
            recipe=_RECIPE,
            server=_SERVER,
            network="internet",
            public_key=self.tokens.public_key,
            key=base64.b64encode(self.tokens.sandbox_keys.of(sandbox_id)).decode(),
        )
        pod = pod_of(spec, self.settings)
        labels: dict[str, str] = pod["metadata"]["labels"]
        pod["metadata"]["labels"] = {"ash/network": labels["ash/network"], _LABEL: self.label}
        return pod

    async def _make(self, pod: Json) -> SandboxId:
        return SandboxId(str((await self.api.create(self.path, pod))["metadata"]["name"]))

    def listed(self, names: set[str], version: int) -> None:
        del version
        self._seen = {name: pod for name, pod in self._seen.items() if name in names}
        self._tell()

    def changed(self, kind: str, pod: Json) -> None:
        name = str(pod["metadata"]["name"])
        if kind == "DELETED":
            self._seen.pop(name, None)
        else:
            self._seen[name] = pod
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        with anyio.move_on_after(_WAIT_SECONDS):
            while not holds():
                await self._news.wait()
            return
        raise StartFailed(f"a bare pod came not as far as it should within {_WAIT_SECONDS:g} s", step="pod")


def _is_ready(pod: Json | None) -> bool:
    conditions: list[Json] = pod["status"].get("conditions") or [] if pod is not None else []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


@asynccontextmanager
async def _follow(api: Api, namespace: str, settings: KubernetesSettings, label: str) -> AsyncGenerator[_Pods]:
    path = f"/api/v1/namespaces/{namespace}/pods"
    pods = _Pods(api, path, settings, label)
    selector = f"{_LABEL}={label}"
    informer = Informer(api, path, {"labelSelector": selector}, pods.listed, pods.changed)
    async with anyio.create_task_group() as group:
        group.start_soon(informer.run)
        try:
            with anyio.fail_after(_WAIT_SECONDS):
                await informer.synced.wait()
            yield pods
        finally:
            group.cancel_scope.cancel()
            await _remove_all(api, [path], selector)


# -- what is measured


async def _spawn(bench: _Bench) -> tuple[Sandbox, float]:
    """Spawn and call once; return the sandbox and the processor seconds that it has taken by then."""
    box = await bench.hive.spawn(_RECIPE)
    done = await box.exec(_CPU)
    fields = [line.rpartition(")")[2].split() for line in done.stdout.splitlines()]
    return box, sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS


async def _kill(spawned: tuple[Sandbox, float]) -> None:
    await spawned[0].destroy()


async def _out_of_step() -> None:
    """Wait up to a second.

    A kubelet looks at its containers every second, and sees a pod's end only then: a deletion that begins with the
    end of another would always begin right after such a look.
    """
    await anyio.sleep(random.random())


async def _timed(work: Awaitable[Any], times: list[float]) -> Any:
    began = time.perf_counter()
    done = await work
    times.append(time.perf_counter() - began)
    return done


async def _in_turns(bench: _Bench, count: int, step: Callable[[str], None]) -> list[Row]:
    made: dict[str, list[float]] = {"least": [], "runner": [], "hive": []}
    gone: dict[str, list[float]] = {"least": [], "runner": [], "hive": []}
    cpu: list[float] = []
    for number in range(count):
        step(f"spawn {number + 1} of {count}")
        least = await _timed(bench.pods.least(), made["least"])
        runner = await _timed(bench.pods.runner(), made["runner"])
        spawned = await _timed(_spawn(bench), made["hive"])
        cpu.append(spawned[1])
        for name, end in (
            ("least", bench.pods.delete(least)),
            ("runner", bench.pods.delete(runner)),
            ("hive", _kill(spawned)),
        ):
            await _out_of_step()
            await _timed(end, gone[name])
    return [
        Row(what="load of this machine meanwhile", unit="", hive=os.getloadavg()[0], samples=1),
        _row("spawn to first call; beside: pod of the runner, create to healthy", made["hive"],
             made["runner"], "1.1x"),
        _row("spawn to first call; beside: bare pod, create to Ready", made["hive"], made["least"]),
        _row("pod of the runner, create to healthy; beside: bare pod", made["runner"], made["least"]),
        Row(what="processor time of a sandbox until its first call was answered", unit="s", hive=median(cpu),
            samples=count, goal="1 s"),
        _row("destroy to gone; beside: bare pod that ends when told", gone["hive"], gone["least"], "1.1x"),
        _row("pod of the runner, delete to gone; beside: bare pod that ends when told", gone["runner"],
             gone["least"]),
    ]  # fmt: skip


def _row(what: str, hive: list[float], direct: list[float], goal: str = "") -> Row:
    return Row(what=what, unit="s", hive=median(hive), direct=median(direct), samples=len(hive), goal=goal)


async def _many_at_once(bench: _Bench, count: int, step: Callable[[str], None]) -> list[Row]:
    ways: list[tuple[str, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]]] = [
        ("bare pods", bench.pods.least, bench.pods.delete),
        ("pods of the runner", bench.pods.runner, bench.pods.delete),
        ("spawns", lambda: _spawn(bench), _kill),
    ]
    spawned: dict[str, list[float]] = {}
    killed: dict[str, list[float]] = {}
    for name, make, end in ways:
        step(f"{count} {name} at once")
        made = await _timed(_all_at_once([make] * count), spawned.setdefault(name, []))
        ends = [partial(end, each) for each in made]
        await _timed(_all_at_once(ends), killed.setdefault(name, []))
    what = f"{count} at once, until the last of them"
    least, runner, hive = (name for name, _, _ in ways)
    return [
        _row(f"{what}: spawn to first call; beside: pods of the runner", spawned[hive], spawned[runner], "1.1x"),
        _row(f"{what}: spawn to first call; beside: bare pods", spawned[hive], spawned[least]),
        _row(f"{what}: destroy to gone; beside: bare pods that end when told", killed[hive], killed[least]),
    ]


async def _all_at_once(works: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    done: list[Any] = []

    async def run(work: Callable[[], Awaitable[Any]]) -> None:
        done.append(await work())

    async with anyio.create_task_group() as group:
        for work in works:
            group.start_soon(run, work)
    return done


async def _count_requests(bench: _Bench, step: Callable[[str], None]) -> list[Row]:
    """Count what the API server is asked. The median leaves out what a hive asks from time to time."""
    what = [f"requests to the API server a {each}" for each in ("spawn", "destroy")]
    other = "requests to the API server a second, whatever happens"
    if bench.account is None:
        why = " (needs the right to make an account, its roles and flow schemas)"
        return [Row(what=each + why, unit="", hive=nan, samples=0) for each in (*what, other)]
    counts: tuple[list[float], list[float]] = ([], [])
    began, first = time.perf_counter(), await bench.account.requests()
    for number in range(_COUNTED):
        step(f"counting requests, {number + 1} of {_COUNTED}")
        before = (await bench.account.requests())[0]
        spawned = await _spawn(bench)
        between = (await bench.account.requests())[0]
        await _kill(spawned)
        counts[0].append(between - before)
        counts[1].append((await bench.account.requests())[0] - between)
    rest = ((await bench.account.requests())[1] - first[1]) / (time.perf_counter() - began)
    return [
        *(Row(what=each, unit="", hive=median(found), samples=_COUNTED)
          for each, found in zip(what, counts, strict=True)),
        Row(what=other, unit="1/s", hive=rest, samples=1),
    ]  # fmt: skip
