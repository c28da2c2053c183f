"""Page transfers as Pallas kernels for GPUs, each with a reference. None yet: `jaxcache.pools.device_pool` uses XLA's."""
