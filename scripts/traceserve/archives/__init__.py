"""Archives: packing, reading and serving configuration of a `.mar`."""
