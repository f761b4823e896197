"""The hive's documents as objects of a cluster, against a stand-in; `tests/kubernetes` asks a real API server."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from ash_hub.backends.documents import DocumentKind, Documents
from ash_hub.backends.kubernetes import informer
from ash_hub.backends.kubernetes.api import Api, ApiRefusal
from ash_hub.backends.kubernetes.documents import KubernetesDocuments
from ash_hub.testing.document_checks import DOCUMENT_CHECKS, who_follows_a_document_is_told_what_it_is_and_becomes
from ash_mcp.errors import ConnectFailed
from tests.hub.backends.kubernetes.api_parts import StandInApi

pytestmark = pytest.mark.anyio

SETS, KEYS = DocumentKind.TOOLSETS, DocumentKind.KEYS


def replica(api: StandInApi, clock: Callable[[], float] | None = None, *, hive: str = "h") -> KubernetesDocuments:
    made = KubernetesDocuments(cast("Api", api), hive=hive, namespace="boxes", key_namespace="own")
    if clock is not None:
        made._now = clock  # pyright: ignore[reportPrivateUsage]
    return made


@pytest.fixture
def api() -> StandInApi:
    return StandInApi()


@pytest.mark.parametrize("check", DOCUMENT_CHECKS, ids=lambda check: check.__name__)
async def test_documents_pass_the_suite(check: Callable[[Documents, Documents], Awaitable[None]], api: StandInApi):
    await check(replica(api), replica(api))


async def test_toolsets_are_immutable_config_maps_and_keys_are_secrets_elsewhere(api: StandInApi) -> None:
    await replica(api).keep(SETS, "a", b"\xff")
    await replica(api).replace(KEYS, "keys", b"{}", instead_of=None)
    toolset = api.objects["/api/v1/namespaces/boxes/configmaps/ash-h-toolsets-a"]
    secret = api.objects["/api/v1/namespaces/own/secrets/ash-h-keys-keys"]
    assert (toolset["kind"], toolset["immutable"]) == ("ConfigMap", True)
    assert base64.b64decode(toolset["binaryData"]["body"]) == b"\xff"
    assert (secret["kind"], secret["type"]) == ("Secret", "Opaque")
    assert base64.b64decode(secret["data"]["body"]) == b"{}"
    assert toolset["metadata"]["labels"] == {
        "ash/hive": "h",
        "ash/document": "toolsets",
        "app.kubernetes.io/managed-by": "ash",
    }


async def test_hives_in_one_namespace_do_not_see_each_others_documents(api: StandInApi) -> None:
    one, other = replica(api), replica(api, hive="other")
    await one.keep(SETS, "a", b"{}")
    assert await other.read(SETS, "a") is None and dict(await other.used(SETS)) == {}


async def test_a_change_is_told_to_an_account_that_may_not_watch(
    api: StandInApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(informer, "_MOST_PAUSE_SECONDS", 0.1)
    api.may_watch = False
    await who_follows_a_document_is_told_what_it_is_and_becomes(replica(api), replica(api))


async def test_a_replica_whose_clock_is_behind_still_notes_a_later_use(api: StandInApi) -> None:
    ahead, behind = replica(api, lambda: 2000.0), replica(api, lambda: 1000.0)
    await ahead.keep(SETS, "a", b"{}")
    seen = (await ahead.used(SETS))["a"]
    await behind.keep(SETS, "a", b"{}")
    await ahead.drop(SETS, "a", used_at=seen)
    assert await ahead.read(SETS, "a") == b"{}" and seen == 2000.0


async def test_what_is_kept_between_the_look_and_the_removal_stays(
    api: StandInApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = replica(api)
    await documents.keep(SETS, "a", b"{}")
    seen = (await documents.used(SETS))["a"]
    delete = api.delete

    async def delete_late(path: str, *, uid: str, resource_version: str) -> None:
        await replica(api).keep(SETS, "a", b"{}")
        await delete(path, uid=uid, resource_version=resource_version)

    monkeypatch.setattr(api, "delete", delete_late)
    await documents.drop(SETS, "a", used_at=seen)
    assert await documents.read(SETS, "a") == b"{}"


async def test_a_note_of_use_that_somebody_took_away_is_written_again(api: StandInApi) -> None:
    documents = replica(api)
    await documents.keep(SETS, "a", b"{}")
    (found,) = api.objects.values()
    del found["metadata"]["annotations"]
    assert dict(await documents.used(SETS)) == {"a": 0.0}
    await documents.keep(SETS, "a", b"{}")
    assert (await documents.used(SETS))["a"] > 1e9


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (403, 'secrets is forbidden: User "ash" cannot get resource "secrets"', "patch and delete of secrets there"),
        (403, "exceeded quota: small", "exceeded quota: small$"),
        (404, 'namespaces "own" not found', 'namespaces "own" not found$'),
        (409, "Operation cannot be fulfilled on resourcequotas", "on resourcequotas$"),
    ],
)
async def test_what_the_api_server_refuses_is_said_in_its_words_and_can_be_tried_again(
    api: StandInApi, status: int, message: str, said: str
) -> None:
    api.refusals.append(ApiRefusal(status, {"message": message, "reason": "Conflict"}))
    with pytest.raises(ConnectFailed, match=said) as failure:
        await replica(api).replace(KEYS, "keys", b"1", instead_of=None)
    assert failure.value.retryable
