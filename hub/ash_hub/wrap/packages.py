"""`npx …` and `uvx …`: their package is installed once, behind walls of its own, and shown read-only from then on.

While it is installed, its scripts may run and the registries be reached, and nothing of the host is there. While it
serves, it sees folders and secrets, and reaches what its own policy says: never both.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ash_hub.backends.local.keeper.used_directories import hold, remove_unused
from ash_mcp.errors import ConfigError

__all__ = ["INSIDE", "Package", "installed", "package_of"]

INSIDE = "/opt/server"
"""Where a package is, inside, both times."""
_KEPT_SECONDS = 30 * 24 * 3600.0
_MOST_BYTES = 4 * 1024**3
_MOST_SECONDS = 600.0
_LOOK_SECONDS = 2.0
_FILE_BYTES = 4096
"""What a file counts as beside its content."""
_HEAD_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Package:
    """What a command line of npx or uvx installs and starts."""

    kind: str
    """`npm` or `pypi`."""
    specs: tuple[str, ...]
    command: str | None
    """The program of it to start; None: its only one, or the one that has its name."""
    arguments: tuple[str, ...]


def package_of(words: Sequence[str]) -> Package | None:
    """Read a command line of npx, `npm exec`, uvx, `uv tool run` or `pipx run`; None: it is another, or says more."""
    name = os.path.basename(words[0])
    for beginning, kind in _RUNNERS.items():
        if (name, *words[1 : len(beginning)]) == beginning:
            return _read(kind, words[len(beginning) :])
    return None


_RUNNERS = {
    ("npx",): "npm",
    ("npm", "exec"): "npm",
    ("uvx",): "pypi",
    ("uv", "tool", "run"): "pypi",
    ("pipx", "run"): "pypi",
}
_FLAGS = {"npm": ("-y", "--yes", "-q", "--quiet", "--"), "pypi": ("-q", "--quiet", "--")}
_WITH_PACKAGE = {"npm": ("-p", "--package"), "pypi": ("--from", "--spec", "--with")}


def _read(kind: str, words: Sequence[str]) -> Package | None:
    named: list[str] = []
    beside: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option, separator, value = rest.pop(0).partition("=")
        if option in _WITH_PACKAGE[kind]:
            if not separator:
                value = rest.pop(0) if rest else ""
            (beside if option == "--with" else named).append(value)
        elif option not in _FLAGS[kind] or separator:
            return None
    if not rest or "" in named:
        return None
    first, *arguments = rest
    if named:
        return Package(kind, (*named, *beside), first, tuple(arguments))
    spec = first if kind == "npm" else _python_spec(first)
    command = None if kind == "npm" else _python_name(first)
    return Package(kind, (spec, *beside), command, tuple(arguments))


def _python_spec(text: str) -> str:
    """Return what pip calls uv's `name@version`."""
    name, at, version = text.partition("@")
    if not at or "/" in version:
        return text
    return name if version == "latest" else f"{name}=={version}"


def _python_name(text: str) -> str:
    return re.split(r"[\[@=<>!~; ]", text, maxsplit=1)[0]


@contextmanager
def installed(
    package: Package,
    *,
    parent: Path,
    made_of: str,
    refresh: bool,
    install: Callable[[Path, Callable[[], str | None]], int],
) -> Generator[tuple[str, str]]:
    """Install a package if need be; yield its directory on the host, which stays as long as this is entered, and the
    path of its program below it.

    Args:
        parent: Where packages are.
        made_of: What else of the host it depends on: another one is another package.
        refresh: Whether it is installed anew.
        install: Fills a directory and returns an exit code. It ends early when what it is given says why.

    Raises:
        ConfigError: It could not be installed, or has no such program.
    """
    parent.mkdir(mode=0o700, exist_ok=True)
    key = hashlib.sha256(repr((package.kind, package.specs, package.command, made_of)).encode()).hexdigest()[:24]
    place = parent / key
    with _locked(parent / f"{key}.lock"):
        if refresh or _command_in(place) is None:
            _make(package, place, install)
            _remove_old(parent, key)
        try:
            held = hold(str(place))
        except OSError as error:
            raise ConfigError(f"{place} was removed just now; start it again") from error
    try:
        os.utime(place)
        command = _command_in(place)
        if command is None:
            raise ConfigError(f"{place} was removed just now; start it again")
        yield str(place / "files"), command
    finally:
        os.close(held)


def _make(package: Package, place: Path, install: Callable[[Path, Callable[[], str | None]], int]) -> None:
    partial = place.parent / f".{place.name}-{secrets.token_hex(4)}"
    for left in place.parent.glob(f".{place.name}-*"):  # of one that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    (partial / "files").mkdir(mode=0o700, parents=True)
    try:
        code = install(partial / "files", _Bounds(partial).exceeded)
        if code != 0:
            raise ConfigError(f"{' '.join(package.specs)} could not be installed (exit code {code}); see above")
        command = (
            _npm_command(package, partial / "files")
            if package.kind == "npm"
            else _python_command(package, partial / "files")
        )
        (partial / "command.json").write_text(json.dumps(command))
        if place.exists():  # whoever uses it keeps it, by its descriptors
            place.rename(place.parent / f".{place.name}-{secrets.token_hex(4)}")
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Bounds:
    """What the installation of a package may take."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._until = time.monotonic() + _MOST_SECONDS
        self._look_at = 0.0

    def exceeded(self) -> str | None:
        now = time.monotonic()
        if now > self._until:
            return f"the installation took longer than {_MOST_SECONDS:g} s"
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            try:
                size = _size(self._path)
            except (OSError, RecursionError):
                return "the installation made directories that cannot be looked into"
            if size > _MOST_BYTES:
                return f"the installation took more than {_MOST_BYTES >> 30} GiB"
        return None


def _size(path: Path) -> int:
    """Return what a directory takes.

    Raises:
        OSError, RecursionError: Something of it is out of sight: where its names are too long, its directories too
            deep or not readable, there may be any number of bytes.
    """
    found = 0
    for _, _, names, directory in os.fwalk(path, onerror=_require_gone):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                # Empty ones take none, but a disk has only so many files.
                found += _FILE_BYTES + os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512
    return found


def _require_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _npm_command(package: Package, files: Path) -> str:
    programs = _names_in(files / "node_modules" / ".bin")
    wanted = package.command
    if wanted is None:
        installed_as = _json_in(files, "package.json").get("dependencies")
        name = next(iter(cast("dict[str, Any]", installed_as)), "") if isinstance(installed_as, dict) else ""
        given = _json_in(files, f"node_modules/{name}/package.json").get("bin") if name else None
        programs_of = list(cast("dict[str, Any]", given)) if isinstance(given, dict) else []
        own = [name.rpartition("/")[2]] if isinstance(given, str) else programs_of
        short = name.rpartition("/")[2]
        wanted = short if short in own else own[0] if len(own) == 1 else None
    return _chosen(wanted, programs, "node_modules/.bin", "-p PACKAGE NAME")


def _python_command(package: Package, files: Path) -> str:
    return _chosen(package.command, _names_in(files / "bin"), "bin", "--from PACKAGE NAME")


def _chosen(wanted: str | None, programs: Sequence[str], directory: str, how: str) -> str:
    if wanted is None or wanted not in programs or not _NAME.fullmatch(wanted):
        usual = ("python", "pip", "activate", "Activate")
        there = ", ".join(name for name in programs if not name.startswith(usual)) or "none"
        raise ConfigError(f"the package has no program {wanted or 'of its name'}: it has {there}; say `{how}`")
    return f"{directory}/{wanted}"


def _names_in(directory: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(directory))
    return []


def _json_in(files: Path, path: str) -> dict[str, Any]:
    """Read JSON that a package wrote: bounded, and nothing that a link of it leads to elsewhere."""
    found = files / path
    if not os.path.realpath(found).startswith(f"{os.path.realpath(files)}/"):
        return {}
    try:
        descriptor = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a pipe
        with open(descriptor, "rb") as file:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            given: Any = json.loads(file.read(_HEAD_BYTES)) if is_file else None
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", given) if isinstance(given, dict) else {}


def _command_in(place: Path) -> str | None:
    try:
        return str(json.loads((place / "command.json").read_text()))
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a lock that the kernel gives up with this process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_old(parent: Path, keep: str) -> None:
    """Remove the packages that nobody has used for a month."""
    ages = list[float]()
    for path in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another start may remove it just now
            if path.is_dir() and path.name != keep and not path.name.startswith("."):
                ages.append(time.time() - path.lstat().st_mtime)
    young = sum(age <= _KEPT_SECONDS for age in ages)
    remove_unused(parent, keep, spare=young, fresh_seconds=_MOST_SECONDS)
