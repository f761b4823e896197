"""The two doors by which a client that is not ours reaches one sandbox: a share's, and `X-Session-ID`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ash_mcp.sync import Hive

__all__ = ["OneDoor", "doors_to_one_sandbox"]


@dataclass(frozen=True, slots=True)
class OneDoor:
    url: str
    headers: Mapping[str, str]
    tools: Sequence[str]
    """The names of all that a client is to find there."""


@contextmanager
def doors_to_one_sandbox(hive_url: str) -> Generator[Sequence[OneDoor]]:
    """Give both doors to a sandbox of the recipe `echo`; the share opens one of its tools."""
    with Hive(hive_url) as hive, hive.spawn("echo", share={"tools": ["echo"]}) as box:
        share = box.spawn_share
        assert share is not None
        named = {"X-Session-ID": box.id}
        yield [
            OneDoor(share.url, share.headers, ["echo"]),
            OneDoor(hive_url, named, sorted(tool.name for tool in box.tools())),
        ]
