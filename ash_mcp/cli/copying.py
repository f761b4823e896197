"""`ash cp`: copy files and directories into a sandbox or out of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import anyio
import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import clean
from ash_mcp.cli.trees import Tree, tree_of
from ash_mcp.cli.values import Place, read_place
from ash_mcp.cli.waiting import Meter, waiting
from ash_mcp.errors import FileNotFound, IsADirectory, NotADirectory, SandboxRefused

if TYPE_CHECKING:
    from ash_mcp.files import Files, OnBytes
    from ash_mcp.results import FileEntry
    from ash_mcp.sandbox import Sandbox

__all__ = ["copy"]

_MOST_DEPTH: Final = 100
_MOST_ENTRIES: Final = 1_000_000
"""A sandbox can claim to hold directories without end."""
_AT_ONCE: Final = 8
"""How many files are on their way at once; more of them take no less time."""

T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """The count of what has been copied."""

    files: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list[str])

    def counter(self, meter: Meter) -> OnBytes:
        """Return a callback that counts the bytes of one more file."""
        before = 0

        def count(done: int, total: int | None) -> None:
            nonlocal before
            self.bytes, before = self.bytes + done - before, done
            meter.update(done=float(self.bytes))

        return count


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

    async def make(directory: Path) -> None:
        await box.files.mkdir(_joined(root, directory))

    async def send(file: tuple[Path, Path]) -> None:
        source, path = file
        meter.update(label=f"copying {source.name}")
        await box.files.upload(source, _joined(root, path), on_bytes=tally.counter(meter))
        tally.files += 1

    await _each(tree.directories, make)
    await _each(tree.files, send)
    return tally


async def _each(items: Iterable[T], do: Callable[[T], Awaitable[None]]) -> None:
    """Call `do` for all items, some at once; the first failure ends all."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await do(item)

    async with anyio.create_task_group() as group:
        for _ in range(_AT_ONCE):
            group.start_soon(work)


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
        await copying.directory(_Found(source.path, here, entry))
    else:
        meter.update(total=float(entry.size))
        await copying.file(_Found(source.path, here, entry))
    return copying.tally


@dataclass(frozen=True, slots=True)
class _Found:
    """A file or a directory of the sandbox, and where it goes here."""

    path: str
    target: anyio.Path
    entry: FileEntry


class _Download:
    """Copies from a sandbox to here. What the sandbox says of itself never leads out of the destination."""

    def __init__(self, files: Files, meter: Meter) -> None:
        self._files = files
        self._meter = meter
        self._entries = 0
        self.tally = Tally()

    async def directory(self, root: _Found) -> None:
        """Copy a directory with all in it: first the directories, level by level, then the files."""
        files: list[_Found] = []
        level, depth = [root], 0
        while level:
            if depth > _MOST_DEPTH:
                raise SandboxRefused(f"the sandbox's directories are deeper than {_MOST_DEPTH}: {level[0].path[:200]}")
            below: list[_Found] = []
            await _each(level, lambda one, below=below: self._enter(one, files, below, known=one is not root))
            level, depth = below, depth + 1
        self._meter.update(total=float(sum(file.entry.size for file in files)))
        await _each(files, self.file)

    async def _enter(self, found: _Found, files: list[_Found], below: list[_Found], *, known: bool) -> None:
        """Make a directory here and add what is in it."""
        if known and await found.target.is_symlink():
            raise FileExistsError(None, "a symbolic link stands where a directory would be written", str(found.target))
        await found.target.mkdir(exist_ok=True)
        await found.target.chmod(found.entry.mode & 0o777 | 0o700)
        entries = await self._files.list(found.path)
        self._entries += len(entries)
        if self._entries > _MOST_ENTRIES:
            raise SandboxRefused(f"the sandbox's directories hold more than {_MOST_ENTRIES} entries")
        for entry in entries:
            _require_plain_name(entry.name)
            inner = _Found(f"{found.path.rstrip('/')}/{entry.name}", found.target / entry.name, entry)
            if entry.type == "directory":
                below.append(inner)
            elif entry.type == "file":
                files.append(inner)
            else:
                self.tally.skipped.append(inner.path)

    async def file(self, found: _Found) -> None:
        self._meter.update(label=f"copying {found.entry.name}")
        counter = self.tally.counter(self._meter)
        await self._files.download(found.path, found.target, on_bytes=counter)
        self.tally.files += 1
        if found.entry.type == "file":
            await found.target.chmod(found.entry.mode & 0o777)


def _require_plain_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise SandboxRefused(f"the sandbox named a file {name[:80]!r}, which is no name of a file")
