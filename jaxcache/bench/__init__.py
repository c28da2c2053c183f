"""Benchmarks: a figure stands beside a floor that was measured in the same run, because times alone do not compare."""
