"""Page transfers as Pallas kernels for GPUs: whole pages, of stacked pools and of lists of layers."""
