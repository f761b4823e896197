"""The network policy of a spec, and the audit's line for each decision of the egress proxy that carries it out."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ash_hub.egress.policy import Policy, PolicyError
from ash_mcp.errors import ConfigError

__all__ = ["audit_decision", "is_narrower", "require_network"]

_AUDIT = logging.getLogger("ash.audit")


def is_narrower(network: str | Sequence[str], than: str | Sequence[str]) -> bool:
    """Say whether a policy lets out nothing that another one would not; one is narrower than itself.

    Raises:
        ConfigError: One of them cannot be read.
    """
    return _read(network).is_within(_read(than))


def require_network(network: str | Sequence[str], *, private: bool) -> None:
    """Refuse a network policy that no egress proxy could carry out.

    Args:
        private: Whether a policy may name an address that is not public.

    Raises:
        ConfigError: It cannot be read, or names what it may not.
    """
    policy = _read(network)
    if policy.private and not private:
        raise ConfigError(f"network: this hive lets nobody name private addresses, such as {policy.private[0]}")


def _read(network: str | Sequence[str]) -> Policy:
    try:
        return Policy.parse(network)
    except PolicyError as error:
        raise ConfigError(f"network: {error}") from error


def audit_decision(decision: Mapping[str, Any]) -> None:
    """Write a decision of the egress proxy, as `egress/main.py` describes it, as the audit writes its lines."""
    at = datetime.datetime.fromtimestamp(decision["time"], datetime.UTC).isoformat(timespec="milliseconds")
    line = {"at": at.replace("+00:00", "Z"), "event": "egress", "outcome": decision["decision"]}
    told = {key: value for key, value in decision.items() if key not in ("time", "event", "decision")}
    _AUDIT.info(json.dumps(line | {key: value for key, value in told.items() if value is not None}))
