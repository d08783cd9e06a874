"""accelerate: existing models and functions with their depthwise convolutions computed by this package."""

import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import depthwise_jax
from depthwise_jax.interop import accelerate
from workloads.models import MODELS, Equinoctial

KEY = jax.random.key(0)


def grouped(function: Any, *args: Any) -> int:
    """How many convolutions of lax with groups the jaxpr prints, at any depth."""
    text = str(jax.make_jaxpr(function)(*args))
    return sum(int(n) > 1 for n in re.findall(r"(?:feature|batch)_group_count=(\d+)", text))


def ours(function: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("depthwise_conv[")


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Each array within a tolerance of its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.abs(b).max(initial=0) + 1e-6))


def run(function: Any, *args: Any) -> Any:
    """The results of a compiled function."""
    return jax.jit(function)(*args)


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(("name", "size", "count"), [("keras", 32, 17), ("equinox", 9, 2), ("linen", 16, 3)])
def test_models(name, size, count):
    """Same outputs and gradients, and every depthwise convolution with both its gradients computed by this package."""
    function, params, x = MODELS[name](batch=2, size=size)
    fast = accelerate(function)

    def with_gradients(f: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y = f(params, x)
            return jnp.mean(jnp.sin(y)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    report = fast.report(params, x)
    assert len(report.replaced) == count
    assert report.skipped == ()
    assert grouped(function, params, x) == count
    assert grouped(fast, params, x) == 0
    assert grouped(with_gradients(fast), params, x) == 0
    assert_close(run(with_gradients(fast), params, x), run(with_gradients(function), params, x))


def test_a_module_of_equinox_is_a_function():
    model = Equinoctial(jax.random.key(0), width=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 7)), jnp.float32)
    assert_close(accelerate(model)(x), model(x))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_transposed_convolution_of_equinox(rank, m):
    model = eqx.nn.ConvTranspose(rank, 3, 3 * m, 3, stride=2, padding=1, output_padding=1, groups=3, key=KEY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, *(4, 3, 2)[:rank])), jnp.float32)

    def loss(weight, x):
        return jnp.sin(eqx.tree_at(lambda model: model.weight, model, weight)(x)).sum()

    fast = accelerate(loss)
    assert str(fast.report(model.weight, x)).endswith("3 groups: replaced")
    gradients = (jax.value_and_grad(f, (0, 1)) for f in (fast, loss))
    assert_close(*(run(gradient, model.weight, x) for gradient in gradients))
    assert_close(accelerate(model)(x), model(x))


def test_injection_in_linen_and_nnx():
    """Where the framework takes a convolution, nothing else is needed."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
    arguments = {"kernel_size": (3, 3), "feature_group_count": 3}
    plain = nn.Conv(6, **arguments)
    fast = nn.Conv(6, **arguments, conv_general_dilated=depthwise_jax.conv_general_dilated)
    variables = plain.init(jax.random.key(0), x)
    assert (grouped(plain.apply, variables, x), grouped(fast.apply, variables, x)) == (1, 0)
    assert_close(fast.apply(variables, x), plain.apply(variables, x))
    layers = [
        nnx.Conv(3, 6, **arguments, conv_general_dilated=function, rngs=nnx.Rngs(0))
        for function in (lax.conv_general_dilated, depthwise_jax.conv_general_dilated)
    ]
    assert [grouped(layer, x) for layer in layers] == [1, 0]
    assert_close(layers[1](x), layers[0](x))
    layer = nnx.Conv(3, 6, **arguments, rngs=nnx.Rngs(0))
    layer.conv_general_dilated = depthwise_jax.conv_general_dilated  # an existing model
    assert grouped(layer, x) == 0


# --- functions ------------------------------------------------------------------------------------------------------

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 1, 3)) / 3, jnp.float32)


def conv(x, w, **kwargs):
    arguments = {"feature_group_count": 3, "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **kwargs}
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", **arguments)


@jax.custom_jvp
def ruled(x, w):
    return conv(x, w)


@ruled.defjvp
def _(primals, tangents):
    return ruled(*primals), 2 * conv(tangents[0], primals[1])  # a rule of its own, which must be kept


@jax.custom_vjp
def ruled_back(x, w):
    return conv(x, w)


ruled_back.defvjp(lambda x, w: (conv(x, w), w), lambda w, g: (3 * g, jnp.zeros_like(w)))

WRAPPED = {
    "jit": lambda x, w: jax.jit(conv)(x, w),
    "nested jit": lambda x, w: jax.jit(lambda x: jax.jit(conv)(jnp.sin(x), w))(x),
    "scan": lambda x, w: lax.scan(lambda c, k: (conv(c, k), c.sum()), x, jnp.stack([w, 2 * w])),
    "while": lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, conv(c[1], w)), (0, x))[1],
    "fori": lambda x, w: lax.fori_loop(0, 2, lambda i, c: conv(c, w) * i, x),
    "cond": lambda x, w: lax.cond(x.sum() > 0, conv, lambda x, w: x * 2.0, x, w),
    "switch": lambda x, w: lax.switch(1, [lambda x: x, lambda x: conv(x, w), jnp.sin], x),
    "remat": lambda x, w: jax.checkpoint(lambda x: jnp.sin(conv(x, w)))(x),
    "vmap": lambda x, w: jax.vmap(lambda x: conv(x[None], w)[0])(x),
    "nothing": conv,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_transformations(name):
    function = WRAPPED[name]
    fast = accelerate(function)
    assert grouped(function, X, W) == len(fast.report(X, W).replaced) == ours(fast, X, W) == 1
    assert grouped(fast, X, W) == 0
    assert_close(fast(X, W), function(X, W))
    if name == "while":  # no reverse mode
        tangents = (jnp.ones_like(X), jnp.ones_like(W))
        assert_close(jax.jvp(fast, (X, W), tangents), jax.jvp(function, (X, W), tangents))
        return

    def gradients(f):
        return jax.grad(lambda x, w: sum(jnp.sum(jnp.cos(y)) for y in jax.tree.leaves(f(x, w))), (0, 1))

    assert grouped(gradients(fast), X, W) == 0
    assert_close(gradients(fast)(X, W), gradients(function)(X, W))


def test_under_transformations():
    function = WRAPPED["scan"]
    fast = accelerate(function)
    xs = jnp.stack([X, 2 * X, -X])
    assert_close(jax.jit(jax.vmap(fast, (0, None)))(xs, W), jax.vmap(function, (0, None))(xs, W))

    def scalar(f):
        return lambda w: jnp.sum(f(X, w)[0] ** 2)

    assert_close(jax.jvp(jax.grad(scalar(fast)), (W,), (W,)), jax.jvp(jax.grad(scalar(function)), (W,), (W,)))
    with jax.checking_leaks():
        jax.jit(fast)(X, W)


def test_in_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    batch, whole = PartitionSpec("d"), PartitionSpec()
    function = jax.shard_map(conv, mesh=mesh, in_specs=(batch, whole), out_specs=batch)
    fast = accelerate(function)
    assert (grouped(fast, X, W), ours(fast, X, W)) == (0, 1)
    assert_close(fast(X, W), conv(X, W))

    def gradients(f):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.cos(f(x, w))), (0, 1)))

    assert_close(gradients(fast)(X, W), gradients(conv)(X, W))


def test_custom_rules_are_left_alone():
    def function(x, w):
        return ruled(x, w) + ruled_back(x, w) + conv(x, w)

    fast = accelerate(function)
    report = fast.report(X, W)
    assert [site.path[0].split(":")[0] for site in report.skipped] == ["custom_jvp_call", "custom_vjp_call"]
    assert all("not searched" in (site.skipped or "") for site in report.skipped)
    assert len(report.replaced) == 1
    gradient = jax.grad(lambda f, x: jnp.sum(f(x, W)), argnums=1)
    assert_close(gradient(fast, X), gradient(function, X))
    plain = np.asarray(gradient(conv, X))
    assert_close(gradient(fast, X), jnp.asarray(2 * plain + 3 + plain))


def test_what_is_skipped_is_reported():
    grouped_weights = jnp.ones((3, 3, 2, 4))

    def function(x, w):
        x = conv(x, w)
        x = lax.conv_general_dilated(
            jnp.concatenate([x, x[..., :1]], -1), grouped_weights, (1, 1), "SAME", feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return conv(x[..., :3], jnp.ones((3, 3, 3, 3)), feature_group_count=1)  # not grouped, and not mentioned

    report = accelerate(function).report(jax.ShapeDtypeStruct(X.shape, X.dtype), W)
    (replaced,), (skipped,) = report.replaced, report.skipped
    assert (replaced.path, replaced.feature_group_count) == ((), 3)
    assert (skipped.feature_group_count, skipped.lhs, skipped.rhs) == (2, "float32[2,5,5,4]", "float32[3,3,2,4]")
    assert "not depthwise" in str(report)
    assert str(accelerate(jnp.sin).report(X)) == "no grouped convolution"
    differentiated = accelerate(jax.grad(lambda w: jnp.sum(conv(X, w) ** 2))).report(W)
    assert "differentiate the result of accelerate" in str(differentiated)
    inside = str(accelerate(lambda x: lax.scan(lambda c, _: (jax.jit(conv)(c, W), None), x, None, 2)).report(X))
    assert inside.startswith("scan/jit:conv/conv_general_dilated float32[2,5,5,3] float32[3,3,1,3] 3 groups: replaced")


def dilated(x, w):
    return lax.conv_general_dilated(
        x, w, (2, 1), ((1, 2), (0, 0)), rhs_dilation=(1, 2), feature_group_count=3,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


# Functions whose sizes are symbolic, what becomes of their convolution, and their symbols.
SYMBOLIC = {
    "batch": (conv, "b, 5, 5, 3", "replaced"),
    "rows": (conv, "1, h, w, 3", "replaced"),
    "strides": (lambda x, w: strided(x, w, "SAME"), "b, h, w, 3", "replaced"),
    "strides and a sum": (lambda x, w: strided(x, w, "SAME"), "1, 2*h + 5, w + 4, 3", "replaced"),
    "strides of the batch": (lambda x, w: strided(x, w, "SAME"), "b, 5, 5, 3", "replaced"),
    "strides, valid": (lambda x, w: strided(x, w, "VALID"), "b, h + 2, w + 2, 3", "replaced"),
    "dilation": (dilated, "b, h + 4, w + 4, 3", "replaced"),
    "reflection": (lambda x, w: conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), w), "1, h, w, 3", "replaced"),
    "in a scan": (lambda x, w: lax.scan(lambda c, _: (conv(c, w), None), x, None, 2)[0], "b, h, w, 3", "replaced"),
    "strides in jit": (
        lambda x, w: jax.jit(lambda x: strided(x, w, "SAME") + conv(x, w)[:, :1, :1])(x),
        "1, h, w, 3",
        "replaced\njit",
    ),
}  # fmt: skip


def strided(x, w, padding):
    return lax.conv_general_dilated(
        x, w, (2, 2), padding, feature_group_count=3, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes_never_make_a_function_fail(name):
    function, shape, verdict = SYMBOLIC[name]
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), X.dtype)
    fast = accelerate(function)
    assert verdict in str(fast.report(x, W))
    sample = jnp.concatenate([X, X], 1)[:1, :7, :5] if "2*h" in shape else X[:1] if shape.startswith("1") else X
    exported = jax.export.export(jax.jit(fast))(x, W)
    assert_close(exported.call(sample, W), function(sample, W))


def test_what_this_package_refuses_stays_plain(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr("depthwise_jax.interop.jaxpr.conv_general_dilated", refuse)

    def function(x, w):
        return jnp.tanh(conv(x, w))

    fast = accelerate(function)
    assert str(fast.report(X, W)).endswith("skipped: refused: not on this machine")
    assert_close(fast(X, W), function(X, W))


def test_arguments_and_results_are_trees_and_plain_values_stay_plain():
    def function(inputs, *, double, name, scale=2):
        y = conv(inputs["x"], inputs["w"])
        assert isinstance(scale, int)
        assert name == "a name"
        return {"y": y * scale if double else y, "n": None, "x": (inputs["x"],)}

    fast = accelerate(function)
    assert_close(
        fast({"x": np.asarray(X), "w": W}, double=True, name="a name"),
        function({"x": X, "w": W}, double=True, name="a name"),
    )
    assert fast.__name__ == "function"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="accelerate takes a function"):
        accelerate(3)  # pyright: ignore[reportArgumentType]


def test_a_closure_over_traced_values():
    def loss(w):
        return jnp.sum(accelerate(lambda x: conv(x, w))(X) ** 2)

    assert_close(jax.grad(loss)(W), jax.grad(lambda w: jnp.sum(conv(X, w) ** 2))(W))


def test_repeated_calls_compile_once():
    traces = []

    @jax.jit
    def inner(x):
        traces.append(None)
        return conv(x, W)

    fast = accelerate(lambda x: inner(x))
    with jax.log_compiles(False):
        first = fast(X)
    jaxprs = [jax.make_jaxpr(fast)(X).jaxpr.eqns[0].params["jaxpr"] for _ in range(2)]
    assert jaxprs[0] is jaxprs[1]
    assert len(traces) == 1
    assert_close(fast(X), first)
