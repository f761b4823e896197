"""The runner's own tools: exec, jobs and files, callable on every recipe and never listed."""

from __future__ import annotations

import base64
import datetime
import json
import shlex
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio.to_thread

from ash_recipes.runner import arguments as args
from ash_recipes.runner.context import Context, check_variables
from ash_recipes.runner.drafts import Drafts
from ash_recipes.runner.execution import KeyedRuns, execute
from ash_recipes.runner.files import Files
from ash_recipes.runner.jobs import Job, signal_number
from ash_recipes.runner.large_results import LargeResults
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.processes import Command

__all__ = ["RunnerTools"]

PREFIX: Final = "ash_"
TWIN_CHARACTERS: Final = 2000
"""How much of an output the text twin repeats; the structured content has all that the answer holds."""
COMMANDS_CHARACTERS: Final = 64_000
"""What a list of jobs shows of their commands in all: the more jobs there are, the less of each."""

Json = dict[str, Any]
Handler = tuple[type[args.Arguments], Callable[[Any], Awaitable[Json]]]


class RunnerTools:
    """Answers calls of `ash_*` tools with MCP tool results.

    Args:
        results: Shortens those of the recipe's tools.
    """

    def __init__(self, context: Context, results: LargeResults | None = None) -> None:
        self.results = results
        self._context = context
        self._files = Files(context.workspace, kept=(context.workspace, context.home))
        self._keyed = KeyedRuns(context)
        self._drafts = Drafts(self._files)
        self._sweeping = False
        self._handlers: Mapping[str, Handler] = {
            "ash_exec": (args.Exec, self._exec),
            "ash_exec_cancel": (args.ExecCancel, self._exec_cancel),
            "ash_job_start": (args.JobStart, self._job_start),
            "ash_job_read": (args.JobRead, self._job_read),
            "ash_job_write": (args.JobWrite, self._job_write),
            "ash_job_signal": (args.JobSignal, self._job_signal),
            "ash_job_list": (args.Nothing, self._job_list),
            "ash_pty_list": (args.Nothing, self._pty_list),
            "ash_file_read": (args.FileRead, self._file_read),
            "ash_file_write": (args.FileWrite, self._file_write),
            "ash_file_list": (args.FileList, self._file_list),
            "ash_file_stat": (args.FilePath, self._file_stat),
            "ash_file_mkdir": (args.FileMkdir, self._file_mkdir),
            "ash_file_move": (args.FileMove, self._file_move),
            "ash_file_remove": (args.FileRemove, self._file_remove),
        }

    def __contains__(self, name: object) -> bool:
        return name in self._handlers

    async def call(self, name: str, given: Any) -> Json:
        """Return the result of one call; a failure is a result with `isError`."""
        model, handler = self._handlers[name]
        try:
            shape = await handler(args.check(model, given))
        except Problem as exc:
            return exc.to_tool_result()
        return {
            "content": [{"type": "text", "text": _twin(name, shape)}],
            "structuredContent": shape,
            "isError": False,
        }

    def _start(self, asked: args.Start) -> tuple[Command, Path, dict[str, str]]:
        check_variables(asked.env)
        cwd = self._files.resolve(asked.cwd) if asked.cwd is not None else self._context.workspace
        if any("\0" in word for word in ([asked.command] if isinstance(asked.command, str) else asked.command)):
            raise Problem("bad_request", "a command cannot hold a NUL character")
        return asked.command, cwd, self._context.environment.variables(asked.env)

    async def _exec(self, asked: args.Exec) -> Json:
        command, cwd, env = self._start(asked)
        user = self._context.user_named(asked.user)

        async def work() -> Json:
            done = await execute(
                self._context,
                command,
                cwd=cwd,
                env=env,
                stdin=asked.stdin_base64,
                timeout_seconds=asked.timeout_seconds,
                output_limit=asked.output_limit,
                user=user,
            )
            return done.to_json()

        if asked.key is None:
            return await work()
        return await self._keyed.once(asked.key, asked, work)

    async def _exec_cancel(self, asked: args.ExecCancel) -> Json:
        return {"cancelled": self._keyed.cancel(asked.key)}

    async def _job_start(self, asked: args.JobStart) -> Json:
        command, cwd, env = self._start(asked)
        job = self._context.jobs.start(
            command,
            cwd=cwd,
            env=env,
            stdin=asked.stdin,
            timeout_seconds=asked.timeout_seconds,
            paced=asked.paced,
            key=asked.key,
            user=self._context.user_named(asked.user),
        )
        return {"job": job.id, "started": True}

    async def _job_read(self, asked: args.JobRead) -> Json:
        job = self._context.jobs.get(asked.job)
        page = await job.read(asked.offset, asked.limit, asked.wait_seconds)
        return {
            "chunks": [
                {
                    "stream": chunk.stream,
                    "offset": chunk.offset,
                    "data_base64": base64.b64encode(chunk.data).decode(),
                }
                for chunk in page.chunks
            ],
            "next_offset": page.next_offset,
            "total_bytes": job.log.total,
            "dropped_bytes": job.log.dropped,
            **_state(job),
            **({"timed_out": job.timed_out} if not job.running else {}),
        }

    async def _job_write(self, asked: args.JobWrite) -> Json:
        job = self._context.jobs.get(asked.job)
        if not job.process.takes_input:
            raise Problem("bad_request", f"{job.id} has no open stdin; start it with stdin=true")
        written = await job.process.write(asked.data_base64)
        if asked.eof:
            await job.process.close_stdin()
        return {"written": written}

    async def _job_signal(self, asked: args.JobSignal) -> Json:
        job, number = self._context.jobs.get(asked.job), signal_number(asked.signal)
        return {"signalled": job.signal(number)}

    async def _job_list(self, asked: args.Nothing) -> Json:
        jobs = self._context.jobs.list()
        most = min(500, COMMANDS_CHARACTERS // max(len(jobs), 1))
        return {
            "jobs": [
                {
                    "job": job.id,
                    "command": _shown(job.command, most),
                    **_state(job),
                    "started_at": _time(job.started_at),
                }
                for job in jobs
            ]
        }

    async def _pty_list(self, asked: args.Nothing) -> Json:
        ptys = self._context.ptys.list()
        return {
            "ptys": [
                {
                    "pty": pty.id,
                    "command": _shown(pty.command, 500),
                    **({"state": "running"} if pty.running else {"state": "exited", "exit_code": pty.exit_code}),
                    "attached": pty.viewer is not None,
                    "started_at": _time(pty.started_at),
                }
                for pty in ptys
            ]
        }

    async def _file_read(self, asked: args.FileRead) -> Json:
        data, size, eof = await anyio.to_thread.run_sync(self._files.read, asked.path, asked.offset, asked.limit)
        return {"data_base64": base64.b64encode(data).decode(), "size": size, "eof": eof}

    async def _file_write(self, asked: args.FileWrite) -> Json:
        path, data, offset, mode = asked.path, asked.data_base64, asked.offset, asked.mode
        if asked.key is None:
            size = await anyio.to_thread.run_sync(self._files.write, path, data, offset, mode)
        else:
            add = partial(self._drafts.write, asked.key, path, data, offset or 0, mode, asked.end)
            size = await anyio.to_thread.run_sync(add)
            if not self._drafts.empty and not self._sweeping:
                self._sweeping = True
                self._context.jobs.tasks.start_soon(self._sweep_drafts)
        return {"bytes": len(data), "size": size}

    async def _sweep_drafts(self) -> None:
        """Remove what nobody goes on with, as long as anything is on its way."""
        try:
            while not self._drafts.empty:
                seconds = await anyio.to_thread.run_sync(self._drafts.sweep)
                await anyio.sleep(seconds or 0)
        except BaseException:
            self._drafts.abandon_all()
            raise
        finally:
            self._sweeping = False

    async def _file_list(self, asked: args.FileList) -> Json:
        return await anyio.to_thread.run_sync(self._files.list, asked.path, asked.cursor)

    async def _file_stat(self, asked: args.FilePath) -> Json:
        return await anyio.to_thread.run_sync(self._files.stat, asked.path)

    async def _file_mkdir(self, asked: args.FileMkdir) -> Json:
        path = await anyio.to_thread.run_sync(lambda: self._files.mkdir(asked.path, parents=asked.parents))
        return {"path": str(path)}

    async def _file_move(self, asked: args.FileMove) -> Json:
        return {"path": str(await anyio.to_thread.run_sync(self._files.move, asked.source, asked.destination))}

    async def _file_remove(self, asked: args.FileRemove) -> Json:
        await anyio.to_thread.run_sync(lambda: self._files.remove(asked.path, recursive=asked.recursive))
        return {"removed": True}


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _state(job: Job) -> Json:
    return {"state": "running"} if job.running else {"state": "exited", "exit_code": job.exit_code}


def _shown(command: Command, most: int) -> str:
    text = command if isinstance(command, str) else shlex.join(command)
    return text if len(text) <= most else text[: most - 1] + "…"


def _twin(name: str, shape: Json) -> str:
    """Return what a model reads: outputs in short, and never a base64."""
    if name == "ash_exec":
        parts = [f"exit code {shape['exit_code']}" + (", timed out" if shape["timed_out"] else "")]
        parts += [f"{key}:\n{_brief(shape[key])}" for key in ("stdout", "stderr") if shape[key]]
        return "\n".join(parts)
    if name == "ash_job_read":
        written = b"".join(base64.b64decode(chunk["data_base64"]) for chunk in shape["chunks"])
        return f"{shape['state']}, {shape['total_bytes']} bytes in all\n{_brief(written.decode('utf-8', 'replace'))}"
    if name == "ash_file_read":
        return f"{len(shape['data_base64']) * 3 // 4} of {shape['size']} bytes read"
    if name == "ash_file_list":
        entries = shape["entries"]
        lines = [f"{entry['type']} {entry['size']} {entry['name']}" for entry in entries[:200]]
        if len(entries) > 200 or shape["truncated"]:
            lines.append(f"[{len(lines)} of {shape['total']} entries shown]")
        return "\n".join(lines)
    return _brief(json.dumps(shape, ensure_ascii=False))


def _brief(text: str) -> str:
    if len(text) <= TWIN_CHARACTERS:
        return text
    half = TWIN_CHARACTERS // 2
    return f"{text[:half]}\n[…]\n{text[-half:]}"
