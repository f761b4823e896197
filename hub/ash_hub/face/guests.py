"""The MCP face for guests: the tools of one sandbox that a share names, and nothing else.

Calls of these tools do not come here, the relay takes them before. What comes is refused as unknown, whatever it is.
"""

from __future__ import annotations

from typing import Final

from mcp.server.context import HandlerResult
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS
from pydantic import BaseModel

from ash_hub.face.tool_listing import Listings, Page
from ash_hub.lifecycle.registry import Registry
from ash_mcp.errors import AshError, ConfigError, ConnectFailed, ToolNotFound
from ash_mcp.types import Principal, State
from ash_router.admission.base import Admitted

__all__ = [
    "INSTRUCTIONS_FOR_GUESTS",
    "guest_tools",
    "is_guest",
    "no_resource",
    "unknown_to_guest",
    "with_instructions",
]

INSTRUCTIONS_FOR_GUESTS: Final = (
    "These are tools of one isolated sandbox, a Linux machine that was handed to you: you may run anything in it with "
    "them. Its files and processes last until whoever handed it to you takes it back or ends it."
)


def is_guest(caller: Admitted) -> bool:
    """Return whether a caller came with a share."""
    return caller.principal.share is not None


def guest_tools(listings: Listings, registry: Registry, guest: Principal, version: str, cursor: str | None) -> Page:
    """Return a page of what a guest may call.

    Raises:
        ConfigError: The cursor is not valid.
        ConnectFailed: This replica does not know the sandbox yet.
    """
    sandbox = registry.by_id(guest.sandbox) if guest.sandbox is not None else None
    if sandbox is None or sandbox.toolset is None or sandbox.state is not State.READY:
        raise ConnectFailed("this replica does not know the tools of the shared sandbox yet; try again")
    return listings.guest_page(version, sandbox, guest.tools, cursor)


def unknown_to_guest(registry: Registry, guest: Principal, name: str) -> AshError:
    """Return the refusal of a call: of a tool that the share does not open, or of a sandbox that is on its way out."""
    sandbox = registry.by_id(guest.sandbox) if guest.sandbox is not None else None
    if name in guest.tools and (sandbox is None or sandbox.state is not State.READY):
        return ConnectFailed("the way to the shared sandbox is not known on this replica now; try again")
    if name in guest.tools:
        return ConfigError("this call cannot be passed on: leave out what MCP does not name, and deep nesting")
    return ToolNotFound(f"there is no tool {name!r}; there are: {', '.join(sorted(guest.tools))}", tool=name)


def no_resource(uri: str) -> MCPError:
    """Return the refusal to read anything: a share opens tools alone."""
    return MCPError(INVALID_PARAMS, "there is no such resource: a share opens tools alone", {"uri": uri})


def with_instructions(result: HandlerResult) -> HandlerResult:
    """Return the answer to `initialize` or `server/discover` with the instructions for guests."""
    if isinstance(result, BaseModel):
        return result.model_copy(update={"instructions": INSTRUCTIONS_FOR_GUESTS})
    return result if result is None else {**result, "instructions": INSTRUCTIONS_FOR_GUESTS}
