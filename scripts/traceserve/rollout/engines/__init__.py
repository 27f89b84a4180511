"""How each engine puts a version beside the running one, and in its place; each is a module."""

from __future__ import annotations

from typing import Dict

from traceserve.rollout.engines import on_ray, on_torchserve
from traceserve.rollout.engines.contract import RolloutEngine
from traceserve.serving.engines import RAY, TORCHSERVE

ROLLOUT_ENGINES: Dict[str, RolloutEngine] = {TORCHSERVE: on_torchserve, RAY: on_ray}
