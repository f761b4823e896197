"""Plans of sandboxes from an image: its layers are their root, the runner's bundle starts in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.plan import Mount, Plan
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.machine import Machine, MachinePlans
from ash_hub.backends.local.plans import ETC, WORKSPACE, HostFacts
from ash_hub.backends.local.runtime import RUNTIME_DIRECTORY, Runtime
from ash_hub.backends.runner import CONFIG_VARIABLE, runner_image
from ash_hub.images import Image
from ash_mcp.types import SandboxSpec

__all__ = ["BUNDLE", "ImagePlans", "ImageRoot", "bundle_runtime"]

BUNDLE = f"{RUNTIME_DIRECTORY}/bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRoot:
    """An image as it lies on this host."""

    image: Image
    layers: tuple[str, ...]
    """The directories that a root shows, the highest first."""
    in_use: tuple[str, ...]
    """Directories that nobody may remove as long as a sandbox runs from it."""


def bundle_runtime(bundle: Path) -> Runtime:
    """Return the runtime that a bundle is, as its manifest says."""
    manifest = json.loads((bundle / "MANIFEST.json").read_text())
    loader, *options, python, isolated, module, runner = manifest["command"]
    return Runtime(
        python=f"{BUNDLE}/{python}",
        host_python=str(bundle / python),
        arguments=(isolated, module, runner),
        binds={BUNDLE: str(bundle)},
        loader=(f"{BUNDLE}/{loader}", *(f"{BUNDLE}/{each}" if "/" in each else each for each in options)),
        variables={name: f"{BUNDLE}/{value}" for name, value in manifest["environment"].items()},
    )


class ImagePlans(MachinePlans):
    """Each sandbox is root of what an image has. `runtime` must be a bundle's."""

    def __init__(
        self, host: HostFacts, enforcement: Enforcement, directory: Path, machine: Machine, root: ImageRoot
    ) -> None:
        super().__init__(host, enforcement, directory, machine)
        self._image = root

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        given = super().plan(spec, runtime, limits)
        config = self._image.image.config
        told = json.loads(given.environment[CONFIG_VARIABLE])
        told["workspace"] = self._workspace
        told["image"] = runner_image(config.env, config.user, has_workdir=bool(config.workdir))
        return replace(
            given,
            environment={**given.environment, **runtime.variables, CONFIG_VARIABLE: json.dumps(told)},
            directory="/",
            in_use=(*self._image.in_use, *runtime.binds.values()),
            image=self._image.image.id,
        )

    @property
    def _workspace(self) -> str:
        return self._image.image.config.workdir or WORKSPACE

    def _mounts(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Iterator[Mount]:
        top, *below = self._image.layers
        yield Mount("writable", "/", top, below=tuple(below))
        yield from self._usual_places(spec, runtime, limits)
        if not self._image.image.config.workdir:
            kept = "kept" if self._machine.snapshots else "tmpfs"
            yield Mount(kept, WORKSPACE, size=limits.workspace_bytes, mode="0755")
        yield from self._outlet(spec)
        for name, text in _OF_EVERY_CONTAINER.items():
            yield Mount("file", f"/etc/{name}", content=text.encode(), mode="0644")
        yield from (Mount("read_only", path) for path in ("/proc", "/dev", RUNTIME_DIRECTORY))


_OF_EVERY_CONTAINER: Mapping[str, str] = {name: ETC[name] for name in ("hosts", "hostname", "resolv.conf")}
"""Files that images leave to whoever runs them."""
