"""The MCP face of the hive: its tools, its sandboxes' tools beside them, resources and list changes, in both eras.

Calls to sandboxes do not come here: the relay takes them before. What it leaves (an unknown session, one that has
ended, arguments that are no JSON object) is answered here with words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import mcp_types as types
from mcp.server.caching import CacheHint
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel.server import NotificationOptions, Server
from mcp.server.models import InitializationOptions
from mcp.shared.exceptions import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, ValidationError

from ash_hub.face.answer import Answer
from ash_hub.face.arguments import with_session
from ash_hub.face.expansion import listed_sandboxes
from ash_hub.face.fixed_list_hosts import fixed_list_host, note_of_tools
from ash_hub.face.guests import guest_tools, is_guest, no_resource, unknown_to_guest, with_instructions
from ash_hub.face.handlers import HiveOperations
from ash_hub.face.hive_tools import HIVE_TOOLS, INSTRUCTIONS, UNLISTED_TOOLS, listed_hive_tools
from ash_hub.face.notices import ClientKey, Notices
from ash_hub.face.splicing import set_listed_tools
from ash_hub.face.steady_progress import SteadyProgress, comment_on
from ash_hub.face.tool_listing import Listings
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.serving.client_log import ClientLog
from ash_hub.settings import HubSettings
from ash_hub.spawning.recipes import Catalog, explain_invalid
from ash_hub.spawning.starting import Progress
from ash_mcp.errors import AshError, ConfigError, ConnectFailed, HiveFault, NotFound, ToolNotFound
from ash_mcp.wire import failure_to_json, jsonrpc_code, tool_failure
from ash_router.admission.base import Admitted
from ash_router.ledger import Ledger
from ash_router.routes import split_tool_name

__all__ = ["Face"]

log = logging.getLogger("ash.hub")

Context = ServerRequestContext[Any, Any]
SESSION_HEADER = "mcp-session-id"
_GREETINGS = ("initialize", "server/discover")
MAX_NAME_CHARS = 128
"""Of a client's own name and version, where they are kept."""


class Face:
    """Builds the MCP server of one hive.

    Args:
        caller: Finds who made a request, as admission said.
    """

    def __init__(
        self,
        operations: HiveOperations,
        sandboxes: Sandboxes,
        notices: Notices,
        catalog: Catalog,
        ledger: Ledger,
        settings: HubSettings,
        caller: Callable[[Any], Admitted],
        version: str,
    ) -> None:
        self._operations = operations
        self._sandboxes = sandboxes
        self._notices = notices
        self._ledger = ledger
        self._settings = settings
        self._caller = caller
        self._clients = ClientLog()
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
        """Log who connects, and remember handshake-era connections, so that list changes reach them."""
        result = await call_next(ctx)
        request: Any = ctx.request
        if request is not None and (ctx.method == "notifications/initialized" or _is_stateless(ctx)):
            caller = self._caller(request)
            owner, client = caller.principal.subject, _client_key(ctx, caller)
            self._clients.note(client, _client_info(ctx), ctx.protocol_version, owner)
            if isinstance(client, str):
                self._notices.add_session(client, owner, caller.scope, ctx.session)
        if request is not None and ctx.method in _GREETINGS and is_guest(self._caller(request)):
            return with_instructions(result)
        return result

    async def _list_tools(self, ctx: Context, params: types.PaginatedRequestParams) -> dict[str, Any]:
        request: Any = ctx.request
        caller = self._caller(request)
        await self._operations.catch_up()
        fetched = self._notices.fetching(_client_key(ctx, caller))
        if is_guest(caller):
            return self._list_guest_tools(ctx, caller, params.cursor)
        own = self._sandboxes.registry.of(caller.principal, caller.scope)
        shown: list[Sandbox] = []
        if self._settings.expand if caller.expand is None else caller.expand:
            # who asks for all gets all; the count is for hosts that say nothing
            most = None if caller.expand else self._settings.max_listed_tools
            shown = listed_sandboxes(own, self._ledger.last_call, most=most)
        info = _client_info(ctx)
        notes: dict[str, str] = {}
        if info is not None and fixed_list_host(info.name) is not None:
            notes["call"] = note_of_tools(listed_sandboxes(own, self._ledger.last_call, most=None))
        try:
            page = self._listings.page(ctx.protocol_version, shown, params.cursor, notes)
        except ConfigError as error:
            raise MCPError(types.INVALID_PARAMS, error.message, failure_to_json(error)) from error
        is_last = page.next_cursor is None
        set_listed_tools(request.scope, page.tools, fetched if is_last else None)
        following = {} if is_last else {"nextCursor": page.next_cursor}
        return _complete({"tools": [], **following})

    def _list_guest_tools(self, ctx: Context, caller: Admitted, cursor: str | None) -> dict[str, Any]:
        request: Any = ctx.request
        registry = self._sandboxes.registry
        try:
            page = guest_tools(self._listings, registry, caller.principal, ctx.protocol_version, cursor)
        except AshError as error:
            code = types.INVALID_PARAMS if isinstance(error, ConfigError) else jsonrpc_code(error)
            raise MCPError(code, error.message, failure_to_json(error)) from error
        set_listed_tools(request.scope, page.tools)
        following = {} if page.next_cursor is None else {"nextCursor": page.next_cursor}
        return _complete({"tools": [], **following})

    async def _call_tool(self, ctx: Context, params: types.CallToolRequestParams) -> dict[str, Any]:
        request: Any = ctx.request
        caller = self._caller(request)
        if params.name not in HIVE_TOOLS:  # a sandbox's, perhaps of one that another replica has just made
            await self._operations.catch_up()
        asks = ctx.meta is not None and "progress_token" in ctx.meta
        comment = None if asks else partial(comment_on, request.scope)
        progress = SteadyProgress(ctx.session.report_progress, comment)
        async with progress.repeated():
            return await self._answer(ctx, caller, params, progress)

    async def _answer(
        self, ctx: Context, caller: Admitted, params: types.CallToolRequestParams, progress: Progress
    ) -> dict[str, Any]:
        try:
            ask = self._parse(caller, params.name, params.arguments or {})
            answer = await self._operations.answer(caller, ask, progress)
        except AshError as error:
            self._operations.refused(caller, params.name, error)
            return _complete(tool_failure(error))
        except Exception:
            log.exception("a tool of the hive failed", extra={"tool": params.name})
            return _complete(tool_failure(HiveFault(f"{params.name} failed inside the hive; its log says why")))
        if answer.lists_changed:
            await self._let_fetch(ctx, caller)
        return _result(answer)

    async def _let_fetch(self, ctx: Context, caller: Admitted) -> None:
        """Hold the answer to a change back until the caller's client has fetched the new list.

        So its host's next request to the model has the new tools.
        """
        client = _client_key(ctx, caller)
        if not _is_stateless(ctx) and not self._notices.hears(client):
            # on the call's own stream, since the host has no other open; it need not read that before the answer
            await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)
            return
        await self._notices.until_fetched(client, self._settings.list_fetch_seconds)

    def _parse(self, caller: Admitted, name: str, arguments: dict[str, Any]) -> BaseModel:
        if is_guest(caller):
            raise unknown_to_guest(self._sandboxes.registry, caller.principal, name)
        tool = HIVE_TOOLS.get(name) or UNLISTED_TOOLS.get(name)
        if tool is None:
            raise self._unknown_tool(caller, name)
        given = {key: value for key, value in arguments.items() if value is not None}  # models write null for absent
        try:
            return tool.ask.model_validate(with_session(given))
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
        if sandbox.toolset is not None and any(tool.name == split[1] for tool in sandbox.toolset.tools):
            # the relay passes on whatever it has a route for; another replica has just made this one
            return ConnectFailed(f"the way to sandbox {sandbox.session} is not known on this replica yet; try again")
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
        del params
        if is_guest(self._caller(ctx.request)):
            return types.ListResourceTemplatesResult(resource_templates=[])
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
        if is_guest(caller):
            raise no_resource(uri)
        await self._operations.catch_up()
        try:
            contents = await self._operations.read(caller, session, uri)
        except AshError as error:
            self._operations.refused(caller, "resources/read", error)
            # the stateless era has one code for a resource that is not there
            code = types.INVALID_PARAMS if isinstance(error, NotFound) else jsonrpc_code(error)
            raise MCPError(code, error.message, {"uri": uri, **failure_to_json(error)}) from error
        return _complete({"contents": contents})

    async def _listen(
        self, ctx: Context, params: types.SubscriptionsListenRequestParams
    ) -> types.SubscriptionsListenResult:
        caller = self._caller(ctx.request)
        owner, scope = caller.principal.subject, caller.scope
        handler = self._notices.listener(owner, scope)
        if not params.notifications.tools_list_changed:
            return await handler(ctx, params)
        with self._notices.listening(_client_key(ctx, caller), owner, scope):
            return await handler(ctx, params)

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


def _is_stateless(ctx: Context) -> bool:
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS


def _client_info(ctx: Context) -> types.Implementation | None:
    params = ctx.session.client_params
    return None if params is None else params.client_info


def _client_key(ctx: Context, caller: Admitted) -> ClientKey:
    request: Any = ctx.request
    if not _is_stateless(ctx):
        return str(request.headers.get(SESSION_HEADER))
    info = _client_info(ctx)
    named = () if info is None else (info.name[:MAX_NAME_CHARS], info.version[:MAX_NAME_CHARS])
    return (caller.principal.subject, caller.scope, *named)


def _result(answer: Answer) -> dict[str, Any]:
    return _complete({"content": [{"type": "text", "text": answer.text}], "structuredContent": answer.structured})


def _complete(result: dict[str, Any]) -> dict[str, Any]:
    """Mark a result as final, as the stateless era wants it; the SDK drops the mark for older clients."""
    return {**result, "resultType": "complete"}


def _recipe_line(catalog: Catalog) -> str:
    return "Recipes: " + "; ".join(f"{recipe.name} ({recipe.description})" for recipe in catalog) + "."
