"""Decides which rows run together, and at what cost."""
