"""The limit that holds for a principal, the smaller of the hive's and its key's, and the refusal that says whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ash_mcp.errors import CapacityExceeded

__all__ = ["EffectiveLimit", "Kind", "effective_limit", "guests_exceeded", "optional_limit"]

Kind = Literal["sandboxes", "starting", "waiting", "calls", "streams", "sessions", "backchannels", "runs"]
"""As in `PrincipalLimits`; the setting is `limits.<kind>_per_owner`, the option of `ash key new` is `--max-<kind>`."""

_SAID: Final[Mapping[Kind, tuple[str, str, float]]] = {
    "sandboxes": ("{} sandboxes", "destroy one, or come back later", 10.0),
    "starting": ("{} sandboxes that are not ready yet", "come back when one of them is", 2.0),
    "waiting": ("{} spawns that wait for a start", "come back when one of them has begun", 5.0),
    "calls": ("{} calls in flight", "wait for one of them to end", 1.0),
    "streams": ("{} streams open", "close one of them", 1.0),
    "sessions": ("{} MCP sessions", "end with DELETE what you no longer use, or wait until one idles out", 1.0),
    "runs": ("{} open runs", "destroy one, or wait until the lease of one is over", 10.0),
    "backchannels": (
        "{} sessions in which sandboxes may ask you",
        "end sessions that you no longer use",
        1.0,
    ),
}
"""By kind: what was counted, the advice, and when to come back, in seconds."""


@dataclass(frozen=True, slots=True)
class EffectiveLimit:
    """How many of something a principal may have at once, and who set that limit."""

    most: int
    by_key: bool = False
    """Whether the principal's key sets the limit, and not the hive."""
    by_share: bool = False
    """Whether it is the limit of each share."""

    def reached(self, kind: Kind) -> CapacityExceeded:
        """Return the refusal of one more; `data["limit"]` is `key`, `share` or `owner`."""
        what, advice, seconds = _SAID[kind]
        if self.by_share:
            whose, raised = "a share allows here", f"have the limit raised (ASH_HUB_LIMITS__{kind.upper()}_PER_SHARE)"
        elif self.by_key:
            whose, raised = "your key allows", f"use a key with a larger --max-{kind} (ash key new)"
        else:
            setting = f"ASH_HUB_LIMITS__{kind.upper()}_PER_OWNER"
            whose, raised = "one owner may have here", f"have the limit raised ({setting})"
        message = f"you have {what.format(self.most)}, as many as {whose}; {advice}, or {raised}"
        whose_limit = "share" if self.by_share else "key" if self.by_key else "owner"
        return CapacityExceeded(message, limit=whose_limit, retry_after_seconds=seconds)


def effective_limit(hive: int, key: int | None, *, by_share: bool = False) -> EffectiveLimit:
    """Return the limit that holds where the hive always has one; a key or a share can only lower it."""
    if key is None or key >= hive:
        return EffectiveLimit(hive)
    return EffectiveLimit(key, by_key=not by_share, by_share=by_share)


def guests_exceeded(most: int, what: Kind) -> CapacityExceeded:
    """Return the refusal of one more of all guests of one sandbox together, who may have `most`."""
    message = f"the guests of this sandbox have {most} {what} open together, as many as one owner may; come back later"
    return CapacityExceeded(message, limit="owner", retry_after_seconds=1.0)


def optional_limit(hive: int | None, key: int | None) -> EffectiveLimit | None:
    """Return the limit that holds where either the hive or the key may have none; None if neither has one."""
    if hive is None:
        return None if key is None else EffectiveLimit(key, by_key=True)
    return effective_limit(hive, key)
