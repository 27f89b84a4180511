"""What is traced: a model as one module with tensors in and out."""
