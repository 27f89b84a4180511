"""Builds a verified artifact from setup_config.json."""
