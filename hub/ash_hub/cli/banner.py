"""The lines that a hive prints when it has started."""

from __future__ import annotations

from collections.abc import Sequence

from ash_hub.app import Hive
from ash_mcp.cli.host_entries import HOSTS

__all__ = ["banner", "host_lines"]


def banner(hive: Hive) -> Sequence[str]:
    """Return the lines: where it serves, what makes its sandboxes, where its log is."""
    backend, described = hive.settings.backend, hive.backend.describe()
    more = ", WITHOUT ISOLATION (--unsafe)" if backend.get("unsafe") else ""
    if backend["kind"] == "kubernetes":
        more = f", in the namespace {described['namespace']} of {described['cluster']}"
    return [
        f"Ash serves at {hive.url}",
        f"  sandboxes: {backend['kind']}{more}",
        f"  log: {hive.settings.logs / 'hive.log'}",
        *(["  no API keys yet: ash key new"] if hive.lacks_keys else []),
    ]


def host_lines(url: str) -> Sequence[str]:
    """Return how MCP hosts and shells connect."""
    others = ", ".join(name for name in HOSTS if name != "claude-code")
    return [
        f"  Claude Code: claude mcp add --transport http ash {url}",
        f"  other hosts: ash config HOST ({others})",
        "  a shell:     ash spawn, ash list, ash exec sb1 -- uname -a",
    ]
