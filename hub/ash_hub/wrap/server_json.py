"""A server as MCP's registry describes it (`server.json`): its command line, and a recipe of it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from ash_mcp.errors import ConfigError

__all__ = ["PublishedServer", "recipe_toml"]

_RUNNERS = {"npm": ("npx", "-y"), "pypi": ("uvx",)}
_REGISTRIES = {"npm": ("registry.npmjs.org",), "pypi": ("pypi.org", "files.pythonhosted.org")}
_NAME_LENGTH, _DESCRIPTION_LENGTH = 40, 2000


@dataclass(frozen=True, slots=True)
class PublishedServer:
    """One entry, and what its user said of it."""

    entry: Mapping[str, Any]
    values: Mapping[str, str]
    """What the entry leaves to its user, by the name or hint of an argument or of a variable within a value."""

    @classmethod
    def read(cls, text: str, values: Mapping[str, str]) -> PublishedServer:
        """Read a `server.json`, or what the registry answers, where it is one field of several.

        Raises:
            ConfigError: It is no such entry.
        """
        try:
            given: Any = json.loads(text)
            json.dumps(given, ensure_ascii=False).encode()  # which halves of characters are not
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the file is no JSON: {error}") from error
        answer = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        within: Any = answer.get("server", answer)
        entry = cast("dict[str, Any]", within) if isinstance(within, dict) else {}
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("description"), str):
            raise ConfigError("the file is no server.json: it needs a name and a description")
        for key in ("runtimeArguments", "packageArguments", "environmentVariables"):
            for package in _objects(entry.get("packages")):
                if not all(map(_is_input, _objects(package.get(key)))):
                    raise ConfigError(f"the file is no server.json: its {key} have something that is none")
        return cls(entry, values)

    def package(self, *kinds: str) -> Mapping[str, Any]:
        """Return the first package of one of these kinds: `npm stdio` is one of npm that speaks on stdin and stdout.

        Raises:
            ConfigError: There is none.
        """
        found: list[str] = []
        for package in _objects(self.entry.get("packages")):
            transport = package.get("transport")
            spoken = cast("dict[str, Any]", transport).get("type") if isinstance(transport, dict) else "?"
            kind = f"{package.get('registryType')} {spoken}"
            if kind in kinds and isinstance(package.get("identifier"), str):
                return package
            found.append(kind)
        there = ", ".join(found) or "no package"
        raise ConfigError(f"{self.entry['name']} has {there}; what can be started here is {' or '.join(kinds)}")

    def words(self) -> tuple[str, ...]:
        """Return the command line that starts it.

        Raises:
            ConfigError: No package of it is started by a command line, or an argument has no value.
        """
        package = self.package("npm stdio", "pypi stdio")
        runner = _RUNNERS[package["registryType"]]
        version = f"@{package['version']}" if package.get("version") else ""
        more = list(self._arguments(package, "runtimeArguments"))
        more = [word for word in more if word not in runner]
        return (*runner, *more, f"{package['identifier']}{version}", *self._arguments(package, "packageArguments"))

    def variables(self) -> dict[str, str | None]:
        """Return the variables of its package: each with its value, or None where that is its user's."""
        found: dict[str, str | None] = {}
        for given in _objects(
            self.package("npm stdio", "pypi stdio", "oci streamable-http").get("environmentVariables")
        ):
            found[str(given.get("name"))] = self._value(given)
        return found

    def required(self) -> set[str]:
        """Return the variables without which it does not start."""
        package = self.package("npm stdio", "pypi stdio", "oci streamable-http")
        return {str(it.get("name")) for it in _objects(package.get("environmentVariables")) if it.get("isRequired")}

    def paths(self) -> list[str]:
        """Return what its user said where it asks for a file or a folder."""
        package = self.package("npm stdio", "pypi stdio")
        asked = [
            (str(name), given)
            for argument in _objects(package.get("packageArguments"))
            for name, given in (
                (argument.get("valueHint") or argument.get("name"), argument),
                *cast("dict[str, Any]", argument.get("variables") or {}).items(),
            )
        ]
        return [self.values[name] for name, it in asked if it.get("format") == "filepath" and name in self.values]

    def _arguments(self, package: Mapping[str, Any], key: str) -> Iterator[str]:
        for argument in _objects(package.get(key)):
            value = self._value(argument)
            if argument.get("type") == "named":
                if value is not None:
                    yield from (str(argument["name"]), value)
                elif "value" not in argument and "default" not in argument and not _asks(argument):
                    yield str(argument["name"])  # a flag
                elif argument.get("isRequired"):
                    raise ConfigError(_missing(argument))
            elif value is not None:
                yield value
            elif argument.get("isRequired") or "isRequired" not in argument:
                raise ConfigError(_missing(argument))

    def _value(self, given: Mapping[str, Any]) -> str | None:
        """Return a value with what its user said in it; None where that is to be said and was not."""
        named = self.values.get(str(given.get("valueHint") or given.get("name")))
        text = given.get("value")
        if text is None:
            usual = given.get("default")
            return named if named is not None or usual is None else str(usual)
        variables = cast("dict[str, Any]", given.get("variables") or {})

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name not in variables:
                return match[0]
            usual: Any = variables[name].get("value", variables[name].get("default"))
            if name not in self.values and usual is None:
                raise ConfigError(f"{name} is not said; say --set {name}=VALUE")
            return self.values.get(name, str(usual))

        return re.sub(r"\{([^{}]+)\}", fill, str(text))

    def recipe(self) -> dict[str, Any]:
        """Return a recipe of it, as data.

        Raises:
            ConfigError: It has no package that a sandbox can be made of.
        """
        package = self.package("npm stdio", "pypi stdio", "oci streamable-http")
        kind = package["registryType"]
        name = re.sub(r"[^a-z0-9]+", "-", self.entry["name"].rpartition("/")[2].lower()).strip("-")[:_NAME_LENGTH]
        found: dict[str, Any] = {
            "name": name if name[:1].isalpha() else f"s-{name}"[:_NAME_LENGTH],
            "description": self.entry["description"][:_DESCRIPTION_LENGTH],
        }
        if isinstance(self.entry.get("title"), str):
            found["title"] = self.entry["title"]
        if kind == "oci":
            found["image"] = package["identifier"]
            found["server"] = {"image": _place(package["transport"])}
        else:
            found["server"] = {"stdio": {"command": list(self.words())}}
            found["network"] = list(_REGISTRIES[kind])
            found["start_timeout_seconds"] = 180
        env = {key: value for key, value in self.variables().items() if value is not None}
        return {**found, **({"env": env} if env else {})}


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as `recipe.toml` has it."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in recipe.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, Any]", value)
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(it)}" for key, it in inner.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(it) for it in cast("list[Any]", value)) + "]"
    # TOML has JSON's strings, but no halves of characters, and DEL only by its number.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _place(transport: Mapping[str, Any]) -> dict[str, Any]:
    parts = urlsplit(str(transport.get("url", "")))
    try:
        port = parts.port
    except ValueError:
        port = None
    if port is None:
        raise ConfigError(f"the image's port is not said in its transport's url, {transport.get('url')!r}")
    return {"port": port, "path": parts.path or "/mcp"}


def _is_input(given: Mapping[str, Any]) -> bool:
    """Say whether it has the shape of an argument or a variable."""
    is_named = given.get("type") == "positional" or isinstance(given.get("name"), str)
    variables: Any = given.get("variables") or {}
    if not is_named or not isinstance(variables, dict):
        return False
    return all(isinstance(it, dict) for it in cast("dict[str, Any]", variables).values())


def _asks(argument: Mapping[str, Any]) -> bool:
    """Say whether a named argument without a value is one that its user fills in, and no flag."""
    return bool(argument.keys() & {"isRequired", "valueHint", "placeholder", "format", "choices", "isSecret"})


def _missing(argument: Mapping[str, Any]) -> str:
    name = argument.get("valueHint") or argument.get("name")
    about = f" ({argument['description']})" if argument.get("description") else ""
    return f"the argument {name} is not said{about}; say --set {name}=VALUE"


def _objects(given: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(given, list):
        return []
    return [cast("dict[str, Any]", it) for it in cast("list[Any]", given) if isinstance(it, dict)]
