"""How layers are put together into a model."""
