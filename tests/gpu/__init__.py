"""A GPU's answers and speed: one command for a machine with one, needing only torch and transformers."""
