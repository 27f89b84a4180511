"""The names of the engines that serve archives; `server.ENGINES` starts them."""

TORCHSERVE = "torchserve"
RAY = "ray"
NAMES = (TORCHSERVE, RAY)
