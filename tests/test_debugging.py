"""What looks into a program: jax_debug_nans and jax_debug_infs, checkify, and the compiler's FLOP counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental import checkify

import depthwise_jax.nnx
from depthwise_jax import conv_general_dilated, depthwise_conv, separable_conv
from depthwise_jax.lowering import Implementation
from tests.support.layers import DepthwiseConv2D, SeparableConv2D

X, K, G = (1, 5, 5, 8), (3, 3, 8, 1), (1, 3, 3, 8)
# By what is looked for: the numbers of two operands that are valid, and whose products are not.
OPERANDS = {"nan": (float("inf"), 0.0), "inf": (3e38, 3e38)}
TRANSFORMS = {"eager": lambda f: f, "jit": jax.jit, "vmap": lambda f: lambda *a: jax.vmap(f)(*(b[None] for b in a))}


@pytest.fixture(params=OPERANDS)
def looked_for(request: pytest.FixtureRequest) -> Iterator[str]:
    with {"nan": jax.debug_nans, "inf": jax.debug_infs}[request.param](True):
        yield request.param


def raises(looked_for: str, primitive: str) -> Any:
    return pytest.raises(FloatingPointError, match=rf"^invalid value \({looked_for}\) encountered in {primitive}(\n|$)")


def full(looked_for: str, first: Any, second: Any, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    a, b = OPERANDS[looked_for]
    return jnp.full(first, a, dtype), jnp.full(second, b, dtype)


def maps(implementation: Implementation | None) -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Each primitive by its name: a function that binds it, and its operands' shapes."""

    def conv(x: Any, k: Any, **options: Any) -> Any:
        return depthwise_conv(x, k, implementation=implementation, **options)

    return {
        "depthwise_conv": (conv, X, K),
        "depthwise_conv_fused": (lambda x, k: conv(x, k, activation="relu"), X, K),
        "depthwise_input_grad": (
            lambda g, k: jax.linear_transpose(lambda x: conv(x, k), jax.ShapeDtypeStruct(X, k.dtype))(g)[0],
            G,
            K,
        ),
        "depthwise_kernel_grad": (
            lambda x, g: jax.linear_transpose(lambda k: conv(x, k), jax.ShapeDtypeStruct(K, x.dtype))(g)[0],
            X,
            G,
        ),
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("primitive", maps(None))
def test_every_primitive_is_named(
    looked_for: str, primitive: str, transform: str, implementation: Implementation
) -> None:
    function, *shapes = maps(implementation)[primitive]
    function = TRANSFORMS[transform](function)
    assert jnp.isfinite(function(*map(jnp.ones, shapes))).all()  # and nothing is raised
    with raises(looked_for, primitive):
        function(*full(looked_for, *shapes))


@pytest.mark.parametrize("primitive", maps(None))
def test_narrow_and_complex_numbers_are_looked_at(primitive: str) -> None:
    function, *shapes = maps(None)[primitive]
    with jax.debug_nans(True):
        for dtype in (jnp.bfloat16, jnp.float16, *([jnp.complex64] if primitive != "depthwise_conv_fused" else [])):
            with raises("nan", primitive):
                function(*full("nan", *shapes, dtype=dtype))


def test_integers_have_neither() -> None:
    with jax.debug_nans(True), jax.debug_infs(True):
        assert depthwise_conv(jnp.ones(X, jnp.int32), jnp.ones(K, jnp.int32)).dtype == jnp.int32


def test_only_what_is_asked_for_is_looked_for() -> None:
    with jax.debug_nans(True):
        assert jnp.isinf(depthwise_conv(*full("inf", X, K))).all()
    with jax.debug_infs(True):
        assert jnp.isnan(depthwise_conv(jnp.full(X, jnp.nan), jnp.ones(K))).all()


def linen_layer(layer: Any) -> tuple[Callable[..., Any], Any]:
    return layer.apply, layer.init(jax.random.key(0), jnp.ones(X))


def nnx_layer(layer: nnx.Module) -> tuple[Callable[..., Any], Any]:
    graph, state = nnx.split(layer)
    return lambda state, x: nnx.merge(graph, state)(x), state


LAYERS: dict[str, Callable[[], tuple[Callable[..., Any], Any]]] = {
    "Linen": lambda: linen_layer(DepthwiseConv2D(3)),
    "Linen, separable": lambda: linen_layer(SeparableConv2D(4, 3)),
    "NNX": lambda: nnx_layer(depthwise_jax.nnx.DepthwiseConv2D(8, 3, rngs=nnx.Rngs(0))),
    "NNX, separable": lambda: nnx_layer(depthwise_jax.nnx.SeparableConv2D(8, 4, 3, rngs=nnx.Rngs(0))),
    "drop-in": lambda: linen_layer(
        linen.Conv(8, (3, 3), padding="VALID", feature_group_count=8, conv_general_dilated=conv_general_dilated)
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_and_their_gradients(layer: str, jit: bool) -> None:
    apply, params = LAYERS[layer]()
    zeros = jax.tree.map(jnp.zeros_like, params)
    wrap = jax.jit if jit else lambda f: f

    def gradient(params: Any, x: Any, g: Any) -> Any:
        return jax.vjp(lambda params: apply(params, x), params)[1](g)

    y = apply(params, jnp.zeros(X))
    with jax.debug_nans(True):
        with raises("nan", "depthwise_conv(_fused)?"):
            wrap(apply)(zeros, jnp.full(X, jnp.inf))
        with raises("nan", "(depthwise_kernel_grad|dot_general)"):  # of a pointwise kernel it is lax's
            wrap(gradient)(params, jnp.zeros(X), jnp.full(y.shape, jnp.inf))


def test_separable_conv() -> None:
    with jax.debug_nans(True), raises("nan", "depthwise_conv"):
        separable_conv(jnp.full(X, jnp.inf), jnp.zeros(K), jnp.ones((1, 1, 8, 4)))


def test_checkify_sees_what_is_checked_and_not_the_convolution() -> None:
    """README's limit. Where this fails, JAX has a way to register the check: use it, and take the limit back."""
    operands = full("nan", X, K)

    def checked(x: Any, k: Any) -> Any:
        y = depthwise_conv(x, k)
        checkify.check(jnp.isfinite(y).all(), "not finite")
        return y

    def found(f: Callable[..., Any], errors: Any) -> str | None:
        return checkify.checkify(jax.jit(f), errors=errors)(*operands)[0].get()

    assert not hasattr(checkify, "error_checks")
    assert found(depthwise_conv, checkify.nan_checks | checkify.float_checks) is None
    assert "not finite" in (found(checked, checkify.user_checks) or "")
    error, y = checkify.checkify(jax.jit(checked), errors=checkify.all_checks)(jnp.ones(X), jnp.ones(K))
    assert error.get() is None
    assert (y == 9).all()


def flops(f: Callable[..., Any], *operands: Any) -> tuple[float, float]:
    """As lowered, and as compiled."""
    lowered = jax.jit(f).lower(*operands)
    costs: tuple[Any, Any] = lowered.cost_analysis(), lowered.compile().cost_analysis()
    return costs[0].get("flops", 0), costs[1].get("flops", 0)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("geometry", [{}, {"padding": "same"}, {"strides": 2}, {"dilation_rate": 2}], ids=str)
def test_conv_is_counted_as_lax_counts(geometry: dict[str, Any], multiplier: int) -> None:
    """What docs/speed.md says: the count of a call is that of implementation="conv"."""
    x, k = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8, multiplier))

    def of_lax(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            k.reshape(3, 3, 1, -1),
            (geometry.get("strides", 1),) * 2,
            geometry.get("padding", "valid").upper(),
            rhs_dilation=(geometry.get("dilation_rate", 1),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=8,
        )

    ours = flops(lambda x, k: depthwise_conv(x, k, **geometry, implementation="conv"), x, k)
    assert ours == flops(of_lax, x, k)
    assert min(ours) > 0


def test_a_compiled_kernel_is_not_counted(implementation: Implementation) -> None:
    """Why docs/speed.md says so. Where this fails, XLA counts custom calls: take the advice back."""
    x, k = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8, 2))
    counts = flops(lambda x, k: depthwise_conv(x, k, implementation=implementation), x, k)
    assert all((count > 0) == (implementation != "native") for count in counts)


def test_tabulate_counts_a_layer_on_conv() -> None:
    x = jnp.ones((2, 9, 9, 8))

    def counted(layer: Any) -> Any:
        return layer.tabulate(
            jax.random.key(0), x, compute_flops=True, console_kwargs={"width": 200, "force_terminal": False}
        )

    ours = counted(DepthwiseConv2D(3, implementation="conv"))
    theirs = counted(linen.Conv(8, (3, 3), padding="VALID", feature_group_count=8))
    conv, bias = flops(lambda x: depthwise_conv(x, jnp.ones(K), implementation="conv"), x)[0], 2 * 7 * 7 * 8
    assert all(f"{int(conv + bias)}" in table.replace(",", "") for table in (ours, theirs))
