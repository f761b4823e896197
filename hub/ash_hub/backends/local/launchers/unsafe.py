"""Plans for plain processes without any isolation: only for hosts where nothing else works, and only when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ash_hub.backends.local.launchers.base import INIT, Plan, runner_config
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.runtime import Runtime
from ash_mcp.types import SandboxSpec

__all__ = ["UnsafeLauncher"]


class UnsafeLauncher:
    """Starts a sandbox's processes as the hive's own user, on the host as it is."""

    def __init__(self, enforcement: Enforcement, directory: Path) -> None:
        self._enforcement = enforcement
        self._directory = directory

    @property
    def warnings(self) -> Sequence[str]:
        return [
            "unsafe: this sandbox is not isolated; what runs in it can do all that the hive's own user can do",
            *self._enforcement.warnings(),
        ]

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        """Return how to start `spec`; the keeper makes its directory and removes it at the end."""
        place = self._directory / "w" / spec.id
        workspace, home = str(place / "workspace"), str(place / "home")
        variables = {
            "PATH": os.defpath,
            "HOME": home,
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "PYTHONPATH": ":".join(runtime.host_python_path),
            "ASH_LISTEN_FD": "@fd:listen@",
            "ASH_RUNNER_CONFIG": json.dumps(runner_config(spec, workspace=workspace, home=home)),
        }
        python = runtime.host_python
        init = (python, "-I", "-S", str(INIT), "@fd:up@", "0", "tree")
        rlimits = {key: value for key, value in self._enforcement.rlimits(limits).items() if key != "DATA"}
        return Plan(
            argv=(*init, python, *runtime.arguments),
            env=variables,
            cwd=workspace,
            directories=(str(place), workspace, home),
            rlimits=rlimits,
        )
