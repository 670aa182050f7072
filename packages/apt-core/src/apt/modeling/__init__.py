"""Models: layers, the backbone that stacks them, and the builder that reads a profile."""
