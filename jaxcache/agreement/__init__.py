"""What ranks tell each other: once per step, and once at start."""
