"""A model moved over from Keras trains as it did there, step by step, and computes the same in mixed precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthwise_jax import linen, optim
from workloads.keras_reference import keras

STEPS = 50
LEARNING_RATE, MOMENTUM = 0.05, 0.9


def keras_model(shape):
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.DepthwiseConv2D(
                3,
                padding="same",
                depth_multiplier=2,
                activation="tanh",
                depthwise_regularizer=keras.regularizers.L2(0.02),
                bias_regularizer=keras.regularizers.L1(0.01),
                activity_regularizer=keras.regularizers.L2(0.001),
                depthwise_constraint=keras.constraints.MaxNorm(0.4, axis=[0, 1]),
                bias_constraint="non_neg",
            ),
            layers.SeparableConv2D(
                4,
                2,
                strides=2,
                activation="elu",
                depthwise_regularizer="l2",
                pointwise_regularizer=keras.regularizers.L1L2(0.001, 0.002),
                depthwise_constraint=keras.constraints.MinMaxNorm(0.2, 0.5, rate=0.5, axis=[0, 1]),
                pointwise_constraint=keras.constraints.UnitNorm(axis=2),
            ),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


def weights_of(model):
    """Keras' own get_weights meets a deprecation of NumPy's."""
    return [np.asarray(variable.value) for variable in model.weights]


class Moved(nn.Module):
    """The same model, its layers made from Keras' configurations."""

    configs: tuple

    @nn.compact
    def __call__(self, x):
        depthwise, separable = self.configs
        x = linen.DepthwiseConv2D.from_config(depthwise)(x)
        x = linen.SeparableConv2D.from_config(separable)(x)
        return nn.Dense(2, name="dense")(x.mean(axis=(1, 2)))


def test_fifty_steps_with_regularizers_and_constraints():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, 8, 7, 6, 3)).astype(np.float32)
    targets = rng.normal(size=(STEPS, 8, 2)).astype(np.float32)

    theirs = keras_model(x.shape[2:])
    theirs.set_weights([rng.normal(scale=0.4, size=w.shape).astype(np.float32) for w in weights_of(theirs)])
    ours = Moved(tuple(keras.saving.serialize_keras_object(layer) for layer in theirs.layers[:2]))
    shapes = jax.eval_shape(ours.init, jax.random.key(0), x[0])["params"]
    names = [layer.name for layer in theirs.layers[:2]]
    kernel, bias, *separable, dense_kernel, dense_bias = map(jnp.asarray, weights_of(theirs))
    params = {
        names[0]: {"kernel": kernel, "bias": bias},
        names[1]: dict(zip(("depthwise_kernel", "pointwise_kernel", "bias"), separable, strict=True)),
        "dense": {"kernel": dense_kernel, "bias": dense_bias},
    }
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    theirs.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), loss="mse")
    their_losses = [float(theirs.train_on_batch(*batch)) for batch in zip(x, targets, strict=True)]

    tx = optax.chain(optax.sgd(LEARNING_RATE, MOMENTUM), optim.project(optim.constraints_of(ours, x[0])))

    def total_loss(params, x, targets):
        y, state = ours.apply({"params": params}, x, mutable=["losses"])
        return jnp.mean(jnp.square(y - targets)) + sum(jax.tree.leaves(state["losses"]))

    def step(carry, batch):
        params, state = carry
        loss, gradients = jax.value_and_grad(total_loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (trained, _), our_losses = jax.jit(lambda carry, data: jax.lax.scan(step, carry, data))(
        (params, tx.init(params)), (x, targets)
    )
    moved = [
        *(trained[names[0]][name] for name in ("kernel", "bias")),
        *(trained[names[1]][name] for name in ("depthwise_kernel", "pointwise_kernel", "bias")),
        *(trained["dense"][name] for name in ("kernel", "bias")),
    ]
    initial = (kernel, bias, *separable, dense_kernel, dense_bias)
    for mine, theirs_now, before in zip(moved, weights_of(theirs), initial, strict=True):
        assert np.max(np.abs(theirs_now - before)) > 1e-2  # they did train
        np.testing.assert_allclose(mine, theirs_now, atol=1e-4, rtol=0)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["DepthwiseConv2D", "SeparableConv1D"])
def test_mixed_precision_is_keras_own(name, policy):
    arguments = {"kernel_size": 3, "padding": "same", "activation": "relu", "activity_regularizer": "l2"}
    if name == "SeparableConv1D":
        arguments["filters"] = 4
    theirs = getattr(keras.layers, name)(**arguments, dtype=policy)
    rank = int(name[-2])
    x = np.random.default_rng(0).normal(size=(2, *(6,) * rank, 3)).astype(np.float32)
    reference = theirs(x)
    ours = getattr(linen, name).from_config(theirs.get_config())
    params = {variable.name: variable.value for variable in theirs.variables}
    y, state = ours.apply({"params": params}, x, mutable=["losses"])
    assert y.dtype == reference.dtype
    assert {jnp.dtype(variable.dtype) for variable in theirs.variables} == {jnp.dtype(ours.param_dtype)}
    epsilon = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(reference, np.float32), rtol=4 * epsilon, atol=4 * epsilon
    )
    assert state["losses"]["activity"].dtype == jnp.float32
    np.testing.assert_allclose(state["losses"]["activity"], np.float32(theirs.losses[0]), rtol=8 * epsilon)
