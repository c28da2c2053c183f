"""Where pages lie: layouts, device pools and host pools."""
