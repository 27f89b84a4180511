"""Checks of archives and servers after the build: inspected, verified against a live server, compared."""
