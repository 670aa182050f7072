"""Training and saving, as 1.x had them."""
