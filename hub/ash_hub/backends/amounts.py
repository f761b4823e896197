"""Memory and processors of one sandbox as numbers, from what its spec says of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ash_mcp.errors import ConfigError
from ash_mcp.quantities import cpu_quantity, memory_quantity
from ash_mcp.types import ResourceAmounts

__all__ = ["LEAST_MEMORY", "Amounts", "amounts_of"]

_MIB = 1024 * 1024
LEAST_MEMORY = 96 * _MIB
"""What `general`, whose runner and server take 75 MiB, starts with and can run a small command in."""
_LEAST_CPU = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What one sandbox may use."""

    memory_bytes: int
    cpu: float | None
    """Processors' worth of time; None is as much as there is."""


def amounts_of(limits: ResourceAmounts, *, memory_bytes: int, cpu: float | None) -> Amounts:
    """Return the amounts of `limits`, with `memory_bytes` and `cpu` for what it does not name.

    Raises:
        ConfigError: A quantity cannot be read or is too small to start with.
    """
    memory = memory_bytes if limits.memory is None else memory_quantity(limits.memory)
    processors = cpu if limits.cpu is None else cpu_quantity(limits.cpu)
    if memory < LEAST_MEMORY:
        raise ConfigError(
            f"a memory limit of {limits.memory} is too small, since the sandbox's own server takes most of that: "
            f"give at least {LEAST_MEMORY // _MIB}Mi"
        )
    if processors is not None and processors < _LEAST_CPU:
        raise ConfigError(f"a cpu limit of {limits.cpu} is too small: give at least 10m")
    return Amounts(memory_bytes=memory, cpu=processors)
