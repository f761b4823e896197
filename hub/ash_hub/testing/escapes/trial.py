"""An attempt carried out in a sandbox."""

from __future__ import annotations

import base64
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.backends.base import Instance
from ash_hub.spawning.runner_client import RunnerClient
from ash_hub.spawning.sandbox_requests import MAX_LIST_BYTES
from ash_hub.spawning.toolsets import pin
from ash_hub.testing.escapes.attempt import Attempt, Outcome, Verdict, program, verdict
from ash_hub.testing.escapes.bait import Bait
from ash_mcp.errors import AshError, ConnectFailed
from ash_mcp.types import SandboxSpec
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["Prison", "Ran", "not_made", "spec_for", "try_to_escape"]

_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.05
_ASK_SECONDS = 3.0
_PATIENCE_SECONDS = 3 * _ASK_SECONDS
"""It asks twice."""
_ANSWER_BYTES = 16 * MAX_LIST_BYTES
"""What the longest answer may cost the hub, with copies of it and what is read from it."""
_NO_ANSWER = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, ValueError)


class Ran(Protocol):
    """What a command inside a sandbox did."""

    @property
    def code(self) -> int: ...
    @property
    def out(self) -> str: ...
    @property
    def error(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prison:
    """What the escape suite needs to know of a backend that promises isolation."""

    run: Callable[[Instance, Sequence[str]], Awaitable[Ran]]
    """Runs a command in a sandbox. A sandbox that dies meanwhile is a ConnectionError or an EndOfStream."""
    bounds: Mapping[str, Any]
    """What a sandbox was given: `memory_bytes`, `processes`, `open_files`, `cpu`, `places` (path -> bytes), and
    `hive_bytes`, what it may make the hive take; of what the kernel gives each user of the host `inotify_instances`,
    `epoll_watches`, `terminals`, `pipe_pages`, `descriptors_in_flight`; `own_files` and `own_devices`, where its
    files and device nodes are no inodes of the host; `egress_proxy`, the path inside of the proxy's socket;
    `read_only_system`, where nothing outside of its places can be written; `one_user`, where it has no others;
    `machine`, where it has a range of users, the first that the host gives to any; `capabilities`, a mask of those
    that it may have in its own user namespace; `kernel`, which errors refuse a call beside the filter's own. What the
    backend says it cannot bound here, and what is not the host's in its sandboxes, is left out."""
    serve: Callable[[SandboxSpec, str], SandboxSpec]
    """Makes a Python program the main process of a sandbox, with its listener, Unix or TCP, as `ASH_LISTEN_FD`."""
    hive_bytes: Callable[[], int]
    """Tells what the hive's own processes and directories take of memory and disk."""
    run_dir: str = ""
    """Where the hive has its sockets; empty where it has none that lead to sandboxes."""
    hidden_paths: Sequence[str] = ()
    """Directories of the host that are seen inside, but not under their names."""
    lacks: Mapping[str, str] = field(default_factory=dict[str, str])
    """What this backend is known not to stop: why, by the attempt's name. Such a success counts as shared."""
    tokens: CallTokens = field(default_factory=lambda: CallTokens(Ed25519PrivateKey.generate()))
    """As whom the hub asks a server, whose sandbox has the key that belongs to them."""


def spec_for(attempt: Attempt, prison: Prison, bait: Bait, spec: SandboxSpec) -> SandboxSpec:
    """Return `spec` as an attempt needs it."""
    found = replace(spec, network=attempt.policy(bait.port))
    if not attempt.serves:
        return found
    key = base64.b64encode(prison.tokens.sandbox_keys.of(spec.id)).decode()
    return prison.serve(replace(found, key=key), attempt.script.replace("PORT", str(bait.port)))


def not_made(attempt: Attempt, prison: Prison) -> Outcome | None:
    """Return the outcome of an attempt on what the backend does not bound; None where it is to be made."""
    if attempt.bound is None or attempt.bound in prison.bounds:
        return None
    return Outcome(attempt, Verdict.SHARED, f"the backend says of no bound of {attempt.bound} here")


async def try_to_escape(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    """Make one attempt from `inside`, beside a sandbox `other`, and say what became of it."""
    if (unmade := not_made(attempt, prison)) is not None:
        return unmade
    tried = _watched if attempt.watched else _carried_out
    outcome = await tried(attempt, prison, bait, inside, other)
    if outcome.verdict is Verdict.ESCAPED and attempt.name in prison.lacks:
        return replace(outcome, verdict=Verdict.SHARED, how=f"{outcome.how}; {prison.lacks[attempt.name]}")
    return outcome


async def _watched(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    outcomes: list[Outcome] = []

    async def carry_out() -> None:
        outcomes.append(await _carried_out(attempt, prison, bait, inside, other))
        tasks.cancel_scope.cancel()

    async def notice(harm: Awaitable[str]) -> None:
        outcomes.append(Outcome(attempt, Verdict.ESCAPED, await harm))
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        most = _ANSWER_BYTES if attempt.serves else prison.bounds.get("hive_bytes", math.inf)
        tasks.start_soon(notice, _growth(prison, most))
        tasks.start_soon(notice, _silence(prison, other))
        tasks.start_soon(carry_out)
    return outcomes[0]


async def _growth(prison: Prison, most: float) -> str:
    """Return when the hive takes more than a sandbox may make it take."""
    before = prison.hive_bytes()
    while (grown := prison.hive_bytes() - before) <= most:  # noqa: ASYNC110 - memory has no event
        await anyio.sleep(_PAUSE_SECONDS)
    return f"the hive takes {grown} bytes more"


async def _silence(prison: Prison, other: Instance) -> str:
    """Return when a neighbour is not answered."""
    while True:
        try:
            with anyio.fail_after(_ANSWER_SECONDS):
                await prison.run(other, ["true"])
        except _NO_ANSWER as error:
            return f"its neighbour does not answer: {error!r}"
        await anyio.sleep(_PAUSE_SECONDS)


async def _asked(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance) -> Outcome:
    """Ask a server what the hub asks before anybody may use it, and say what became of that."""
    assert inside.endpoint is not None
    client = RunnerClient(inside.endpoint, prison.tokens, inside.id)
    try:
        with anyio.move_on_after(_PATIENCE_SECONDS):
            await client.wait_ready(_ASK_SECONDS)
            told = pin(await client.list_tools(_ASK_SECONDS), {})
            return Outcome(attempt, Verdict.ESCAPED, f"it is believed, with {len(told.tools)} tools")
    except ConnectFailed as error:
        return Outcome(attempt, Verdict.BROKEN, str(error))
    except AshError as error:
        seen = bait.secret in str(error)
        return Outcome(attempt, Verdict.ESCAPED if seen else Verdict.STOPPED, str(error))
    return Outcome(attempt, Verdict.ESCAPED, f"the hub waits for longer than {_PATIENCE_SECONDS:g} seconds")


async def _carried_out(attempt: Attempt, prison: Prison, bait: Bait, inside: Instance, other: Instance) -> Outcome:
    if attempt.serves:
        return await _asked(attempt, prison, bait, inside)
    own, foreign = (one.endpoint.unix if one.endpoint else None for one in (inside, other))
    told = bait.to_json(
        bounds=dict(prison.bounds),
        run_dir=prison.run_dir,
        hidden_paths=list(prison.hidden_paths),
        socket=own,
        other=foreign,
    )
    try:
        with anyio.fail_after(_SECONDS):
            ran = await prison.run(inside, program(attempt, told))
    except _NO_ANSWER as error:
        if attempt.fatal:
            return Outcome(attempt, Verdict.STOPPED, "its whole sandbox ended")
        return Outcome(attempt, Verdict.BROKEN, f"the sandbox did not answer: {error!r}")
    return verdict(attempt, ran.code, ran.out, ran.error)
