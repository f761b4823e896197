"""The tools of runs and of spawns of several, as callers of the face meet them."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from ash_hub.face.arguments import DestroyAsk, ListAsk, RunAsk, SpawnSomeAsk
from ash_hub.face.handlers import HiveOperations
from ash_hub.face.hive_tools import HIVE_TOOLS
from ash_mcp.errors import ConfigError, PermissionDenied, RecipeNotFound, RunEnded, RunNotFound
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission.base import Admitted
from tests.hub.face.test_bound_caller import operations
from tests.hub.world import LOCAL, MakeWorld, World, no_progress

pytestmark = pytest.mark.anyio

ME = Admitted(LOCAL, DEFAULT_SCOPE, "/mcp")
OTHER = Admitted(Principal("other"), DEFAULT_SCOPE, "/mcp")


async def ask(tools: HiveOperations, tool: str, caller: Admitted = ME, **arguments: Any) -> tuple[dict[str, Any], str]:
    asked = HIVE_TOOLS[tool].ask.model_validate(arguments)
    answer = await tools.answer(caller, asked, no_progress)
    validator: Any = Draft202012Validator(HIVE_TOOLS[tool].to_json()["outputSchema"])
    validator.validate(answer.structured)
    return answer.structured, answer.text


async def test_a_run_is_opened_used_renewed_listed_and_ended(world: World) -> None:
    tools = operations(world)
    opened, text = await ask(tools, "run", run="train", lease_seconds=60)
    assert opened["run"] == "train" and opened["lease_seconds"] == 60 and 'run(run="train", renew=true)' in text
    made, _ = await ask(tools, "spawn", recipe="test", run="train")
    assert made["run"] == "train"
    assert (await ask(tools, "run", run="train", renew=True))[0]["run_id"] == opened["run_id"]
    await ask(tools, "spawn", recipe="test")
    listed, text = await ask(tools, "list")
    assert [run["run_id"] for run in listed["runs"]] == [opened["run_id"]] and "run train: open" in text
    assert [(it["session"], it["run"]) for it in listed["sandboxes"]] == [("sb1", "train"), ("sb2", None)]
    assert [it["session"] for it in (await ask(tools, "list", run="train"))[0]["sandboxes"]] == ["sb1"]
    ended, text = await ask(tools, "destroy", run="train")
    assert [it["session"] for it in ended["destroyed"]] == ["sb1"] and text == "Ended run train and its 1 sandboxes."
    again, text = await ask(tools, "destroy", run=opened["run_id"])
    assert again["destroyed"] == [] and "it was destroyed" in text
    with pytest.raises(RunEnded):
        await ask(tools, "spawn", recipe="test", run=opened["run_id"])


async def test_others_have_no_part_in_it(world: World) -> None:
    tools = operations(world)
    opened, _ = await ask(tools, "run", run="train")
    assert opened["lease_seconds"] == 600
    for name in ("train", opened["run_id"]):
        for tool, more in (("run", {"renew": True}), ("destroy", {}), ("spawn", {"recipe": "test"})):
            with pytest.raises(RunNotFound):
                await ask(tools, tool, OTHER, run=name, **more)
    assert (await ask(tools, "list", OTHER))[0]["runs"] == []
    made = await world.spawn()
    guest = Admitted(Principal("local", sandbox=made.id), DEFAULT_SCOPE, "/mcp")
    with pytest.raises(PermissionDenied):
        await ask(tools, "run", guest, run="mine")
    assert (await ask(tools, "list", guest))[0]["runs"] == []


async def test_arguments_that_say_nothing_together_are_refused(world: World) -> None:
    for wrong in ({}, {"session": "sb1", "run": "train"}):
        with pytest.raises(ValidationError, match="one of the two"):
            DestroyAsk.model_validate(wrong)
    for field, value in (("lease_seconds", 0.5), ("lease_seconds", 1e6), ("run", "")):
        with pytest.raises(ValidationError):
            RunAsk.model_validate({"run": "train", field: value})
    with pytest.raises(ValidationError):
        SpawnSomeAsk.model_validate({"count": 0})
    with pytest.raises(ConfigError, match="renew=true"):
        await ask(operations(world), "run", run="train", run_id="run-x")
    assert ListAsk().run is None


async def test_several_are_answered_with_their_sessions_and_what_failed(make_world: MakeWorld) -> None:
    world = await make_world(limits={"sandboxes": 3})
    await world.spawn()
    made, text = await ask(operations(world), "spawn", recipe="test", count=3, idempotency_key="k")
    assert made["sessions"] == ["sb2", "sb3"] and made["more_sessions"] == 0 and made["session"] == "sb2"
    (failed,) = made["failed"]
    assert (failed["count"], failed["kind"], failed["retryable"]) == (1, "capacity_exceeded", True)
    assert text.startswith("2 sandboxes are ready, all alike: sb2, sb3. 1 failed (capacity_exceeded): ")
    assert world.changed[1:] == [("local", DEFAULT_SCOPE)]
    with pytest.raises(RecipeNotFound):
        await ask(operations(world), "spawn", recipe="nonsense", count=2)


async def test_one_of_a_count_is_answered_as_ever(world: World) -> None:
    made, text = await ask(operations(world), "spawn", recipe="test", count=1, deadline_seconds=30)
    assert "sessions" not in made and text.startswith("Sandbox sb1 is ready")


async def test_a_spawn_that_shares_nothing_looks_through_no_list_of_sandboxes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Principal] = []
    of = world.sandboxes.registry.of

    def noted(principal: Principal, *scope: Any, **which: Any) -> Any:
        looked.append(principal)
        return of(principal, *scope, **which)

    monkeypatch.setattr(world.sandboxes.registry, "of", noted)
    await ask(operations(world), "spawn", recipe="test", idempotency_key="k")  # the SDK always sends a key
    assert looked == []
