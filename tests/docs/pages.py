"""The pages about clusters, as their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = ROOT / "docs/kubernetes.md"
GUIDES: Final = sorted((ROOT / "docs/deploy").glob("*.md"))
RUN: Final = "# run by CI"
NOT_RUN: Final = "# not run by CI"


class Block(NamedTuple):
    language: str
    title: str
    """Its first line."""
    text: str
    """The others."""


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?\n)(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, title.strip(), text) for language, title, text in found]


def commands(page: Path, title: str) -> list[str]:
    """Return the blocks of commands that are marked so, in their order."""
    return [block.text for block in blocks(page) if block.language == "bash" and block.title == title]


def files(page: Path) -> dict[str, Any]:
    """Return what the page shows as files of YAML, by their names."""
    named = [block for block in blocks(page) if block.language == "yaml" and block.title.endswith(".yaml")]
    return {block.title.removeprefix("# "): yaml.safe_load(block.text) for block in named}
