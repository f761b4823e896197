"""`ash config`: what to paste into an MCP host, as each of them writes it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import emit_json, note, say
from ash_mcp.errors import ConfigError
from ash_mcp.settings import ClientSettings
from ash_mcp.types import EVERY_SCOPE

__all__ = ["HOSTS", "Connection", "Host", "config"]

TOKEN_VARIABLE: Final = "ASH_TOKEN"
_NAME: Final = "ash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What a host must know of a hive."""

    url: str
    command: Sequence[str]
    """Starts the bridge for hosts that speak stdio."""
    env: Mapping[str, str]
    """What the bridge must be told."""
    with_token: bool
    """Whether the hive wants one. The token itself is never printed: hosts read it from the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One MCP host: where its configuration is, and what goes there."""

    where: str
    http: Callable[[Connection], str]
    stdio: Callable[[Connection], str]
    http_note: str = ""


def _json(shape: Mapping[str, Any]) -> str:
    return json.dumps(shape, indent=2, ensure_ascii=False)


def _bearer(connection: Connection, written: str) -> dict[str, Any]:
    """Return the header as this host writes a variable of the environment in it."""
    return {"headers": {"Authorization": f"Bearer {written}"}} if connection.with_token else {}


def _servers(entry: Mapping[str, Any]) -> str:
    return _json({"mcpServers": {_NAME: entry}})


def _stdio_entry(connection: Connection) -> dict[str, Any]:
    program, *arguments = connection.command
    entry: dict[str, Any] = {"command": program, "args": arguments}
    return {**entry, "env": dict(connection.env)} if connection.env else entry


def _claude_code_http(connection: Connection) -> str:
    line = shlex.join(["claude", "mcp", "add", "--transport", "http", _NAME, connection.url])
    return line + (f' --header "Authorization: Bearer ${TOKEN_VARIABLE}"' if connection.with_token else "")


def _claude_code_stdio(connection: Connection) -> str:
    told = [word for key, value in connection.env.items() for word in ("--env", f"{key}={value}")]
    return shlex.join(["claude", "mcp", "add", "--transport", "stdio", _NAME, *told, "--", *connection.command])


def _claude_desktop_http(connection: Connection) -> str:
    entry: dict[str, Any] = {"command": "npx", "args": ["-y", "mcp-remote", connection.url]}
    if connection.with_token:
        entry["args"] += ["--header", "Authorization:${ASH_AUTHORIZATION}"]
        entry["env"] = {"ASH_AUTHORIZATION": f"Bearer YOUR_{TOKEN_VARIABLE}"}
    return _servers(entry)


def _vscode_http(connection: Connection) -> str:
    entry = {"type": "http", "url": connection.url, **_bearer(connection, "${input:ash-token}")}
    shape: dict[str, Any] = {"servers": {_NAME: entry}}
    if connection.with_token:
        shape["inputs"] = [
            {"type": "promptString", "id": "ash-token", "description": "Token of the hive", "password": True}
        ]
    return _json(shape)


def _codex(fields: Mapping[str, Any], env: Mapping[str, str]) -> str:
    # A JSON string or list of strings is the same in TOML.
    lines = [f"[mcp_servers.{_NAME}]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    if env:
        lines += ["", f"[mcp_servers.{_NAME}.env]"]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in env.items()]
    return "\n".join(lines)


def _codex_http(connection: Connection) -> str:
    token = {"bearer_token_env_var": TOKEN_VARIABLE} if connection.with_token else {}
    return _codex({"url": connection.url, **token}, {})


def _codex_stdio(connection: Connection) -> str:
    program, *arguments = connection.command
    # the first start brings up a whole hive, and Codex waits ten seconds by default
    return _codex({"command": program, "args": arguments, "startup_timeout_sec": 60}, connection.env)


HOSTS: Final[Mapping[str, Host]] = {
    "claude-code": Host(where="run in a shell", http=_claude_code_http, stdio=_claude_code_stdio),
    "claude-desktop": Host(
        where="into claude_desktop_config.json (Settings, Developer, Edit Config)",
        http=_claude_desktop_http,
        stdio=lambda connection: _servers(_stdio_entry(connection)),
        http_note="its configuration file knows only stdio, so mcp-remote (needs Node) stands between",
    ),
    "vscode": Host(
        where="into .vscode/mcp.json, or the user's mcp.json (MCP: Open User Configuration)",
        http=_vscode_http,
        stdio=lambda connection: _json({"servers": {_NAME: {"type": "stdio", **_stdio_entry(connection)}}}),
    ),
    "cursor": Host(
        where="into ~/.cursor/mcp.json or .cursor/mcp.json",
        http=lambda connection: _servers({"url": connection.url, **_bearer(connection, "${env:ASH_TOKEN}")}),
        stdio=lambda connection: _servers({"type": "stdio", **_stdio_entry(connection)}),
    ),
    "codex": Host(where="into ~/.codex/config.toml", http=_codex_http, stdio=_codex_stdio),
    "gemini-cli": Host(
        where="into ~/.gemini/settings.json or .gemini/settings.json",
        http=lambda connection: _servers({"httpUrl": connection.url, **_bearer(connection, "$ASH_TOKEN")}),
        stdio=lambda connection: _servers(_stdio_entry(connection)),
    ),
    "generic": Host(
        where="into .mcp.json, or wherever the host has its mcpServers",
        http=lambda connection: _servers(
            {"type": "http", "url": connection.url, **_bearer(connection, "${ASH_TOKEN}")}
        ),
        stdio=lambda connection: _servers({"type": "stdio", **_stdio_entry(connection)}),
    ),
}


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
        emit_json({"host": host, "where": entry.where, **forms})
        return
    for form, text in forms.items():
        how = "HTTP, for a hive that runs (ash up)" if form == "http" else "stdio, which finds or starts the hive"
        more = f"; {entry.http_note}" if form == "http" and entry.http_note else ""
        note(f"# {host}, {how}{more}. Paste {entry.where}:")
        say(text)
        note("")


def _connection(cli: Cli) -> Connection:
    try:
        settings = ClientSettings.from_environment(url=cli.url, scope=cli.scope)
    except ConfigError as exc:
        raise typer.BadParameter(exc.message) from exc
    scope = settings.scope or ""
    told = {"ASH_URL": cli.url, "ASH_SCOPE": scope}
    inside = f"?scope={EVERY_SCOPE}" if scope == EVERY_SCOPE else f"/in/{scope}"
    return Connection(
        url=settings.url + (inside if scope else ""),
        command=(*_program(), "up", "--stdio"),
        env={key: value for key, value in told.items() if value},
        with_token=bool(os.environ.get(TOKEN_VARIABLE)),
    )


def _program() -> Sequence[str]:
    """Return how to start `ash` from anywhere: hosts with windows do not have the shell's search path."""
    beside = os.path.join(os.path.dirname(sys.executable), "ash")
    found = beside if os.access(beside, os.X_OK) else shutil.which("ash")
    return (os.path.abspath(found),) if found else (sys.executable, "-m", "ash_mcp.cli")
