"""Mixture of experts for APT: routers that turn dense feed-forward layers into experts."""
