"""The requests of the seed's REST: spawn, deprovision, deprovision-all."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, cast

import anyio
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ash_hub.backends.base import Backend
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.rest.openapi import description
from ash_hub.rest.shapes import Deprovisioned, DeprovisionedAll, Failure, Spawned
from ash_hub.rest.spawn_body import ask_of, new_name, new_uuid, read_body, read_key
from ash_hub.rest.starts import Start, Starts
from ash_hub.serving.audit import Audit
from ash_hub.settings import HubSettings
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_mcp.errors import AshError, CapacityExceeded, ConfigError, Conflict, PermissionDenied, SandboxNotFound
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, State
from ash_mcp.wire import http_status
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.store.base import Store

__all__ = ["MAX_BODY_BYTES", "SeedRest"]

MAX_BODY_BYTES: Final = 2**20
_NAMESPACE: Final = "ash"
"""Where the backend has none."""

Handler = Callable[[Request, Admitted], Awaitable[Response]]


class BodyTooLarge(ConfigError):
    """The body of a request is longer than `MAX_BODY_BYTES`."""


class SeedRest:
    """The requests, and who looks after spawns that outlive theirs."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        settings: HubSettings,
        audit: Audit,
        catch_up: Callable[[], Awaitable[None]],
        store: Store,
        backend: Backend,
    ) -> None:
        self.starts = Starts(settings.limits.sandboxes)
        self._sandboxes = sandboxes
        self._settings = settings
        self._audit = audit
        self._catch_up = catch_up
        self._store = store
        described = backend.describe()
        self._namespace = str(described.get("namespace") or _NAMESPACE)
        self._runs_images = described.get("image_servers") is True

    def routes(self) -> Sequence[Route]:
        described = description()

        async def openapi(_: Request) -> Response:
            return JSONResponse(described)

        return [
            Route("/spawn", _answering(self._spawn), methods=["POST"]),
            Route("/deprovision/{uuid:path}", _answering(self._deprovision), methods=["DELETE"]),
            Route("/deprovision-all", _answering(self._deprovision_all), methods=["DELETE"]),
            Route("/openapi.json", openapi),
        ]

    # -- spawning

    async def _spawn(self, request: Request, caller: Admitted) -> Response:
        key = read_key(request.headers.get("idempotency-key"))
        body = read_body(await _body_of(request))
        name = body.name or new_name()
        images = self._settings.seed.images
        ask, uuid = ask_of(body, name, images, key, runs_images=self._runs_images), new_uuid(name)
        start = self._starts_for(caller, ask, uuid)
        with anyio.move_on_after(self._settings.seed.ready_seconds):
            await _done_or_left(start, request, may_return=key is not None)
        outcome = start.outcome if start.done.is_set() else self._starting(caller, uuid, key)
        if outcome is None:
            start.cancel()  # nobody would know of it
            raise CapacityExceeded("the start has not begun yet; ask again", retry_after_seconds=1.0)
        if isinstance(outcome, AshError):
            raise outcome
        answer = self._spawned(outcome, [port.container_port for port in body.ports or ()])
        if answer.status == "Starting":
            with suppress(AshError):  # the seed's gateway finds it when it is ready
                await self._store.note_starting(answer.uuid)
        return _json(answer)

    def _starting(self, caller: Admitted, uuid: str, key: str | None) -> Sandbox | None:
        """Return the sandbox of a spawn that goes on: its own, or the one that the same key made before."""
        begun = self._sandboxes.registry.named(uuid)
        if begun is not None or key is None:
            return begun
        scope = DEFAULT_SCOPE if caller.scope == EVERY_SCOPE else caller.scope
        owned = self._sandboxes.registry.of(caller.principal, scope)
        return next((sandbox for sandbox in owned if sandbox.key == key), None)

    def _starts_for(self, caller: Admitted, ask: SpawnAsk, uuid: str) -> Start:
        try:
            _refuse_guest(caller)
            return self.starts.begin(lambda: self._audited(caller, ask, uuid))
        except AshError as error:
            self._audit.spawn_failed(caller, error)
            raise

    async def _audited(self, caller: Admitted, ask: SpawnAsk, uuid: str) -> Sandbox:
        try:
            sandbox = await self._sandboxes.spawn(caller.principal, caller.scope, ask, _no_progress, alias=uuid)
        except AshError as error:
            self._audit.spawn_failed(caller, error)
            raise
        self._audit.spawned(caller, sandbox, variables=len(ask.env), secrets=0)
        return sandbox

    def _spawned(self, sandbox: Sandbox, ports: Sequence[int]) -> Spawned:
        """Say how a spawn stands.

        Raises:
            Conflict: It was not made here, but by MCP with the same idempotency key.
        """
        if sandbox.alias is None:
            raise Conflict("this idempotency key is of a sandbox that was made by MCP; send another key")
        is_ready = sandbox.state is State.READY
        host = sandbox.endpoint.host if is_ready and sandbox.endpoint is not None else None
        said = " ".join(sandbox.warnings) if is_ready else "it is still starting; calls are answered once it is ready"
        return Spawned(
            name=sandbox.labels.get("name", ""),
            uuid=sandbox.alias,
            namespace=self._namespace,
            status="Ready" if is_ready else "Starting",
            service_type="ClusterIP",
            cluster_ip=host if host is not None and _is_address(host) else None,
            host=host,
            ports=tuple(ports) or None,
            message=said or None,
        )

    # -- ending

    async def _deprovision(self, request: Request, caller: Admitted) -> Response:
        uuid = str(request.path_params["uuid"])
        await self._prepare_end(caller, "deprovision")
        sandbox = self._living(caller, uuid)
        if sandbox is None:
            error = SandboxNotFound("UUID not found")
            self._audit.refused(caller, "deprovision", error)
            raise error
        await self._end(caller, sandbox)
        return _json(Deprovisioned(message="Deprovisioned", uuid=uuid))

    def _living(self, caller: Admitted, uuid: str) -> Sandbox | None:
        """Return the sandbox of that uuid, which is good in every scope that its caller's key is for."""
        try:
            found = self._sandboxes.registry.find(caller.principal, EVERY_SCOPE, uuid)
        except SandboxNotFound:
            return None
        return found if found.alias == uuid and not found.state.ended else None

    async def _deprovision_all(self, request: Request, caller: Admitted) -> Response:
        del request
        await self._prepare_end(caller, "deprovision-all")
        deleted, failed = list[str](), list[str]()

        async def end(sandbox: Sandbox, uuid: str) -> None:
            try:
                await self._end(caller, sandbox)
                deleted.append(uuid)
            except AshError:
                failed.append(uuid)

        async with anyio.create_task_group() as group:
            for sandbox in self._sandboxes.registry.of(caller.principal, caller.scope):
                if sandbox.alias is not None:  # the others are not of this door's making
                    group.start_soon(end, sandbox, sandbox.alias)
        return _json(DeprovisionedAll(deleted=deleted, failed=failed, count=len(deleted)))

    async def _prepare_end(self, caller: Admitted, what: str) -> None:
        try:
            _refuse_guest(caller)
        except AshError as error:
            self._audit.refused(caller, what, error)
            raise
        await self._catch_up()

    async def _end(self, caller: Admitted, sandbox: Sandbox) -> None:
        await self._sandboxes.destroy([sandbox])
        self._audit.destroyed(caller, sandbox)


def _answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return `handler` with failures answered as the seed writes them."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request, cast("Admitted", request.scope[ADMITTED_KEY]))
        except AshError as error:
            return _failure(error)

    return answer


def _failure(error: AshError) -> Response:
    status = 413 if isinstance(error, BodyTooLarge) else http_status(error)
    answer = JSONResponse(Failure(error=error.message).model_dump(), status)
    if isinstance(error, CapacityExceeded):
        answer.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return answer


def _json(answer: BaseModel) -> Response:
    return JSONResponse(answer.model_dump(mode="json", exclude_none=True))


async def _body_of(request: Request) -> bytes:
    """Return the body.

    Raises:
        BodyTooLarge: It is over the bound; no more than that was kept of it.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body is longer than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as error:
        raise ConfigError("the body did not come whole") from error
    return bytes(body)


async def _done_or_left(start: Start, request: Request, *, may_return: bool) -> None:
    """Wait for a spawn; if its caller leaves before it is answered, nobody knows of the sandbox, and it ends.

    Args:
        may_return: Whether its caller can ask for the same sandbox again, so that it goes on.
    """
    async with anyio.create_task_group() as group:

        async def watch_caller() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            if not may_return:
                start.cancel()

        group.start_soon(watch_caller)
        await start.done.wait()
        group.cancel_scope.cancel()


def _refuse_guest(caller: Admitted) -> None:
    if caller.principal.sandbox is not None:
        raise PermissionDenied("your key is for one sandbox only: it may neither make nor end any")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _no_progress(done: float, message: str) -> None:
    del done, message
