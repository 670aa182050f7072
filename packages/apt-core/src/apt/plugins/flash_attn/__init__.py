"""Attention by flash-attn, as of the draft."""
