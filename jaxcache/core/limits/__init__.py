"""What one tenant or one request may have of the cache; skipped by a first reader."""
