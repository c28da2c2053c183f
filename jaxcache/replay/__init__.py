"""Traces of requests through the real core, without a model: what the cache would find, and what any could."""
