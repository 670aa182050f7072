"""Models, as 1.x had them."""
