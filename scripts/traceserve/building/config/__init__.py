"""The configuration, and tables of valid combinations. Without torch."""
