"""Files that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = ("README.md", "SECURITY.md", "hub/README.md", "router/README.md", "recipes/README.md", "docs")


def documents() -> list[Path]:
    named = [ROOT / name for name in DOCUMENTS]
    return [file for place in named for file in ([place] if place.is_file() else sorted(place.glob("*.md")))]


@pytest.mark.parametrize("document", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_module_that_a_document_names_exists(document: Path) -> None:
    code = [f"/{file.relative_to(ROOT)}" for place in ("ash_mcp", "hub", "router", "recipes", "examples", "tests")
            for file in (ROOT / place).rglob("*.py")]  # fmt: skip
    named = set(re.findall(r"`([\w./]+\.py)`", document.read_text()))
    assert not [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in code)]
