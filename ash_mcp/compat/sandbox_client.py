"""The seed's client: one sandbox spawned, connected to and destroyed."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

from ash_mcp.compat.rest import Request, Rest, split_key, was_lost
from ash_mcp.compat.vocabulary import (
    Sandbox,
    SandboxConfig,
    SandboxConnectionError,
    SandboxDestroyError,
    SandboxError,
    SandboxSpawnError,
    SandboxTimeoutError,
)
from ash_mcp.errors import AshError, AshTimeout, ConfigError, NotFound, RemoteProtocolError, TransportError
from ash_mcp.wire import MCP_PATH

if TYPE_CHECKING:
    from fastmcp import Client
    from fastmcp.client.transports import StreamableHttpTransport

__all__ = ["SandboxClient"]

log = logging.getLogger("ash.compat")

_SESSION_HEADER: Final = "X-Session-ID"


class SandboxClient:
    """Spawns a sandbox, connects to it and destroys it; as a context manager it does the last at the block's end.

    Every method blocks. No connection is kept between calls, and several threads may each use a client.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self._token = os.environ.get("ASH_TOKEN") or None
        self._sandbox: Sandbox | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        url = self.config.control_plane_url.rpartition("@")[2]
        return f"SandboxClient({url!r}, sandbox={self._sandbox and self._sandbox.uuid!r})"

    @property
    def sandbox(self) -> Sandbox | None:
        """The sandbox that was spawned last, until it is destroyed."""
        return self._sandbox

    current_sandbox = sandbox

    def close(self) -> None:
        """Destroy the client's sandbox, if it has one. A failure is only logged."""
        if self._sandbox is None:
            return
        try:
            self.destroy()
        except SandboxError as error:
            log.warning("the sandbox was not destroyed: %s", error)

    def health_check(self) -> bool:
        """Say whether the control plane answers, within 5 seconds."""
        return self._check("/healthz")

    def ready_check(self) -> bool:
        """Say whether the control plane is ready to spawn, within 5 seconds."""
        return self._check("/readyz")

    def spawn(self, name: str | None = None) -> Sandbox:
        """Make a sandbox as the config says, and return it when it is ready, or `Starting`.

        Sent again if it certainly was not done, or if the server is a hive, which knows by a key that it is the same.

        Args:
            name: Else the server chooses one.

        Raises:
            SandboxSpawnError: The server refused, or the sandbox did not start.
            SandboxConnectionError: No server answered.
            SandboxTimeoutError: None did in time.
        """
        request = Request(
            method="POST",
            path="/spawn",
            body=_spawn_body(self.config, name),
            headers={"Idempotency-Key": uuid.uuid4().hex},
            timeout_seconds=self.config.timeout,
            repeatable_by_hive=True,
        )
        with _as_seed_errors(SandboxSpawnError):
            self._sandbox = sandbox = _sandbox_of(self._ask(request), self.config)
        log.info("%s is %s. %s", sandbox.uuid, sandbox.status, sandbox.message)
        return sandbox

    def destroy(self, sandbox_uuid: str | None = None) -> dict[str, Any]:
        """End a sandbox, by default the client's own, and return the server's answer.

        Raises:
            ValueError: None is named and none was spawned.
            SandboxDestroyError: The server has no such sandbox, or could not end it.
            SandboxConnectionError: No server answered.
            SandboxTimeoutError: None did in time.
        """
        named = self._named(sandbox_uuid)
        path = f"/deprovision/{quote(named, safe='')}"
        lost: list[AshError] = []
        with _as_seed_errors(SandboxDestroyError):
            try:
                answer = self._delete(path, lost)
            except NotFound:
                if not lost:
                    raise
                answer = {"message": "Deprovisioned", "uuid": named}  # by the request whose answer was lost
        if self._sandbox is not None and self._sandbox.uuid == named:
            self._sandbox = None
        return answer

    def destroy_all(self) -> dict[str, Any]:
        """End all that the key's owner has spawned by such clients; the answer has `deleted`, `failed`, `count`.

        Raises:
            SandboxDestroyError: The server could not.
            SandboxConnectionError: No server answered.
            SandboxTimeoutError: None did in time.
        """
        with _as_seed_errors(SandboxDestroyError):
            answer = self._delete("/deprovision-all", [])
        self._sandbox = None
        if answer.get("failed"):
            log.warning("not destroyed: %s", answer["failed"])
        return answer

    def connect(self, sandbox_uuid: str | None = None) -> Client[StreamableHttpTransport]:
        """Return a FastMCP client of a sandbox, by default the client's own; `async with` opens it.

        It speaks the handshake era of MCP, as the seed's did: the newer one has no `ping`.

        Raises:
            ValueError: None is named and none was spawned.
            ImportError: FastMCP is not installed.
            SandboxConnectionError: `gateway_url` is no URL.
        """
        headers = {_SESSION_HEADER: self._named(sandbox_uuid)}
        try:
            from fastmcp import Client
            from fastmcp.client.transports import StreamableHttpTransport
        except ImportError as exc:
            raise ImportError("connect() needs FastMCP: pip install 'ash-mcp[compat]'") from exc
        with _as_seed_errors(SandboxConnectionError):
            url, token = self._place("gateway_url")
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        seconds = self.config.mcp_timeout
        transport = StreamableHttpTransport(url + MCP_PATH, headers=headers)
        return Client(transport, timeout=seconds, init_timeout=seconds, mode="legacy")

    def _named(self, sandbox_uuid: str | None) -> str:
        named = sandbox_uuid or (self._sandbox and self._sandbox.uuid)
        if not named:
            raise ValueError("this client has no sandbox; call spawn() first, or name one")
        return named

    def _place(self, setting: str) -> tuple[str, str | None]:
        """Return the URL of a setting without its key, and the key."""
        try:
            url, key = split_key(getattr(self.config, setting))
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error.message}") from error
        return url, key or self._token

    def _check(self, path: str) -> bool:
        try:
            return Rest(*self._place("control_plane_url")).answers(path)
        except AshError:
            return False

    def _ask(self, request: Request, lost: list[AshError] | None = None) -> dict[str, Any]:
        """Send a request; the errors after which it may have been done all the same are added to `lost`."""

        def note_retry(error: AshError, delay: float) -> None:
            log.warning("%s %s: trying again in %.1f s: %s", request.method, request.path, delay, error)
            if lost is not None and was_lost(error):
                lost.append(error)

        return dict(Rest(*self._place("control_plane_url")).ask(request, note_retry))

    def _delete(self, path: str, lost: list[AshError]) -> dict[str, Any]:
        request = Request(method="DELETE", path=path, timeout_seconds=self.config.timeout, repeatable=True)
        return self._ask(request, lost)


def _spawn_body(config: SandboxConfig, name: str | None) -> dict[str, Any]:
    resources = {
        kind: {what: amount for what, amount in amounts.items() if amount}
        for kind, amounts in (asdict(config.resources) if config.resources is not None else {}).items()
    }
    optional = {
        "name": name,
        "env": config.env,
        "resources": {kind: amounts for kind, amounts in resources.items() if amounts},
        "node_selector": config.node_selector,
        "runtime_class": config.runtime_class,
    }
    return {
        "image": config.image,
        "ports": [{"container_port": port} for port in config.ports],
        **{field: value for field, value in optional.items() if value},
    }


def _sandbox_of(answer: Mapping[str, Any], config: SandboxConfig) -> Sandbox:
    try:
        sandbox = Sandbox.from_response(answer, config.gateway_url)
    except (KeyError, TypeError, ValueError) as exc:
        raise RemoteProtocolError(f"what answered is not a hive: its sandbox cannot be read: {exc!r}") from exc
    if not sandbox.uuid or not isinstance(answer["uuid"], str):
        raise RemoteProtocolError("what answered is not a hive: its sandbox has no uuid")
    return sandbox


@contextmanager
def _as_seed_errors(otherwise: type[SandboxError]) -> Generator[None]:
    """Translate `AshError`s: what is neither a time-out nor the connection's becomes `otherwise`."""
    try:
        yield
    except AshTimeout as exc:
        raise SandboxTimeoutError(exc.message) from exc
    except TransportError as exc:
        raise SandboxConnectionError(exc.message) from exc
    except AshError as exc:
        raise otherwise(exc.message) from exc
