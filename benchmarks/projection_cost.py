"""What projecting every depthwise kernel of a MobileNetV2 adds to an Adam step.

    python benchmarks/projection_cost.py [--constraint max_norm|exact|non_neg] [--rounds 200]

Two compiled steps, Adam alone and Adam with `project`, over MobileNetV2's parameters (width 1, 1000 classes, 3.5
million numbers), their calls interleaved; each applies its updates to donated buffers, as training does. Prints the
least and the median time of each, and the same of an unchanged Adam against itself: what noise alone would show.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthwise_jax.constraints import MaxNorm, NonNeg
from depthwise_jax.optim import project

# Sandler et al., "MobileNetV2" (2018), table 2: expansion, channels, repeats.
BLOCKS = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
CONSTRAINTS = {
    "max_norm": MaxNorm(1.0, axis="window"),
    "exact": MaxNorm(1.0, axis="window", exact=True),
    "non_neg": NonNeg(),
}


def mobilenet_v2() -> dict[str, Any]:
    """The shapes of its parameters; a depthwise kernel is called `depthwise_kernel`."""

    def normalised(channels: int, **kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return kernel | {"scale": (channels,), "bias": (channels,)}

    shapes = {"stem": normalised(32, kernel=(3, 3, 3, 32))}
    channels = 32
    for stage, (expansion, output, repeats) in enumerate(BLOCKS):
        for index in range(repeats):
            hidden, name = expansion * channels, f"block_{stage}_{index}"
            if expansion > 1:
                shapes[f"{name}_expand"] = normalised(hidden, kernel=(1, 1, channels, hidden))
            shapes[f"{name}_depthwise"] = normalised(hidden, depthwise_kernel=(3, 3, hidden, 1))
            shapes[f"{name}_project"] = normalised(output, kernel=(1, 1, hidden, output))
            channels = output
    shapes["top"] = normalised(1280, kernel=(1, 1, channels, 1280))
    shapes["head"] = {"kernel": (1280, 1000), "bias": (1000,)}
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", choices=CONSTRAINTS, default="max_norm")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()

    constraint = CONSTRAINTS[arguments.constraint]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32),
        mobilenet_v2(),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    grads = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32), params)
    projection = project(select=lambda path, leaf: constraint if path[-1] == "depthwise_kernel" else None)
    transforms = {"adam": optax.adam(1e-3), "adam again": optax.adam(1e-3)}
    transforms["projected"] = optax.chain(optax.adam(1e-3), projection)

    def training_step(tx: Any) -> Any:
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1))

    steps = {name: training_step(tx) for name, tx in transforms.items()}
    carries = {name: (jax.tree.map(jnp.copy, params), tx.init(params)) for name, tx in transforms.items()}
    times: dict[str, list[float]] = {name: [] for name in transforms}
    for round_ in range(arguments.rounds + 5):
        order = list(transforms)
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name], grads))
            if round_ >= 5:
                times[name].append(time.perf_counter() - start)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    constrained = [w.size for path, w in leaves if "depthwise_kernel" in str(path)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {constraint}")
    print(
        f"{sum(w.size for _, w in leaves):,} parameters, {sum(constrained):,} constrained in {len(constrained)} kernels"
    )
    for what, reduction in (("least", np.min), ("median", np.median)):
        adam, again, projected = (1e3 * reduction(times[name]) for name in transforms)
        print(
            f"{what:6}: adam {adam:.3f} ms, projected {projected:.3f} ms: {100 * (projected / adam - 1):+.2f} %", end=""
        )
        print(f" (adam against itself: {100 * (again / adam - 1):+.2f} %)")


if __name__ == "__main__":
    main()
