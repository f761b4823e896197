"""The Kubernetes backend holds to the contract of every backend, with real pods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from ash_hub.testing.conformance import BEHAVIOURS, Make, nothing_escapes
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import under_test

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.mark.parametrize(
    "behaviour",
    [behaviour for behaviour in BEHAVIOURS if behaviour is not nothing_escapes],
    ids=lambda behaviour: behaviour.__name__,
)
async def test_the_backend_holds_to_its_contract(
    behaviour: Callable[[Make], Awaitable[None]], cluster: Cluster
) -> None:
    await behaviour(lambda: under_test(cluster))
