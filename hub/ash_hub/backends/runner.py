"""The start of a runner, on every backend: its command, its configuration, its environment variables. Pure.

`docs/runner.md` is the contract. Where its files and its listener are differs between backends, and is given here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ash_mcp.types import SandboxSpec

__all__ = [
    "CONFIG_VARIABLE",
    "FORKING_MODULE",
    "RUNNER_ARGUMENTS",
    "RUNNER_MODULE",
    "runner_config",
    "runner_environment",
    "runner_image",
]

CONFIG_VARIABLE = "ASH_RUNNER_CONFIG"
RUNNER_MODULE = "ash_recipes.runner"
FORKING_MODULE = "ash_recipes.runner.forking"
"""What a process that is forked for sandboxes has loaded."""
RUNNER_ARGUMENTS = ("-P", "-s", "-m", RUNNER_MODULE)
"""What follows the interpreter."""


def runner_config(
    spec: SandboxSpec, *, workspace: str, home: str, egress: str | None = None, canary: str | None = None
) -> dict[str, Any]:
    """Return the content of `ASH_RUNNER_CONFIG`, which has no secrets.

    Args:
        workspace: Its path inside the sandbox, as that of `home`.
        egress: The egress proxy: the path inside of its socket, or `host:port`; None where there is none.
        canary: `host:port` that must refuse before the sandbox is ready; None: nothing must.
    """
    more: dict[str, str | int | None] = {"egress": egress, "canary": canary}
    more |= {"network_note": spec.network_note or None, "result_bytes": spec.result_bytes or None}
    return {key: value for key, value in more.items() if value is not None} | {
        "sandbox_id": spec.id,
        "recipe": spec.recipe,
        "public_key": spec.public_key,
        "server": spec.server,
        "env": dict(spec.env),
        "workspace": workspace,
        "home": home,
    }


def runner_image(env: Mapping[str, str], user: str, *, has_workdir: bool) -> dict[str, Any]:
    """Return what a runner's configuration says of the image that it runs in: what commands get of it.

    Args:
        has_workdir: Whether the workspace is a directory of the image, and not one of the sandbox's own.
    """
    return {"env": dict(env), "user": user, "has_workdir": has_workdir}


def runner_environment(
    config: Mapping[str, Any], *, listen: str | None = None, listen_descriptor: str | None = None
) -> dict[str, str]:
    """Return the variables that every runner is started with; its image or launcher adds `PATH` and its like.

    Args:
        config: What `runner_config` returns.
        listen: `host:port` to listen on, or
        listen_descriptor: the number of an inherited socket that listens already, or what becomes that number.
    """
    place = {"ASH_LISTEN": listen, "ASH_LISTEN_FD": listen_descriptor}
    return {name: value for name, value in place.items() if value is not None} | {
        CONFIG_VARIABLE: json.dumps(config, separators=(",", ":")),
        "HOME": config["home"],
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
    }
