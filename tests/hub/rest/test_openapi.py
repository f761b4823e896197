"""The description of the seed's REST is true to the code: what it allows is taken, all answers are as it says."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import anyio
import pytest
from hypothesis import HealthCheck, given, settings

from ash_hub.rest.openapi import description
from ash_hub.rest.shapes import Deprovisioned, DeprovisionedAll, Failure, SpawnBody, Spawned
from tests.hub.rest.test_seed_rest import Doors, opened
from tests.hub.world import MakeWorld

pytestmark = pytest.mark.anyio

_CASES: Final = 40
_BOUNDED: Final = settings(
    max_examples=_CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
_HTTPX: Final = {"data": "content"}
"""What requests and httpx call differently."""


async def test_it_is_served_and_names_every_path(make_world: MakeWorld) -> None:
    async with opened(await make_world()) as doors:
        answer = await doors.ask("GET", "/openapi.json")
        assert (answer.status_code, answer.json()) == (200, description())
        for path, methods in description()["paths"].items():
            for method in methods:
                asked = await doors.ask(method.upper(), path.replace("{uuid}", "nobodys"))
                assert str(asked.status_code) in methods[method]["responses"], (method, path, asked.text)


def test_its_fields_are_those_of_the_bodies() -> None:
    schemas = description()["components"]["schemas"]
    for model in (SpawnBody, Spawned, Deprovisioned, DeprovisionedAll, Failure):
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
        assert schemas[model.__name__]["additionalProperties"] is False
    assert schemas["SpawnBody"]["required"] == ["image"]
    assert set(schemas["Spawned"]["required"]) == {"name", "uuid", "namespace", "status", "service_type"}


@pytest.mark.parametrize("mode", ["positive", "negative"])
async def test_schemathesis_finds_no_answer_that_it_does_not_describe(make_world: MakeWorld, mode: str) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (scripts/setup test)")
    async with opened(await make_world(seed={"images": {"*": "test"}})) as doors:
        with anyio.fail_after(60):
            await anyio.to_thread.run_sync(_explore, doors, mode)


def _explore(doors: Doors, mode: str) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    generation: Any = pytest.importorskip("schemathesis.generation")
    schema: Any = schemathesis.openapi.from_dict(description())
    seen = set[int]()
    for result in schema.get_all_operations():
        operation: Any = result.ok()
        if mode == "negative" and operation.path != "/spawn":
            continue  # nothing else can be asked wrongly

        @_BOUNDED
        @given(case=operation.as_strategy(generation_mode=generation.GenerationMode(mode)))
        def check(case: Any) -> None:
            sent: dict[str, Any] = case.as_transport_kwargs(base_url="http://hive.test")
            method, url = sent.pop("method"), sent.pop("url")
            more: dict[str, Any] = {_HTTPX.get(name, name): value for name, value in sent.items() if value is not None}
            more.pop("cookies", None)
            answer = anyio.from_thread.run(partial(doors.ask, method, url, **more))
            case.validate_response(answer)
            seen.add(answer.status_code)

        check()
    assert {200, 404} <= seen if mode == "positive" else 400 in seen
