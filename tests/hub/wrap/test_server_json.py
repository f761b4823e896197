"""Entries of MCP's registry: what is started of them, recipes of them, and our own."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ash_hub.cli.wrap import _variables  # pyright: ignore[reportPrivateUsage]
from ash_hub.spawning.recipes import Recipe
from ash_hub.wrap.packages import package_of
from ash_hub.wrap.server_json import PublishedServer, recipe_toml
from ash_mcp.errors import ConfigError
from tests.hub.wrap.wrap_parts import wrapped

ROOT = Path(__file__).parents[3]
ARGUMENT = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["named", "positional"]}, "value": {"type": "string"}},
    "if": {"properties": {"type": {"const": "named"}}},
    "then": {"required": ["name"]},
    "else": {"anyOf": [{"required": ["value"]}, {"required": ["valueHint"]}]},
}
EXACT = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+[-+.0-9A-Za-z]*$"}
RULES = {
    "type": "object",
    "required": ["$schema", "name", "description", "version"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"pattern": r"^https://static\.modelcontextprotocol\.io/schemas/2025-12-11/server\.schema\.json$"},
        "name": {"type": "string", "minLength": 3, "maxLength": 200, "pattern": "^[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+$"},
        "title": {"type": "string", "minLength": 1, "maxLength": 100},
        "description": {"type": "string", "minLength": 1, "maxLength": 100},
        "version": EXACT,
        "packages": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["registryType", "identifier", "version", "transport", "runtimeHint"],
                "properties": {
                    "registryType": {"enum": ["npm", "pypi", "oci", "nuget", "mcpb"]},
                    "version": EXACT,
                    "transport": {"properties": {"type": {"const": "stdio"}}, "required": ["type"]},
                    "runtimeArguments": {"type": "array", "items": ARGUMENT},
                    "packageArguments": {"type": "array", "items": ARGUMENT},
                },
            },
        },
    },
}
"""What the registry asks of an entry of a package, by its schema of 2025-12-11 and its own requirements."""


def test_our_own_entry_is_as_the_registry_wants_it_and_starts_the_hive() -> None:
    text = (ROOT / "server.json").read_text()
    entry: dict[str, Any] = json.loads(text)
    jsonschema.validate(entry, RULES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert entry["version"] == entry["packages"][0]["version"] == project["version"]
    assert re.findall("mcp-name: (\\S+)", (ROOT / project["readme"]).read_text()) == [entry["name"]]
    words = PublishedServer.read(text, {}).words()
    assert words == ("uvx", "--with", f"ash-mcp[all]=={project['version']}", "ash-mcp@0.1.0", "up", "--stdio")
    package = package_of(words)
    assert package is not None and package.command in project["scripts"]


def entry(*packages: dict[str, Any], **more: Any) -> str:
    named = {"name": "io.github.someone/Some_Server", "description": "Does some things.", "version": "1.0.0"}
    return json.dumps({**named, "packages": list(packages), **more})


NPM: dict[str, Any] = {
    "registryType": "npm",
    "identifier": "@someone/server",
    "version": "1.2.3",
    "transport": {"type": "stdio"},
    "runtimeHint": "npx",
    "runtimeArguments": [{"type": "positional", "value": "-y"}],
    "packageArguments": [
        {"type": "positional", "value": "serve"},
        {"type": "named", "name": "--verbose"},
        {"type": "named", "name": "--root", "value": "{place}", "variables": {"place": {"format": "filepath"}}},
        {"type": "positional", "valueHint": "mode", "default": "fast"},
        {"type": "positional", "valueHint": "extra", "isRequired": False},
    ],
    "environmentVariables": [
        {"name": "TOKEN", "isRequired": True, "isSecret": True},
        {"name": "LEVEL", "default": "info"},
        {"name": "OTHER"},
    ],
}


def test_a_package_of_npm_is_started_with_what_its_user_says() -> None:
    given = PublishedServer.read(json.dumps({"server": json.loads(entry(NPM)), "_meta": {}}), {"place": "/data"})
    assert given.words() == (*("npx", "-y", "@someone/server@1.2.3", "serve", "--verbose", "--root", "/data", "fast"),)
    assert given.variables() == {"TOKEN": None, "LEVEL": "info", "OTHER": None}
    assert given.required() == {"TOKEN"} and given.paths() == ["/data"]
    with pytest.raises(ConfigError, match="place is not said; say --set place=VALUE"):
        PublishedServer.read(entry(NPM), {}).words()


def test_a_recipe_of_it_is_one_that_a_hive_reads() -> None:
    published = PublishedServer.read(entry(NPM, title="Some"), {"place": "/workspace"})
    recipe = Recipe.model_validate(tomllib.loads(recipe_toml(published.recipe())))
    assert (
        recipe.name == "some-server" and recipe.network == ("registry.npmjs.org",) and recipe.env == {"LEVEL": "info"}
    )
    assert recipe.server.stdio is not None and recipe.server.stdio.command == published.words()
    image = {
        "registryType": "oci",
        "identifier": "ghcr.io/someone/server:1.0.0",
        "transport": {"type": "streamable-http", "url": "http://localhost:8080/mcp"},
    }
    made = Recipe.model_validate(PublishedServer.read(entry(image), {}).recipe())
    assert made.image == image["identifier"] and made.server.image is not None
    assert (made.server.image.port, made.server.image.path) == (8080, "/mcp")


def test_a_recipe_has_any_text_of_an_entry() -> None:
    text = entry(NPM, title="A \U0001f40d and \x7f", description='"quoted"\n\t\\ \u00e9')
    made = tomllib.loads(recipe_toml(PublishedServer.read(text, {"place": "/\U0001f40d"}).recipe()))
    assert (made["title"], made["description"]) == ("A \U0001f40d and \x7f", '"quoted"\n\t\\ \u00e9')


def test_an_entry_gets_no_variable_of_its_user_that_was_not_named(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(entry(NPM))
    words = ("--server", str(tmp_path / "server.json"), "--set", "place=/usr")
    done = wrapped(*words, env={"TOKEN": "hush", "OTHER": "hush"})
    assert done.returncode == 2 and b"needs the variable TOKEN: say --env TOKEN" in done.stderr
    published = PublishedServer.read(entry(NPM), {})
    os.environ["OTHER"] = "hush"
    try:
        assert _variables(published, ["TOKEN=given"]) == ["LEVEL=info"]
    finally:
        del os.environ["OTHER"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"name": "\\ud800", "description": ""}', "no JSON"),
        ("[]", "no server.json"),
        ('{"server": 3}', "no server.json"),
        (entry({**NPM, "packageArguments": [{"type": "named", "value": "x"}]}), "packageArguments have something"),
        (entry({**NPM, "runtimeArguments": [{"type": "positional", "variables": [1]}]}), "runtimeArguments have"),
        (entry({**NPM, "environmentVariables": [{"value": "x"}]}), "environmentVariables have"),
        (entry(), "has no package"),
        (
            entry({"registryType": "nuget", "transport": {"type": "stdio"}}),
            "has nuget stdio; what can be started here",
        ),
        (entry({**NPM, "packageArguments": [{"type": "positional", "valueHint": "dir"}]}), "--set dir=VALUE"),
    ],
)
def test_what_cannot_be_started_says_why(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        PublishedServer.read(text, {}).words()
