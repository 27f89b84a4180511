"""The names of what serves archives; `server.ENGINES` has how each is started."""

TORCHSERVE = "torchserve"
RAY = "ray"
NAMES = (TORCHSERVE, RAY)
