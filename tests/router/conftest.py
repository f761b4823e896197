"""Fixtures of the relay's tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from ash_router.caller.intake import Intake
from tests.router.relay_parts import Clock, Rig, open_rig
from tests.router.sandbox_parts import Box, open_box


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both loops: their transports differ in what they allow and when they call back."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which connections of callers know how old a verdict is and how long nothing was asked."""
    clock = Clock()
    monkeypatch.setattr(Intake, "clock", clock)
    return clock


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
async def box(rig: Rig, tmp_path: Path) -> AsyncGenerator[Box]:
    """A real sandbox, bound as `sb1`, in which `plus` stands for the tool `add`."""
    async with open_box(tmp_path) as box:
        await rig.bind("sb1", box.socket, plus="add")
        yield box
