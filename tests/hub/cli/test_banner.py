"""What a hive prints when it has started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ash_hub.app import Hive
from ash_hub.cli.banner import banner
from ash_hub.settings import HubSettings

CLUSTER = {"namespace": "boxes", "cluster": "https://cluster.test:6443"}


def hive(folder: Path, backend: dict[str, Any], described: dict[str, Any], *, lacks_keys: bool = False) -> Hive:
    settings = HubSettings(backend=backend, state_dir=folder)
    found = SimpleNamespace(
        url="http://h/mcp",
        settings=settings,
        backend=SimpleNamespace(describe=lambda: described),
        lacks_keys=lacks_keys,
    )
    return cast("Hive", found)


@pytest.mark.parametrize(
    ("backend", "described", "line"),
    [
        ({"kind": "local"}, {}, "  sandboxes: local"),
        ({"kind": "local", "unsafe": True}, {}, "  sandboxes: local, WITHOUT ISOLATION (--unsafe)"),
        (
            {"kind": "kubernetes"},
            CLUSTER,
            "  sandboxes: kubernetes, in the namespace boxes of https://cluster.test:6443",
        ),
    ],
    ids=["local", "unsafe", "kubernetes"],
)
def test_the_banner_says_where_sandboxes_are_made(
    backend: dict[str, Any], described: dict[str, Any], line: str, tmp_path: Path
) -> None:
    assert line in banner(hive(tmp_path, backend, described))


def test_the_banner_says_that_nobody_is_let_in_yet(tmp_path: Path) -> None:
    said = "  no API keys yet: ash key new"
    assert said in banner(hive(tmp_path, {"kind": "kubernetes"}, CLUSTER, lacks_keys=True))
    assert said not in banner(hive(tmp_path, {"kind": "kubernetes"}, CLUSTER))
