"""Runs as files that other programs read, and models of others as runs."""
