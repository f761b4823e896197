"""Files that others may read at any moment."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_bytes", "replace_text"]


def replace_text(file: Path, text: str) -> None:
    """Write a file so that whoever reads it finds what was there before, or all of `text`.

    Raises:
        OSError: It could not be written, and is as it was.
    """
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, body: bytes, *, durable: bool = False) -> None:
    """Write a file, its user's alone, so that whoever reads it finds what was there before, or all of `body`.

    Args:
        durable: Return only when it is on the disk.

    Raises:
        OSError: It could not be written, and is as it was.
    """
    fresh = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(body)
            if durable:
                opened.flush()
                os.fsync(descriptor)
        fresh.replace(file)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise
