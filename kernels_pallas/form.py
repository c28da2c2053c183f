"""Which program moves pages: the Pallas kernel or XLA's own.

"auto" takes the kernel where it measured at least 10 % faster, on an H100 and an H200 (benchmarks/results,
docs/LOG.md): gather_layers, 1.0 to 1.5 x at 32 pages of 64 parts of 32 KiB and 3.1 to 4.0 x at 256; not scatter_layers,
0.7 to 1.7 x and 1.2 to 1.3 x, but 1.03 x with the copy that comes before it, nor gather_pages and scatter_pages, 0.9 to
1.1 x.
"""

from __future__ import annotations

FORMS = ("auto", "pallas", "xla")
FASTER = frozenset({"gather_layers"})


def is_pallas(operation: str, form: str, platform: str) -> bool:
    """Whether the kernel is to run. ValueError for an unknown form, and for "pallas" where there is no GPU."""
    if form not in FORMS:
        raise ValueError(f"page_kernels must be one of {FORMS}, not {form!r}")
    if form == "pallas" and platform != "gpu":
        raise ValueError(f"page_kernels='pallas' needs GPUs, but the devices are {platform}")
    return platform == "gpu" and (form == "pallas" or (form == "auto" and operation in FASTER))
