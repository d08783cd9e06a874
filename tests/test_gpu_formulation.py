"""The programs that only a GPU gets, run here: the same values and derivatives as any other lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import explain
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CASES, CORE, Case
from tests.support.meshes import SHARDED, make_mesh, specs

# One of each kind, and all kinds of dilation.
CHOSEN = [case for case in CASES if case in CORE or case.geometry.get("dilation_rate", 1) != 1]


def on_cuda(function: Callable[..., Any], *operands: Any, **shardings: Any) -> Any:
    """The value of a function, by the program that it is for CUDA; its operations run on any platform."""
    exported = export.export(
        jax.jit(function, **shardings), platforms=("cuda",), disabled_checks=(export.DisabledSafetyCheck.platform(),)
    )
    return exported(*operands).call(*operands)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    x, w, g = case.operands()
    results = on_cuda(maps.value_and_gradients(case.conv()), x, w, g)
    for actual, (name, expected) in zip(results, maps.truth(case, x, w, g).items(), strict=True):
        assert_close(actual, expected, 1e-5, name)


@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("geometry", [{"strides": 2}, {"dilation_rate": 2}, {"dilation_rate": (1, 3)}, {}], ids=str)
def test_values_of_a_sharded_program(geometry: dict[str, Any], sharded: str) -> None:
    multiplier = 1 if geometry else 2
    case = Case("sharded", (8, 8, 9, 4), (3, 3, 4, multiplier), {"padding": "same", **geometry})
    axes = {"batch": {"b": 4}, "channels": {"c": 4}, "batch+channels": {"b": 2, "c": 2}, "rows": {"b": 4}}
    mesh = make_mesh(AxisType.Auto, **axes[sharded])
    images, kernel, _ = (NamedSharding(mesh, spec) for spec in specs(case, sharded))
    shardings = images, kernel, images
    x, w, g = (jax.device_put(a, s) for a, s in zip(case.operands(), shardings, strict=True))
    with jax.set_mesh(mesh):
        # Over several axes, and over axes that no type names, dw is a sum.
        lowering = explain(x, w, **case.geometry, platform="cuda").kernel_grad.lowering
        assert lowering == ("conv" if len(axes[sharded]) == 1 else "taps")
        dx, dw = on_cuda(lambda x, w, g: jax.vjp(case.conv(), x, w)[1](g), x, w, g, in_shardings=shardings)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize(("rows", "sharded", "adjacent"), [("9", None, True), ("n", None, False), ("9", "b", False)])
def test_the_taps_of_a_dilated_kernel_gradient_are_adjacent(rows: str, sharded: str | None, adjacent: bool) -> None:
    # Where a size is symbolic or rows are sharded, it is XLA's own, whose outputs are the taps: as far apart.
    (n,) = export.symbolic_shape(rows)
    mesh = make_mesh(AxisType.Explicit, b=3)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((2, n, 8, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, sharded)))
        w = jax.ShapeDtypeStruct((3, 3, 4, 1), jnp.float32)
        conv = Case("dilated", (2, 9, 8, 4), w.shape, {"padding": "same", "dilation_rate": (1, 2)}).conv()
        text = export.export(jax.jit(maps.dw(conv)), platforms=("cuda",))(x, w, x).mlir_module()
    assert text.count("stablehlo.convolution") == 1
    assert ("stride = [1, 2]" not in text) == adjacent


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_mapped_over_x_and_kernel(case: Case) -> None:
    stacks = [np.stack(pair) for pair in zip(case.operands(), case.operands(1), strict=True)]
    dx, dw = on_cuda(jax.vmap(maps.gradients(case.conv())), *stacks)
    for i in range(2):
        x, w, g = (stack[i] for stack in stacks)
        assert_close(dx[i], case.oracle.input_grad(g, w), 1e-5, "dx")
        assert_close(dw[i], case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_second_derivatives(case: Case) -> None:
    """The derivatives of a sum of <g, conv(x, w)> squared: products of the maps of each other's results."""
    x, w, g = case.operands()
    oracle = case.oracle

    def gradient(x: Any, w: Any) -> Any:
        return jax.grad(lambda w: (jnp.sum(case.conv()(x, w) * g)) ** 2 / 2)(w)

    _, tangent = on_cuda(lambda x, w: jax.jvp(lambda x: gradient(x, w), (x,), (g_like(x),)), x, w)
    value, dw = np.sum(oracle.conv(x, w) * g), oracle.kernel_grad(x, g)
    change = np.sum(oracle.input_grad(g, w) * g_like(x))
    assert_close(tangent, change * dw + value * oracle.kernel_grad(g_like(x), g), 1e-4)


def g_like(x: Any) -> np.ndarray:
    """A tangent of x."""
    return np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
