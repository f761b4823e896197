"""The spawn policy: whether a spawn may have what it asks for, by the settings and the catalogue. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from pydantic import ValidationError

from ash_hub.backends.network import is_narrower
from ash_hub.settings import HubSettings, SpawnLimits
from ash_hub.spawning.recipes import Amounts, Catalog, Network, Recipe
from ash_hub.spawning.spawn_request import ImageAsk, SpawnAsk
from ash_hub.spawning.specs import addresses_named
from ash_mcp.errors import ConfigError, PermissionDenied
from ash_mcp.quantities import cpu_quantity, memory_quantity
from ash_mcp.types import Principal, valid_session_name
from ash_mcp.wire import network_text
from ash_router.bounds.effective_limits import EffectiveLimit, optional_limit

__all__ = ["Allowed", "SpawnPolicy", "check_limits", "limits_of_key", "narrowed"]

_USUAL_PORTS = {"80", "443"}
"""What an entry without a port means."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a spawn gets of what it asks for."""

    recipe: Recipe
    network_note: str = ""
    """Which network it gets and why, where that is less than its recipe asks for; empty otherwise. Its answer and its
    tools say so."""
    waiting: EffectiveLimit | None = None
    """How many of its owner's spawns may wait for a start; None leaves that to the bound of all."""


class SpawnPolicy:
    """Judges spawns by the settings and the catalogue."""

    def __init__(self, settings: HubSettings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog

    def judge(self, ask: SpawnAsk, principal: Principal) -> Allowed:
        """Return what a spawn gets, once all that it asks for is allowed, by the hive and by its caller's key.

        A recipe of the hive that reaches further than they allow is narrowed to that.

        Raises:
            RecipeNotFound, ConfigError, PermissionDenied: It is not; the message says what is.
        """
        if ask.session is not None and not valid_session_name(ask.session):
            raise ConfigError(
                f"{ask.session!r} cannot be a session name: a lower-case letter, then lower-case letters and digits, "
                "at most 16, and none of the hive's own tool names"
            )
        self._check_addresses(ask.network)
        check_limits(self._settings.spawn, ask)
        of_key = limits_of_key(principal.spawn_policy)
        check_limits(of_key, ask, by_key=True)
        waiting = optional_limit(self._settings.limits.waiting_per_owner, principal.limits.waiting)
        return replace(self._allowed(ask, of_key), waiting=waiting)

    def _allowed(self, ask: SpawnAsk, of_key: SpawnLimits) -> Allowed:
        if isinstance(ask, ImageAsk):
            assert isinstance(ask.recipe, Recipe)
            return self._narrowed(ask.recipe, of_key, is_asked=False)
        if isinstance(ask.recipe, str):
            return self._narrowed(self._catalog.get(ask.recipe), of_key, is_asked=ask.network is not None)
        if not self._settings.allow_inline_recipes:
            raise ConfigError(
                f"this hive takes recipes by name only; there are: {', '.join(self._catalog.names())}. "
                "Its operator can allow inline ones with ASH_HUB_ALLOW_INLINE_RECIPES=true"
            )
        self._check_addresses(ask.recipe.network)  # a caller's word as well
        return Allowed(ask.recipe.model_copy(update={"folder": None}))

    def _narrowed(self, recipe: Recipe, of_key: SpawnLimits, *, is_asked: bool) -> Allowed:
        network, reasons = recipe.network, list[str]()
        for whose, limits in (("this hive", self._settings.spawn), ("your key", of_key)):
            left = narrowed(network, limits.network)
            if left != network:
                reasons.append(f"{whose} allows {network_text(limits.network)}")
            network = left
        if not reasons:
            return Allowed(recipe)
        asked = f"(its recipe asks for {network_text(recipe.network)})"
        note = f"network: {network_text(network)}, because {' and '.join(reasons)} {asked}"
        return Allowed(recipe.model_copy(update={"network": network}), "" if is_asked else note)

    def check_network_change(
        self, before: str | tuple[str, ...], after: Network, recipe: str, principal: Principal
    ) -> None:
        """Refuse a change of a living sandbox's network that its caller may not make.

        Who may call a sandbox may narrow what it reaches. Its owner may widen it, as far as the hive and the key
        allow; the addresses that the recipe of that name lists may be named again.

        Raises:
            PermissionDenied: The message says what is allowed.
            ConfigError: The new policy cannot be read.
        """
        if is_narrower(after, before):
            return
        if principal.sandbox is not None:
            raise PermissionDenied(
                f"your key is for one sandbox only, and may narrow its network ({network_text(before)} now) but not "
                "widen it; its owner may"
            )
        of_recipe = next((known.network for known in self._catalog if known.name == recipe), "none")
        self._check_addresses(after, but=of_recipe if isinstance(of_recipe, tuple) else ())
        for limits, by_key in ((self._settings.spawn, False), (limits_of_key(principal.spawn_policy), True)):
            if narrowed(after, limits.network) != after:
                refused = _Refused(f"network {network_text(after)}", network_text(limits.network), "NETWORK")
                raise refused.denied(by_key=by_key)

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

    def _check_addresses(self, network: Network | None, *, but: Sequence[str] = ()) -> None:
        named = [entry for entry in addresses_named(network) if entry not in but]
        if named and not self._settings.allow_named_addresses:
            raise PermissionDenied(
                f"a spawn may name domains, not addresses such as {named[0]}; an address is the operator's to allow, "
                "in a recipe of the hive or for every spawn with ASH_HUB_ALLOW_NAMED_ADDRESSES=true"
            )


@lru_cache(maxsize=1000)
def limits_of_key(policy: str) -> SpawnLimits:
    """Read what a key lets its bearer ask for.

    Raises:
        PermissionDenied: It cannot be read, so that nobody knows what is allowed.
    """
    if not policy:
        return SpawnLimits()
    try:
        return SpawnLimits.model_validate_json(policy)
    except ValidationError as exc:
        raise PermissionDenied(
            "this hive cannot read what your key lets a spawn ask for; ask for a new key (ash key new)"
        ) from exc


def check_limits(limits: SpawnLimits, ask: SpawnAsk, *, by_key: bool = False) -> None:
    """Refuse a spawn that asks for more than it may.

    Args:
        by_key: Whether these are its caller's key's limits, and not the hive's.

    Raises:
        PermissionDenied: What is too much, what is allowed, and the setting.
    """
    try:
        _check_asked(limits, ask)
    except _Refused as refused:
        raise refused.denied(by_key=by_key) from None


def _check_asked(limits: SpawnLimits, ask: SpawnAsk) -> None:
    inline = None if isinstance(ask.recipe, str) or isinstance(ask, ImageAsk) else ask.recipe
    for asked in (ask, inline) if inline is not None else (ask,):
        _check_pattern("image", asked.image, limits.images, "IMAGES")
        _check_pattern("runtime class", asked.runtime_class, limits.runtime_classes, "RUNTIME_CLASSES")
        _check_nodes(asked.node_selector, limits.node_selectors)
        _check_amounts(asked.resources.requests, limits)
        _check_amounts(asked.resources.limits, limits)
        if asked.network is not None and narrowed(asked.network, limits.network) != asked.network:
            raise _Refused(f"network {network_text(asked.network)}", network_text(limits.network), "NETWORK")


def narrowed(network: Network, most: Network) -> Network:
    """Return the part of a network policy that does not go beyond another.

    Any list counts as within `internet`: whether it may name addresses is another setting's.
    """
    if not network or network == "none" or most == "internet":
        return network
    if most == "none":
        return "none"
    if network == "internet":
        public = [entry for entry in most if not addresses_named((entry,))]
        return tuple(left for entry in public for left in _cut(entry, _USUAL_PORTS)) or "none"
    return tuple(dict.fromkeys(left for entry in network for left in _within(entry, most))) or "none"


def _within(entry: str, most: Sequence[str]) -> list[str]:
    """Return the part of one entry of a list that a list allows."""
    if "=" in entry or entry.startswith("["):
        return [entry] if entry.lower() in {allowed.lower() for allowed in most} else []
    host, ports = _host_and_ports(entry)
    bounds = [_host_and_ports(allowed) for allowed in most]
    open_ports = {port for name, its_ports in bounds if _covers(name, host) for port in its_ports}
    if ports <= open_ports:
        return [entry]
    below = [(name, ports & its_ports) for name, its_ports in bounds if _covers(host, name)]
    return [left for name, its_ports in ((host, ports & open_ports), *below) for left in _spelled(name, its_ports)]


def _cut(entry: str, allowed: set[str]) -> list[str]:
    """Return an entry with those of its ports that are allowed."""
    host, ports = _host_and_ports(entry)
    return [entry] if ports <= allowed else _spelled(host, ports & allowed)


def _covers(name: str, host: str) -> bool:
    return name == host or (name.startswith("*.") and host.endswith(name[1:]))


def _spelled(host: str, ports: set[str]) -> list[str]:
    return [host] if ports == _USUAL_PORTS else [f"{host}:{port}" for port in sorted(ports)]


def _host_and_ports(entry: str) -> tuple[str, set[str]]:
    host, _, port = entry.lower().partition(":")
    return host, {port} if port else _USUAL_PORTS


def _check_nodes(asked: Mapping[str, str], allowed: Mapping[str, tuple[str, ...]] | None) -> None:
    if allowed is None:
        return
    for label, value in asked.items():
        if label not in allowed:
            raise _Refused(f"node_selector {label}", ", ".join(allowed) or "none", "NODE_SELECTORS")
        _check_pattern(f"node_selector {label} =", value, allowed[label], "NODE_SELECTORS")


def _check_pattern(what: str, asked: str | None, allowed: tuple[str, ...] | None, setting: str) -> None:
    if asked is not None and allowed is not None and not any(fnmatchcase(asked, pattern) for pattern in allowed):
        raise _Refused(f"{what} {asked}", ", ".join(allowed) or "none", setting)


def _check_amounts(asked: Amounts, limits: SpawnLimits) -> None:
    if asked.cpu is not None and limits.cpu is not None and cpu_quantity(asked.cpu) > cpu_quantity(limits.cpu):
        raise _Refused(f"cpu {asked.cpu}", f"at most {limits.cpu}", "CPU")
    too_much = asked.memory is not None and limits.memory is not None
    if too_much and memory_quantity(str(asked.memory)) > memory_quantity(str(limits.memory)):
        raise _Refused(f"memory {asked.memory}", f"at most {limits.memory}", "MEMORY")


class _Refused(Exception):
    """Something that a spawn may not ask for: what, what is allowed, and which setting says so."""

    def __init__(self, asked: str, allowed: str, setting: str) -> None:
        self._asked, self._allowed, self._setting = asked, allowed, setting

    def denied(self, *, by_key: bool) -> PermissionDenied:
        if by_key:
            more = f"Use a key that allows more (ash key new --{_OPTIONS[self._setting]})"
        else:
            more = f"Its operator can allow more with ASH_HUB_SPAWN__{self._setting}"
        where = "with your key" if by_key else "here"
        return PermissionDenied(f"a spawn may not ask for {self._asked} {where}; allowed: {self._allowed}. {more}")


_OPTIONS = {
    "IMAGES": "image",
    "RUNTIME_CLASSES": "runtime-class",
    "NODE_SELECTORS": "node-selector",
    "CPU": "cpu",
    "MEMORY": "memory",
    "NETWORK": "network",
}
"""Of `ash key new`, by setting."""
