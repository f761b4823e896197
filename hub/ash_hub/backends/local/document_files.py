"""The hive's documents as files of its state directory, which all replicas on a host share."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import anyio.to_thread

from ash_hub.backends.documents import DocumentKind, Tell, check_document, is_document_name
from ash_hub.backends.following import read_repeatedly
from ash_hub.system.files import replace_bytes
from ash_mcp.errors import Conflict, ConnectFailed

__all__ = ["FileDocuments"]

T = TypeVar("T")

_LOCK_SECONDS: Final = 2.0
_LOCK_PAUSE_SECONDS: Final = 0.005


class FileDocuments:
    """A file for each document: `toolsets/<name>.json`, `keys.json`, which `ash key` writes as well, and `hive.key`.

    The modification time of a file is when its document was last kept.

    Args:
        clock: The hive's time, in seconds since the epoch.
    """

    def __init__(self, state_dir: Path, clock: Callable[[], float]) -> None:
        self._state_dir = state_dir
        self._clock = clock

    async def read(self, kind: DocumentKind, name: str) -> bytes | None:
        check_document(kind, name)
        return await self._do(_read, self._file(kind, name))

    async def follow(self, kind: DocumentKind, name: str, tell: Tell) -> None:
        await read_repeatedly(self, kind, name, tell)

    async def keep(self, kind: DocumentKind, name: str, body: bytes) -> None:
        check_document(kind, name, body)

        def keep() -> None:
            file = self._file(kind, name)
            with self._alone(kind):
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    replace_bytes(file, body)
                self._note_use(file)

        await self._do(keep)

    async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
        check_document(kind, name, body)

        def replace() -> None:
            file = self._file(kind, name)
            with self._alone(kind):
                if _read(file) != instead_of:
                    raise Conflict(f"the document {name} was replaced meanwhile")
                replace_bytes(file, body, durable=True)

        await self._do(replace)

    async def used(self, kind: DocumentKind) -> Mapping[str, float]:
        def used() -> dict[str, float]:
            found: dict[str, float] = {}
            for file in self._folder(kind).iterdir() if self._folder(kind).is_dir() else ():
                is_named = is_document_name(kind, file.stem) and file == self._file(kind, file.stem)
                at = _modified_at(file) if is_named else None
                if at is not None:
                    found[file.stem] = at
            return found

        return await self._do(used)

    async def drop(self, kind: DocumentKind, name: str, *, used_at: float) -> None:
        check_document(kind, name)

        def drop() -> None:
            file = self._file(kind, name)
            with self._alone(kind):
                at = _modified_at(file)
                if at is not None and at <= used_at:
                    file.unlink()

        await self._do(drop)

    async def _do(self, work: Callable[..., T], *args: Path) -> T:
        try:
            return await anyio.to_thread.run_sync(work, *args)
        except OSError as error:
            raise ConnectFailed(
                f"the hive's documents in {self._state_dir} cannot be used: {error.strerror or error}"
            ) from error

    def _folder(self, kind: DocumentKind) -> Path:
        return self._state_dir if kind is DocumentKind.KEYS else self._state_dir / kind.value

    def _file(self, kind: DocumentKind, name: str) -> Path:
        return self._folder(kind) / ("hive.key" if (kind, name) == (DocumentKind.KEYS, "hive") else f"{name}.json")

    def _note_use(self, file: Path) -> None:
        at = round(self._clock() * 1e9)
        os.utime(file, ns=(at, at))

    @contextmanager
    def _alone(self, kind: DocumentKind) -> Generator[None]:
        """Keep other processes and threads from changing documents of this kind meanwhile, `ash key` too."""
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._state_dir / f"{kind.value}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_LOCK_PAUSE_SECONDS)
            yield
        finally:
            os.close(lock)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _modified_at(file: Path) -> float | None:
    try:
        return file.stat().st_mtime_ns / 1e9
    except FileNotFoundError:
        return None
