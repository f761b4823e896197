"""`ash spawn`: a new sandbox."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import clean, complain
from ash_mcp.cli.secrets import read_secrets
from ash_mcp.cli.sharing import share_lines, share_shape
from ash_mcp.cli.tables import moment, tool_lines
from ash_mcp.cli.values import read_duration, read_network, read_pairs, shown_duration
from ash_mcp.cli.waiting import waiting
from ash_mcp.wire import failure_to_json, info_to_json, network_text

if TYPE_CHECKING:
    from ash_mcp.errors import AshError
    from ash_mcp.results import Progress
    from ash_mcp.sandbox import Sandbox
    from ash_mcp.types import SandboxInfo, Tool

__all__ = ["spawn"]


async def spawn(
    cli: Cli,
    recipe: Annotated[str | None, typer.Argument(help="What to make it from; general if absent.")] = None,
    session: Annotated[str | None, typer.Option(help="Its name, such as sb1; chosen by the hive if absent.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="Environment variable.")] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Secret, read from the variable NAME here, else a line of stdin."),
    ] = None,
    ttl: Annotated[str | None, typer.Option(metavar="DURATION", help="How long it lives: 90s, 10m, 2d.")] = None,
    idle: Annotated[str | None, typer.Option(metavar="DURATION", help="How long it lives without a call.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="A mark to list by.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image, where the backend has images.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Most processors: 500m, 2.")] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory: 256Mi, 1Gi.")] = None,
    network: Annotated[str | None, typer.Option(help="none, internet, or domains with commas.")] = None,
    result_bytes: Annotated[
        int | None, typer.Option(min=0, help="Longer results of tools are kept as files inside; 0: of any length.")
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Label of the nodes it may run on, in a cluster.")
    ] = None,
    runtime_class: Annotated[str | None, typer.Option(help="Such as gvisor, in a cluster.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many, all alike.")] = 1,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Open run that shall own it.")] = None,
    port: Annotated[list[int] | None, typer.Option(min=1, max=65535, help="Port inside that may be reached.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Share all its tools at once, and print the token.")] = False,
    share_tool: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Share only this one; may be said several times.")
    ] = None,
    share_port: Annotated[
        list[int] | None, typer.Option(min=1, max=65535, help="Share this one of its ports.")
    ] = None,
    share_ttl: Annotated[str | None, typer.Option(metavar="1h", help="How long the share is good.")] = None,
    snapshot: Annotated[str | None, typer.Option(metavar="ID", help="Snapshot that its files begin as.")] = None,
) -> None:
    """Start a sandbox and show its tools.

    A secret's value is never taken from the command line, where others on this machine could read it.
    """
    limits = {name: value for name, value in (("cpu", cpu), ("memory", memory)) if value is not None}
    asked: dict[str, Any] = {
        "session": session,
        "image": image,
        "env": read_pairs(env or (), "a variable", variables=True),
        "ttl_seconds": read_duration(ttl) if ttl is not None else None,
        "idle_seconds": read_duration(idle) if idle is not None else None,
        "labels": read_pairs(label or (), "a label"),
        "resources": {"limits": limits} if limits else None,
        "network": read_network(network) if network is not None else None,
        "result_bytes": result_bytes,
        "node_selector": read_pairs(node_selector or (), "a node's label"),
        "runtime_class": runtime_class,
        "ports": port or (),
        "run": run,
        "snapshot": snapshot,
    }
    if share or share_tool or share_port or share_ttl:
        seconds = read_duration(share_ttl) if share_ttl is not None else None
        asked["share"] = {"tools": share_tool or None, "ports": share_port or (), "ttl_seconds": seconds}
    if count > 1 and "share" in asked:
        raise typer.BadParameter("a share is of one sandbox; with --count, use ash share new for each")
    if count > 1 and session is not None:
        raise typer.BadParameter("--session names one sandbox; leave it out, or --count")
    asked["secrets"] = read_secrets(secret or ())
    if count > 1:
        await _spawn_many(cli, count, recipe, asked)
        return
    async with cli.hive() as hive, waiting("starting a sandbox", show=not cli.as_json) as meter:

        def show(news: Progress) -> None:
            meter.update(label=news.message, done=news.done, total=news.total)

        box = await hive.spawn(recipe, on_progress=show, **asked)
        tools = await box.tools()
    _tell(cli, box, tools)


async def _spawn_many(cli: Cli, count: int, recipe: str | None, asked: Mapping[str, Any]) -> None:
    async with cli.hive() as hive, waiting(f"starting {count} sandboxes", show=not cli.as_json) as meter:
        came: set[int] = set()

        def show(index: int, outcome: SandboxInfo | AshError) -> None:
            del outcome
            came.add(index)
            meter.update(done=len(came), total=count)

        done = await hive.spawn_many(count, recipe, on_ready=show, **asked)
    now, boxes = time.time(), done.sandboxes
    failed = [{"index": index, **failure_to_json(done.failed[index])} for index in sorted(done.failed)]
    lines = [f"{box.session} is ready: {box.info.recipe}, {box.id}" for box in boxes]
    cli.tell({"made": [info_to_json(box.info, now=now) for box in boxes], "failed": failed}, *lines)
    if failed:
        if not cli.as_json:
            why = Counter(clean(error.message.partition("\n")[0]) for error in done.failed.values())
            for message, times in why.items():
                complain(f"{times} of {count} failed: {message}")
        raise typer.Exit(1)


def _tell(cli: Cli, box: Sandbox, tools: Sequence[Tool]) -> None:
    info, now = box.info, time.time()
    shapes = [
        {"name": tool.name, "description": tool.description, "input_schema": dict(tool.input_schema)} for tool in tools
    ]
    shared = {"share": share_shape(box.spawn_share)} if box.spawn_share is not None else {}
    cli.tell({**info_to_json(info, now=now), **shared, "tools": shapes}, *_lines(box, tools, now))


def _lines(box: Sandbox, tools: Sequence[Tool], now: float) -> Sequence[str]:
    info = box.info
    left = shown_duration(info.expires_at - now)
    lines = [f"{info.session} is ready: {info.recipe}, {info.id}, until {moment(info.expires_at)} ({left})"]
    lines.append(f"Its network: {clean(network_text(info.network))}")
    lines += [f"Note: {clean(warning)}" for warning in info.warnings]
    lines += share_lines(box.spawn_share) if box.spawn_share is not None else []
    lines.append(f"Its tools, for `ash call {info.session} TOOL key=value…`:")
    return [*lines, *tool_lines(tools)]
