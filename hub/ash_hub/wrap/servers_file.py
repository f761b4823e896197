"""A host's file of MCP servers, and the one that replaces it: each stdio server becomes an `ash wrap` of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, cast

from ash_mcp.errors import ConfigError

__all__ = ["replacement"]

_KEYS = ("mcpServers", "servers")
"""Of most hosts, and of VS Code."""
_REFERENCE = "${"
"""How hosts write what they fill in themselves, as VS Code's `${workspaceFolder}`."""


def replacement(text: str, program: str = "ash") -> tuple[str, list[str]]:
    """Return the file that replaces one, and what its reader should know, a sentence each.

    An entry keeps its environment, which is named in its arguments; what it says beside `command`, `args` and `env`
    stays as it is, as do remote servers and what is wrapped already.

    Args:
        program: The `ash` to start.

    Raises:
        ConfigError: It is no such file.
    """
    try:
        read: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the file is no JSON: {error}; comments have to go first") from error
    given = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    key = next((key for key in _KEYS if isinstance(given.get(key), dict)), None)
    if key is None:
        raise ConfigError(f"the file has no servers: it needs an object {' or '.join(_KEYS)}")
    notes: list[str] = []
    servers = {name: _entry(name, entry, program, notes) for name, entry in given[key].items()}
    return json.dumps({**given, key: servers}, indent=2, ensure_ascii=False) + "\n", notes


def _entry(name: str, entry: Any, program: str, notes: list[str]) -> Any:
    mine = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if not isinstance(mine.get("command"), str):
        notes.append(f"{name}: stays as it is, since it is not started by a command")
        return cast("Any", entry)
    words = [mine["command"], *_strings(name, "args", mine.get("args", []))]
    if os.path.basename(words[0]) == "ash" and words[1:2] == ["wrap"]:
        notes.append(f"{name}: stays as it is, since it is wrapped already")
        return mine
    variables: Any = mine.get("env") or {}
    if not isinstance(variables, dict):
        raise ConfigError(f"{name}: env is no object of variables")
    folders = list(dict.fromkeys(_folders(words, mine.get("cwd"))))
    options = [word for path in folders for word in ("--folder", path)]
    options += [word for variable in cast("dict[str, Any]", variables) for word in ("--env", variable)]
    if folders:
        notes.append(f"{name}: sees {', '.join(folders)}, read-only; write :rw behind what it may change")
    notes.append(f"{name}: has no network; add --network internet, or the names it needs")
    return {**mine, "command": program, "args": ["wrap", *options, "--", *words]}


def _strings(name: str, key: str, given: Any) -> Sequence[str]:
    if not isinstance(given, list) or not all(isinstance(word, str) for word in cast("list[Any]", given)):
        raise ConfigError(f"{name}: {key} is no list of words")
    return cast("list[str]", given)


def _folders(words: Sequence[str], directory: Any) -> list[str]:
    """Return what an entry names of the host, which the server is then to see."""
    named = [word for word in words[1:] if os.path.isabs(word) and os.path.exists(word) and word != "/"]
    named += [word for word in words[1:] if word.startswith(_REFERENCE) and "older" in word]
    if isinstance(directory, str) and os.path.isabs(directory) and os.path.isdir(directory) and directory != "/":
        named.append(directory)
    return named
