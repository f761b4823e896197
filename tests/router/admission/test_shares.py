"""Shares: what is kept of them, whose tokens are good, and at which door alone."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final

import pytest

from ash_mcp.errors import AshError, CapacityExceeded, ConnectFailed, NotFound, PermissionDenied, Unauthenticated
from ash_mcp.types import DEFAULT_SCOPE, Principal, PrincipalLimits, SandboxId
from ash_router.admission.base import Admitted, Refusal
from ash_router.admission.credential_verdict import Known, Rejected
from ash_router.admission.gate import Gate
from ash_router.admission.share_tokens import SharedSandbox, ShareTokens
from ash_router.admission.shares import NO_SHARES, Shares, new_share
from tests.router.admission.gate_parts import admitted, gate, head, refused

pytestmark = pytest.mark.anyio

BOX: Final = SandboxId("sbx-shared")
NAMES: Final = frozenset({BOX, "sb1"})


class Hive:
    """A clock, and the shares that a process knows and that others have made."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.known: dict[str, SharedSandbox] = {}
        self.elsewhere: dict[str, SharedSandbox] = {}
        self.away = False
        self.looks = 0

    def share(self, ttl: float | None = None, *, elsewhere: bool = False) -> tuple[str, str]:
        share, token = new_share(["run", "stop"], self.now, ttl)
        (self.elsewhere if elsewhere else self.known)[share.id] = SharedSandbox(share, BOX, NAMES)
        return share.id, token

    async def look_up(self) -> None:
        self.looks += 1
        if self.away:
            raise ConnectFailed("away")
        self.known |= self.elsewhere

    def tokens(self, *, alone: bool = True) -> ShareTokens:
        limits = PrincipalLimits(calls=3)
        return ShareTokens(self.known.get, None if alone else self.look_up, lambda: self.now, limits)

    def gate(self, keys: Path, *, alone: bool = True) -> Gate:
        made = gate(keys)
        made.take_shares(self.tokens(alone=alone))
        return made


@pytest.fixture
def hive() -> Hive:
    return Hive()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def verdict(tokens: ShareTokens, token: str) -> Known | Rejected:
    said = tokens.verify(token)
    assert not isinstance(said, Awaitable)
    return said


def test_whoever_has_the_token_is_a_guest_of_one_sandbox(hive: Hive):
    share_id, token = hive.share()
    known = verdict(hive.tokens(), token)
    assert isinstance(known, Known)
    assert known.principal == Principal(
        f"share:{share_id}",
        limits=PrincipalLimits(calls=3),
        sandbox=BOX,
        share=share_id,
        tools=frozenset({"run", "stop"}),
    )
    assert (known.by, known.names) == (f"share:{share_id}", NAMES)


def test_a_token_is_stored_nowhere(hive: Hive):
    share, token = new_share(["run"], 0.0, 5.0)
    kept = Shares(1, (share,))
    assert token not in str(kept.to_json()) and token[-52:] not in repr(kept)
    assert Shares.from_json(kept.to_json()) == kept and share.expires_at == 5.0


@pytest.mark.parametrize("change", ["another secret", "another id", "cut", "longer", "none", "case", "newline"])
def test_no_other_text_is_the_token(hive: Hive, change: str):
    _, token = hive.share()
    _, other = hive.share()
    forged = {
        "another secret": token[:16] + other[16:],
        "another id": other[:16] + token[16:],
        "cut": token[:-1],
        "longer": token + "a",
        "none": "ashs_",
        "case": token.upper(),
        "newline": token + "\n",
    }[change]
    tokens = hive.tokens()
    assert isinstance(verdict(tokens, token), Known)
    assert isinstance(verdict(tokens, forged), Rejected)


def test_a_share_is_over_at_its_time_and_when_it_is_known_no_more(hive: Hive):
    (first, token), (_, other) = hive.share(ttl=10), hive.share()
    tokens = hive.tokens()
    guest = verdict(tokens, token)
    assert isinstance(guest, Known) and tokens.is_good(guest.principal)
    hive.now += 9.9
    assert isinstance(verdict(tokens, token), Known) and tokens.is_good(guest.principal)
    hive.now += 0.1
    expired = verdict(tokens, token)
    assert isinstance(expired, Rejected) and not tokens.is_good(guest.principal)
    assert isinstance(verdict(tokens, other), Known)
    del hive.known[first]
    hive.now = 1000.0
    assert verdict(tokens, token) == expired, "nobody learns whether there ever was such a share"
    assert not tokens.is_good(guest.principal) and tokens.is_good(Principal("an owner"))


async def test_one_that_another_process_made_is_looked_up_and_a_known_one_is_not(hive: Hive):
    (_, here), (_, there) = hive.share(), hive.share(elsewhere=True)
    tokens = hive.tokens(alone=False)
    assert isinstance(verdict(tokens, here), Known) and hive.looks == 0
    later = tokens.verify(there)
    assert isinstance(later, Awaitable)
    assert isinstance(await later, Known) and hive.looks == 1


async def test_while_the_store_is_away_an_unknown_share_is_503_and_not_refused(hive: Hive, tmp_path: Path):
    _, token = hive.share(elsewhere=True)
    hive.away = True
    said: Any = hive.gate(tmp_path / "keys.json", alone=False).admit(head("/s/sb1/mcp", token=token))
    refusal = refused(await said)
    assert refusal.status == 503 and isinstance(refusal.error, ConnectFailed)


@pytest.mark.parametrize("target", ["/s/sb1/mcp", "/s/sb1/mcp/", f"/s/{BOX}/mcp", "/s/%73b1/mcp", "/s/sb1/mcp?x=1"])
def test_a_share_opens_its_own_door_as_if_it_were_the_hives(hive: Hive, tmp_path: Path, target: str):
    _, token = hive.share()
    said = admitted(hive.gate(tmp_path / "keys.json").admit(head(target, token=token)))
    assert (said.path, said.scope, said.principal.sandbox, said.expand) == ("/mcp", DEFAULT_SCOPE, BOX, None)


@pytest.mark.parametrize("name", ["sb1", BOX])
def test_it_opens_the_hives_endpoint_for_its_own_sandbox_alone(hive: Hive, tmp_path: Path, name: str):
    _, token = hive.share()
    own = hive.gate(tmp_path / "keys.json")
    named = [(b"x-session-id", name.encode())]
    assert admitted(own.admit(head("/mcp", token=token, more=named))).path == "/mcp"
    for other in ("sbx-other", "sb2", "", "*", "SB1", "sb1,sbx-other"):
        for more in ([(b"x-session-id", other.encode())], [*named, (b"x-session-id", other.encode())]):
            assert isinstance(own.admit(head("/mcp", token=token, more=more)), Refusal)
            assert isinstance(own.admit(head(f"/s/{name}/mcp", token=token, more=more)), Refusal)


OTHER_DOORS: Final = (
    "/mcp", "/mcp/in/run1", "/mcp?scope=run1", "/", "/metrics", "/readyz/x", "/spawn", "/deprovision/sb1", "/s/sb1",
    "/s/sb2/mcp", "/s/sbx-other/mcp", "/s//mcp", "/s/sb1/_ash/health", "/s/sb1/files/x", "/_ash/health", "/s/sb1/mcpx",
    "/s/sb1/mcp/..", "/s/sb1/mcp/../../mcp", "/s/sb1/../sb2/mcp", "/s/sb2/../sb1/mcp", "/s/./sb1/mcp", "//s/sb1/mcp",
    "/s/sb1%2fmcp/x", "/s/sb1/mcp%2f..%2f..%2fmcp", "/s/sb1%2f..%2fsb2/mcp", "/s/%2573b1/mcp", "/s/sb1%252fmcp",
    "/s/sb1%00/mcp", "/s/sb1/mcp%00", "/s/sb1/mcp%0a", "/s\\sb1\\mcp", "/s/sb1%5cmcp", "/s/sb1/mcp;x", "/S/sb1/mcp",
    "/s/sb1/MCP", "/s/sb1/mcp//", "/s/*/mcp", "/s/sb1%20/mcp", "/s/%ff/mcp", "/s/sb1/mcp%23", "/s/sb%EF%BC%91/mcp",
)  # fmt: skip


def test_every_other_door_gets_one_and_the_same_refusal(hive: Hive, tmp_path: Path):
    _, token = hive.share()
    own = hive.gate(tmp_path / "keys.json")
    said: list[AshError] = []
    for target in OTHER_DOORS:
        said.append(refused(own.admit(head(target, token=token))).error)
        assert isinstance(said[-1], PermissionDenied), target
    assert {error.message for error in said} == {said[0].message}


def test_a_share_of_ports_opens_them_at_its_own_sandbox_and_its_tools_as_any_share(hive: Hive, tmp_path: Path):
    share, token = new_share(["run"], 0.0, None, [8000])
    hive.known[share.id] = SharedSandbox(share, BOX, NAMES)
    own = hive.gate(tmp_path / "keys.json")
    for target in ("/s/sb1/ports/8000", "/s/sb1/ports/8000/", f"/s/{BOX}/ports/8000/a%20b?x=y"):
        verdict = admitted(own.admit(head(target, token=token)))
        assert (verdict.path, verdict.principal.share) == (target.partition("?")[0].replace("%20", " "), share.id)
    assert admitted(own.admit(head("/s/sb1/mcp", token=token))).path == "/mcp"
    for target in ("/s/sb1/ports/8001/", "/s/sb2/ports/8000/", "/s/sb1/files/x", "/s/sb1/terminal", "/mcp", "/"):
        assert refused(own.admit(head(target, token=token))).error.kind == "permission_denied", target
    other = [(b"x-session-id", b"sb2")]
    assert isinstance(own.admit(head("/s/sb1/ports/8000/", token=token, more=other)), Refusal)
    _, without = hive.share()
    assert isinstance(own.admit(head("/s/sb1/ports/8000/", token=without)), Refusal)


def test_a_bad_token_is_401_at_every_door_and_never_the_local_user(hive: Hive, tmp_path: Path):
    _, token = hive.share(ttl=1)
    hive.now += 2
    own = hive.gate(tmp_path / "keys.json")
    for target in ("/s/sb1/mcp", "/s/sb2/mcp", "/mcp", "/metrics", "/s/sb1/ports/8000/"):
        assert isinstance(refused(own.admit(head(target, token=token))).error, Unauthenticated)
    assert isinstance(own.admit(head("/mcp")), Admitted), "without one the local user comes in"


def test_every_change_makes_a_later_version_and_expired_ones_make_room():
    first, _ = new_share(["run"], 0.0, 10.0)
    second, _ = new_share(["run"], 0.0, None)
    both = NO_SHARES.plus(first, 0.0, 2).plus(second, 0.0, 2)
    assert (both.version, both.held) == (2, (first, second))
    with pytest.raises(CapacityExceeded):
        both.plus(new_share(["run"], 0.0, None)[0], 9.0, 2)
    third, _ = new_share(["run"], 10.0, None)
    assert both.plus(third, 10.0, 2).held == (second, third)
    assert both.minus([second.id], 5.0).held == (first,)
    assert both.minus([first.id], 20.0).held == (second,), "an expired one may still be revoked"
    with pytest.raises(NotFound, match="nobody"):
        both.minus([first.id, "nobody"], 0.0)
    assert both.later(NO_SHARES) is both and NO_SHARES.later(both) is both
