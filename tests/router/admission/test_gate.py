"""The gate: each refusal of it, and what a credential, a peer and a path are worth."""

from __future__ import annotations

import base64
from collections.abc import Awaitable
from pathlib import Path

import pytest

from ash_mcp.errors import ConnectFailed, SandboxNotFound
from ash_mcp.types import DEFAULT_SCOPE, NO_LIMITS, Principal, SandboxId
from ash_router.admission.api_keys import KeyFile
from ash_router.admission.base import LOCAL, Admitted, Refusal
from ash_router.admission.credential_verdict import Known, Rejected, Verdict
from ash_router.admission.peers import Peers
from ash_router.admission.share_tokens import SharedSandbox, ShareTokens
from ash_router.admission.shares import new_share
from ash_router.admission.tickets import Tickets
from tests.router.admission.gate_parts import admitted, challenge_of, gate, head, refused

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

    def takes(self, token: str) -> bool:
        return token.count(".") == 2

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


class Shares:
    """Knows tokens that let a guest into one sandbox, and keeps to those."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def takes(self, token: str) -> bool:
        return token.startswith("share_")

    def verify(self, token: str) -> Verdict:
        self.asked.append(token)
        return Known(Principal("share:1", sandbox=SandboxId("sbx-1")), "share:1")


def test_each_kind_of_token_is_asked_of_its_own_verifier_alone(keys: Path) -> None:
    _, text = KeyFile(keys).add(subject="ann")
    shares = Shares()
    door = gate(keys, local=False, verifiers=[Tokens(), shares])
    guest = admitted(door.admit(head(token="share_x")))
    assert (guest.principal.sandbox, guest.by) == ("sbx-1", "share:1")
    assert admitted(door.admit(head(token=text))).principal.subject == "ann"
    assert admitted(door.admit(head(token="known.at.once"))).principal.subject == "iss#ann"
    assert "not one that this hive knows" in refused(door.admit(head(token="of-no-kind"))).error.message
    assert shares.asked == ["share_x"]


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


def test_two_headers_open_nothing_even_where_both_are_good(keys: Path) -> None:
    key = KeyFile(keys).add(subject="ann")[1]
    bearer = (b"authorization", f"Bearer {key}".encode())
    assert admitted(gate(keys).admit(head(more=[bearer]))).principal.subject == "ann"
    assert refused(gate(keys).admit(head(more=[bearer, bearer]))).error.kind == "unauthenticated"


async def test_a_provider_may_take_its_time_and_its_absence_is_not_the_callers_fault(keys: Path) -> None:
    door = gate(keys, local=False, verifiers=[Tokens()])
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


@pytest.mark.parametrize(
    "path", ["/mcp", "/", "/healthz/", "/healthz/../mcp", "/HEALTHZ", "/readyz", "/readyz/calls", "/metrics"]
)
def test_every_other_path_wants_a_credential(keys: Path, path: str) -> None:
    assert refused(gate(keys, local=False).admit(head(path))).error.kind == "unauthenticated"


def test_readiness_is_open_on_loopback_and_probes_where_they_were_opened(keys: Path) -> None:
    strict = gate(keys, peers=nobody_welcome())
    admitted(strict.admit(head("/readyz")))
    refused(strict.admit(head("/metrics")))
    opened = gate(keys, local=False, open_paths=["/readyz", "/metrics"])
    admitted(opened.admit(head("/readyz")))
    admitted(opened.admit(head("/readyz/calls")))
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


def test_a_refusal_says_what_was_wrong_with_what_came_and_nothing_where_nothing_came(keys: Path) -> None:
    door = gate(keys, local=False)
    assert "error=" not in challenge_of(refused(door.admit(head())))
    for wrong in (head(token="unknown"), head(more=[(b"authorization", b"Basic YTpi")])):
        refusal = refused(door.admit(wrong))
        assert 'error="invalid_token"' in challenge_of(refusal) and refusal.error.message
    assert "wants a bearer token" in refused(door.admit(head())).error.message
    assert "you are another" in refused(gate(keys, peers=nobody_welcome()).admit(head())).error.message


def test_an_admitted_request_says_by_what_its_caller_is_known(keys: Path) -> None:
    assert admitted(gate(keys).admit(head())).by == ""
    known = admitted(gate(keys, peers=Peers([4711], lambda client, server: 4711)).admit(head()))
    assert (known.by, known.principal, known.client) == ("peer", LOCAL, "127.0.0.1:1")


def test_a_token_is_read_whatever_the_case_of_its_scheme_and_the_spaces_around_it(keys: Path) -> None:
    _, text = KeyFile(keys).add(subject="ann")
    more = [(b"authorization", f"bEARER  {text} ".encode())]
    assert admitted(gate(keys).admit(head(more=more))).principal.subject == "ann"


def test_the_hives_url_is_the_public_one_or_the_name_that_was_used(keys: Path) -> None:
    assert gate(keys, public_url="https://hive.example/").base_url(head()) == "https://hive.example"
    assert gate(keys).base_url(head()) == "http://127.0.0.1:8420"


@pytest.mark.parametrize("path", [f"{METADATA}x", f"/x{METADATA}", "/readyz/calls/x"])
def test_only_the_open_paths_themselves_are_open(keys: Path, path: str) -> None:
    refused(gate(keys, local=False, open_paths=["/readyz"]).admit(head(path)))


def test_a_metrics_path_is_for_local_peers_too(keys: Path) -> None:
    admitted(gate(keys).admit(head("/metrics")))
    _, stranger = KeyFile(keys).add(subject="ann")
    admitted(gate(keys, open_paths=["/metrics"]).admit(head("/metrics", token=stranger)))


def basic(user: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Basic " + base64.b64encode(user))]


def test_a_key_may_come_as_the_user_of_a_url(keys: Path) -> None:
    key, text = KeyFile(keys).add(subject="ann")
    door = gate(keys, local=False)
    for sent in (f"{text}:", text, f"{text}:x"):
        verdict = admitted(door.admit(head(more=basic(sent.encode()))))
        assert (verdict.principal.subject, verdict.by) == ("ann", f"key:{key.id}")
    wrong = [basic(user) for user in (f":{text}".encode(), f"x{text}:".encode(), b"\xff:")]
    for more in (*wrong, [(b"authorization", b"Basic %%")]):
        assert refused(door.admit(head(more=more))).error.kind == "unauthenticated"


UUID = "trainer-0b6a1f0e-8a55-4d0f-9f0c-0a1b2c3d4e5f"


async def test_a_uuid_opens_its_sandbox_alone_and_only_where_that_is_set(keys: Path) -> None:
    _, text = KeyFile(keys).add(subject="ann")
    sought: list[str] = []

    async def holder(uuid: str) -> SandboxId | None:
        sought.append(uuid)
        return SandboxId("sbx-1") if uuid == UUID else None

    door = gate(keys, local=False)
    named = [(b"x-session-id", UUID.encode())]
    assert refused(door.admit(head(more=named))).error.kind == "unauthenticated"

    door.holder = holder
    pending = door.admit(head(more=named))
    assert isinstance(pending, Awaitable)
    guest = admitted(await pending)
    assert (guest.principal.sandbox, guest.by) == (SandboxId("sbx-1"), "uuid")
    assert admitted(door.admit(head(more=named, token=text))).principal == Principal("ann")  # a key goes before it
    other = door.admit(head(more=[(b"x-session-id", UUID[:-1].encode() + b"0")]))
    assert isinstance(other, Awaitable)
    assert refused(await other).error.kind == "unauthenticated"
    del sought[:]
    elsewhere = [
        head("/deprovision/x", more=named),
        head("/spawn", more=named),
        head(more=[*named, *named]),
        head(more=[(b"x-session-id", b"sb1")]),
        head(more=named, token="wrong"),
    ]
    for asked in elsewhere:
        assert refused(door.admit(asked)).error.kind == "unauthenticated"
    assert refused(door.admit(head(host="evil.test", more=named))).error.kind == "permission_denied"
    assert not sought


async def test_a_uuid_is_not_looked_up_where_nothing_is_needed(keys: Path) -> None:
    door = gate(keys, local=True)
    assert admitted(door.admit(head(more=[(b"x-session-id", UUID.encode())]))).principal == LOCAL


@pytest.mark.parametrize("path", ["/mcp", "/healthz", "/spawn", METADATA])
def test_a_router_for_the_seeds_routes_is_refused_whatever_it_asks_for(keys: Path, path: str):
    _, key = KeyFile(keys).add(subject="ann")
    marked = head(path, token=key, more=[(b"ash-seed-router", b"1")])
    refusal = refused(gate(keys).admit(marked))
    assert (refusal.error.message, type(refusal.error)) == ("route not found", SandboxNotFound)


def test_the_token_of_a_share_opens_its_own_sandbox_alone(keys: Path) -> None:
    share, token = new_share(["echo"], 0.0, None)
    shared = SharedSandbox(share, SandboxId("sbx-1"), frozenset({"sbx-1"}))
    guarded = gate(keys, local=False)
    guarded.take_shares(ShareTokens({share.id: shared}.get, None, lambda: 0.0, NO_LIMITS))
    assert admitted(guarded.admit(head("/s/sbx-1/mcp", token=token))).principal.share == share.id
    assert refused(guarded.admit(head("/s/sbx-2/mcp", token=token))).error.kind == "permission_denied"


class TicketBook:
    """Keeps the digests of tickets, each for one use; the store may be away."""

    def __init__(self) -> None:
        self.kept: dict[tuple[SandboxId, str], str] = {}
        self.is_away = False

    async def put_ticket(
        self, sandbox_id: SandboxId, digest: str, text: str, *, ttl_seconds: float, most: int
    ) -> None:
        self.kept[sandbox_id, digest] = text

    async def take_ticket(self, sandbox_id: SandboxId, digest: str, by: str) -> str | None:
        if self.is_away:
            raise ConnectFailed("the store is away")
        return self.kept.pop((sandbox_id, digest), None)


async def test_a_ticket_admits_its_one_request_alone(keys: Path) -> None:
    book, sandbox = TicketBook(), SandboxId("sbx-1")
    guarded, tickets = gate(keys, local=False), Tickets(book)
    guarded.take_tickets(tickets)
    assert "wants a bearer token" in refused(guarded.admit(head("/s/sbx-1/files/a"))).error.message
    _, target = await tickets.mint(sandbox, "ann", "POST", b"/s/sbx-1/files/a", by="local", ttl_seconds=9, max_bytes=7)

    async def verdict() -> Admitted | Refusal:
        asked = guarded.admit(head(target))
        assert isinstance(asked, Awaitable)
        return await asked

    book.is_away = True
    away = refused(await verdict())
    assert (away.status, dict(away.headers)["Retry-After"]) == (503, "10")
    book.is_away = False
    let_in = admitted(await verdict())
    assert (let_in.principal.subject, let_in.principal.sandbox, let_in.max_bytes) == ("ann", sandbox, 7)
    assert "ask for a new one" in refused(await verdict()).error.message
