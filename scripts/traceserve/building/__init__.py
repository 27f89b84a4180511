"""From setup_config.json to a verified artifact."""
