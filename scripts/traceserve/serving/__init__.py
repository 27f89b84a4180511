"""TorchServe as a process: configuration, start, running instances and HTTP API."""
