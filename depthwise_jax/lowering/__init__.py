"""Which lowering serves which call, as one table, and the call of the chosen one.

Each lowering is a module with the same three functions, forward(x, kernel), input_grad(g, kernel) and kernel_grad(x,
g), which take the static Convolution and over how many mesh axes the compiler partitions the program, and compute in
their operands' common dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from depthwise_jax.convolution import Convolution
from depthwise_jax.lowering import conv, taps

LOWERINGS = {"conv": conv, "taps": taps}
MAPS = ("forward", "input_grad", "kernel_grad")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True)
class Choice:
    """A lowering, and why it was chosen."""

    lowering: str
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering}: {self.reason}"


@dataclass(frozen=True)
class Rule:
    """A row of the table: a choice, and the calls that it is for. The first row that fits a call decides.

    Attributes:
        platforms: the platforms.
        maps: the maps.
        choice: the lowering and the reason.
        partitioned: only programs that the compiler partitions over at least this many mesh axes.
        symbolic: only symbolic spatial sizes.
    """

    platforms: tuple[str, ...]
    maps: tuple[str, ...]
    choice: Choice
    partitioned: int = 0
    symbolic: bool = False

    def fits(self, platform: str, direction: str, convolution: Convolution, partitioned: int) -> bool:
        """Whether the row is for this call."""
        return (
            platform in self.platforms
            and direction in self.maps
            and partitioned >= self.partitioned
            and (not self.symbolic or _is_symbolic(convolution))
        )


# XLA's partitioner adds up a convolution's partial sums over all devices, also over those that hold the same part: a
# kernel gradient whose batch is sharded over one of two mesh axes comes out multiplied by the size of the other.
_REPEATED_SUM = "XLA's sum of a partitioned convolution counts replicas over the other mesh axes more than once"

# benchmarks/lowerings.py measures what the rows for the platforms say.
TABLE = (
    Rule(PLATFORMS, ("kernel_grad",), Choice("taps", _REPEATED_SUM), partitioned=2),
    Rule(("cpu",), MAPS, Choice("conv", "taps need known spatial sizes"), symbolic=True),
    Rule(("cpu",), MAPS, Choice("taps", "XLA's grouped convolution is many times slower on CPU")),
    Rule(("tpu",), MAPS, Choice("conv", "XLA's grouped convolution is near the hardware's limit on TPU")),
    Rule(("cuda", "rocm"), MAPS, Choice("conv", "no measurement on a GPU says otherwise")),
)


def choose(
    platform: str, direction: str, convolution: Convolution, *, partitioned: int, implementation: str | None
) -> Choice:
    """The lowering for a call.

    Args:
        platform: one of PLATFORMS.
        direction: one of MAPS.
        convolution: the convolution.
        partitioned: over how many mesh axes, of more than one device each, the compiler partitions the program (under
            automatic or explicit sharding; not in shard_map); more than one if that is unknown.
        implementation: a lowering that the caller insists on, or None.

    Raises:
        ValueError: the lowering cannot serve the call.
    """
    if implementation is None:
        choice = next(rule.choice for rule in TABLE if rule.fits(platform, direction, convolution, partitioned))
    else:
        choice = Choice(implementation, "asked for by implementation=")
    if choice.lowering == "taps" and _is_symbolic(convolution):
        raise ValueError(
            f"lowering 'taps' ({choice.reason}) cannot serve this {direction}: it needs known spatial sizes, "
            f"got the symbolic {convolution.spatial}"
        )
    if choice.lowering == "conv" and direction == "kernel_grad" and partitioned > 1:
        raise ValueError(
            f"implementation='conv' cannot serve this kernel gradient, partitioned over several mesh axes: "
            f"{_REPEATED_SUM}; expected implementation=None or 'taps', a mesh of one axis, or jax.shard_map"
        )
    return choice


def run(
    direction: str,
    platform: str,
    *operands: Array,
    convolution: Convolution,
    partitioned: int,
    stacked: int,
    dtype: Any,
    implementation: str | None,
) -> Array:
    """One map, on the chosen lowering.

    The operands are brought to one dtype that holds them and the result; on CPU it has at least float32's precision,
    since XLA sums narrower types there in steps that round (the other platforms' convolutions sum them in float32).

    Args:
        direction: one of MAPS.
        platform: one of PLATFORMS.
        *operands: the map's two operands, with `stacked` leading axes in common, each index of which is a convolution
            of its own.
        convolution: the convolution.
        partitioned: as in choose.
        stacked: the number of those axes.
        dtype: the result's dtype.
        implementation: as in choose.
    """
    choice = choose(platform, direction, convolution, partitioned=partitioned, implementation=implementation)
    function = functools.partial(
        getattr(LOWERINGS[choice.lowering], direction), convolution=convolution, partitioned=partitioned
    )
    for _ in range(stacked):
        function = jax.vmap(function)
    computation = jnp.result_type(*operands, dtype)
    if choice.lowering == "taps" or platform == "cpu":
        computation = accumulation_dtype(computation)
    return function(*(operand.astype(computation) for operand in operands)).astype(dtype)


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which products of a dtype are summed: float32 for narrower floats, else the dtype itself."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def _is_symbolic(convolution: Convolution) -> bool:
    return not all(isinstance(n, int) for n in convolution.spatial)
