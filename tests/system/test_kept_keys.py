"""Hives whose backend keeps the keys: they start without any, and follow what is made and revoked meanwhile."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest

from ash_hub import chosen_backend
from ash_hub.app import Hive, open_hive
from ash_hub.backends.documents import DocumentKind, Documents
from ash_hub.backends.kept_keys import change_api_keys, read_api_keys
from ash_hub.backends.memory import MemoryBackend, MemoryDocuments
from ash_hub.cli.banner import banner
from ash_hub.settings import HubSettings
from ash_mcp.cli import main
from ash_router.admission.api_keys import add_key, revoke_keys

NO_KEYS = "no API keys yet: ash key new"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def replica(folder: Path, backend: MemoryBackend, **given: Any) -> AsyncGenerator[Hive]:
    """Serve a hive with a disk of its own, whose keys are where the backend is."""
    given = {"host": "0.0.0.0", **given}
    settings = HubSettings(port=0, state_dir=folder, run_dir=folder / "run", backend={"kind": "elsewhere"}, **given)
    async with open_hive(settings, backend.another()) as hive:
        yield hive


async def status(hive: Hive, token: str | None) -> int:
    url = hive.url.replace("0.0.0.0", "127.0.0.1").removesuffix("/mcp")
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{url}/readyz", headers=headers)).status_code


@pytest.mark.anyio
async def test_a_hive_without_keys_lets_nobody_in_says_so_and_follows_on_every_replica(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "ash.hub")
    backend = MemoryBackend()
    async with replica(folder / "a", backend) as a, replica(folder / "b", backend) as b:
        said = [record.message for record in caplog.records if "ash key new" in record.message]
        assert len(said) == 2 and "nobody is let in" in said[0]
        for hive in (a, b):
            assert NO_KEYS in " ".join(banner(hive))
            assert await status(hive, None) == 401
        _, key = await change_api_keys(backend.documents, lambda keys: add_key(keys, now=0.0, name="first"))
        with anyio.fail_after(30):
            while {await status(a, key), await status(b, key)} != {200}:
                await anyio.sleep(0.05)
        assert await status(a, None) == 401
        await change_api_keys(backend.documents, lambda keys: revoke_keys(keys, ["first"]))
        with anyio.fail_after(30):
            while {await status(a, key), await status(b, key)} != {401}:
                await anyio.sleep(0.05)


@pytest.mark.anyio
async def test_nothing_is_said_of_keys_where_one_is_there_or_none_is_needed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    async with replica(folder / "near", backend, host="127.0.0.1") as near:
        assert NO_KEYS not in " ".join(banner(near))
    await change_api_keys(backend.documents, lambda keys: add_key(keys, now=0.0))
    async with replica(folder / "far", backend) as far:
        assert NO_KEYS not in " ".join(banner(far))
    assert "ash key new" not in caplog.text


@pytest.mark.anyio
async def test_the_hives_own_key_is_where_the_backend_is(folder: Path) -> None:
    backend = MemoryBackend()
    async with replica(folder / "a", backend):
        assert not (folder / "a" / "hive.key").exists()
        body = await backend.documents.read(DocumentKind.KEYS, "hive")
    async with replica(folder / "b", backend):
        assert body is not None and await backend.documents.read(DocumentKind.KEYS, "hive") == body


def ash(*words: str) -> int:
    """Run the command line in this process."""
    with pytest.raises(SystemExit) as left:
        main(words)
    assert isinstance(left.value.code, int)
    return left.value.code


def offer(monkeypatch: pytest.MonkeyPatch, kind: str, load: Callable[[], object]) -> None:
    """Have a backend of this kind installed, as far as its documents go, and chosen."""
    points = {"ash.documents": [SimpleNamespace(name=kind, load=load)]}

    def entry_points(*, group: str) -> Sequence[SimpleNamespace]:
        return points[group]

    monkeypatch.setattr(chosen_backend, "entry_points", entry_points)
    monkeypatch.setenv("ASH_HUB_BACKEND__KIND", kind)


def test_the_command_line_changes_keys_where_the_backend_keeps_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    documents = MemoryDocuments(lambda: 0.0)
    asked: list[Any] = []

    @asynccontextmanager
    async def opens(options: Any, places: Any) -> AsyncGenerator[Documents]:
        asked.append(options)
        yield documents

    offer(monkeypatch, "elsewhere", lambda: opens)
    monkeypatch.setenv("ASH_HUB_STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("ASH_HUB_BACKEND__HIVE", "mine")
    monkeypatch.delenv("ASH_HUB_BACKEND__MACHINE", raising=False)  # as tests of an ordinary user have it
    assert ash("key", "new", "--name", "ci") == 0 and capfd.readouterr().out.startswith("ash_")
    assert asked == [{"kind": "elsewhere", "hive": "mine"}]
    (kept,) = anyio.run(read_api_keys, documents)
    assert ash("key", "list", "--json") == 0
    assert [key["id"] for key in json.loads(capfd.readouterr().out)["keys"]] == [kept.id]
    assert ash("key", "revoke", "nope") == 1 and "no key 'nope'" in capfd.readouterr().err
    assert ash("key", "revoke", "ci") == 0
    assert anyio.run(read_api_keys, documents) == [] and not (folder / "state").exists()


def test_the_command_line_says_where_it_cannot_change_keys(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load() -> object:
        raise ImportError("no module of that name")

    offer(monkeypatch, "bare", load)
    assert ash("key", "list") == 1 and "pip install 'ash-mcp[bare]'" in capfd.readouterr().err
    monkeypatch.setenv("ASH_HUB_BACKEND__KIND", "nowhere")
    assert ash("key", "list") == 1 and "the nowhere backend keeps" in capfd.readouterr().err
