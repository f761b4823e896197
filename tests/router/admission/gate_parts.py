"""What the tests of the gate share: heads of requests, and a gate that knows its host and its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ash_router.admission import Admitted, Head, Refusal
from ash_router.credentials import Credentials
from ash_router.gate import Gate
from ash_router.keys import KeyFile, KeyRing
from ash_router.names import NameRules

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
    return Gate(names, Credentials(keys=KeyRing(KeyFile(keys)), tokens=more.pop("tokens", None)), local=local, **more)


def admitted(verdict: object) -> Admitted:
    assert isinstance(verdict, Admitted), verdict
    return verdict


def refused(verdict: object) -> Refusal:
    assert isinstance(verdict, Refusal), verdict
    return verdict


def challenge_of(refusal: Refusal) -> str:
    return dict(refusal.headers)["WWW-Authenticate"]
