"""TorchServe as a process: its configuration, its start, its running instances and its HTTP API."""
