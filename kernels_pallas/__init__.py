"""Page transfers as Pallas kernels for GPUs. None yet: `jaxcache.pools.device_pool` uses XLA's."""
