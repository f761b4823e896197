"""The metrics at `/metrics`, read from the hive's state when asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from ash_router.ledger import Ledger
from ash_router.routes import Routes

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics(Collector):
    """Collects at scrape time, so that a call pays nothing for it.

    Args:
        sandboxes: State and recipe of each sandbox that the hub knows; None where there is no hub, but only a router.
    """

    def __init__(
        self, ledger: Ledger, routes: Routes, sandboxes: Callable[[], Iterable[tuple[str, str]]] | None = None
    ) -> None:
        self._sandboxes = sandboxes
        self._ledger = ledger
        self._routes = routes
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def collect(self) -> Iterable[Metric]:
        if self._sandboxes is not None:
            states = GaugeMetricFamily("ash_sandboxes", "Sandboxes by state.", labels=["state", "recipe"])
            found = Counter(self._sandboxes())
            for (state, recipe), count in found.items():
                states.add_metric([state, recipe], count)
            yield states
        yield GaugeMetricFamily("ash_calls_in_flight", "Calls to sandboxes in flight.", value=len(self._ledger))
        yield GaugeMetricFamily("ash_routes", "Routes to ready sandboxes.", value=len(self._routes))
        yield CounterMetricFamily("ash_calls", "Calls to sandboxes since the start.", value=self._ledger.total)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
