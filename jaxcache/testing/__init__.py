"""Fakes for testing a serving loop without devices: a data plane that checks the content of every page it reads."""
