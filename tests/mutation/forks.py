"""Runs tests against mutants, each in a fork of this process that sees one module changed."""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.mutation.lists import Target
from tests.mutation.mutants import Mutant, mutated

__all__ = ["Job", "baseline_seconds", "run_jobs"]

_IMPORTED_ONCE: Final = (
    "pytest", "hypothesis", "hypothesis.stateful", "anyio", "httpx", "httptools", "jwt", "orjson", "pydantic",
    "pydantic_settings", "cryptography.hazmat.primitives.asymmetric.rsa", "mcp.client", "mcp.server.lowlevel",
    "prometheus_client", "redis.asyncio", "starlette.applications", "uvicorn", "uvloop",
)  # fmt: skip
"""What is not ours and takes long to import. What does not exist is left out."""
_MOST_MEMORY: Final = 4 * 2**30
_PR_SET_PDEATHSIG: Final = 1
_LOOK_SECONDS: Final = 0.02
_BASELINE_SECONDS: Final = 120.0
_PYTEST: Final = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "--hypothesis-seed=0",
                  "-W", "ignore::pytest.PytestAssertRewriteWarning")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One mutant, and how long its tests may take."""

    target: Target
    mutant: Mutant
    seconds: float


@dataclass(slots=True)
class _Fork:
    pid: int
    job: Job
    folder: Path
    began: float = field(default_factory=time.monotonic)

    def end(self) -> str | None:
        """Say how it ended, or None while it runs."""
        late = time.monotonic() - self.began > self.job.seconds
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
        if pid == 0:
            return None
        _end_group(self.pid)  # what its tests started
        shutil.rmtree(self.folder, ignore_errors=True)
        return "took too long" if late else "survived" if status == 0 else "killed"


def baseline_seconds(target: Target) -> float:
    """Run the tests of a target unchanged, and say how long they take.

    Raises:
        RuntimeError: They fail, so that no mutant could be told from the module.
    """
    _import_once()
    job = Job(target, Mutant("", "", "", -1), _BASELINE_SECONDS)
    fork = _forked(job)
    while (end := fork.end()) is None:
        time.sleep(_LOOK_SECONDS)
    if end != "survived":
        raise RuntimeError(f"the tests of {target.module} fail without any change ({end}): {' '.join(target.tests)}")
    return time.monotonic() - fork.began


def run_jobs(jobs: Sequence[Job], *, processes: int, until: float) -> Iterator[tuple[Job, str]]:
    """Run each job, several at once, and yield how it ended; none begins after `until`, by the monotonic clock."""
    waiting, running = deque(jobs), list[_Fork]()
    while (waiting and time.monotonic() < until) or running:
        while waiting and len(running) < processes and time.monotonic() < until:
            running.append(_forked(waiting.popleft()))
        time.sleep(_LOOK_SECONDS)
        for fork in list(running):
            if (end := fork.end()) is not None:
                running.remove(fork)
                yield fork.job, end


def _import_once() -> None:
    for name in _IMPORTED_ONCE:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _forked(job: Job) -> _Fork:
    folder = Path(tempfile.mkdtemp(prefix="ash-"))
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(_run_tests(job, folder))
        finally:
            os._exit(70)
    try:
        os.setpgid(pid, pid)  # in the child as well: whoever comes first
    except (PermissionError, ProcessLookupError):
        pass
    return _Fork(pid, job, folder)


def _run_tests(job: Job, folder: Path) -> int:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # one may run for ever
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for place, descriptor in enumerate((null, said, said)):
        os.dup2(descriptor, place)
    os.chdir(job.target.root)
    if job.mutant.number >= 0:
        sys.meta_path.insert(0, _Changed(job.target, job.mutant))
    import pytest

    return int(pytest.main([*_PYTEST, f"--basetemp={folder / 'tmp'}", *job.target.tests]))


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as it would be with a change."""

    def __init__(self, target: Target, mutant: Mutant) -> None:
        self._target = target
        self._tree: ast.Module = mutated(target.source(), mutant.number)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._target.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._target.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self._tree, str(self._target.path), "exec"), module.__dict__)
