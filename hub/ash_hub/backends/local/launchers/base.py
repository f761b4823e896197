"""What a launcher is: from a spec to a plan that the keeper carries out. Pure; it starts nothing itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ash_hub.backends.local.limits import Limits
from ash_hub.backends.local.runtime import Runtime
from ash_mcp.types import SandboxSpec

__all__ = ["INIT", "OUTLET", "HostFacts", "Launcher", "Plan", "runner_config"]

INIT = Path(__file__).with_name("init.py")
"""The first process of every sandbox."""

OUTLET = "/run/ash-egress"
"""Where a sandbox that may go out has the directory of its egress proxy's socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A launch, as `keeper.launch` reads it. `@fd:NAME@` as a whole word becomes a descriptor's number."""

    argv: tuple[str, ...]
    args: tuple[str, ...] = ()
    """Further options, handed over in the file `@fd:args@` so that no process list shows them."""
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: str = "/"
    directories: tuple[str, ...] = ()
    """Made before and removed after, the first with all that is in it."""
    rlimits: Mapping[str, int] = field(default_factory=dict[str, int])
    veils: tuple[tuple[str, str], ...] = ()
    """Directories of the keeper's own, each with the one of the host that appears there for this launch alone."""

    def to_json(self) -> dict[str, Any]:
        return {
            "argv": self.argv,
            "args": self.args,
            "files": {name: base64.b64encode(content).decode() for name, content in self.files.items()},
            "env": self.env,
            "cwd": self.cwd,
            "directories": self.directories,
            "rlimits": self.rlimits,
            "veils": self.veils,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a launcher needs to know of the host; looked up once, so that plans are pure."""

    bubblewrap: str = "/usr/bin/bwrap"
    options: frozenset[str] = frozenset()
    """The options that this bubblewrap knows, `--size` among them or not."""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Top-level links of a merged /usr, as `/bin` -> `usr/bin`."""
    directories: Sequence[str] = ("/usr",)
    """Top-level directories with the system's programs and libraries."""
    masked: Sequence[str] = ()
    """Files of /proc that say more about the host than a sandbox should know."""
    seccomp: bytes | None = None
    """A BPF program; None where this architecture has none."""
    veils: bool = False
    """Whether the kernel lets this user hide where on the host a bound directory lies."""


class Launcher(Protocol):
    """Makes the plan of a sandbox."""

    @property
    def warnings(self) -> Sequence[str]:
        """What this launcher does not protect from on this host, a sentence each."""
        ...

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        """Return how to start `spec`."""
        ...


def runner_config(spec: SandboxSpec, *, workspace: str, home: str, egress: str | None = None) -> dict[str, Any]:
    """Return the content of `ASH_RUNNER_CONFIG`; `egress` is the path of the proxy's socket, if there is one."""
    return ({} if egress is None else {"egress": egress}) | {
        "sandbox_id": spec.id,
        "generation": spec.generation,
        "recipe": spec.recipe,
        "public_key": spec.public_key,
        "server": spec.server,
        "env": dict(spec.env),
        "workspace": workspace,
        "home": home,
    }
