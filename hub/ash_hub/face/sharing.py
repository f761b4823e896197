"""The hive tool `share`: its arguments, its answer, and its three actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ash_hub.face.answer import Answer
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sharing import MintedShare, Sharing
from ash_hub.serving.audit import Audit
from ash_mcp.wire import share_to_json
from ash_router.admission.base import Admitted
from ash_router.admission.preview_hosts import SECRET_PARAMETER, PreviewNames
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
            description="to mint: the only tools that it opens, named without the session; absent: all, or with "
            "ports none",
        ),
    ] = None
    ports: Annotated[
        list[Annotated[int, Field(ge=1, le=65535)]] | None,
        Field(min_length=1, max_length=64, description="to mint: ports that it opens, of those that spawn was given"),
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
        minting = (self.tool_names, self.ttl_seconds, self.ports)
        if self.action != "mint" and any(given is not None for given in minting):
            raise ValueError("tool_names, ports and ttl_seconds are for action=mint")
        if self.action != "revoke" and self.share_ids is not None:
            raise ValueError("share_ids is for action=revoke")
        return self


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShareShape(_Answer):
    share_id: str
    tool_names: list[str]
    ports: list[int]
    created_at: str
    expires_at: Annotated[str | None, Field(description="null: when the sandbox ends")]


class PreviewShape(_Answer):
    port: int
    url: Annotated[str, Field(description="for a browser; whoever has it sees what the server at this port serves")]


class Shared(_Answer):
    session: str
    sandbox_id: str
    url: Annotated[str, Field(description="MCP endpoint of the sandbox, for whoever has the token of a share")]
    token: Annotated[str | None, Field(description="of the new share, shown once: Authorization: Bearer <token>")]
    previews: Annotated[list[PreviewShape], Field(description="of the new share, where browsers have a way here")]
    shares: Annotated[list[ShareShape], Field(description="the new share, or those that the sandbox has")]
    revoked: Annotated[list[str], Field(description="ids of those that were revoked now")]


class ShareTool:
    """Answers calls of `share`."""

    def __init__(self, sharing: Sharing, audit: Audit, previews: PreviewNames) -> None:
        self._sharing = sharing
        self._audit = audit
        self._previews = previews

    async def answer(self, caller: Admitted, ask: ShareAsk) -> Answer:
        """Do what is asked.

        Raises:
            AshError: As `Sharing` does.
        """
        who, scope = caller.principal, caller.scope
        if ask.action == "mint":
            ports = ask.ports or ()
            sandbox, minted = await self._sharing.mint(who, scope, ask.session, ask.tool_names, ask.ttl_seconds, ports)
            self._audit.shared(caller, sandbox, minted.share)
            return _minted(caller, sandbox, minted, previews_of(self._previews, caller.url, minted))
        if ask.action == "revoke":
            sandbox, revoked = await self._sharing.revoke(who, scope, ask.session, ask.share_ids)
            for share_id in revoked:
                self._audit.unshared(caller, sandbox, share_id)
            _, left = self._sharing.list(who, scope, sandbox.id)
            said = f"Revoked {', '.join(revoked) or 'nothing: there was no share'}. {_counted(sandbox, left)}"
            return Answer(_shape(caller, sandbox, left, revoked=revoked), said)
        sandbox, held = self._sharing.list(who, scope, ask.session)
        return Answer(_shape(caller, sandbox, held), "\n".join([_counted(sandbox, held), *map(_line, held)]))


def _minted(caller: Admitted, sandbox: Sandbox, minted: MintedShare, previews: Sequence[tuple[int, str]]) -> Answer:
    share, token = minted.share, minted.token
    shape = _shape(caller, sandbox, [share], token=token, previews=previews)
    until = shape["shares"][0]["expires_at"] or "the sandbox ends"
    lines = [f"Share {share.id} of sandbox {sandbox.session} opens {_opened(share)} until {until}, and nothing else."]
    if share.tools:
        lines.append(f"MCP server (streamable HTTP): {shape['url']}")
    lines.append(f"Authorization: Bearer {token}")
    lines += [f"In a browser, port {port}: {url}" for port, url in previews]
    if share.ports and not previews:
        lines.append(
            "No browser has a way to its ports: the hive is not reached as localhost, and has no ASH_HUB_PREVIEW_URL."
        )
    lines.append(
        f'The token is shown this once. share(session="{sandbox.session}", action="revoke", '
        f'share_ids=["{share.id}"]) takes it back.'
    )
    return Answer(shape, "\n".join(lines))


def previews_of(names: PreviewNames, hive: str, minted: MintedShare) -> list[tuple[int, str]]:
    """Return each port of a new share and the URL that opens it in a browser; none where browsers have no way there.

    Args:
        hive: The hive's URL as its caller knows it.
    """
    urls = [(port, names.url(hive, port, minted.share.label)) for port in minted.share.ports]
    return [(port, f"{url}?{SECRET_PARAMETER}={minted.token}") for port, url in urls if url is not None]


def _shape(
    caller: Admitted,
    sandbox: Sandbox,
    shares: Sequence[Share],
    *,
    token: str | None = None,
    previews: Sequence[tuple[int, str]] = (),
    revoked: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "session": sandbox.session,
        "sandbox_id": sandbox.id,
        # by id: a session name may be another sandbox's later
        "url": f"{caller.url}/s/{sandbox.id}/mcp",
        "token": token,
        "previews": [{"port": port, "url": url} for port, url in previews],
        "shares": [share_to_json(share.info) for share in shares],
        "revoked": list(revoked),
    }


def _counted(sandbox: Sandbox, shares: Sequence[Share]) -> str:
    return f"Sandbox {sandbox.session} has {len(shares) or 'no'} share{'' if len(shares) == 1 else 's'}."


def _line(share: Share) -> str:
    until = share_to_json(share.info)["expires_at"] or "the sandbox ends"
    return f"- {share.id}: {_opened(share)}, until {until}"


def _opened(share: Share) -> str:
    count = f"{len(share.tools)} of its tools" if share.tools or not share.ports else ""
    ports = f"port{'' if len(share.ports) == 1 else 's'} {', '.join(map(str, share.ports))}" if share.ports else ""
    return " and ".join(part for part in (count, ports) if part)
