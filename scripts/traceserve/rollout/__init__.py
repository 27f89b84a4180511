"""Replaces a served archive by another one, under load."""
