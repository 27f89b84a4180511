"""The writer for AWS Neuron's chips."""
