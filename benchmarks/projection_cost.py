"""Measures how much projecting every depthwise kernel of a MobileNetV2 adds to an Adam step.

    python -m benchmarks.projection_cost [--constraint max_norm|exact|non_neg] [--rounds 200]

Two compiled steps, Adam without and with `project`, over MobileNetV2's parameters (1000 classes, 3.5 million numbers),
are timed in turn; each applies its updates to donated buffers, as training does. The command prints the least and the
median time of each, and those of an unchanged Adam against itself, which show the noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import interleaved
from depthwise_jax.constraints import MaxNorm, NonNeg
from depthwise_jax.optim import project
from workloads.mobilenet import MobileNetV2, is_depthwise

CONSTRAINTS = {
    "max_norm": MaxNorm(1.0, axis="window"),
    "exact": MaxNorm(1.0, axis="window", exact=True),
    "non_neg": NonNeg(),
}


def training(optimizer: Any, params: Any, grads: Any) -> Callable[[], None]:
    """Steps of an optimizer from copies of the parameters; each call makes one step and waits for it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, params), optimizer.init(params)

    def make_a_step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(compiled(*carry, grads))

    make_a_step()
    return make_a_step


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", choices=CONSTRAINTS, default="max_norm")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()

    constraint = CONSTRAINTS[arguments.constraint]
    shapes = jax.eval_shape(MobileNetV2().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    kernels = jax.tree_util.tree_map_with_path(is_depthwise, shapes)
    projection = project(jax.tree.map(lambda depthwise: constraint if depthwise else None, kernels))
    optimizers = {
        "adam": optax.adam(1e-3),
        "adam again": optax.adam(1e-3),
        "projected": optax.chain(optax.adam(1e-3), projection),
    }
    tasks = {name: training(optimizer, params, grads) for name, optimizer in optimizers.items()}
    samples = interleaved(tasks, arguments.rounds, math.inf)

    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    constrained = [n for n, depthwise in zip(sizes, jax.tree.leaves(kernels), strict=True) if depthwise]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {constraint}")
    print(f"{sum(sizes):,} parameters, {sum(constrained):,} constrained in {len(constrained)} kernels")
    for what, reduction in (("least", np.min), ("median", np.median)):
        adam, again, projected = (1e3 * reduction(samples[name]) for name in optimizers)
        print(
            f"{what:6}: adam {adam:.3f} ms, projected {projected:.3f} ms: {100 * (projected / adam - 1):+.2f} % "
            f"(adam against itself: {100 * (again / adam - 1):+.2f} %)"
        )


if __name__ == "__main__":
    main()
