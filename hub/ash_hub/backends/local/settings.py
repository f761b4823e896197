"""Settings of the local backend. Sizes are in bytes, durations in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ash_hub.egress.limits import Limits as EgressLimits

__all__ = ["DEFAULT_FIRST_USER", "DEFAULT_USERS", "USERS_EACH", "LocalSettings"]

_MIB = 1024 * 1024
USERS_EACH = 65_536
DEFAULT_FIRST_USER, DEFAULT_USERS = 0x7000_0000, 0x0FFE_0000
"""Numbers that no distribution gives away: 4094 times 65,536."""
_LAST_USER = 0x7FFF_FFFE
"""Programs take larger numbers for negative ones."""

Size = Annotated[int, Field(ge=_MIB)]


class LocalSettings(BaseModel):
    """The directories of the local backend, and the limits of a sandbox whose spawn names none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"] = "local"
    state_dir: Path
    """For documents and keys; one hive has it at a time."""
    run_dir: Path
    """For sockets; its path must be short (67 characters at most), since Unix sockets allow 107."""
    log_dir: Path
    launcher: Literal["auto", "fork", "bubblewrap"] = "auto"
    """`auto`: sandboxes are forked from a process that has their recipe loaded, once it is ready and where that can
    be; others are started by bubblewrap. `fork`: a sandbox waits for that process, and fails where there can be none.
    Recipes that come with a spawn and servers that are commands are started by bubblewrap in any case."""
    fork_idle_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """How long a process that sandboxes are forked from waits for the next one."""
    unsafe: bool = False
    """Start sandboxes as plain processes, without any isolation."""
    grace_seconds: Annotated[float, Field(ge=0)] = 60.0
    """How long sandboxes live on after their hub has died; a new hub can adopt them meanwhile."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """The timeout of a start, until the main process of the sandbox is executed."""
    max_sandboxes: Annotated[int, Field(ge=1)] = 200
    memory_bytes: Annotated[int, Field(ge=96 * _MIB)] = 2048 * _MIB
    """Of all processes together, with the files in its workspace, home, tmp and shm, which are in memory.

    Their sizes below shrink in proportion where they would leave less than 88 MiB of it to processes. Without a memory
    control group it bounds each process by itself; files are bounded by the sizes then, which shrink just the same."""
    cpu: Annotated[float, Field(ge=0.01)] | None = 2.0
    """In processors; None: all that there are."""
    max_processes: Annotated[int, Field(ge=16)] = 512
    """Processes and threads of one sandbox."""
    open_files: Annotated[int, Field(ge=64)] = 4096
    workspace_bytes: Size = 1024 * _MIB
    home_bytes: Size = 256 * _MIB
    tmp_bytes: Size = 512 * _MIB
    shm_bytes: Size = 64 * _MIB
    machine: bool = True
    """Whether a sandbox is root of a machine of its own, where the host lets it: with users that no other sandbox has,
    and with a root file system that it may change. If not, its one user has no rights and its system is read-only."""
    root_bytes: Size = 1024 * _MIB
    """What a machine may write to its root and `/usr`. It is in memory, and counts and shrinks as the sizes above."""
    system_dir: Path | None = None
    """Where the hive of an ordinary user keeps its copy of the host's system, which its machines begin as; None: in
    `$XDG_CACHE_HOME/ash/systems`, else `~/.cache/ash/systems`. All hives of that user may have the same."""
    system_without: tuple[str, ...] = ("/usr/lib/modules", "/usr/lib/firmware", "/usr/lib/debug", "/usr/src")
    """Paths that are not copied. These only the host's own kernel and debuggers read."""
    system_bytes: Size = 16 * 1024 * _MIB
    """The size up to which the system is copied. A larger one is not; sandboxes have it read-only then."""
    image_dir: Path | None = None
    """Where images and the runner's bundle are kept; None: in `$XDG_CACHE_HOME/ash/images`, else
    `~/.cache/ash/images`. All hives of that user may have the same."""
    image_bytes: Size = 32 * 1024 * _MIB
    """What the layers of all images may take, unpacked."""
    first_user: Annotated[int, Field(ge=65_536, le=_LAST_USER)] = DEFAULT_FIRST_USER
    """The first of the host's users that machines are given, 65,536 each. Only a hive that root runs gives any."""
    users: Annotated[int, Field(ge=65_536, le=_LAST_USER)] = DEFAULT_USERS
    """How many there are for all machines; the default is for 4094. Others of this host must not use them."""
    private_egress: bool = True
    """Whether a network policy may name an address that is not public, such as a server of this host. Turn it off
    where those who spawn are not to be trusted with this host's own services and networks."""
    egress: EgressLimits = EgressLimits()
    """The limits of each sandbox at the egress proxy."""
    log_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024
    """How much of the output of a sandbox's main process is kept: the last bytes."""

    @field_validator("system_without", mode="before")
    @classmethod
    def _read_json(cls, given: Any) -> Any:
        """Take a variable of its own in the environment for JSON."""
        try:
            return json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"must be JSON: {error}") from error
