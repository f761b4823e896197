"""The Kubernetes API as JSON: requests, watches and what its refusals mean. No models of its objects.

kubernetes-asyncio reads the kubeconfig or the pod's own account, renews tokens and speaks TLS.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
from kubernetes_asyncio import config as library
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.config import ConfigException

from ash_mcp.errors import ConfigError, ConnectFailed

__all__ = ["METADATA", "METADATA_LIST", "Api", "ApiRefusal", "Json", "open_api"]

Json = dict[str, Any]

METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""Asks for an object without all that is not its metadata."""
METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""The same of a collection."""

_JSON: Final = "application/json"
_JSON_PATCH: Final = "application/json-patch+json"
_REQUEST_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 5.0
_HEAD_SECONDS: Final = 5.0
"""Until a watch begins."""
_SILENCE_SECONDS: Final = 70.0
"""For a watch, which the server ends by itself before."""
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
_PAGE_OBJECTS: Final = 200
_TRIES: Final = 4
_MAX_PAUSE_SECONDS: Final = 5.0
"""A server that wants to be left alone for longer is not waited for."""
_ACCOUNT_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiRefusal(Exception):
    """An answer of the API server that says no."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.reason = str(body.get("reason") or "")
        """A word of Kubernetes, such as `AlreadyExists`."""
        self.message = str(body.get("message") or f"it answered {status}")
        super().__init__(self.message)


class Api:
    """One cluster's API server. Safe for concurrent use."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        """Where the kubeconfig, or the account of this pod, is at home."""
        self.address = str(cast("Any", client).configuration.host)
        """Its URL."""

    def kubeconfig(self, token: str, namespace: str) -> Json:
        """Return a kubeconfig for the same server, by which whoever has this token is known; it names files."""
        found = cast("Any", self._client).configuration
        trust = {"certificate-authority": found.ssl_ca_cert} if found.ssl_ca_cert else {}
        cluster = {"server": self.address, "insecure-skip-tls-verify": not found.verify_ssl, **trust}
        return {
            "clusters": [{"name": "ash", "cluster": cluster}],
            "users": [{"name": "ash", "user": {"token": token}}],
            "contexts": [{"name": "ash", "context": {"cluster": "ash", "user": "ash", "namespace": namespace}}],
            "current-context": "ash",
        }

    async def get(self, path: str, *, accept: str = _JSON, **query: str) -> Json | None:
        """Return what is at `path`, or None where there is nothing.

        Args:
            accept: `METADATA` or `METADATA_LIST` leaves the rest of it out.

        Raises:
            ApiRefusal: It says no.
            ConnectFailed: It does not answer, or cannot do it now.
        """
        try:
            return await self._request("GET", path, query, accept=accept)
        except ApiRefusal as refusal:
            if refusal.status == 404:
                return None
            raise

    async def pages(self, path: str, **query: str) -> AsyncGenerator[Json]:
        """Yield the collection at `path` as it is at one moment, in lists of at most `_PAGE_OBJECTS`.

        A thousand pods in one piece take 100 MiB to read.

        Raises:
            ApiRefusal: It says no, or there is none; 410: the pages took too long, begin again.
            ConnectFailed: It does not answer, or cannot do it now.
        """
        asked = {**query, "limit": str(_PAGE_OBJECTS)}
        while True:
            page = await self._request("GET", path, asked)
            token = page["metadata"].get("continue")
            yield page
            if not token:
                return
            asked["continue"] = token

    async def create(self, path: str, body: Json, **query: str) -> Json:
        """Make an object in the collection at `path`; raises as `get` does, and 409 where it exists."""
        return await self._request("POST", path, query, body)

    async def patch(self, path: str, operations: list[Json], *, accept: str = _JSON) -> Json:
        """Change an object by a JSON Patch. Raises as `get` does; 422 where one of its tests does not hold."""
        return await self._request("PATCH", path, {}, operations, accept=accept, media_type=_JSON_PATCH)

    async def delete(
        self,
        path: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> bool:
        """Delete an object if it still has that uid and version; return whether it did. Raises as `get` does."""
        body: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        conditions = {"uid": uid, "resourceVersion": resource_version}
        preconditions = {name: value for name, value in conditions.items() if value is not None}
        if preconditions:
            body["preconditions"] = preconditions
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._request("DELETE", path, {}, body)
        except ApiRefusal as refusal:
            if refusal.status == 404 or (refusal.status == 409 and preconditions):
                return False
            raise
        return True

    async def text(self, path: str, **query: str) -> bytes:
        """Return an answer that is no JSON, such as a log; raises as `get` does."""
        async with self._answered("GET", path, query, seconds=_REQUEST_SECONDS) as answer:
            return await _whole(answer)

    @asynccontextmanager
    async def watch(self, path: str, **query: str) -> AsyncGenerator[AsyncGenerator[Json]]:
        """Follow the collection at `path`: yields an iterator of its events, which ends when the server says so.

        Raises:
            ApiRefusal: It says no; 410: list again. An event of the type ERROR is raised as one, too.
            ConnectFailed: It does not answer, or the connection broke.
        """
        full = {"watch": "true", "allowWatchBookmarks": "true", **query}
        async with self._answered("GET", path, full, seconds=None) as answer:
            yield _events(answer)

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        *,
        accept: str = _JSON,
        media_type: str = _JSON,
    ) -> Json:
        async with self._answered(
            method, path, query, body, accept=accept, media_type=media_type, seconds=_REQUEST_SECONDS
        ) as answer:
            return cast("Json", json.loads(await _whole(answer) or b"{}"))

    @asynccontextmanager
    async def _answered(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        *,
        accept: str = _JSON,
        media_type: str = _JSON,
        seconds: float | None,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        client = cast("Any", self._client)
        try:
            for tries_left in reversed(range(_TRIES)):
                headers = {"Content-Type": media_type, "Accept": accept}
                await client.update_params_for_auth(headers, [], ["BearerToken"])
                async with asyncio.timeout(_HEAD_SECONDS if seconds is None else None):
                    found = await client.rest_client.request(
                        method,
                        f"{client.configuration.host}{path}",
                        query_params=dict(query),
                        headers=headers,
                        body=body,
                        _preload_content=False,
                        _request_timeout=timeout,
                    )
                async with cast("aiohttp.ClientResponse", found) as answer:
                    pause = _pause(answer)
                    if answer.status == 429 and tries_left and pause <= _MAX_PAUSE_SECONDS:
                        await asyncio.sleep(pause)
                        continue
                    if answer.status >= 300:
                        raise _refusal(answer.status, await _whole(answer), pause)
                    yield answer
                    return
        except (aiohttp.ClientError, OSError, TimeoutError, json.JSONDecodeError) as error:
            said = str(error) or type(error).__name__
            raise ConnectFailed(f"the Kubernetes API does not answer: {said}") from error


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    """Return an answer; aiohttp's own `read(n)` returns what has come so far."""
    whole = bytearray()
    async for piece in answer.content.iter_any():
        whole += piece
        if len(whole) > _MAX_ANSWER_BYTES:
            raise ConnectFailed(f"the Kubernetes API answers with more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(whole)


async def _events(answer: aiohttp.ClientResponse) -> AsyncGenerator[Json]:
    while line := await answer.content.readline():
        event: Json = json.loads(line)
        if event["type"] == "ERROR":
            raise _refusal(int(event["object"].get("code") or 500), json.dumps(event["object"]).encode())
        yield event


def _pause(answer: aiohttp.ClientResponse) -> float:
    """Return how long a server that is too busy wants to be left alone."""
    try:
        return max(float(answer.headers.get("Retry-After", "1")), 0.1)
    except ValueError:
        return 1.0


def _refusal(status: int, raw: bytes, pause: float = 0.0) -> Exception:
    try:
        found = json.loads(raw)
        body = cast("Json", found) if isinstance(found, dict) else {}
    except ValueError:
        body = {"message": raw[:500].decode(errors="replace").strip()}
    refusal = ApiRefusal(status, body)
    if status >= 500 or status == 429:
        said = f"the Kubernetes API cannot do it now: {refusal.message}"
        return ConnectFailed(said, retry_after_seconds=pause if status == 429 else None)
    if status == 401:
        return ConnectFailed("the Kubernetes API does not know the hive's account; look at its token or kubeconfig")
    return refusal


@asynccontextmanager
async def open_api(kubeconfig: Path | None, context: str | None) -> AsyncGenerator[Api]:
    """Connect while the context is open: by a kubeconfig if one is named or there is one, else as this pod's account.

    Raises:
        ConfigError: There is neither, or it cannot be read; the message says what to do.
    """
    configuration = Configuration()
    reading = cast("Any", library)
    named = kubeconfig or _default_kubeconfig()
    namespace = "default"
    try:
        if named is not None:
            loader = await reading.load_kube_config(
                str(named), context, client_configuration=configuration, persist_config=False
            )
            namespace = str(loader.current_context["context"].get("namespace") or "default")
        else:
            reading.load_incluster_config(client_configuration=configuration)
            namespace = _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    except (ConfigException, OSError, KeyError, TypeError, ValueError) as error:
        where = str(named) if named is not None else "no kubeconfig, and not in a pod"
        raise ConfigError(
            f"the Kubernetes API cannot be found ({where}): {error}; name a kubeconfig with KUBECONFIG or "
            "ASH_HUB_BACKEND__KUBECONFIG"
        ) from error
    client = ApiClient(configuration)
    try:
        yield Api(client, namespace)
    finally:
        await client.close()


def _default_kubeconfig() -> Path | None:
    """Return the kubeconfig that kubectl would take; of several in KUBECONFIG the first that exists."""
    named = [Path(part) for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    if named:
        return next((path for path in named if path.exists()), named[0])
    usual = Path.home() / ".kube" / "config"
    return usual if usual.exists() and not _ACCOUNT_NAMESPACE.exists() else None
