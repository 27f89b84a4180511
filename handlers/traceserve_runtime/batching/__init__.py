"""Which rows run together, and what that costs."""
