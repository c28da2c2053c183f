"""The loop, where core, engine, agreement and fleet meet; and what a serving loop asks beside it."""
