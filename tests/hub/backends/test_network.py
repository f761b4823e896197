"""Network policies as every backend checks them, and the audit's lines of what an egress proxy decided."""

from __future__ import annotations

import json
import logging

import pytest

from ash_hub.backends.network import audit_decision, is_narrower, require_network
from ash_mcp.errors import ConfigError


def test_a_policy_that_nobody_can_read_is_refused_before_anything_starts() -> None:
    require_network(("example.com",), private=False)
    with pytest.raises(ConfigError, match="too wide"):
        require_network(("*.com",), private=True)


def test_a_private_address_may_be_named_only_where_the_hive_lets_it() -> None:
    named = ("10.0.0.1:80",)
    require_network(named, private=True)
    with pytest.raises(ConfigError, match=r"private addresses, such as 10\.0\.0\.1"):
        require_network(named, private=False)


def test_of_two_policies_the_narrower_is_known_and_one_that_cannot_be_read_is_refused() -> None:
    assert is_narrower(["a.test"], "internet") and is_narrower("none", ["a.test"]) and is_narrower("none", "none")
    assert not is_narrower("internet", ["a.test"])
    with pytest.raises(ConfigError, match="too wide"):
        is_narrower(["*.com"], "internet")


def test_a_decision_is_a_line_of_the_audit_without_what_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    decision = {"event": "egress", "sandbox": "sbx-x", "time": 0.5, "decision": "refused", "address": None}
    with caplog.at_level(logging.INFO, "ash.audit"):
        audit_decision(decision)
    assert json.loads(caplog.messages[0]) == {
        "at": "1970-01-01T00:00:00.500Z",
        "event": "egress",
        "outcome": "refused",
        "sandbox": "sbx-x",
    }
