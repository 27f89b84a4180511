"""The configuration, and tables of valid combinations. Without torch."""

CONFIG_FILE = "setup_config.json"  # its usual name; here, since commands read it at their start
