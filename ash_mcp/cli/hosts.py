"""`ash config`: prints the configuration that connects an MCP host."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.host_entries import HOSTS, TOKEN_VARIABLE, Connection
from ash_mcp.cli.output import emit_json, note, say
from ash_mcp.errors import ConfigError
from ash_mcp.settings import ClientSettings
from ash_mcp.types import EVERY_SCOPE

__all__ = ["config"]


async def config(
    cli: Cli,
    host: Annotated[str, typer.Argument(metavar="HOST", help=f"One of: {', '.join(HOSTS)}.")],
    http: Annotated[bool, typer.Option("--http", help="Only for a hive that runs, by its URL.")] = False,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Only for the bridge, which finds or starts the hive.")
    ] = False,
) -> None:
    """Print what connects an MCP host to the hive, ready to paste.

    Only that goes to standard output, what to do with it to standard error. Asks no hive.
    """
    if host not in HOSTS:
        raise typer.BadParameter(f"there is no host {host!r}; there are: {', '.join(HOSTS)}. Try generic for others")
    entry, connection = HOSTS[host], _connection(cli)
    forms = {"http": entry.http(connection), "stdio": entry.stdio(connection)}
    if http != stdio:
        forms = {"http": forms["http"]} if http else {"stdio": forms["stdio"]}
    if cli.as_json:
        unattended = {"unattended": entry.unattended} if entry.unattended else {}
        emit_json({"host": host, "where": entry.where, **unattended, **forms})
        return
    for form, text in forms.items():
        how = "HTTP, for a hive that runs (ash up)" if form == "http" else "stdio, which finds or starts the hive"
        more = f"; {entry.http_note}" if form == "http" and entry.http_note else ""
        note(f"# {host}, {how}{more}. Paste {entry.where}:")
        say(text)
        note("")
    if entry.unattended:
        note(f"# Where nobody can approve: {entry.unattended}")


def _connection(cli: Cli) -> Connection:
    try:
        settings = ClientSettings.from_environment(url=cli.url, scope=cli.scope)
    except ConfigError as exc:
        raise typer.BadParameter(exc.message) from exc
    scope = settings.scope or ""
    env = {"ASH_URL": cli.url, "ASH_SCOPE": scope}
    inside = f"?scope={EVERY_SCOPE}" if scope == EVERY_SCOPE else f"/in/{scope}"
    return Connection(
        url=settings.url + (inside if scope else ""),
        command=(*_program(), "up", "--stdio"),
        env={key: value for key, value in env.items() if value},
        with_token=bool(os.environ.get(TOKEN_VARIABLE)),
    )


def _program() -> Sequence[str]:
    """Return how to start `ash` from anywhere: hosts with windows do not have the shell's search path."""
    beside = os.path.join(os.path.dirname(sys.executable), "ash")
    found = beside if os.access(beside, os.X_OK) else shutil.which("ash")
    return (os.path.abspath(found),) if found else (sys.executable, "-m", "ash_mcp.cli")
