"""The seed's REST of a real hive, by plain HTTP alone."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ash_hub.serving.auth import key_file
from tests.hive_process import hive_in

pytestmark = pytest.mark.heavy

IMAGE = "timemagic/rl-mcp:general-1.7"


def called(
    base: str, uuid: str, *, tool: str = "terminal-controller_execute_command", **arguments: Any
) -> httpx.Response:
    """Call a tool of the sandbox that `X-Session-ID` names, in the stateless era."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
        "io.modelcontextprotocol/clientInfo": {"name": "seed", "version": "1"},
    }
    params = {"name": tool, "arguments": arguments, "_meta": meta}
    headers = {
        "x-session-id": uuid,
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": "2026-07-28",
        "mcp-method": "tools/call",
        "mcp-name": tool,
    }
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    return httpx.post(f"{base}/mcp", headers=headers, json=message, timeout=30)


def text_of(answer: httpx.Response) -> str:
    body = answer.text.split("data: ")[-1].split("\n")[0] if "data: " in answer.text else answer.text
    return json.loads(body)["result"]["content"][0]["text"]


def once_ready(base: str, uuid: str, key: str) -> httpx.Response:
    """Call a sandbox that is starting, with a key, until it is ready; then without one."""
    keyed = base.replace("http://", f"http://{key}@")
    deadline = time.monotonic() + 60
    while (answer := called(keyed, uuid, tool="echo", text="hi")).status_code != 200:
        assert (answer.status_code, answer.json()["error"]["kind"]) == (429, "capacity_exceeded")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return called(base, uuid, tool="echo", text="hi")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name:
        yield Path(name)


def test_a_trainer_needs_no_more_than_http_and_its_key_in_the_url(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hive takes no one for its local user, as one that listens on the network does not."""
    keys = key_file(home / "state")
    (_, ann), (_, bob) = keys.add(subject="ann"), keys.add(subject="bob")
    monkeypatch.setenv("ASH_HUB_HOST", "0.0.0.0")
    with hive_in(home) as (url, _):
        near = url.removesuffix("/mcp").replace("0.0.0.0", "127.0.0.1").removeprefix("http://")
        mine, theirs, nobodys = f"http://{ann}@{near}", f"http://{bob}@{near}", f"http://{near}"
        assert httpx.get(f"{nobodys}/healthz").text == "ok"
        assert httpx.get(f"{mine}/readyz").text == "ready"
        assert httpx.post(f"{nobodys}/spawn", json={"image": IMAGE}).status_code == 401

        made = httpx.post(
            f"{mine}/spawn",
            json={"image": IMAGE, "name": "trainer", "ports": [{"container_port": 3000}], "env": {"WORD": "hello"}},
            timeout=60,
        )
        assert made.status_code == 200, made.text
        said = made.json()
        assert (said["status"], said["namespace"], said["service_type"]) == ("Ready", "ash", "ClusterIP")
        uuid = said["uuid"]
        command = {"command": "echo $WORD"}
        assert "hello" in text_of(called(mine, uuid, **command))
        assert called(theirs, uuid, **command).status_code == 404
        assert called(nobodys, uuid, **command).status_code == 401

        assert httpx.delete(f"{nobodys}/deprovision/{uuid}").status_code == 401
        gone = httpx.delete(f"{theirs}/deprovision/{uuid}")
        assert (gone.status_code, gone.json()) == (404, {"error": "UUID not found"})
        assert httpx.delete(f"{theirs}/deprovision-all").json() == {"deleted": [], "failed": [], "count": 0}
        ended = httpx.delete(f"{mine}/deprovision/{uuid}")
        assert (ended.status_code, ended.json()) == (200, {"message": "Deprovisioned", "uuid": uuid})
        assert called(mine, uuid, **command).status_code == 410


def test_a_uuid_opens_its_sandbox_where_the_operator_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ann = key_file(home / "state").add(subject="ann")
    monkeypatch.setenv("ASH_HUB_HOST", "0.0.0.0")
    monkeypatch.setenv("ASH_HUB_SEED_IDS_ARE_CAPABILITIES", "true")
    monkeypatch.setenv("ASH_HUB_SEED__IMAGES", '{"mine:*": "echo"}')
    monkeypatch.setenv("ASH_HUB_SEED__READY_SECONDS", "0.001")
    with hive_in(home) as (url, _):
        near = url.removesuffix("/mcp").replace("0.0.0.0", "127.0.0.1")
        mine = near.replace("http://", f"http://{ann}@")
        first, second = (httpx.post(f"{mine}/spawn", json={"image": "mine:1"}, timeout=60).json() for _ in range(2))
        assert (first["status"], second["status"]) == ("Starting", "Starting")
        assert "hi" in text_of(once_ready(near, first["uuid"], ann))
        assert called(near, second["uuid"][:-1] + "x", tool="echo", text="hi").status_code == 401
        assert httpx.delete(f"{near}/deprovision/{first['uuid']}").status_code == 401
        swept = httpx.delete(f"{mine}/deprovision-all").json()
        assert (set(swept["deleted"]), swept["count"]) == ({first["uuid"], second["uuid"]}, 2)
        assert called(near, first["uuid"], tool="echo", text="hi").status_code == 410
