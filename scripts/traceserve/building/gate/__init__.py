"""The gate: an artifact is compared with the original model."""
