"""Depthwise convolutions compiled for an H100: no more of anything than plain Flax, and what differs from it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import work
from benchmarks.gpu_compiler import CASES, DTYPES, Entry
from depthwise_jax import depthwise_conv
from depthwise_jax.lowering import DIRECTIONS
from workloads.gpu.compiler import Figures, compile_for_gpu, devices
from workloads.hlo import collectives
from workloads.workload import Workload

# Kernels that ours has more: what cuDNN's gradient writes is brought into the kernel's order of axes, a few KB. Flax'
# is a convolution with a window as large as the image, which writes it so.
MORE_KERNELS = {("3x3, dilation 2", "dw"): 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_more_of_anything_than_flax(case: Workload, direction: str, dtype: str) -> None:
    ours, flax = (Entry(case, direction, dtype, by).compile() for by in ("ours", "flax"))
    assert ours.kernels <= flax.kernels + MORE_KERNELS.get((str(case), direction), 0)
    assert ours.copies <= flax.copies
    assert ours.transposes <= flax.transposes
    assert ours.bytes <= 1.001 * flax.bytes
    assert ours.temporaries <= flax.temporaries + 2**16


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_window_is_larger_than_the_dilated_kernel(case: Workload, direction: str) -> None:
    found = Entry(case, direction, "bfloat16", "ours").compile()
    oracle = case.resolved
    extent = math.prod((k - 1) * d + 1 for k, d in zip(oracle.window, oracle.dilation, strict=True))
    for call in found.libraries:
        assert math.prod(map(int, call.split()[-1].split("x"))) <= extent


def figures(name: str, direction: str, dtype: str) -> Figures:
    case = next(case for case in CASES if str(case) == name)
    return Entry(case, direction, dtype, "ours").compile()


@pytest.mark.parametrize("name", ["3x3, stride 2", "3x3, stride 2, padding 1", "3x3, stride 2, channels first"])
def test_a_strided_input_gradient_is_one_kernel_that_moves_each_byte_once(name: str) -> None:
    case = next(case for case in CASES if str(case) == name)
    found, least = figures(name, "dx", "float32"), work.traffic(case, "dx", 4)
    assert (found.kernels, found.libraries, found.copies, found.transposes) == (1, {}, 0, 0)
    assert least <= found.bytes <= 1.001 * least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "direction", "call"),
    [
        ("3x3, dilation 2", "dw", "backwardFilter 3x3"),
        ("causal 4, dilation 2", "dw", "backwardFilter 4x1"),
        ("3x3, multiplier 2", "dx", "forward 3x3"),
        ("3x3, multiplier 2", "dw", "backwardFilter 3x3"),
    ],
)
def test_these_gradients_are_one_call_of_cudnn(name: str, direction: str, call: str, dtype: str) -> None:
    assert figures(name, direction, dtype).libraries == {call: 1}


# A geometry, and the collectives of dx and of dw where the batch is sharded over four GPUs.
SHARDED: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"strides": 2}, 1),
    ({"dilation_rate": 2}, 1),
    ({}, 2),
]


@pytest.mark.parametrize(("geometry", "multiplier"), SHARDED, ids=str)
def test_a_sharded_batch_needs_one_sum_for_dw_and_nothing_else(geometry: dict[str, Any], multiplier: int) -> None:
    mesh = Mesh(np.array(devices(4)), ("batch",))
    size = 56 // geometry.get("strides", 1)

    def shape(spec: P, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    x, w = shape(P("batch"), 32, 56, 56, 64), shape(P(), 3, 3, 64, multiplier)
    g = shape(P("batch"), 32, size, size, 64 * multiplier)

    def gradients(x: Any, w: Any, g: Any) -> Any:
        return jax.vjp(lambda x, w: depthwise_conv(x, w, padding="same", **geometry), x, w)[1](g)

    with jax.set_mesh(mesh):
        text, found = compile_for_gpu(gradients, x, w, g)
    assert collectives(text) == {"all-reduce": 1}
    assert all("56" not in call for call in found.libraries)
