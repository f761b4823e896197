"""The seed's REST over a lifecycle in memory: every answer, every error, and who may do what."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from starlette.types import Receive, Scope, Send

from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.rest.seed import MAX_BODY_BYTES, SeedRest
from ash_hub.serving.audit import AUDIT_LOGGER, Audit
from ash_hub.serving.metrics import Metrics
from ash_hub.serving.web_app import build_app
from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Principal, State
from ash_router.admission.base import ADMITTED_KEY, Admitted
from tests.hub.world import LOCAL, MakeWorld, World

pytestmark = pytest.mark.anyio

SEED = {"images": {"timemagic/rl-mcp:general-*": "test"}, "ready_seconds": 30}
SPAWN = {"image": "timemagic/rl-mcp:general-1.7"}
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


class Doors:
    """The REST of a world, as several callers use it."""

    def __init__(self, world: World) -> None:
        parts: Any = world.sandboxes._parts  # pyright: ignore[reportPrivateUsage]
        self.world = world
        self.rest = SeedRest(
            world.sandboxes, parts.settings, Audit(), world.controller.catch_up, world.store, world.backend
        )
        metrics = Metrics(world.ledger, world.routes)
        self.app = build_app(self.app_of, metrics, world.sandboxes.unready, lambda: None, self.rest.routes())

    async def app_of(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("nothing here asks for MCP")

    async def ask(self, method: str, path: str, *, by: Principal = LOCAL, **sent: Any) -> httpx.Response:
        async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ADMITTED_KEY] = Admitted(by, DEFAULT_SCOPE, scope["path"])
            await self.app(scope, receive, send)

        transport = httpx.ASGITransport(admitted)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://hive.test") as client:
            with anyio.fail_after(10):
                return await client.request(method, path, **sent)

    async def spawn(self, *, by: Principal = LOCAL, **more: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/spawn", by=by, json={**SPAWN, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def opened(world: World) -> AsyncGenerator[Doors]:
    doors = Doors(world)
    async with anyio.create_task_group() as group:
        await group.start(doors.rest.starts.run)
        yield doors
        group.cancel_scope.cancel()


@pytest.fixture
async def doors(make_world: MakeWorld) -> AsyncGenerator[Doors]:
    async with opened(await make_world(seed=SEED)) as doors:
        yield doors


async def test_a_spawn_says_what_the_seed_said(doors: Doors) -> None:
    answer = await doors.spawn(
        name="trainer",
        ports=[{"container_port": 3000}],
        env={"DEBUG": "true"},
        resources={"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        node_selector={"gpu": "true"},
        runtime_class="kata-clh",
    )
    uuid = answer.pop("uuid")
    assert re.fullmatch(f"trainer-{UUID4}", uuid)
    assert answer == {
        "name": "trainer",
        "namespace": "ash",
        "status": "Ready",
        "service_type": "ClusterIP",
        "ports": [3000],
    }
    (sandbox,) = doors.world.sandboxes.registry.living()
    assert (sandbox.alias, dict(sandbox.labels), sandbox.session) == (uuid, {"name": "trainer"}, "sb1")
    (made,) = doors.world.runner.specs
    assert (made.ports, made.node_selector, made.runtime_class) == ((3000,), {"gpu": "true"}, "kata-clh")
    assert (made.resources.requests.cpu, made.resources.limits.memory) == ("100m", "1Gi")
    assert doors.world.runner.claims[0]["env"] == {"DEBUG": "true"}


async def test_a_spawn_says_in_which_namespace_the_backend_made_it(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(seed=SEED)
    monkeypatch.setattr(world.backend, "describe", lambda: {"kind": "kubernetes", "namespace": "of-the-kubeconfig"})
    async with opened(world) as doors:
        assert (await doors.spawn())["namespace"] == "of-the-kubeconfig"


async def test_whoever_gives_no_name_gets_one(doors: Doors) -> None:
    first, second = await doors.spawn(), await doors.spawn(name="", env=None, ports=None, runtime_class="")
    for answer in (first, second):
        assert re.fullmatch(r"sandbox-[a-z0-9]{12}", answer["name"])
        assert re.fullmatch(f"{answer['name']}-{UUID4}", answer["uuid"])
        assert set(answer) == {"name", "uuid", "namespace", "status", "service_type"}
    assert first["uuid"] != second["uuid"]


WRONG: dict[str, tuple[Any, str]] = {
    "no image": ({}, r"^image is required$"),
    "an empty image": ({"image": ""}, r"^image is required$"),
    "no object": ([], r"must be a JSON object"),
    "an image without a recipe": ({"image": "nginx"}, r"no recipe .* 'nginx'.*timemagic/.*ASH_HUB_SEED__IMAGES"),
    "an image of another type": ({"image": 7}, r"^image: .*string"),
    "an unknown field": ({**SPAWN, "imag": "x"}, r"^imag: "),
    "a name that is none": ({**SPAWN, "name": "My_Box"}, r"^name: "),
    "ports that are numbers": ({**SPAWN, "ports": [3000]}, r"^ports\.0: "),
    "a port in words": ({**SPAWN, "ports": [{"container_port": "3000"}]}, r"^ports\.0\.container_port: "),
    "a port out of range": ({**SPAWN, "ports": [{"container_port": 0}]}, r"^ports\.0\.container_port: "),
    "env that is a list": ({**SPAWN, "env": ["A=b"]}, r"^env: "),
    "env that is no text": ({**SPAWN, "env": {"A": 1}}, r"^env\.A: "),
    "env of a wrong name": ({**SPAWN, "env": {"1A": "b"}}, r"^env\.1A"),
    "a label that is no text": ({**SPAWN, "node_selector": {"gpu": True}}, r"^node_selector\.gpu: "),
    "a CPU request": ({**SPAWN, "resources": {"requests": {"cpu": "lots"}}}, r"^invalid CPU request: 'lots' is not"),
    "a CPU limit": ({**SPAWN, "resources": {"limits": {"cpu": "-1"}}}, r"^invalid CPU limit: '-1' is not"),
    "a memory request": ({**SPAWN, "resources": {"requests": {"memory": "1Q"}}}, r"^invalid memory request: '1Q' is"),
    "a memory limit": ({**SPAWN, "resources": {"limits": {"memory": "x"}}}, r"^invalid memory limit: 'x' is not"),
    "a quantity that is a number": ({**SPAWN, "resources": {"limits": {"cpu": 1}}}, r"^resources\.limits\.cpu: "),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_body_is_400_and_nothing_is_made(doors: Doors, case: str) -> None:
    body, words = WRONG[case]
    answer = await doors.ask("POST", "/spawn", json=body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert re.search(words, answer.json()["error"]), answer.text
    assert not doors.world.sandboxes.registry.all()


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"image": NaN}', b"[" * 100_000, b'{"image": "\\ud800"}'])
async def test_a_body_that_is_no_json_is_400(doors: Doors, raw: bytes) -> None:
    answer = await doors.ask("POST", "/spawn", content=raw)
    assert answer.status_code == 400 and answer.json()["error"]


async def test_a_body_over_the_bound_is_413(doors: Doors) -> None:
    answer = await doors.ask("POST", "/spawn", content=b" " * (MAX_BODY_BYTES + 1))
    assert (answer.status_code, answer.json()) == (413, {"error": f"the body is longer than {MAX_BODY_BYTES} bytes"})


async def test_other_ways_to_write_a_quantity_are_understood(doors: Doors) -> None:
    await doors.spawn(resources={"limits": {"cpu": "0.5m", "memory": "128974848000m"}, "requests": {"memory": ""}})
    (made,) = doors.world.runner.specs
    limits, requests = made.resources.limits, made.resources.requests
    assert (limits.cpu, limits.memory, requests.memory) == ("1m", "128974848", None)


async def test_deprovision_ends_it_and_knows_it_no_more(doors: Doors) -> None:
    uuid = (await doors.spawn())["uuid"]
    answer = await doors.ask("DELETE", f"/deprovision/{uuid}")
    assert (answer.status_code, answer.json()) == (200, {"message": "Deprovisioned", "uuid": uuid})
    assert not await doors.world.backend.list()
    again = await doors.ask("DELETE", f"/deprovision/{uuid}")
    assert (again.status_code, again.json()) == (404, {"error": "UUID not found"})


async def test_only_a_uuid_of_the_callers_own_is_found(doors: Doors) -> None:
    uuid = (await doors.spawn())["uuid"]
    (sandbox,) = doors.world.sandboxes.registry.living()
    stranger = Principal("stranger")
    asked = [(stranger, uuid), (LOCAL, sandbox.session), (LOCAL, sandbox.id), (LOCAL, "no-such"), (LOCAL, "a/b")]
    for who, name in asked:
        answer = await doors.ask("DELETE", f"/deprovision/{name}", by=who)
        assert (answer.status_code, answer.json()) == (404, {"error": "UUID not found"}), name
    assert sandbox.state is State.READY


async def test_deprovision_all_ends_the_callers_own_of_this_door(doors: Doors) -> None:
    other = Principal("other")
    mine = {(await doors.spawn())["uuid"] for _ in range(2)}
    await doors.spawn(by=other)
    by_mcp = await doors.world.spawn()
    answer = await doors.ask("DELETE", "/deprovision-all")
    said = answer.json()
    assert (answer.status_code, set(said["deleted"]), said["failed"], said["count"]) == (200, mine, [], 2)
    assert {sandbox.owner for sandbox in doors.world.sandboxes.registry.living()} == {"local", "other"}
    assert by_mcp.state is State.READY
    assert (await doors.ask("DELETE", "/deprovision-all")).json() == {"deleted": [], "failed": [], "count": 0}


async def test_what_could_not_be_ended_is_named(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = (await doors.spawn())["uuid"]
    monkeypatch.setattr(doors.world.backend, "unready", lambda: "its keeper is away")
    answer = await doors.ask("DELETE", "/deprovision-all")
    assert (answer.status_code, answer.json()) == (200, {"deleted": [], "failed": [uuid], "count": 0})
    one = await doors.ask("DELETE", f"/deprovision/{uuid}")
    assert one.status_code == 502 and "its keeper is away" in one.json()["error"]


async def test_the_seeds_gateway_is_told_of_a_start_that_goes_on(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(seed={**SEED, "ready_seconds": 0.05})
    told: list[str] = []

    async def note(alias: str) -> None:
        told.append(alias)
        raise ConnectFailed("the store is away")

    monkeypatch.setattr(world.store, "note_starting", note)
    async with opened(world) as doors:
        world.runner.hold = anyio.Event()
        answer = await doors.spawn()
        assert (answer["status"], told) == ("Starting", [answer["uuid"]])
        world.runner.hold.set()


async def test_a_start_goes_on_after_its_answer(make_world: MakeWorld) -> None:
    world = await make_world(seed={**SEED, "ready_seconds": 0.05})
    world.runner.hold = anyio.Event()
    async with opened(world) as doors:
        answer = await doors.spawn(ports=[{"container_port": 3000}])
        assert (answer["status"], answer["ports"]) == ("Starting", [3000])
        assert "still starting" in answer["message"]
        sandbox = world.sandboxes.registry.find(LOCAL, EVERY_SCOPE, answer["uuid"])
        assert sandbox.state is State.STARTING
        world.runner.hold.set()
        with anyio.fail_after(5):
            await sandbox.settled.wait()
        assert sandbox.state is State.READY
        route = world.routes.named(answer["uuid"])
        assert route is not None and route.sandbox_id == sandbox.id


async def test_what_still_starts_can_be_deprovisioned(make_world: MakeWorld) -> None:
    world = await make_world(seed={**SEED, "ready_seconds": 0.05})
    world.runner.hold = anyio.Event()
    async with opened(world) as doors:
        uuid = (await doors.spawn())["uuid"]
        answer = await doors.ask("DELETE", f"/deprovision/{uuid}")
        assert (answer.status_code, answer.json()["message"]) == (200, "Deprovisioned")
        assert not await world.backend.list()
        world.runner.hold.set()


@pytest.mark.parametrize("key", [None, b"once"])
async def test_a_caller_that_leaves_unanswered_leaves_no_sandbox_unless_it_can_return(
    doors: Doors, key: bytes | None
) -> None:
    made = list[Sandbox]()
    doors.world.runner.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        left = anyio.Event()
        messages = [{"type": "http.request", "body": json.dumps(SPAWN).encode(), "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            del message

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/spawn",
            "query_string": b"",
            "headers": [] if key is None else [(b"idempotency-key", key)],
            ADMITTED_KEY: Admitted(LOCAL, DEFAULT_SCOPE, "/spawn"),
        }

        async def ask() -> None:
            await doors.app(scope, receive, send)

        group.start_soon(ask)
        with anyio.fail_after(5):
            await doors.world.runner.asked.wait()
            (sandbox,) = doors.world.sandboxes.registry.living()
            made.append(sandbox)
            left.set()
            if key is None:
                await sandbox.ended.wait()
            else:
                await anyio.wait_all_tasks_blocked()
                assert sandbox.state is State.STARTING
            doors.world.runner.hold.set()
    (sandbox,) = made
    with anyio.fail_after(5):
        await sandbox.settled.wait()
    assert (sandbox.state, len(await doors.world.backend.list())) == (
        (State.FAILED, 0) if key is None else (State.READY, 1)
    )


async def test_the_same_idempotency_key_is_answered_with_the_same_sandbox(doors: Doors) -> None:
    keyed = {"Idempotency-Key": "once"}
    first, again = [await doors.ask("POST", "/spawn", json=SPAWN, headers=keyed) for _ in range(2)]
    assert first.status_code == 200 and first.json() == again.json()
    other = await doors.ask("POST", "/spawn", json=SPAWN, headers=keyed, by=Principal("other"))
    assert other.json()["uuid"] != first.json()["uuid"]
    for wrong in ("", "a b", "x" * 129):
        answer = await doors.ask("POST", "/spawn", json=SPAWN, headers={"Idempotency-Key": wrong})
        assert answer.status_code == 400 and "Idempotency-Key" in answer.json()["error"]
    await doors.world.spawn(idempotency_key="of-mcp")
    answer = await doors.ask("POST", "/spawn", json=SPAWN, headers={"Idempotency-Key": "of-mcp"})
    assert answer.status_code == 409 and "made by MCP" in answer.json()["error"]


async def test_a_key_finds_what_still_starts(make_world: MakeWorld) -> None:
    world = await make_world(seed={**SEED, "ready_seconds": 0.05})
    world.runner.hold = anyio.Event()
    async with opened(world) as doors:
        keyed = {"Idempotency-Key": "once"}
        first, again = [await doors.ask("POST", "/spawn", json=SPAWN, headers=keyed) for _ in range(2)]
        assert first.json()["status"] == "Starting" and first.json() == again.json()
        assert len(world.sandboxes.registry.living()) == 1
        world.runner.hold.set()


async def test_a_start_that_fails_says_why(doors: Doors) -> None:
    doors.world.runner.health_status = 500
    answer = await doors.ask("POST", "/spawn", json=SPAWN)
    assert answer.status_code == 502
    assert "its server has no tools" in answer.json()["error"]


async def test_a_full_hive_says_when_to_come_back(make_world: MakeWorld) -> None:
    async with opened(await make_world(seed=SEED, limits={"sandboxes": 1})) as doors:
        await doors.spawn()
        answer = await doors.ask("POST", "/spawn", json=SPAWN)
        assert (answer.status_code, set(answer.json())) == (429, {"error"})
        assert int(answer.headers["retry-after"]) >= 1


async def test_starts_have_a_bound_and_end_with_the_hive(make_world: MakeWorld) -> None:
    world = await make_world(seed=SEED, limits={"sandboxes": 1})
    async with opened(world) as doors:
        first = doors.rest.starts.begin(anyio.sleep_forever)  # type: ignore[arg-type]
        answer = await doors.ask("POST", "/spawn", json=SPAWN)
        assert (answer.status_code, answer.json()) == (429, {"error": "1 sandboxes are starting already"})
        first.cancel()
        with anyio.fail_after(5):
            await first.done.wait()
    stopped = await doors.ask("POST", "/spawn", json=SPAWN)
    assert (stopped.status_code, stopped.json()) == (502, {"error": "the hive is stopping"})


async def test_whoever_is_bound_to_one_sandbox_makes_and_ends_none(doors: Doors) -> None:
    uuid = (await doors.spawn())["uuid"]
    (sandbox,) = doors.world.sandboxes.registry.living()
    guest = Principal("guest", sandbox=sandbox.id)
    for method, path in (("POST", "/spawn"), ("DELETE", f"/deprovision/{uuid}"), ("DELETE", "/deprovision-all")):
        answer = await doors.ask(method, path, by=guest, **({"json": SPAWN} if method == "POST" else {}))
        assert (answer.status_code, set(answer.json())) == (403, {"error"})
    assert sandbox.state is State.READY


async def test_each_step_has_its_audit_line(doors: Doors, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", AUDIT_LOGGER):
        uuid = (await doors.spawn(env={"A": "secret-value"}))["uuid"]
        await doors.ask("DELETE", f"/deprovision/{uuid}")
        await doors.ask("DELETE", f"/deprovision/{uuid}")
        doors.world.runner.health_status = 500
        await doors.ask("POST", "/spawn", json=SPAWN)
    lines = [json.loads(record.message) for record in caplog.records if record.name == AUDIT_LOGGER]
    found = [(line["event"], line["outcome"], line.get("who")) for line in lines]
    assert found == [
        ("spawn", "done", "local"),
        ("claim", "done", "local"),
        ("destroy", "done", "local"),
        ("request", "sandbox_not_found", "local"),
        ("spawn", "start_failed", "local"),
    ]
    assert lines[1]["variables"] == 1
    assert "secret-value" not in caplog.text


async def test_an_adopted_sandbox_keeps_its_uuid(make_world: MakeWorld) -> None:
    async with opened(await make_world(seed=SEED)) as doors:
        uuid = (await doors.spawn())["uuid"]
    after = await make_world(seed=SEED)
    await after.look()
    found = after.sandboxes.registry.find(LOCAL, EVERY_SCOPE, uuid)
    assert found.state is State.READY
    route = after.routes.named(uuid)
    assert route is not None and route.sandbox_id == found.id


async def test_health_readiness_and_methods_are_the_seeds(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await doors.ask("GET", "/healthz")).text == "ok"
    assert (await doors.ask("GET", "/readyz")).text == "ready"
    assert (await doors.ask("GET", "/spawn")).status_code == 405
    monkeypatch.setattr(doors.world.backend, "unready", lambda: "its keeper is away")
    answer = await doors.ask("GET", "/readyz")
    assert (answer.status_code, answer.text) == (503, "its keeper is away")
