"""Writing text, as 1.x did."""
