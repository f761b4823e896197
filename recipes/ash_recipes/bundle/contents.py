"""The contents of a bundle, found on the host that builds it: each file inside, and the host's file that it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ash_recipes.bundle.loader import interpreter_of

__all__ = ["NATIVE", "BundleProblem", "Contents", "add_origins", "contents"]

NATIVE = "lib/native"
"""Where shared libraries and the loader are."""
PYTHON = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGES = f"{PYTHON}/site-packages"
_DISTRIBUTION, _EXTRA = "ash-mcp", "recipes"
_UNUSED = frozenset(
    "authlib cyclopts dnspython docstring-parser docutils email-validator pycparser pygments pyperclip pyyaml "
    "rich-rst watchfiles".split()
)
"""Of command lines and other servers; the runner imports none of them."""
_WITHOUT = frozenset(
    "__pycache__ test tests benchmarks sboms idlelib tkinter turtledemo ensurepip lib2to3 pydoc_data distutils "
    "isoschematron site-packages dist-packages".split()
)
_WITHOUT_FILES = re.compile(
    r"(_tkinter|_test\w*|_ctypes_test|_xxtestfuzz|xxlimited\w*|xxsubtype|_curses\w*|readline|_gdbm|_dbm|nis|objectify|"
    r"diff)\.cpython|(turtle|sitecustomize)\.py$|config-\d.*|.*\.(pth|pyi|pyc|pyx|pxd|pxi|h|c|a|o)$|"
    r"(RECORD|INSTALLER|REQUESTED|WHEEL|direct_url\.json)$"
)
_LISTED = re.compile(r"^\s*(\S+) => (/\S+) \(0x|^\s*(/\S+) \(0x", re.MULTILINE)
_ALWAYS = ("libgcc_s.so.1",)
"""What the C library opens by name, when a thread is cancelled."""
_SECONDS = 60.0


class BundleProblem(Exception):
    """No bundle can be built here; the message says why."""


@dataclass(slots=True)
class Contents:
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    """By path inside."""
    loader: str = ""
    """The loader's path inside."""
    distributions: list[Mapping[str, str]] = field(default_factory=list[Mapping[str, str]])
    libraries: list[Mapping[str, str]] = field(default_factory=list[Mapping[str, str]])


def contents() -> Contents:
    """Find all that the runner needs of this host's Python.

    Raises:
        BundleProblem: Something of it is not there.
    """
    found = Contents()
    interpreter = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    found.files["bin/python"] = interpreter
    for name in dict.fromkeys((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=_base()))):
        _add_tree(found, Path(name), PYTHON)
    package = Path(__file__).resolve().parent.parent
    _add_tree(found, package, f"{_PACKAGES}/{package.name}", but=package / "bundle")
    for name in _needed_distributions():
        _add_distribution(found, name)
    _add_libraries(found, interpreter)
    return found


def _base() -> dict[str, str]:
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}


def _is_left_out(name: str) -> bool:
    return name in _WITHOUT or _WITHOUT_FILES.match(name) is not None


def _add_tree(found: Contents, source: Path, target: str, but: Path | None = None) -> None:
    for directory, directories, names in os.walk(source):
        here = Path(directory)
        directories[:] = [name for name in directories if not _is_left_out(name) and here / name != but]
        below = here.relative_to(source)
        for name in names:
            if not _is_left_out(name) and (here / name).is_file():
                found.files[os.path.normpath(f"{target}/{below}/{name}")] = here / name


def _needed_distributions() -> list[str]:
    """Return the distributions that the runner and its recipes need, each once."""
    seen: set[tuple[str, str]] = set()
    names: set[str] = set()
    to_see = [(_DISTRIBUTION, _EXTRA)]
    while to_see:
        of, extra = to_see.pop()
        if (of, extra) in seen:
            continue
        seen.add((of, extra))
        for text in _distribution(of).requires or ():
            wanted = Requirement(text)
            is_of_extra = of == _DISTRIBUTION and wanted.marker is None  # those are the SDK's
            if is_of_extra or (wanted.marker is not None and not wanted.marker.evaluate({"extra": extra})):
                continue
            if (name := _canonical(wanted.name)) in _UNUSED:
                continue
            names.add(name)
            to_see += [(name, more) for more in ("", *sorted(wanted.extras))]
    return sorted(names)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise BundleProblem(f"{name} is not installed: install ash-mcp[{_EXTRA}] beside the hub") from error


def _add_distribution(found: Contents, name: str) -> None:
    distribution = _distribution(name)
    if distribution.files is None:
        raise BundleProblem(f"{name} does not say which files are its own: install it with pip")
    for path in distribution.files:
        parts = path.parts
        if ".." in parts or path.is_absolute() or any(_is_left_out(part) for part in parts):
            continue
        source = Path(str(distribution.locate_file(path)))
        if source.is_file():
            found.files[f"{_PACKAGES}/{path.as_posix()}"] = source
    about = distribution.metadata
    said = [*(about.get_all("License-Expression") or ()), *(about.get_all("License") or ()), *_classified(about)]
    licence = str(said[0]).partition("\n")[0] if said else "unknown"
    found.distributions.append({"name": name, "version": distribution.version, "licence": licence})


def _classified(about: metadata.PackageMetadata) -> Iterator[str]:
    for line in about.get_all("Classifier") or ():
        if line.startswith("License ::"):
            yield line.rpartition(":: ")[2]


def _add_libraries(found: Contents, interpreter: Path) -> None:
    """Add the loader, and what each program and library needs that is not in the bundle already."""
    named = interpreter_of(interpreter.read_bytes()[:65_536])
    if named is None or not os.path.exists(named):
        raise BundleProblem(f"{interpreter} has no dynamic loader")
    loader = os.path.realpath(named)
    libraries: dict[str, str] = {os.path.basename(named): loader}
    own = {os.path.realpath(path) for path in found.files.values()}
    programs = [path for name, path in found.files.items() if name == "bin/python" or ".so" in path.name]
    for path in programs:
        libraries |= {name: real for name, real in _listed(loader, path) if os.path.realpath(real) not in own}
    directories = {os.path.dirname(real) for real in libraries.values()}
    for name in _ALWAYS:
        there = (f"{directory}/{name}" for directory in sorted(directories) if os.path.exists(f"{directory}/{name}"))
        libraries.setdefault(name, next(there, ""))
    for name, real in sorted(libraries.items()):
        if real:
            found.files[f"{NATIVE}/{name}"] = Path(real)
    found.loader = f"{NATIVE}/{os.path.basename(named)}"


def _listed(loader: str, program: Path) -> Iterator[tuple[str, str]]:
    """Yield the libraries that a program or library is loaded with on this host."""
    said = _said([loader, "--list", str(program)])
    for name, path, alone in _LISTED.findall(said):
        real = os.path.realpath(path or alone)
        if real != loader:
            yield os.path.basename(name or alone), real
    if "not found" in said:
        missing = next(line.strip() for line in said.splitlines() if "not found" in line)
        raise BundleProblem(f"{program}: {missing}")


def add_origins(found: Contents) -> None:
    """Add the packages and licences of shared libraries, which takes longer than all else."""
    for name, path in sorted(found.files.items()):
        if name.startswith(f"{NATIVE}/"):
            found.libraries.append({"file": name, **_origin(found, os.path.realpath(path))})


def _origin(found: Contents, real: str) -> Mapping[str, str]:
    """Return the package that a library is of, and add its licence."""
    package = ""
    for path in (real, real.removeprefix("/usr")):
        package = package or _said(["dpkg-query", "--search", path]).partition(":")[0]
    if not package or not re.fullmatch(r"[a-z0-9.+-]+", package):
        return {"package": "unknown"}
    copyright_file = Path("/usr/share/doc", package, "copyright")
    if copyright_file.is_file():
        found.files[f"licences/{package}"] = copyright_file
    version = _said(["dpkg-query", "--show", "--showformat", "${Version}", package])
    return {"package": package, "version": version, "licence": f"licences/{package}"}


def _said(words: list[str]) -> str:
    try:
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        return subprocess.run(
            words, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
