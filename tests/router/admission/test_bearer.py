"""Which kind of bearer token one is, and what a request without a good one is told."""

from __future__ import annotations

import base64

import pytest

from ash_mcp.types import Principal
from ash_router.admission.bearer import Credentials, challenge, token_in
from ash_router.admission.credential_verdict import Known, Rejected, Verdict

METADATA = 'Bearer resource_metadata="https://hive.test/.well-known/oauth-protected-resource/mcp"'


class Says:
    """Takes the tokens that begin with its name, and knows each of them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def takes(self, token: str) -> bool:
        return token.startswith(self._name)

    def verify(self, token: str) -> Verdict:
        return Known(Principal(self._name), token)


@pytest.mark.parametrize(("token", "by"), [("key-1", "key"), ("token-1", "token"), ("word", None), ("", None)])
def test_the_form_of_a_token_says_who_can_know_it(token: str, by: str | None) -> None:
    verdict = Credentials(Says("key"), Says("token")).verify(token)
    assert (verdict.principal.subject if isinstance(verdict, Known) else None) == by
    if by is None:
        assert isinstance(verdict, Rejected) and "not one that this hive knows" in verdict.why


KEY = f"ash_{'a' * 10}_{'b' * 52}"


def basic(user: str) -> str:
    return base64.b64encode(user.encode()).decode()


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer  ", "Basic ", "Basic\t", "Token ", ""])
@pytest.mark.parametrize("token", [KEY, f"ashs_{KEY[4:]}", f"asht_{KEY[4:]}", "of.the.provider", KEY[:-9]])
def test_a_token_for_the_hive_is_found_in_whatever_holds_it(scheme: str, token: str) -> None:
    credentials = Credentials(is_issued=lambda text: "of.the.provider" in text)
    for said in (token, f"me:{token}", basic(f"{token}:x"), basic(f"me\xff:{token}"), basic(f"m:{token}").rstrip("=")):
        assert credentials.are_in(f"{scheme}{said}"), said


@pytest.mark.parametrize(
    "said",
    ["Bearer k", "Bearer eyJ.a.b", "Basic bWU6aXQ=", "Basic %", "Token flash_aaaaaaaaaa_b", f"Basic {'A' * 21}", ""],
)
def test_anothers_token_is_none_for_the_hive(said: str) -> None:
    assert not Credentials().are_in(said)


def test_a_kind_of_token_may_come_later() -> None:
    credentials = Credentials(Says("key"))
    credentials.add(Says("token"))
    assert credentials.verify("token-1") == Known(Principal("token"), "token-1")


@pytest.mark.parametrize(
    ("authorization", "token"),
    [
        ("Bearer ash_1", "ash_1"),
        ("bEARER  ash_1 ", "ash_1"),
        ("Basic YXNoXzE6", "ash_1"),  # ash_1:
        ("basic  YXNoXzE6c2VjcmV0 ", "ash_1"),  # ash_1:secret
        ("Basic YXNo*XzE6", ""),  # no letter of base64
        ("Basic YXNoXzE", ""),  # cut off
        ("Basic /////w==", ""),  # no text
        ("Digest YXNoXzE6", ""),
        ("", ""),
    ],
)
def test_a_token_comes_as_bearer_or_as_the_user_of_a_url(authorization: str, token: str) -> None:
    assert token_in(authorization) == token


@pytest.mark.parametrize(
    ("rejected", "said"),
    [
        (None, METADATA),
        (Rejected("no"), f'{METADATA}, error="invalid_token"'),
        (Rejected("no", ("a", "b")), f'{METADATA}, error="insufficient_scope", scope="a b"'),
    ],
)
def test_a_challenge_says_what_was_wrong_with_what_came(rejected: Rejected | None, said: str) -> None:
    assert challenge("https://hive.test", rejected) == ("WWW-Authenticate", said)
