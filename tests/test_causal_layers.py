"""CausalDepthwiseConv1D in Linen and NNX: causal_conv1d with parameters, in the programs that models run it in."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax

import depthwise_jax
from depthwise_jax import linen
from depthwise_jax._contract import fields
from depthwise_jax.constraints import MaxNorm
from depthwise_jax.optim import constraints_of, feasibility, project
from tests.support.assertions import assert_close
from tests.support.documents import CONTINUED, IDS, LENGTH, ROWS, draw

causal_conv1d: Any = depthwise_jax.causal_conv1d
Layer: Any = linen.CausalDepthwiseConv1D
NnxLayer: Any = depthwise_jax.nnx.CausalDepthwiseConv1D
X = draw(ROWS, LENGTH, 6)
STATE = draw(ROWS, 3, 6, seed=1)


def linen_call(arguments: dict[str, Any], parameters: dict[str, Any], *inputs: Any, **context: Any) -> Any:
    return Layer(**arguments).apply({"params": parameters}, *inputs, **context)


def nnx_call(arguments: dict[str, Any], parameters: dict[str, Any], *inputs: Any, **context: Any) -> Any:
    layer = NnxLayer(6, **arguments, rngs=nnx.Rngs(0))
    for name, value in parameters.items():
        getattr(layer, name)[...] = jnp.asarray(value)
    return nnx.jit(lambda layer, inputs, context: layer(*inputs, **context))(layer, inputs, context)


both = pytest.mark.parametrize("call", [linen_call, nnx_call])


@both
def test_the_layer_is_the_function_with_parameters(call: Any) -> None:
    parameters = {"kernel": draw(4, 6, 2), "bias": draw(12)}
    for context in (
        {},
        {"segment_ids": IDS},
        {"state": STATE, "segment_pos": CONTINUED, "lengths": np.arange(ROWS)},
    ):
        ours = call({"depth_multiplier": 2, "activation": "silu"}, parameters, X, **context)
        theirs = causal_conv1d(X, **parameters, activation="silu", **context)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    first = call(
        {"kernel_size": 3, "dilation_rate": 2, "data_format": "channels_first", "use_bias": False},
        {"kernel": draw(3, 6, 1)},
        X.swapaxes(1, 2),
    )
    last = causal_conv1d(X, draw(3, 6, 1), dilation_rate=2)
    for a, b in zip(first, last, strict=True):
        np.testing.assert_allclose(np.swapaxes(a, 1, 2), b, atol=1e-6)


@both
def test_the_state_holds_what_came_in_whatever_dtype_is_computed_in(call: Any) -> None:
    parameters = {"kernel": draw(4, 6, 1), "bias": draw(6)}
    y, state = call({"dtype": jnp.bfloat16}, parameters, X)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state, X[:, -3:])
    y, state = call({}, parameters, X.astype(jnp.bfloat16))
    assert (y.dtype, state.dtype) == (jnp.float32, jnp.bfloat16)
    y, state = call({}, parameters, X.astype(int), STATE)
    assert (y.dtype, state.dtype) == (jnp.float32, jnp.float32)


def test_the_arguments_are_those_of_depthwise_conv_1d_without_strides_and_padding() -> None:
    known = [name for name in fields.names(linen.DepthwiseConv1D) if name not in ("strides", "padding")]
    for layer in (linen.CausalDepthwiseConv1D, depthwise_jax.nnx.CausalDepthwiseConv1D):
        assert list(fields.names(layer)) == known
    defaults = {field.name: field.default for field in dataclasses.fields(linen.DepthwiseConv1D)}
    for field in dataclasses.fields(fields.CausalFields):
        if field.name not in ("kernel_size", "depthwise_initializer"):
            assert field.default == defaults[field.name], field.name
    assert Layer().kernel_size == 4
    assert depthwise_jax.CausalDepthwiseConv1D is linen.CausalDepthwiseConv1D
    layer = NnxLayer(6, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (4, 6, 1)
    assert not hasattr(layer, "padding")
    with pytest.raises(TypeError, match="strides"):
        Layer(strides=2)
    for arguments, name in (({"kernel_size": 0}, "kernel_size"), ({"use_bias": 1}, "use_bias")):
        with pytest.raises((TypeError, ValueError), match=name):
            Layer(**arguments)
        with pytest.raises((TypeError, ValueError), match=name):
            NnxLayer(6, **arguments, rngs=nnx.Rngs(0))


def test_initial_values_beside_torch(torch: Any) -> None:
    channels = 1024
    theirs = torch.nn.Conv1d(channels, channels, 4, groups=channels).weight.detach().numpy()
    variables = Layer().init(jax.random.key(0), jnp.ones((1, 4, channels)))
    ours = np.asarray(variables["params"]["kernel"])
    assert ours.std() == pytest.approx(theirs.std(), rel=0.05)
    assert abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.01)


def test_initial_values_are_pytorchs() -> None:
    # torch.nn.Conv1d draws uniformly within 1/sqrt(fan in), and its fan in is the window.
    window, channels = 4, 1024
    x = jnp.ones((1, window, channels))

    def kernel(**arguments: Any) -> np.ndarray:
        return np.asarray(Layer(**arguments).init(jax.random.key(0), x)["params"]["kernel"])

    for ours in (kernel(), kernel(depthwise_initializer=None), np.asarray(NnxLayer(channels, rngs=nnx.Rngs(0)).kernel)):
        assert ours.std() == pytest.approx((3 * window) ** -0.5, rel=0.05)
        assert np.abs(ours).max() == pytest.approx(window**-0.5, rel=0.01)
        assert np.abs(ours).max() <= window**-0.5
    # docs/sequences.md has these figures.
    lecun = depthwise_jax.initializers.LecunNormal
    flax_layer = nn.Conv(channels, (4,), feature_group_count=channels)
    flax_kernel = flax_layer.init(jax.random.key(0), x)["params"]["kernel"]
    with pytest.warns(UserWarning, match="sqrt"):
        foreign = kernel(depthwise_initializer=nn.initializers.lecun_normal())
    for value, std in (
        (kernel(depthwise_initializer="glorot_uniform"), 0.022),
        (kernel(), 0.29),
        (kernel(depthwise_initializer=lecun(fan="window")), 0.5),
        (np.asarray(flax_kernel), 0.5),
        (foreign, 0.5 / np.sqrt(channels)),
    ):
        assert value.std() == pytest.approx(std, rel=0.05)


def test_shapes_states_and_configurations() -> None:
    layer, own = Layer(depth_multiplier=2, dilation_rate=2), NnxLayer(6, dilation_rate=2, rngs=nnx.Rngs(0))
    assert layer.compute_output_shape((None, None, 6)) == (None, None, 12)
    assert layer.compute_output_shape((2, 0, 6)) == (2, 0, 12)
    assert own.compute_output_shape((2, 1, 6)) == (2, 1, 6)
    for made in (layer, own):
        assert (made.initial_state(X.shape).shape, made.initial_state(X.shape).dtype) == ((ROWS, 6, 6), jnp.float32)
        assert made.initial_state(X.shape, jnp.bfloat16).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="Keras has no CausalDepthwiseConv1D"):
            made.get_config()
        with pytest.raises(ValueError, match="the input of CausalDepthwiseConv1D must have shape"):
            made.initial_state((6,))
    assert Layer(data_format="channels_first").initial_state((2, 6, 9)).shape == (2, 6, 3)
    assert Layer(dtype=jnp.float16).initial_state((2, 9, 6)).dtype == jnp.float16
    arguments = {"kernel_size": 3, "depthwise_constraint": "max_norm", "activation": "silu"}
    assert linen.CausalDepthwiseConv1D.from_config(arguments).kernel_size == 3
    assert NnxLayer.from_config(6, arguments, rngs=nnx.Rngs(0)).kernel.shape == (3, 6, 1)


@pytest.mark.parametrize("layer", [Layer(), NnxLayer(6, rngs=nnx.Rngs(0))])
def test_an_input_without_its_time_axis(layer: Any) -> None:
    call = layer if isinstance(layer, nnx.Module) else lambda *inputs: layer.init(jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match="time axis"):
        call(X[:, 0], STATE)


def test_penalties_and_constraints() -> None:
    arguments = {"depthwise_regularizer": "l2", "activity_regularizer": "l1", "depthwise_constraint": MaxNorm(0.1)}
    layer = Layer(**arguments)
    variables = layer.init(jax.random.key(0), X)
    (y, _), sown = layer.apply(variables, X, mutable="losses")
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    assert sown["losses"]["kernel"] == pytest.approx(0.01 * (kernel**2).sum(), rel=1e-5)
    assert sown["losses"]["activity"] == pytest.approx(0.01 * abs(np.asarray(y)).sum() / ROWS, rel=1e-5)
    expected = pytest.approx(0.01 * (kernel**2).sum(), rel=1e-5)
    assert linen.regularization_loss(layer, variables["params"], X) == expected
    own = NnxLayer(6, **arguments, rngs=nnx.Rngs(0))
    own.kernel[...] = variables["params"]["kernel"]
    assert depthwise_jax.nnx.regularization_loss(own) == expected
    _, captured = nnx.capture(own, depthwise_jax.nnx.Loss)(X)
    assert jax.tree.leaves(captured)[0] == pytest.approx(float(sown["losses"]["activity"]), rel=1e-5)
    constraints = constraints_of(layer, X)
    tx = optax.chain(optax.sgd(0.1), project(constraints))
    params = variables["params"]
    gradients = jax.grad(lambda params: layer.apply({"params": params}, X, segment_ids=IDS)[0].sum())(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    report = feasibility(optax.apply_updates(params, updates), constraints)
    assert max(float(v) for v in jax.tree.leaves(report)) < 1e-6


class Block(nn.Module):
    """A layer of a small model, for nn.scan: the state goes in and out with the layer's parameters."""

    dtype: Any = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Any, state: Any, context: dict[str, Any]) -> Any:
        y, state = Layer(dtype=self.dtype, activation="silu", use_bias=self.use_bias)(x, state, **context)
        return x + y, state


def stack(layers: int, **arguments: Any) -> Any:
    scan: Any = nn.scan
    scanned = scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=layers,
    )
    return scanned(**arguments)


def test_layers_in_a_scan_decode_what_they_compute_at_once() -> None:
    """One parameter tree and one array of states for all layers, and a scan over tokens around it; exported too."""
    model, states = stack(3), jnp.zeros((3, ROWS, 3, 6))
    variables = model.init(jax.random.key(0), X, states, {})
    whole, last = jax.jit(model.apply)(variables, X, states, {})

    def decode(states: Any, tokens: Any) -> Any:
        def step(states: Any, token: Any) -> Any:
            y, states = model.apply(variables, token[:, None], states, {})
            return states, y[:, 0]

        return lax.scan(step, states, tokens)

    tokens = jnp.moveaxis(X, 1, 0)
    after, y = jax.jit(decode)(states, tokens)
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 1), whole, atol=1e-5)
    np.testing.assert_allclose(after, last, atol=1e-5)
    (length,) = export.symbolic_shape("l")
    exported = export.export(jax.jit(model.apply))(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables),
        jax.ShapeDtypeStruct((ROWS, length, 6), "float32"),
        jax.ShapeDtypeStruct(states.shape, "float32"),
        {"segment_pos": jax.ShapeDtypeStruct((ROWS, length), "int32")},
    )
    for n in (2, LENGTH):
        context = {"segment_pos": CONTINUED[:, :n].astype(np.int32)}
        ours, theirs = (f(variables, X[:, :n], states, context) for f in (exported.call, model.apply))
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)


def test_one_nnx_program_serves_all_steps() -> None:
    layer, traces = NnxLayer(6, rngs=nnx.Rngs(0)), []

    @nnx.jit
    def step(layer: Any, token: Any, state: Any) -> Any:
        traces.append(1)
        return layer(token, state)

    state, outputs = layer.initial_state(X.shape), []
    for t in range(LENGTH):
        y, state = step(layer, X[:, t : t + 1], state)
        outputs.append(y)
    assert len(traces) == 1
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), layer(X)[0], atol=1e-6)


def test_packing_at_the_size_of_real_training() -> None:
    """16 documents in rows of 2,048, 12 layers, bfloat16: the gradients are those of the documents apart."""
    row, channels, layers = 2048, 16, 12
    lengths = np.random.default_rng(0).integers(30, 1000, 16)
    rows: list[list[int]] = []  # the documents of each row, first fit
    for document, n in enumerate(lengths):
        fits = next((r for r in rows if lengths[r].sum() + n <= row), None)
        if fits is None:
            rows.append(fits := [])
        fits.append(document)
    assert len(rows) < 16 / 2
    packed, apart = np.zeros((len(rows), row, channels), np.float32), np.zeros((16, 1024, channels), np.float32)
    targets_packed, targets_apart = np.zeros_like(packed), np.zeros_like(apart)
    ids = np.full((len(rows), row), -1)
    for r, documents in enumerate(rows):
        start = 0
        for document in documents:
            n = int(lengths[document])
            ids[r, start : start + n] = document
            for array, other, seed in ((packed, apart, 2), (targets_packed, targets_apart, 3)):
                other[document, :n] = array[r, start : start + n] = draw(n, channels, seed=100 * seed + document)
            start += n
    # Without a bias, the gradient of which XLA's CPU compiler sums in bfloat16.
    model = stack(layers, dtype=jnp.bfloat16, use_bias=False)
    params = model.init(jax.random.key(0), packed[:1, :8], None, {})

    def loss(params: Any, x: Any, targets: Any, context: dict[str, Any]) -> Any:
        y, _ = model.apply(params, x.astype(jnp.bfloat16), None, context)
        return (y.astype(jnp.float32) * targets).sum() / lengths.sum()

    gradient = jax.jit(jax.grad(loss))
    together = gradient(params, packed, targets_packed, {"segment_ids": ids})
    leaking = gradient(params, packed, targets_packed, {})
    expected = gradient(params, apart, targets_apart, {})
    for ours, theirs, leaky in zip(*map(jax.tree.leaves, (together, expected, leaking)), strict=True):
        truth = np.asarray(theirs, np.float64)
        assert_close(ours, truth, 2.0**-7)
        assert np.abs(np.asarray(leaky) - truth).max() > 4 * 2.0**-7 * np.abs(truth).max()
