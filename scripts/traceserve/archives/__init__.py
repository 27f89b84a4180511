"""The archives: how a `.mar` is packed, read and served."""
