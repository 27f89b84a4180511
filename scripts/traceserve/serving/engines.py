"""The names of the engines that serve archives, and their port; `server.SERVING_ENGINES` starts them."""

TORCHSERVE = "torchserve"
RAY = "ray"
NAMES = (TORCHSERVE, RAY)
DEFAULT_PORT = 8080
