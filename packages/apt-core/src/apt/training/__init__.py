"""Training: the loop, the step, the optimizer, and what shows and records them."""
