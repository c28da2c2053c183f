"""Transfers: which job waits for which page, what storage delivers, and the copies between device and host."""
