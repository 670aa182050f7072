"""Checkpoints: complete or absent, verified, portable, and free of pickles."""
