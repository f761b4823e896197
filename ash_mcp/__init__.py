"""Ash, the Agent Sandbox Hive: the Python SDK.

    from ash_mcp import Hive

    async with Hive() as hive:
        async with hive.spawn("general") as box:
            done = await box.exec("echo hello")

`ash_mcp.sync` has the same names for code that does not await. Everything is imported at its first use, so that
importing this package costs next to nothing.
"""

# ruff: noqa: F403, F405 - pyright sees that each name is in one of the modules
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ash_mcp.client import *
    from ash_mcp.errors import *
    from ash_mcp.files import *
    from ash_mcp.jobs import *
    from ash_mcp.pty import *
    from ash_mcp.results import *
    from ash_mcp.run import *
    from ash_mcp.sandbox import *
    from ash_mcp.settings import *
    from ash_mcp.types import *

__all__ = [
    "AshError",
    "AshTimeout",
    "BadArguments",
    "CallResult",
    "CapacityExceeded",
    "Cause",
    "Chunk",
    "ClientSettings",
    "CommandFailed",
    "CommandNotStarted",
    "ConfigError",
    "Conflict",
    "ConnectFailed",
    "Destroyed",
    "EndReason",
    "ExecResult",
    "FileEntry",
    "FileError",
    "FileExists",
    "FileNotFound",
    "FileNotPermitted",
    "Files",
    "Hive",
    "HiveFault",
    "IsADirectory",
    "Job",
    "JobInfo",
    "JobNotFound",
    "JobOutput",
    "JobResult",
    "Line",
    "LocalProtocolError",
    "NoSpace",
    "NotADirectory",
    "NotFound",
    "OutputStream",
    "PermissionDenied",
    "PortClosed",
    "PortNotAllowed",
    "Progress",
    "ProtocolError",
    "Pty",
    "PtyInfo",
    "PtyNotFound",
    "RecipeNotFound",
    "RemoteProtocolError",
    "RequestRefused",
    "ResourceAmounts",
    "Resources",
    "ResultLost",
    "Run",
    "RunEnded",
    "RunId",
    "RunInfo",
    "RunNotFound",
    "RunTaken",
    "Sandbox",
    "SandboxError",
    "SandboxGone",
    "SandboxId",
    "SandboxInfo",
    "SandboxNotFound",
    "SandboxRefused",
    "SandboxReset",
    "SessionName",
    "SessionTaken",
    "Share",
    "ShareInfo",
    "SnapshotId",
    "SnapshotInfo",
    "SnapshotNotFound",
    "SpawnedMany",
    "Spawning",
    "StartFailed",
    "State",
    "StreamBroken",
    "Tool",
    "ToolNotFound",
    "TransportError",
    "Unauthenticated",
    "Unsupported",
]


_HOMES: Final = ("errors", "types", "results", "settings", "files", "jobs", "pty", "sandbox", "run", "client")
"""The modules of these names, lightest first, so that a look-up imports little more than what it finds."""


if not TYPE_CHECKING:  # with it, checkers would take every name for one of the package

    def __getattr__(name: str) -> Any:
        for home in _HOMES if name in __all__ else ():
            module = importlib.import_module(f"{__name__}.{home}")
            if name in module.__all__:
                globals()[name] = value = getattr(module, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
