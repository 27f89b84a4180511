"""The writer of the save mode torchscript."""
