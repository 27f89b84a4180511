"""The gate: compares an artifact with the original model."""
