"""Writes texts token by token."""
