"""The file door of the SDK's twin hive: bytes in and out of a sandbox's workspace, as the real one answers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import httpx

from ash_mcp.wire import HEADER_ORIGIN, ORIGIN_SANDBOX

__all__ = ["answer_at_door"]

_PROBLEMS = {FileNotFoundError: (404, "file_not_found"), IsADirectoryError: (409, "is_a_directory")}


def answer_at_door(workspace: Path, target: str, method: str, body: bytes) -> httpx.Response:
    """Answer a request for what is below `/s/<sandbox>/files`."""
    below, _, query = target.partition("?")
    asked = parse_qs(query)
    name = asked.get("path", [unquote(below).removeprefix("/")])[0]
    path = workspace / name
    try:
        if method == "PUT":
            return _said(201, _put(path, body, asked, is_folder=name.endswith("/")))
        return httpx.Response(200, content=_get(path, is_folder=name.endswith("/")), headers=_ORIGIN)
    except (FileNotFoundError, IsADirectoryError) as exc:
        status, kind = _PROBLEMS[type(exc)]
        return _said(status, {"error": {"kind": kind, "message": f"{name}: {exc.strerror}"}})


_ORIGIN = {HEADER_ORIGIN: ORIGIN_SANDBOX}


def _said(status: int, shape: dict[str, Any]) -> httpx.Response:
    return httpx.Response(status, json=shape, headers=_ORIGIN)


def _put(path: Path, body: bytes, asked: dict[str, list[str]], *, is_folder: bool) -> dict[str, Any]:
    if is_folder:
        path.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(path, filter="data")
            else:  # Python 3.11.3 and earlier
                archive.extractall(path)
            files = [member for member in archive.getmembers() if not member.isdir()]
            return {"files": len(files), "bytes": sum(member.size for member in files)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    if "mode" in asked:
        path.chmod(int(asked["mode"][0], 8))
    return {"bytes": len(body)}


def _get(path: Path, *, is_folder: bool) -> bytes:
    if not is_folder:
        return path.read_bytes()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for inner in sorted(path.iterdir()):
            archive.add(inner, inner.name)
    return out.getvalue()
