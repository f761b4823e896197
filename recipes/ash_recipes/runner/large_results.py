"""Tool results that are too long for an answer: kept as files of the sandbox, and answered with their head and a link.

The longest parts go first, until the rest fits. Texts keep their beginning. Structured content keeps its shape, so
that it still fits the tool's output schema: long strings and arrays in it are shortened. Bytes are linked to alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import mimetypes
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

import anyio.to_thread
from pydantic import BaseModel

from ash_recipes.runner.output import json_size

__all__ = ["LargeResults"]

HEAD_BYTES: Final = 8192
"""How much of a text stays in an answer, at most a quarter of what a result may have."""
KEPT_FILES: Final = 64
"""Of the results of one sandbox; the oldest goes first."""
_ESCAPED: Final = 6
"""How many bytes a character takes on the wire at most."""

log = logging.getLogger("ash_recipes.runner")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a result a file can hold: a block of its content, or its structured content (None)."""

    size: int
    """In bytes on the wire."""
    block: Json | None


class LargeResults:
    """Shortens the results of one sandbox's tools.

    Args:
        most: Bytes of a result on the wire; 0: any number.
        folder: Where files of results are kept.
    """

    def __init__(self, most: int, folder: Path, sandbox_id: str) -> None:
        self._most = most
        self._folder = folder
        self._sandbox_id = sandbox_id
        self._head = max(1, min(HEAD_BYTES, most // 4))

    async def fitting(self, result: Any) -> Any:
        """Return a result of `tools/call` that is short enough, or as near to it as its shape lets it be.

        Where the disk does not take what is too long, the result stays as it is.
        """
        if not self._most or _characters(result) * _ESCAPED <= self._most:
            return result
        model = type(result) if isinstance(result, BaseModel) else None
        shape = cast("Json", result.model_dump(mode="json", by_alias=True, exclude_none=True) if model else result)
        if not isinstance(shape.get("content"), list):
            return result  # a question of the server's, or nothing of MCP's
        try:
            shortened = await anyio.to_thread.run_sync(self._shortened, shape)
            return model.model_validate(shortened) if model is not None else shortened
        except (OSError, ValueError) as exc:  # a full disk, or bytes that are no base64
            log.warning("a long result could not be kept as a file, so it is passed as it is: %s", exc)
            return result

    def _shortened(self, shape: Json) -> Json:
        total = len(json.dumps(shape))
        content: list[Json] = list(shape["content"])
        structured: Any = shape.get("structuredContent")
        parts = [_Part(_block_size(block), block) for block in content]
        if structured is not None:
            parts.append(_Part(len(json.dumps(structured)), None))
        more: list[Json] = []
        for part in sorted(parts, key=lambda part: part.size, reverse=True):
            if total <= self._most or part.size <= 2 * self._head:
                break
            if part.block is None:
                short = _shortened_value(structured, self._head)
                if short is None:
                    continue
                said = self._kept(
                    json.dumps(structured, ensure_ascii=False).encode(errors="surrogatepass"),
                    "json",
                    "application/json",
                )
                more += said("the structured content above is shortened; all of it")
                structured, left = short, len(json.dumps(short))
            else:
                blocks = self._instead_of(part.block)
                at = next(index for index, block in enumerate(content) if block is part.block)
                content[at : at + 1] = blocks
                left = len(json.dumps(blocks))
            total += left - part.size
        if structured is not None:
            shape = {**shape, "structuredContent": structured}
        return {**shape, "content": [*content, *more]}

    def _instead_of(self, block: Json) -> list[Json]:
        """Keep a block as a file, and return what stands in its place."""
        inner: Json = block.get("resource") or block
        text: Any = inner.get("text")
        if isinstance(text, str):
            head = _head_of(text, self._head)
            said = self._kept(text.encode(errors="surrogatepass"), "txt", "text/plain")
            about = f"… these were the first {len(head)} of {len(text)} characters; all of it"
            return [{"type": "text", "text": head}, *said(about)]
        data = str(inner.get("data") or inner.get("blob") or "")
        mime = str(inner.get("mimeType") or "application/octet-stream")
        ending = (mimetypes.guess_extension(mime) or ".bin").removeprefix(".")
        said = self._kept(base64.b64decode(data), ending, mime)
        return said(f"{block.get('type')} of type {mime}, left out here; it")

    def _kept(self, data: bytes, ending: str, mime: str) -> _Kept:
        """Write a file.

        Raises:
            OSError: The disk does not take it; nothing of it is left.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(self._folder)
        descriptor, name = tempfile.mkstemp(prefix="result-", suffix=f".{ending}", dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        except OSError:
            os.unlink(name)
            raise
        return _Kept(name, len(data), mime, self._sandbox_id)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file with what was left out."""

    path: str
    size: int
    mime: str
    sandbox_id: str

    def __call__(self, about: str) -> list[Json]:
        """Return the blocks that lead to it."""
        return [
            {"type": "text", "text": f"[{about} is the file {self.path} of this sandbox, {self.size} bytes]"},
            {
                "type": "resource_link",
                "uri": f"sandbox://{self.sandbox_id}/{quote(self.path)}",
                "name": os.path.basename(self.path),
                "mimeType": self.mime,
                "size": self.size,
            },
        ]


def _make_room(folder: Path) -> None:
    ages: dict[Path, float] = {}
    for path in folder.glob("result-*"):
        with contextlib.suppress(OSError):  # a command removed it meanwhile
            ages[path] = path.lstat().st_mtime
    for old in sorted(ages, key=lambda path: ages[path])[: max(0, len(ages) - KEPT_FILES + 1)]:
        with contextlib.suppress(OSError):
            old.unlink()


def _characters(value: Any) -> int:
    """Return about how many characters a result has."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, BaseModel):
        return _characters(value.__dict__)
    if isinstance(value, Mapping):
        return sum(16 + _characters(each) for each in cast("Mapping[str, Any]", value).values())
    if isinstance(value, list | tuple):
        return sum(map(_characters, cast("list[Any]", value)))
    return 8


def _block_size(block: Json) -> int:
    """Return the bytes on the wire of what a file could hold of a block."""
    inner: Json = block.get("resource") or block
    said = (inner.get(name) for name in ("text", "data", "blob"))
    return sum(json_size(text) for text in said if isinstance(text, str))


def _head_of(text: str, most: int) -> str:
    """Return the beginning of a text, of `most` bytes on the wire."""
    head = text[:most]
    while json_size(head) > most + 2:
        head = head[: len(head) * 3 // 4]
    return head


def _shortened_value(value: Any, most: int) -> Any | None:
    """Return a value of the same shape of at most `most` bytes; None where that would need other keys."""
    characters, items = most, 256
    while characters >= 32:
        short = _cut(value, characters, items)
        if len(json.dumps(short)) <= most:
            return short
        characters, items = characters // 4, max(1, items // 4)
    return None


def _cut(value: Any, characters: int, items: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= characters else f"{value[:characters]}…"
    if isinstance(value, list):
        return [_cut(each, characters, items) for each in cast("list[Any]", value)[:items]]
    if isinstance(value, dict):
        return {key: _cut(each, characters, items) for key, each in cast("Json", value).items()}
    return value
