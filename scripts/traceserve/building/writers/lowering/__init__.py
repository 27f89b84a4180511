"""Lower precisions of a model, made before writing it."""
