"""The names of the engines that serve archives; `server.SERVING_ENGINES` starts them."""

TORCHSERVE = "torchserve"
RAY = "ray"
NAMES = (TORCHSERVE, RAY)
