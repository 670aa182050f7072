"""Configuration, as 1.x had it."""
