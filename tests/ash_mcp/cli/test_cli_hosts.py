"""`ash config` prints what a host can read, and never a token."""

from __future__ import annotations

import json
import shlex
import tomllib
from typing import Any

import pytest
import yaml

from ash_mcp.cli import main
from ash_mcp.cli.host_entries import HOSTS

URL = "http://127.0.0.1:8420/mcp"
JSON_HOSTS = ["claude-desktop", "vscode", "cursor", "gemini-cli", "qwen", "copilot", "cline", "zed", "generic"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["config", *words])
    assert left.value.code == 0
    return capsys.readouterr().out


def entry(text: str) -> dict[str, Any]:
    shape = json.loads(text)
    servers = shape.get("mcpServers") or shape.get("servers") or shape.get("context_servers")
    assert list(servers) == ["ash"]
    return servers["ash"]


@pytest.mark.parametrize("host", JSON_HOSTS)
def test_both_forms_for_hosts_that_read_json_parse(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    stdio = entry(printed(capsys, host, "--stdio"))
    assert stdio["command"].startswith("/") and stdio["args"][-2:] == ["up", "--stdio"]
    assert URL in json.dumps(entry(printed(capsys, host, "--http")))


def test_each_host_gets_the_keys_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(printed(capsys, "vscode", "--http")) == {"servers": {"ash": {"type": "http", "url": URL}}}
    assert entry(printed(capsys, "gemini-cli", "--http")) == {"httpUrl": URL}
    assert entry(printed(capsys, "qwen", "--http")) == {"httpUrl": URL}
    assert entry(printed(capsys, "copilot", "--http")) == {"type": "http", "url": URL, "tools": ["*"]}
    assert entry(printed(capsys, "cline", "--http")) == {"type": "streamableHttp", "url": URL}
    assert json.loads(printed(capsys, "zed", "--http")) == {"context_servers": {"ash": {"url": URL}}}
    assert entry(printed(capsys, "cursor", "--http")) == {"url": URL}
    assert entry(printed(capsys, "generic", "--http")) == {"type": "http", "url": URL}
    assert entry(printed(capsys, "claude-desktop", "--http"))["args"] == ["-y", "mcp-remote", URL]


def test_codex_gets_toml(capsys: pytest.CaptureFixture[str]) -> None:
    assert tomllib.loads(printed(capsys, "codex", "--http")) == {"mcp_servers": {"ash": {"url": URL}}}
    stdio = tomllib.loads(printed(capsys, "codex", "--stdio", "--url", URL))["mcp_servers"]["ash"]
    assert stdio["args"][-2:] == ["up", "--stdio"] and stdio["env"] == {"ASH_URL": URL}


def test_continue_gets_yaml(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (server,) = yaml.safe_load(printed(capsys, "continue", "--http"))["mcpServers"]
    assert server == {"name": "ash", "type": "streamable-http", "url": URL}
    (server,) = yaml.safe_load(printed(capsys, "continue", "--stdio", "--url", URL))["mcpServers"]
    assert server["args"][-2:] == ["up", "--stdio"] and server["env"] == {"ASH_URL": URL}
    monkeypatch.setenv("ASH_TOKEN", "hunter2")
    (server,) = yaml.safe_load(printed(capsys, "continue", "--http"))["mcpServers"]
    assert server["requestOptions"] == {"headers": {"Authorization": "Bearer ${{ secrets.ASH_TOKEN }}"}}


@pytest.mark.parametrize("host", [name for name, host in HOSTS.items() if host.unattended])
def test_what_a_host_needs_where_nobody_can_approve_is_said_beside_it(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["config", host])
    said = capsys.readouterr()
    assert f"# Where nobody can approve: {HOSTS[host].unattended}" in said.err
    assert HOSTS[host].unattended not in said.out


def test_opencode_gets_a_list_for_a_command_and_its_own_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads(printed(capsys, "opencode", "--http")) == {"mcp": {"ash": {"type": "remote", "url": URL}}}
    stdio = json.loads(printed(capsys, "opencode", "--stdio", "--url", URL))["mcp"]["ash"]
    assert stdio["command"][0].startswith("/") and stdio["command"][-2:] == ["up", "--stdio"]
    assert stdio["type"] == "local" and stdio["environment"] == {"ASH_URL": URL}
    monkeypatch.setenv("ASH_TOKEN", "hunter2")
    with_token = json.loads(printed(capsys, "opencode", "--http"))["mcp"]["ash"]
    assert with_token["headers"] == {"Authorization": "Bearer {env:ASH_TOKEN}"}


def test_claude_code_gets_commands(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "claude-code").splitlines()
    assert shlex.split(lines[0]) == ["claude", "mcp", "add", "--transport", "http", "ash", URL]
    assert shlex.split(lines[1])[:6] == ["claude", "mcp", "add", "--transport", "stdio", "ash"]
    assert shlex.split(lines[1])[-2:] == ["up", "--stdio"]


@pytest.mark.parametrize("host", list(HOSTS))
def test_a_token_is_named_and_never_printed(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_TOKEN", "hunter2")
    text = printed(capsys, host, "--http")
    assert "hunter2" not in text
    assert "ASH_TOKEN" in text or "ash-token" in text


def test_a_scope_is_in_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(printed(capsys, "generic", "--http", "--scope", "run42"))["url"] == f"{URL}/in/run42"
    assert entry(printed(capsys, "generic", "--http", "--scope", "*"))["url"] == f"{URL}?scope=*"
    assert entry(printed(capsys, "generic", "--stdio", "--scope", "run42"))["env"] == {"ASH_SCOPE": "run42"}


def test_json_holds_both_forms_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "cursor", "--json"])
    said = capsys.readouterr()
    assert said.err == ""
    assert set(json.loads(said.out)) == {"host", "where", "http", "stdio"}
