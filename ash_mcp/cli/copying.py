"""`ash cp`: files and directories into a sandbox and out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import clean
from ash_mcp.cli.values import Place, read_place
from ash_mcp.cli.waiting import Meter, waiting
from ash_mcp.errors import FileNotFound, IsADirectory, NotADirectory, SandboxRefused

if TYPE_CHECKING:
    from ash_mcp.files import Files
    from ash_mcp.results import FileEntry

__all__ = ["copy"]

_MOST_DEPTH = 100
"""A sandbox can claim to hold directories without end."""


async def copy(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path here, or sb1:/path in a sandbox.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The same; one of the two is in a sandbox.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy a directory with all in it.")] = False,
) -> None:
    """Copy files into a sandbox or out of it.

    Permission bits are kept. Relative paths in a sandbox start at its workspace. Symbolic links inside a directory are left out, and named.
    """
    src, dst = read_place(source), read_place(destination)
    if (src.session is None) == (dst.session is None):
        raise typer.BadParameter(
            "one side is in a sandbox and one is here: ash cp FILE sb1:/path, or ash cp sb1:/path FILE; "
            "write ./a:b for a file here with a colon in its name"
        )
    session = src.session or dst.session or ""
    if src.session is None and Path(src.path).is_dir() and not recursive:
        raise typer.BadParameter(f"{src} is a directory; say -r to copy it with all in it")
    if dst.session is None and not Path(dst.path).parent.is_dir():
        raise typer.BadParameter(f"there is no directory {Path(dst.path).parent} to copy into; make it first")
    async with (
        cli.sandbox(session) as box,
        waiting(f"copying {src}", show=not cli.as_json, in_bytes=True) as meter,
    ):
        if src.session is None:
            upload = _Upload(box.files, meter)
            await upload.run(Path(src.path), dst)
            tally = upload.tally
        else:
            download = _Download(box.files, meter, recursive)
            await download.run(src, Path(dst.path), into=dst.wants_directory)
            tally = download.tally
    for path in tally.skipped:
        cli.note(f"ash: left out {clean(path)}: a symbolic link or a special file")
    cli.tell({"files": tally.files, "bytes": tally.bytes, "skipped": tally.skipped})


@dataclass(slots=True)
class _Tally:
    """What has been copied."""

    files: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list[str])


class _Upload:
    """Copies from here into a sandbox."""

    def __init__(self, files: Files, meter: Meter) -> None:
        self._files = files
        self._meter = meter
        self.tally = _Tally()

    async def run(self, source: Path, target: Place) -> None:
        info = source.stat()  # of what a link points to: the source itself was named
        into = target.wants_directory or await self._is_directory(target.path)
        path = f"{target.path.rstrip('/')}/{source.resolve().name}" if into else target.path
        if source.is_dir():
            self._meter.update(total=float(_size_of(source)))
            await self._directory(source, path)
        elif source.is_file():
            self._meter.update(total=float(info.st_size))
            await self._file(source, path)
        else:
            raise typer.BadParameter(f"{source} is neither a file nor a directory")

    async def _is_directory(self, path: str) -> bool:
        try:
            return (await self._files.stat(path)).type == "directory"
        except (FileNotFound, NotADirectory):
            return False

    async def _directory(self, source: Path, path: str) -> None:
        await self._files.mkdir(path)
        for child in sorted(source.iterdir()):
            there = f"{path}/{child.name}"
            if child.is_symlink() or not (child.is_dir() or child.is_file()):
                self.tally.skipped.append(str(child))
            elif child.is_dir():
                await self._directory(child, there)
            else:
                await self._file(child, there)

    async def _file(self, source: Path, path: str) -> None:
        before = self.tally.bytes
        self._meter.update(label=f"copying {source.name}")
        done = await self._files.upload(
            source, path, on_bytes=lambda count, _: self._meter.update(done=float(before + count))
        )
        self.tally.files += 1
        self.tally.bytes += done


class _Download:
    """Copies from a sandbox to here. What the sandbox says of itself never leads out of the destination."""

    def __init__(self, files: Files, meter: Meter, recursive: bool) -> None:
        self._files = files
        self._meter = meter
        self._recursive = recursive
        self.tally = _Tally()

    async def run(self, source: Place, target: Path, *, into: bool) -> None:
        entry = await self._files.stat(source.path)
        if entry.type == "directory" and not self._recursive:
            raise IsADirectory(f"{source} is a directory; say -r to copy it with all in it")
        name = source.path.rstrip("/").rpartition("/")[2]
        if target.is_dir() or into:
            if name in ("", ".", ".."):
                name = source.session or "files"
            target = target / name
        if entry.type == "directory":
            await self._directory(source.path, target, entry.mode, 0)
        else:
            await self._file(source.path, target, entry)

    async def _directory(self, path: str, target: Path, mode: int, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise SandboxRefused(f"the sandbox's directories are deeper than {_MOST_DEPTH}: {path[:200]}")
        if target.is_symlink():
            raise FileExistsError(None, "a symbolic link stands where a directory would be written", str(target))
        target.mkdir(parents=depth == 0, exist_ok=True)
        for entry in await self._files.list(path):
            _require_plain_name(entry.name)
            there, here = f"{path.rstrip('/')}/{entry.name}", target / entry.name
            if entry.type == "directory":
                await self._directory(there, here, entry.mode, depth + 1)
            elif entry.type == "file":
                await self._file(there, here, entry)
            else:
                self.tally.skipped.append(there)
        target.chmod(mode & 0o777 | 0o700)

    async def _file(self, path: str, target: Path, entry: FileEntry) -> None:
        before = self.tally.bytes
        self._meter.update(label=f"copying {entry.name}", total=float(before + entry.size))
        done = await self._files.download(
            path, target, on_bytes=lambda count, _: self._meter.update(done=float(before + count))
        )
        if entry.type == "file":
            target.chmod(entry.mode & 0o777)
        self.tally.files += 1
        self.tally.bytes += done


def _require_plain_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise SandboxRefused(f"the sandbox named a file {name[:80]!r}, which is no name of a file")


def _size_of(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
