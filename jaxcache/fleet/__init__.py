"""Processes that end, or differ: how the others hear of it."""
