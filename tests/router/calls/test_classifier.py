"""What of a session's other messages reaches its sandboxes: less for a guest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ash_mcp.types import DEFAULT_SCOPE, Principal, new_sandbox_id
from ash_router.admission.base import Admitted
from ash_router.calls import classifier
from ash_router.calls.classifier import LevelChange, RootsChange
from ash_router.http.bodies import read_message
from ash_router.sessions.session_map import LegacySession

OWNER = Principal("me")
GUEST = Principal("share:x", sandbox=new_sandbox_id(), share="x", tools=frozenset({"echo"}))


@pytest.mark.parametrize(
    ("message", "known_as"),
    [
        ({"jsonrpc": "2.0", "id": 1, "method": "logging/setLevel", "params": {"level": "debug"}}, LevelChange),
        ({"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}, RootsChange),
    ],
    ids=["level", "roots"],
)
def test_a_guest_changes_nothing_but_its_own_calls(message: dict[str, Any], known_as: type) -> None:
    read = read_message(json.dumps(message).encode())
    assert read is not None
    for principal, expected in ((OWNER, known_as), (GUEST, type(None))):
        session = LegacySession("hub", "hub", Admitted(principal, DEFAULT_SCOPE, "/mcp"), {}, "2025-11-25")
        assert type(classifier._notice(session, read)) is expected  # pyright: ignore[reportPrivateUsage]
