"""Retrieval for APT: indexes of passages, and generation that reads from them."""
