# %% [markdown]
# # Transformations
#
# Per-example kernels by `vmap`, Hessian-vector products, sharding over eight devices, and export. The eight devices are
# parts of this machine's CPU; JAX creates them if the flag below is set before JAX is first used.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.sparse.linalg import LinearOperator, eigsh

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from depthwise_jax import depthwise_conv, separable_conv
from workloads.digits import load

plt.style.use("depthwise_jax.mplstyle")
(images, labels), _ = load()
print(len(jax.devices()), "devices")

# %% [markdown]
# ## A kernel for each example
#
# `vmap` over images and kernels convolves each image with its own kernel. Here each digit is blurred along its own
# direction. JAX traces one primitive for the whole batch, without a loop.

# %%
count, size = 6, 9
angles = jnp.linspace(0, jnp.pi, count, endpoint=False)
rows, columns = jnp.meshgrid(jnp.arange(size) - size // 2, jnp.arange(size) - size // 2, indexing="ij")
across = rows * jnp.cos(angles)[:, None, None] - columns * jnp.sin(angles)[:, None, None]
kernels = jnp.exp(-(across**2)) * (rows**2 + columns**2 <= (size / 2) ** 2)
kernels = (kernels / kernels.sum(axis=(1, 2), keepdims=True))[..., None, None]


def blur(image: Any, kernel: Any) -> Any:
    return depthwise_conv(image, kernel, padding="same")


blurred = jax.vmap(blur)(images[:count], kernels)
one_by_one = jnp.stack([blur(*pair) for pair in zip(images[:count], kernels, strict=True)])
print("kernels", kernels.shape, "images", images[:count].shape)
print("largest difference to one call each:", float(jnp.abs(blurred - one_by_one).max()))
print("traced:", Counter(str(eqn.primitive) for eqn in jax.make_jaxpr(jax.vmap(blur))(images[:count], kernels).eqns))

figure, axes = plt.subplots(3, count, figsize=(10, 5))
panels = {"image": images[:count], "kernel": kernels[..., 0], "result": blurred}
for row, (name, pictures) in zip(axes, panels.items(), strict=True):
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(picture[..., 0], cmap="gray")
        ax.grid(False)
        ax.tick_params(labelsize=7)
    row[0].set_ylabel(f"{name}\nrow [pixel]")
for ax in axes[-1]:
    ax.set_xlabel("column [pixel]")
plt.show()

# %% [markdown]
# ## Hessian-vector products
#
# The convolution and its two transposes are closed under differentiation, so a Hessian-vector product runs on the same
# three maps in any nesting of forward and reverse mode. The cell compares three nestings with the full Hessian, in
# float64, for the loss of a small depthwise-separable classifier on 128 digits as a function of its depthwise kernel.

# %%
jax.config.update("jax_enable_x64", True)
x, y = jnp.asarray(images[:128], jnp.float64), jnp.asarray(labels[:128])
keys = jax.random.split(jax.random.key(0), 3)
kernel = 0.3 * jax.random.normal(keys[0], (5, 5, 1, 4), jnp.float64)
pointwise = 0.5 * jax.random.normal(keys[1], (1, 1, 4, 10), jnp.float64)


def loss(kernel: Any) -> Any:
    logits = separable_conv(jnp.tanh(4 * x), kernel, pointwise, strides=2, padding="same")
    logits = jax.nn.softplus(logits).mean(axis=(1, 2))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


def forward_over_reverse(v: Any) -> Any:
    return jax.jvp(jax.grad(loss), (kernel,), (v,))[1]


def reverse_over_forward(v: Any) -> Any:
    return jax.grad(lambda kernel: jax.jvp(loss, (kernel,), (v,))[1])(kernel)


def reverse_over_reverse(v: Any) -> Any:
    return jax.grad(lambda kernel: (jax.grad(loss)(kernel) * v).sum())(kernel)


direction = jax.random.normal(keys[2], kernel.shape, jnp.float64)
hessian = np.asarray(jax.jit(jax.hessian(loss))(kernel)).reshape(kernel.size, kernel.size)
exact = (hessian @ direction.ravel()).reshape(kernel.shape)
step = 1e-5
gradient = jax.jit(jax.grad(loss))
quotient = (gradient(kernel + step * direction) - gradient(kernel - step * direction)) / (2 * step)
nestings = (forward_over_reverse, reverse_over_forward, reverse_over_reverse)
products = {f.__name__: jax.jit(f)(direction) for f in nestings}
for name, product in (products | {"difference quotient": quotient}).items():
    print(f"{name:22} largest difference to the Hessian's: {np.abs(product - exact).max() / np.abs(exact).max():.1e}")

# %% [markdown]
# Lanczos' method finds the largest eigenvalues (circles) using only matrix-vector products. The dots are all positive
# eigenvalues of the full matrix. The direction in which the loss curves most is drawn as kernels.

# %%
product = jax.jit(forward_over_reverse)
make_operator: Any = LinearOperator
operator = make_operator(hessian.shape, matvec=lambda v: np.ravel(product(v.reshape(kernel.shape))), dtype=np.float64)
values, vectors = eigsh(operator, k=3, which="LA", v0=np.ones(kernel.size))
everything = np.linalg.eigvalsh(hessian)[::-1]
figure, axes = plt.subplots(1, 5, figsize=(10, 2.6), width_ratios=[2.6, 1, 1, 1, 1])
axes[0].semilogy(everything[everything > 0], ".", label="full matrix")
axes[0].semilogy(values[::-1], "o", markerfacecolor="none", markersize=9, label="Lanczos")
axes[0].set(xlabel="index", ylabel="eigenvalue [nats per weight²]")
axes[0].legend()
top = vectors[:, -1].reshape(kernel.shape)
for channel, ax in enumerate(axes[1:]):
    ax.imshow(top[:, :, 0, channel], vmin=-np.abs(top).max(), vmax=np.abs(top).max())
    ax.set(title=f"kernel {channel}", xlabel="column [pixel]", ylabel="row [pixel]" if channel == 0 else None)
    ax.grid(False)
plt.show()
jax.config.update("jax_enable_x64", False)

# %% [markdown]
# ## Sharding
#
# Batch, channels or rows of an image batch are spread over a mesh of 4 x 2 devices. The table counts the collectives in
# the compiled programs, whose results agree with the unsharded ones; the pictures show which device holds which part.
# With sharded batch or channels, the forward pass and the input gradient need no collectives, and the kernel gradient
# adds up over the batch. Sharded rows exchange their halo: the rows that a window reads beyond its own part.

# %%
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
SHARDINGS = {
    "batch": (P("data"), P()),
    "batch and channels": (P("data", None, None, "model"), P(None, None, "model")),
    "channels": (P(None, None, None, "model"), P(None, None, "model")),
    "rows": (P(None, "data"), P()),
}
rng = np.random.default_rng(0)
sizes = ((8, 16, 16, 8), (3, 3, 8, 1), (8, 16, 16, 8))
x, kernel, g = (rng.normal(size=size).astype(np.float32) for size in sizes)


def conv(x: Any, kernel: Any) -> Any:
    return depthwise_conv(x, kernel, padding="same")


MAPS = {
    "forward": lambda x, kernel, g: conv(x, kernel),
    "input gradient": lambda x, kernel, g: jax.vjp(conv, x, kernel)[1](g)[0],
    "kernel gradient": lambda x, kernel, g: jax.vjp(conv, x, kernel)[1](g)[1],
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
collectives: dict[str, dict[str, str]] = {}
results = {}
for name, (spec, kernel_spec) in SHARDINGS.items():
    specs = (spec, kernel_spec, spec)
    operands = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, kernel, g), specs, strict=True)]
    collectives[name] = {}
    for direction, function in MAPS.items():
        compiled: Any = jax.jit(function).lower(*operands).compile()
        found = Counter(COLLECTIVE.findall(compiled.as_text()))
        collectives[name][direction] = ", ".join(f"{n} {kind}" for kind, n in found.items()) or "none"
        results[name, direction] = compiled(*operands)
        expected = np.asarray(jax.jit(function)(x, kernel, g))
        np.testing.assert_allclose(results[name, direction], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
display(pd.DataFrame(collectives).T)

# %% [markdown]
# Result with the batch over "data" and the channels over "model": batch downwards, channels to the right.

# %%
jax.debug.visualize_array_sharding(results["batch and channels", "forward"][:, 0, 0, :])

# %% [markdown]
# Result with the rows over "data": rows downwards, columns to the right. Each part is held by two devices.

# %%
jax.debug.visualize_array_sharding(results["rows", "forward"][0, :, :, 0])

# %% [markdown]
# Kernel gradient with the batch over "data" and the channels over "model": taps of a row downwards, channels to the
# right. Each half is held by the four devices that share its channels.

# %%
jax.debug.visualize_array_sharding(results["batch and channels", "kernel gradient"][0, :, :, 0])

# %% [markdown]
# ## Export
#
# One artefact for three platforms with a symbolic batch. It consists of XLA's own operations and JAX's check of the
# symbolic size: reading and running it needs JAX but not this package.

# %%
batch = export.symbolic_shape("batch")[0]
shapes = jax.ShapeDtypeStruct((batch, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((5, 5, 1, 4), jnp.float32)


def layer(x: Any, kernel: Any) -> Any:
    return depthwise_conv(x, kernel, strides=2, padding="same", activation="relu")


exported = export.export(jax.jit(layer), platforms=("cpu", "cuda", "tpu"))(*shapes)
artefact = exported.serialize()
print(f"{len(artefact):,} bytes for {', '.join(exported.platforms)}; result {exported.out_avals[0].shape}")
print("custom calls:", Counter(re.findall(r"custom_call @(\w+)", exported.mlir_module())))
loaded = export.deserialize(artefact)
kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 4)), jnp.float32)
for n in (1, 7):
    difference = jnp.abs(loaded.call(images[:n], kernel) - layer(images[:n], kernel)).max()
    print(f"batch of {n}: largest difference to the layer {float(difference):.1e}")
