"""From what a client sent to requests, and from answers to what it gets."""
