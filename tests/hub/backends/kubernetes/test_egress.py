"""Sandboxes on a cluster that go out by an egress proxy: what their pods say, and what a real proxy makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ash_hub.backends.kept_keys import keep_egress_key
from ash_hub.backends.kubernetes.api import Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.egress.shared import HiveLine
from ash_hub.egress.signing import token
from ash_mcp.errors import ConfigError, Conflict, StartFailed, Unsupported
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id
from ash_recipes.runner.forwarder import forwarding, greeting
from tests.hub.backends.kubernetes.pod_server import PodServer, following
from tests.hub.egress.egress_parts import WAIT_SECONDS, connect, error_of, get, web_server
from tests.hub.egress.shared_parts import Shared, free_port, passes, shared_proxy, tunnel_server

pytestmark = pytest.mark.anyio

SPEC = SandboxSpec(id=SandboxId("sbx-unused"), recipe="r", server={"python": "none:none"}, key="k")
CANARY = "10.0.0.1:8420"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def fresh(*network: str) -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id(), network=network)


def running(address: str = "127.0.0.1") -> Json:
    container: Json = {"name": "sandbox", "state": {"running": {}}}
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "containerStatuses": [container],
    }


@asynccontextmanager
async def hive(
    server: PodServer, patch: pytest.MonkeyPatch, **more: Any
) -> AsyncGenerator[tuple[KubernetesBackend, str]]:
    """Enter a backend with egress proxies, and say where it answers them."""
    place = f"127.0.0.1:{free_port()}"
    settings: dict[str, Any] = {
        "egress_proxy": "localhost:3128",
        "egress_listen": place,
        "private_egress": True,
        "canary": CANARY,
    }
    async with following(server, patch, **(settings | more)) as backend:
        yield backend, place


@asynccontextmanager
async def going_out(backend: KubernetesBackend, place: str, folder: Path) -> AsyncGenerator[Shared]:
    async with shared_proxy(folder, hive=place, key=await keep_egress_key(backend.documents)) as proxy:
        yield proxy


async def test_a_sandbox_with_a_list_is_labelled_for_the_proxies_and_told_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, spec = PodServer(), fresh("example.com", "*.example.org")
    async with hive(server, monkeypatch) as (backend, _):
        await backend.create(spec)
        key = await keep_egress_key(backend.documents)
    pod = server.pods[spec.id]
    assert pod["metadata"]["labels"]["ash/network"] == "domains"
    assert json.loads(pod["metadata"]["annotations"]["ash/policy"]) == ["example.com", "*.example.org"]
    variables = {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]}
    assert variables["ASH_EGRESS_TOKEN"] == token(key, spec.id)
    config = json.loads(variables["ASH_RUNNER_CONFIG"])
    assert config["egress"] in ("127.0.0.1:3128", "[::1]:3128"), "an address: sandboxes look no names up"
    assert config["canary"] == CANARY
    assert variables["ASH_EGRESS_TOKEN"] not in json.dumps(config)


@pytest.mark.parametrize("network", ["none", "internet"])
async def test_a_sandbox_without_a_list_has_nothing_of_the_proxies(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, spec = PodServer(), replace(fresh(), network=network)
    async with hive(server, monkeypatch) as (backend, place):
        await backend.create(spec)
        server.change(spec.id, running())
        pod = server.pods[spec.id]
        assert pod["metadata"]["labels"]["ash/network"] == network
        variables = {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]}
        assert "ASH_EGRESS_TOKEN" not in variables and "egress" not in json.loads(variables["ASH_RUNNER_CONFIG"])
        line = HiveLine(place, await keep_egress_key(backend.documents))
        assert await line.ask([spec.id]) == {spec.id: None}
        with pytest.raises(Unsupported, match="spawned with a list"):
            await backend.set_network(spec.id, ("example.com",), {}, revision=0)


async def test_the_internet_goes_by_the_proxies_where_a_setting_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, spec = PodServer(), replace(fresh(), network="internet")
    async with (
        hive(server, monkeypatch, internet_by_proxy=True) as (backend, place),
        going_out(backend, place, tmp_path) as proxy,
    ):
        await backend.create(spec)
        server.change(spec.id, running())
        assert server.pods[spec.id]["metadata"]["labels"]["ash/network"] == "domains"
        variables = {each["name"]: each["value"] for each in server.pods[spec.id]["spec"]["containers"][0]["env"]}
        assert json.loads(variables["ASH_RUNNER_CONFIG"])["canary"] == CANARY
        assert error_of(await proxy.ask(spec.id, get("http://10.0.0.1/")))["reason"] == "private"
        await backend.set_network(spec.id, ("example.com",), {}, revision=0)
        assert error_of(await proxy.ask(spec.id, get("http://10.0.0.1/")))["reason"] == "not_listed"
    with pytest.raises(ValidationError, match="egress_proxy"):
        KubernetesSettings(internet_by_proxy=True)


async def test_an_image_that_serves_by_itself_goes_out_by_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    server, by_itself = PodServer(), {"image": {"port": 3000, "path": "/mcp"}}
    # nor does its start need one
    proxy: dict[str, Any] = {"egress_proxy": "nowhere.invalid:3128", "internet_by_proxy": True}
    async with hive(server, monkeypatch, **proxy) as (backend, _):
        with pytest.raises(ConfigError, match="only a runner passes on to an egress proxy"):
            await backend.create(replace(fresh("example.com"), server=by_itself, image="i"))
        assert not server.pods
        spec = replace(fresh(), server=by_itself, image="i", network="internet")
        await backend.create(spec)
        assert server.pods[spec.id]["metadata"]["labels"]["ash/network"] == "internet"


async def test_replicas_have_one_key_for_their_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PodServer()
    async with hive(server, monkeypatch) as (one, _), hive(server, monkeypatch) as (other, _):
        assert await keep_egress_key(one.documents) == await keep_egress_key(other.documents)
    assert len(server.others.objects) == 1


async def test_a_proxy_is_told_what_the_pod_says_now_whatever_the_news_has_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, spec, stranger = PodServer(), fresh("example.com"), "sbx-stranger"
    server.put(stranger, {"ash/hive": "another", "ash/sandbox": stranger, "ash/network": "domains"})
    async with hive(server, monkeypatch, egress={"connections": 7}) as (backend, place):
        await backend.create(spec)
        server.deaf = asyncio.Event()
        line = HiveLine(place, await keep_egress_key(backend.documents))
        told = await line.ask([spec.id, stranger, "sbx-none"])
        assert told[spec.id]["policy"] == ["example.com"] and told[spec.id]["addresses"] == []
        assert told[spec.id]["limits"]["connections"] == 7
        assert told[stranger] is None and told["sbx-none"] is None
        server.change(spec.id, running("10.0.0.9"))
        server.pods[spec.id]["metadata"]["annotations"]["ash/policy"] = '"none"'  # as another replica does
        told = await line.ask([spec.id])
        assert told[spec.id]["policy"] == "none" and told[spec.id]["addresses"] == ["10.0.0.9"]
        server.change(spec.id, {"phase": "Failed"})
        assert await line.ask([spec.id]) == {spec.id: None}
        with pytest.raises(ValueError, match="not signed"):
            await HiveLine(place, bytes(32)).ask([spec.id])
        server.is_away = True
        with pytest.raises(ValueError, match="not signed"):  # it hangs up
            await line.ask([spec.id])
        server.deaf.set()
        server.is_away = False


async def test_a_pod_that_cannot_be_read_takes_the_answer_from_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spoilt, whole = PodServer(), fresh("example.com"), fresh("example.org")
    async with hive(server, monkeypatch) as (backend, place):
        await backend.create(spoilt)
        await backend.create(whole)
        server.pods[spoilt.id]["metadata"]["annotations"]["ash/policy"] = "example.com"  # by hand: no JSON
        told = await HiveLine(place, await keep_egress_key(backend.documents)).ask([spoilt.id, whole.id])
        assert told.keys() == {whole.id} and told[whole.id]["policy"] == ["example.org"]


async def test_a_request_of_the_runner_goes_through_a_proxy_under_the_policy_of_its_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = PodServer()
    async with (
        hive(server, monkeypatch) as (backend, place),
        going_out(backend, place, tmp_path) as proxy,
        web_server() as (port, heads),
    ):
        spec = fresh(f"one.test=127.0.0.1:{port}")
        await backend.create(spec)
        server.change(spec.id, running())
        variables = {each["name"]: each["value"] for each in server.pods[spec.id]["spec"]["containers"][0]["env"]}
        first = greeting(spec.id, variables["ASH_EGRESS_TOKEN"])
        async with forwarding(f"127.0.0.1:{proxy.port}", port=0, first=first) as its_port:
            assert (await through(its_port, get(f"http://one.test:{port}/"))).endswith(b"ok")
            assert error_of(await through(its_port, get("http://two.test/")))["reason"] == "not_listed"
            assert len(heads) == 1
            await backend.set_network(spec.id, "none", {"network": "none"}, revision=0)
            assert error_of(await through(its_port, get(f"http://one.test:{port}/")))["reason"] == "no_network"
        found = await backend.get(spec.id)
        assert found is not None and found.record == {"network": "none"} and found.revision == 1


async def test_what_is_open_is_closed_when_the_change_is_done_and_a_new_proxy_knows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = PodServer()
    async with hive(server, monkeypatch) as (backend, place), tunnel_server() as here, tunnel_server() as there:
        spec = fresh(here, there)
        await backend.create(spec)
        server.change(spec.id, running())
        async with going_out(backend, place, tmp_path) as proxy:
            one, two = await proxy.connect(spec.id, connect(here)), await proxy.connect(spec.id, connect(there))
            assert await passes(*one, first=True) and await passes(*two, first=True)
            await backend.set_network(spec.id, (here,), {}, revision=0)
            assert await passes(*one) and not await passes(*two)
        async with going_out(backend, place, tmp_path) as proxy:
            assert error_of(await proxy.ask(spec.id, connect(there)))["reason"] == "port"
            await backend.set_network(spec.id, (here, there), {}, revision=1)
            assert await passes(*await proxy.connect(spec.id, connect(there)), first=True)


async def test_a_change_that_cannot_be_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh("example.com")
    async with hive(server, monkeypatch, private_egress=False) as (backend, _):
        await backend.create(spec)
        server.change(spec.id, running())
        for policy in (("*.com",), ("one.test=10.0.0.1:80",)):
            with pytest.raises(ConfigError, match="network"):
                await backend.set_network(spec.id, policy, {}, revision=0)
        with pytest.raises(Conflict):
            await backend.set_network(spec.id, "none", {}, revision=3)
        with pytest.raises(Conflict):
            await backend.set_network(new_sandbox_id(), "none", {}, revision=0)
        assert json.loads(server.pods[spec.id]["metadata"]["annotations"]["ash/policy"]) == ["example.com"]
        server.change(spec.id, {"phase": "Failed"})
        with pytest.raises(Conflict):
            await backend.set_network(spec.id, "none", {}, revision=0)


async def test_a_proxy_that_has_no_address_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PodServer()
    async with hive(server, monkeypatch, egress_proxy="nowhere.invalid:3128") as (backend, _):
        with pytest.raises(StartFailed, match=r"nowhere\.invalid") as failure:
            await backend.create(fresh("example.com"))
        assert failure.value.retryable and not server.pods


async def test_a_place_to_answer_proxies_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PodServer()
    async with hive(server, monkeypatch) as (_, place):
        with pytest.raises(ConfigError, match="ASH_HUB_BACKEND__EGRESS_LISTEN"):
            async with hive(server, monkeypatch, egress_listen=place):
                pass


async def through(port: int, request: bytes) -> bytes:
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer
