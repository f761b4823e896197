"""Amounts of cpu and memory, read as Kubernetes does."""

from __future__ import annotations

import pytest

from ash_mcp.errors import ConfigError
from ash_mcp.quantities import cpu_quantity, memory_quantity

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256Mi", 256 * MIB),
        ("1G", 10**9),
        ("1Gi", 2**30),
        ("1.5Gi", 3 * 2**29),
        ("64k", 64_000),
        ("64Ki", 65_536),
        ("1048576", MIB),
        ("2000m", 2),
    ],
)
def test_amounts_of_memory_are_read_as_kubernetes_does(text: str, expected: int) -> None:
    assert memory_quantity(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("500m", 0.5), ("2", 2.0), ("0.25", 0.25)])
def test_amounts_of_cpu_are_read_as_kubernetes_does(text: str, expected: float) -> None:
    assert cpu_quantity(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1GB", "1 Gi", "inf", "nan", "1e3", "0x10", "Mi", "1ki i"])
def test_an_amount_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an amount of memory"):
        memory_quantity(text)
    if text != "1e3":
        with pytest.raises(ConfigError, match="not an amount of cpu"):
            cpu_quantity(text)
