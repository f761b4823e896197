"""The runner's bundle for tests: built once for this checkout, below `.cache`."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

__all__ = ["TEST_IMAGES", "built_bundle"]

TEST_IMAGES = Path(__file__).parents[2] / ".cache/test-images"
"""A directory of images with the bundle, for hives of tests."""


@cache
def built_bundle() -> Path:
    words = [sys.executable, "-m", "ash_recipes.bundle", "--into", str(TEST_IMAGES / "bundles")]
    return Path(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
