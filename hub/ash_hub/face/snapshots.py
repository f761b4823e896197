"""The hive tools `snapshot` and `reset`: their arguments, their answers, and what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ash_hub.face.answer import Answer
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.snapshots import SnapshotVerbs
from ash_hub.serving.audit import Audit
from ash_hub.spawning.spawn_request import Variables
from ash_mcp.wire import snapshot_to_json
from ash_router.admission.base import Admitted

__all__ = ["ResetAsk", "SnapshotAsk", "SnapshotTools", "Snapshotted"]

_Session = Annotated[str, Field(min_length=1, max_length=128, description="session name or sandbox id")]
_Id = Annotated[str, Field(min_length=1, max_length=64)]
_Env = Annotated[Variables, Field(description="environment variables for what starts anew; none are kept")]
_Secrets = Annotated[Variables, Field(description="as env, but never logged, listed or stored")]


class SnapshotAsk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Annotated[
        Literal["take", "list", "remove"], Field(description="take one of session, or list or remove yours")
    ] = "take"
    session: Annotated[_Session | None, Field(description="to take: session name or sandbox id")] = None
    ttl_seconds: Annotated[float | None, Field(gt=0, description="to take: how long it is kept")] = None
    live: Annotated[
        bool, Field(description="to take: copy the files while processes go on; takes the longer the more was written")
    ] = False
    env: _Env = {}
    secrets: _Secrets = {}
    snapshot_ids: Annotated[list[_Id] | None, Field(min_length=1, max_length=1000, description="to remove: which")] = (
        None
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.action == "take") != (self.session is not None):
            raise ValueError("session goes with action=take, and that needs it")
        if (self.action == "remove") != (self.snapshot_ids is not None):
            raise ValueError("snapshot_ids goes with action=remove, and that needs it")
        if self.action != "take" and (self.ttl_seconds is not None or self.env or self.secrets or self.live):
            raise ValueError("ttl_seconds, live, env and secrets are for action=take")
        if self.live and (self.env or self.secrets):
            raise ValueError("nothing starts anew with live=true, so that there is nobody to hand env or secrets to")
        return self


class ResetAsk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    session: _Session
    snapshot: Annotated[_Id, Field(description="id of a snapshot of it, or of one with the same tools")]
    env: _Env = {}
    secrets: _Secrets = {}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SnapshotShape(_Answer):
    """A snapshot as `ash_mcp.wire.snapshot_to_json` writes it."""

    snapshot_id: str
    session: Annotated[str, Field(description="of which it was taken")]
    sandbox_id: str
    scope: str
    recipe: str
    bytes: Annotated[int, Field(description="written since the snapshot before")]
    created_at: str
    expires_at: str
    run: Annotated[str | None, Field(description="the run that it ends with")]


class Snapshotted(_Answer):
    snapshots: Annotated[list[SnapshotShape], Field(description="the new one, or all of yours")]
    removed: Annotated[list[str], Field(description="ids of those that were removed now")]


class SnapshotTools:
    """Answers calls of `snapshot` and `reset`."""

    def __init__(
        self,
        verbs: SnapshotVerbs,
        audit: Audit,
        shape: Callable[[Sandbox], dict[str, Any]],
        clock: Callable[[], float],
    ) -> None:
        self._verbs = verbs
        self._audit = audit
        self._shape = shape
        self._clock = clock

    async def snapshot(self, caller: Admitted, ask: SnapshotAsk) -> Answer:
        """Take, list or remove snapshots.

        Raises:
            AshError: As `SnapshotVerbs` does.
        """
        who, scope, kept = caller.principal, caller.scope, self._verbs.kept
        if ask.action == "take":
            assert ask.session is not None
            sandbox, taken = await self._verbs.take(
                who, scope, ask.session, ttl_seconds=ask.ttl_seconds, env=ask.env, secrets=ask.secrets, live=ask.live
            )
            self._audit.frozen(caller, sandbox, taken.id)
            shape = snapshot_to_json(taken.info)
            said = (
                f"Snapshot {taken.id} has the files of {sandbox.session} ({shape['bytes']} bytes), "
                f"not its processes, which {'go on' if ask.live else 'were ended: the sandbox goes on from there'}. "
                f"Kept until {shape['expires_at']}. "
                f'reset(session="{sandbox.session}", snapshot="{taken.id}") goes back to it, '
                f'spawn(snapshot="{taken.id}") makes another sandbox from it.'
            )
            return Answer({"snapshots": [shape], "removed": []}, said)
        removed: list[str] = []
        if ask.snapshot_ids is not None:
            removed = list(await kept.remove(who, scope, ask.snapshot_ids, now=self._clock()))
            for snapshot_id in removed:
                self._audit.thawed(caller, snapshot_id)
        shapes = [snapshot_to_json(it.info) for it in await kept.list(who, scope, now=self._clock())]
        lines = [
            f"- {it['snapshot_id']}: of {it['session']}, {it['bytes']} B, until {it['expires_at']}" for it in shapes
        ]
        words = [f"Removed {', '.join(removed) or 'nothing'}."] if ask.action == "remove" else []
        lines = lines or ["You have no snapshots."]
        return Answer({"snapshots": shapes, "removed": removed}, "\n".join([*words, *lines]))

    async def reset(self, caller: Admitted, ask: ResetAsk) -> Answer:
        """Take a sandbox back to a snapshot.

        Raises:
            AshError: As `SnapshotVerbs` does.
        """
        who, scope = caller.principal, caller.scope
        sandbox = await self._verbs.reset(who, scope, ask.session, ask.snapshot, env=ask.env, secrets=ask.secrets)
        self._audit.reset(caller, sandbox, ask.snapshot)
        said = f"Sandbox {sandbox.session} has the files of {ask.snapshot} again, and new processes."
        return Answer(self._shape(sandbox), said)
