"""What the scripted model does in a hive (spawns a sandbox, uses it, ends it, looks), and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

import anyio
from mcp.client import Client

from tests.hosts.model_apis import Move, Request
from tests.hosts.scripted_model import Script

__all__ = ["OWN", "SESSION", "Offered", "end_visit", "missed", "row", "steps", "visit", "when_offered"]

SESSION: Final = "visit"
EXECUTE: Final = "terminal-controller_execute_command"
OWN: Final = f"{SESSION}_{EXECUTE}"


class Offered(IntEnum):
    """When the model is first offered the tools of the sandbox that it spawned."""

    NEVER = 0
    ONE_REQUEST_LATE = 1
    AT_ONCE = 2
    """In the request that brings it the spawn's result."""


def steps(named_by: str = "session") -> Mapping[str, Mapping[str, Any]]:
    """Return what the model calls, one after the other; `named_by` is the argument that names a sandbox."""
    return {
        "spawn": {named_by: SESSION},
        OWN: {"command": "echo own=$((6*7))"},
        "call": {named_by: SESSION, "tool": EXECUTE, "arguments": {"command": "echo call=$((6*7))"}},
        "destroy": {named_by: SESSION},
        "list": {},
    }


def visit(calls: Mapping[str, Mapping[str, Any]]) -> Script:
    """Return the script of a model that calls these, the sandbox's own tool only if that is offered by then."""

    def script(request: Request) -> Move:
        for step, arguments in calls.items():
            tool = request.offered(step)
            if request.called(step) or (step == OWN and (tool is None or request.called("destroy"))):
                continue
            return request.move(tool, arguments) if tool else request.wait()
        return Move(text="All is done.")

    return script


def when_offered(requests: Sequence[Request]) -> Offered:
    since_spawn = [request for request in requests if request.result("spawn") is not None]
    before_destroy = [request for request in since_spawn if request.result("destroy") is None]
    late = next((at for at, request in enumerate(before_destroy) if request.offered(OWN)), None)
    return {None: Offered.NEVER, 0: Offered.AT_ONCE}.get(late, Offered.ONE_REQUEST_LATE)


def row(name: str, over: str, versions: Sequence[str], requests: Sequence[Request]) -> tuple[str, ...]:
    """Return the row of the table of what was seen that tells of one visit."""
    seen = [request for request in requests if request.offered("spawn")]
    offered = when_offered(seen)
    after = "" if offered is Offered.NEVER else "still offered" if seen[-1].offered(OWN) else "gone"
    own = "in the first request" if requests[0].offered("spawn") else "later"
    return name, over, ", ".join(versions), own, offered.name.lower().replace("_", " "), after


def missed(last: Request, calls: Iterable[str], offered: Offered) -> Mapping[str, str]:
    """Return those of `calls` whose results, as the last request brings them, are not what they should be."""
    results = {step: last.result(step) or "nothing" for step in steps()}
    good = {
        "spawn": EXECUTE in results["spawn"],
        OWN: offered is Offered.NEVER or "own=42" in results[OWN],
        "call": "call=42" in results["call"],
        "destroy": SESSION in results["destroy"],
        "list": "andboxes" in results["list"] and SESSION not in results["list"],
    }
    return {step: results[step] for step in calls if not good[step]}


def end_visit(url: str) -> list[Any]:
    """End what sandboxes there are, and return them."""

    async def end() -> list[Any]:
        async with Client(url) as client:
            ended = await client.call_tool("destroy", {"session": "*"})
        assert ended.structured_content is not None, ended.content
        return ended.structured_content["destroyed"]

    return anyio.run(end)
