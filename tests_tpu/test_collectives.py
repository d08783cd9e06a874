"""What sequences sharded over chips send, by the formulation that TPU programs get: halos and one sum, no gather."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax import Array
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv
from workloads.tpu.compiler import compile_for_tpu, make_mesh, sharded

WINDOW, CHANNELS = 4, 512
# Mesh axes over four chips, the shape of x and how it is sharded, and over how many chips dw is summed.
SHARDED: dict[str, tuple[dict[str, int], tuple[int, int, int], P, int | None]] = {
    "time": ({"time": 4}, (16, 1024, CHANNELS), P(None, "time"), 4),
    "time, few sequences": ({"time": 4}, (2, 4096, CHANNELS), P(None, "time"), 4),
    "batch and time": ({"batch": 2, "time": 2}, (16, 1024, CHANNELS), P("batch", "time"), 4),
    "batch": ({"batch": 4}, (16, 1024, CHANNELS), P("batch"), 4),
    "batch and channels": ({"batch": 2, "channels": 2}, (16, 1024, CHANNELS), P("batch", None, "channels"), 2),
    "channels": ({"channels": 4}, (16, 1024, CHANNELS), P(None, None, "channels"), None),
}
_PERMUTED = re.compile(r" = \(?bf16\[\d+,(\d+),\d+\].* collective-permute(?:-start)?\(")


def causal(x: Array, kernel: Array) -> Array:
    return depthwise_conv(x, kernel, padding="causal")


def training_step(x: Array, kernel: Array, g: Array) -> tuple[Array, tuple[Array, Array]]:
    y, vjp = jax.vjp(causal, x, kernel)
    return y, vjp(g)


PROGRAMS: dict[str, tuple[Callable[..., Any], str]] = {
    "forward": (causal, "xk"),
    "dx": (lambda x, k, g: jax.vjp(lambda x: causal(x, k), x)[1](g), "xkg"),
    "dw": (lambda x, k, g: jax.vjp(lambda k: causal(x, k), k)[1](g), "xkg"),
    "training step": (training_step, "xkg"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", SHARDED)
def test_sequences(name: str, program: str) -> None:
    axes, shape, spec, summed = SHARDED[name]
    mesh = make_mesh("v5e:2x2", **axes)
    x = sharded(jax.ShapeDtypeStruct(shape, "bfloat16"), spec, mesh)
    kernel_spec = P(None, *spec[2:]) if len(spec) > 2 else P()
    kernel = sharded(jax.ShapeDtypeStruct((WINDOW, CHANNELS, 1), "bfloat16"), kernel_spec, mesh)
    function, names = PROGRAMS[program]
    with jax.set_mesh(mesh):
        lowered, compiled, figures = compile_for_tpu(function, *({"x": x, "k": kernel, "g": x}[n] for n in names))
    assert "stablehlo.convolution" not in lowered
    sums = program in ("dw", "training step") and summed is not None
    permutes = {"collective-permute": figures.collectives["collective-permute"]} if "time" in axes else {}
    assert figures.collectives == Counter({**({"all-reduce": 1} if sums else {}), **permutes})
    assert figures.groups == ({summed} if sums else set())
    if "time" in axes:
        # The halo is three positions; XLA sends it in pieces, some from further away. A shard has 256 at least.
        positions = [int(n) for n in _PERMUTED.findall(compiled.as_text())]
        assert len(positions) == permutes["collective-permute"] > 0
        assert sum(positions) <= (2 if program == "training step" else 1) * 3 * (WINDOW - 1)
