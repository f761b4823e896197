"""The SDK for code that does not await: the same names, without `await`.

    from ash_mcp.sync import Hive

    with Hive() as hive:
        with hive.spawn("general") as box:
            print(box.exec("echo hello").stdout)

A `Hive` runs an event loop in a thread of its own from its first call to its `aclose()`; it may be used from several
threads at once. Callbacks such as `on_progress` run in that thread. A process that was forked starts a thread and
connections of its own, so what it inherits, sandboxes too, works there as it did.

Arguments, types and docstrings are those of the async methods, taken from there. A twin generated as text (unasync)
would need a second transport, without cancellation: in httpx's sync client no timeout bounds a whole call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ash_mcp import client, files, jobs, pty, run, sandbox
from ash_mcp._blocking import BlockingHandle, LoopThread, direct, inner_of, returning, waited
from ash_mcp.errors import AshError, RunEnded
from ash_mcp.results import Chunk, JobResult, Line, Share
from ash_mcp.settings import ClientSettings
from ash_mcp.types import RunInfo, SandboxId, SandboxInfo, SessionName

if TYPE_CHECKING:
    import httpx

__all__ = ["Files", "Hive", "Job", "OutputLines", "OutputStream", "Pty", "Run", "Sandbox", "Spawned", "SpawnedMany"]


class Files(BlockingHandle[files.Files]):
    """The files of one sandbox. Relative paths start at its workspace.

    Errors are `FileError`s; `FileNotFound` and the like are also the built-in `FileNotFoundError` and the like.
    """

    read = waited(files.Files.read)
    read_bytes = waited(files.Files.read_bytes)
    write = waited(files.Files.write)
    list = waited(files.Files.list)
    stat = waited(files.Files.stat)
    exists = waited(files.Files.exists)
    mkdir = waited(files.Files.mkdir)
    move = waited(files.Files.move)
    remove = waited(files.Files.remove)
    upload = waited(files.Files.upload)
    download = waited(files.Files.download)


class OutputLines(BlockingHandle[jobs.OutputLines]):
    """The output of a command as an iterator of `Line`s. What is longer than a MiB comes in pieces."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Line:
        line = self._loop.run(lambda: anext(self._inner, None))
        if line is None:
            raise StopIteration
        return line


class OutputStream(BlockingHandle[jobs.OutputStream]):
    """The output of a command while it runs: an iterator of `Chunk`s; after its end `result` says how that was.

    As a context manager it stops a command of its own when it is left early; so does Ctrl-C in a read.
    """

    aclose = waited(jobs.OutputStream.aclose)
    lines = returning(OutputLines, direct(jobs.OutputStream.lines))

    @property
    def result(self) -> JobResult:
        """How the command ended; a `LocalProtocolError` before the iteration has."""
        return self._inner.result

    def __enter__(self) -> Self:
        self._loop.run(self._inner.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk = self._loop.run(lambda: anext(self._inner, None))
        if chunk is None:
            raise StopIteration
        return chunk


class Job(BlockingHandle[jobs.Job]):
    """A command that was started in the background. `for chunk in job` yields its output from the start."""

    def __init__(self, loop: LoopThread, inner: jobs.Job) -> None:
        super().__init__(loop, inner)
        self.id = inner.id

    read = waited(jobs.Job.read)
    write = waited(jobs.Job.write)
    signal = waited(jobs.Job.signal)
    wait = waited(jobs.Job.wait)
    stop = waited(jobs.Job.stop)
    output = returning(OutputStream, direct(jobs.Job.output))

    def __iter__(self) -> OutputStream:
        return self.output()


class Pty(BlockingHandle[pty.Pty]):
    """A command on a terminal of its own; `for data in pty` yields its output, raw, until it ends.

    One thread may read while others write. As a context manager it hangs up at the end, unless it was detached from.
    """

    read = waited(pty.Pty.read)
    write = waited(pty.Pty.write)
    resize = waited(pty.Pty.resize)
    signal = waited(pty.Pty.signal)
    wait = waited(pty.Pty.wait)
    detach = waited(pty.Pty.detach)
    aclose = waited(pty.Pty.aclose)

    @property
    def id(self) -> str:
        """By which it is attached to again; a `LocalProtocolError` before it was started."""
        return self._inner.id

    @property
    def offset(self) -> int:
        """How far its output was read, in bytes from its beginning."""
        return self._inner.offset

    @property
    def lost_bytes(self) -> int:
        """How much of the output was dropped before it was read."""
        return self._inner.lost_bytes

    @property
    def exit_code(self) -> int | None:
        """As in `ExecResult`; None while it runs."""
        return self._inner.exit_code

    def __enter__(self) -> Self:
        self._loop.run(self._inner.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        data = self.read()
        if not data:
            raise StopIteration
        return data


class Sandbox(BlockingHandle[sandbox.Sandbox]):
    """One sandbox. `aclose()` drops the handle; `destroy()` ends the sandbox."""

    def __init__(self, loop: LoopThread, inner: sandbox.Sandbox) -> None:
        super().__init__(loop, inner)
        self.files = Files(loop, inner.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    @property
    def info(self) -> SandboxInfo:
        """What the hive reported last: at spawn, attach, extend or set_network."""
        return self._inner.info

    @property
    def spawn_share(self) -> Share | None:
        """The share that its spawn asked for; None if it asked for none."""
        return self._inner.spawn_share

    @property
    def asked(self) -> Mapping[str, Any]:
        """The arguments of the `spawn` that this handle came from, secrets too; empty where there was none."""
        return self._inner.asked

    @property
    def id(self) -> SandboxId:
        return self._inner.id

    @property
    def session(self) -> SessionName:
        """The name under which hosts see its tools."""
        return self._inner.session

    exec = waited(sandbox.Sandbox.exec)
    stream = returning(OutputStream, direct(sandbox.Sandbox.stream))
    background = returning(Job, waited(sandbox.Sandbox.background))
    job = returning(Job, direct(sandbox.Sandbox.job))
    jobs = waited(sandbox.Sandbox.jobs)
    pty = returning(Pty, direct(sandbox.Sandbox.pty))
    attach_pty = returning(Pty, direct(sandbox.Sandbox.attach_pty))
    ptys = waited(sandbox.Sandbox.ptys)
    tools = waited(sandbox.Sandbox.tools)
    call = waited(sandbox.Sandbox.call)
    extend = waited(sandbox.Sandbox.extend)
    set_network = waited(sandbox.Sandbox.set_network)
    snapshot = waited(sandbox.Sandbox.snapshot)
    reset = waited(sandbox.Sandbox.reset)
    share = waited(sandbox.Sandbox.share)
    shares = waited(sandbox.Sandbox.shares)
    revoke_shares = waited(sandbox.Sandbox.revoke_shares)
    url = waited(sandbox.Sandbox.url)
    port_url = direct(sandbox.Sandbox.port_url)
    logs = waited(sandbox.Sandbox.logs)
    destroy = waited(sandbox.Sandbox.destroy)
    aclose = waited(sandbox.Sandbox.aclose)


class Spawned(Sandbox):
    """A sandbox that this code made: as a context manager it is destroyed at the end."""

    def __init__(self, loop: LoopThread, spawning: client.Spawning) -> None:
        super().__init__(loop, loop.run(spawning.__aenter__))
        self._spawning = spawning

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(lambda: self._spawning.__aexit__(kind, error, trace))


class SpawnedMany:
    """What became of many spawns, by index."""

    def __init__(self, loop: LoopThread, inner: client.SpawnedMany) -> None:
        self._inner = inner
        self.made: Mapping[int, Sandbox] = {index: Sandbox(loop, box) for index, box in inner.made.items()}
        self.failed: Mapping[int, AshError] = inner.failed

    @property
    def sandboxes(self) -> Sequence[Sandbox]:
        """Those that were made, in the order of their indices."""
        return [self.made[index] for index in sorted(self.made)]

    def check(self) -> Sequence[Sandbox]:
        """Return all sandboxes; where one is lacking, raise why the first of these failed."""
        self._inner.check()
        return self.sandboxes


class Run(BlockingHandle[run.Run]):
    """A run of one hive; `Hive.run` makes it. As a context manager it is open inside, and ended at the end."""

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def info(self) -> RunInfo:
        """What the hive said of it when it was opened; a `LocalProtocolError` before."""
        return self._inner.info

    @property
    def ended(self) -> RunEnded | None:
        """Why it ended although this process held it; None while that is not known."""
        return self._inner.ended

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(lambda: self._inner.__aexit__(kind, error, trace))

    open = waited(run.Run.open)
    renew = waited(run.Run.renew)
    end = waited(run.Run.end)
    leave = waited(run.Run.leave)
    spawn = returning(Spawned, direct(run.Run.spawn))
    spawn_many = returning(SpawnedMany, waited(run.Run.spawn_many))


class _Forking(client.Hive):
    async def of(
        self,
        box: Sandbox,
        count: int,
        *,
        at_once: int = 16,
        timeout_seconds: float | None = None,
        on_ready: Callable[[int, SandboxInfo | AshError], None] | None = None,
        **asked: Any,
    ) -> client.SpawnedMany:
        return await client.Hive.fork(
            self, inner_of(box), count, at_once=at_once, timeout_seconds=timeout_seconds, on_ready=on_ready, **asked
        )

    of.__doc__ = client.Hive.fork.__doc__


class Hive(BlockingHandle[client.Hive]):
    """A hive of sandboxes; see `ash_mcp.Hive` for its arguments. `spawn` makes the sandbox at once."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        scope: str | None = None,
        *,
        timeout_seconds: float | None = None,
        settings: ClientSettings | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        hive = client.Hive(url, token, scope, timeout_seconds=timeout_seconds, settings=settings, transport=transport)
        super().__init__(LoopThread(), hive)
        self.settings = hive.settings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    def aclose(self) -> None:
        """Close the connections and end the thread. Idempotent; sandboxes live on."""
        if self._loop.is_open:
            self._loop.run(self._inner.aclose)
        self._loop.close()

    spawn = returning(Spawned, direct(client.Hive.spawn))
    spawn_many = returning(SpawnedMany, waited(client.Hive.spawn_many))
    fork = returning(SpawnedMany, waited(_Forking.of))
    snapshots = waited(client.Hive.snapshots)
    remove_snapshots = waited(client.Hive.remove_snapshots)
    run = returning(Run, direct(client.Hive.run))
    runs = waited(client.Hive.runs)
    destroy_run = waited(client.Hive.destroy_run)
    attach = returning(Sandbox, waited(client.Hive.attach))
    list = waited(client.Hive.list)
    extend = waited(client.Hive.extend)
    set_network = waited(client.Hive.set_network)
    destroy = waited(client.Hive.destroy)
    destroy_all = waited(client.Hive.destroy_all)
