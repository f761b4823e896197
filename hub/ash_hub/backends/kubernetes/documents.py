"""The hive's documents in a cluster: a toolset is a ConfigMap, keys are a Secret, each in one object.

The API server takes 1 MiB in such an object, counted before base64: that is `MAX_DOCUMENT_BYTES`.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, NamedTuple

from ash_hub.backends.base import Places
from ash_hub.backends.documents import DocumentKind, Documents, Tell, check_document, is_document_name
from ash_hub.backends.kubernetes.api import METADATA, METADATA_LIST, Api, ApiRefusal, Json, open_api
from ash_hub.backends.kubernetes.informer import Informer
from ash_hub.backends.kubernetes.pods import HIVE_LABEL
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_mcp.errors import Conflict, ConnectFailed
from ash_router.store.clock import even_clock

__all__ = ["KubernetesDocuments", "open_documents"]

_USED_AT: Final = "ash/used-at"
_BODY: Final = "body"
_TRIES: Final = 8
_STEP_SECONDS: Final = 0.001
"""By how much a document is used later than before, where the clock of this replica is behind another's."""


class _Objects(NamedTuple):
    resource: str
    kind: str
    field: str
    """Where such an object holds bytes."""
    more: Json
    """What else is in it."""


_OBJECTS: Final = {
    DocumentKind.TOOLSETS: _Objects("configmaps", "ConfigMap", "binaryData", {"immutable": True}),
    DocumentKind.KEYS: _Objects("secrets", "Secret", "data", {"type": "Opaque"}),
}


class KubernetesDocuments:
    """An object `ash-<hive>-<kind>-<name>` for each document.

    When a document was last kept is an annotation: the time of day of the replica that kept it, or, if that is not
    later, a millisecond after what was there. So it only goes up, but is as wrong as the clocks of the nodes are.

    Args:
        hive: Tells the hives apart that share a namespace.
        namespace: Of the toolsets.
        key_namespace: Of the keys.
    """

    def __init__(self, api: Api, *, hive: str, namespace: str, key_namespace: str) -> None:
        self._api = api
        self._hive = hive
        self._namespaces = {DocumentKind.TOOLSETS: namespace, DocumentKind.KEYS: key_namespace}
        self._now = even_clock()

    async def read(self, kind: DocumentKind, name: str) -> bytes | None:
        check_document(kind, name)
        with self._explained(kind):
            found = await self._api.get(self._path(kind, name))
        return None if found is None else _body(kind, found)

    async def follow(self, kind: DocumentKind, name: str, tell: Tell) -> None:
        """Follow it by a watch. An account that may not watch sees a change within two seconds, by new lists."""
        check_document(kind, name)

        def listed(uids: set[str], _: int) -> None:
            if not uids:
                tell(None)

        def changed(event: str, found: Json) -> None:
            tell(None if event == "DELETED" else _body(kind, found))

        one = {"fieldSelector": f"metadata.name={self._object_name(kind, name)}"}
        await Informer(self._api, self._path(kind), one, listed, changed).run()

    async def keep(self, kind: DocumentKind, name: str, body: bytes) -> None:
        check_document(kind, name, body)
        path, seen = self._path(kind, name), None
        with self._explained(kind):
            for _ in range(_TRIES):
                about = await self._api.get(path, accept=METADATA)
                if about is None:
                    await self._create(kind, name, body)  # whoever was faster has kept it, too
                    return
                if seen is not None and _used_at(about) > seen:
                    return  # another replica kept it meanwhile
                seen = _used_at(about)
                if await self._change(path, about, []):
                    return
        raise ConnectFailed(f"the document {name} changes all the time")

    async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
        check_document(kind, name, body)
        path = self._path(kind, name)
        with self._explained(kind):
            if instead_of is None:
                is_done = await self._create(kind, name, body)
            else:
                found = await self._api.get(path)
                operation: Json = {"op": "add", "path": f"/{_OBJECTS[kind].field}", "value": _data(body)}
                is_same = found is not None and _body(kind, found) == instead_of
                is_done = found is not None and is_same and await self._change(path, found, [operation])
        if not is_done:
            raise Conflict(f"the document {name} was replaced meanwhile")

    async def used(self, kind: DocumentKind) -> Mapping[str, float]:
        labels = ",".join(f"{label}={value}" for label, value in self._labels(kind).items())
        with self._explained(kind):
            found = await self._api.get(self._path(kind), accept=METADATA_LIST, labelSelector=labels)
        objects: list[Json] = (found or {}).get("items") or []
        prefix = self._object_name(kind, "")
        named = {about["metadata"]["name"].removeprefix(prefix): about for about in objects}
        return {name: _used_at(about) for name, about in named.items() if is_document_name(kind, name)}

    async def drop(self, kind: DocumentKind, name: str, *, used_at: float) -> None:
        check_document(kind, name)
        path = self._path(kind, name)
        with self._explained(kind):
            about = await self._api.get(path, accept=METADATA)
            if about is not None and _used_at(about) <= used_at:
                metadata = about["metadata"]
                version = metadata["resourceVersion"]
                await self._api.delete(path, uid=metadata["uid"], resource_version=version)

    async def _create(self, kind: DocumentKind, name: str, body: bytes) -> bool:
        """Make the object of a document; False where it exists."""
        objects = _OBJECTS[kind]
        metadata = {
            "name": self._object_name(kind, name),
            "labels": self._labels(kind),
            "annotations": {_USED_AT: f"{self._now():.6f}"},
        }
        made = {"apiVersion": "v1", "kind": objects.kind, "metadata": metadata, objects.field: _data(body)}
        try:
            await self._api.create(self._path(kind), {**made, **objects.more})
        except ApiRefusal as refusal:
            if refusal.reason == "AlreadyExists":
                return False
            raise
        return True

    async def _change(self, path: str, seen: Json, operations: list[Json]) -> bool:
        """Change a document, and note that it is used; False where it is not any more as it was seen."""
        metadata = seen["metadata"]
        at = max(self._now(), _used_at(seen) + _STEP_SECONDS)
        annotations = {**_annotations(seen), _USED_AT: f"{at:.6f}"}
        whole: list[Json] = [
            {"op": "test", "path": "/metadata/uid", "value": metadata["uid"]},
            {"op": "test", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
            {"op": "add", "path": "/metadata/annotations", "value": annotations},
            *operations,
        ]
        try:
            await self._api.patch(path, whole, accept=METADATA)
        except ApiRefusal as refusal:
            if refusal.status in (404, 409, 422):
                return False
            raise
        return True

    def _labels(self, kind: DocumentKind) -> Mapping[str, str]:
        return {HIVE_LABEL: self._hive, "ash/document": kind.value, "app.kubernetes.io/managed-by": "ash"}

    def _object_name(self, kind: DocumentKind, name: str) -> str:
        return f"ash-{self._hive}-{kind.value}-{name}"

    def _path(self, kind: DocumentKind, name: str | None = None) -> str:
        collection = f"/api/v1/namespaces/{self._namespaces[kind]}/{_OBJECTS[kind].resource}"
        return collection if name is None else f"{collection}/{self._object_name(kind, name)}"

    @contextmanager
    def _explained(self, kind: DocumentKind) -> Generator[None]:
        """Raise what the API server refuses as `ConnectFailed`, with its own words."""
        try:
            yield
        except ApiRefusal as refusal:
            namespace, resource = self._namespaces[kind], _OBJECTS[kind].resource
            said = f"the hive's {kind.value} in the namespace {namespace} cannot be used: {refusal.message}"
            if refusal.status == 403 and " cannot " in refusal.message:  # a full quota is a 403 as well
                said += f"; its account needs get, list, create, patch and delete of {resource} there (a Role)"
            raise ConnectFailed(said) from refusal


def _annotations(found: Json) -> dict[str, str]:
    return found["metadata"].get("annotations") or {}


def _used_at(found: Json) -> float:
    """Return when a document was last kept; long ago where somebody took the note away."""
    try:
        return float(_annotations(found)[_USED_AT])
    except (KeyError, ValueError):
        return 0.0


def _data(body: bytes) -> Json:
    return {_BODY: base64.b64encode(body).decode()}


def _body(kind: DocumentKind, found: Json) -> bytes:
    """Return what is in a document; nothing where somebody emptied it, which no reader takes for a good one."""
    data: Mapping[str, str] = found.get(_OBJECTS[kind].field) or {}
    return base64.b64decode(data.get(_BODY) or "")


@asynccontextmanager
async def open_documents(options: Mapping[str, Any], places: Places) -> AsyncGenerator[Documents]:
    """Open the documents alone of a hive with these settings of its backend.

    Raises:
        pydantic.ValidationError: An option is wrong.
        ConfigError: The cluster cannot be found.
    """
    del places
    chosen = KubernetesSettings.model_validate(options)
    async with open_api(chosen.kubeconfig, chosen.context) as api:
        namespace = chosen.namespace or api.namespace
        keys = chosen.system_namespace or namespace
        yield KubernetesDocuments(api, hive=chosen.hive, namespace=namespace, key_namespace=keys)
