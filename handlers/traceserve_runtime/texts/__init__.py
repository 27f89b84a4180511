"""Turns texts into rows of tokens, within limits."""
