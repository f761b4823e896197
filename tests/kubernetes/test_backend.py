"""The Kubernetes backend holds to the contract of every backend, with real pods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import pytest

from ash_hub.testing.conformance import BEHAVIOURS, Make, nothing_escapes
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import under_test

BY_PROXY: Final[Mapping[str, Any]] = {
    "egress_proxy": "127.0.0.1:3128",  # nobody goes out
    "egress_listen": "127.0.0.1:0",
    "internet_by_proxy": True,
}
"""So that networks can be changed."""

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.mark.parametrize(
    "behaviour",
    [behaviour for behaviour in BEHAVIOURS if behaviour is not nothing_escapes],
    ids=lambda behaviour: behaviour.__name__,
)
async def test_the_backend_holds_to_its_contract(
    behaviour: Callable[[Make], Awaitable[None]], cluster: Cluster
) -> None:
    more = BY_PROXY if behaviour.__name__.startswith("a_network") else {}
    await behaviour(lambda: under_test(cluster, **more))
