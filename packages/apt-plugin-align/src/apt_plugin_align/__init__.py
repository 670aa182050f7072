"""Alignment for APT: losses that compare two states of one model, beside the cross-entropy."""
