"""What runs beside a server, in its container; the standard library alone, so that it starts at once."""
