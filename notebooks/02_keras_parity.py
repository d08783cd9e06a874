# %% [markdown]
# # Keras' layers and ours
#
# The same layers in Keras (on its JAX backend) and here: outputs and gradients argument by argument, initial
# distributions, a training run, and where the two differ on purpose.

# %%
import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp()  # away from this user's settings
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # or TensorFlow, which Keras imports where it is installed, prints about it

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from IPython.display import display
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from parity import X, compare, keras_layer, our_activity_penalty, our_layer, our_penalty, outcome

import depthwise_jax
from depthwise_jax import regularization_loss
from depthwise_jax.constraints import MaxNorm, MinMaxNorm, NonNeg
from depthwise_jax.initializers import HeNormal
from depthwise_jax.interop.keras import from_keras
from depthwise_jax.optim import constraints_of, project
from workloads.digits import load

plt.style.use("depthwise_jax.mplstyle")
EPSILON = np.finfo(np.float32).eps
print("keras", keras.__version__, "jax", jax.__version__)

# %% [markdown]
# ## Argument by argument
#
# Each row constructs Keras' class and ours with the same keyword arguments and copies Keras' weights into our layer. It
# compares the outputs, the penalties, and the gradients of a scalar with respect to the input and each weight. The
# scalar is the output times fixed random numbers, plus the penalties.

# %%
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("DepthwiseConv2D", {}),
    ("DepthwiseConv2D", {"strides": 2}),
    ("DepthwiseConv2D", {"padding": "same"}),
    ("DepthwiseConv2D", {"strides": (2, 2), "padding": "same"}),
    ("DepthwiseConv2D", {"depth_multiplier": 3}),
    ("DepthwiseConv2D", {"data_format": "channels_first"}),
    ("DepthwiseConv2D", {"dilation_rate": (2, 1)}),
    ("DepthwiseConv2D", {"activation": "gelu"}),
    ("DepthwiseConv2D", {"use_bias": False}),
    ("DepthwiseConv2D", {"depthwise_initializer": "orthogonal", "bias_initializer": "ones"}),
    ("DepthwiseConv2D", {"depthwise_regularizer": "l2", "bias_regularizer": "l1"}),
    ("DepthwiseConv2D", {"activity_regularizer": "l2"}),
    ("DepthwiseConv1D", {"strides": 2, "padding": "same"}),
    ("SeparableConv1D", {"filters": 5, "dilation_rate": 2}),
    ("SeparableConv2D", {"filters": 5}),
    ("SeparableConv2D", {"filters": 5, "depth_multiplier": 2, "pointwise_regularizer": "l1", "activation": "relu"}),
]
labels = [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in ARGUMENTS]
differences = pd.DataFrame([compare(*row) for row in ARGUMENTS], index=labels)

figure, ax = plt.subplots(figsize=(10, 5))
for (column, values), marker in zip(differences.items(), "osD^vP", strict=True):
    ax.plot(values / EPSILON, labels, marker, label=column, alpha=0.8)
ax.set(xlabel="largest difference / largest number [float32 epsilon]", xlim=(-0.25, None))
ax.tick_params(axis="y", labelsize=8)
ax.invert_yaxis()
figure.legend(loc="outside upper center", ncols=6)
plt.show()
print(f"largest of all: {differences.max(axis=None) / EPSILON:.1f} epsilon = {differences.max(axis=None):.1e}")

# %% [markdown]
# ## Initial distributions
#
# Each named initializer draws a kernel (4, 4, 64, 64); the plots compare the quantiles of ours with those of Keras'.
# Points on the diagonal mean the same distribution.

# %%
NAMES = ["glorot_uniform", "glorot_normal", "he_normal", "he_uniform", "lecun_normal", "random_normal"]
shape, quantiles = (4, 4, 64, 64), np.linspace(0.001, 0.999, 41)
figure, axes = plt.subplots(1, len(NAMES), figsize=(12, 2.6))
rows = {}
for index, (name, ax) in enumerate(zip(NAMES, axes, strict=True)):
    reference: Any = keras.initializers.get({"class_name": name, "config": {"seed": index}})
    theirs = np.asarray(reference(shape))
    initializer: Any = depthwise_jax.initializers.get(name)
    ours = np.asarray(initializer(jax.random.key(index), shape, jnp.float32))
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
    ax.plot(np.quantile(theirs, quantiles), np.quantile(ours, quantiles), ".", markersize=4)
    ax.set(title=name, xlabel="Keras, weight", ylabel="ours, weight" if index == 0 else None)
    ax.tick_params(labelsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(3, symmetric=True))  # more labels would overlap
    rows[name] = {"std Keras": theirs.std(), "std ours": ours.std(), "ratio": ours.std() / theirs.std()}
plt.show()
display(pd.DataFrame(rows).T.round(4))

# %% [markdown]
# ## A training run
#
# The same network in both, with penalties and constraints, the same initial weights and the same batches of digits.
# `from_keras` converts each Keras layer into ours, with its parameters. Training amplifies rounding, so the right plot
# also shows a second run of ours whose initial weights are larger by one epsilon.

# %%
STEPS, BATCH, RATE = 100, 32, 0.02
(images, digits), _ = load()
order = np.random.default_rng(0).permutation(len(images))[: STEPS * BATCH].reshape(STEPS, BATCH)

keras.utils.set_random_seed(0)
model: Any = keras.Sequential(
    [
        keras.Input(images.shape[1:]),
        keras.layers.DepthwiseConv2D(
            5,
            strides=2,
            depth_multiplier=8,
            activation="relu",
            depthwise_regularizer="l2",
            depthwise_constraint={"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": [0, 1]}},
        ),
        keras.layers.SeparableConv2D(32, 3, strides=2, activation="relu", pointwise_constraint="non_neg"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
model.compile(keras.optimizers.SGD(RATE, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

(depthwise, depthwise_params), (separable, separable_params) = (from_keras(layer) for layer in model.layers[:2])
network: Any = nn.Sequential([depthwise, separable, lambda x: x.reshape(len(x), -1), nn.Dense(10)])
dense = dict(zip(("kernel", "bias"), (v.value for v in model.layers[-1].weights), strict=True))
params = {"layers_0": depthwise_params, "layers_1": separable_params, "layers_3": dense}
optimizer = optax.chain(optax.sgd(RATE, momentum=0.9), project(constraints_of(network, images[:1])))


# %%
def loss_of(params, x, y):
    logits = network.apply({"params": params}, x)
    data_loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return data_loss + regularization_loss(network, params, x)


@jax.jit
def train(params, images, digits):
    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimizer.init(params)), (images, digits))


perturbed = jax.tree.map(lambda w: w * (1 + EPSILON), params)
(trained, _), our_losses = train(params, images[order], digits[order])
_, perturbed_losses = train(perturbed, images[order], digits[order])
their_losses = np.array([float(model.train_on_batch(images[b], digits[b])) for b in order])

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
left.plot(their_losses, linewidth=4, alpha=0.35, label="Keras")
left.plot(our_losses, linewidth=1.2, label="ours")
left.set(xlabel="training step", ylabel="loss [nats, with penalties]", yscale="log")
left.legend()
right.plot(np.abs(our_losses - their_losses) / their_losses, "o", markersize=3, label="ours vs Keras")
right.plot(
    np.abs(our_losses - perturbed_losses) / our_losses, "^", markersize=3, label="ours vs ours perturbed by 1 epsilon"
)
right.set(xlabel="training step", ylabel="relative difference of the losses", yscale="log", ylim=(None, 1e-4))
right.legend()
plt.show()

after = {f"layers_{i}/{v.name}": v.value for i, layer in enumerate(model.layers[:2]) for v in layer.weights}
changes = {}
for name, value in after.items():
    layer, weight = name.split("/")
    before, now = params[layer][weight], trained[layer][weight]
    changes[name] = {"change by training": jnp.abs(now - before).max(), "difference": jnp.abs(now - value).max()}
print(f"weights after {STEPS} steps: largest change, and largest difference between ours and Keras'")
display(pd.DataFrame(changes).T.map("{:.1e}".format))

# %% [markdown]
# ## Where they differ
#
# In places Keras' behaviour contradicts its documentation. There our layers do what is documented, or refuse. Each
# cell shows what the call returned or raised.

# %%
K = keras.layers
half = np.full((1, 258, 514, 1), 100, np.float16)
loud: dict[str, Any] = {"depthwise_initializer": "ones"}
small = np.ones((2, 2, 9, 2), np.float32)
integers = np.ones((2, 9, 9, 2), np.int32)
TRAPS = {
    "padding=((1, 0), (2, 1)): output shape": (
        lambda: keras_layer(3, padding=((1, 0), (2, 1)))(X).shape,
        lambda: our_layer(3, padding=((1, 0), (2, 1)))(X).shape,
    ),
    "kernel_size=(3.5, 2): stored as": (
        lambda: K.DepthwiseConv2D((3.5, 2)).kernel_size,
        lambda: our_layer((3.5, 2)).kernel_size,
    ),
    "bias_initializer=None: bias": (
        lambda: np.asarray(keras_layer(3, bias_initializer=None).bias.value).round(2),
        lambda: np.asarray(our_layer(3, bias_initializer=None).variables["params"]["bias"]).round(2),
    ),
    'depthwise_regularizer="l1_l2": penalty > 0': (
        lambda: float(sum(keras_layer(3, depthwise_regularizer="l1_l2").losses)) > 0,
        lambda: our_penalty(depthwise_regularizer="l1_l2") > 0,
    ),
    'depthwise_regularizer="l1l2": penalty > 0': (
        lambda: float(sum(keras_layer(3, depthwise_regularizer="l1l2").losses)) > 0,
        lambda: our_penalty(depthwise_regularizer="l1l2") > 0,
    ),
    "float16, activity_regularizer=L1(1e-6) of many large outputs": (
        lambda: float(
            keras_layer(
                3, dtype="mixed_float16", activity_regularizer=keras.regularizers.L1(1e-6), x=half, **loud
            ).losses[0]
        ),
        lambda: our_activity_penalty(
            half, dtype="float16", activity_regularizer=depthwise_jax.regularizers.L1(1e-6), **loud
        ),
    ),
    "window larger than the input, second call: output shape": (
        lambda: keras_layer(3)(small).shape,
        lambda: our_layer(3)(small).shape,
    ),
    "integer input: output dtype": (
        lambda: keras_layer(3)(integers).dtype,
        lambda: our_layer(3)(integers).dtype,
    ),
}
rows = {name: {"Keras": outcome(theirs), "here": outcome(ours)} for name, (theirs, ours) in TRAPS.items()}
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(rows).T)

# %% [markdown]
# ## The same in both, and easily mistaken
#
# * A norm constraint's default axis is 0. For a kernel (3, 3, C, M) that bounds columns of three weights, not filters.
# * The fans of a named initializer count all channels, though a filter reads only one. The standard deviation is too
#   small by a factor of sqrt(channels); `fan="window"` counts what a filter reads.

# %%
kernel = 5 * jax.random.normal(jax.random.key(0), (3, 3, 256, 1))
norms = {
    "Keras, MaxNorm(1)": keras.constraints.MaxNorm(1)(kernel),
    "here, MaxNorm(1)": MaxNorm(1)(kernel),
    'here, MaxNorm(1, axis="window")': MaxNorm(1, axis="window")(kernel),
}
for name, projected in norms.items():
    print(f"{name:32} largest norm of a filter: {np.linalg.norm(projected, axis=(0, 1)).max():.3f}")
he_normal: Any = depthwise_jax.initializers.get("he_normal")
draws = {
    "Keras, he_normal": keras.initializers.HeNormal(seed=0)(kernel.shape),
    "here, he_normal": he_normal(jax.random.key(0), kernel.shape, jnp.float32),
    'here, HeNormal(fan="window")': HeNormal(fan="window")(jax.random.key(0), kernel.shape, jnp.float32),
}
for name, draw in draws.items():
    variance = np.sum(np.square(draw), axis=(0, 1)).mean()
    print(f"{name:32} variance of an output over that of the input: {variance:.4f}")

# %% [markdown]
# ## Constraints under gradient accumulation and averaging
#
# Keras' optimizer applies constraints after every micro-step of gradient accumulation, and averages the weights before
# they are projected. Here `project` is inside `optax.MultiSteps` and runs once per real step, and an average is
# projected with `project_params` before it is used.
#
# The weight starts at 4 with `MinMaxNorm(0, 1, rate=0.5)`, which halves the distance to 1 each time it runs; the
# gradients are zero, and four micro-steps make a step.

# %%
variable = keras.Variable([4.0])
variable.constraint = keras.constraints.MinMaxNorm(0.0, 1.0, rate=0.5)
accumulating = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
multi = optax.MultiSteps(optax.chain(optax.sgd(0.1), project(MinMaxNorm(0.0, 1.0, rate=0.5))), 4)
weight: Any = jnp.array([4.0])
state = multi.init(weight)
micro = {}
for index in range(1, 5):
    accumulating.apply([np.zeros(1, np.float32)], [variable])
    updates, state = multi.update(jnp.zeros(1), state, weight)
    weight = optax.apply_updates(weight, updates)
    micro[index] = {"Keras": float(variable.value[0]), "here": float(weight[0])}
display(pd.DataFrame(micro).rename_axis(columns="after micro-step").round(4))

# %% [markdown]
# A weight that starts at 1 under `NonNeg`, with gradients that push it below zero, and its moving average.

# %%
variable = keras.Variable([1.0])
variable.constraint = keras.constraints.NonNeg()
averaging = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
optimizer = optax.chain(optax.sgd(1.0), project(NonNeg()))
weight = jnp.array([1.0])
average: Any = weight
state = optimizer.init(weight)
for _ in range(3):
    averaging.apply([jnp.array([5.0])], [variable])
    updates, state = optimizer.update(jnp.array([5.0]), state, weight)
    weight = optax.apply_updates(weight, updates)
    average = optax.incremental_update(weight, average, 0.5)
averaging.finalize_variable_values([variable])
print("averaged weight, Keras:", float(variable.value[0]), " here:", float(average[0]))
