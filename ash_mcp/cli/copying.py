"""`ash cp`: copy files and directories into a sandbox or out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import anyio.to_thread
import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import clean
from ash_mcp.cli.values import Place, read_place
from ash_mcp.cli.waiting import Meter, waiting
from ash_mcp.errors import FileNotFound, IsADirectory, NotADirectory

if TYPE_CHECKING:
    from ash_mcp.files import Files, OnBytes
    from ash_mcp.sandbox import Sandbox

__all__ = ["copy"]


@dataclass(frozen=True, slots=True)
class Local:
    """A file or directory here; a link counts as what it leads to."""

    path: Path
    name: str
    is_file: bool


@dataclass(slots=True)
class Tally:
    """The count of what has been copied."""

    files: int
    bytes: int
    skipped: list[str] = field(default_factory=list[str])


async def copy(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path here, or sb1:/path in a sandbox.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The same; one of the two is in a sandbox.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy a directory with all in it.")] = False,
) -> None:
    """Copy files into a sandbox or out of it.

    Permission bits of files are kept. Relative paths in a sandbox start at its workspace. In a directory, symbolic
    links that lead out of it are left out, and named, as are pipes and devices here.
    """
    src, dst = read_place(source), read_place(destination)
    if (src.session is None) == (dst.session is None):
        raise typer.BadParameter(
            "one side is in a sandbox and one is here: ash cp FILE sb1:/path, or ash cp sb1:/path FILE; "
            "write ./a:b for a file here with a colon in its name"
        )
    here = _local(Path(src.path), recursive=recursive) if src.session is None else None
    if here is None and not await anyio.Path(dst.path).parent.is_dir():
        raise typer.BadParameter(f"there is no directory {Path(dst.path).parent} to copy into; make it first")
    async with (
        cli.sandbox(src.session or dst.session or "") as box,
        waiting(f"copying {src}", show=not cli.as_json, in_bytes=True) as meter,
    ):
        tally = await (upload(box, here, dst, meter) if here else download(box, src, dst, meter, recursive=recursive))
    for path in tally.skipped:
        cli.note(f"ash: left out {clean(path)}: a link out of the directory, or a special file")
    cli.tell({"files": tally.files, "bytes": tally.bytes, "skipped": tally.skipped})


def _local(source: Path, *, recursive: bool) -> Local:
    """Return what is to be copied, or refuse it."""
    if not source.is_file() and not source.is_dir():
        what = "neither a file nor a directory" if source.exists() else "not there"
        raise typer.BadParameter(f"{source} is {what}; nothing was copied")
    if source.is_dir() and not recursive:
        raise typer.BadParameter(f"{source} is a directory; say -r to copy it with all in it")
    return Local(source, source.resolve().name, source.is_file())


async def upload(box: Sandbox, source: Local, target: Place, meter: Meter) -> Tally:
    """Copy what is here into a sandbox: at the target, or in it where that is a directory."""
    from ash_mcp._archives import Packing
    from ash_mcp._folders import send_folder

    path = target.path
    if target.wants_directory or await _is_directory(box.files, path):
        path = f"{path.rstrip('/')}/{source.name}"
    if source.is_file:
        return Tally(1, await box.files.upload(source.path, path, on_bytes=_shown_by(meter)))
    packing = await anyio.to_thread.run_sync(lambda: Packing(source.path, skip=True))
    sent = await send_folder(box.files.door, packing, path, _shown_by(meter))
    return Tally(packing.files, sent, [str(skipped) for skipped in packing.skipped])


async def download(box: Sandbox, source: Place, target: Place, meter: Meter, *, recursive: bool) -> Tally:
    """Copy what is in a sandbox to here: at the target, or in it where that is a directory."""
    from ash_mcp._folders import receive_folder

    entry = await box.files.stat(source.path)
    is_directory = entry.type == "directory" or source.path.endswith("/")
    if is_directory and not recursive:
        raise IsADirectory(f"{source} is a directory; say -r to copy it with all in it")
    here = anyio.Path(target.path)
    if target.wants_directory or await here.is_dir():
        name = source.path.rstrip("/").rpartition("/")[2]
        here /= name if name not in ("", ".", "..") else str(source.session)
    if is_directory:
        got = await receive_folder(box.files.door, source.path, Path(here), _shown_by(meter), skip=True)
        return Tally(got.files, got.bytes, got.skipped)
    size = await box.files.download(source.path, here, on_bytes=_shown_by(meter))
    if entry.type == "file":
        await here.chmod(entry.mode & 0o777)
    return Tally(1, size)


def _shown_by(meter: Meter) -> OnBytes:
    def show(done: int, total: int | None) -> None:
        meter.update(done=float(done), total=None if total is None else float(total))

    return show


async def _is_directory(files: Files, path: str) -> bool:
    try:
        return (await files.stat(path)).type == "directory"
    except (FileNotFound, NotADirectory):
        return False
