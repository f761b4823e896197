"""The client of the seed that Ash began from: scripts written for it need only this import.

    from ash_mcp.compat import SandboxClient, SandboxConfig

    with SandboxClient(SandboxConfig(control_plane_url=URL, gateway_url=URL)) as client:
        client.spawn()
        mcp = client.connect()

New code has more of `ash_mcp.Hive`. The classes here block, and are no relatives of those in `ash_mcp`; the
`__cause__` of an error is the `AshError` with its `kind`, `retryable` and `trainable`.

Modules: `vocabulary` (config, sandbox, errors), `rest` (one request), `sandbox_client`.
"""

from ash_mcp.compat.sandbox_client import SandboxClient
from ash_mcp.compat.vocabulary import (
    ResourceReq,
    ResourceSpec,
    Sandbox,
    SandboxConfig,
    SandboxConnectionError,
    SandboxDestroyError,
    SandboxError,
    SandboxSpawnError,
    SandboxTimeoutError,
)

__all__ = [
    "ResourceReq",
    "ResourceSpec",
    "Sandbox",
    "SandboxClient",
    "SandboxConfig",
    "SandboxConnectionError",
    "SandboxDestroyError",
    "SandboxError",
    "SandboxSpawnError",
    "SandboxTimeoutError",
]
