"""The hive tools that move files beside the model: `upload_url`, `download_url` and `copy`."""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from ash_hub.face.answer import Answer
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.lifecycle.sandboxes import Sandboxes
from ash_hub.serving.audit import Audit
from ash_hub.spawning.file_copy import FilePlace, copy_file
from ash_hub.spawning.runner_client import RunnerClient
from ash_mcp.errors import ConfigError, Unsupported
from ash_mcp.wire import file_target
from ash_router.admission.base import Admitted
from ash_router.admission.tickets import Tickets
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["Copied", "CopyAsk", "DownloadAsk", "TicketUrl", "TransferTools", "UploadAsk"]

DEFAULT_SECONDS: Final = 900.0
MAX_SECONDS: Final = 86_400.0
_READ_SECONDS: Final = 30.0
_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,60}")

_Session = Annotated[str, Field(min_length=1, max_length=128, description="session name or sandbox id")]
_Path = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]*$",
        description="from the workspace on, or absolute; one that ends with / is a folder, moved as a tar archive",
    ),
]
_Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, description="how long the URL is good, if it is not used")]


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UploadAsk(_Ask):
    session: _Session
    path: _Path
    ttl_seconds: _Seconds = DEFAULT_SECONDS
    max_bytes: Annotated[int | None, Field(ge=0, description="the most bytes to take; absent: any number")] = None


class DownloadAsk(_Ask):
    session: _Session
    path: _Path
    ttl_seconds: _Seconds = DEFAULT_SECONDS


class CopyAsk(_Ask):
    from_session: _Session
    from_path: _Path
    to_session: _Session
    to_path: _Path


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TicketUrl(_Shape):
    session: str
    sandbox_id: str
    path: str
    method: Literal["GET", "PUT"]
    url: Annotated[str, Field(description="good for one request, without any other credential")]
    command: Annotated[str, Field(description="that makes the request with curl")]
    bytes: Annotated[int | None, Field(description="the file's, or the most that are taken; null: not known")]
    media_type: str | None
    expires_at: str


class Copied(_Shape):
    from_session: str
    to_session: str
    path: Annotated[str, Field(description="of the copy")]
    bytes: Annotated[int, Field(description="that were copied; of a folder those of its archive")]


class TransferTools:
    """Answers calls of these tools.

    Args:
        clock: In seconds since the epoch.
    """

    def __init__(
        self, sandboxes: Sandboxes, tokens: CallTokens, tickets: Tickets, audit: Audit, clock: Callable[[], float]
    ) -> None:
        self._sandboxes = sandboxes
        self._tokens = tokens
        self._tickets = tickets
        self._audit = audit
        self._clock = clock

    async def upload(self, caller: Admitted, ask: UploadAsk) -> Answer:
        """Mint a ticket to write a file, or to unpack an archive into a folder.

        Raises:
            AshError: There is no such sandbox, or it has as many tickets as it may.
        """
        sandbox = self._ready(caller, ask.session)
        kind = "application/x-tar" if ask.path.endswith("/") else None
        return await self._ticket(caller, sandbox, "PUT", ask, ask.max_bytes, kind)

    async def download(self, caller: Admitted, ask: DownloadAsk) -> Answer:
        """Mint a ticket to read a file, or a folder as an archive.

        Raises:
            NotFound: There is no such file; the message is the runner's.
            AshError: There is no such sandbox, or it has as many tickets as it may.
        """
        sandbox = self._ready(caller, ask.session)
        assert sandbox.endpoint is not None, "a ready sandbox has an endpoint"
        client = RunnerClient(sandbox.endpoint, self._tokens, sandbox.id)
        size, said = await client.stat_file(ask.path, _READ_SECONDS)
        kind = said if _MEDIA_TYPE.fullmatch(said) else None
        return await self._ticket(caller, sandbox, "GET", ask, size, kind)

    async def copy(self, caller: Admitted, ask: CopyAsk) -> Answer:
        """Copy a file, or a folder with all in it, from one sandbox of the caller's to another, or within one.

        Raises:
            AshError: As `copy_file` does.
        """
        if ask.from_path.endswith("/") != ask.to_path.endswith("/"):
            raise ConfigError("end both paths with / to copy a folder, or neither to copy a file")
        source, target = self._ready(caller, ask.from_session), self._ready(caller, ask.to_session)
        passed = await copy_file(_place(source, ask.from_path), _place(target, ask.to_path), self._tokens)
        self._audit.copied(caller, source, target)
        shape = {
            "from_session": source.session,
            "to_session": target.session,
            "path": ask.to_path,
            "bytes": passed,
        }
        said = f"Copied {ask.from_path} of {source.session} to {ask.to_path} of {target.session}: {passed} bytes."
        return Answer(shape, said)

    def _ready(self, caller: Admitted, name: str) -> Sandbox:
        sandbox = self._sandboxes.ready(caller.principal, caller.scope, name)
        if sandbox.endpoint is not None and not sandbox.endpoint.has_runner:
            raise Unsupported(
                f"sandbox {sandbox.session} is an image that serves MCP by itself, without a runner that could move "
                "files: call a tool of its own"
            )
        return sandbox

    async def _ticket(
        self,
        caller: Admitted,
        sandbox: Sandbox,
        method: Literal["GET", "PUT"],
        ask: UploadAsk | DownloadAsk,
        size: int | None,
        kind: str | None,
    ) -> Answer:
        is_folder = ask.path.endswith("/")
        target = file_target(sandbox.id, ask.path)
        if is_folder:
            target += f"{'&' if '?' in target else '?'}archive=tar"
        ticket, signed = await self._tickets.mint(
            sandbox.id,
            caller.principal.subject,
            method,
            target.encode("ascii"),
            by=caller.by,
            ttl_seconds=ask.ttl_seconds,
            max_bytes=size if method == "PUT" else None,
        )
        self._audit.ticket(caller, sandbox, ticket.id, method)
        url = f"{caller.url}{signed}"
        name = shlex.quote(ask.path.rstrip("/").rpartition("/")[2] or "files")
        here = f"{name}.tar" if is_folder else name
        command = (
            f"curl -f -T {here} {shlex.quote(url)}" if method == "PUT" else f"curl -f -o {here} {shlex.quote(url)}"
        )
        until = datetime.datetime.fromtimestamp(self._clock() + ask.ttl_seconds, datetime.UTC)
        shape: dict[str, Any] = {
            "session": sandbox.session,
            "sandbox_id": sandbox.id,
            "path": ask.path,
            "method": method,
            "url": url,
            "command": command,
            "bytes": size,
            "media_type": kind,
            "expires_at": until.isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        what = "Write" if method == "PUT" else "Read"
        said = (
            f"{what} {ask.path} of {sandbox.session} with one request, before {shape['expires_at']}; the URL is its "
            f"own credential, so give it to nobody else:\n{command}"
        )
        return Answer(shape, said)


def _place(sandbox: Sandbox, path: str) -> FilePlace:
    assert sandbox.endpoint is not None, "a ready sandbox has an endpoint"
    return FilePlace(sandbox.id, sandbox.endpoint, path)
