"""Files that others may read at any moment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_text"]


def replace_text(file: Path, text: str) -> None:
    """Write a file so that whoever reads it finds what was there before, or all of `text`.

    Raises:
        OSError: It could not be written, and is as it was.
    """
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise
