"""Page transfers as Pallas kernels for GPUs: gather, scatter and copy of whole pages, stacked or one array per layer."""
