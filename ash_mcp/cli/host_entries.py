"""The configuration by which each MCP host connects to a hive, in that host's own format. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["HOSTS", "TOKEN_VARIABLE", "Connection", "Host"]

TOKEN_VARIABLE: Final = "ASH_TOKEN"
_NAME: Final = "ash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How a host reaches a hive, over HTTP and over stdio."""

    url: str
    command: Sequence[str]
    """Starts the bridge for hosts that speak stdio."""
    env: Mapping[str, str]
    """The environment of the bridge."""
    with_token: bool
    """Whether the hive wants one. The token itself is never printed: hosts read it from the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One MCP host: where its configuration is, and what goes there."""

    where: str
    http: Callable[[Connection], str]
    stdio: Callable[[Connection], str]
    http_note: str = ""
    unattended: str = ""
    """What it needs where nobody can approve calls; empty where a person always sits before it."""


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


def _copilot(entry: Mapping[str, Any]) -> str:
    return _servers({**entry, "tools": ["*"]})


def _continue(fields: Mapping[str, Any]) -> str:
    # What JSON writes is YAML too; only the list around it has a form of its own.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in {"name": _NAME, **fields}.items()]
    return "mcpServers:\n  - " + "\n    ".join(lines)


def _continue_http(connection: Connection) -> str:
    headers = _bearer(connection, "${{ secrets.ASH_TOKEN }}")
    options = {"requestOptions": headers} if headers else {}
    return _continue({"type": "streamable-http", "url": connection.url, **options})


def _zed(entry: Mapping[str, Any]) -> str:
    return _json({"context_servers": {_NAME: entry}})


def _gemini_http(connection: Connection) -> str:
    return _servers({"httpUrl": connection.url, **_bearer(connection, "$ASH_TOKEN")})


def _opencode(entry: Mapping[str, Any]) -> str:
    return _json({"mcp": {_NAME: entry}})


def _opencode_stdio(connection: Connection) -> str:
    env = {"environment": dict(connection.env)} if connection.env else {}
    return _opencode({"type": "local", "command": list(connection.command), **env})


HOSTS: Final[Mapping[str, Host]] = {
    "claude-code": Host(
        where="run in a shell",
        http=_claude_code_http,
        stdio=_claude_code_stdio,
        unattended="claude -p … --allowedTools mcp__ash",
    ),
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
    "codex": Host(
        where="into ~/.codex/config.toml",
        http=_codex_http,
        stdio=_codex_stdio,
        unattended='default_tools_approval_mode = "approve" in [mcp_servers.ash]; else call and destroy are refused',
    ),
    "gemini-cli": Host(
        where="into ~/.gemini/settings.json or .gemini/settings.json",
        http=_gemini_http,
        stdio=lambda connection: _servers(_stdio_entry(connection)),
        unattended='"trust": true in the entry, or gemini --yolo; else its model is offered no tools of the hive',
    ),
    "qwen": Host(
        where="into ~/.qwen/settings.json or .qwen/settings.json",
        http=_gemini_http,
        stdio=lambda connection: _servers(_stdio_entry(connection)),
        unattended="qwen --yolo -p …",
    ),
    "opencode": Host(
        where="into opencode.json or ~/.config/opencode/opencode.json",
        http=lambda connection: _opencode(
            {"type": "remote", "url": connection.url, **_bearer(connection, "{env:ASH_TOKEN}")}
        ),
        stdio=_opencode_stdio,
        unattended='"permission": {"*": "allow"} beside "mcp", which allows its own tools, too',
    ),
    "copilot": Host(
        where="into ~/.copilot/mcp-config.json, or .mcp.json of a repository",
        http=lambda connection: _copilot(
            {"type": "http", "url": connection.url, **_bearer(connection, "${ASH_TOKEN}")}
        ),
        stdio=lambda connection: _copilot({"type": "stdio", **_stdio_entry(connection)}),
        unattended="copilot -p … --allow-all-tools",
    ),
    "cline": Host(
        where="into ~/.cline/data/settings/cline_mcp_settings.json, or what the extension shows as its MCP settings",
        http=lambda connection: _servers(
            {"type": "streamableHttp", "url": connection.url, **_bearer(connection, f"YOUR_{TOKEN_VARIABLE}")}
        ),
        stdio=lambda connection: _servers({"type": "stdio", **_stdio_entry(connection)}),
        unattended="nothing for its command, which approves by itself (--auto-approve true)",
    ),
    "continue": Host(
        where="into ~/.continue/config.yaml",
        http=_continue_http,
        stdio=lambda connection: _continue(_stdio_entry(connection)),
        unattended="cn -p --auto …",
    ),
    "zed": Host(
        where="into settings.json (zed: open settings file)",
        http=lambda connection: _zed({"url": connection.url, **_bearer(connection, f"YOUR_{TOKEN_VARIABLE}")}),
        stdio=lambda connection: _zed(_stdio_entry(connection)),
        unattended='"agent": {"tool_permissions": {"default": "allow"}}, which allows its own tools, too',
    ),
    "generic": Host(
        where="into .mcp.json, or wherever the host has its mcpServers",
        http=lambda connection: _servers(
            {"type": "http", "url": connection.url, **_bearer(connection, "${ASH_TOKEN}")}
        ),
        stdio=lambda connection: _servers({"type": "stdio", **_stdio_entry(connection)}),
    ),
}
