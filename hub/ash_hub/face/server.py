"""The MCP face of the hive: its tools, its sandboxes' tools beside them, resources and list changes, in both eras.

Calls to sandboxes do not come here: the relay takes them before. What it leaves (an unknown session, one that has
ended, arguments that are no JSON object) is answered here with words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mcp_types as types
from mcp.server.caching import CacheHint
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel.server import NotificationOptions, Server
from mcp.server.models import InitializationOptions
from mcp.shared.exceptions import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, ValidationError

from ash_hub.doors import Answer, Doors
from ash_hub.expansion import expand
from ash_hub.hive_tools import HIVE_TOOLS, INSTRUCTIONS, UNLISTED_TOOLS, listed_hive_tools
from ash_hub.listing import Listings
from ash_hub.notices import Notices
from ash_hub.recipes import Catalog, explain_invalid
from ash_hub.sandbox import Sandbox
from ash_hub.sandboxes import Sandboxes
from ash_hub.settings import HubSettings
from ash_hub.splicing import leave_tools
from ash_mcp.errors import AshError, ConfigError, HiveFault, NotFound, ToolNotFound
from ash_mcp.wire import failure_to_json, jsonrpc_code, tool_failure
from ash_router.admission import Admitted
from ash_router.ledger import Ledger
from ash_router.routes import split_tool_name

__all__ = ["Face"]

log = logging.getLogger("ash.hub")

Context = ServerRequestContext[Any, Any]
SESSION_HEADER = "mcp-session-id"


class Face:
    """Builds the MCP server of one hive.

    Args:
        caller: Finds who made a request, as admission said.
    """

    def __init__(
        self,
        doors: Doors,
        sandboxes: Sandboxes,
        notices: Notices,
        catalog: Catalog,
        ledger: Ledger,
        settings: HubSettings,
        caller: Callable[[Any], Admitted],
        version: str,
    ) -> None:
        self._doors = doors
        self._sandboxes = sandboxes
        self._notices = notices
        self._ledger = ledger
        self._settings = settings
        self._caller = caller
        self._listings = Listings(listed_hive_tools(_recipe_line(catalog)), name_limit=settings.name_limit)
        self.server = _HiveServer(
            "ash",
            version=version,
            title="Ash, the Agent Sandbox Hive",
            instructions=INSTRUCTIONS,
            cache_hints={
                "tools/list": CacheHint(ttl_ms=0),
                "prompts/list": CacheHint(ttl_ms=0),
                "resources/list": CacheHint(ttl_ms=0),
                "resources/read": CacheHint(ttl_ms=0),
            },
            get_tool_input_schema=lambda _: None,
        )
        add = self.server.add_request_handler
        add("tools/list", types.PaginatedRequestParams, self._list_tools)
        add("tools/call", types.CallToolRequestParams, self._call_tool)
        add("prompts/list", types.PaginatedRequestParams, self._list_prompts)
        add("resources/list", types.PaginatedRequestParams, self._list_resources)
        add("resources/templates/list", types.PaginatedRequestParams, self._list_templates)
        add("resources/read", types.ReadResourceRequestParams, self._read_resource)
        add("subscriptions/listen", types.SubscriptionsListenRequestParams, self._listen)
        add("logging/setLevel", types.SetLevelRequestParams, self._set_level)
        self.server.middleware.append(self._note_connection)

    async def _note_connection(self, ctx: Context, call_next: CallNext) -> HandlerResult:
        """Remember handshake-era connections, so that list changes reach them."""
        result = await call_next(ctx)
        request: Any = ctx.request
        if ctx.method == "notifications/initialized" and request is not None:
            session_id = request.headers.get(SESSION_HEADER)
            if session_id is not None:
                caller = self._caller(request)
                self._notices.joined(session_id, caller.principal.subject, caller.scope, ctx.session)
        return result

    async def _list_tools(self, ctx: Context, params: types.PaginatedRequestParams) -> dict[str, Any]:
        request: Any = ctx.request
        caller = self._caller(request)
        await self._doors.catch_up()
        shown: list[Sandbox] = []
        if self._settings.expand if caller.expand is None else caller.expand:
            # who asks for all gets all; the count is for hosts that say nothing
            most = None if caller.expand else self._settings.max_listed_tools
            shown = expand(
                self._sandboxes.registry.of(caller.principal, caller.scope), self._ledger.last_call, most=most
            )
        try:
            page = self._listings.page(ctx.protocol_version, shown, params.cursor)
        except ConfigError as error:
            raise MCPError(types.INVALID_PARAMS, error.message, failure_to_json(error)) from error
        leave_tools(request.scope, page.tools)
        following = {} if page.next_cursor is None else {"nextCursor": page.next_cursor}
        return _complete({"tools": [], **following})

    async def _call_tool(self, ctx: Context, params: types.CallToolRequestParams) -> dict[str, Any]:
        caller = self._caller(ctx.request)

        async def progress(done: float, message: str) -> None:
            await ctx.session.report_progress(done, 1.0, message)

        if params.name not in HIVE_TOOLS:  # a sandbox's, perhaps of one that another replica has just made
            await self._doors.catch_up()
        try:
            ask = self._parse(caller, params.name, params.arguments or {})
            answer = await self._doors.answer(caller, ask, progress)
        except AshError as error:
            self._doors.refused(caller, params.name, error)
            return _complete(tool_failure(error))
        except Exception:
            log.exception("a tool of the hive failed", extra={"tool": params.name})
            return _complete(tool_failure(HiveFault(f"{params.name} failed inside the hive; its log says why")))
        if answer.lists_changed and ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
            # also on the call's own stream, since some hosts open no other
            await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)
        return _result(answer)

    def _parse(self, caller: Admitted, name: str, arguments: dict[str, Any]) -> BaseModel:
        tool = HIVE_TOOLS.get(name) or UNLISTED_TOOLS.get(name)
        if tool is None:
            raise self._unknown_tool(caller, name)
        given = {key: value for key, value in arguments.items() if value is not None}  # models write null for absent
        try:
            return tool.ask.model_validate(given)
        except ValidationError as exc:
            raise ConfigError(f"{name}: {explain_invalid(exc)}") from exc

    def _unknown_tool(self, caller: Admitted, name: str) -> AshError:
        """Say what a name that is no tool of the hive may have meant."""
        split = split_tool_name(name)
        if split is None:
            return ToolNotFound(f"there is no tool {name!r}; the hive has: {', '.join(HIVE_TOOLS)}", tool=name)
        try:
            sandbox = self._sandboxes.ready(caller.principal, caller.scope, split[0])
        except AshError as error:
            return error
        return ToolNotFound(f"sandbox {sandbox.session} has no tool {split[1]!r}", tool=name)

    async def _list_prompts(self, ctx: Context, params: types.PaginatedRequestParams) -> types.ListPromptsResult:
        del ctx, params  # a sandbox's prompts are its own; the hive has none, and says so where hosts ask anyway
        return types.ListPromptsResult(prompts=[])

    async def _list_resources(self, ctx: Context, params: types.PaginatedRequestParams) -> types.ListResourcesResult:
        del ctx, params
        return types.ListResourcesResult(resources=[])

    async def _list_templates(
        self, ctx: Context, params: types.PaginatedRequestParams
    ) -> types.ListResourceTemplatesResult:
        del ctx, params
        template = types.ResourceTemplate(
            uri_template="sandbox://{session}/{+path}",
            name="sandbox-file",
            title="A file of a sandbox",
            description="A file by its path in the sandbox's workspace; an absolute path starts with another slash.",
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def _read_resource(self, ctx: Context, params: types.ReadResourceRequestParams) -> dict[str, Any]:
        uri = str(params.uri)
        session = uri.partition("://")[2].partition("/")[0]
        caller = self._caller(ctx.request)
        await self._doors.catch_up()
        try:
            contents = await self._doors.read(caller, session, uri)
        except AshError as error:
            self._doors.refused(caller, "resources/read", error)
            # the stateless era has one code for a resource that is not there
            code = types.INVALID_PARAMS if isinstance(error, NotFound) else jsonrpc_code(error)
            raise MCPError(code, error.message, {"uri": uri, **failure_to_json(error)}) from error
        return _complete({"contents": contents})

    async def _listen(
        self, ctx: Context, params: types.SubscriptionsListenRequestParams
    ) -> types.SubscriptionsListenResult:
        caller = self._caller(ctx.request)
        return await self._notices.listener(caller.principal.subject, caller.scope)(ctx, params)

    async def _set_level(self, ctx: Context, params: types.SetLevelRequestParams) -> types.EmptyResult:
        del ctx, params  # the relay passes it on to the sandboxes; the hive itself logs nothing to clients
        return types.EmptyResult()


class _HiveServer(Server[Any]):
    """A server that says to handshake-era clients, too, that its lists change."""

    def create_initialization_options(
        self,
        notification_options: NotificationOptions | None = None,
        experimental_capabilities: dict[str, dict[str, Any]] | None = None,
        extensions: dict[str, dict[str, Any]] | None = None,
    ) -> InitializationOptions:
        options = notification_options or NotificationOptions(tools_changed=True)
        return super().create_initialization_options(options, experimental_capabilities, extensions)


def _result(answer: Answer) -> dict[str, Any]:
    return _complete({"content": [{"type": "text", "text": answer.text}], "structuredContent": answer.structured})


def _complete(result: dict[str, Any]) -> dict[str, Any]:
    """Mark a result as final, as the stateless era wants it; the SDK drops the mark for older clients."""
    return {**result, "resultType": "complete"}


def _recipe_line(catalog: Catalog) -> str:
    return "Recipes: " + "; ".join(f"{recipe.name} ({recipe.description})" for recipe in catalog) + "."
