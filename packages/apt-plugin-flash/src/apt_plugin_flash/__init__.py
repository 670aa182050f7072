"""Attention kernels for APT: attention providers that run on fused GPU kernels."""
