"""The shape of a mesh as people write it: cp,tp,pp."""

from __future__ import annotations


def mesh_shape(text: str) -> tuple[int, int, int]:
    """ "2,2,1" as numbers; ValueError for anything else."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) for n in numbers):
        raise ValueError(f"must be three positive numbers cp,tp,pp, not {text!r}")
    cp, tp, pp = map(int, numbers)
    return cp, tp, pp
