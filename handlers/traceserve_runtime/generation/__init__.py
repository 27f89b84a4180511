"""Texts that are written token by token."""
