"""The seed's client, against a stand-in for the seed's REST."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ash_mcp import compat
from ash_mcp.compat import (
    ResourceReq,
    ResourceSpec,
    Sandbox,
    SandboxClient,
    SandboxConfig,
    SandboxConnectionError,
    SandboxDestroyError,
    SandboxError,
    SandboxSpawnError,
    SandboxTimeoutError,
)
from tests.ash_mcp.seed_server import BROKEN, LOST, STALLED, Answer, SeedServer


@pytest.fixture
def server() -> Iterator[SeedServer]:
    server = SeedServer()
    yield server
    server.close()


@pytest.fixture
def seed() -> Iterator[SeedServer]:
    """A server that is no hive and forgets keys of idempotency."""
    server = SeedServer(is_hive=False)
    yield server
    server.close()


def config_of(server: SeedServer, **given: object) -> SandboxConfig:
    return SandboxConfig(control_plane_url=server.url, gateway_url=server.url, **given)  # pyright: ignore[reportArgumentType]


def test_the_names_of_the_seed_are_these():
    assert sorted(compat.__all__) == sorted(
        "ResourceReq ResourceSpec Sandbox SandboxClient SandboxConfig SandboxConnectionError SandboxDestroyError "
        "SandboxError SandboxSpawnError SandboxTimeoutError".split()
    )


def test_the_defaults_are_the_seeds():
    config = SandboxConfig()
    assert (config.control_plane_url, config.gateway_url, config.runtime_class) == ("", "", "")
    assert config.image == "timemagic/rl-mcp:general-1.7"
    assert (config.ports, config.env, config.resources, config.node_selector) == ([3000], {}, None, {})
    assert (config.timeout, config.mcp_timeout) == (300, 180)
    assert ResourceReq() == ResourceReq(requests=ResourceSpec("", ""), limits=ResourceSpec("", ""))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", {"config": None}),
        ("spawn", {"name": None}),
        ("destroy", {"sandbox_uuid": None}),
        ("connect", {"sandbox_uuid": None}),
        ("destroy_all", {}),
        ("health_check", {}),
        ("ready_check", {}),
        ("close", {}),
    ],
)
def test_every_argument_of_a_method_may_be_left_out(method: str, parameters: dict[str, object]):
    found = list(inspect.signature(getattr(SandboxClient, method)).parameters.values())[1:]
    assert {parameter.name: parameter.default for parameter in found} == parameters


def test_a_spawn_sends_what_the_config_says_and_no_more(server: SeedServer):
    sandbox = SandboxClient(config_of(server)).spawn()
    assert server.spawns()[0].body == {
        "image": "timemagic/rl-mcp:general-1.7",
        "ports": [{"container_port": 3000}],
    }
    assert isinstance(sandbox, Sandbox) and sandbox.is_ready
    assert sandbox.uuid in server.sandboxes
    assert (sandbox.namespace, sandbox.status, sandbox.ports) == ("apps", "Ready", [3000])
    assert (sandbox.service_type, sandbox.cluster_ip) == ("ClusterIP", "10.0.0.7")
    assert sandbox.host == f"{sandbox.name}.apps.svc.cluster.local"
    assert sandbox.mcp_url == f"{server.url}/mcp"


def test_a_whole_config_is_sent_in_the_seeds_words(server: SeedServer):
    config = config_of(
        server,
        image="custom-sandbox:latest",
        ports=[3000, 8080],
        env={"DEBUG": "true"},
        resources=ResourceReq(
            requests=ResourceSpec(cpu="100m", memory="256Mi"),
            limits=ResourceSpec(memory="512Mi"),
        ),
        node_selector={"gpu": "true"},
        runtime_class="kata-fc",
    )
    assert SandboxClient(config).spawn("mine").name == "mine"
    assert server.spawns()[0].body == {
        "name": "mine",
        "image": "custom-sandbox:latest",
        "ports": [{"container_port": 3000}, {"container_port": 8080}],
        "env": {"DEBUG": "true"},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "node_selector": {"gpu": "true"},
        "runtime_class": "kata-fc",
    }


@pytest.mark.parametrize("userinfo", ["sesame", "sesame:", ":sesame", "sesame:x", "ses%61me"])
def test_a_key_in_the_url_is_sent_as_a_token_and_shown_nowhere(
    server: SeedServer, userinfo: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASH_TOKEN", "another")
    url = f"http://{userinfo}@{server.address}/"
    client = SandboxClient(SandboxConfig(control_plane_url=url, gateway_url=url))
    sandbox = client.spawn()
    assert server.asked[0].headers["authorization"] == "Bearer sesame"
    transport = client.connect().transport
    assert transport.headers == {"X-Session-ID": sandbox.uuid, "Authorization": "Bearer sesame"}
    assert transport.url == f"{server.url}/mcp"
    server.faults.append(Answer(500, b"{}"))
    with pytest.raises(SandboxSpawnError) as refused:
        client.spawn()
    for shown in (client, client.config, sandbox, refused.value, refused.value.__cause__):
        assert not re.search("ses.*me", repr(shown))


def test_a_key_may_come_from_the_environment(server: SeedServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASH_TOKEN", "sesame")
    client = SandboxClient(config_of(server))
    client.spawn()
    assert server.asked[0].headers["authorization"] == "Bearer sesame"
    assert client.connect().transport.headers["Authorization"] == "Bearer sesame"


def test_without_a_key_none_is_sent(server: SeedServer):
    SandboxClient(config_of(server)).spawn()
    assert "authorization" not in server.asked[0].headers


def test_what_env_holds_is_not_in_the_configs_repr():
    assert "sesame" not in repr(SandboxConfig(env={"API_KEY": "sesame"}))


def test_the_end_of_the_block_destroys_the_sandbox(server: SeedServer):
    with SandboxClient(config_of(server)) as client:
        sandbox = client.spawn()
        assert client.sandbox is client.current_sandbox is sandbox
        assert sandbox.uuid in repr(client)
    assert server.sandboxes == {}
    assert client.sandbox is None


def test_a_sandbox_that_has_gone_by_itself_does_not_fail_the_block(
    server: SeedServer, caplog: pytest.LogCaptureFixture
):
    with SandboxClient(config_of(server)) as client:
        client.spawn()
        server.sandboxes.clear()
    assert "UUID not found" in caplog.text


def test_destroy_ends_the_own_sandbox_or_the_one_that_is_named(server: SeedServer):
    client, other = SandboxClient(config_of(server)), SandboxClient(config_of(server))
    first, second = client.spawn(), other.spawn()
    assert client.destroy(second.uuid) == {"message": "Deprovisioned", "uuid": second.uuid}
    assert client.sandbox is first
    assert client.destroy() == {"message": "Deprovisioned", "uuid": first.uuid}
    assert client.sandbox is None
    with pytest.raises(ValueError, match="spawn"):
        client.destroy()
    with pytest.raises(SandboxDestroyError, match="UUID not found"):
        client.destroy(first.uuid)


def test_destroy_all_says_what_went(server: SeedServer):
    clients = [SandboxClient(config_of(server)) for _ in range(3)]
    uuids = [client.spawn().uuid for client in clients]
    assert clients[0].destroy_all() == {"deleted": uuids, "failed": [], "count": 3}
    assert clients[0].sandbox is None


def test_the_checks_say_whether_the_control_plane_is_there_and_ready(server: SeedServer):
    client = SandboxClient(config_of(server))
    assert client.health_check() and client.ready_check()
    server.ready = False
    assert client.health_check() and not client.ready_check()
    server.close()
    assert not client.health_check() and not client.ready_check()
    assert not SandboxClient().health_check()


def test_ten_clients_spawn_at_once_and_keep_nothing_open(server: SeedServer):
    clients = [SandboxClient(config_of(server)) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        sandboxes = list(pool.map(SandboxClient.spawn, clients))
    assert {sandbox.uuid for sandbox in sandboxes} == set(server.sandboxes)
    assert len(server.sandboxes) == 10


def test_a_spawn_works_inside_a_running_loop(server: SeedServer):
    async def main() -> str:
        with SandboxClient(config_of(server)) as client:
            return client.spawn().status

    assert asyncio.run(main()) == "Ready"


@pytest.mark.parametrize("status", [400, 401, 403, 409, 500])
def test_a_refusal_is_raised_with_the_servers_words_and_not_tried_again(server: SeedServer, status: int):
    server.faults.append(Answer(status, json.dumps({"error": "no such image"}).encode()))
    with pytest.raises(SandboxSpawnError, match="no such image"):
        SandboxClient(config_of(server)).spawn()
    assert len(server.asked) == 1


def test_a_refusal_that_the_hive_typed_is_shown_in_its_words(server: SeedServer):
    error = {"kind": "unauthenticated", "message": "send a token", "retryable": False}
    server.faults.append(Answer(401, json.dumps({"error": error}).encode()))
    with pytest.raises(SandboxSpawnError, match="send a token") as refused:
        SandboxClient(config_of(server)).spawn()
    assert getattr(refused.value.__cause__, "kind", None) == "unauthenticated"


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_says_when_to_come_back_is_tried_again(server: SeedServer, status: int):
    full = Answer(status, b'{"error": "full"}', {"retry-after": "0"})
    server.faults.extend([full, full])
    assert SandboxClient(config_of(server)).spawn().is_ready
    assert len(server.spawns()) == 3
    server.faults.append(Answer(status, b'{"error": "full"}'))
    with pytest.raises(SandboxSpawnError, match="full"):
        SandboxClient(config_of(server)).spawn()
    assert len(server.spawns()) == 4


def test_a_refusal_that_outlasts_the_timeout_is_raised_at_once(server: SeedServer):
    server.faults.append(Answer(429, b'{"error": "full"}', {"retry-after": "60"}))
    with pytest.raises(SandboxSpawnError, match="full"):
        SandboxClient(config_of(server, timeout=20)).spawn()


def test_a_spawn_whose_answer_was_lost_is_repeated_and_made_once(server: SeedServer):
    server.faults.append(LOST)
    sandbox = SandboxClient(config_of(server)).spawn()
    assert list(server.sandboxes) == [sandbox.uuid]
    first, second = server.spawns()
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_a_spawn_that_is_repeated_while_the_first_is_ended_waits_for_that(server: SeedServer):
    ended = Answer(410, b'{"error": "ended while it started"}')
    server.faults.extend([BROKEN, ended, ended])
    sandbox = SandboxClient(config_of(server)).spawn()
    assert list(server.sandboxes) == [sandbox.uuid]
    server.faults.append(ended)
    with pytest.raises(SandboxSpawnError, match="ended while it started"):  # by somebody's wish, so it stays so
        SandboxClient(config_of(server)).spawn()


def test_two_spawns_are_two_sandboxes(server: SeedServer):
    client = SandboxClient(config_of(server))
    assert client.spawn().uuid != client.spawn().uuid


def test_a_spawn_whose_answer_was_lost_is_not_repeated_where_that_may_make_two(seed: SeedServer):
    seed.faults.append(LOST)
    with pytest.raises(SandboxConnectionError, match="unknown"):
        SandboxClient(config_of(seed)).spawn()
    assert len(seed.spawns()) == 1


def test_a_gateway_that_has_lost_the_server_counts_as_a_lost_answer(server: SeedServer):
    server.faults.append(Answer(502, b"<html>", {"ash-origin": ""}))
    assert SandboxClient(config_of(server)).spawn().is_ready


def test_a_destroy_whose_answer_was_lost_is_repeated_and_succeeds(server: SeedServer):
    client = SandboxClient(config_of(server))
    sandbox = client.spawn()
    server.faults.append(LOST)
    assert client.destroy() == {"message": "Deprovisioned", "uuid": sandbox.uuid}
    assert client.sandbox is None


def test_a_server_that_is_not_there_is_tried_a_few_times(caplog: pytest.LogCaptureFixture):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(SandboxConnectionError, match="no hive answers") as failed:
        SandboxClient(SandboxConfig(control_plane_url=url, gateway_url=url)).spawn()
    assert isinstance(failed.value, ConnectionError)
    assert caplog.text.count("trying again") == 3


def test_no_server_stalls_a_spawn_beyond_its_timeout(server: SeedServer):
    server.faults.append(STALLED)
    began = time.monotonic()
    with pytest.raises(SandboxTimeoutError, match="1 s") as failed:
        SandboxClient(config_of(server, timeout=1)).spawn()
    assert isinstance(failed.value, TimeoutError)
    assert time.monotonic() - began < 5


def test_an_answer_without_end_is_not_kept(server: SeedServer):
    server.faults.append(Answer(200, b" " * 5_000_000))
    with pytest.raises(SandboxSpawnError, match="bytes"):
        SandboxClient(config_of(server)).spawn()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"uuid": 3}', b'{"uuid": "a", "ports": [{}]}'])
def test_an_answer_that_is_none_is_an_error(server: SeedServer, body: bytes):
    server.faults.append(Answer(200, body))
    with pytest.raises(SandboxSpawnError, match="not a hive"):
        SandboxClient(config_of(server)).spawn()


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://somewhere", "http://[", "http://host:port"])
def test_a_url_that_is_none_is_an_error_that_names_it(url: str):
    client = SandboxClient(SandboxConfig(control_plane_url=url, gateway_url=url))
    with pytest.raises(SandboxSpawnError, match="control_plane_url"):
        client.spawn()
    with pytest.raises(SandboxConnectionError, match="gateway_url"):
        client.connect("some-uuid")
    assert url in repr(client)


def test_connect_needs_a_sandbox_and_takes_the_gateway(server: SeedServer):
    client = SandboxClient(config_of(server, mcp_timeout=7))
    with pytest.raises(ValueError, match="spawn"):
        client.connect()
    transport = client.connect("some-uuid").transport
    assert (transport.url, transport.headers) == (f"{server.url}/mcp", {"X-Session-ID": "some-uuid"})


def test_connect_without_fastmcp_says_what_to_install(server: SeedServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastmcp", None)
    with pytest.raises(ImportError, match=r"pip install 'ash-mcp\[compat\]'"):
        SandboxClient(config_of(server)).connect("some-uuid")


def test_importing_it_needs_neither_fastmcp_nor_a_server():
    code = "import sys, ash_mcp.compat as c; c.SandboxClient(c.SandboxConfig()); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert not {"fastmcp", "mcp", "httpx", "ash_hub", "ash_router"} & set(run.stdout.split())


def test_the_errors_are_one_family():
    for error in (SandboxSpawnError, SandboxDestroyError, SandboxConnectionError, SandboxTimeoutError):
        assert issubclass(error, SandboxError)
