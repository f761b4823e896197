"""Hives that die, pods that others make and delete, an API server that is away: what is left is put right soon."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import pytest
import yaml

from ash_hub.backends.base import Phase
from ash_hub.backends.kept_keys import change_api_keys
from ash_hub.backends.kubernetes import api as api_module
from ash_hub.backends.kubernetes.api import Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.documents import KubernetesDocuments
from ash_mcp import Hive
from ash_mcp.errors import ConnectFailed, SandboxGone, SandboxNotFound, Unauthenticated
from ash_router.admission.api_keys import add_key, revoke_keys
from tests.delaying_proxy import DelayingProxy, delaying
from tests.hive_process import hive_in
from tests.kubernetes.conftest import NAMESPACES, Cluster
from tests.kubernetes.pod_parts import environment_of, fresh, serving, settings_of

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

SOON: Final = 5.0
"""Seconds until what is wrong is put right."""
NOWHERE: Final = {"ash-test": "nowhere"}
"""Labels that no node has."""


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


@asynccontextmanager
async def killed(home: Path) -> AsyncGenerator[tuple[str, int]]:
    """Give the URL and the process id of a hive that is killed at the end, without a warning."""
    hive = hive_in(home)
    url, pid = await anyio.to_thread.run_sync(hive.__enter__)
    try:
        yield url, pid
    finally:
        os.kill(pid, signal.SIGKILL)
        await anyio.to_thread.run_sync(hive.__exit__, None, None, None)


def path_of(cluster: Cluster, name: str = "") -> str:
    return f"{NAMESPACES}/{cluster.namespace}/pods" + (f"/{name}" if name else "")


async def pods_of(cluster: Cluster) -> dict[str, Json]:
    found = await cluster.api.get(path_of(cluster))
    return {str(pod["metadata"]["name"]): pod for pod in (found or {})["items"]}


async def gone(cluster: Cluster, name: str) -> None:
    """Delete a pod by hand, and wait until it is gone."""
    await cluster.api.delete(path_of(cluster, name), grace_seconds=0)
    with anyio.fail_after(20):
        while name in await pods_of(cluster):
            await anyio.sleep(0.1)


async def soon(holds: Callable[[], Awaitable[Any]], *, seconds: float = SOON) -> None:
    """Wait until something holds; time out beyond what it may take."""
    with anyio.fail_after(seconds):
        while not await holds():
            await anyio.sleep(0.05)


async def readiness(url: str) -> tuple[int, str]:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(url.removesuffix("/mcp") + "/readyz")
        return answer.status_code, answer.text


async def test_a_hive_that_is_killed_is_followed_by_one_that_goes_on_and_clears_what_it_left(
    cluster: Cluster, home: Path
) -> None:
    async with killed(home) as (url, pid), Hive(url) as hive:
        box = await hive.spawn("general")
        await box.files.write("/workspace/a.txt", "kept")
        deleted = await hive.spawn("general")
        with anyio.move_on_after(2):  # still waits for a node when the hive is killed
            async with anyio.create_task_group() as group:

                async def wait() -> None:
                    await hive.spawn("general", node_selector=NOWHERE)

                group.start_soon(wait)
                await soon(lambda: waiting(cluster))
                os.kill(pid, signal.SIGSTOP)  # so that it cannot clean up after this caller
                group.cancel_scope.cancel()
    assert len(await pods_of(cluster)) == 3
    await gone(cluster, deleted.id)
    async with serving(home) as url, Hive(url) as hive:

        async def one_is_left() -> bool:
            return list(await pods_of(cluster)) == [box.id]

        await soon(one_is_left)
        assert [info.id for info in await hive.list()] == [box.id]
        again = await hive.attach(box.session)
        assert await again.files.read("/workspace/a.txt") == "kept"
        with pytest.raises((SandboxGone, SandboxNotFound)):
            await hive.attach(deleted.session)
        async with hive.spawn("general", session=deleted.session) as new:  # its name is free
            assert (await new.exec("echo on")).stdout == "on\n"
        await again.destroy()


async def waiting(cluster: Cluster) -> bool:
    return any(pod["spec"].get("nodeSelector") == NOWHERE for pod in (await pods_of(cluster)).values())


async def test_what_the_hive_did_not_make_is_never_touched(cluster: Cluster, home: Path) -> None:
    def pod(name: str, labels: dict[str, str], annotations: dict[str, str]) -> Json:
        container = {"name": "sandbox", "image": "localhost/none:none", "imagePullPolicy": "Never"}
        metadata = {"name": name, "labels": labels, "annotations": annotations}
        return {"metadata": metadata, "spec": {"nodeSelector": NOWHERE, "containers": [container]}}

    async with serving(home) as url, Hive(url) as hive:
        box = await hive.spawn("general")
        made = (await pods_of(cluster))[box.id]["metadata"]
        theirs = [
            pod("plain", {}, {}),
            pod("managed", {"app.kubernetes.io/managed-by": "ash"}, {}),
            pod("alike", {"ash/hive": "ash"}, {}),
            pod("no-record", {"ash/hive": "ash", "ash/sandbox": "no-record"}, {}),
            pod("odd-record", {"ash/hive": "ash", "ash/sandbox": "odd-record"}, {"ash/record": "[]"}),
            pod("copied", made["labels"], made["annotations"]),  # as `kubectl debug --copy-to` may
            pod("anothers", {**made["labels"], "ash/hive": "other", "ash/sandbox": "anothers"}, made["annotations"]),
        ]
        for each in theirs:
            await cluster.api.create(path_of(cluster), each)
        names = {each["metadata"]["name"] for each in theirs}
        await anyio.sleep(1)
        assert [info.id for info in await hive.list()] == [box.id]
    async with serving(home) as url, Hive(url) as hive:
        assert [info.id for info in await hive.list(include_ended=True)] == [box.id]
        await (await hive.attach(box.session)).destroy()
        await anyio.sleep(1)
        left = await pods_of(cluster)
        assert left.keys() == names
        assert not any("deletionTimestamp" in each["metadata"] for each in left.values())


async def test_hives_of_other_names_in_one_namespace_leave_each_other_alone(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_HUB_BACKEND__HIVE", "one")
    monkeypatch.setenv("ASH_HUB_KEEP", "false")
    async with killed(home / "one") as (url, _), Hive(url) as hive:
        kept = await hive.spawn("general")
        monkeypatch.setenv("ASH_HUB_BACKEND__HIVE", "other")
        async with serving(home / "other") as url_of_other, Hive(url_of_other) as other:
            box = await other.spawn("general", session=kept.session)
            assert [info.id for info in await other.list()] == [box.id]
            assert [info.id for info in await hive.list()] == [kept.id]
        # the other has stopped, and ended what was its own
        assert set(await pods_of(cluster)) == {kept.id}
        assert (await kept.exec("echo on")).stdout == "on\n"


@asynccontextmanager
async def proxied(folder: Path) -> AsyncGenerator[tuple[DelayingProxy, Path]]:
    """Give a proxy before the API server, and a kubeconfig by which it is reached through that."""
    found: Json = yaml.safe_load(await anyio.Path(os.environ["ASH_TEST_KUBECONFIG"]).read_text())
    context = next(each["context"] for each in found["contexts"] if each["name"] == found["current-context"])
    named = next(each for each in found["clusters"] if each["name"] == context["cluster"])
    server: Json = named["cluster"]
    at = urlsplit(str(server["server"]))
    assert at.hostname is not None
    async with delaying(at.port or 443, delay_seconds=0.0, host=at.hostname) as proxy:
        server = {name: value for name, value in server.items() if not name.startswith("certificate-authority")}
        server |= {"server": f"https://127.0.0.1:{proxy.port}", "insecure-skip-tls-verify": True}
        named["cluster"] = server
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(json.dumps(found))
        yield proxy, kubeconfig


async def test_an_api_server_that_is_away_stops_spawns_and_nothing_else(
    cluster: Cluster, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(tmp_path) as (proxy, kubeconfig):
        monkeypatch.setenv("ASH_HUB_BACKEND__KUBECONFIG", str(kubeconfig))
        async with serving(home) as url, Hive(url) as hive:
            box, doomed = await hive.spawn("general"), await hive.spawn("general")
            names = {box.id, doomed.id}
            in_flight: list[str] = []

            async def call() -> None:
                in_flight.append((await box.exec("sleep 4; echo through")).stdout)

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.sleep(0.5)
                await proxy.cut("closed")

                async def is_said() -> bool:
                    status, said = await readiness(url)
                    return status == 503 and "the Kubernetes API does not answer" in said

                await soon(is_said)
                assert (await box.exec("echo on")).stdout == "on\n"
                assert {info.id for info in await hive.list()} == names
                began = time.monotonic()
                for refused in (hive.spawn("general", timeout_seconds=2), box.destroy()):
                    with pytest.raises(ConnectFailed, match="cannot change its sandboxes now: the Kubernetes API"):
                        await refused
                assert time.monotonic() - began < 10
            assert in_flight == ["through\n"]
            await gone(cluster, doomed.id)
            assert {info.id for info in await hive.list()} == names
            await proxy.heal()

            async def is_told() -> bool:
                return [info.id for info in await hive.list()] == [box.id]

            await soon(is_told)
            assert (await readiness(url))[0] == 200
            with pytest.raises(SandboxGone, match="its pod"):
                await doomed.exec("true")
            async with hive.spawn("general") as new:
                assert (await new.exec("echo on")).stdout == "on\n"
            assert (await box.exec("echo on")).stdout == "on\n"
            await box.destroy()
        assert await pods_of(cluster) == {}


async def test_a_start_that_is_given_up_while_the_api_server_is_away_is_cleared_soon_after(
    cluster: Cluster, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(tmp_path) as (proxy, kubeconfig):
        monkeypatch.setenv("ASH_HUB_BACKEND__KUBECONFIG", str(kubeconfig))
        async with serving(home) as url, Hive(url) as hive:

            async def wait() -> None:
                await hive.spawn("general", node_selector=NOWHERE)

            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await soon(lambda: waiting(cluster))
                await proxy.cut("closed")
                group.cancel_scope.cancel()
            await anyio.sleep(10)  # until the hive tries it again only every five seconds
            assert await waiting(cluster)
            await proxy.heal()

            async def is_gone() -> bool:
                return not await pods_of(cluster) and not await hive.list()

            await soon(is_gone)


async def test_an_api_server_that_goes_silent_is_noticed_and_heard_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "_REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(api_module, "_HEAD_SECONDS", 1.0)
    async with proxied(tmp_path) as (proxy, kubeconfig):
        async with KubernetesBackend(settings_of(cluster, kubeconfig=kubeconfig)) as backend:
            made = await backend.create(fresh())
            await anyio.sleep(1.5)
            await proxy.cut("silent")
            assert backend.unready() is None  # nothing has shown it
            with pytest.raises(ConnectFailed, match="does not answer"):
                await backend.list()

            async def is_noticed() -> bool:
                return backend.unready() is not None

            await soon(is_noticed)
            assert await backend.get(made.id) is not None
            await gone(cluster, made.id)
            await proxy.heal()

            async def is_told() -> bool:
                seen = await backend.get(made.id)
                return backend.unready() is None and (seen is None or seen.phase is Phase.ENDED)

            await soon(is_told)
            assert await backend.list() == []


async def test_a_key_that_is_revoked_in_the_cluster_is_refused_within_two_seconds(
    cluster: Cluster, home: Path
) -> None:
    where = cluster.namespace
    documents = KubernetesDocuments(cluster.api, hive="ash", namespace=where, key_namespace=where)
    async with serving(home) as url:
        _, token = await change_api_keys(documents, lambda keys: add_key(keys, now=time.time(), name="ci"))

        async def is_let_in() -> bool:
            async with Hive(url, token=token) as hive:
                try:
                    return await hive.list() == []
                except Unauthenticated:
                    return False

        await soon(is_let_in)
        await change_api_keys(documents, lambda keys: revoke_keys(keys, ["ci"]))

        async def is_refused() -> bool:
            return not await is_let_in()

        await soon(is_refused, seconds=2)
