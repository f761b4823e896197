"""`ash share new|list|revoke`: hand a sandbox to another agent, and take it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ash_mcp.cli.context import Cli, SessionArgument, hive_command
from ash_mcp.cli.output import clean, note
from ash_mcp.cli.tables import moment
from ash_mcp.cli.values import read_duration
from ash_mcp.wire import share_to_json

if TYPE_CHECKING:
    from ash_mcp.results import Share
    from ash_mcp.types import ShareInfo

__all__ = ["share", "share_lines", "share_shape"]

share = typer.Typer(
    help="Hand a sandbox to another agent: a token that opens its tools and nothing else of the hive.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


async def new(
    cli: Cli,
    session: SessionArgument,
    tool: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Open only this one; may be said several times.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="1h", help="How long it is good; until the sandbox ends if absent.")
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65535, help="Open this port inside, in a browser too; no tool then but those named."),
    ] = None,
) -> None:
    """Make a share and print its URL and token, once: only its hash is kept."""
    seconds = read_duration(ttl) if ttl is not None else None
    async with cli.sandbox(session) as box:
        made = await box.share(tools=tool or None, ports=port or (), ttl_seconds=seconds)
    cli.tell(share_shape(made), *share_lines(made))
    cli.note(f"Share {made.id} opens {_described(made.info)}; a client sends: Authorization: Bearer TOKEN")
    if port and not made.previews:
        cli.note("No browser has a way to its ports: the hive is not reached as localhost, see docs/previews.md")


async def list_shares(cli: Cli, session: SessionArgument) -> None:
    """Show a sandbox's shares that are good."""
    async with cli.sandbox(session) as box:
        shares = await box.shares()
    cli.tell({"shares": [share_to_json(info) for info in shares]}, *(f"{it.id}  {_described(it)}" for it in shares))
    if not shares and not cli.as_json:
        note("No shares. `ash share new` makes one.")


async def revoke(
    cli: Cli,
    session: SessionArgument,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="As `ash share list` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All shares of the sandbox.")] = False,
) -> None:
    """Revoke shares: calls with them are refused within two seconds, and those in flight end."""
    if bool(ids) == everything:
        raise typer.BadParameter("name the shares to revoke, or say --all to revoke all of them (one of the two)")
    async with cli.sandbox(session) as box:
        revoked = await box.revoke_shares(*(ids or ()))
    cli.tell({"revoked": revoked}, *(f"Revoked {clean(share_id)}" for share_id in revoked))


def share_shape(made: Share) -> dict[str, Any]:
    """Return a new share as JSON, its token too."""
    previews = [{"port": number, "url": url} for number, url in made.previews.items()]
    return {**share_to_json(made.info), "url": made.url, "token": made.token, "previews": previews}


def share_lines(made: Share) -> list[str]:
    """Return a new share for people, its token too."""
    lines = [f"browser, port {number}: {url}" for number, url in made.previews.items()]
    return [f"url    {made.url}", f"token  {made.token}", *lines]


def _described(info: ShareInfo) -> str:
    until = f"until {moment(info.expires_at)}" if info.expires_at is not None else "until the sandbox ends"
    opened = [*info.tools, *(f"port {port}" for port in info.ports)]
    return f"{clean(', '.join(opened))} {until}"


share.command("new")(hive_command(new))
share.command("list")(hive_command(list_shares))
share.command("revoke")(hive_command(revoke))
