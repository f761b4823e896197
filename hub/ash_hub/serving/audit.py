"""The audit: one line of JSON for each spawn, claim, change of network, share, end and refused request.

A line says who, what, from where, and the outcome.

It goes to the logger `ash.audit`, which `logs.py` sends to a file of its own. No environment, secret, token or
argument of a call is ever in it.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from ash_hub.serving.redaction import redacted
from ash_mcp.errors import AshError
from ash_mcp.types import Cause, EndReason, SandboxId, SessionName
from ash_router.admission.base import Admission, Admitted, Head, Refusal, SentOn
from ash_router.admission.shares import Share

__all__ = ["AUDIT_LOGGER", "Audit", "AuditedAdmission", "missing_line"]

AUDIT_LOGGER: Final = "ash.audit"
HIVE: Final = "hive"
"""Who acts where no caller does: the controller, a stop, the watch over the backend."""

_REFUSALS_A_SECOND: Final = 20
_LONGEST: Final = 300


class Subject(Protocol):
    """A sandbox, as far as the audit tells of it."""

    @property
    def id(self) -> SandboxId: ...
    @property
    def session(self) -> SessionName: ...
    @property
    def owner(self) -> str: ...
    @property
    def recipe(self) -> str: ...


class Audit:
    """Writes the lines. Refused requests are counted instead of written beyond 20 a second, so that a flood of them
    cannot push everything else out of the file.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._log = logging.getLogger(AUDIT_LOGGER)
        self._clock = clock
        self._second = 0
        self._written = 0
        self._left_out = 0

    def spawned(self, caller: Admitted, sandbox: Subject, *, variables: int, secrets: int) -> None:
        """A sandbox was made for a caller, and got its environment and secrets."""
        what = _of(sandbox)
        self._write("spawn", "done", **_who(caller), **what, recipe=sandbox.recipe)
        self._write("claim", "done", **_who(caller), **what, variables=variables, secrets=secrets)

    def spawn_failed(self, caller: Admitted, error: AshError) -> None:
        self._write("spawn", error.kind, **_who(caller), why=error.message)

    def network_set(self, caller: Admitted, sandbox: Subject, policy: str) -> None:
        """A caller changed what a sandbox may reach."""
        self._write("network", "done", **_who(caller), **_of(sandbox), policy=policy)

    def shared(self, caller: Admitted, sandbox: Subject, share: Share) -> None:
        """A caller handed some tools and ports of a sandbox to whoever has the token of a share."""
        opened: dict[str, Any] = {"tools": len(share.tools), "ports": list(share.ports) or None}
        self._write("share", "done", **_who(caller), **_of(sandbox), share=share.id, **opened)

    def unshared(self, caller: Admitted, sandbox: Subject, share_id: str) -> None:
        self._write("unshare", "done", **_who(caller), **_of(sandbox), share=share_id)

    def ticket(self, caller: Admitted, sandbox: Subject, ticket_id: str, method: str) -> None:
        """A caller was given a URL for one request to a file of a sandbox."""
        self._write("ticket", "done", **_who(caller), **_of(sandbox), ticket=ticket_id, method=method)

    def copied(self, caller: Admitted, source: Subject, target: Subject) -> None:
        """A caller copied a file or folder from one sandbox to another."""
        self._write("copy", "done", **_who(caller), **_of(source), to=target.id)

    def frozen(self, caller: Admitted, sandbox: Subject, snapshot: str) -> None:
        """A caller took a snapshot of a sandbox."""
        self._write("snapshot", "done", **_who(caller), **_of(sandbox), snapshot=snapshot)

    def thawed(self, caller: Admitted, snapshot: str) -> None:
        """A caller removed a snapshot."""
        self._write("unsnapshot", "done", **_who(caller), snapshot=snapshot)

    def reset(self, caller: Admitted, sandbox: Subject, snapshot: str) -> None:
        """A caller took a sandbox back to a snapshot."""
        self._write("reset", "done", **_who(caller), **_of(sandbox), snapshot=snapshot)

    def destroyed(self, caller: Admitted, sandbox: Subject) -> None:
        self._write("destroy", "done", **_who(caller), **_of(sandbox))

    def ended(self, sandbox: Subject, reason: EndReason, cause: Cause, why: str | None = None) -> None:
        """A sandbox ended without its owner's asking."""
        what = _of(sandbox)
        self._write("destroy", reason.value, who=HIVE, owner=sandbox.owner, **what, cause=cause.value, why=why)

    def refused(self, caller: Admitted, what: str, error: AshError) -> None:
        """The hive said no to an admitted caller."""
        self._refusal("request", error, **_who(caller), what=what)

    def kept_out(self, head: Head, refusal: Refusal) -> None:
        """A request was not admitted."""
        path = head.target.partition(b"?")[0].decode("latin-1")
        where = f"{head.client[0]}:{head.client[1]}" if head.client is not None else ""
        self._refusal("admission", refusal.error, who=None, **{"from": where}, what=f"{head.method} {path}")

    def _refusal(self, event: str, error: AshError, **fields: Any) -> None:
        second = int(self._clock())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= _REFUSALS_A_SECOND:
            self._left_out += 1
            return
        self._written += 1
        left_out, self._left_out = self._left_out, 0
        self._write(event, error.kind, **fields, why=error.message, left_out_before=left_out or None)

    def _write(self, event: str, outcome: str, **fields: Any) -> None:
        self._log.info(_line(self._clock(), event, outcome, **fields))


class AuditedAdmission:
    """An `Admission` whose refusals are written down."""

    def __init__(self, admission: Admission, audit: Audit) -> None:
        self._admission = admission
        self._audit = audit

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        verdict = self._admission.admit(head)
        return self._told(head, verdict) if isinstance(verdict, Admitted | Refusal) else self._later(head, verdict)

    async def _later(self, head: Head, pending: Awaitable[Admitted | Refusal]) -> Admitted | Refusal:
        return self._told(head, await pending)

    def _told(self, head: Head, verdict: Admitted | Refusal) -> Admitted | Refusal:
        if isinstance(verdict, Refusal) and not isinstance(verdict, SentOn):
            self._audit.kept_out(head, verdict)
        return verdict


def missing_line(lines: int) -> str:
    """Return the line that stands for others which could not be written."""
    return _line(time.time(), "audit", "lines_missing", lines=lines)


def _line(now: float, event: str, outcome: str, **fields: Any) -> str:
    at = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"at": at.replace("+00:00", "Z"), "event": event, "outcome": outcome}
    line |= {key: _short(value) for key, value in fields.items() if value is not None}
    return json.dumps(line)


def _who(caller: Admitted) -> dict[str, Any]:
    return {"who": caller.principal.subject, "by": caller.by or None, "from": caller.client, "scope": caller.scope}


def _of(sandbox: Subject) -> dict[str, Any]:
    return {"sandbox": sandbox.id, "session": sandbox.session}


def _short(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    shown = redacted(value)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
