"""Which program moves pages: the Pallas kernel or XLA's own.

"auto" takes the kernel where it measured at least 10 % faster on an H100 at parts of 64 KiB and more, see
benchmarks/results:  gather_layers 3.0 x, scatter_layers 1.3 x;  gather_pages and scatter_pages 0.9 to 1.1 x.
"""

from __future__ import annotations

FORMS = ("auto", "pallas", "xla")
FASTER = frozenset({"gather_layers", "scatter_layers"})


def is_pallas(operation: str, form: str, platform: str) -> bool:
    """Whether the kernel is to run. ValueError for an unknown form, and for "pallas" where there is no GPU."""
    if form not in FORMS:
        raise ValueError(f"page_kernels must be one of {FORMS}, not {form!r}")
    if form == "pallas" and platform != "gpu":
        raise ValueError(f"page_kernels='pallas' needs GPUs, but the devices are {platform}")
    return platform == "gpu" and (form == "pallas" or (form == "auto" and operation in FASTER))
