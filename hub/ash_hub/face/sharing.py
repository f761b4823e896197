"""The hive tool `share`: its arguments, its answer, and its three actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ash_hub.face.answer import Answer
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sharing import Sharing
from ash_hub.serving.audit import Audit
from ash_mcp.wire import share_to_json
from ash_router.admission.base import Admitted
from ash_router.admission.shares import Share

__all__ = ["ShareAsk", "ShareTool", "Shared"]

MAX_AT_ONCE = 256
MAX_SECONDS = 10 * 365 * 86_400

_ShareId = Annotated[str, Field(min_length=1, max_length=64)]
_ToolName = Annotated[str, Field(min_length=1, max_length=128)]


class ShareAsk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    session: Annotated[str, Field(min_length=1, max_length=128, description="session name or sandbox id")]
    action: Annotated[Literal["mint", "list", "revoke"], Field(description="mint a new share, or list or revoke")] = (
        "mint"
    )
    # not `tools`: there is a framework that drops an argument of that name, and the share would open everything
    tool_names: Annotated[
        list[_ToolName] | None,
        Field(
            min_length=1,
            max_length=MAX_AT_ONCE,
            description="to mint: the only tools that it opens, named without the session; absent: all",
        ),
    ] = None
    ttl_seconds: Annotated[
        float | None,
        Field(gt=0, le=MAX_SECONDS, description="to mint: how long it is good; absent: as long as the sandbox lives"),
    ] = None
    share_ids: Annotated[
        list[_ShareId] | None,
        Field(min_length=1, max_length=MAX_AT_ONCE, description="to revoke: which; absent: all of the sandbox's"),
    ] = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.action != "mint" and (self.tool_names is not None or self.ttl_seconds is not None):
            raise ValueError("tool_names and ttl_seconds are for action=mint")
        if self.action != "revoke" and self.share_ids is not None:
            raise ValueError("share_ids is for action=revoke")
        return self


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShareShape(_Answer):
    share_id: str
    tool_names: list[str]
    created_at: str
    expires_at: Annotated[str | None, Field(description="null: when the sandbox ends")]


class Shared(_Answer):
    session: str
    sandbox_id: str
    url: Annotated[str, Field(description="MCP endpoint of the sandbox, for whoever has the token of a share")]
    token: Annotated[str | None, Field(description="of the new share, shown once: Authorization: Bearer <token>")]
    shares: Annotated[list[ShareShape], Field(description="the new share, or those that the sandbox has")]
    revoked: Annotated[list[str], Field(description="ids of those that were revoked now")]


class ShareTool:
    """Answers calls of `share`."""

    def __init__(self, sharing: Sharing, audit: Audit) -> None:
        self._sharing = sharing
        self._audit = audit

    async def answer(self, caller: Admitted, ask: ShareAsk) -> Answer:
        """Do what is asked.

        Raises:
            AshError: As `Sharing` does.
        """
        who, scope = caller.principal, caller.scope
        if ask.action == "mint":
            sandbox, minted = await self._sharing.mint(who, scope, ask.session, ask.tool_names, ask.ttl_seconds)
            self._audit.shared(caller, sandbox, minted.share.id, minted.share.tools)
            return _minted(caller, sandbox, minted.share, minted.token)
        if ask.action == "revoke":
            sandbox, revoked = await self._sharing.revoke(who, scope, ask.session, ask.share_ids)
            for share_id in revoked:
                self._audit.unshared(caller, sandbox, share_id)
            _, left = self._sharing.list(who, scope, sandbox.id)
            said = f"Revoked {', '.join(revoked) or 'nothing: there was no share'}. {_counted(sandbox, left)}"
            return Answer(_shape(caller, sandbox, left, revoked=revoked), said)
        sandbox, held = self._sharing.list(who, scope, ask.session)
        return Answer(_shape(caller, sandbox, held), "\n".join([_counted(sandbox, held), *map(_line, held)]))


def _minted(caller: Admitted, sandbox: Sandbox, share: Share, token: str) -> Answer:
    shape = _shape(caller, sandbox, [share], token=token)
    until = shape["shares"][0]["expires_at"] or "the sandbox ends"
    said = (
        f"Share {share.id} of sandbox {sandbox.session} opens {len(share.tools)} of its tools until {until}, and "
        f"nothing else.\nMCP server (streamable HTTP): {shape['url']}\nAuthorization: Bearer {token}\n"
        f'The token is shown this once. share(session="{sandbox.session}", action="revoke", '
        f'share_ids=["{share.id}"]) takes it back.'
    )
    return Answer(shape, said)


def _shape(
    caller: Admitted,
    sandbox: Sandbox,
    shares: Sequence[Share],
    *,
    token: str | None = None,
    revoked: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "session": sandbox.session,
        "sandbox_id": sandbox.id,
        # by id: a session name may be another sandbox's later
        "url": f"{caller.url}/s/{sandbox.id}/mcp",
        "token": token,
        "shares": [share_to_json(share.info) for share in shares],
        "revoked": list(revoked),
    }


def _counted(sandbox: Sandbox, shares: Sequence[Share]) -> str:
    return f"Sandbox {sandbox.session} has {len(shares) or 'no'} share{'' if len(shares) == 1 else 's'}."


def _line(share: Share) -> str:
    until = share_to_json(share.info)["expires_at"] or "the sandbox ends"
    return f"- {share.id}: {len(share.tools)} tools, until {until}"
