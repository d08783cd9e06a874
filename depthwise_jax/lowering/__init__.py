"""The lowerings (ways to compute the three maps), the table that chooses one for a call, and the call to it."""

from depthwise_jax.lowering.call import DIRECTIONS, MAPS, PLATFORMS, Call
from depthwise_jax.lowering.choice import (
    LOWERINGS,
    TABLE,
    Choice,
    Implementation,
    Lowering,
    Rule,
    check_implementation,
    choose,
)
from depthwise_jax.lowering.run import run, run_fused

__all__ = [
    "DIRECTIONS",
    "LOWERINGS",
    "MAPS",
    "PLATFORMS",
    "TABLE",
    "Call",
    "Choice",
    "Implementation",
    "Lowering",
    "Rule",
    "check_implementation",
    "choose",
    "run",
    "run_fused",
]
