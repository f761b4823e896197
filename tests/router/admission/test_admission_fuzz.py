"""Admission meets any head at all: it answers each with a verdict, and never a stranger with an admission."""

from __future__ import annotations

import ipaddress
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, valid_scope
from ash_router.admission.api_keys import KeyFile
from ash_router.admission.base import Admitted, Head, Refusal
from ash_router.admission.bearer import RESOURCE_METADATA_PATH
from ash_router.admission.gate import Gate
from ash_router.admission.host_names import NameRules
from ash_router.admission.request_scope import read_request_scope
from tests.router.admission.gate_parts import gate

fuzz = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

OPEN = {"/healthz", "/readyz", "/readyz/calls", RESOURCE_METADATA_PATH}
near = st.sampled_from(
    ["127.0.0.1", "localhost", "[::1]", "127.1", "0x7f.1", "2130706433", "localhost.", "127.0.0.1.evil.test", "::1"]
)
hosts = st.one_of(near, st.builds("{}:{}".format, near, st.integers(-1, 70_000)), st.text(max_size=30))
targets = st.one_of(
    st.sampled_from("/mcp /mcp/ /mcp/in/a /mcp/in/%2e%2e //mcp /mcp/../metrics /%6dcp /metrics".split()),
    st.builds("/mcp?scope={}&expand={}".format, st.text(max_size=10), st.text(max_size=5)),
    st.builds("/{}".format, st.text(string.printable, max_size=40)),
).map(lambda text: text.encode("latin-1", "replace"))
names = st.sampled_from(
    [b"origin", b"authorization", b"ash-scope", b"host", b"x-forwarded-for", b"cookie", b"forwarded"]
)
values = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"Bearer ", b"Bearer x", b"null", b"http://localhost:8420"])
)
extras = st.lists(st.tuples(names, values), max_size=6)


def head_of(target: bytes, host: str | None, more: list[tuple[bytes, bytes]]) -> Head:
    own = [] if host is None else [(b"host", host.encode("latin-1", "replace"))]
    return Head("POST", target, [*own, *more], ("192.0.2.1", 7))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Gate:
    """A gate away from loopback, with one key that no request of these tests has."""
    KeyFile(tmp_path / "keys.json").add(subject="ann")
    return gate(tmp_path / "keys.json", local=False)


@fuzz
@given(targets, st.none() | hosts, extras)
@example(b"/mcp", "127.0.0.1:8420", [(b"authorization", b"Bearer ")])
@example(b"/healthz", "127.0.0.1", [(b"authorization", b"x"), (b"authorization", b"y")])
def test_nobody_without_a_credential_comes_in_but_by_the_open_doors(
    elsewhere: Gate, target: bytes, host: str | None, more: list[tuple[bytes, bytes]]
) -> None:
    verdict = elsewhere.admit(head_of(target, host, more))
    assert isinstance(verdict, Admitted | Refusal)
    if isinstance(verdict, Admitted):
        assert verdict.path in OPEN or verdict.path.startswith(f"{RESOURCE_METADATA_PATH}/")
        assert verdict.principal.subject != "local"
    else:
        assert verdict.status is None or 400 <= verdict.status < 600
        assert all("\r" not in value and "\n" not in value for _, value in verdict.headers)


@fuzz
@given(hosts)
@example("127.0.0.1.evil.test")
@example("localhost:8420:8420")
@example("[::1]x")
def test_a_host_that_is_believed_is_loopback_in_its_plain_form(host: str) -> None:
    if NameRules(port=8420).check(head_of(b"/mcp", host, [])) is None:
        name = host.encode("latin-1", "replace").decode("latin-1").strip().lower()
        bare = name if name.endswith("]") or ":" not in name else name.rpartition(":")[0]
        assert bare == "localhost" or ipaddress.ip_address(bare.strip("[]")).is_loopback


@fuzz
@given(targets, extras)
def test_what_is_asked_has_one_legal_scope_and_a_known_path(target: bytes, more: list[tuple[bytes, bytes]]) -> None:
    asked = read_request_scope(head_of(target, "localhost", more))
    if not isinstance(asked, Refusal):
        assert asked.scope in (None, DEFAULT_SCOPE, EVERY_SCOPE) or valid_scope(asked.scope or "")
        assert asked.expand in (None, True, False)
        assert asked.path != "/mcp/"
