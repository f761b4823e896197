"""The audit of a hive that runs: who did what, from where, and what came of it."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from ash_hub.app import open_hive
from ash_hub.serving.audit import AUDIT_LOGGER
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from ash_mcp.errors import AshError
from tests.hub.backends.local.local_parts import needs_isolation

pytestmark = [pytest.mark.anyio, needs_isolation]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.heavy
async def test_each_kind_of_event_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name, caplog.at_level(logging.INFO, AUDIT_LOGGER):
        folder = Path(name)
        made, key = key_file(folder / "state").add(subject="ann")
        settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run")
        async with open_hive(settings) as served, Hive(served.url, token=key) as hive:
            box = await hive.spawn("echo", session="first", env={"A": "1"}, secrets={"B": "2"})
            await hive.spawn("echo", session="left")
            with pytest.raises(AshError):
                await hive.spawn("nonesuch")
            with pytest.raises(AshError):
                await hive.extend("nonesuch", 60)
            await hive.set_network("first", "none")
            await hive.destroy("first")
            async with httpx.AsyncClient() as client:
                refused = await client.get(served.url, headers={"authorization": "Bearer nonsense"})
            assert refused.status_code == 401
    lines: list[dict[str, Any]] = [json.loads(it.getMessage()) for it in caplog.records if it.name == AUDIT_LOGGER]
    first = [line for line in lines if line.get("session") == "first"]
    assert [(line["event"], line["outcome"]) for line in first] == [
        ("spawn", "done"),
        ("claim", "done"),
        ("network", "done"),
        ("destroy", "done"),
    ]
    for line in first:
        assert (line["who"], line["by"], line["sandbox"]) == ("ann", f"key:{made.id}", box.id)
        assert line["from"].startswith("127.0.0.1:") and line["at"].endswith("Z")
    assert (first[1]["variables"], first[1]["secrets"]) == (1, 1)
    others = [(line["event"], line["outcome"], line.get("who")) for line in lines if line.get("session") is None]
    assert sorted(others, key=str) == sorted(
        [
            ("admission", "unauthenticated", None),
            ("request", "sandbox_not_found", "ann"),
            ("spawn", "recipe_not_found", "ann"),
        ],
        key=str,
    )
    assert [(line["outcome"], line["who"]) for line in lines if line.get("session") == "left"][-1] == (
        "hive_stopped",
        "hive",
    )
