"""The counters as Prometheus sees them."""

from prometheus_client import CollectorRegistry, generate_latest

import jaxcache
from jaxcache.runtime.metrics import CacheCollector


def test_hits_by_tier_are_scraped_from_zero(make_mesh):
    spec = jaxcache.FieldSpec("kv", (1, 2, 4, 1, 4), "float32", ("layers", None, "slots", "heads", None))
    config = jaxcache.CacheConfig(page_tokens=4, device_pages=8)
    registry = CollectorRegistry()
    with jaxcache.Cache([jaxcache.FullAttention("full", (spec,))], make_mesh(1, 1, 1), config) as cache:
        registry.register(CacheCollector(cache))
        assert b'jaxcache_hit_tokens_total{tier="host"} 0.0' in generate_latest(registry)
        pools = cache.init_pools()
        namespace = cache.new_namespace(model="m")
        for _ in range(2):
            lease = cache.admit(cache.sequence(list(range(9)), namespace), 9)
            pools = cache.apply(pools)
            cache.insert(lease, 9)
            cache.release(lease)
        text = generate_latest(registry)
    assert b'jaxcache_hit_tokens_total{tier="device"} 8.0' in text
    assert b'jaxcache_pages{component="full",state="resident",tier="device"} 2.0' in text
    assert b"jaxcache_prompt_tokens_total 18.0" in text
