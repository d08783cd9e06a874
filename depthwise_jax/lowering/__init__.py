"""The lowerings of the three maps: what each computes, which serves which call, and the call of the chosen one."""

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
