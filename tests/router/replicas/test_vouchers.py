"""A voucher is good for one caller at one replica, for half a minute, and nothing else is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Principal, PrincipalLimits, SandboxId, Scope
from ash_router.admission.base import Admitted, Head, Refusal
from ash_router.replicas.vouchers import VoucherAdmission, Vouchers
from ash_router.upstream.call_tokens import CallTokens
from tests.router.relay_parts import legacy
from tests.router.replicas.replica_parts import Replica, open_pair
from tests.router.sessions.test_relay_sessions import message

pytestmark = pytest.mark.anyio

KEY = Ed25519PrivateKey.generate()
NOW = 1_800_000_000.5
ME = Admitted(Principal("me"), DEFAULT_SCOPE, "/mcp")
BOUND = Admitted(
    Principal("https://login#ä", frozenset({"run1", "run2"})), Scope("run1"), "/mcp", True, "key:abc", "10.0.0.9:4711"
)
LIMITED = Admitted(
    Principal("me", None, PrincipalLimits(calls=1, starting=0), '{"images":["a/*"]}', SandboxId("sbx-1")),
    DEFAULT_SCOPE,
    "/mcp",
)
GUEST = Admitted(
    Principal("share:x", sandbox=SandboxId("sbx-1"), share="x", tools=frozenset({"run", "ä"})),
    DEFAULT_SCOPE,
    "/mcp",
    by="share:x",
    url="https://hive.test",
)
EVERY = Admitted(Principal("you", frozenset()), EVERY_SCOPE, "/mcp", False, "oidc", "")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def vouchers(replica: str, key: Ed25519PrivateKey = KEY, clock: Any = lambda: NOW) -> Vouchers:
    return Vouchers(key, replica, clock=clock)


@pytest.mark.parametrize("admitted", [ME, BOUND, LIMITED, GUEST, EVERY])
def test_a_caller_is_the_same_on_the_other_side(admitted: Admitted):
    here, there = vouchers("here0000"), vouchers("there000")
    for _ in range(2):
        assert there.take(here.write("there000", admitted)) == admitted


def test_a_voucher_is_for_one_replica_and_one_key():
    here, other_key = vouchers("here0000"), Ed25519PrivateKey.generate()
    voucher = here.write("there000", ME)
    assert vouchers("elsewher").take(voucher) is None
    assert here.take(voucher) is None
    assert vouchers("there000", other_key).take(voucher) is None
    assert vouchers("there000").take(voucher) == ME


def test_a_voucher_ends_after_half_a_minute_and_a_written_one_is_good_for_half_of_that():
    clock = Clock()
    here, there = vouchers("here0000", clock=clock), vouchers("there000", clock=clock)
    first = here.write("there000", ME)
    clock.now = NOW + 14
    assert here.write("there000", ME) == first
    clock.now = NOW + 16
    assert here.write("there000", ME) != first
    clock.now = NOW + 29
    assert there.take(first) == ME
    clock.now = NOW + 31
    assert there.take(first) is None
    assert vouchers("there000", clock=clock).take(first) is None


def claims(**more: Any) -> dict[str, Any]:
    return {
        "iss": "ash",
        "aud": "ash-replica",
        "replica": "there000",
        "limits": {},
        "spawn": "",
        "sandbox": None,
        "sub": "me",
        "bound": None,
        "scope": "",
        "expand": None,
        "by": "",
        "client": "",
        "iat": int(NOW),
        "exp": int(NOW) + 30,
        **more,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"aud": "sbx-one"},
        {"replica": "elsewher"},
        {"exp": int(NOW) - 1},
        {"exp": int(NOW) + 3600},
        {"exp": None},
        {"exp": "soon"},
        {"bound": 7},
        {"sub": None},
    ],
    ids=str,
)
def test_what_only_looks_like_a_voucher_is_none(wrong: dict[str, Any]):
    there = vouchers("there000")
    assert there.take(jwt.encode(claims(), KEY, algorithm="EdDSA").encode()) == ME
    said = {key: value for key, value in claims(**wrong).items() if key not in wrong or value is not None}
    assert there.take(jwt.encode(said, KEY, algorithm="EdDSA").encode()) is None


def test_another_algorithm_or_no_signature_is_none():
    there = vouchers("there000")
    assert there.take(jwt.encode(claims(), "k" * 32, algorithm="HS256").encode()) is None
    assert there.take(jwt.encode(claims(), "", algorithm="none").encode()) is None
    good = jwt.encode(claims(), KEY, algorithm="EdDSA").encode()
    for bad in (b"", b"x.y.z", good[:-2], good + b"x", b"\xff" * 40):
        assert there.take(bad) is None


def test_a_sandboxs_call_token_is_no_voucher():
    for sandbox_id in ("there000", "ash-replica"):
        token = CallTokens(KEY, clock=lambda: NOW, ttl_seconds=30).mint(SandboxId(sandbox_id))
        assert vouchers("there000").take(token) is None


def test_only_one_voucher_and_only_mcp_is_admitted():
    voucher = vouchers("here0000").write("there000", ME)
    admission = VoucherAdmission(vouchers("there000"))

    def admit(target: bytes, *sent: bytes) -> Admitted | Refusal:
        return admission.admit(Head("POST", target, [(b"ash-voucher", one) for one in sent], None))

    assert admit(b"/mcp", voucher) == ME
    assert isinstance(admit(b"/mcp", voucher, voucher), Refusal)
    for target in (b"/", b"/mcp/", b"/mcp?scope=x", b"/metrics", b"/s/sb1/mcp"):
        assert isinstance(admit(target, voucher), Refusal)


async def refusal(replica: Replica, more: str = "", path: str = "/mcp") -> tuple[int, Any]:
    request = legacy(message("tools/list", {}, 1), more=more).replace(b" /mcp ", f" {path} ".encode(), 1)
    async with replica.connect_inside() as wire:
        await wire.send(request)
        status, _, body = await wire.answer()
        return status, json.loads(body)


async def test_the_internal_listener_takes_nobody_without_a_voucher(tmp_path: Path):
    async with open_pair(tmp_path) as pair:
        mine = pair.owner.vouchers.write(pair.other.replicas.id, ME).decode()
        late = Vouchers(pair.key, "x", clock=lambda: 1.0).write(pair.owner.replicas.id, ME).decode()
        forged = Vouchers(Ed25519PrivateKey.generate(), "x").write(pair.owner.replicas.id, ME).decode()
        tries = ["", "x-principal: me\r\n", "authorization: Bearer x\r\n"]
        tries += [f"ash-voucher: {said}\r\n" for said in ("", "x", mine, late, forged)]
        for more in tries:
            for path in ("/mcp", "/healthz", "/s/sb1/mcp"):
                status, body = await refusal(pair.owner, more, path)
                assert (status, body["error"]["kind"]) == (401, "unauthenticated")
        good = pair.other.vouchers.write(pair.owner.replicas.id, ME).decode()
        assert (await refusal(pair.owner, f"ash-voucher: {good}\r\nmcp-session-id: x\r\n"))[0] == 404
        assert len(pair.owner.requests) == 1
