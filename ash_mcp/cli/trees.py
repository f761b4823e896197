"""The listing of a local directory tree, made before the copy starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

__all__ = ["Tree", "tree_of"]


@dataclass(slots=True)
class Tree:
    """A file, or a directory with all in it. Paths are relative to it; its own is the empty one."""

    name: str
    directories: list[Path] = field(default_factory=list[Path])
    """Parents before their children."""
    files: list[tuple[Path, Path]] = field(default_factory=list[tuple[Path, Path]])
    """Where each is, and its path in the copy."""
    skipped: list[Path] = field(default_factory=list[Path])
    """Symbolic links, sockets and the like."""
    bytes: int = 0


def tree_of(source: Path, *, recursive: bool) -> Tree:
    """List what is to be copied; a link as the source itself counts as its target."""
    tree = Tree(source.resolve().name)
    if source.is_file():
        _add_file(tree, source, Path())
    elif not source.is_dir():
        what = "neither a file nor a directory" if source.exists() else "not there"
        raise typer.BadParameter(f"{source} is {what}; nothing was copied")
    elif not recursive:
        raise typer.BadParameter(f"{source} is a directory; say -r to copy it with all in it")
    else:
        _add_directory(tree, source, Path())
    return tree


def _add_file(tree: Tree, source: Path, path: Path) -> None:
    tree.files.append((source, path))
    tree.bytes += source.stat().st_size


def _add_directory(tree: Tree, source: Path, path: Path) -> None:
    tree.directories.append(path)
    children: Sequence[Path] = sorted(source.iterdir())
    for child in children:
        if child.is_symlink() or not (child.is_dir() or child.is_file()):
            tree.skipped.append(child)
        elif child.is_dir():
            _add_directory(tree, child, path / child.name)
        else:
            _add_file(tree, child, path / child.name)
