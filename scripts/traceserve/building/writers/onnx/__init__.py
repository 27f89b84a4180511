"""The writer of the save mode onnx."""
