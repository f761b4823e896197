"""The bundle's folder: under a name that stands for its input, with the same bytes for the same input."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ash_recipes.bundle.contents import NATIVE, PYTHON, BundleProblem, Contents, add_origins, contents
from ash_recipes.bundle.loader import machine_of, sealed_loader

__all__ = ["INSIDE", "LARGEST_BYTES", "MANIFEST", "build", "build_once"]

INSIDE = "/opt/ash/bundle"
"""Where it is mounted; compiled files name it as the place of their source."""
MANIFEST = "MANIFEST.json"
LARGEST_BYTES = 100 * 1024 * 1024
_VERSION = 2
"""Of what this module makes of the same input."""
_STRIP_SECONDS = 60.0
_TIME = 315_532_800
"""Of every file: the first second of 1980, before which archives cannot reach."""


def build_once(parent: Path) -> Path:
    """Return the bundle of this host's Python below `parent`; built if it is not there.

    Raises:
        BundleProblem, OSError: It cannot be built.
    """
    found = contents()
    target = parent / _fingerprint(found)
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / "lock"):
        if not target.is_dir():
            for stale in parent.glob(".new-*"):  # of a build that was killed: there is one at a time
                shutil.rmtree(stale)
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
            try:
                _write(found, made)
                made.chmod(0o755)
                made.rename(target)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return target


def build(target: Path) -> None:
    """Build the bundle into a new folder.

    Raises:
        BundleProblem, OSError: It cannot be built, and nothing is there.
    """
    target.mkdir(parents=True)
    try:
        _write(contents(), target)
    except BaseException:
        shutil.rmtree(target)
        raise


def _fingerprint(found: Contents) -> str:
    """Return a name for the input, by the times and sizes of its files."""
    digest = hashlib.sha256(f"{_VERSION} {sys.version}".encode())
    for name, source in sorted(found.files.items()):
        status = source.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(found: Contents, target: Path) -> None:
    strip = shutil.which("strip")
    add_origins(found)
    for name, source in sorted(found.files.items()):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_content(found, name, source))
        path.chmod(0o755 if name.startswith(("bin/", f"{NATIVE}/ld")) else 0o644)
        if path.suffix == ".py":
            _compile(path, name)
        elif strip is not None and name != found.loader and _is_program(path):
            subprocess.run([strip, "--strip-unneeded", str(path)], check=False, timeout=_STRIP_SECONDS)
    # else OpenSSL would load what the root's own configuration names
    (target / "lib/openssl.cnf").touch(0o644)
    manifest = _manifest(found, target)
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    if manifest["bytes"] > LARGEST_BYTES:
        raise BundleProblem(f"the bundle has {manifest['bytes'] >> 20} MiB, more than {LARGEST_BYTES >> 20}")
    for directory, _, names in os.walk(target, topdown=False):
        for path in (*(os.path.join(directory, name) for name in names), directory):
            if path == directory:
                os.chmod(path, 0o755)
            os.utime(path, (_TIME, _TIME))


def _content(found: Contents, name: str, source: Path) -> bytes:
    content = source.read_bytes()
    if name == found.loader:
        try:
            return sealed_loader(content)
        except ValueError as error:
            raise BundleProblem(f"the loader {source} cannot be bundled: {error}") from error
    if os.path.basename(name).startswith("_sysconfigdata_"):
        return content.replace(sys.base_prefix.encode(), INSIDE.encode())
    return content


def _is_program(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _compile(path: Path, name: str) -> None:
    """Put a module's byte code in its place: sources would take as much again.

    By hash, since the times of files change on their way into an image.
    """
    try:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(
            str(path), cfile=f"{path}c", dfile=f"{INSIDE}/{name}", doraise=True, invalidation_mode=mode, quiet=2
        )
    except (py_compile.PyCompileError, ValueError):  # a template, or of another Python
        return
    Path(f"{path}c").chmod(0o644)
    path.unlink()


def _manifest(found: Contents, target: Path) -> dict[str, Any]:
    files: list[tuple[str, int, str]] = []
    for path in sorted(target.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            files.append((str(path.relative_to(target)), len(content), hashlib.sha256(content).hexdigest()))
    command = (
        found.loader,
        "--inhibit-cache",
        "--library-path",
        NATIVE,
        "bin/python",
        "-I",
        "-m",
        "ash_recipes.runner",
    )
    return {
        "version": _VERSION,
        "machine": machine_of((target / found.loader).read_bytes()[:64]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": f"{PYTHON}/site-packages",
        "command": command,
        "environment": {"OPENSSL_CONF": "lib/openssl.cnf"},
        "distributions": found.distributions,
        "libraries": found.libraries,
        "bytes": sum(size for _, size, _ in files),
        "files": files,
    }
