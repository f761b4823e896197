"""`ash cp`: files and directories into a sandbox and out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import clean
from ash_mcp.cli.trees import Tree, tree_of
from ash_mcp.cli.values import Place, read_place
from ash_mcp.cli.waiting import Meter, waiting
from ash_mcp.errors import FileNotFound, IsADirectory, NotADirectory, SandboxRefused

if TYPE_CHECKING:
    from ash_mcp.files import Files
    from ash_mcp.results import FileEntry
    from ash_mcp.sandbox import Sandbox

__all__ = ["copy"]

_MOST_DEPTH = 100
"""A sandbox can claim to hold directories without end."""


@dataclass(slots=True)
class Tally:
    """What has been copied."""

    files: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list[str])


async def copy(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path here, or sb1:/path in a sandbox.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The same; one of the two is in a sandbox.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy a directory with all in it.")] = False,
) -> None:
    """Copy files into a sandbox or out of it.

    Permission bits of files are kept. Relative paths in a sandbox start at its workspace. Symbolic links inside a
    directory are left out, and named.
    """
    src, dst = read_place(source), read_place(destination)
    if (src.session is None) == (dst.session is None):
        raise typer.BadParameter(
            "one side is in a sandbox and one is here: ash cp FILE sb1:/path, or ash cp sb1:/path FILE; "
            "write ./a:b for a file here with a colon in its name"
        )
    tree = tree_of(Path(src.path), recursive=recursive) if src.session is None else None
    if tree is None and not await anyio.Path(dst.path).parent.is_dir():
        raise typer.BadParameter(f"there is no directory {Path(dst.path).parent} to copy into; make it first")
    async with (
        cli.sandbox(src.session or dst.session or "") as box,
        waiting(f"copying {src}", show=not cli.as_json, in_bytes=True) as meter,
    ):
        tally = await (upload(box, tree, dst, meter) if tree else download(box, src, dst, meter, recursive=recursive))
    for path in tally.skipped:
        cli.note(f"ash: left out {clean(path)}: a symbolic link or a special file")
    cli.tell({"files": tally.files, "bytes": tally.bytes, "skipped": tally.skipped})


async def upload(box: Sandbox, tree: Tree, target: Place, meter: Meter) -> Tally:
    """Copy what is here into a sandbox: at the target, or in it where that is a directory."""
    tally = Tally(skipped=[str(path) for path in tree.skipped])
    root = target.path
    if target.wants_directory or await _is_directory(box.files, root):
        root = f"{root.rstrip('/')}/{tree.name}"
    meter.update(total=float(tree.bytes))
    for directory in tree.directories:
        await box.files.mkdir(_joined(root, directory))
    for source, path in tree.files:
        before = tally.bytes
        meter.update(label=f"copying {source.name}")
        tally.bytes += await box.files.upload(
            source,
            _joined(root, path),
            on_bytes=lambda count, _, before=before: meter.update(done=float(before + count)),
        )
        tally.files += 1
    return tally


async def _is_directory(files: Files, path: str) -> bool:
    try:
        return (await files.stat(path)).type == "directory"
    except (FileNotFound, NotADirectory):
        return False


def _joined(root: str, path: Path) -> str:
    return root if path == Path() else f"{root.rstrip('/')}/{path.as_posix()}"


async def download(box: Sandbox, source: Place, target: Place, meter: Meter, *, recursive: bool) -> Tally:
    """Copy what is in a sandbox to here: at the target, or in it where that is a directory."""
    entry = await box.files.stat(source.path)
    if entry.type == "directory" and not recursive:
        raise IsADirectory(f"{source} is a directory; say -r to copy it with all in it")
    here = anyio.Path(target.path)
    if target.wants_directory or await here.is_dir():
        name = source.path.rstrip("/").rpartition("/")[2]
        here /= name if name not in ("", ".", "..") else str(source.session)
    copying = _Download(box.files, meter)
    if entry.type == "directory":
        await copying.directory(source.path, here, entry.mode, 0)
    else:
        await copying.file(source.path, here, entry)
    return copying.tally


class _Download:
    """Copies from a sandbox to here. What the sandbox says of itself never leads out of the destination."""

    def __init__(self, files: Files, meter: Meter) -> None:
        self._files = files
        self._meter = meter
        self.tally = Tally()

    async def directory(self, path: str, target: anyio.Path, mode: int, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise SandboxRefused(f"the sandbox's directories are deeper than {_MOST_DEPTH}: {path[:200]}")
        if depth and await target.is_symlink():
            raise FileExistsError(None, "a symbolic link stands where a directory would be written", str(target))
        await target.mkdir(exist_ok=True)
        for entry in await self._files.list(path):
            _require_plain_name(entry.name)
            there, here = f"{path.rstrip('/')}/{entry.name}", target / entry.name
            if entry.type == "directory":
                await self.directory(there, here, entry.mode, depth + 1)
            elif entry.type == "file":
                await self.file(there, here, entry)
            else:
                self.tally.skipped.append(there)
        await target.chmod(mode & 0o777 | 0o700)

    async def file(self, path: str, target: anyio.Path, entry: FileEntry) -> None:
        before = self.tally.bytes
        self._meter.update(label=f"copying {entry.name}", total=float(before + entry.size))
        self.tally.bytes += await self._files.download(
            path, target, on_bytes=lambda count, _: self._meter.update(done=float(before + count))
        )
        self.tally.files += 1
        if entry.type == "file":
            await target.chmod(entry.mode & 0o777)


def _require_plain_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise SandboxRefused(f"the sandbox named a file {name[:80]!r}, which is no name of a file")
