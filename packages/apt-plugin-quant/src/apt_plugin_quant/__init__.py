"""Quantisation for APT: models whose weights are stored or computed in fewer bits."""
