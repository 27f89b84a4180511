"""The writer of the save mode openvino."""
