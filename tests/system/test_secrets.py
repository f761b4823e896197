"""Secrets of spawns, keys and tokens: nowhere but in the sandbox that they were given to."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from ash_hub.serving.auth import key_file
from ash_mcp import Hive
from ash_mcp.errors import AshError, Unauthenticated
from tests.hive_process import ASH
from tests.router.admission.issuer import AUDIENCE, Issuer, running_issuer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@contextmanager
def hive_of(home: Path, issuer: Issuer) -> Generator[str]:
    """A hive at its most talkative, as a process; gives its URL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
    environ = {
        **clean,
        "ASH_HUB_STATE_DIR": str(home / "state"),
        "ASH_HUB_RUN_DIR": str(home / "run"),
        "ASH_HUB_LOG_LEVEL": "debug",
        "ASH_HUB_AUTH__OIDC__ISSUER": issuer.url,
        "ASH_HUB_AUTH__OIDC__AUDIENCE": json.dumps([AUDIENCE]),
    }
    with (
        (home / "stderr").open("wb") as stderr,
        subprocess.Popen(
            (*ASH, "up", "--port", "0"),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as hive,
    ):
        try:
            assert hive.stdout is not None
            assert select.select([hive.stdout], [], [], 60)[0], "the hive says nothing"
            line = hive.stdout.readline()
            assert line.startswith("Ash serves at "), line + (home / "stderr").read_text()
            yield line.rpartition(" ")[2].strip()
        finally:
            hive.terminate()
            hive.communicate(timeout=30)


def places_that_hold(needle: str, home: Path) -> list[str]:
    """Return every file of the hive and every command line on this machine with `needle` in it."""
    found = [str(file) for file in home.rglob("*") if file.is_file() and needle.encode() in file.read_bytes()]
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if needle.encode() in line.read_bytes():
                found.append(str(line))
        except OSError:
            continue  # it has ended meanwhile
    return found


@pytest.mark.heavy
async def test_no_secret_is_logged_stored_listed_or_shown(home: Path) -> None:
    value, spoilt = (f"s3cret{secrets.token_hex(8)}" for _ in range(2))
    with running_issuer() as issuer:
        _, key = key_file(home / "state").add(subject="ann")
        _, stranger = key_file(home / "elsewhere").add()
        token = issuer.token("bob")
        forged = issuer.token("bob", iss="https://other.test")
        said: list[str] = []
        with hive_of(home, issuer) as url:
            async with Hive(url, token=key) as hive, Hive(url, token=token) as other:
                box = await hive.spawn("echo", secrets={"TOKEN": value})
                assert (await box.exec("echo $TOKEN")).stdout.strip() == value
                said.append(repr(await hive.list(include_ended=True)) + repr(box.info) + repr(hive) + repr(box))
                with pytest.raises(AshError) as failed:
                    await other.spawn("echo", session="spawn", secrets={"TOKEN": spoilt})
                said.append(repr(failed.value) + str(failed.value.data))
                for bad in ({"TOKEN": 7}, {"TOKEN": ["not", "text"], "NOT A NAME": spoilt}):
                    with pytest.raises(AshError) as failed:
                        await other.spawn("echo", secrets=bad)  # type: ignore[arg-type]
                    said.append(str(failed.value))
                for wrong in (stranger, forged, key + "x", "nonsense" + spoilt):
                    with pytest.raises(Unauthenticated) as refused:
                        async with Hive(url, token=wrong) as nobody:
                            await nobody.list()
                    said.append(str(refused.value))
                await box.call("echo", text="x")
                said.append(await box.logs())
                for secret in (value, spoilt, key, key.split("_")[2], token, forged, stranger, token.split(".")[2]):
                    assert await anyio.to_thread.run_sync(places_that_hold, secret, home) == []
                await box.destroy()
        everything = "".join(said)
        for secret in (value, spoilt, key, token, forged, stranger):
            assert secret not in everything
            assert await anyio.to_thread.run_sync(places_that_hold, secret, home) == []
    audit = [json.loads(line) for line in (home / "state/log/audit.log").read_text().splitlines()]
    assert {line["event"] for line in audit} == {"spawn", "claim", "destroy", "admission"}
    assert {line["who"] for line in audit if line["event"] == "spawn"} == {"ann", f"{issuer.url}#bob"}
    assert all(line["from"].startswith("127.0.0.1:") for line in audit)
