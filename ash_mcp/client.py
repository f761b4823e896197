"""The client of a hive: spawn sandboxes, list them, attach to them, destroy them."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from ash_mcp._connection import Connection, OnProgress
from ash_mcp._hive_answers import (
    read_info,
    read_infos,
    read_names,
    read_runs,
    read_share,
    read_snapshots,
    share_asked,
    structured,
)
from ash_mcp._many import SpawnedMany, spawn_many
from ash_mcp.errors import AshError, LocalProtocolError, SandboxGone, SandboxNotFound
from ash_mcp.run import Run
from ash_mcp.sandbox import Sandbox
from ash_mcp.settings import ClientSettings
from ash_mcp.types import Resources, RunInfo, SandboxInfo, SnapshotInfo

if TYPE_CHECKING:
    import httpx

__all__ = ["Destroyed", "Hive", "SpawnedMany", "Spawning"]

_EVERYTHING: Final = "*"
_DESTROY_AT_ONCE: Final = 1000
"""How many sandboxes one `destroy` may name."""

_CLEANUP_SECONDS: Final = 30.0
_FORKED: Final = (
    "recipe",
    "env",
    "secrets",
    "resources",
    "network",
    "result_bytes",
    "ports",
    "labels",
    "ttl_seconds",
    "idle_seconds",
)
"""What a fork has in common with what it was forked from."""


@dataclass(frozen=True, slots=True)
class Destroyed:
    """The result of `destroy`: what ended now, what had ended before, and names without a sandbox."""

    destroyed: Sequence[SandboxInfo]
    already_ended: Sequence[SandboxInfo]
    not_found: Sequence[str]


class Hive:
    """A hive of sandboxes. One object serves thousands of them at once, over one pool of connections.

    `async with Hive() as hive:` closes the pool at the end; no sandbox ends by that. It connects at the first call.

    Args:
        url: Its MCP endpoint; else `ASH_URL`, else this user's running hive, else `http://127.0.0.1:8420/mcp`.
        token: Its key; else `ASH_TOKEN`.
        scope: The part of the hive to work in; else `ASH_SCOPE`, else the default scope.
        timeout_seconds: The bound of every call that names none; else `ASH_TIMEOUT_SECONDS`, else 300.
        settings: All of these and more; url, token, scope and timeout are then ignored.
        transport: Takes the place of the network, in tests.

    Raises:
        ConfigError: A value cannot be used; the message names it.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        scope: str | None = None,
        *,
        timeout_seconds: float | None = None,
        settings: ClientSettings | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings or ClientSettings.from_environment(
            url=url, token=token, scope=scope, timeout_seconds=timeout_seconds
        )
        self._connection = Connection(self.settings, transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Idempotent; sandboxes live on."""
        with anyio.CancelScope(shield=True):
            await self._connection.aclose()

    def spawn(
        self,
        recipe: str | Mapping[str, Any] | None = None,
        *,
        session: str | None = None,
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        ports: Sequence[int] = (),
        resources: Resources | Mapping[str, Any] | None = None,
        node_selector: Mapping[str, str] | None = None,
        runtime_class: str | None = None,
        network: str | Sequence[str] | None = None,
        result_bytes: int | None = None,
        share: bool | Mapping[str, Any] = False,
        ttl_seconds: float | None = None,
        idle_seconds: float | None = None,
        labels: Mapping[str, str] | None = None,
        run: str | None = None,
        snapshot: SnapshotInfo | str | None = None,
        idempotency_key: str | None = None,
        timeout_seconds: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Spawning:
        """Make a sandbox. As a context manager it is destroyed at the end; else it lives until it is destroyed.

        What is None is left to the hive and the recipe. The async SDK returns a `Spawning`, and makes the sandbox when
        that is awaited or entered.

        Args:
            recipe: Its name, or where the hive allows it a whole recipe.
            session: The name under which its tools appear; chosen by the hive if None.
            image: A container image, where the backend has images.
            env: Environment variables inside.
            secrets: The same, but never logged, listed or stored.
            ports: Ports inside that may be reached: `Sandbox.url`, `Sandbox.port_url` and `Sandbox.share`.
            resources: Requests and limits of cpu and memory.
            node_selector: Labels of the nodes that it may run on, in a cluster.
            runtime_class: Such as `gvisor`, in a cluster.
            network: `none`, `internet`, or domains.
            result_bytes: How long a tool's result may be before parts of it are kept as files inside; 0: any length.
            share: Share it at once: `Sandbox.spawn_share` has the token. True: all its tools; else the arguments of
                `Sandbox.share`. Where it cannot be shared so, it ends.
            ttl_seconds: How long it lives at most.
            idle_seconds: How long it lives without a call.
            labels: Labels to list by.
            run: Name or id of an open run that shall own it: it ends with that. `Run.spawn` says it by itself.
            snapshot: What its files begin as, copy on write: a snapshot, or its id. Its recipe is the snapshot's; only
                an inline one must be given again.
            idempotency_key: The same key gives the same sandbox; one is made up if None, so that a spawn whose
                answer was lost can be repeated.
            timeout_seconds: The bound of the spawn, waiting for capacity included.
            on_progress: Called with the progress of the start.

        Raises:
            RecipeNotFound: It is unknown; the message lists what there is.
            SessionTaken: A living sandbox has that name.
            RunEnded: The run is not open any more.
            SnapshotNotFound: There is no such snapshot, or no longer.
            CapacityExceeded: There was no room until the bound.
            StartFailed: It did not start; `data` has the step and the end of its log.
        """
        given = {
            "recipe": dict(recipe) if isinstance(recipe, Mapping) else recipe,
            "session": session,
            "image": image,
            "env": _plain(env),
            "secrets": _plain(secrets),
            "ports": list(ports) or None,
            "resources": _resources(resources),
            "node_selector": _plain(node_selector),
            "runtime_class": runtime_class,
            "network": network if isinstance(network, str) or network is None else list(network),
            "result_bytes": result_bytes,
            "share": share_asked(**({} if share is True else share)) if share is not False else None,
            "ttl_seconds": ttl_seconds,
            "idle_seconds": idle_seconds,
            "labels": _plain(labels),
            "run": run,
            "snapshot": snapshot.id if isinstance(snapshot, SnapshotInfo) else snapshot,
            "idempotency_key": idempotency_key or uuid.uuid4().hex,
        }
        arguments = {name: value for name, value in given.items() if value is not None}

        async def make() -> Sandbox:
            raw = await self._connection.call_tool(
                "spawn", arguments, timeout_seconds=timeout_seconds, repeatable=True, on_progress=on_progress
            )
            shape = structured(raw)
            made = read_share(shape["share"]) if shape.get("share") else None
            return Sandbox(self._connection, read_info(shape), arguments, made)

        return Spawning(make)

    async def spawn_many(
        self,
        count: int,
        recipe: str | Mapping[str, Any] | None = None,
        *,
        at_once: int = 16,
        timeout_seconds: float | None = None,
        on_ready: Callable[[int, SandboxInfo | AshError], None] | None = None,
        **asked: Any,
    ) -> SpawnedMany:
        """Make several sandboxes alike, and say of each what became of it. Those that fail end none of the others.

        A call that is cancelled ends those that it made.

        Args:
            count: How many.
            recipe: As with `spawn`.
            at_once: How many are asked for at the same time; how many of these start at once is the hive's.
            timeout_seconds: The bound of all together, waiting for capacity included; None is the hive's
                `timeout_seconds`. What is not ready by then has failed, and the rest is returned.
            on_ready: Called with the index and the outcome of each, as they come; in the sync SDK by another thread.
            asked: The other arguments of `spawn`, the same for each; an `idempotency_key` gives each one of its own.

        Raises:
            ConfigError: An argument cannot be one of several alike.
        """
        limit = self.settings.timeout_seconds if timeout_seconds is None else timeout_seconds
        return await spawn_many(
            self.spawn, count, recipe, asked, at_once=at_once, timeout_seconds=limit, on_ready=on_ready
        )

    async def fork(
        self,
        box: Sandbox,
        count: int,
        *,
        at_once: int = 16,
        timeout_seconds: float | None = None,
        on_ready: Callable[[int, SandboxInfo | AshError], None] | None = None,
        **asked: Any,
    ) -> SpawnedMany:
        """Make sandboxes with the files of another as they are now, copy on write, as `spawn_many` does.

        The other's processes are ended by that, and it goes on with the same files (`Sandbox.snapshot`). All have the
        recipe, environment, secrets, resources, network and run of its spawn, if this hive has spawned it; `asked`
        says otherwise.

        Raises:
            Unsupported: The hive's backend, or its host, has no snapshots.
        """
        kept = {name: box.asked[name] for name in _FORKED if name in box.asked}
        recipe = {**kept, **asked}.get("recipe")
        given = {name: value for name, value in {**kept, **asked}.items() if name != "recipe"}
        if box.info.run is not None:
            given.setdefault("run", box.info.run)
        taken = await box.snapshot()
        try:
            return await self.spawn_many(
                count,
                recipe,
                at_once=at_once,
                timeout_seconds=timeout_seconds,
                on_ready=on_ready,
                snapshot=taken,
                **given,
            )
        finally:
            with anyio.move_on_after(_CLEANUP_SECONDS, shield=True):
                await self.remove_snapshots(taken)

    async def snapshots(self) -> Sequence[SnapshotInfo]:
        """Return the caller's snapshots, oldest first."""
        raw = await self._connection.call_tool("snapshot", {"action": "list"}, repeatable=True)
        return read_snapshots(structured(raw))

    async def remove_snapshots(self, *snapshots: SnapshotInfo | str) -> Sequence[str]:
        """Remove snapshots, and return the ids of those that there were. What was started from them goes on."""
        if not snapshots:
            return []
        ids = [it.id if isinstance(it, SnapshotInfo) else it for it in snapshots]
        asked = {"action": "remove", "snapshot_ids": ids}
        return read_names(structured(await self._connection.call_tool("snapshot", asked, repeatable=True)), "removed")

    def run(self, name: str, *, lease_seconds: float = 60.0, join: bool = False) -> Run:
        """Return a run, to be entered: it owns what is spawned in it, and ends all of that when it ends.

        While it is entered its lease is renewed in the background. A process that dies renews nothing, so that what
        it had spawned is gone after `lease_seconds`.

        Args:
            name: Of one open run at a time.
            lease_seconds: How long it lives without being renewed, at least 1. Longer than the longest time for which
                this process, or its way to the hive, may stand still.
            join: Enter the run of that name that another process has opened, and leave it open at the end.
        """
        return Run(self, self._connection, name, lease_seconds=lease_seconds, join=join)

    async def runs(self) -> Sequence[RunInfo]:
        """Return the caller's open runs, in the order in which they were opened."""
        raw = await self._connection.call_tool("list", {"include_ended": False}, repeatable=True)
        return read_runs(structured(raw), "runs")

    async def destroy_run(self, name: str) -> Destroyed:
        """End a run, by its name or id, with all that was spawned in it; one that has ended already is no error.

        Raises:
            RunNotFound: There is none of that name.
        """
        raw = await self._connection.call_tool("destroy", {"run": name}, repeatable=True)
        return _destroyed(structured(raw))

    async def attach(self, session: str) -> Sandbox:
        """Return the handle of a living sandbox, by its session name or id.

        Raises:
            SandboxNotFound: There is none of that name.
            SandboxGone: It has ended; `data["reason"]` says why.
        """
        named = [info for info in await self.list(include_ended=True) if session in (info.session, info.id)]
        living = [info for info in named if not info.state.ended]
        if living:
            return Sandbox(self._connection, living[0])
        if not named:
            raise SandboxNotFound(f"there is no sandbox {session!r}; `list` shows what there is", session=session)
        last = max(named, key=lambda info: info.created_at)
        reason = last.reason.value if last.reason is not None else None
        raise SandboxGone(
            f"sandbox {session!r} has ended ({last.message or reason or last.state.value}); spawn a new one",
            reason=reason,
            sandbox_id=last.id,
        )

    async def list(
        self, *, labels: Mapping[str, str] | None = None, run: str | None = None, include_ended: bool = False
    ) -> Sequence[SandboxInfo]:
        """Return the caller's sandboxes, oldest first.

        Args:
            labels: Only those that have all of these.
            run: Only those of the run of that name or id.
            include_ended: Those too that ended within the last hour, with the reason.
        """
        arguments: dict[str, Any] = {"include_ended": include_ended}
        if labels is not None:
            arguments["labels"] = dict(labels)
        if run is not None:
            arguments["run"] = run
        raw = await self._connection.call_tool("list", arguments, repeatable=True)
        return read_infos(structured(raw), "sandboxes")

    async def extend(self, session: str, seconds: float) -> SandboxInfo:
        """Let a sandbox live for `seconds` from now.

        Raises:
            SandboxNotFound: There is none of that name.
        """
        arguments = {"session": session, "ttl_seconds": seconds}
        return read_info(structured(await self._connection.call_tool("extend", arguments, repeatable=True)))

    async def set_network(self, session: str, policy: str | Sequence[str]) -> SandboxInfo:
        """Change what a sandbox may reach, as `Sandbox.set_network` does.

        Raises:
            SandboxNotFound: There is none of that name.
        """
        arguments = {"session": session, "policy": policy if isinstance(policy, str) else list(policy)}
        return read_info(structured(await self._connection.call_tool("network", arguments, repeatable=True)))

    async def destroy(self, *sessions: str) -> Destroyed:
        """End sandboxes by session name or id. Idempotent."""
        destroyed: list[SandboxInfo] = []
        ended: list[SandboxInfo] = []
        missing: list[str] = []
        for start in range(0, len(sessions), _DESTROY_AT_ONCE):
            done = await self._destroy(list(sessions[start : start + _DESTROY_AT_ONCE]))
            destroyed += done.destroyed
            ended += done.already_ended
            missing += done.not_found
        return Destroyed(destroyed, ended, missing)

    async def destroy_all(self) -> Destroyed:
        """End every sandbox of the caller's in this scope."""
        return await self._destroy(_EVERYTHING)

    async def _destroy(self, session: str | Sequence[str]) -> Destroyed:
        raw = await self._connection.call_tool("destroy", {"session": session}, repeatable=True)
        return _destroyed(structured(raw))

    def __repr__(self) -> str:
        return f"<Hive {self.settings.url}>"


class Spawning:
    """A spawn that has not begun: await it for the sandbox, or enter it to have that destroyed at the end."""

    def __init__(self, run: Callable[[], Awaitable[Sandbox]]) -> None:
        self._run: Callable[[], Awaitable[Sandbox]] | None = run
        self._box: Sandbox | None = None

    def __await__(self) -> Generator[Any, Any, Sandbox]:
        return self._start().__await__()

    def _start(self) -> Awaitable[Sandbox]:
        run, self._run = self._run, None
        if run is None:
            raise LocalProtocolError("a spawn makes one sandbox; call hive.spawn() again for another")
        return run()

    async def __aenter__(self) -> Sandbox:
        self._box = await self._start()
        return self._box

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._box is None:
            return
        try:
            with anyio.fail_after(_CLEANUP_SECONDS, shield=True):
                await self._box.destroy()
        except (AshError, TimeoutError) as failure:
            if error is None:
                raise
            error.add_note(f"and {self._box!r} may still run: {failure}")


def _destroyed(shape: Mapping[str, Any]) -> Destroyed:
    return Destroyed(
        read_infos(shape, "destroyed"), read_infos(shape, "already_ended"), read_names(shape, "not_found")
    )


def _plain(values: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(values) if values else None


def _resources(resources: Resources | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if resources is None:
        return None
    if not isinstance(resources, Resources):
        return dict(resources)
    shape: dict[str, dict[str, Any]] = asdict(resources)
    return {
        part: {name: value for name, value in amounts.items() if value is not None} for part, amounts in shape.items()
    }
