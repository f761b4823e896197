"""The bounds of the relay are settings, and a hive keeps to them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
from pydantic import ValidationError

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings, RelaySettings
from ash_router.bounds.limits import RelayLimits

pytestmark = pytest.mark.anyio

POST = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def port(anyio_backend: str, folder: Path) -> AsyncGenerator[int]:
    bounds = RelaySettings(
        max_body_bytes=2000,
        max_head_bytes=3000,
        max_headers=12,
        head_timeout_seconds=0.2,
        body_timeout_seconds=0.3,
        keep_alive_seconds=1,
    )
    settings = HubSettings(port=0, state_dir=folder / "s", run_dir=folder / "r", relay=bounds)
    async with open_hive(settings) as hive:
        port = urlsplit(hive.url).port
        assert port is not None
        yield port


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"content-length: 2001\r\n\r\n", 413),
        (POST + b"transfer-encoding: chunked\r\n\r\n7d1\r\n" + b"a" * 2001 + b"\r\n", 413),
        (POST + b"x: " + b"a" * 3000 + b"\r\n\r\n", 431),
        (POST + b"x: y\r\n" * 12 + b"\r\n", 431),
        (b"POST /mcp HTTP/1.1\r\nhost:", 408),
        (POST + b"content-length: 20\r\n\r\n{", 408),
    ],
)
async def test_a_hive_answers_what_is_over_its_settings_with_a_status_and_json(port: int, sent: bytes, status: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    with anyio.fail_after(5):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body)["error"]["message"]


async def test_a_connection_that_asks_nothing_more_is_closed_after_its_setting(port: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    with anyio.fail_after(10):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.read()
    writer.close()


def test_they_come_from_the_environment_and_the_rest_stay_the_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASH_HUB_RELAY__MAX_BODY_BYTES", "8388608")
    monkeypatch.setenv("ASH_HUB_RELAY__IDLE_STREAM_SECONDS", "12.5")
    monkeypatch.setenv("ASH_HUB_LIMITS__CALLS_PER_OWNER", "7")
    limits = HubSettings().relay_limits
    assert limits == dataclasses.replace(
        RelayLimits(), max_body_bytes=8388608, idle_stream_seconds=12.5, max_in_flight_per_owner=7
    )


@pytest.mark.parametrize(
    ("name", "value"), [("max_body_bytes", 0), ("max_headers", -1), ("head_timeout_seconds", 0), ("max_haeders", 1)]
)
def test_one_that_makes_no_sense_is_refused_by_name(name: str, value: Any):
    with pytest.raises(ValidationError, match=rf"relay\.{name}"):
        HubSettings.model_validate({"relay": {name: value}})
