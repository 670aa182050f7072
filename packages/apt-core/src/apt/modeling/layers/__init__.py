"""Layers that providers build, and the pieces they share: masks, rotary positions, norms, caches."""
