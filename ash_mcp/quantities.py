"""Parsers of Kubernetes quantities of cpu and memory. Pure."""

from __future__ import annotations

import re

from ash_mcp.errors import ConfigError

__all__ = ["cpu_quantity", "memory_quantity"]

_CPU = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m?)")
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|[kKMGTPE]i?)?")
_LETTERS = "KMGTPE"


def cpu_quantity(text: str) -> float:
    """Return processors for a Kubernetes quantity such as `500m`, `2` or `0.5`.

    Raises:
        ConfigError: It is not one.
    """
    match = _CPU.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of cpu: write 500m, 0.5 or 2")
    return float(match[1]) / (1000 if match[2] else 1)


def memory_quantity(text: str) -> int:
    """Return bytes for a Kubernetes quantity such as `256Mi`, `1G` or `1048576`.

    Raises:
        ConfigError: It is not one.
    """
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of memory: write 256Mi, 1G or a number of bytes")
    suffix = match[2] or ""
    if suffix == "m":
        return int(float(match[1]) / 1000)
    base = 1024 if suffix.endswith("i") else 1000
    power = _LETTERS.index(suffix[0].upper()) + 1 if suffix else 0
    return int(float(match[1]) * base**power)
