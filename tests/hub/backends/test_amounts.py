"""Memory and processors of a sandbox, as every backend reads them."""

from __future__ import annotations

import pytest

from ash_hub.backends.amounts import LEAST_MEMORY, Amounts, amounts_of
from ash_mcp.errors import ConfigError
from ash_mcp.types import ResourceAmounts

MIB = 1024 * 1024


def amounts(**given: str) -> Amounts:
    return amounts_of(ResourceAmounts(**given), memory_bytes=512 * MIB, cpu=2.0)


def test_what_is_not_named_is_the_backend_s_own() -> None:
    assert amounts() == Amounts(memory_bytes=512 * MIB, cpu=2.0)
    assert amounts(memory="1Gi", cpu="250m") == Amounts(memory_bytes=1024 * MIB, cpu=0.25)
    assert amounts_of(ResourceAmounts(), memory_bytes=512 * MIB, cpu=None).cpu is None


def test_too_little_to_start_with_is_refused_and_says_how_much_is_enough() -> None:
    assert amounts(memory=str(LEAST_MEMORY)).memory_bytes == LEAST_MEMORY
    for given, said in (({"memory": "95Mi"}, "at least 96Mi"), ({"cpu": "9m"}, "at least 10m")):
        with pytest.raises(ConfigError, match=said):
            amounts(**given)
