"""What recipes/README.md shows works as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from ash_recipes.runner.context import Context
from ash_recipes.runner.servers.python import open_python
from ash_recipes.runner.tools import RunnerTools

pytestmark = pytest.mark.anyio

README = Path(__file__).parents[2] / "recipes" / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


async def test_the_shown_recipe_serves_its_tool(context: Context, tools: RunnerTools, tmp_path: Path) -> None:
    (code,), data = blocks("python"), tomllib.loads(blocks("toml")[0])
    (tmp_path / "dice.py").write_text(code, encoding="utf-8")
    async with open_python(data["server"]["python"], tools, tmp_path) as app:
        meta: dict[str, Any] = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params: dict[str, Any] = {"name": "roll", "arguments": {"sides": 1}, "_meta": meta}
        headers = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "roll"}
        transport = httpx.ASGITransport(app=app)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://recipe") as http:
            answer = await http.post(
                "/mcp",
                json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params},
                headers={**headers, "accept": "application/json, text/event-stream"},
            )
    assert answer.json()["result"]["structuredContent"] == {"value": 1}


def test_the_shown_data_has_only_known_fields() -> None:
    known = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", README.read_text(), re.MULTILINE))))
    assert set(tomllib.loads(blocks("toml")[0])) <= known
