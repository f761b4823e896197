"""The log names clients when they connect, and no client can flood it or write lines of its own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from mcp_types import Implementation

from ash_hub.serving.client_log import AGAIN_SECONDS, LINES_A_MINUTE, MAX_KNOWN, MAX_TEXT_CHARS, ClientLog

CODEX = Implementation(name="codex-mcp-client", version="0.171.0")


class Scene:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "ash.hub")
        self.caplog = caplog
        self.now = 0.0
        self.log = ClientLog(lambda: self.now)

    def note(self, connection: str, client: Implementation | None = CODEX) -> None:
        self.log.note(connection, client, "2025-06-18", "ann")

    @property
    def lines(self) -> list[Any]:
        return [record for record in self.caplog.records if record.message == "client connected"]


@pytest.fixture
def scene(caplog: pytest.LogCaptureFixture) -> Scene:
    return Scene(caplog)


def test_a_connection_is_named_once_an_hour(scene: Scene) -> None:
    for _ in range(3):
        scene.note("a")
    scene.note("b", None)
    (named, unknown) = scene.lines
    assert (named.client, named.version, named.protocol, named.owner) == (
        CODEX.name,
        CODEX.version,
        "2025-06-18",
        "ann",
    )
    assert unknown.client == "unknown"
    scene.now = AGAIN_SECONDS
    scene.note("a")
    assert len(scene.lines) == 3


def test_lines_are_bounded_and_what_was_left_out_is_counted(scene: Scene) -> None:
    for number in range(LINES_A_MINUTE + 5):
        scene.note(f"{number}")
    assert len(scene.lines) == LINES_A_MINUTE
    scene.now = 60.0
    scene.note("later")
    assert scene.lines[-1].left_out == 5


def test_what_is_remembered_is_bounded(scene: Scene) -> None:
    for number in range(MAX_KNOWN + 10):
        scene.note(f"{number}")
    assert len(scene.log._known) == MAX_KNOWN  # pyright: ignore[reportPrivateUsage]


def test_a_name_cannot_write_lines_of_its_own(scene: Scene) -> None:
    scene.note("a", Implementation(name="evil\nclient connected\x1b[2J\u202e", version="9" * 5000))
    (line,) = scene.lines
    assert line.client.isprintable() and line.client.startswith("evil?client")
    assert len(line.version) == MAX_TEXT_CHARS
