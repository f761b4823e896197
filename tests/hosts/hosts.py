"""The hosts: what each is told of the model and of the hive, and how it is asked to work without a person.

What a host is told of the hive is what `ash config` prints for it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.hive_process import ASH

__all__ = ["ASH_PROGRAM", "HOSTS", "Place", "Start"]

ASH_PROGRAM: Final = Path(sys.executable).with_name("ash")

_TASK: Final = "Use the hive."


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a host is set up with."""

    home: Path
    work: Path
    model_url: str
    hive_url: str
    form: str
    """`http` or `stdio`."""
    token: str = ""
    """Of a share, where `hive_url` is that of one: hosts find it in their environment, as `ASH_TOKEN`."""
    program: Path | None = None
    """What a bridge is started with that finds its hive itself; None tells it the hive's URL."""

    def config(self, host: str) -> str:
        """Return what `ash config` prints for a host."""
        named = () if self.program is not None else ("--url", self.hive_url)
        command = [*ASH, *named, "config", host, f"--{self.form}"]
        env = {**os.environ, **({"ASH_TOKEN": self.token} if self.token else {})}
        text = subprocess.run(command, capture_output=True, check=True, text=True, timeout=30, env=env).stdout
        text = text.replace("YOUR_ASH_TOKEN", self.token)  # where its user pastes it
        return text if self.program is None else text.replace(str(ASH_PROGRAM), str(self.program))

    def servers(self, host: str) -> dict[str, Any]:
        """Return the same as JSON."""
        return json.loads(self.config(host))

    def write(self, name: str, text: str | Mapping[str, Any]) -> None:
        """Write a file into the host's home."""
        file = self.home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if isinstance(text, str) else json.dumps(text))


@dataclass(frozen=True, slots=True)
class Start:
    """How a host is started."""

    command: Sequence[str]
    env: Mapping[str, str]
    first: Sequence[Sequence[str]] = field(default=())
    """Commands of the host that set it up."""


def _claude_code(place: Place) -> Start:
    env = {
        "ANTHROPIC_BASE_URL": place.model_url,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    add = shlex.split(place.config("claude-code").replace("$ASH_TOKEN", place.token))
    return Start(["claude", "-p", _TASK, "--allowedTools", "mcp__ash"], env, [add])


def _codex(place: Place) -> Start:
    provider = {
        "name": "scripted",
        "base_url": f"{place.model_url}/v1",
        "env_key": "KEY",
        "wire_api": "responses",
    }
    lines = ['model = "gpt-5.1-codex"', 'model_provider = "scripted"', "check_for_update_on_startup = false"]
    lines += ["[analytics]", "enabled = false", "[features]", "apps = false", "plugins = false"]
    lines += ["[model_providers.scripted]", *(f"{key} = {json.dumps(value)}" for key, value in provider.items())]
    place.write(".codex/config.toml", "\n".join([*lines, place.config("codex")]))
    unasked = "--dangerously-bypass-approvals-and-sandbox"
    return Start(["codex", "exec", "--skip-git-repo-check", unasked, _TASK], {"KEY": "none"})


def _gemini_settings(place: Place, host: str, auth: str) -> dict[str, Any]:
    return {
        **place.servers(host),
        "security": {"auth": {"selectedType": auth}, "folderTrust": {"enabled": False}},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
        "general": {"disableAutoUpdate": True, "enableAutoUpdate": False},
    }


def _gemini(place: Place) -> Start:
    place.write(".gemini/settings.json", _gemini_settings(place, "gemini-cli", "gemini-api-key"))
    env = {"GEMINI_API_KEY": "none", "GOOGLE_GEMINI_BASE_URL": place.model_url, "GEMINI_CLI_TRUST_WORKSPACE": "true"}
    return Start(["gemini", "--yolo", "-p", _TASK], env)


def _qwen(place: Place) -> Start:
    place.write(".qwen/settings.json", _gemini_settings(place, "qwen", "openai"))
    env = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{place.model_url}/v1", "OPENAI_MODEL": "scripted"}
    return Start(["qwen", "--yolo", "-p", _TASK], env)


def _opencode(place: Place) -> Start:
    model = {"name": "scripted", "tool_call": True, "limit": {"context": 200000, "output": 8000}}
    options = {"baseURL": f"{place.model_url}/v1", "apiKey": "none"}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"scripted": model}}
    settings = {
        "autoupdate": False,
        "share": "disabled",
        "model": "scripted/scripted",
        "small_model": "scripted/scripted",
        "provider": {"scripted": provider},
        **place.servers("opencode"),
        "permission": {"*": "allow"},
    }
    env = {
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_CONFIG_CONTENT": json.dumps(settings),
        "NPM_CONFIG_REGISTRY": place.model_url,  # it looks for plugins there
    }
    return Start(["opencode", "run", _TASK], env)


def _copilot(place: Place) -> Start:
    place.write(".copilot/mcp-config.json", place.servers("copilot"))
    env = {
        "COPILOT_PROVIDER_BASE_URL": f"{place.model_url}/v1",
        "COPILOT_PROVIDER_API_KEY": "none",
        "COPILOT_PROVIDER_WIRE_API": "completions",
        "COPILOT_MODEL": "scripted",
        "COPILOT_AUTO_UPDATE": "false",
    }
    return Start(["copilot", "-p", _TASK, "--allow-all-tools", "--trust-folder", "--disable-client-telemetry"], env)


def _cline(place: Place) -> Start:
    place.write("settings.json", {"telemetryOptOut": True, "autoUpdateEnabled": False})
    env = {"CLINE_GLOBAL_SETTINGS_PATH": str(place.home / "settings.json"), "IS_TEST": "true"}  # no feature flags
    place.write(".cline/data/settings/cline_mcp_settings.json", place.config("cline"))
    auth = ["cline", "auth", "-p", "openai", "-k", "none", "-m", "scripted", "-b", f"{place.model_url}/v1"]
    return Start(["cline", "--json", "-t", "60", _TASK], env, [auth])


def _continue(place: Place) -> Start:
    model = {
        "name": "scripted",
        "provider": "openai",
        "model": "gpt-4o",
        "apiBase": f"{place.model_url}/v1",
        "apiKey": "none",
        "roles": ["chat"],
        "capabilities": ["tool_use"],
    }
    # YAML takes JSON as it is
    lines = ["name: visit", "version: 1.0.0", "schema: v1", f"models: {json.dumps([model])}", place.config("continue")]
    place.write("config.yaml", "\n".join(lines))
    command = ["cn", "-p", "--auto", "--config", str(place.home / "config.yaml"), _TASK]
    return Start(command, {"CONTINUE_TELEMETRY_ENABLED": "0"})


HOSTS: Final[Mapping[str, Callable[[Place], Start]]] = {
    "claude-code": _claude_code,
    "cline": _cline,
    "codex": _codex,
    "continue": _continue,
    "copilot": _copilot,
    "gemini-cli": _gemini,
    "opencode": _opencode,
    "qwen-code": _qwen,
}
