"""Measurements of a running server, and the search for the best serving configuration."""
