"""The parts of a hive that its lifecycle ties together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ash_hub.backends.base import Backend
from ash_hub.lifecycle.siblings import Siblings
from ash_hub.serving.audit import Audit
from ash_hub.settings import HubSettings
from ash_hub.spawning.instance_watch import InstanceWatch
from ash_hub.spawning.pool import Pool
from ash_hub.spawning.recipes import Catalog
from ash_hub.spawning.starting import Starter
from ash_hub.spawning.toolset_shelf import ToolsetShelf
from ash_mcp.types import SandboxId, Scope
from ash_router.ledger import Ledger
from ash_router.routes import Routes
from ash_router.store.base import Store
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["Parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What `Controller` and `Sandboxes` of one replica share."""

    settings: HubSettings
    backend: Backend
    store: Store
    siblings: Siblings
    routes: Routes
    ledger: Ledger
    tokens: CallTokens
    catalog: Catalog
    pool: Pool
    starter: Starter
    shelf: ToolsetShelf
    watch: InstanceWatch
    on_changed: Callable[[str, Scope], Awaitable[None]]
    """Told whose tools changed: owner and scope."""
    on_gone: Callable[[SandboxId], None]
    """Told that a sandbox has no route any more, so that connections to it can be dropped."""
    clock: Callable[[], float]
    """The hive's time, in seconds since the epoch."""
    audit: Audit = field(default_factory=Audit)
