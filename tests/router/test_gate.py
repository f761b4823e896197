"""The gate: each refusal of it, and what a credential, a peer and a path are worth."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import pytest

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission import LOCAL
from ash_router.keys import KeyFile
from ash_router.peers import Peers
from ash_router.verdicts import Known, Rejected, Verdict
from tests.router.gate_parts import admitted, challenge_of, gate, head, refused

pytestmark = pytest.mark.anyio

METADATA = "/.well-known/oauth-protected-resource"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def nobody_welcome() -> Peers:
    return Peers([0], lambda client, server: 4711)


class Tokens:
    """A provider that knows one token, lacks a scope of another, and cannot be reached for a third."""

    def verify(self, token: str) -> Verdict | Awaitable[Verdict]:
        if token == "known.at.once":
            return Known(Principal("iss#ann"), "oidc")
        return self._later(token)

    async def _later(self, token: str) -> Verdict:
        if token == "nobody.can.say":
            raise ConnectFailed("the provider is away")
        if token == "lacks.a.scope":
            return Rejected("the token lacks a scope", ("hive",))
        return Rejected("the token is not good")


def test_a_key_names_its_owner_on_a_loopback_hive_and_elsewhere(keys: Path) -> None:
    _, text = KeyFile(keys).add(subject="ann")
    for local in (True, False):
        verdict = admitted(gate(keys, local=local).admit(head(token=text)))
        assert verdict.principal.subject == "ann" and verdict.by.startswith("key:")
        assert verdict.client == "127.0.0.1:1"


def test_without_a_token_a_loopback_hive_admits_its_own_user_alone(keys: Path) -> None:
    mine = Peers([1000], lambda client, server: 1000)
    assert admitted(gate(keys, peers=mine).admit(head())).principal == LOCAL
    refusal = refused(gate(keys, peers=nobody_welcome()).admit(head()))
    assert refusal.error.kind == "unauthenticated" and "ash key new" in refusal.error.message
    assert challenge_of(refusal) == f'Bearer resource_metadata="http://127.0.0.1:8420{METADATA}/mcp"'


def test_a_key_is_worth_the_same_from_another_user(keys: Path) -> None:
    _, text = KeyFile(keys).add(subject="ann")
    assert admitted(gate(keys, peers=nobody_welcome()).admit(head(token=text))).principal.subject == "ann"


def test_elsewhere_no_request_is_local(keys: Path) -> None:
    refusal = refused(gate(keys, local=False, any_address=True).admit(head()))
    assert refusal.error.kind == "unauthenticated"
    assert "resource_metadata=" in challenge_of(refusal) and "error=" not in challenge_of(refusal)


@pytest.mark.parametrize("token", ["nonsense", "ash_aaaaaaaaaa_" + "a" * 52, "a.b.c", "x" * 20_000])
def test_a_bad_token_is_refused_even_where_none_is_needed(keys: Path, token: str) -> None:
    refusal = refused(gate(keys).admit(head(token=token)))
    assert refusal.error.kind == "unauthenticated"
    assert 'error="invalid_token"' in challenge_of(refusal)
    assert token not in refusal.error.message


@pytest.mark.parametrize(
    "headers", [[b"Basic YTpi"], [b"Bearer"], [b"Bearer "], [b""], [b"Bearer a.b.c", b"Bearer a.b.c"]]
)
def test_what_is_not_one_bearer_token_is_refused(keys: Path, headers: list[bytes]) -> None:
    more = [(b"authorization", value) for value in headers]
    assert refused(gate(keys).admit(head(more=more))).error.kind == "unauthenticated"


async def test_a_provider_may_take_its_time_and_its_absence_is_not_the_callers_fault(keys: Path) -> None:
    door = gate(keys, local=False, tokens=Tokens())
    assert admitted(door.admit(head(token="known.at.once"))).by == "oidc"
    answers: dict[str, int | None] = {}
    for token in ("nobody.can.say", "lacks.a.scope", "not.at.all"):
        pending = door.admit(head(token=token))
        assert isinstance(pending, Awaitable)
        refusal = refused(await pending)
        answers[token] = refusal.status
        if token == "nobody.can.say":
            assert refusal.error.retryable and ("Retry-After", "10") in refusal.headers
        if token == "lacks.a.scope":
            assert refusal.error.kind == "permission_denied"
            assert 'error="insufficient_scope", scope="hive"' in challenge_of(refusal)
    assert answers == {"nobody.can.say": 503, "lacks.a.scope": None, "not.at.all": None}


@pytest.mark.parametrize("path", ["/healthz", METADATA, f"{METADATA}/mcp"])
def test_open_paths_answer_nobody_in_particular(keys: Path, path: str) -> None:
    verdict = admitted(gate(keys, local=False).admit(head(path)))
    assert verdict.principal.subject == "" and verdict.scope == DEFAULT_SCOPE and verdict.path == path


@pytest.mark.parametrize("path", ["/mcp", "/", "/healthz/", "/healthz/../mcp", "/HEALTHZ", "/readyz", "/metrics"])
def test_every_other_path_wants_a_credential(keys: Path, path: str) -> None:
    assert refused(gate(keys, local=False).admit(head(path))).error.kind == "unauthenticated"


def test_readiness_is_open_on_loopback_and_probes_where_they_were_opened(keys: Path) -> None:
    strict = gate(keys, peers=nobody_welcome())
    admitted(strict.admit(head("/readyz")))
    refused(strict.admit(head("/metrics")))
    opened = gate(keys, local=False, open_paths=["/readyz", "/metrics"])
    admitted(opened.admit(head("/readyz")))
    admitted(opened.admit(head("/metrics")))


def test_metrics_are_for_the_operator(keys: Path) -> None:
    _, stranger = KeyFile(keys).add(subject="ann")
    _, operator = KeyFile(keys).add(subject="local")
    door = gate(keys, local=False)
    assert refused(door.admit(head("/metrics", token=stranger))).error.kind == "permission_denied"
    admitted(door.admit(head("/metrics", token=operator)))


def test_a_bound_key_stays_in_its_scopes(keys: Path) -> None:
    file = KeyFile(keys)
    (_, one), (_, two) = file.add(scopes=["a"]), file.add(scopes=["a", "b"])
    door = gate(keys)
    assert admitted(door.admit(head(token=one))).scope == "a"
    assert admitted(door.admit(head("/mcp/in/b", token=two))).scope == "b"
    for token, target in ((one, "/mcp?scope=b"), (one, "/mcp?scope=*"), (one, "/mcp?scope="), (two, "/mcp")):
        assert refused(door.admit(head(target, token=token))).error.kind == "permission_denied"
    assert "a, b" in refused(door.admit(head(token=two))).error.message


def test_names_are_checked_before_any_credential(keys: Path) -> None:
    _, text = KeyFile(keys).add()
    assert refused(gate(keys).admit(head(token=text, host="evil.test"))).status == 421
    assert refused(gate(keys).admit(head(token=text, more=[(b"origin", b"https://evil.test")]))).status is None


def test_where_each_request_needs_a_credential_any_literal_address_is_an_honest_host(keys: Path) -> None:
    door = gate(keys, local=False, any_address=True)
    for host in ("10.0.0.5:8420", "[fd00::1]:8420", "192.0.2.1"):
        admitted(door.admit(head("/healthz", host=host)))
    for host in ("evil.test", "10.0.0.5.evil.test", '[fe80::1%25x"]'):
        assert refused(door.admit(head("/healthz", host=host))).status == 421


def test_the_challenge_names_the_hive_as_its_callers_know_it(keys: Path) -> None:
    door = gate(keys, local=False, public_url="https://hive.example/")
    challenged = challenge_of(refused(door.admit(head(host="hive.test"))))
    assert challenged == f'Bearer resource_metadata="https://hive.example{METADATA}/mcp"'
