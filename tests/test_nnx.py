"""The NNX layers: the Linen layers' arguments, numbers, errors and configurations, under NNX's transformations."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthwise_jax
from depthwise_jax import constraints, initializers, linen, optim, regularizers, settings
from depthwise_jax._contract.spec import Spec
from depthwise_jax.nnx import Loss, regularization_loss
from tests.support.cases import CASES, CORE, Case
from tests.support.keras_layers import LAYERS, draw

NAMES = tuple(f"{kind}Conv{rank}D" for kind in ("Depthwise", "Separable") for rank in (1, 2, 3))
X = jax.random.normal(jax.random.key(1), (2, 6, 5, 3))


def both(name: str, in_features: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The Linen layer and the NNX layer with the same arguments, the latter without its initial values."""
    cls = getattr(depthwise_jax.nnx, name)
    nnx_layer = nnx.eval_shape(lambda: cls(in_features, *args, **kwargs, rngs=nnx.Rngs(0)))
    return getattr(linen, name)(*args, **kwargs), nnx_layer


def randomize(layer: nnx.Module, seed: int) -> dict[str, jax.Array]:
    """Gives the layer random parameters, and returns them as Linen has them."""
    rng = np.random.default_rng(seed)
    params = {
        str(name): jnp.asarray(rng.normal(size=param.shape), param.dtype)
        for (name,), param in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    nnx.update(layer, params)
    return params


def gradients_of(linen_layer: Any, nnx_layer: Any, x: jax.Array) -> tuple[Any, Any]:
    """Twice the same function of (params, x), by Linen and by NNX: gradients in both, and the output."""

    def run(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.sin(y).astype(jnp.float32)), y

    def ours(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.clone(nnx_layer)
        nnx.update(model, params)
        return run(model(x))

    def theirs(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(linen_layer.apply({"params": params}, x))

    return jax.grad(theirs, (0, 1), has_aux=True), jax.grad(ours, (0, 1), has_aux=True)


def assert_agree(linen_layer: Any, nnx_layer: Any, x: jax.Array) -> None:
    """Forward and gradients to the last bit: the two are one program, equation by equation."""
    params = randomize(nnx_layer, 3)
    theirs, ours = (str(jax.make_jaxpr(f)(params, x)) for f in gradients_of(linen_layer, nnx_layer, x))
    assert ours == theirs


def layer_arguments(case: Case) -> dict[str, Any]:
    return {
        "kernel_size": case.kernel[:-2],
        "depth_multiplier": case.kernel[-1],
        **case.geometry,
    }


def combined(case: Case) -> bool:
    """Both strides and dilation, which no layer takes."""
    return bool(np.max(case.geometry.get("strides", 1)) > 1 and np.max(case.geometry.get("dilation_rate", 1)) > 1)


# --- one contract ---------------------------------------------------------------------------------------------------


def test_modules_of_equal_arguments_differ() -> None:
    # And any module is a key, as nnx.Module is.
    layers = [value for name, value in vars(depthwise_jax.nnx).items() if "Conv" in name]
    assert len(layers) == 10
    assert all((layer.__eq__, layer.__hash__) == (nnx.Module.__eq__, nnx.Module.__hash__) for layer in layers)


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_linens_in_order_with_their_defaults(name):
    def parameters(cls):
        return list(inspect.signature(cls.__init__).parameters.values())[1:]

    ours = parameters(getattr(depthwise_jax.nnx, name))
    theirs = [p for p in parameters(getattr(linen, name)) if p.name not in ("parent", "name")]
    assert ours[0].name == "in_features"
    assert (ours[-1].name, ours[-1].kind) == ("rngs", inspect.Parameter.KEYWORD_ONLY)
    assert [(p.name, p.default) for p in ours[1:-1]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("case", [case for case in CASES if not combined(case)], ids=str)
def test_linen_and_nnx_agree_bitwise_over_the_cases(case):
    arguments = layer_arguments(case)
    channels = case.kernel[-2]
    assert_agree(*both(f"DepthwiseConv{len(case.kernel) - 2}D", channels, **arguments), jnp.asarray(case.operands()[0]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LAYERS)
def test_linen_and_nnx_agree_bitwise_over_random_configurations(name, seed):
    config, shape = draw(name, seed)
    channels = shape[-1 if config["data_format"] == "channels_last" else 1]
    x = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    linen_layer, nnx_layer = both(name, channels, **config)
    assert_agree(linen_layer, nnx_layer, x)
    assert nnx_layer.get_config() == linen_layer.get_config()
    assert nnx_layer.compute_output_shape((None, *shape[1:])) == linen_layer.compute_output_shape((None, *shape[1:]))


@pytest.mark.parametrize("case", [case for case in CORE if not combined(case)], ids=str)
def test_linen_and_nnx_give_equal_bits(case):
    x = jnp.asarray(case.operands()[0])
    name = f"DepthwiseConv{len(case.kernel) - 2}D"
    linen_layer, nnx_layer = both(name, case.kernel[-2], **layer_arguments(case), activation="gelu")
    params = randomize(nnx_layer, 4)
    theirs, ours = (f(params, x) for f in gradients_of(linen_layer, nnx_layer, x))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype"), [("bfloat16", "float32", "float32"), (None, "bfloat16", "int32")]
)
@pytest.mark.parametrize("name", ["DepthwiseConv2D", "SeparableConv2D"])
def test_dtypes_are_linens(name, dtype, param_dtype, x_dtype):
    args = (3,) if name == "DepthwiseConv2D" else (2, 3)
    linen_layer, nnx_layer = both(name, 3, *args, dtype=dtype, param_dtype=param_dtype)
    params = randomize(nnx_layer, 5)
    assert {p.dtype for p in params.values()} == {jnp.dtype(param_dtype)}
    x = (4 * X).astype(x_dtype)
    y = nnx_layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, linen_layer.apply({"params": params}, x))


def test_initial_values_are_the_initializers_and_shapes_the_documented_ones():
    layer: Any = depthwise_jax.nnx.SeparableConv2D(
        3, 4, (1, 2), depth_multiplier=2, depthwise_initializer="ones",
        pointwise_initializer=initializers.GlorotUniform(seed=3), bias_initializer=initializers.Constant(0.5),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    np.testing.assert_array_equal(layer.depthwise_kernel[...], np.ones((1, 2, 3, 2)))
    limit = np.sqrt(6 / (6 + 4))
    expected = jax.random.uniform(jnp.array([3, 0], jnp.uint32), (1, 1, 6, 4), minval=-limit, maxval=limit)
    np.testing.assert_allclose(layer.pointwise_kernel[...], expected, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias[...], np.full(4, 0.5))
    assert depthwise_jax.nnx.DepthwiseConv1D(2, 3, use_bias=False, rngs=nnx.Rngs(0)).bias is None


def test_the_key_comes_from_the_params_stream():
    def kernel(**streams):
        return depthwise_jax.nnx.DepthwiseConv2D(3, 3, rngs=nnx.Rngs(**streams)).kernel[...]

    np.testing.assert_array_equal(kernel(params=1, dropout=2), kernel(params=1, dropout=3))
    assert not np.array_equal(kernel(params=1), kernel(params=2))


INVALID = [
    ("DepthwiseConv2D", (0,), {}),
    ("DepthwiseConv2D", (3.0,), {}),
    ("DepthwiseConv2D", (3,), {"padding": "full"}),
    ("DepthwiseConv2D", (3,), {"depth_multiplier": True}),
    ("DepthwiseConv1D", (3,), {"data_format": "NHWC"}),
    ("DepthwiseConv2D", (3,), {"activation": "rellu"}),
    ("DepthwiseConv2D", (3,), {"use_bias": 1}),
    ("DepthwiseConv3D", (3,), {"depthwise_initializer": "glorot"}),
    ("DepthwiseConv2D", (3,), {"depthwise_constraint": "nonneg"}),
    ("DepthwiseConv2D", (3,), {"depthwise_regularizer": "l3"}),
    ("DepthwiseConv2D", (3,), {"dtype": "int32"}),
    ("DepthwiseConv2D", (3,), {"implementation": "fast"}),
    ("SeparableConv2D", (0, 3), {}),
    ("SeparableConv2D", (4, 3), {"pointwise_constraint": {"class_name": "Nope", "config": {}}}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), INVALID)
def test_errors_are_linens(name, args, kwargs):
    with pytest.raises((ValueError, TypeError)) as theirs:
        getattr(linen, name)(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(depthwise_jax.nnx, name)(3, *args, **kwargs, rngs=nnx.Rngs(0))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("in_features", [0, -1, 2.0, True, None])
def test_in_features_is_checked(in_features):
    with pytest.raises((ValueError, TypeError), match="in_features"):
        depthwise_jax.nnx.DepthwiseConv2D(in_features, 3, rngs=nnx.Rngs(0))


def test_an_input_with_other_channels_or_too_few_axes_is_refused():
    layer = depthwise_jax.nnx.DepthwiseConv2D(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'kernel' must have the shape \(3, 3, 4, 1\).*got \(3, 3, 3, 1\)"):
        layer(jnp.ones((1, 5, 5, 4)))
    with pytest.raises(ValueError, match=r"at least 3 axes; got the shape \(5, 3\)"):
        layer(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="empty"):
        layer(jnp.ones((1, 2, 2, 3)))


def test_data_format_is_settled_at_construction():
    before = settings.image_data_format()
    settings.set_image_data_format("channels_first")
    try:
        layer = depthwise_jax.nnx.DepthwiseConv2D(3, 3, rngs=nnx.Rngs(0))
    finally:
        settings.set_image_data_format(before)
    assert layer.data_format == "channels_first"
    assert layer(jnp.ones((1, 3, 5, 5))).shape == (1, 3, 3, 3)


def test_from_config_reads_what_keras_writes():
    linen_layer, nnx_layer = both(
        "SeparableConv2D",
        3,
        4,
        3,
        strides=2,
        activation="gelu",
        pointwise_constraint="unit_norm",
        depthwise_regularizer="l1",
    )
    config = linen_layer.get_config()
    for written in (config, {"module": "keras.layers", "class_name": "SeparableConv2D", "config": config}):
        made = depthwise_jax.nnx.SeparableConv2D.from_config(3, written, rngs=nnx.Rngs(0))
        assert made.get_config() == config == nnx_layer.get_config()
    with pytest.raises(ValueError, match="groups"):
        depthwise_jax.nnx.SeparableConv2D.from_config(3, {**config, "groups": 2}, rngs=nnx.Rngs(0))


# --- NNX's transformations ------------------------------------------------------------------------------------------


def constrained(rngs: nnx.Rngs, **kwargs: Any) -> Any:
    kwargs = {"depthwise_constraint": constraints.MaxNorm(0.3, axis="window"), "bias_constraint": "non_neg", **kwargs}
    return depthwise_jax.nnx.DepthwiseConv2D(3, 3, padding="same", rngs=rngs, **kwargs)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = constrained(rngs, depthwise_regularizer=regularizers.L2(0.1))
        self.blocks = nnx.List([depthwise_jax.nnx.SeparableConv2D(3, 3, 2, pointwise_constraint="non_neg", rngs=rngs)])
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(self.first(x))
        return self.head(x.mean((1, 2)))


def test_jit_split_and_merge_keep_the_numbers():
    layer = constrained(nnx.Rngs(0), activation={"class_name": "function", "config": "relu", "module": "builtins"})
    randomize(layer, 0)
    graph, state = nnx.split(layer)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, X), layer(X), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), layer(X))


def test_equal_layers_share_one_trace():
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(None)
        return layer(x)

    padding: Any = [[1, 1], [1, 1]]
    config = {"class_name": "MaxNorm", "config": {"max_value": 0.3}}
    for seed, size in ((0, [3, 3]), (1, (3, 3)), (2, 3)):
        layer = depthwise_jax.nnx.DepthwiseConv2D(
            3,
            size,
            padding=padding,
            depthwise_constraint=config,
            depthwise_regularizer="l2",
            rngs=nnx.Rngs(seed),
        )
        if seed == 1:
            layer(X)  # a layer that was called is no other layer
        run(layer, X)
    assert len(traces) == 1


def test_an_array_as_initializer_goes_through_jit():
    value = np.arange(27.0).reshape(3, 3, 3, 1)
    layer = depthwise_jax.nnx.DepthwiseConv2D(3, 3, depthwise_initializer=value, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], value.astype(np.float32))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, X), layer(X), rtol=1e-5)


def test_grad_is_that_of_the_function():
    layer = constrained(nnx.Rngs(0))
    randomize(layer, 0)
    gradients = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(layer)
    kernel, bias = layer.kernel[...], layer.bias[...]

    def loss(kernel, bias):
        return jnp.sum(depthwise_jax.depthwise_conv(X, kernel, bias, padding="same") ** 2)

    expected = jax.grad(loss, (0, 1))(kernel, bias)
    np.testing.assert_array_equal(gradients["kernel"][...], expected[0])
    np.testing.assert_array_equal(gradients["bias"][...], expected[1])


@nnx.split_rngs(splits=4)
@nnx.vmap
def stack(rngs: nnx.Rngs) -> Any:
    return constrained(rngs, depthwise_regularizer="l2")


def test_vmap_and_scan_over_stacked_layers():
    layers = stack(nnx.Rngs(0))
    randomize(layers, 2)
    assert layers.kernel.shape == (4, 3, 3, 3, 1)

    def single(i, x):
        kernel, bias = layers.kernel[...][i], layers.bias[...][i]
        return depthwise_jax.depthwise_conv(x, kernel, bias, padding="same")

    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    np.testing.assert_allclose(mapped, [single(i, X) for i in range(4)], rtol=1e-5, atol=1e-5)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def chain(x, layer):
        return layer(x)

    expected = X
    for i in range(4):
        expected = single(i, expected)
    np.testing.assert_allclose(chain(X, layers), expected, rtol=1e-4, atol=1e-4)
    # one instance's penalty, summed, and one instance's constraint, each on its own
    kernels = np.asarray(layers.kernel[...], np.float64)
    np.testing.assert_allclose(regularization_loss(layers), 0.01 * np.square(kernels).sum(), rtol=1e-6)
    found = optim.constraints_of(layers)
    assert isinstance(found["kernel"], constraints.Lifted)
    assert found["kernel"].axes == (0,)
    projected = optim.project_params({"kernel": layers.kernel[...], "bias": layers.bias[...]}, found)
    norms = np.sqrt(np.square(kernels).sum((1, 2)))
    expected = kernels * (np.clip(norms, 0, 0.3) / (1e-7 + norms))[:, None, None]
    np.testing.assert_allclose(projected["kernel"], expected, rtol=1e-5)


def test_axes_lifted_elsewhere_are_an_error_not_a_guess():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(out_axes=-1)
    def stacked_last(rngs):
        return constrained(rngs)

    with pytest.raises(ValueError, match=r"'bias' of shape \(3, 4\) must end in the shape \(3,\).*leading"):
        optim.constraints_of(stacked_last(nnx.Rngs(0)))


def test_constraints_are_metadata_and_attributes():
    layer = constrained(nnx.Rngs(0))
    assert layer.depthwise_constraint == layer.kernel.get_metadata()["constraint"] == constraints.MaxNorm(0.3, "window")
    assert layer.bias_constraint == layer.bias.get_metadata()["constraint"] == constraints.NonNeg()
    assert "constraint" not in depthwise_jax.nnx.DepthwiseConv2D(3, 3, rngs=nnx.Rngs(0)).kernel.get_metadata()


def test_constraints_of_a_model():
    model = Network(nnx.Rngs(0))
    found = optim.constraints_of(model)
    assert found == {
        "first": {"kernel": constraints.MaxNorm(0.3, "window"), "bias": constraints.NonNeg()},
        "blocks": {0: {"depthwise_kernel": None, "pointwise_kernel": constraints.NonNeg(), "bias": None}},
        "head": {"kernel": None, "bias": None},
    }
    # another layer's parameter with the same metadata
    model.head.kernel = nnx.Param(jnp.ones((3, 2)), constraint=constraints.Box(-0.1, 0.1))
    assert optim.constraints_of(model)["head"]["kernel"] == constraints.Box(-0.1, 0.1)


def test_training_with_nnx_optimizer_stays_feasible():
    model = Network(nnx.Rngs(0))
    found = optim.constraints_of(model)
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "pointwise_kernel":
            value[...] = jnp.abs(value[...])
    optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(0.1), optim.project(found)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - jnp.array([3.0, -2.0])) ** 2) + regularization_loss(model)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    kernel = np.asarray(model.first.kernel[...], np.float64)
    norms = np.sqrt(np.square(kernel).sum((0, 1)))
    assert norms.max() <= 0.3 * (1 + 4 * np.finfo(np.float32).eps)
    assert norms.max() > 0.29  # the bound was reached
    assert float(model.first.bias[...].min()) >= 0
    assert float(model.blocks[0].pointwise_kernel[...].min()) >= 0


def test_losses():
    layer = constrained(nnx.Rngs(0), depthwise_regularizer=regularizers.L2(0.5), activity_regularizer="l2")
    randomize(layer, 1)
    before = nnx.split(layer)[0]
    y, losses = nnx.capture(layer, Loss)(X)
    np.testing.assert_allclose(
        losses["activity"][...], 0.01 * np.square(np.asarray(y, np.float64)).sum() / 2, rtol=1e-5
    )

    def twice(layer, x):
        return layer(layer(x))

    twofold: Any = nnx.capture(twice, Loss)(layer, X)[1]
    z = np.asarray(layer(y), np.float64)
    expected = 0.01 * (np.square(np.asarray(y, np.float64)).sum() + np.square(z).sum()) / 2
    np.testing.assert_allclose(twofold["activity"][...], expected, rtol=1e-5)
    kernel = np.asarray(layer.kernel[...], np.float64)
    np.testing.assert_allclose(regularization_loss(layer), 0.5 * np.square(kernel).sum(), rtol=1e-6)
    gradient: Any = nnx.grad(regularization_loss)(layer)
    np.testing.assert_allclose(gradient["kernel"][...], kernel, rtol=1e-6)
    layer(X)
    assert nnx.split(layer)[0] == before  # calls leave nothing behind


def test_the_activity_penalty_is_linens_and_differentiable():
    linen_layer, nnx_layer = both("DepthwiseConv2D", 3, 3, activity_regularizer="l1_l2", activation="tanh")
    params = randomize(nnx_layer, 2)

    def ours(layer):
        _, losses = nnx.capture(layer, Loss)(X)
        return losses["activity"][...]

    def theirs(params):
        return linen_layer.apply({"params": params}, X, mutable=["losses"])[1]["losses"]["activity"]

    value, gradient = nnx.value_and_grad(ours)(nnx_layer)
    expected, expected_gradient = jax.value_and_grad(theirs)(params)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient["kernel"][...], expected_gradient["kernel"])


def test_a_shared_layer_counts_once():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.one = constrained(rngs, depthwise_regularizer="l1")
            self.same = self.one

    model = Shared(nnx.Rngs(0))
    kernel = np.asarray(model.one.kernel[...], np.float64)
    np.testing.assert_allclose(regularization_loss(model), 0.01 * np.abs(kernel).sum(), rtol=1e-6)


# --- between Linen and NNX ------------------------------------------------------------------------------------------


def test_bridge_to_linen():
    module = nnx.bridge.to_linen(
        depthwise_jax.nnx.DepthwiseConv2D, 3, 3, depthwise_constraint="non_neg", activation="relu"
    )
    y, variables = module.init_with_output(jax.random.key(0), X)
    params = nn.meta.unbox(variables["params"])
    expected = linen.DepthwiseConv2D(3, activation="relu").apply({"params": params}, X)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(module.apply(variables, X), expected)


def test_bridge_to_nnx():
    layer = linen.DepthwiseConv2D(3, activation="relu", depthwise_constraint="non_neg")
    model = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(X)
    params = {name: getattr(model, name)[...] for name in ("kernel", "bias")}
    np.testing.assert_array_equal(model(X), layer.apply({"params": params}, X))
    native = depthwise_jax.nnx.DepthwiseConv2D(3, 3, activation="relu", rngs=nnx.Rngs(1))
    nnx.update(native, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(native(X), model(X))


def test_partitioning_metadata_of_an_initializer_is_kept():
    init = nnx.with_metadata(nnx.initializers.ones_init(), note="mine")
    layer = depthwise_jax.nnx.DepthwiseConv2D(
        3, 3, depthwise_initializer=init, depthwise_constraint="non_neg", rngs=nnx.Rngs(0)
    )
    assert layer.kernel.get_metadata()["note"] == "mine"
    assert layer.kernel.get_metadata()["constraint"] == constraints.NonNeg()
    np.testing.assert_array_equal(layer.kernel[...], np.ones((3, 3, 3, 1)))
    boxed = nn.with_partitioning(nn.initializers.ones_init(), (None, None, None, None))
    with pytest.raises(TypeError, match=r"_initializer must .*nnx\.with_partitioning.*got Linen's Partitioned"):
        depthwise_jax.nnx.DepthwiseConv2D(3, 3, depthwise_initializer=boxed, rngs=nnx.Rngs(0))


def test_calls_check_the_arguments_once(monkeypatch):
    made = []

    def count(*args: Any) -> Spec:
        made.append(args)
        return Spec(*args)

    layer = constrained(nnx.Rngs(0))
    monkeypatch.setattr(depthwise_jax.nnx, "Spec", count)
    for module in (layer, nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        module(X)
        module.get_config()
    assert not made


@pytest.mark.parametrize(
    "copied", [lambda layer: layer, nnx.clone, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_an_attribute_assigned_after_calls_counts(copied):
    original = constrained(nnx.Rngs(0))
    before = original(X)
    layer = copied(original)
    layer.padding, layer.strides = "valid", 2
    expected = depthwise_jax.depthwise_conv(X, layer.kernel[...], layer.bias[...], strides=2)
    np.testing.assert_array_equal(layer(X), expected)
    assert layer.compute_output_shape(X.shape) == expected.shape
    if layer is not original:
        np.testing.assert_array_equal(original(X), before)
    strides = [1, 1]
    layer.strides = strides
    assert layer.compute_output_shape(X.shape) == (2, 4, 3, 3)
    strides[0] = 2
    assert layer.compute_output_shape(X.shape) == (2, 2, 3, 3)
    layer.padding = "full"
    with pytest.raises(ValueError, match="padding"):
        layer(X)


def test_every_argument_is_an_attribute():
    layer = depthwise_jax.nnx.SeparableConv1D(3, 4, 5, strides=2, padding="SAME", rngs=nnx.Rngs(0))
    assert (layer.in_features, layer.filters, layer.kernel_size, layer.strides) == (3, 4, (5,), (2,))
    assert layer.padding == "same"
    for field in dataclasses.fields(layer):
        assert hasattr(layer, field.name)
