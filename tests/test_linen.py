"""The layers as Flax modules: parameters, dtypes, losses, lifting, sharding annotations, summaries."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.summary import tabulate

import depthwise_jax
from depthwise_jax import depthwise_conv, initializers, linen, regularizers, separable_conv
from depthwise_jax._core import introspect
from depthwise_jax.linen import regularization_loss
from tests.support.layers import DepthwiseConv1D, DepthwiseConv2D, DepthwiseConv3D, SeparableConv2D

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 6, 3))
PENALIZED = {"depthwise_regularizer": regularizers.L2(0.5), "bias_regularizer": regularizers.L1(0.25)}


def penalty_of(params):
    """The penalty of PENALIZED in float64."""
    return (
        0.5 * np.square(np.asarray(params["kernel"], np.float64)).sum()
        + 0.25 * np.abs(np.asarray(params["bias"], np.float64)).sum()
    )


def randomized(params, seed=7):
    """Random values in place of the initial ones, whose biases are 0; shapes will do."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def random_params(model, x, method=None):
    """Random parameters of a model, nothing compiled."""
    return randomized(jax.eval_shape(lambda: model.init(KEY, x, method=method))["params"])


def test_the_top_level_names_are_these_layers():
    for name in ("DepthwiseConv1D", "DepthwiseConv2D", "DepthwiseConv3D", "SeparableConv1D", "SeparableConv2D"):
        assert getattr(depthwise_jax, name) is getattr(linen, name)


# positional order as in Keras, then Flax's own
def test_positional_arguments_come_in_keras_order():
    layer = DepthwiseConv2D(
        2, 1, "same", 3, "channels_last", 2, "relu", False, "ones", "zeros", "l1", "l2", "l1", "non_neg", "max_norm"
    )
    assert layer.depth_multiplier == 3
    assert (layer.depthwise_regularizer, layer.bias_regularizer, layer.activity_regularizer) == ("l1", "l2", "l1")
    assert (layer.depthwise_constraint, layer.bias_constraint, layer.dtype) == ("non_neg", "max_norm", None)
    separable = SeparableConv2D(
        4, 2, 1, "same", "channels_last", 2, 3, "relu", True, "ones", "he_normal", "zeros", "l1", "l2", "l1l2", None,
        "non_neg", "unit_norm", "max_norm", "float32",
    )  # fmt: skip
    assert (separable.filters, separable.depth_multiplier, separable.pointwise_initializer) == (4, 3, "he_normal")
    assert (separable.pointwise_regularizer, separable.pointwise_constraint) == ("l2", "unit_norm")
    assert (separable.bias_constraint, separable.dtype) == ("max_norm", "float32")


def test_a_layer_is_a_call_of_the_function():
    layer = DepthwiseConv2D(3, (1, 2), "reflect", 2, activation="gelu", precision="highest", implementation="conv")
    params = random_params(layer, X)
    np.testing.assert_array_equal(
        layer.apply({"params": params}, X),
        depthwise_conv(
            X, params["kernel"], params["bias"], strides=(1, 2), padding="reflect", activation="gelu",
            precision="highest", implementation="conv",
        ),
    )  # fmt: skip
    layer = SeparableConv2D(4, 3, padding=((0, 1), (2, 0)), dilation_rate=(1, 2), use_bias=False)
    params = layer.init(KEY, X)["params"]
    assert set(params) == {"depthwise_kernel", "pointwise_kernel"}
    np.testing.assert_array_equal(
        layer.apply({"params": params}, X),
        separable_conv(X, *params.values(), padding=((0, 1), (2, 0)), dilation_rate=(1, 2)),
    )


@pytest.mark.parametrize("padding", ["causal", "Circular", 1, ((2, 0),)])
def test_paddings_beyond_keras(padding):
    layer = DepthwiseConv1D(3, padding=padding)
    y, variables = layer.init_with_output(KEY, X[0])
    np.testing.assert_array_equal(y, depthwise_conv(X[0], variables["params"]["kernel"], padding=padding))
    assert layer.compute_output_shape((None, *X[0].shape[1:]))[1:] == y.shape[1:]


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("layer", [DepthwiseConv2D(3, data_format="channels_first"), SeparableConv2D(4, 3)])
def test_any_number_of_batch_axes(layer, batch):
    x = jax.random.normal(KEY, (*batch, 4, 5, 3))
    y, variables = layer.init_with_output(KEY, x)
    flat = layer.apply(variables, x.reshape(-1, 4, 5, 3))
    np.testing.assert_allclose(y.reshape(flat.shape), flat, rtol=1e-6, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == y.shape


def test_lists_and_numpy_arrays_are_inputs():
    layer = DepthwiseConv1D(2, use_bias=False, depthwise_initializer="ones")
    y, _ = layer.init_with_output(KEY, [[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(y, [[3.0], [5.0]])


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "input_dtype", "expected"),
    [
        (None, "float32", "float32", "float32"),
        (None, "float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float16", "float32", "float32", "float16"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        (None, "bfloat16", "bfloat16", "bfloat16"),
        (None, "bfloat16", "int32", "bfloat16"),
        ("bfloat16", "float32", "uint8", "bfloat16"),
    ],
)
def test_dtypes(dtype, param_dtype, input_dtype, expected):
    def make(**kwargs):
        return SeparableConv2D(2, 3, **kwargs)

    layer = make(dtype=dtype, param_dtype=param_dtype, activity_regularizer="l2", depthwise_regularizer="l2")
    x = (4 * X).astype(input_dtype)
    variables = {"params": random_params(layer, x)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}
    y, state = layer.apply(variables, x, mutable=["losses"])
    assert y.dtype == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    reference = make().apply(
        jax.tree.map(lambda p: p.astype(jnp.float32), variables), x.astype(jnp.float32)
    )  # in float32 throughout
    tolerance = 1e-5 if expected == "float32" else 0.05
    np.testing.assert_allclose(y.astype(jnp.float32), reference, rtol=tolerance, atol=tolerance * 4)
    loss = jax.grad(lambda p: layer.apply({"params": p}, x).astype(jnp.float32).sum())
    gradients = jax.eval_shape(loss, variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}


def test_float64_input_is_promoted_unless_a_dtype_is_given():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        for dtype, expected in ((None, jnp.float64), ("float32", jnp.float32)):
            y, variables = DepthwiseConv2D(3, dtype=dtype).init_with_output(KEY, x)
            assert y.dtype == expected
            assert variables["params"]["kernel"].dtype == jnp.float32


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_are_sown_where_they_are_asked_for_and_init_has_none():
    layer = DepthwiseConv2D(3, activation="relu", activity_regularizer=regularizers.L2(0.5), **PENALIZED)
    variables = layer.init(KEY, X)
    assert set(variables) == {"params"}
    params = randomized(variables["params"])
    y = layer.apply({"params": params}, X)  # a plain call sows nothing
    _, state = layer.apply({"params": params}, X, mutable=["losses"])
    losses = state["losses"]
    np.testing.assert_allclose(losses["kernel"] + losses["bias"], penalty_of(params), rtol=1e-6)
    np.testing.assert_allclose(losses["activity"], 0.5 * np.square(y).sum() / 2, rtol=1e-6)
    np.testing.assert_allclose(regularization_loss(layer, params, X), penalty_of(params), rtol=1e-6)


def test_no_regularizer_no_collection():
    layer = DepthwiseConv2D(3)
    _, state = layer.apply(layer.init(KEY, X), X, mutable=["losses"])
    assert not state
    assert regularization_loss(layer, layer.init(KEY, X)["params"], X) == 0


@pytest.mark.parametrize(
    ("shape", "batch"), [((5, 6, 3), 1), ((2, 5, 6, 3), 2), ((2, 3, 5, 6, 3), 6), ((0, 5, 6, 3), 0)]
)
def test_the_activity_loss_is_divided_by_the_product_of_the_leading_axes(shape, batch):
    layer = DepthwiseConv2D(3, activity_regularizer=regularizers.L1(1.0))
    x = jax.random.normal(KEY, shape)
    y, state = layer.apply(layer.init(KEY, x), x, mutable=["losses"])
    expected = np.abs(y).sum() / batch if batch else 0.0
    np.testing.assert_allclose(state["losses"]["activity"], expected, rtol=1e-6)


class Shared(nn.Module):
    calls: int

    @nn.compact
    def __call__(self, x):
        layer = DepthwiseConv2D(
            3,
            padding="same",
            activity_regularizer=regularizers.L1(1.0),
            depthwise_constraint="non_neg",
            **PENALIZED,
        )
        for _ in range(self.calls):
            x = layer(x)
        return x


def shared(calls) -> Any:
    return Shared(calls)


def test_a_shared_layer_counts_its_weights_once_and_its_outputs_at_each_call():
    params = random_params(shared(2), X)
    first = shared(1).apply({"params": params}, X)
    second, state = shared(2).apply({"params": params}, X, mutable=["losses"])
    losses = state["losses"]["DepthwiseConv2D_0"]
    np.testing.assert_allclose(losses["kernel"] + losses["bias"], penalty_of(params["DepthwiseConv2D_0"]), rtol=1e-6)
    np.testing.assert_allclose(losses["activity"], (np.abs(first).sum() + np.abs(second).sum()) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        regularization_loss(shared(2), params, X), penalty_of(params["DepthwiseConv2D_0"]), rtol=1e-6
    )


def test_the_regularization_loss_is_differentiable_and_compiles():
    layer = DepthwiseConv2D(3, **PENALIZED)
    params = random_params(layer, X)
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    gradient = jax.jit(jax.grad(lambda p: regularization_loss(layer, p, spec)))(params)
    np.testing.assert_allclose(gradient["kernel"], params["kernel"], rtol=1e-6)
    np.testing.assert_allclose(gradient["bias"], 0.25 * jnp.sign(params["bias"]), rtol=1e-6)


# --- lifting --------------------------------------------------------------------------------------------------------


def layer_for_lifting():
    return DepthwiseConv2D(3, padding="same", depthwise_constraint="non_neg", **PENALIZED)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(layer_for_lifting()(x))


class BlockBySetup(nn.Module):
    def setup(self):
        self.layer = layer_for_lifting()

    def __call__(self, x, scale: bool = False):
        return self.layer(x) * (2 if scale else 1)

    def twice(self, x):
        return self.layer(self.layer(x))


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": self.axis, "losses": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(Block(), x, None)[0]


def vmapped(module, params: int | None = 0):
    return nn.vmap(
        module,
        variable_axes={"params": params, "losses": 0},
        split_rngs={"params": params is not None},
    )


class Normalised(nn.Module):
    wrapper: Any
    options: Any = None

    @nn.compact
    def __call__(self, x):
        return self.wrapper(layer_for_lifting())(x, **(self.options or {}))


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = layer_for_lifting()

        def negative(_, x) -> Any:
            return jnp.sum(x) < 0

        return nn.while_loop(negative, lambda _, x: layer(x) + 1, layer, layer(x))


STACK = jnp.stack([X, 2 * X])
# model, input, method, and (path, lifted axes) of the layer
MODELS = {
    "alone": (layer_for_lifting(), X, None, [((), ())]),
    "sequential": (
        nn.Sequential([Block(), nn.relu, layer_for_lifting()]),
        X,
        None,
        [(("layers_0", "DepthwiseConv2D_0"), ()), (("layers_2",), ())],
    ),
    "setup": (BlockBySetup(), X, None, [(("layer",), ())]),
    "method": (BlockBySetup(), X, BlockBySetup.twice, [(("layer",), ())]),
    "method by name": (BlockBySetup(), X, "twice", [(("layer",), ())]),
    "shared": (Shared(3), X, None, [(("DepthwiseConv2D_0",), ())]),
    "spectral norm": (Normalised(nn.SpectralNorm, {"update_stats": True}), X, None, [(("DepthwiseConv2D_0",), ())]),
    "weight norm": (Normalised(nn.WeightNorm), X, None, [(("DepthwiseConv2D_0",), ())]),
    "while loop": (Repeated(), X, None, [(("DepthwiseConv2D_0",), ())]),
    "remat": (nn.remat(Block)(), X, None, [(("DepthwiseConv2D_0",), ())]),
    "jit": (nn.jit(Block)(), X, None, [(("DepthwiseConv2D_0",), ())]),
    "scan": (Scanned(), X, None, [(("Block_0", "DepthwiseConv2D_0"), (0,))]),
    "scan along another axis": (Scanned(axis=1), X, None, [(("Block_0", "DepthwiseConv2D_0"), (1,))]),
    "vmap": (vmapped(Block)(), STACK, None, [(("DepthwiseConv2D_0",), (0,))]),
    "vmap along the last axis": (vmapped(Block, params=-1)(), STACK, None, [(("DepthwiseConv2D_0",), (-1,))]),
    "vmap with shared parameters": (vmapped(Block, params=None)(), STACK, None, [(("DepthwiseConv2D_0",), ())]),
    "vmap of scan": (vmapped(Scanned, params=1)(axis=1), STACK, None, [(("Block_0", "DepthwiseConv2D_0"), (1, 2))]),
}


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize("name", MODELS)
def test_lifted_parameters_are_found_with_their_axes_and_their_penalty_is_the_sum_of_the_instances(name):
    model, x, method, layers = MODELS[name]
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = random_params(model, x, method)
    found = introspect.collect(model, spec, method=method)
    tree = jax.tree.map(lambda _: None, params)
    assert jax.tree.structure(found, is_leaf=lambda f: f is None) == jax.tree.structure(
        tree, is_leaf=lambda f: f is None
    )
    expected = 0.0
    for path, axes in layers:
        for parameter, instance_shape in (("kernel", (3, 3, 3, 1)), ("bias", (3,))):
            entry, value = at(found, path)[parameter], np.asarray(at(params, path)[parameter])
            axes_here = tuple(axis % value.ndim for axis in axes)
            assert (entry.shape, entry.instance_shape) == (value.shape, instance_shape)
            assert entry.lifted_axes == axes_here
            assert np.delete(value.shape, axes_here).tolist() == list(instance_shape)
            assert (entry.constraint is None) == (parameter == "bias")
        expected += penalty_of(at(params, path))  # a sum over all elements, so over all instances
    np.testing.assert_allclose(regularization_loss(model, params, spec, method=method), expected, rtol=1e-5)
    assert jax.tree.structure(random_params(model, x, method)) == jax.tree.structure(params)  # no box is left


@pytest.mark.parametrize("name", ["scan", "vmap", "remat", "jit", "sequential"])
def test_losses_are_sown_under_lifting(name):
    model, x, _, layers = MODELS[name]
    params = random_params(model, x)
    _, state = model.apply({"params": params}, x, mutable=["losses"])
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(total, sum(penalty_of(at(params, path)) for path, _ in layers), rtol=1e-5)


def test_without_lifting_the_losses_nothing_is_sown_and_the_pure_loss_still_counts():
    model = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True})()
    params = random_params(model, STACK)
    _, state = model.apply({"params": params}, STACK, mutable=["losses"])
    assert not state
    expected = penalty_of(params["DepthwiseConv2D_0"])
    np.testing.assert_allclose(regularization_loss(model, params, STACK), expected, rtol=1e-5)


def test_keyword_arguments_that_are_not_arrays_stay_as_they_are():
    found = introspect.collect(BlockBySetup(), X, scale=True)
    assert found["layer"]["kernel"].shape == (3, 3, 3, 1)


def test_found_penalties_of_instances_of_one_regularizer_that_is_no_sum():
    def largest(w):
        return jnp.max(jnp.abs(w))

    model = vmapped(DepthwiseConv2D)(3, depthwise_regularizer=largest)
    params = random_params(model, STACK)
    expected = np.abs(np.asarray(params["kernel"])).max(axis=(1, 2, 3, 4)).sum()
    np.testing.assert_allclose(regularization_loss(model, params, STACK), expected, rtol=1e-6)


def test_models_without_these_layers_have_nothing_to_find():
    found = introspect.collect(nn.Dense(3), X)
    assert found == {"kernel": None, "bias": None}
    assert introspect.collect(nn.Sequential([nn.relu]), X) == {}


def test_unhashable_callables_are_found():
    class Bounds:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, w):
            return jnp.clip(w, -1.0, 1.0)

    bounds = Bounds()
    found = introspect.collect(nn.Sequential([DepthwiseConv2D(3, depthwise_constraint=bounds)]), X)
    assert found["layers_0"]["kernel"].constraint is bounds


@pytest.mark.parametrize("value", [1, 2.5])
def test_per_instance_maps_over_the_lifted_axes(value):
    whole = jnp.arange(24.0).reshape(2, 3, 4) * value
    lifted = introspect.per_instance(lambda w: w / jnp.sum(w), (0, 2))(whole)
    np.testing.assert_allclose(lifted, whole / jnp.sum(whole, axis=1, keepdims=True), rtol=1e-6)
    sums = introspect.per_instance(jnp.sum, (0, 2), reduces=True)(whole)
    np.testing.assert_allclose(np.sort(sums.ravel()), np.sort(np.asarray(jnp.sum(whole, axis=1)).ravel()))


# --- Flax's tools ---------------------------------------------------------------------------------------------------


def partitioned():
    names = ("height", "width", "channels", None)
    return DepthwiseConv2D(
        3,
        padding="same",
        depthwise_initializer=nn.with_logical_partitioning(initializers.HeNormal(), names),
        bias_initializer=nn.with_partitioning(initializers.Zeros(), ("channels",)),
        **PENALIZED,
    )


def test_logically_partitioned_initializers():
    layer = partitioned()
    variables = layer.init(KEY, X)
    assert nn.get_partition_spec(variables)["params"] == {
        "kernel": jax.P("height", "width", "channels", None),
        "bias": jax.P("channels"),
    }
    plain = nn.meta.unbox(variables)
    np.testing.assert_array_equal(layer.apply(variables, X), layer.apply(plain, X))
    for params in (variables["params"], plain["params"]):
        np.testing.assert_allclose(regularization_loss(layer, params, X), penalty_of(plain["params"]), rtol=1e-6)


def test_partitioned_initializers_under_lifting_name_the_lifted_axis():
    model = nn.vmap(
        nn.remat(DepthwiseConv2D),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "stack"},
    )(
        **{
            name: getattr(partitioned(), name)
            for name in ("kernel_size", "padding", "depthwise_initializer", *PENALIZED)
        }
    )
    variables = model.init(KEY, STACK)
    spec = nn.get_partition_spec(variables)["params"]["kernel"]
    assert spec == jax.P("stack", "height", "width", "channels", None)
    assert introspect.collect(model, STACK)["kernel"].lifted_axes == (0,)


def test_tabulate_shows_the_layer_and_its_parameters():
    table = tabulate(SeparableConv2D(4, 3), KEY, console_kwargs={"width": 200})(X)
    for part in ("SeparableConv2D", "depthwise_kernel", "pointwise_kernel", "bias", "[3,3,3,1]", "[1,1,3,4]"):
        assert part in table


def test_the_profile_names_the_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DepthwiseConv2D(3, name="stem")(x)

    text = jax.jit(Model().init_with_output).lower(KEY, X).as_text(debug_info=True)
    assert "Model/stem" in text


def test_layers_compare_clone_and_bind_like_any_module():
    layer = DepthwiseConv2D(3, padding="same", data_format="channels_last")
    assert layer == DepthwiseConv2D(3, padding="same", data_format="channels_last")
    assert layer.clone(kernel_size=5).kernel_size == 5
    with pytest.raises(ValueError, match="kernel_size"):
        layer.clone(kernel_size=0)
    bound = layer.bind(layer.init(KEY, X))
    np.testing.assert_array_equal(bound(X), layer.apply(bound.variables, X))


@pytest.mark.parametrize(
    "layer",
    [
        DepthwiseConv1D(3, 2, activation="swish", depthwise_constraint="max_norm", dtype="bfloat16"),
        DepthwiseConv2D((3, 2), padding="SAME", depth_multiplier=2, use_bias=False, activity_regularizer="l1_l2"),
        SeparableConv2D(4, 3, depthwise_initializer=initializers.HeNormal(3, fan="window"), name="separable"),
        SeparableConv2D(
            4, 3, pointwise_regularizer="l2", bias_constraint="non_neg", dtype="float16", param_dtype="float16"
        ),
    ],
)
def test_a_configuration_makes_the_same_layer(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    x = X if "2D" in type(layer).__name__ else X[0]
    y, variables = layer.init_with_output(KEY, x)
    other, other_variables = again.init_with_output(KEY, x)
    np.testing.assert_array_equal(y, other)
    chex.assert_trees_all_equal(variables, other_variables)
    assert y.dtype == other.dtype


def test_a_frozen_keras_layer_is_read_with_a_warning():
    with pytest.warns(UserWarning, match=r"trainable=False.*optax"):
        assert DepthwiseConv2D.from_config({"kernel_size": 3, "trainable": False}).kernel_size == 3


def test_3d_reads_a_configuration_though_it_writes_none():
    assert DepthwiseConv3D.from_config({"kernel_size": [3, 2, 1]}).kernel_size == (3, 2, 1)


def test_the_first_random_initialization_has_keras_distribution():
    kernel = DepthwiseConv2D(3).init(KEY, jnp.zeros((1, 3, 3, 512)))["params"]["kernel"]
    limit = np.sqrt(6 / (9 * 513))  # fan_in 9 * 512, fan_out 9
    assert np.abs(kernel).max() == pytest.approx(limit, rel=0.01)
    assert np.std(kernel) == pytest.approx(limit / np.sqrt(3), rel=0.03)


def test_losses_with_a_symbolic_batch():
    layer = DepthwiseConv2D(3, activity_regularizer="l2")
    params = random_params(layer, X)

    def run(params, x):
        return layer.apply({"params": params}, x, mutable=["losses"])

    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(run))(params, jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype))
    for actual, expected in zip(
        jax.tree.leaves(exported.call(params, X)), jax.tree.leaves(run(params, X)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
