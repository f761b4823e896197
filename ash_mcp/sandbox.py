"""The handle of a sandbox: run commands, call its tools, reach its files, end it."""

from __future__ import annotations

import base64
import contextlib
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from ash_mcp._answers import Fields, call_result, exec_result, job_info, pty_info, runner_fields
from ash_mcp._connection import Connection, OnProgress
from ash_mcp._file_door import FileDoor
from ash_mcp._hive_answers import (
    read_info,
    read_names,
    read_share,
    read_shares,
    read_snapshots,
    read_tools,
    share_asked,
    structured,
)
from ash_mcp._watching import OUTPUT_LIMIT, watch
from ash_mcp.errors import AshError, CommandFailed, LocalProtocolError, RemoteProtocolError, Unsupported
from ash_mcp.files import Files
from ash_mcp.jobs import Job, OutputStream
from ash_mcp.pty import Pty
from ash_mcp.results import CallResult, ExecResult, JobInfo, PtyInfo, Share
from ash_mcp.types import SandboxId, SandboxInfo, SessionName, ShareInfo, SnapshotInfo, Tool

if TYPE_CHECKING:
    from ash_mcp._websocket import WebSocket

__all__ = ["Command", "Sandbox"]

Command = str | Sequence[str]
"""A line for `bash -c`, or a program and its arguments, which no shell sees."""

LOGS_TOOL: Final = "ash_logs"
TOOLS_TOOL: Final = "ash_tools"
"""Tools of the hive that it does not list, for this SDK."""

_ENDPOINT: Final = re.compile(r"/mcp(/in/[^/?]*)?/?(\?.*)?$")
_EXEC_MARGIN_SECONDS: Final = 30.0
"""How much longer than the command itself its call may take."""
_CLEANUP_SECONDS: Final = 5.0


class Sandbox:
    """One sandbox. Calls name it by its global id, never by a session name that another may have by then.

    `aclose()` drops the handle; `destroy()` ends the sandbox.
    """

    def __init__(
        self,
        connection: Connection,
        info: SandboxInfo,
        asked: Mapping[str, Any] | None = None,
        spawn_share: Share | None = None,
    ) -> None:
        self._connection = connection
        self._asked = dict(asked or {})
        self._closed = False
        self._info = info
        self._spawn_share = spawn_share
        self.files = Files(self._call_runner, FileDoor(connection, info.id, self._require_open))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def spawn_share(self) -> Share | None:
        """The share that its spawn asked for; None if it asked for none."""
        return self._spawn_share

    @property
    def asked(self) -> Mapping[str, Any]:
        """The arguments of the `spawn` that this handle came from, secrets too; empty where there was none."""
        return self._asked

    @property
    def info(self) -> SandboxInfo:
        """What the hive reported last: at spawn, attach, extend or set_network."""
        return self._info

    @property
    def id(self) -> SandboxId:
        return self._info.id

    @property
    def session(self) -> SessionName:
        """The name under which hosts see its tools."""
        return self._info.session

    async def exec(
        self,
        command: Command,
        *,
        check: bool = False,
        timeout_seconds: float | None = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | str | None = None,
        output_limit: int | None = None,
        user: str | None = None,
        on_stdout: Callable[[str], object] | None = None,
        on_stderr: Callable[[str], object] | None = None,
    ) -> ExecResult:
        """Run a command to its end. Its exit code is data, unless `check` is true.

        When this is cancelled the command is ended, with all that shares its session.

        Args:
            command: A line for bash, or a list of words.
            check: Raise when it exits with another code than 0 or times out.
            timeout_seconds: After that its whole process group is killed and the result says `timed_out`; None lets it
                run as long as the sandbox.
            cwd: Where to run it; the workspace if None.
            env: Further environment variables.
            stdin: What it reads; its stdin is closed if None.
            output_limit: How many bytes of each stream to keep in the result.
            user: Run it as this user of the sandbox; None: as the one that commands run as there.
            on_stdout: Called with its output as it comes, decoded as UTF-8; it must not block.
            on_stderr: The same of its standard error.

        Raises:
            CommandFailed: With `check`; `result` is the `ExecResult`.
            CommandNotStarted: There is no such program or directory.
            ResultLost: The answer was lost on the way, and the sandbox has dropped the result since.
        """
        if on_stdout is not None or on_stderr is not None:
            stream = self.stream(command, timeout_seconds=timeout_seconds, cwd=cwd, env=env, stdin=stdin, user=user)
            limit = OUTPUT_LIMIT if output_limit is None else output_limit
            result = await watch(stream, on_stdout, on_stderr, limit=limit)
        else:
            arguments = _command(command, cwd=cwd, env=env, timeout_seconds=timeout_seconds, user=user)
            arguments["timeout_seconds"] = timeout_seconds
            if stdin is not None:
                arguments["stdin_base64"] = _base64(stdin)
            if output_limit is not None:
                arguments["output_limit"] = output_limit
            result = await self._exec(arguments)
        if check and (result.timed_out or result.exit_code != 0):
            raise CommandFailed(_failed(command, result), result=result, exit_code=result.exit_code)
        return result

    async def _exec(self, arguments: dict[str, Any]) -> ExecResult:
        key, seconds = uuid.uuid4().hex, arguments["timeout_seconds"]
        bound = math.inf if seconds is None else seconds + _EXEC_MARGIN_SECONDS
        try:
            return exec_result(
                await self._call_runner("ash_exec", {**arguments, "key": key}, repeatable=True, timeout_seconds=bound)
            )
        except anyio.get_cancelled_exc_class():
            # Left alone it would go on for a while: its caller might come again with the key.
            with anyio.move_on_after(_CLEANUP_SECONDS, shield=True), contextlib.suppress(AshError):
                await self._call_runner("ash_exec_cancel", {"key": key}, repeatable=True)
            raise

    def stream(
        self,
        command: Command,
        *,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | str | None = None,
        user: str | None = None,
    ) -> OutputStream:
        """Return an iterator of a command's output as it comes, in `Chunk`s; its `lines()` yields text.

        The command starts with the first read. Arguments are those of `exec`; without a timeout it may run for ever.
        """
        start = _command(command, cwd=cwd, env=env, timeout_seconds=timeout_seconds, user=user)
        return OutputStream(self._call_runner, start=start, stdin=stdin)

    async def background(
        self,
        command: Command,
        *,
        stdin: bool = False,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        paced: bool = False,
        user: str | None = None,
    ) -> Job:
        """Start a command and return at once.

        Args:
            command: A line for bash, or a list of words.
            stdin: Keep its stdin open for `Job.write`.
            timeout_seconds: After that it is killed; None lets it run as long as the sandbox.
            cwd: Where to run it; the workspace if None.
            env: Further environment variables.
            paced: Whether the command is held while 8 MiB of its output are unread; otherwise the oldest output is
                dropped. Only for output that is read to its end.
            user: As with `exec`.

        Raises:
            CommandNotStarted: There is no such program or directory.
        """
        arguments = _command(command, cwd=cwd, env=env, timeout_seconds=timeout_seconds, user=user)
        own = {"stdin": stdin, "paced": paced, "key": uuid.uuid4().hex}
        fields = await self._call_runner("ash_job_start", {**arguments, **own}, repeatable=True)
        return Job(self._call_runner, fields.text("job"))

    def job(self, job_id: str) -> Job:
        """Return the handle of a job that was started before, by its id."""
        return Job(self._call_runner, job_id)

    async def jobs(self) -> list[JobInfo]:
        """Return the sandbox's jobs, ended ones included."""
        fields = await self._call_runner("ash_job_list", {}, repeatable=True)
        return [job_info(item) for item in fields.objects("jobs")]

    def pty(
        self,
        command: Command | None = None,
        *,
        rows: int = 24,
        columns: int = 80,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        detached_seconds: float | None = None,
    ) -> Pty:
        """Return a command on a terminal of its own. It starts when that is entered, read or written to.

        Args:
            command: A line for bash, or a list of words; None: the sandbox's shell.
            rows: Of the terminal, as `columns`.
            columns: Of the terminal.
            cwd: Where to run it; the workspace if None.
            env: Further environment variables, such as TERM.
            user: As with `exec`.
            detached_seconds: How long it goes on while nobody is attached, at most a day; None: an hour.

        Raises:
            CommandNotStarted: At the start: there is no such program or directory, or too many terminals are open.
        """
        start = _command(command, cwd=cwd, env=env, timeout_seconds=None, user=user)
        own = {} if detached_seconds is None else {"detached_seconds": detached_seconds}
        return Pty(self._open_terminal, start={**start, **own, "key": uuid.uuid4().hex}, size=(rows, columns))

    def attach_pty(
        self, pty_id: str, *, offset: int | None = None, rows: int | None = None, columns: int | None = None
    ) -> Pty:
        """Return a terminal that was started before, by its id. Who is attached to it now loses it.

        Args:
            offset: Where to go on in its output; None: with the oldest that is kept.
            rows: Its new size, if `columns` is given, too.
            columns: See `rows`.

        Raises:
            PtyNotFound: When it is entered or read: the sandbox has no such terminal.
        """
        size = None if rows is None or columns is None else (rows, columns)
        return Pty(self._open_terminal, pty_id=pty_id, offset=offset, size=size)

    async def ptys(self) -> list[PtyInfo]:
        """Return the sandbox's terminals, those that ended lately included."""
        fields = await self._call_runner("ash_pty_list", {}, repeatable=True)
        return [pty_info(item) for item in fields.objects("ptys")]

    async def _open_terminal(self) -> WebSocket:
        self._require_open()
        return await self._connection.open_websocket(self.id, "terminal")

    async def tools(self) -> list[Tool]:
        """Return the sandbox's own tools, by the names that `call` takes."""
        result = await self._call_hive(TOOLS_TOOL, {}, repeatable=True)
        return read_tools(structured(result))

    async def call(
        self,
        tool: str,
        /,
        *,
        arguments: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        on_progress: OnProgress | None = None,
        **named: Any,
    ) -> CallResult:
        """Call one of the sandbox's tools. A call that may have run is never repeated.

        A tool that it has not is its server's to answer: with a result that has `is_error`.

        Args:
            tool: The tool's own name.
            arguments: Its arguments; needed for those that are named as a parameter of this method.
            timeout_seconds: The bound of the call; None is the hive's `timeout_seconds`.
            on_progress: Called with the tool's progress.
            named: Its arguments by keyword.

        Raises:
            SandboxGone: The sandbox has ended; `data["reason"]` says why.
        """
        raw = await self._call_hive(
            "call",
            {"tool": tool, "arguments": {**(arguments or {}), **named}},
            timeout_seconds=timeout_seconds,
            on_progress=on_progress,
        )
        return call_result(raw)

    async def extend(self, seconds: float) -> SandboxInfo:
        """Let the sandbox live for `seconds` from now."""
        raw = await self._call_hive("extend", {"ttl_seconds": seconds}, repeatable=True)
        self._info = read_info(structured(raw))
        return self._info

    async def set_network(self, policy: str | Sequence[str]) -> SandboxInfo:
        """Change what the sandbox may reach; connections that the policy refuses are closed.

        Args:
            policy: `none`, `internet`, or domains such as `pypi.org`, `*.pypi.org` and `git.test:8443`.

        Raises:
            PermissionDenied: It would reach more than it does, and more than its caller, the key or the hive allows.
            Unsupported: The network of this sandbox cannot be changed, as of one that was spawned with `none`.
        """
        given = policy if isinstance(policy, str) else list(policy)
        self._info = read_info(structured(await self._call_hive("network", {"policy": given}, repeatable=True)))
        return self._info

    async def snapshot(
        self,
        *,
        ttl_seconds: float | None = None,
        live: bool = False,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> SnapshotInfo:
        """Freeze the sandbox's files, and have it go on from there; its processes are ended.

        Processes, jobs and `/tmp` are not in a snapshot. The environment is handed over anew.

        Args:
            ttl_seconds: How long it is kept; None: as long as the hive keeps one.
            live: Copy the files instead while its processes go on: each is as it is at some moment, and it takes the
                longer the more was written.
            env: None: what this handle has spawned the sandbox with; nothing where another one has.
            secrets: The same.

        Raises:
            Unsupported: The hive's backend, or its host, has no snapshots; the message says why.
            CapacityExceeded: There are as many, or as large, as may be. Nothing was done.
            StartFailed: The sandbox did not come up again, and has ended.
        """
        asked: dict[str, Any] = {"live": True} if live else self._handed_over(env, secrets)
        if ttl_seconds is not None:
            asked["ttl_seconds"] = ttl_seconds
        taken = read_snapshots(structured(await self._call_hive("snapshot", asked)))
        if len(taken) != 1:
            raise RemoteProtocolError("the hive answered in an unknown way: it named no snapshot")
        return taken[0]

    async def reset(
        self,
        snapshot: SnapshotInfo | str,
        *,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> SandboxInfo:
        """Take the sandbox back to a snapshot of it, or of one with the same tools; its processes are ended.

        It stays the same sandbox, with its id, session, tools and time to live. Calls in flight fail with
        `SandboxReset`.

        Args:
            snapshot: The snapshot, or its id.
            env: As in `snapshot`.
            secrets: As in `snapshot`.

        Raises:
            SnapshotNotFound: There is none of that id, or no longer. Nothing was done.
            Conflict: It has other tools. Nothing was done.
            StartFailed: The sandbox did not come up again, and has ended.
        """
        named = snapshot if isinstance(snapshot, str) else snapshot.id
        asked = {"snapshot": named, **self._handed_over(env, secrets)}
        self._info = read_info(structured(await self._call_hive("reset", asked, repeatable=True)))
        return self._info

    def _handed_over(self, env: Mapping[str, str] | None, secrets: Mapping[str, str] | None) -> dict[str, Any]:
        given = {"env": env, "secrets": secrets}
        known = {name: dict(self._asked.get(name) or {}) for name in given}
        return {name: known[name] if value is None else dict(value) for name, value in given.items()}

    async def share(
        self,
        *,
        tools: Sequence[str] | None = None,
        ports: Sequence[int] = (),
        ttl_seconds: float | None = None,
    ) -> Share:
        """Hand the sandbox to somebody else: make a token that opens tools or ports of it, and nothing else.

        Args:
            tools: The only tools that it opens, by the sandbox's own names; None: all that it lists, or none where
                ports are given.
            ports: The ports inside that it opens, of those that the spawn was given.
            ttl_seconds: How long it is good; None: until the sandbox ends.

        Raises:
            ToolNotFound: It lists no such tool.
            PortNotAllowed: The sandbox was spawned without this port.
            CapacityExceeded: It has as many shares as a sandbox may.
        """
        given = share_asked(tools=tools, ports=ports, ttl_seconds=ttl_seconds)
        return read_share(structured(await self._call_hive("share", given)))

    async def shares(self) -> list[ShareInfo]:
        """Return the sandbox's shares that are good now."""
        return read_shares(structured(await self._call_hive("share", {"action": "list"}, repeatable=True)))

    async def revoke_shares(self, *ids: str) -> list[str]:
        """Revoke shares by id, or all without one, and return the ids of those that were revoked.

        Raises:
            NotFound: It has no such share, and nothing was revoked.
        """
        named = {"share_ids": list(ids)} if ids else {}
        return read_names(structured(await self._call_hive("share", {"action": "revoke", **named})), "revoked")

    async def url(self, port: int, *, ttl_seconds: float | None = None) -> str:
        """Return a URL that shows in a browser what the server on a port of the sandbox serves.

        It is a secret: whoever has it may open it. It is a share of this one port, made anew by each call, which
        `shares` lists and `revoke_shares` takes back. Programs need none: see `port_url`.

        Args:
            port: Inside the sandbox; one of those that the spawn was given.
            ttl_seconds: How long it is good; None: until the sandbox ends.

        Raises:
            PortNotAllowed: The sandbox was spawned without this port.
            Unsupported: Browsers have no way to this hive's sandboxes.
            CapacityExceeded: It has as many shares as a sandbox may.
        """
        share = await self.share(ports=[port], ttl_seconds=ttl_seconds)
        if port not in share.previews:
            await self.revoke_shares(share.id)
            raise Unsupported(
                "browsers have no way to this hive's sandboxes: it is not reached as localhost, and its operator has "
                "set no ASH_HUB_PREVIEW_URL; programs use `port_url`"
            )
        return share.previews[port]

    def port_url(self, port: int) -> str:
        """Return the URL, ending in a slash, at which programs reach the server on a port of the sandbox.

        A request there carries the credential for the hive, as every other does; the server inside does not get it.
        """
        hive = _ENDPOINT.sub("", self._connection.settings.url)
        return f"{hive}/s/{self.id}/ports/{port}/"

    async def logs(self, *, tail_bytes: int = 65_536) -> str:
        """Return the last of what the sandbox's main process wrote."""
        raw = await self._call_hive(LOGS_TOOL, {"tail_bytes": tail_bytes}, repeatable=True)
        return str(structured(raw).get("log", ""))

    async def destroy(self) -> None:
        """End the sandbox with everything in it, also through a handle that was dropped. Idempotent."""
        await self._connection.call_tool("destroy", {"session": self.id}, repeatable=True)

    async def aclose(self) -> None:
        """Drop this handle; the sandbox lives on."""
        self._closed = True

    def __repr__(self) -> str:
        return f"<Sandbox {self.session} {self.id}>"

    async def _call_runner(
        self, tool: str, arguments: Mapping[str, Any], *, repeatable: bool, timeout_seconds: float | None = None
    ) -> Fields:
        """Call a tool of the runner."""
        call = {"tool": tool, "arguments": arguments}
        return runner_fields(
            await self._call_hive("call", call, repeatable=repeatable, timeout_seconds=timeout_seconds)
        )

    async def _call_hive(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        repeatable: bool = False,
        timeout_seconds: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Mapping[str, Any]:
        """Call a tool of the hive on this sandbox."""
        self._require_open()
        return await self._connection.call_tool(
            tool,
            {"session": self.id, **arguments},
            repeatable=repeatable,
            timeout_seconds=timeout_seconds,
            on_progress=on_progress,
        )

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError(f"this handle of {self.session} is closed; attach to the sandbox again")


def _command(
    command: Command | None,
    *,
    cwd: str | None,
    env: Mapping[str, str] | None,
    timeout_seconds: float | None,
    user: str | None = None,
) -> dict[str, Any]:
    given = {
        "command": command if command is None or isinstance(command, str) else list(command),
        "user": user,
        "cwd": cwd,
        "env": dict(env) if env is not None else None,
        "timeout_seconds": timeout_seconds,
    }
    return {name: value for name, value in given.items() if value is not None}


def _base64(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def _failed(command: Command, result: ExecResult) -> str:
    shown = command if isinstance(command, str) else " ".join(command)
    how = "was stopped at its timeout" if result.timed_out else f"exited with code {result.exit_code}"
    last = (result.stderr or result.stdout).strip()[-500:]
    return f"{shown[:200]!r} {how}" + (f": {last}" if last else "")
