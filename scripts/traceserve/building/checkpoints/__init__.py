"""Checkpoints: the supported files and keys, the task, and the parts loaded with the model."""
