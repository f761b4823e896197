"""Recipes: what a sandbox is made from, as data, and the catalogue of those that this hive knows.

They come by entry point `ash.recipes` (an object that is a mapping, or a function that returns one), from
directories in the settings (`<name>/recipe.toml`, or `recipe.toml` itself), and inline in a spawn where the hive
allows it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ash_hub.settings import NetworkEntry
from ash_mcp.errors import ConfigError, RecipeNotFound

__all__ = ["Amounts", "Catalog", "Recipe", "ResourceLimits", "explain_invalid"]

CPU = r"^[0-9]+(\.[0-9]{1,3})?$|^[0-9]+m$"
MEMORY = r"^[0-9]+(\.[0-9]+)?([KMGT]i?)?$"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Amounts(_Data):
    """Amounts as Kubernetes writes them."""

    cpu: Annotated[str, Field(pattern=CPU, description="processors: `500m` or `2`")] | None = None
    memory: Annotated[str, Field(pattern=MEMORY, description="bytes: `256Mi` or `1G`")] | None = None


class ResourceLimits(_Data):
    requests: Amounts = Amounts()
    limits: Amounts = Amounts()


class HttpServer(_Data):
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)]
    path: Annotated[str, Field(pattern="^/")] = "/mcp"


class StdioServer(_Data):
    command: Annotated[tuple[str, ...], Field(min_length=1)]


class ImageServer(_Data):
    """The image serves MCP by itself, by streamable HTTP and without a runner."""

    port: Annotated[int, Field(ge=1, le=65535)]
    path: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$", max_length=256)] = "/mcp"
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """In place of the image's own entrypoint."""
    args: tuple[str, ...] | None = None
    """In place of the image's own arguments."""


class Server(_Data):
    """How the recipe's MCP server starts: exactly one of the four."""

    python: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """`module:object`, a FastMCP server or a function that returns one."""
    http: HttpServer | None = None
    stdio: StdioServer | None = None
    image: ImageServer | None = None

    @model_validator(mode="after")
    def _one(self) -> Server:
        if sum(way is not None for way in (self.python, self.http, self.stdio, self.image)) != 1:
            raise ValueError("say exactly one of python, http, stdio and image")
        return self


Network = Literal["none", "internet"] | tuple[NetworkEntry, ...]


class Recipe(_Data):
    """One recipe; the schema is the same for every backend."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,39}$")]
    title: str | None = None
    description: Annotated[str, Field(min_length=1, max_length=2000)]
    """What a model reads when it chooses a recipe."""
    server: Server
    image: str | None = None
    """On one machine an image that it keeps (`ash image`); on clusters one that its nodes fetch."""
    runtime_class: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """For clusters."""
    node_selector: Mapping[str, str] = {}
    """For clusters: labels of the nodes it may run on."""
    env: Mapping[str, str] = {}
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    resources: ResourceLimits = ResourceLimits()
    network: Network = "none"
    result_bytes: Annotated[int, Field(ge=0)] | None = None
    """How long a result of a tool may be before its parts are kept as files; 0: of any length; None: as the hive's."""
    ttl_seconds: Annotated[float, Field(gt=0)] | None = None
    """None: the hive's default."""
    idle_seconds: Annotated[float, Field(gt=0)] | None = None
    start_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60
    tools: Mapping[str, Mapping[str, Any]] = {}
    """Annotations by tool name, in place of what the server says of its own tools."""
    folder: str | None = None
    """The directory it came from, if there is more in that than the recipe; mounted read-only at `/opt/recipe` in a
    local sandbox. Never set by a caller."""


class Catalog:
    """The recipes of one hive, by name."""

    def __init__(self, recipes: Iterable[Recipe] = ()) -> None:
        self._recipes = {recipe.name: recipe for recipe in recipes}

    @classmethod
    def load(cls, directories: Iterable[Path] = ()) -> Catalog:
        """Read every recipe of the entry points and the directories; the latter win.

        Raises:
            ConfigError: One of them is wrong; the message says which and what is accepted.
        """
        found: dict[str, Recipe] = {}
        for point in entry_points(group="ash.recipes"):
            data = point.load()
            recipe = _parse(data() if callable(data) else data, f"entry point {point.name}")
            found[recipe.name] = recipe
        for directory in directories:
            for file in _recipe_files(directory):
                recipe = _from_file(file)
                found[recipe.name] = recipe
        return cls(found.values())

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self._recipes.values())

    def names(self) -> list[str]:
        return sorted(self._recipes)

    def get(self, name: str) -> Recipe:
        """Return a recipe.

        Raises:
            RecipeNotFound: There is none of that name; the message lists those that there are.
        """
        recipe = self._recipes.get(name)
        if recipe is None:
            raise RecipeNotFound(f"there is no recipe {name!r}; there are: {', '.join(self.names())}", recipe=name)
        return recipe


def _recipe_files(directory: Path) -> list[Path]:
    own = directory / "recipe.toml"
    files = [own] if own.is_file() else sorted(directory.glob("*/recipe.toml"))
    if not files:
        raise ConfigError(f"{directory} holds no recipe.toml, neither itself nor one folder down")
    return files


def _from_file(file: Path) -> Recipe:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{file} is not readable as TOML: {exc}") from exc
    folder = file.parent.resolve()
    has_more = any(entry.name != file.name for entry in folder.iterdir())
    return _parse(data, str(file)).model_copy(update={"folder": str(folder) if has_more else None})


def _parse(data: object, source: str) -> Recipe:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: a recipe is a mapping, not {type(data).__name__}")
    fields = dict(cast("Mapping[str, Any]", data))
    fields.pop("folder", None)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as exc:
        raise ConfigError(f"{source}: {explain_invalid(exc)}") from exc


def explain_invalid(error: ValidationError) -> str:
    """Return what pydantic found as one line that names each field and what it should be."""
    found: list[str] = []
    for problem in error.errors(include_url=False, include_input=True)[:5]:
        where = ".".join(str(part) for part in problem["loc"]) or "the whole"
        hidden = problem["type"] == "missing" or "secrets" in problem["loc"]
        given = "" if hidden else f" (given: {_brief(problem['input'])})"
        found.append(f"{where}: {problem['msg']}{given}")
    return "; ".join(found)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
