"""The Python and the packages that the runner needs, and where they appear inside a sandbox."""

from __future__ import annotations

import compileall
import functools
import importlib.util
import os
import site
import struct
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ash_hub.backends.runner import FORKING_MODULE, RUNNER_ARGUMENTS, RUNNER_MODULE
from ash_mcp.errors import ConfigError

__all__ = [
    "PYTHON_DIRECTORY",
    "RUNTIME_DIRECTORY",
    "Runtime",
    "compile_runner",
    "find_runtime",
    "loader_of",
    "without_system",
]

RUNTIME_DIRECTORY = "/opt/ash"
PYTHON_DIRECTORY = "/opt/ash/python"
_SITE_DIRECTORY = "/opt/ash/site"
_LIBRARY_DIRECTORY = "/opt/ash/lib"
_INTERPRETER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How the main process of a sandbox starts."""

    python: str
    """The interpreter's path inside the sandbox, for the first process."""
    host_python: str
    """The same interpreter on the host, for a launcher without a root of its own."""
    arguments: tuple[str, ...]
    """The arguments of the interpreter."""
    binds: Mapping[str, str] = field(default_factory=dict[str, str])
    """Read-only mounts: path inside -> path on the host."""
    hidden: tuple[str, ...] = ()
    """Files below the binds that are hidden: they contain paths of the host, and nothing inside needs them."""
    python_path: tuple[str, ...] = ()
    host_python_path: tuple[str, ...] = ()
    forked: str | None = None
    """Python that defines what a fork parent loads and what its sandboxes run; None: nothing can be forked."""
    library_path: tuple[str, ...] = ()
    """Directories inside with the interpreter's shared library, if it has one of its own."""
    loader: tuple[str, ...] = ()
    """What starts the interpreter, where that is not the system's own loader: a loader, its options."""


@functools.cache
def find_runtime() -> Runtime:
    """Return the runtime that this process itself runs on.

    Raises:
        ConfigError: The runner is not installed beside the hub.
    """
    package = _package_directory(RUNNER_MODULE.partition(".")[0])
    base, interpreter = Path(sys.base_prefix).resolve(), _interpreter()
    binds: dict[str, str] = {}
    library: tuple[str, ...] = ()
    if base.is_relative_to("/usr"):
        python = str(interpreter)
    else:
        binds[PYTHON_DIRECTORY] = str(base)
        python = f"{PYTHON_DIRECTORY}/{interpreter.relative_to(base)}"
        if sysconfig.get_config_var("Py_ENABLE_SHARED"):
            library = (f"{PYTHON_DIRECTORY}/lib",)
    inside: list[str] = []
    outside: list[str] = []
    hidden: list[str] = []
    if not any(package.parent == path for path in _site_directories()):
        binds[f"{_LIBRARY_DIRECTORY}/{package.name}"] = str(package)
        inside.append(_LIBRARY_DIRECTORY)
        outside.append(str(package.parent))
    for number, path in enumerate(_site_directories()):
        if path.is_relative_to("/usr"):
            inside.append(str(path))
        else:
            target = f"{_SITE_DIRECTORY}{number or ''}"
            binds[target] = str(path)
            inside.append(target)
            hidden += [f"{target}/{name}" for name in _telling_files(path)]
        outside.append(str(path))
    return Runtime(
        python=python,
        host_python=str(interpreter),
        arguments=RUNNER_ARGUMENTS,
        binds=binds,
        hidden=tuple(hidden),
        python_path=tuple(inside),
        host_python_path=tuple(outside),
        library_path=library,
        forked=f"from {FORKING_MODULE} import load, main",
    )


def without_system(runtime: Runtime) -> Runtime:
    """Return a runtime that takes nothing from `/usr` inside, which may be changed there.

    The host's is shown a second time, read-only. Interpreter, loader and shared libraries come from that one.

    Raises:
        ConfigError: The interpreter has no loader in the host's `/usr`.
    """
    loader = os.path.realpath(loader_of(runtime.host_python))
    if not loader.startswith("/usr/"):
        raise ConfigError(f"the loader of {runtime.host_python} is {loader}, which is not in /usr")
    places = (os.path.dirname(loader), f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib")
    directories = [f"{RUNTIME_DIRECTORY}{path}" for path in dict.fromkeys(places) if os.path.isdir(path)]
    path = ":".join((*runtime.library_path, *directories))
    return replace(
        runtime,
        python=_in_runtime(runtime.python),
        binds={f"{RUNTIME_DIRECTORY}/usr": "/usr", **runtime.binds},
        python_path=tuple(_in_runtime(each) for each in runtime.python_path),
        loader=(f"{RUNTIME_DIRECTORY}{loader}", "--inhibit-cache", "--library-path", path),
    )


def _in_runtime(path: str) -> str:
    return f"{RUNTIME_DIRECTORY}{path}" if path.startswith("/usr/") else path


def loader_of(program: str) -> str:
    """Return the loader that a program names (PT_INTERP of an ELF file of 64 bits)."""
    with open(program, "rb") as file:
        head = file.read(64)
        if head[:5] == b"\x7fELF\x02":
            (table,) = struct.unpack_from("<Q", head, 32)
            size, count = struct.unpack_from("<HH", head, 54)
            for number in range(count):
                file.seek(table + number * size)
                kind, _, offset, _, _, length = struct.unpack("<IIQQQQ", file.read(40))
                if kind == _INTERPRETER:
                    file.seek(offset)
                    return file.read(length).rstrip(b"\0").decode()
    raise ConfigError(f"{program} names no loader")


def compile_runner(runtime: Runtime) -> None:
    """Write the byte code of the runner's package where it is missing: a sandbox, which cannot, would compile it anew.

    Where this process cannot write either, starts are slower and nothing else.
    """
    for inside, outside in runtime.binds.items():
        if inside.startswith(_LIBRARY_DIRECTORY):
            compileall.compile_dir(outside, ddir=inside, quiet=2)


def _interpreter() -> Path:
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


def _package_directory(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the package {name} is not installed beside the hub: install ash-mcp[all]")
    return Path(next(iter(found.submodule_search_locations))).resolve()


def _site_directories() -> list[Path]:
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(Path(text).resolve() for text in paths if text) if path.is_dir()]


def _telling_files(path: Path) -> Iterator[str]:
    """Yield the files that an editable installation leaves, which name directories of the host."""
    for pattern in ("*.pth", "*.egg-link", "*.dist-info/direct_url.json"):
        yield from (str(found.relative_to(path)) for found in sorted(path.glob(pattern)))
