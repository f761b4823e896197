"""`ash snapshot new|list|remove`, `ash reset` and `ash fork`: a sandbox's files kept, gone back to, begun from."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from ash_mcp.cli.context import Cli, SessionArgument, hive_command
from ash_mcp.cli.output import clean, complain, note
from ash_mcp.cli.secrets import read_secrets
from ash_mcp.cli.tables import moment
from ash_mcp.cli.values import read_duration, read_pairs
from ash_mcp.wire import failure_to_json, info_to_json, snapshot_to_json

if TYPE_CHECKING:
    from ash_mcp.types import SnapshotInfo

__all__ = ["fork", "reset", "snapshot"]

snapshot = typer.Typer(
    help="Keep a sandbox's files, to go back to them or to start others from.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Env = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="K=V", help="Environment variable for what starts anew; none are kept."),
]
_Secret = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Secret, read from the variable NAME here, else a line of stdin."),
]
_SnapshotArgument = Annotated[str, typer.Argument(metavar="ID", help="As `ash snapshot list` shows it.")]


async def new(
    cli: Cli,
    session: SessionArgument,
    env: _Env = None,
    secret: _Secret = None,
    live: Annotated[bool, typer.Option(help="Copy the files while its processes go on; takes longer.")] = False,
    ttl: Annotated[
        str | None, typer.Option(metavar="1h", help="How long it is kept; as long as the hive keeps one if absent.")
    ] = None,
) -> None:
    """Take a snapshot of a sandbox's files. Its processes are ended, and it goes on from there."""
    seconds = read_duration(ttl) if ttl is not None else None
    variables, secrets = read_pairs(env or (), "a variable", variables=True), read_secrets(secret or ())
    async with cli.sandbox(session) as box:
        taken = await box.snapshot(ttl_seconds=seconds, live=live, env=variables, secrets=secrets)
    cli.tell(snapshot_to_json(taken), taken.id)
    cli.note(f"{_described(taken)}; `ash reset {session} {taken.id}` goes back to it")


async def list_snapshots(cli: Cli) -> None:
    """Show your snapshots."""
    async with cli.hive() as hive:
        found = await hive.snapshots()
    cli.tell({"snapshots": [snapshot_to_json(it) for it in found]}, *(f"{it.id}  {_described(it)}" for it in found))
    if not found and not cli.as_json:
        note("No snapshots. `ash snapshot new` takes one.")


async def remove(cli: Cli, ids: Annotated[list[str], typer.Argument(metavar="ID...")]) -> None:
    """Remove snapshots. Sandboxes that were started from them go on."""
    async with cli.hive() as hive:
        removed = await hive.remove_snapshots(*ids)
    cli.tell({"removed": removed}, *(f"Removed {clean(it)}" for it in removed))
    if missing := sorted(set(ids) - set(removed)):
        complain(f"you have no snapshot {clean(', '.join(missing))}")
        raise typer.Exit(1)


async def reset(
    cli: Cli, session: SessionArgument, snapshot_id: _SnapshotArgument, env: _Env = None, secret: _Secret = None
) -> None:
    """Take a sandbox back to a snapshot. Its processes are ended; its name and tools stay."""
    variables, secrets = read_pairs(env or (), "a variable", variables=True), read_secrets(secret or ())
    async with cli.sandbox(session) as box:
        info = await box.reset(snapshot_id, env=variables, secrets=secrets)
    cli.tell(info_to_json(info, now=time.time()), f"{info.session} has the files of {clean(snapshot_id)} again")


async def fork(
    cli: Cli,
    session: SessionArgument,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    env: _Env = None,
    secret: _Secret = None,
) -> None:
    """Start sandboxes with the files of another as they are now. Its processes are ended, and it goes on."""
    variables, secrets = read_pairs(env or (), "a variable", variables=True), read_secrets(secret or ())
    async with cli.hive() as hive:
        box = await hive.attach(session)
        taken = await box.snapshot(env=variables, secrets=secrets)
        try:
            run = box.info.run
            done = await hive.spawn_many(count, snapshot=taken, env=variables, secrets=secrets, run=run)
        finally:
            await hive.remove_snapshots(taken)
    now = time.time()
    failed = [{"index": index, **failure_to_json(done.failed[index])} for index in sorted(done.failed)]
    shape = {"made": [info_to_json(it.info, now=now) for it in done.sandboxes], "failed": failed}
    cli.tell(shape, *(f"{it.session} is ready: {it.info.recipe}, {it.id}" for it in done.sandboxes))
    if failed:
        for message, times in Counter(clean(it.message.partition("\n")[0]) for it in done.failed.values()).items():
            complain(f"{times} of {count} failed: {message}")
        raise typer.Exit(1)


def _described(info: SnapshotInfo) -> str:
    return f"of {info.session} ({info.recipe}), {info.size / 2**20:.1f} MiB, until {moment(info.expires_at)}"


snapshot.command("new")(hive_command(new))
snapshot.command("list")(hive_command(list_snapshots))
snapshot.command("remove")(hive_command(remove))
