"""Files that come in pieces, by key: each takes its place when all of it has come. Its calls block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.regular_files import Upload

__all__ = ["Drafts", "End"]

End = Literal["commit", "abandon"]

IDLE_SECONDS = 600.0
"""How long a file waits for its next piece before what has come of it is removed."""
MAX_OPEN = 128
MAX_ENDED = 10_000
"""Keys of files that have ended are known for as long, so that a repeated piece does no harm; the oldest go first."""


@dataclass(slots=True, eq=False)
class _Draft:
    path: str
    upload: Upload | None
    """None once it has ended."""
    touched_at: float
    size: int = 0


class Drafts:
    """What is on its way into the files of one sandbox.

    A piece may come twice, also after the file has ended: it is the same bytes at the same place.
    """

    def __init__(self, files: Files, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, _Draft] = {}
        """That which waits longest first; so in the next."""
        self._ended: dict[str, _Draft] = {}

    @property
    def empty(self) -> bool:
        """Whether no file is on its way."""
        return not self._open

    def write(self, key: str, path: str, data: bytes, offset: int, mode: int | None, end: End | None) -> int:
        """Add a piece and return how many bytes of the file there are.

        Raises:
            Problem: It cannot be written, and what had come is removed; it would leave a gap; or the key is another
                file's.
        """
        self.sweep()
        with self._lock:
            draft = self._ended.get(key) or self._open.get(key) or self._begin(path, offset, mode, end)
            if draft.path != path:
                raise Problem("bad_request", f"the key {key!r} was used for another file; take a new one")
            if draft.upload is None:
                return self._end(key, draft)
            if offset > draft.size:
                raise Problem("bad_request", f"{path} has {draft.size} bytes; a piece at {offset} would leave a gap")
            self._open.pop(key, None)
            try:
                if end != "abandon":
                    draft.upload.write(data, offset)
                    draft.size = max(draft.size, offset + len(data))
                if end == "commit":
                    draft.upload.finish()
            except Problem:
                self._end(key, draft)
                raise
            if end is not None:
                return self._end(key, draft)
            draft.touched_at = self._clock()
            self._open[key] = draft
            return draft.size

    def sweep(self) -> float | None:
        """Remove what nobody goes on with and return the seconds until there may be more; None if nothing is open."""
        with self._lock:
            now = self._clock()
            for drafts in (self._open, self._ended):
                while drafts and now - next(iter(drafts.values())).touched_at >= IDLE_SECONDS:
                    self._abandon(drafts.pop(next(iter(drafts))))
            oldest = next(iter(self._open.values()), None)
            return None if oldest is None else oldest.touched_at + IDLE_SECONDS - now

    def abandon_all(self) -> None:
        """Remove all that is on its way."""
        with self._lock:
            while self._open:
                self._abandon(self._open.popitem()[1])

    def _begin(self, path: str, offset: int, mode: int | None, end: End | None) -> _Draft:
        if end == "abandon":
            return _Draft(path, None, 0.0)
        if offset:
            raise Problem("bad_request", f"{path}: its first piece is at 0, and nothing of it is here; write it anew")
        if len(self._open) >= MAX_OPEN:
            raise Problem("file_error", f"{path}: {MAX_OPEN} files are on their way already; finish one of them first")
        return _Draft(path, self._files.upload(path, mode), 0.0)

    def _end(self, key: str, draft: _Draft) -> int:
        self._abandon(draft)
        draft.touched_at = self._clock()
        self._ended.pop(key, None)
        self._ended[key] = draft
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        return draft.size

    def _abandon(self, draft: _Draft) -> None:
        if draft.upload is not None:
            draft.upload.abandon()
            draft.upload = None
