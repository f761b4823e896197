"""A sandbox's record: the hive's word on one sandbox, kept by the backend beside the instance.

Every replica reads it, and it changes only by compare-and-set on its revision, which the backend counts. No secret is
in it, and nothing that changes often.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

from ash_mcp.types import Cause, EndReason, Scope, SessionName
from ash_router.admission.shares import NO_SHARES, Shares
from ash_router.store.base import Run

__all__ = ["RECORD_VERSION", "Ending", "Record", "UnreadableRecord"]

RECORD_VERSION: Final = 7
_WITHOUT_RUN_OR_SHARES: Final = 6
"""The version before knew neither, nor ports. What has none of them is still written so, for replicas that read no
newer one."""


class UnreadableRecord(Exception):
    """The record is of another version, or no record at all; the instance is another hive's to care for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The decision to end a sandbox. The first one that is recorded holds."""

    reason: EndReason
    cause: Cause
    at: float
    """When it was decided, in seconds since the epoch."""
    by: str
    """The replica that decided, and that deletes the instance."""
    message: str | None = None
    """One sentence for the owner; None where the reason says all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that a replica needs to serve, limit and end a sandbox. Times are seconds since the epoch."""

    owner: str
    scope: Scope
    session: SessionName
    recipe: str
    key: str | None = None
    """The idempotency key of its spawn."""
    maker: str
    """The replica that starts it; until it is ready, only that one knows how it stands."""
    created_at: float
    start_by: float
    """When a start that is not ready has failed."""
    expires_at: float
    idle_seconds: float | None
    ready_at: float | None = None
    """None while it starts."""
    toolset: str | None = None
    """The digest of its pinned tools, from ready on."""
    recipe_digest: str | None = None
    """What the recipe was, for those that are started from its snapshots; None: not known."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    alias: str | None = None
    """One more global name of it, which nobody can choose: the uuid that the seed's REST gave it."""
    network: str | tuple[str, ...] = "none"
    """The policy in force, as `SandboxSpec.network`. It changes by `Backend.set_network` alone, in the same step."""
    warnings: tuple[str, ...] = ()
    shares: Shares = NO_SHARES
    """Whom it was handed to."""
    ending: Ending | None = None
    """None while the sandbox is wanted."""
    run: Run | None = None
    """What it ends with; None: it was spawned in no run."""
    ports: tuple[int, ...] = ()
    """Those inside it that the hive leads to."""

    def to_json(self) -> dict[str, Any]:
        shape: dict[str, Any] = {
            "version": RECORD_VERSION,
            **asdict(self),
            "warnings": list(self.warnings),
            "ports": list(self.ports),
        }
        shape["shares"] = self.shares.to_json()
        if self.run is None and self.shares == NO_SHARES and not self.ports:
            del shape["run"], shape["shares"], shape["ports"]
            shape["version"] = _WITHOUT_RUN_OR_SHARES
        return shape

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Record:
        """Read a record.

        Raises:
            UnreadableRecord: It is of another version, or no record at all.
        """
        try:
            if found["version"] not in (RECORD_VERSION, _WITHOUT_RUN_OR_SHARES):
                raise UnreadableRecord(f"record of version {found['version']!r}")
            return _read(found)
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableRecord(f"no record: {error!r}") from error


def _read(found: Mapping[str, Any]) -> Record:
    is_whole = found["version"] == RECORD_VERSION
    ready_at, ending, toolset = found["ready_at"], found["ending"], found["toolset"]
    key, alias = found["key"], found["alias"]
    return Record(
        owner=str(found["owner"]),
        scope=Scope(str(found["scope"])),
        session=SessionName(str(found["session"])),
        recipe=str(found["recipe"]),
        key=str(key) if key is not None else None,
        maker=str(found["maker"]),
        created_at=float(found["created_at"]),
        start_by=float(found["start_by"]),
        expires_at=float(found["expires_at"]),
        idle_seconds=_seconds(found["idle_seconds"]),
        ready_at=_seconds(ready_at),
        toolset=str(toolset) if toolset is not None else None,
        recipe_digest=str(digest) if (digest := found.get("recipe_digest")) is not None else None,
        labels={str(name): str(value) for name, value in dict(found["labels"]).items()},
        alias=str(alias) if alias is not None else None,
        network=_read_network(found["network"]),
        warnings=tuple(str(warning) for warning in found["warnings"]),
        shares=Shares.from_json(found["shares"]) if is_whole else NO_SHARES,
        ending=_read_ending(ending) if ending is not None else None,
        run=Run.from_json(found["run"]) if is_whole and found["run"] is not None else None,
        ports=tuple(int(port) for port in found.get("ports", ())),
    )


def _read_network(found: Any) -> str | tuple[str, ...]:
    return found if isinstance(found, str) else tuple(str(entry) for entry in found)


def _seconds(found: Any) -> float | None:
    return float(found) if found is not None else None


def _read_ending(found: Any) -> Ending:
    fields = cast("Mapping[str, Any]", found)
    message = fields["message"]
    return Ending(
        reason=EndReason(fields["reason"]),
        cause=Cause(fields["cause"]),
        at=float(fields["at"]),
        by=str(fields["by"]),
        message=str(message) if message is not None else None,
    )
