"""Shares: each opens one sandbox, for some of its tools and ports and for nothing else of the hive. Pure.

A sandbox's record and its route have its shares, as hashes. So a share lives as long as its sandbox, a store that was
emptied is told of it again with the route, and what is missing is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ash_mcp.errors import CapacityExceeded, NotFound
from ash_mcp.types import ShareInfo
from ash_router.admission.secret_tokens import digest_of, new_label, new_token

__all__ = ["NO_SHARES", "SHARE_PREFIX", "Share", "Shares", "new_share"]

SHARE_PREFIX: Final = "ashs_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One share as it is stored, without its token. Times are seconds since the epoch, in the hive's own time."""

    id: str
    """The public part of the token, which lists and the audit show."""
    sha256: str
    """Of the whole token, in hexadecimal."""
    tools: tuple[str, ...]
    """The tools that it opens, by the sandbox's own names."""
    created_at: float
    expires_at: float | None = None
    """None: when its sandbox ends."""
    ports: tuple[int, ...] = ()
    """The ports inside the sandbox that it opens."""
    label: str = ""
    """With ports: the random part of the host names under which browsers see them. Nothing else has ever had it."""

    @property
    def info(self) -> ShareInfo:
        """What the owner of its sandbox may see."""
        return ShareInfo(
            id=self.id, tools=self.tools, created_at=self.created_at, expires_at=self.expires_at, ports=self.ports
        )

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


def new_share(
    tools: Sequence[str], now: float, ttl_seconds: float | None, ports: Sequence[int] = ()
) -> tuple[Share, str]:
    """Return a new share and its token, which is stored nowhere.

    Args:
        tools: By the sandbox's own names.
        ttl_seconds: None: it is good until its sandbox ends.
        ports: Of servers inside the sandbox.
    """
    share_id, token = new_token(SHARE_PREFIX)
    expires_at = None if ttl_seconds is None else now + ttl_seconds
    share = Share(
        id=share_id,
        sha256=digest_of(token),
        tools=tuple(tools),
        created_at=now,
        expires_at=expires_at,
        ports=tuple(ports),
        label=new_label(share_id) if ports else "",
    )
    return share, token


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of one sandbox. Every change makes a later version, and of two versions the later one is true."""

    version: int = 0
    held: tuple[Share, ...] = ()

    def living(self, now: float) -> list[Share]:
        return [share for share in self.held if not share.expired(now)]

    def plus(self, share: Share, now: float, most: int) -> Shares:
        """Return them with one more, without those that have expired.

        Raises:
            CapacityExceeded: There are `most` already.
        """
        living = self.living(now)
        if len(living) >= most:
            message = f"this sandbox has {most} shares, as many as it may; revoke one, or let one expire"
            raise CapacityExceeded(message, limit="hive", retryable=False)
        return Shares(self.version + 1, (*living, share))

    def minus(self, ids: Collection[str], now: float) -> Shares:
        """Return them without the shares of these ids, and without those that have expired.

        Raises:
            NotFound: The sandbox has no share of one of the ids; nothing is revoked then.
        """
        unknown = sorted(set(ids) - {share.id for share in self.held})
        if unknown:
            raise NotFound(f"this sandbox has no share {', '.join(unknown)}; it may have expired")
        return Shares(self.version + 1, tuple(share for share in self.living(now) if share.id not in ids))

    def later(self, other: Shares) -> Shares:
        """Return the later one of two versions."""
        return other if other.version > self.version else self

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "held": [_write(share) for share in self.held]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Shares:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        return cls(int(found["version"]), tuple(_read(fields) for fields in found["held"]))


NO_SHARES: Final = Shares()


def _write(share: Share) -> dict[str, Any]:
    fields = asdict(share)
    if not share.ports:
        del fields["ports"], fields["label"]
    return fields


def _read(fields: Mapping[str, Any]) -> Share:
    expires_at = fields["expires_at"]
    return Share(
        id=str(fields["id"]),
        sha256=str(fields["sha256"]),
        tools=tuple(str(tool) for tool in fields["tools"]),
        created_at=float(fields["created_at"]),
        expires_at=None if expires_at is None else float(expires_at),
        ports=tuple(int(port) for port in fields.get("ports", ())),
        label=str(fields.get("label", "")),
    )
