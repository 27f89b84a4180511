"""What a GPU answers, and how fast: one command for a machine that has one, and nothing but torch and transformers."""
