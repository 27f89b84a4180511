"""Tracing: a model as one module with tensors in and out."""
