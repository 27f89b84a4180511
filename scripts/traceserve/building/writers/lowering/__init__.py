"""Lower precisions of a model, made before it is written."""
