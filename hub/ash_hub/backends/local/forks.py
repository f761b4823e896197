"""Orders for fork parents: the plan of a recipe's parent process, and what it loads. The keeper takes them.

Two orders with one `identity` and another `key` are of one recipe whose files, or whose Python, have changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread

from ash_hub.backends.local import seccomp
from ash_hub.backends.local.keeper import launchers
from ash_hub.backends.local.keeper.launchers.fork.parents import BOOT
from ash_hub.backends.local.keeper.launchers.plan import Mount, Plan
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.machine import WAY_OUT
from ash_hub.backends.local.runtime import RUNTIME_DIRECTORY, Runtime
from ash_hub.backends.local.settings import LocalSettings
from ash_mcp.types import SandboxSpec

__all__ = ["ForkOrders", "fingerprint", "fork_order", "why_not_forked"]

_INSIDE = "/opt/ash/launchers"
_MODULES = (
    "init.py",
    "rlimits.py",
    *(f"fork/{name}.py" for name in ("__init__", "kernel", "walls", "forked", "parent")),
)
_PLACE_BYTES = 16 * 1024 * 1024
"""Of each place that a parent can write to."""
_CHANGED_SECONDS = 2.0
_TOLD_SECONDS = 5.0
_MOST_ORDERS = 64
_MOST_FILES = 20_000
"""Of a recipe, looked at for changes."""


def why_not_forked(spec: SandboxSpec, runtime: Runtime) -> str | None:
    """Return why sandboxes of a spec are started by bubblewrap, whatever the settings say; None if they are forked."""
    if spec.image is not None:
        return "it is from an image, which has a runner of its own"
    if not spec.installed:
        return "its recipe came with the spawn, and a caller's code is imported nowhere but in the caller's sandbox"
    if "python" not in spec.server:
        return "its server is a command, not a Python object"
    return "this runtime has nothing to fork" if runtime.forked is None else None


class ForkOrders:
    """The orders of one hub: made anew when a recipe's files change, and told to the keeper now and then."""

    def __init__(self, runtime: Runtime, settings: LocalSettings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._filter = seccomp.for_machine(os.uname().machine, nests=True)
        self._known: dict[str, tuple[float, dict[str, Any]]] = {}
        self._told: dict[tuple[str, int], float] = {}

    async def of(self, spec: SandboxSpec, plan: Plan, limits: Limits, enforcement: Enforcement) -> dict[str, Any]:
        """Return the order for the parent of a sandbox; what has changed is seen within seconds."""
        same = json.dumps([spec.recipe, spec.server, dict(spec.env), dict(spec.mounts)], sort_keys=True)
        made_at, order = self._known.get(same, (-math.inf, dict[str, Any]()))
        if time.monotonic() - made_at > _CHANGED_SECONDS:
            changes = await anyio.to_thread.run_sync(fingerprint, spec, self._runtime)
            order = fork_order(
                spec,
                self._runtime,
                plan,
                system_call_filter=self._filter,
                group=enforcement.for_keeper(replace(limits, cpu=None)),
                idle_seconds=self._settings.fork_idle_seconds,
                changes=changes,
                user_block=self._spare_users(plan),
            )
            if len(self._known) >= _MOST_ORDERS:
                self._known.clear()
            self._known[same] = time.monotonic(), order
        return order

    def _spare_users(self, plan: Plan) -> tuple[int, int]:
        """Return the users that are left when there are as many machines as there may be."""
        first, users = plan.user_block
        taken = self._settings.max_sandboxes * plan.identity.users
        return first + taken, max(users - taken, 0)

    def is_due(self, order: Mapping[str, Any], keeper: int) -> bool:
        """Say whether a keeper, by its process, is to be told, and take it for told then."""
        now, place = time.monotonic(), (order["key"], keeper)
        if now - self._told.get(place, -math.inf) < _TOLD_SECONDS:
            return False
        self._told = {key: at for key, at in self._told.items() if now - at < _TOLD_SECONDS} | {place: now}
        return True


def fork_order(
    spec: SandboxSpec,
    runtime: Runtime,
    plan: Plan,
    *,
    system_call_filter: bytes | None,
    group: Mapping[str, Any],
    idle_seconds: float,
    changes: str,
    user_block: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Return the order for the parent of a sandbox, as `ForkParents.prepare` takes it. Pure but for our own files.

    Args:
        plan: The sandbox's own.
        system_call_filter: For a process that makes namespaces and mounts.
        group: The limits of the parent's control group.
        changes: What `fingerprint` returned.
        user_block: The first of the host's users that parents of machines can have, and how many there are.
    """
    assert runtime.forked is not None
    config = json.loads(plan.environment["ASH_RUNNER_CONFIG"])
    parent = replace(
        plan,
        command=(*plan.loader, plan.python, "-P", "-s", "-c", BOOT.format(path=_INSIDE, module="parent"), "@fd:door@"),
        environment={name: value for name, value in plan.environment.items() if not name.startswith("ASH_")},
        mounts=tuple(_mounts(plan, spec)),
        own_directories=(),
        rlimits={},
        processes=0,
        capabilities=(),
        user_block=user_block,
        writable_bytes=_PLACE_BYTES if plan.identity.users else None,
        group={},
        system_call_filter=system_call_filter,
        network=None,
    )
    given = {name: config[name] for name in ("server", "env", "workspace", "home")}
    order = {"name": spec.recipe, "plan": parent.to_json(), "load": {"source": runtime.forked, "given": given}}
    identity = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:32]
    key = hashlib.sha256(f"{identity} {changes}".encode()).hexdigest()[:32]
    return {**order, "identity": identity, "key": key, "group": dict(group), "idle_seconds": idle_seconds}


def _mounts(plan: Plan, spec: SandboxSpec) -> Iterator[Mount]:
    """Yield the sandbox's mounts, without what is its own, and with the launcher's own modules."""
    closed = RUNTIME_DIRECTORY if plan.identity.users else "/"
    for mount in plan.mounts:
        if mount.kind == "read_only" and mount.target == closed:
            for name in _MODULES:
                content = (Path(launchers.__file__).parent / name).read_bytes()
                yield Mount("file", f"{_INSIDE}/{name}", content=content, mode="0444")
        if mount.kind == "tmpfs":
            yield mount._replace(size=_PLACE_BYTES)
        elif not _is_own(mount, spec):
            yield mount


def _is_own(mount: Mount, spec: SandboxSpec) -> bool:
    """Say whether a mount is of one sandbox, or of those with a network: its way out, and what nobody is to move."""
    return mount.kind == "pinned" or mount.target in WAY_OUT or mount.source.endswith(f"/e/{spec.id}")


def fingerprint(spec: SandboxSpec, runtime: Runtime) -> str:
    """Return what changes with the files of a recipe, with the hive's Python and with what is installed beside it."""
    module = str(spec.server.get("python", "")).partition(":")[0].partition(".")[0]
    places = [Path(path) for path in spec.mounts.values()]
    places += [path for path in runtime.binds.values() for path in (Path(path),) if path.name != "python"]
    digest = hashlib.sha256(f"{sys.version} {_stat(sys.executable)}".encode())
    for place in places:
        digest.update(f"{place} {_stat(place)}\n".encode())
    for tree in (*(Path(path) for path in spec.mounts.values()), *_packages(module), *_packages("ash_recipes")):
        for number, path in enumerate(sorted(_files(tree))):
            if number >= _MOST_FILES:
                break
            digest.update(f"{path} {_stat(path)}\n".encode())
    return digest.hexdigest()


def _packages(module: str) -> list[Path]:
    try:
        found = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError):
        return []
    if found is None:
        return []
    if found.submodule_search_locations:
        return [Path(path) for path in found.submodule_search_locations]
    return [Path(found.origin)] if found.origin else []


def _files(tree: Path) -> Iterator[str]:
    if not tree.is_dir():
        yield str(tree)
    for directory, names, files in os.walk(tree):
        names[:] = [name for name in names if name != "__pycache__"]
        yield from (f"{directory}/{name}" for name in files if not name.endswith(".pyc"))


def _stat(path: str | Path) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        return str(error.errno)
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
