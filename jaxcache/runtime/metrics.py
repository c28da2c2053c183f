"""A cache's counters for Prometheus: `registry.register(CacheCollector(cache))`. Needs the extra `metrics`.

Reads `cache.stats()` when scraped; the cache itself knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class HasStats(Protocol):
    def stats(self) -> dict: ...


class CacheCollector(Collector):
    """Tokens by tier, pages by state, and events.

    jaxcache_prompt_tokens_total, jaxcache_hit_tokens_total{tier}
    jaxcache_pages{tier,component,state}, jaxcache_events_total{event}
    """

    def __init__(self, cache: HasStats):
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        stats = self._cache.stats()
        yield CounterMetricFamily(
            "jaxcache_prompt_tokens", "prompt tokens of admitted requests", stats["prompt_tokens"]
        )
        hits = CounterMetricFamily("jaxcache_hit_tokens", "prompt tokens not computed again", labels=["tier"])
        for tier, tokens in stats["hit_tokens"].items():
            hits.add_metric([tier], tokens)
        yield hits
        pages = GaugeMetricFamily("jaxcache_pages", "pages by state", labels=["tier", "component", "state"])
        for tier, components in stats["pages"].items():
            for component, counts in components.items():
                for state in ("capacity", "free", "resident", "pinned"):
                    pages.add_metric([tier, component, state], counts[state])
        yield pages
        events = CounterMetricFamily("jaxcache_events", "what the cache counted, by name", labels=["event"])
        for name, count in {**stats["counters"], **stats["transfers"]}.items():
            events.add_metric([name], count)
        yield events
