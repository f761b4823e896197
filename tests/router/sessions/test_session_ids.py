"""Session ids that any replica of the hive reads, for their owner alone."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ash_router.sessions.session_ids import MAX_ID_CHARS, SessionIds

KEY = Ed25519PrivateKey.generate()
ONE, OTHER = SessionIds(KEY, "aaaaaaaa"), SessionIds(KEY, "bbbbbbbb")
SDK_ID = "0123456789abcdef" * 2
HELLO: dict[str, Any] = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"elicitation": {"form": {}}, "roots": {"listChanged": True}, "tasks": {}},
    "clientInfo": {"name": "host", "version": "1", "title": "A host"},
}


def test_another_replica_reads_what_it_takes_to_open_the_session_again() -> None:
    assert OTHER.read(ONE.write(SDK_ID, "ann", HELLO), "ann") == {
        "protocolVersion": "2025-06-18",
        "capabilities": {"elicitation": {"form": {}}, "roots": {"listChanged": True}},
        "clientInfo": {"name": "host", "version": "1"},
    }


def test_an_id_is_its_owners_and_its_hives_alone() -> None:
    written = ONE.write(SDK_ID, "ann", HELLO)
    assert OTHER.read(written, "bob") is None
    assert SessionIds(Ed25519PrivateKey.generate(), "bbbbbbbb").read(written, "ann") is None


@pytest.mark.parametrize("at", range(0, 120, 7))
def test_no_changed_id_is_read(at: int) -> None:
    written = ONE.write(SDK_ID, "ann", HELLO)
    changed = written[:at] + ("A" if written[at] != "A" else "B") + written[at + 1 :]
    assert OTHER.read(changed, "ann") is None
    assert OTHER.read(written[:at], "ann") is None


@given(
    st.dictionaries(
        st.sampled_from(["protocolVersion", "capabilities", "clientInfo"]),
        st.text()
        | st.dictionaries(st.sampled_from(["roots", "name", "version"]), st.text() | st.just({"x": "y" * 999})),
    )
)
def test_whatever_a_client_says_of_itself_its_id_is_short_and_read(params: dict[str, Any]) -> None:
    written = ONE.write(SDK_ID, "ann", params)
    assert written.isascii() and written.isprintable() and " " not in written
    assert len(written) < MAX_ID_CHARS and OTHER.read(written, "ann") is not None


@given(st.text(max_size=300))
def test_no_other_text_is_an_id(text: str) -> None:
    assert OTHER.read(text, "ann") is None
