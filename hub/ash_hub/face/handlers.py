"""The operations behind the hive's own tools: validated arguments in, a JSON result and the same as text out.

Here is neither MCP nor HTTP: `server.py` validates the arguments of a request and writes the answer.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

import anyio

from ash_hub.backends.base import Backend
from ash_hub.face.answer import Answer
from ash_hub.face.arguments import (
    DEFAULT_LEASE_SECONDS,
    CallAsk,
    DestroyAsk,
    ExtendAsk,
    ListAsk,
    LogsAsk,
    NetworkAsk,
    ReadAsk,
    RunAsk,
    SpawnAsk,
    SpawnSomeAsk,
    ToolsAsk,
)
from ash_hub.face.results import spawned, spawned_several, text_of_tools
from ash_hub.face.sharing import ShareAsk, ShareTool
from ash_hub.face.snapshots import ResetAsk, SnapshotAsk, SnapshotTools
from ash_hub.face.transfers import CopyAsk, DownloadAsk, TransferTools, UploadAsk
from ash_hub.lifecycle.batches import Batch, spawn_batch
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.lifecycle.snapshots import SnapshotVerbs
from ash_hub.serving.audit import Audit
from ash_hub.settings import HubSettings
from ash_hub.spawning.runner_client import RunnerClient
from ash_hub.spawning.server_client import ServerClient
from ash_hub.spawning.starting import Progress
from ash_hub.spawning.toolsets import Listing
from ash_mcp.errors import (
    AshError,
    ConfigError,
    ConnectFailed,
    PermissionDenied,
    RequestRefused,
    RunEnded,
    SandboxNotFound,
    Unsupported,
)
from ash_mcp.types import RunId, RunInfo
from ash_mcp.wire import failure_to_json, info_to_json, network_text, run_to_json
from ash_router.admission.base import Admitted
from ash_router.admission.tickets import Tickets
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["HiveOperations"]

SANDBOX_SCHEME: Final = "sandbox://"
MAX_RESOURCE_BYTES: Final = 512 * 1024
"""Clients refuse events over 1 MiB, and base64 adds a third."""
_READ_SECONDS: Final = 30.0
_CLEANUP_SECONDS: Final = 10.0
_OF_OWNERS: Final = (SpawnAsk, RunAsk, DestroyAsk, ExtendAsk, SnapshotAsk, ResetAsk)
"""What a key for one sandbox may not ask for."""


class HiveOperations:
    """One operation for each of the hive's tools, with the caller's rights, and the reading of resources."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        backend: Backend,
        tokens: CallTokens,
        settings: HubSettings,
        audit: Audit,
        sharing: ShareTool,
        tickets: Tickets,
        snapshots: SnapshotVerbs,
        catch_up: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.catch_up = catch_up
        """Learns which sandboxes other replicas have made and ended until now (`Controller.catch_up`)."""
        self._sandboxes = sandboxes
        self._backend = backend
        self._tokens = tokens
        self._settings = settings
        self._audit = audit
        self._clock = clock
        self._sharing = sharing
        self._transfers = TransferTools(sandboxes, tokens, tickets, audit, clock)
        self._snapshots = SnapshotTools(snapshots, audit, self._shape, clock)
        self._by_ask: Mapping[type[Any], Callable[[Admitted, Any, Progress], Awaitable[Answer]]] = {
            SpawnSomeAsk: self._spawn_some,
            RunAsk: self._run,
            DestroyAsk: self._destroy,
            ListAsk: self._list,
            ExtendAsk: self._extend,
            NetworkAsk: self._network,
            CallAsk: self._call,
            ReadAsk: self._read,
            ToolsAsk: self._tools,
            LogsAsk: self._logs,
            ShareAsk: self._share,
            UploadAsk: self._upload,
            DownloadAsk: self._download,
            CopyAsk: self._copy,
            SnapshotAsk: self._snapshot,
            ResetAsk: self._reset,
        }

    async def answer(self, caller: Admitted, ask: object, progress: Progress) -> Answer:
        """Run the operation that the type of `ask`, the validated arguments of a tool, stands for.

        Raises:
            AshError: The operation was refused or failed.
        """
        if caller.principal.share is not None:
            raise PermissionDenied("a share opens tools of its sandbox, and none of the hive")
        if caller.principal.sandbox is not None and isinstance(ask, _OF_OWNERS):
            raise PermissionDenied(
                "your key is for one sandbox only: it may neither make nor end nor extend any, nor take it back"
            )
        if not isinstance(ask, SpawnAsk):
            await self.catch_up()
        return await self._by_ask[type(ask)](caller, ask, progress)

    def refused(self, caller: Admitted, action: str, error: AshError) -> None:
        """Write an audit line if `error` is a refusal (`RequestRefused`).

        Args:
            action: The tool, or another request such as `resources/read`.
        """
        if isinstance(error, RequestRefused) and action != "spawn":  # a spawn has its line already
            self._audit.refused(caller, action, error)

    async def _spawn(self, caller: Admitted, ask: SpawnSomeAsk, progress: Progress) -> Answer:
        is_old = self._exists(caller, ask)
        try:
            sandbox = await self._sandboxes.spawn(caller.principal, caller.scope, ask, progress)
        except AshError as error:
            self._audit.spawn_failed(caller, error)
            raise
        self._audit.spawned(caller, sandbox, variables=len(ask.env), secrets=len(ask.secrets))
        share = await self._share_new(caller, ask, sandbox, is_old=is_old)
        shape, text = spawned(self._shape(sandbox), sandbox.session, self._listing(sandbox), share=share)
        return Answer(shape, text, lists_changed=True)

    def _exists(self, caller: Admitted, ask: SpawnSomeAsk) -> bool:
        """Return whether a spawn that shares, with its idempotency key, has made its sandbox already."""
        if ask.share is None or ask.idempotency_key is None:
            return False  # else every spawn would look at all sandboxes
        owned = self._sandboxes.registry.of(caller.principal, caller.scope)
        return any(sandbox.key == ask.idempotency_key for sandbox in owned)

    async def _share_new(
        self, caller: Admitted, ask: SpawnSomeAsk, sandbox: Sandbox, *, is_old: bool
    ) -> Answer | None:
        """Share a sandbox as its spawn asked for. One that cannot be shared so ends, unless it was there before."""
        if ask.share is None:
            return None
        try:
            return await self._sharing.answer(caller, ShareAsk(session=sandbox.id, **ask.share.model_dump()))
        except BaseException:
            if not is_old:
                with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
                    await self._sandboxes.destroy([sandbox])
            raise

    async def _spawn_some(self, caller: Admitted, ask: SpawnSomeAsk, progress: Progress) -> Answer:
        if ask.share is not None and ask.count > 1:
            raise ConfigError("share goes with a spawn of one; of several, share each with the tool share")
        if ask.count == 1 and ask.deadline_seconds is None:
            return await self._spawn(caller, ask, progress)
        is_old = self._exists(caller, ask)
        batch = await self._batch(caller, ask, progress)
        if not batch.made:
            raise batch.failed[0]
        first = batch.sandboxes[0]
        failures = [failure_to_json(batch.failed[index]) for index in sorted(batch.failed)]
        more = spawned_several([sandbox.session for sandbox in batch.sandboxes], failures) if ask.count > 1 else {}
        share = await self._share_new(caller, ask, first, is_old=is_old)
        shape, text = spawned(self._shape(first), first.session, self._listing(first), more, share)
        return Answer(shape, text, lists_changed=True)

    async def _batch(self, caller: Admitted, ask: SpawnSomeAsk, progress: Progress) -> Batch:
        try:
            batch = await spawn_batch(
                self._sandboxes,
                caller.principal,
                caller.scope,
                ask,
                ask.count,
                progress,
                at_once=ask.at_once,
                deadline_seconds=ask.deadline_seconds,
            )
        except AshError as error:
            self._audit.spawn_failed(caller, error)
            raise
        for sandbox in batch.sandboxes:
            self._audit.spawned(caller, sandbox, variables=len(ask.env), secrets=len(ask.secrets))
        for error in batch.failed.values():
            self._audit.spawn_failed(caller, error)
        return batch

    async def _run(self, caller: Admitted, ask: RunAsk, progress: Progress) -> Answer:
        del progress
        runs, principal, scope = self._sandboxes.runs, caller.principal, caller.scope
        if ask.renew:
            run_id = RunId(ask.run_id) if ask.run_id is not None else None
            info = await runs.renew(principal, scope, ask.run, run_id, ask.lease_seconds)
        elif ask.run_id is not None:
            raise ConfigError("run_id goes with renew=true; a run that is opened gets its own")
        else:
            lease = ask.lease_seconds or DEFAULT_LEASE_SECONDS
            info = await runs.open(principal, scope, ask.run, lease, ask.idempotency_key)
        text = (
            f'Run {info.name} ({info.id}) is open: spawn(run="{info.name}") makes sandboxes in it. It ends with them '
            f'in {info.left_seconds:.0f} s unless you call run(run="{info.name}", renew=true) before; '
            f'destroy(run="{info.name}") ends it at once.'
        )
        return Answer(run_to_json(info), text)

    async def _destroy(self, caller: Admitted, ask: DestroyAsk, progress: Progress) -> Answer:
        del progress
        if ask.run is not None:
            return await self._destroy_run(caller, ask.run)
        living, ended, unknown = self._targets(caller, ask)
        await self._sandboxes.destroy(living)
        for sandbox in living:
            self._audit.destroyed(caller, sandbox)
        if unknown:
            self._audit.refused(caller, "destroy", SandboxNotFound(f"no sandbox {', '.join(unknown)}"))
        shape = {
            "destroyed": [self._shape(sandbox) for sandbox in living],
            "already_ended": [self._shape(sandbox) for sandbox in ended],
            "not_found": unknown,
        }
        said = [f"Ended {', '.join(s.session for s in living)}." if living else "Nothing was running to end."]
        said += [f"{s.session} had ended before: {s.reason}." for s in ended]
        said += [f"There is no sandbox {name} of yours." for name in unknown]
        return Answer(shape, " ".join(said), lists_changed=bool(living))

    async def _destroy_run(self, caller: Admitted, name: str) -> Answer:
        try:
            ended = await self._sandboxes.destroy_run(caller.principal, caller.scope, name)
        except RunEnded as error:
            empty: dict[str, Any] = {"destroyed": [], "already_ended": [], "not_found": [], "run": name}
            return Answer(empty, f"Nothing was left to end: {error.message}")
        for sandbox in ended:
            self._audit.destroyed(caller, sandbox)
        shape = {"destroyed": [self._shape(it) for it in ended], "already_ended": [], "not_found": [], "run": name}
        return Answer(shape, f"Ended run {name} and its {len(ended)} sandboxes.", lists_changed=bool(ended))

    def _targets(self, caller: Admitted, ask: DestroyAsk) -> tuple[list[Sandbox], list[Sandbox], list[str]]:
        """Return the sandboxes to destroy that live, those that have ended, and the names that are unknown."""
        registry = self._sandboxes.registry
        assert ask.session is not None, "a run is ended elsewhere"
        if ask.session == "*":
            return registry.of(caller.principal, caller.scope), [], []
        named = [ask.session] if isinstance(ask.session, str) else ask.session
        living: dict[str, Sandbox] = {}
        ended: dict[str, Sandbox] = {}
        unknown: list[str] = []
        for name in named:
            try:
                sandbox = registry.find(caller.principal, caller.scope, name)
            except SandboxNotFound:
                unknown.append(name)
            else:
                (ended if sandbox.state.ended else living)[sandbox.id] = sandbox
        return list(living.values()), list(ended.values()), unknown

    async def _list(self, caller: Admitted, ask: ListAsk, progress: Progress) -> Answer:
        del progress
        found = self._sandboxes.registry.of(caller.principal, caller.scope, ended=ask.include_ended, labels=ask.labels)
        if ask.run is not None:
            found = [it for it in found if (of := it.record.run) is not None and ask.run in (of.name, of.id)]
        shapes = [self._shape(sandbox) for sandbox in found]
        runs = [run_to_json(info) for info in await self._open_runs(caller) if ask.run in (None, info.name, info.id)]
        lines = [
            f"- {shape['session']}: {shape['status']}, {shape['recipe']}, {shape['age_seconds']} s old"
            f", network {network_text(shape['network'])}"
            + (f", run {shape['run']}" if shape["run"] else "")
            + (
                f", ended: {shape['reason']} {shape['message'] or ''}".rstrip()
                if shape["ended_at"]
                else f", expires {shape['expires_at']}"
            )
            for shape in shapes
        ]
        lines = lines or ["No sandboxes. Call spawn to get one."]
        lines += [f"- run {run['run']}: open, ends in {run['left_seconds']:.0f} s unless renewed" for run in runs]
        return Answer({"sandboxes": shapes, "runs": runs}, "\n".join(lines))

    async def _open_runs(self, caller: Admitted) -> Sequence[RunInfo]:
        """Return the caller's open runs; none while the store is away."""
        try:
            return await self._sandboxes.runs.list(caller.principal, caller.scope)
        except ConnectFailed:
            return ()  # sandboxes are shown without the store, too, each with its run

    async def _extend(self, caller: Admitted, ask: ExtendAsk, progress: Progress) -> Answer:
        del progress
        sandbox = await self._sandboxes.extend(caller.principal, caller.scope, ask.session, ask.ttl_seconds)
        shape = self._shape(sandbox)
        return Answer(shape, f"Sandbox {sandbox.session} now lives until {shape['expires_at']}.")

    async def _network(self, caller: Admitted, ask: NetworkAsk, progress: Progress) -> Answer:
        del progress
        sandbox = await self._sandboxes.set_network(caller.principal, caller.scope, ask.session, ask.policy)
        self._audit.network_set(caller, sandbox, network_text(sandbox.record.network))
        shape = self._shape(sandbox)
        return Answer(shape, f"Sandbox {sandbox.session} has network: {network_text(shape['network'])}.")

    async def _share(self, caller: Admitted, ask: ShareAsk, progress: Progress) -> Answer:
        del progress
        return await self._sharing.answer(caller, ask)

    async def _upload(self, caller: Admitted, ask: UploadAsk, progress: Progress) -> Answer:
        del progress
        return await self._transfers.upload(caller, ask)

    async def _download(self, caller: Admitted, ask: DownloadAsk, progress: Progress) -> Answer:
        del progress
        return await self._transfers.download(caller, ask)

    async def _copy(self, caller: Admitted, ask: CopyAsk, progress: Progress) -> Answer:
        del progress
        return await self._transfers.copy(caller, ask)

    async def _snapshot(self, caller: Admitted, ask: SnapshotAsk, progress: Progress) -> Answer:
        del progress
        return await self._snapshots.snapshot(caller, ask)

    async def _reset(self, caller: Admitted, ask: ResetAsk, progress: Progress) -> Answer:
        del progress
        return await self._snapshots.reset(caller, ask)

    async def _call(self, caller: Admitted, ask: CallAsk, progress: Progress) -> Answer:
        """Always raise: the relay takes every `call` that it can pass on to a sandbox, so this one is malformed."""
        del progress
        sandbox = self._sandboxes.ready(caller.principal, caller.scope, ask.session)
        raise ConfigError(
            f"the call could not be passed to {sandbox.session}: send session, tool and arguments as plain JSON, "
            "each key once"
        )

    async def _read(self, caller: Admitted, ask: ReadAsk, progress: Progress) -> Answer:
        del progress
        contents = await self.read(caller, ask.session, ask.uri)
        text = "\n".join(str(part.get("text", f"({part.get('mimeType')}, base64)")) for part in contents)
        return Answer({"contents": contents}, text)

    async def read(self, caller: Admitted, session: str, uri: str) -> list[dict[str, Any]]:
        """Return the contents of a file (`sandbox://<session>/<path>`) or of one of the sandbox's own resources.

        Raises:
            ConfigError: The URI names no file, or a file of another sandbox than `session`.
            AshError: The sandbox is not there or not ready, or could not be read.
        """
        if not uri.startswith(SANDBOX_SCHEME):
            sandbox = self._sandboxes.ready(caller.principal, caller.scope, session)
            return [dict(part) for part in await self._client(sandbox).read_resource(uri, _READ_SECONDS)]
        named, slash, path = uri.removeprefix(SANDBOX_SCHEME).partition("/")
        if not slash or not path:
            raise ConfigError(f"{uri!r} names no file; write sandbox://{session}/PATH")
        sandbox = self._sandboxes.ready(caller.principal, caller.scope, session)
        if self._sandboxes.registry.find(caller.principal, caller.scope, named) is not sandbox:
            raise ConfigError(f"{uri!r} is of sandbox {named}, not of {session}")
        client = self._client(sandbox)
        if not isinstance(client, RunnerClient):
            raise Unsupported(
                f"sandbox {sandbox.session} is an image that serves MCP by itself, without a runner that could read "
                "its files: call a tool of its own, or read a resource that it lists"
            )
        # sandbox://sb1/notes.txt is relative to the workspace, sandbox://sb1//etc/hosts is absolute
        raw = await client.read_file(unquote(path), MAX_RESOURCE_BYTES, _READ_SECONDS)
        try:
            return [{"uri": uri, "mimeType": "text/plain", "text": raw.decode()}]
        except UnicodeDecodeError:
            blob = base64.b64encode(raw).decode()
            return [{"uri": uri, "mimeType": "application/octet-stream", "blob": blob}]

    async def _tools(self, caller: Admitted, ask: ToolsAsk, progress: Progress) -> Answer:
        del progress
        sandbox = self._sandboxes.ready(caller.principal, caller.scope, ask.session)
        assert sandbox.toolset is not None, "a ready sandbox has its tools pinned"
        tools = [tool.fields() for tool in sandbox.toolset.tools]
        return Answer({"tools": tools}, text_of_tools(sandbox.session, self._listing(sandbox)))

    async def _logs(self, caller: Admitted, ask: LogsAsk, progress: Progress) -> Answer:
        del progress
        sandbox = self._sandboxes.registry.find(caller.principal, caller.scope, ask.session)
        text = (await self._backend.logs(sandbox.id, tail_bytes=ask.tail_bytes)).decode(errors="replace")
        return Answer({"log": text}, text)

    def _shape(self, sandbox: Sandbox) -> dict[str, Any]:
        return info_to_json(self._sandboxes.info(sandbox), now=self._clock())

    def _listing(self, sandbox: Sandbox) -> Listing:
        if sandbox.toolset is None:  # it ended after it was found
            raise sandbox.gone(self._clock())
        return sandbox.toolset.listing(sandbox.session, self._settings.name_limit)

    def _client(self, sandbox: Sandbox) -> RunnerClient | ServerClient:
        assert sandbox.endpoint is not None, "a ready sandbox has an endpoint"
        if sandbox.endpoint.has_runner:
            return RunnerClient(sandbox.endpoint, self._tokens, sandbox.id)
        return ServerClient(sandbox.endpoint, self._tokens.sandbox_keys, sandbox.id, self._backend.unready)
