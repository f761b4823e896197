"""Ash, the Agent Sandbox Hive: the Python SDK.

    from ash_mcp import Hive

    async with Hive() as hive:
        async with hive.spawn("general") as box:
            done = await box.exec("echo hello")

`ash_mcp.sync` has the same names for code that does not await. Everything is imported at its first use, so that
importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ash_mcp.client import Destroyed, Hive, Spawning
    from ash_mcp.errors import (
        AshError,
        AshTimeout,
        CapacityExceeded,
        CommandFailed,
        CommandNotStarted,
        ConfigError,
        Conflict,
        ConnectFailed,
        FileError,
        FileExists,
        FileNotFound,
        FileNotPermitted,
        HiveFault,
        IsADirectory,
        JobNotFound,
        LeaseHeld,
        LeaseLost,
        LocalProtocolError,
        NoSpace,
        NotADirectory,
        NotFound,
        PermissionDenied,
        ProtocolError,
        RecipeNotFound,
        RemoteProtocolError,
        RequestRefused,
        SandboxError,
        SandboxGone,
        SandboxNotFound,
        SandboxRefused,
        SessionTaken,
        StartFailed,
        StreamBroken,
        ToolNotFound,
        TransportError,
        Unauthenticated,
        Unsupported,
    )
    from ash_mcp.files import Files
    from ash_mcp.jobs import Job, OutputStream
    from ash_mcp.results import (
        CallResult,
        Chunk,
        ExecResult,
        FileEntry,
        JobInfo,
        JobOutput,
        JobResult,
        Progress,
    )
    from ash_mcp.sandbox import Sandbox
    from ash_mcp.settings import ClientSettings
    from ash_mcp.types import (
        EndReason,
        ResourceAmounts,
        Resources,
        SandboxId,
        SandboxInfo,
        SessionName,
        State,
        Tool,
    )

_HOMES: Final = {
    "client": ("Destroyed", "Hive", "Spawning"),
    "errors": (
        "AshError",
        "AshTimeout",
        "CapacityExceeded",
        "CommandFailed",
        "CommandNotStarted",
        "ConfigError",
        "Conflict",
        "ConnectFailed",
        "FileError",
        "FileExists",
        "FileNotFound",
        "FileNotPermitted",
        "HiveFault",
        "IsADirectory",
        "JobNotFound",
        "LeaseHeld",
        "LeaseLost",
        "LocalProtocolError",
        "NoSpace",
        "NotADirectory",
        "NotFound",
        "PermissionDenied",
        "ProtocolError",
        "RecipeNotFound",
        "RemoteProtocolError",
        "RequestRefused",
        "SandboxError",
        "SandboxGone",
        "SandboxNotFound",
        "SandboxRefused",
        "SessionTaken",
        "StartFailed",
        "StreamBroken",
        "ToolNotFound",
        "TransportError",
        "Unauthenticated",
        "Unsupported",
    ),
    "files": ("Files",),
    "jobs": ("Job", "OutputStream"),
    "results": (
        "CallResult",
        "Chunk",
        "ExecResult",
        "FileEntry",
        "JobInfo",
        "JobOutput",
        "JobResult",
        "Progress",
    ),
    "sandbox": ("Sandbox",),
    "settings": ("ClientSettings",),
    "types": (
        "EndReason",
        "ResourceAmounts",
        "Resources",
        "SandboxId",
        "SandboxInfo",
        "SessionName",
        "State",
        "Tool",
    ),
}

_MODULE_OF: Final = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AshError",
    "AshTimeout",
    "CallResult",
    "CapacityExceeded",
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
    "LeaseHeld",
    "LeaseLost",
    "LocalProtocolError",
    "NoSpace",
    "NotADirectory",
    "NotFound",
    "OutputStream",
    "PermissionDenied",
    "Progress",
    "ProtocolError",
    "RecipeNotFound",
    "RemoteProtocolError",
    "RequestRefused",
    "ResourceAmounts",
    "Resources",
    "Sandbox",
    "SandboxError",
    "SandboxGone",
    "SandboxId",
    "SandboxInfo",
    "SandboxNotFound",
    "SandboxRefused",
    "SessionName",
    "SessionTaken",
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


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
