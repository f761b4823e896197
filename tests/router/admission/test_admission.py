"""Admission sees the head alone and lets in what may come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE
from ash_router.admission.base import Admitted, Refusal
from tests.router.admission.gate_parts import admitted, gate, head, refused


def admit(
    target: str = "/mcp", *, host: str | None = "127.0.0.1:8420", more: list[tuple[bytes, bytes]] | None = None
) -> Admitted | Refusal:
    verdict = gate(Path("/nonexistent/keys.json")).admit(head(target, host=host, more=more or ()))
    assert isinstance(verdict, Admitted | Refusal)
    return verdict


@pytest.mark.parametrize("host", ["127.0.0.1:8420", "localhost:8420", "[::1]:8420", "127.9.9.9", "hive.test:99"])
def test_a_loopback_or_listed_host_comes_in_as_local(host: str) -> None:
    assert admitted(admit(host=host)).principal.subject == "local"


@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:8420", "127.0.0.1.evil.test", "169.254.169.254", "127.0.0.1:8\u0664", "", None]
)
def test_another_host_is_refused(host: str | None) -> None:
    assert refused(admit(host=host)).status in (400, 421)


def test_two_hosts_are_refused() -> None:
    assert refused(admit(more=[(b"host", b"localhost:8420")])).status == 400


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8420", "http://localhost:8420", "https://page.test"])
def test_its_own_and_listed_origins_come_in(origin: str) -> None:
    admitted(admit(more=[(b"origin", origin.encode())]))


@pytest.mark.parametrize(
    "origin", ["null", "", "http://localhost:9999", "http://127.0.0.1:8420.evil.test", "https://localhost:8420"]
)
def test_any_other_origin_is_refused_also_on_loopback(origin: str) -> None:
    assert refused(admit(more=[(b"origin", origin.encode())])).error.kind == "permission_denied"


@pytest.mark.parametrize(
    ("target", "scope", "path"),
    [
        ("/mcp", DEFAULT_SCOPE, "/mcp"),
        ("/mcp/", DEFAULT_SCOPE, "/mcp"),
        ("/mcp?scope=run42", "run42", "/mcp"),
        ("/mcp/in/run42", "run42", "/mcp"),
        ("/mcp/in/run42/?scope=run42", "run42", "/mcp"),
        ("/mcp?scope=*", EVERY_SCOPE, "/mcp"),
        ("/mcp/in/%2A", EVERY_SCOPE, "/mcp"),
        ("/metrics", DEFAULT_SCOPE, "/metrics"),
    ],
)
def test_the_scope_comes_from_path_query_or_header(target: str, scope: str, path: str) -> None:
    verdict = admitted(admit(target))
    assert (verdict.scope, verdict.path) == (scope, path)


def test_the_header_names_a_scope_too() -> None:
    assert admitted(admit(more=[(b"ash-scope", b"a.b-c_1")])).scope == "a.b-c_1"


@pytest.mark.parametrize("target", ["/mcp?scope=a&scope=b", "/mcp/in/a?scope=b", "/mcp?scope=a b", "/mcp/in/a/b"])
def test_an_illegal_or_ambiguous_scope_is_refused(target: str) -> None:
    assert refused(admit(target)).error.kind == "bad_request"


@pytest.mark.parametrize(("asked", "expand"), [("", None), ("?expand=none", False), ("?expand=all", True)])
def test_a_connection_chooses_whether_tools_are_expanded(asked: str, expand: bool | None) -> None:
    assert admitted(admit(f"/mcp{asked}")).expand is expand


def test_an_unknown_expansion_is_refused() -> None:
    assert "expand=none or expand=all" in refused(admit("/mcp?expand=some")).error.message
