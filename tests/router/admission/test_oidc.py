"""Tokens of a real issuer: what is checked in them, how its keys are fetched, kept and renewed."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Generator
from typing import Any

import anyio
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from ash_mcp.errors import ConnectFailed
from ash_router.admission.credential_verdict import Known, Rejected, Verdict
from ash_router.admission.jwks import ProviderKeys
from ash_router.admission.oidc import Oidc, OidcRules
from tests.router.admission.issuer import AUDIENCE, Issuer, running_issuer

pytestmark = pytest.mark.anyio

JWKS = "/keys"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def issuer() -> Generator[Issuer]:
    with running_issuer() as issuer:
        yield issuer


class Clocks:
    """Both clocks of a verifier, moved by the test."""

    def __init__(self) -> None:
        self.passed = 0.0

    def wall(self) -> float:
        return time.time() + self.passed

    def monotonic(self) -> float:
        return 1000.0 + self.passed


class Verifier(Oidc):
    """Knows its clocks, so that a test can move them."""

    clocks: Clocks


def verifier(issuer: Issuer, **rules: Any) -> Verifier:
    clocks = Clocks()
    made = Verifier(
        OidcRules(issuer=issuer.url, audience=(AUDIENCE,), **rules),
        ProviderKeys(issuer.url, monotonic=clocks.monotonic),
        clock=clocks.wall,
        monotonic=clocks.monotonic,
    )
    made.clocks = clocks
    return made


async def judged(oidc: Oidc, token: str) -> Verdict:
    verdict = oidc.verify(token)
    with anyio.fail_after(10):
        return await verdict if isinstance(verdict, Awaitable) else verdict


def known(verdict: Verdict) -> Known:
    assert isinstance(verdict, Known), verdict
    return verdict


def why(verdict: Verdict) -> str:
    assert isinstance(verdict, Rejected), verdict
    return verdict.why


@pytest.mark.parametrize("elliptic", [False, True])
async def test_a_token_names_its_bearer_with_the_issuer(issuer: Issuer, elliptic: bool) -> None:
    issuer.add_key("second", elliptic=elliptic)
    verdict = known(await judged(verifier(issuer), issuer.token("ann", kid="second")))
    assert verdict.principal.subject == f"{issuer.url}#ann"
    assert (verdict.by, verdict.principal.bound_scopes) == ("oidc", None)


async def test_a_token_of_the_issuer_is_known_in_a_text_good_or_not(issuer: Issuer) -> None:
    oidc, token = verifier(issuer), issuer.token(exp=1)
    for text in (token, f"a.b.{token}", f"me:{token}:", token[:-3]):
        assert oidc.is_issued(text)
    other = issuer.token(iss="https://other.test")
    odd = ".".join(base64.urlsafe_b64encode(each).decode().rstrip("=") for each in (b"{}", b'{"a' * 9, b"")) + "."
    for text in (other, odd, token.replace(".", ""), f"h.e{'A' * 15}.s", ""):
        assert not oidc.is_issued(text)


async def test_another_claim_may_name_the_bearer(issuer: Issuer) -> None:
    oidc = verifier(issuer, subject_claim="email")
    assert known(await judged(oidc, issuer.token(email="ann@x"))).principal.subject == f"{issuer.url}#ann@x"
    assert "'email'" in why(await judged(oidc, issuer.token()))
    assert "'email'" in why(await judged(oidc, issuer.token(email=["ann"])))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"iss": "https://other.test"}, "issuer"),
    ({"iss": None}, "iss"),
    ({"aud": "http://other.test/mcp"}, "audience"),
    ({"aud": None}, "aud"),
    ({"exp": time.time() - 60}, "expired"),
    ({"exp": None}, "exp"),
    ({"nbf": time.time() + 3600}, "not yet valid"),
    ({"sub": None}, "'sub'"),
    ({"sub": ""}, "'sub'"),
]


@pytest.mark.parametrize(("claims", "words"), BAD)
async def test_a_token_that_says_something_else_is_refused(issuer: Issuer, claims: dict[str, Any], words: str) -> None:
    verdict = await judged(verifier(issuer), issuer.token(**claims))
    assert words in why(verdict).lower()


async def test_a_token_of_another_signer_is_refused(issuer: Issuer) -> None:
    forger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    oidc = verifier(issuer)
    assert "ignature" in why(await judged(oidc, issuer.token(key=forger)))
    assert "key" in why(await judged(oidc, issuer.token(key=forger, kid="unheard-of")))


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


async def test_no_symmetric_or_absent_signature_is_taken(issuer: Issuer) -> None:
    oidc = verifier(issuer)
    body = jwt.decode(issuer.token(), options={"verify_signature": False})
    unsigned = f"{_part({'alg': 'none', 'kid': 'first'})}.{_part(body)}."
    # the public key is no secret: as an HMAC key it would let everybody sign
    public = issuer.answer(JWKS)["keys"][0]["n"]
    symmetric = jwt.encode(body, public, algorithm="HS256", headers={"kid": "first"})
    for token in (unsigned, symmetric):
        assert "are not taken" in why(await judged(oidc, token))
    for garbage in ("..", "a.b.c", f"{_part([])}.{_part({})}.x", "é.é.é"):
        assert why(await judged(oidc, garbage))


@pytest.mark.parametrize(
    ("claims", "good"),
    [({"scope": "a hive b"}, True), ({"scp": ["hive"]}, True), ({"scope": "hives"}, False), ({}, False)],
)
async def test_required_scopes_must_be_granted(issuer: Issuer, claims: dict[str, Any], good: bool) -> None:
    verdict = await judged(verifier(issuer, required_scopes=("hive",)), issuer.token(**claims))
    if good:
        known(verdict)
    else:
        assert isinstance(verdict, Rejected) and verdict.missing_scopes == ("hive",)


async def test_a_verdict_is_kept_a_minute_and_never_past_the_tokens_end(issuer: Issuer) -> None:
    oidc = verifier(issuer)
    long, short = issuer.token(), issuer.token(exp=time.time() + 20)
    await judged(oidc, long)
    await judged(oidc, short)
    assert isinstance(oidc.verify(long), Known) and isinstance(oidc.verify(short), Known)
    oidc.clocks.passed = 21
    assert isinstance(oidc.verify(long), Known)
    pending = oidc.verify(short)
    assert isinstance(pending, Awaitable)
    await pending
    oidc.clocks.passed = 61
    pending = oidc.verify(long)
    assert isinstance(pending, Awaitable)
    known(await pending)


async def test_keys_are_fetched_once_for_many_tokens_and_again_for_a_new_key(issuer: Issuer) -> None:
    oidc = verifier(issuer)
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(judged, oidc, issuer.token(f"user{number}"))
    assert issuer.asked[JWKS] == 1
    issuer.add_key("second")
    del issuer.keys["first"]
    oidc.clocks.passed = 11
    known(await judged(oidc, issuer.token(kid="second")))
    assert issuer.asked[JWKS] == 2


async def test_a_withdrawn_key_is_forgotten_within_minutes(issuer: Issuer) -> None:
    oidc = verifier(issuer)
    token = issuer.token()
    known(await judged(oidc, token))
    issuer.add_key("second")
    del issuer.keys["first"]
    oidc.clocks.passed = 301
    assert "does not have" in why(await judged(oidc, token))


async def test_invented_key_ids_do_not_become_requests_to_the_issuer(issuer: Issuer) -> None:
    oidc = verifier(issuer)
    for number in range(50):
        why(await judged(oidc, issuer.token(kid=f"invented{number}", key=issuer.keys["first"])))
    assert issuer.asked[JWKS] == 1


async def test_an_issuer_that_is_away_makes_nobody_a_stranger(issuer: Issuer) -> None:
    issuer.away = True
    oidc = verifier(issuer)
    with pytest.raises(ConnectFailed) as failed:
        await judged(oidc, issuer.token())
    assert failed.value.retryable
    asked = sum(issuer.asked.values())
    with pytest.raises(ConnectFailed):
        await judged(oidc, issuer.token())
    assert sum(issuer.asked.values()) == asked  # it is left in peace for a while
    issuer.away = False
    oidc.clocks.passed = 11
    known(await judged(oidc, issuer.token()))
    issuer.away = True
    oidc.clocks.passed = 400
    known(await judged(oidc, issuer.token("bob", exp=time.time() + 5000)))  # its known keys are good for an hour
    oidc.clocks.passed = 4000
    with pytest.raises(ConnectFailed):
        await judged(oidc, issuer.token("cid", exp=time.time() + 5000))


async def test_a_discovery_document_of_another_issuer_is_not_believed(issuer: Issuer) -> None:
    issuer.claims_to_be = "https://other.test"
    with pytest.raises(ConnectFailed):
        await judged(verifier(issuer), issuer.token())
    assert issuer.asked[JWKS] == 0


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b"[" + b" " * 600_000),
        httpx.Response(302, headers={"location": "http://169.254.169.254/"}),
        httpx.Response(200, json=["keys"]),
        httpx.Response(200, json={"keys": []}),
        httpx.Response(200, json={"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "first"}, 7, {"kty": "RSA"}]}),
        httpx.Response(200, content=b"<html>"),
    ],
    ids=["huge", "redirect", "list", "none", "symmetric", "html"],
)
async def test_keys_that_make_no_sense_are_none(issuer: Issuer, answer: httpx.Response) -> None:
    asked: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return answer

    keys = ProviderKeys(issuer.url, "http://127.0.0.1/keys", transport=httpx.MockTransport(respond))
    with pytest.raises(ConnectFailed):
        await keys.get("first")
    assert asked == ["http://127.0.0.1/keys"]
