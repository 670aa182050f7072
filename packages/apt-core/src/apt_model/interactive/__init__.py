"""Talking with a model, as 1.x did."""
