"""The rules of a house: what this hive's operator lets a spawn ask for. No I/O."""

from __future__ import annotations

from ash_hub.asks import SpawnAsk
from ash_hub.recipes import Catalog, Recipe
from ash_hub.settings import HubSettings
from ash_hub.specs import addresses_named
from ash_mcp.errors import ConfigError, PermissionDenied
from ash_mcp.types import valid_session_name

__all__ = ["Rules"]


class Rules:
    """Judges spawns by the settings and the catalogue."""

    def __init__(self, settings: HubSettings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog

    def recipe(self, ask: SpawnAsk) -> Recipe:
        """Return the recipe that a spawn asks for, once all that it asks for is allowed.

        Raises:
            RecipeNotFound, ConfigError, PermissionDenied: It is not; the message says what is.
        """
        if ask.session is not None and not valid_session_name(ask.session):
            raise ConfigError(
                f"{ask.session!r} cannot be a session name: a lower-case letter, then lower-case letters and digits, "
                "at most 16, and none of the hive's own tool names"
            )
        self._check_network(ask.network)
        if isinstance(ask.recipe, str):
            return self._catalog.get(ask.recipe)
        if not self._settings.allow_inline_recipes:
            raise ConfigError(
                f"this hive takes recipes by name only; there are: {', '.join(self._catalog.names())}. "
                "Its operator can allow inline ones with ASH_HUB_ALLOW_INLINE_RECIPES=true"
            )
        self._check_network(ask.recipe.network)  # a caller's word as well
        return ask.recipe.model_copy(update={"folder": None})

    def lifetimes(self, ask: SpawnAsk, recipe: Recipe) -> tuple[float, float | None]:
        """Return the TTL and the idle time of a sandbox to be, in seconds: the caller's, the recipe's, the hive's.

        Raises:
            ConfigError: The TTL is longer than this hive allows.
        """
        ttl = ask.ttl_seconds or recipe.ttl_seconds or self._settings.ttl_seconds
        self.check_ttl(ttl)
        return ttl, ask.idle_seconds or recipe.idle_seconds or self._settings.idle_seconds

    def check_ttl(self, ttl_seconds: float) -> None:
        most = self._settings.max_ttl_seconds
        if ttl_seconds > most:
            raise ConfigError(f"ttl_seconds is at most {most:g} on this hive, not {ttl_seconds:g}")

    def _check_network(self, network: str | tuple[str, ...] | None) -> None:
        named = addresses_named(network)
        if named and not self._settings.allow_named_addresses:
            raise PermissionDenied(
                f"a spawn may name domains, not addresses such as {named[0]}; an address is the operator's to allow, "
                "in a recipe of the hive or for every spawn with ASH_HUB_ALLOW_NAMED_ADDRESSES=true"
            )
