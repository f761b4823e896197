"""What the tests of the gate share: heads of requests, and a gate that knows its host and its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ash_router.admission.api_keys import KeyFile, KeyRing
from ash_router.admission.base import Admitted, Head, Refusal
from ash_router.admission.bearer import Credentials
from ash_router.admission.gate import Gate
from ash_router.admission.host_names import NameRules

PORT = 8420


def head(
    target: str = "/mcp",
    *,
    host: str | None = "127.0.0.1:8420",
    more: Sequence[tuple[bytes, bytes]] = (),
    token: str | None = None,
    connection: object | None = None,
) -> Head:
    headers = [(b"host", host.encode())] if host is not None else []
    if token is not None:
        headers.append((b"authorization", f"Bearer {token}".encode()))
    return Head("POST", target.encode(), [*headers, *more], ("127.0.0.1", 1), ("127.0.0.1", PORT), connection)


def gate(keys: Path, *, local: bool = True, **more: Any) -> Gate:
    names = NameRules(
        port=PORT, hosts=["hive.test"], origins=["https://page.test"], any_address=more.pop("any_address", False)
    )
    credentials = more.pop("credentials", None) or Credentials(KeyRing(KeyFile(keys)), *more.pop("verifiers", ()))
    return Gate(names, credentials, local=local, **more)


def admitted(verdict: object) -> Admitted:
    assert isinstance(verdict, Admitted), verdict
    return verdict


def refused(verdict: object) -> Refusal:
    assert isinstance(verdict, Refusal), verdict
    return verdict


def challenge_of(refusal: Refusal) -> str:
    return dict(refusal.headers)["WWW-Authenticate"]
