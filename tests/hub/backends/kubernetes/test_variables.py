"""The Secrets of spawns for images without a runner: none is left, and none is taken from whom it belongs to."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ash_hub.backends.kubernetes import variables as module
from ash_hub.backends.kubernetes.api import ApiRefusal, Json
from ash_hub.backends.kubernetes.image_server import EXPIRES, variables_secret
from ash_hub.backends.kubernetes.pods import sandbox_labels
from ash_hub.backends.kubernetes.variables import VariableSecrets
from ash_mcp.errors import CapacityExceeded, ConfigError, ConnectFailed, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id
from tests.hub.backends.kubernetes.pod_server import NAMESPACE, SECRETS, PodServer, following

pytestmark = pytest.mark.anyio

SPEC = SandboxSpec(
    id=SandboxId("sbx-unused"),
    recipe="own",
    server={"image": {"port": 3000, "path": "/mcp"}},
    image="own:1",
    variables={"TOKEN": "s3cret"},
)


def fresh() -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id())


async def until_owned(server: PodServer, sandbox_id: SandboxId) -> Json:
    async with asyncio.timeout(10):
        while not (about := server.others.objects[f"{SECRETS}/{sandbox_id}"]["metadata"]).get("ownerReferences"):
            await asyncio.sleep(0.005)
    return about


async def test_it_is_made_before_its_pod_and_named_by_hive_sandbox_and_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        assert [what for what in server.asked if what.startswith("create")] == [f"create {spec.id}"] * 2
        about = await until_owned(server, spec.id)
        assert about["labels"] == {
            "app.kubernetes.io/managed-by": "ash",
            "ash/hive": "h",
            "ash/sandbox": spec.id,
        }
        assert float(about["annotations"][EXPIRES]) > 0
        await backend.delete(spec.id)
    assert server.others.objects == {}


@pytest.mark.parametrize(
    ("refusal", "raised"),
    [
        (ApiRefusal(403, {"message": "exceeded quota"}), CapacityExceeded),
        (ApiRefusal(403, {"message": "no such class"}), ConfigError),
        (ConnectFailed("the Kubernetes API does not answer: lost"), StartFailed),
    ],
)
async def test_a_pod_that_is_not_made_leaves_none(
    refusal: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.pod_refusals.append(refusal)
        with pytest.raises(raised):
            await backend.create(spec)
    assert (server.pods, server.others.objects) == ({}, {})


async def test_a_caller_that_leaves_while_its_pod_is_made_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.held = asyncio.Event()
        creating = asyncio.create_task(backend.create(spec))
        async with asyncio.timeout(10):
            while spec.id not in server.pods:
                await asyncio.sleep(0.005)
        creating.cancel()
        server.held.set()
        with pytest.raises(asyncio.CancelledError):
            await creating
        async with asyncio.timeout(10):
            while server.pods:
                await asyncio.sleep(0.005)
    assert server.others.objects == {}


@pytest.mark.parametrize(
    ("refusal", "raised", "says"),
    [
        (ApiRefusal(403, {"reason": "Forbidden", "message": "may not"}), ConfigError, "by a Secret, .*may not"),
        (ApiRefusal(403, {"message": "exceeded quota: secrets"}), CapacityExceeded, "quota is used up"),
        (ConnectFailed("the Kubernetes API does not answer: lost"), StartFailed, "does not answer"),
    ],
)
async def test_one_that_cannot_be_made_fails_the_start_before_there_is_a_pod(
    refusal: Exception, raised: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.refusals.append(refusal)
        with pytest.raises(raised, match=says):
            await backend.create(spec)
        assert server.asked.count(f"create {spec.id}") == 1
    assert server.pods == {}


async def test_one_that_is_there_already_is_somebody_elses_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    await server.create(SECRETS, variables_secret(spec, sandbox_labels("another", spec.id), 0.0))
    async with following(server, monkeypatch) as backend:
        with pytest.raises(ConfigError, match="AlreadyExists"):
            await backend.create(spec)
    assert len(server.others.objects) == 1


async def test_one_whose_pod_has_not_come_is_reaped_once_it_has_expired_and_a_late_pod_gets_its_own() -> None:
    server, now, pods = PodServer(), [1000.0], dict[SandboxId, str]()
    secrets = VariableSecrets(
        server,  # type: ignore[arg-type]
        hive="h",
        namespace=NAMESPACE,
        uid_of=pods.get,
        now=lambda: now[0],
    )
    lost, late, unseen, foreign = (fresh() for _ in range(4))
    for spec in (lost, late, unseen):
        await server.create(SECRETS, variables_secret(spec, sandbox_labels("h", spec.id), 1600.0))
    await server.create(SECRETS, variables_secret(foreign, sandbox_labels("another", foreign.id), 0.0))
    await server.create(SECRETS, {"metadata": {"name": "keys", "labels": {"ash/hive": "h"}}, "data": {}})
    server.put(unseen.id, {})

    await secrets.reap()
    assert len(server.others.objects) == 5, "none has expired"
    now[0], pods[late.id] = 1600.0, "u7"
    await secrets.reap()
    left = {at.rpartition("/")[2]: found for at, found in server.others.objects.items()}
    assert left.keys() == {late.id, unseen.id, foreign.id, "keys"}
    assert [owner["uid"] for owner in left[late.id]["metadata"]["ownerReferences"]] == ["u7"]
    now[0] = 1e12
    await secrets.reap()
    assert left.keys() == {late.id, unseen.id, foreign.id, "keys"}, "a pod's own goes with the pod alone"


async def test_a_hive_reaps_from_its_start_on_and_an_error_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REAP_SECONDS", 0.005)
    server, spec = PodServer(), fresh()
    await server.create(SECRETS, variables_secret(spec, sandbox_labels("h", spec.id), 0.0))
    refused = ApiRefusal(403, {"message": "may not list"})
    server.others.refusals += [refused, RuntimeError("a defect")]
    async with following(server, monkeypatch) as backend, asyncio.timeout(10):
        while server.others.objects:
            await asyncio.sleep(0.005)
        await backend.create(replace(fresh(), variables={}))
