"""Times whole Keras, Equinox and Flax models, unchanged and under `accelerate`, on this machine's default backend.

Run as `python -m benchmarks.accelerate` from the repository's root, with the extra `test`. Each figure is the median
milliseconds of one call, and the ratio is the median over rounds of the pairwise ratio, interleaved in one process.
Outputs and gradients are compared before they are timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import finished, interleaved
from depthwise_jax.interop import accelerate
from workloads import results
from workloads.models import MODELS, Model

SIZES: dict[str, Callable[[], Model]] = {
    "Keras MobileNetV2 (alpha 1, 4x96x96)": partial(MODELS["keras"], batch=4, size=96, alpha=1.0),
    "Equinox, 2 depthwise (4x64x64, width 64)": partial(MODELS["equinox"], batch=4, size=64, width=64),
    "Linen EfficientNet-like (4x96x96, width 32)": partial(MODELS["linen"], batch=4, size=96, width=32),
}


def gradient(function: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    """The gradient of the mean of the squared output with respect to the parameters."""
    return jax.grad(lambda params, x: jnp.mean(function(params, x) ** 2))


def main() -> None:
    """Prints a row per model and direction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {rounds} rounds")
    print(f"{'model':44} {'':9} {'plain ms':>9} {'ours ms':>9} {'speed-up':>9}")
    for name, make in SIZES.items():
        function, params, x = make()
        for direction, transform in (("forward", lambda f: f), ("gradient", gradient)):
            plain, fast = (jax.jit(transform(f)) for f in (function, accelerate(function)))
            for ours, theirs in zip(jax.tree.leaves(fast(params, x)), jax.tree.leaves(plain(params, x)), strict=True):
                scale = float(jnp.abs(theirs).max()) + 1e-6
                assert float(jnp.abs(ours - theirs).max()) <= 1e-3 * scale, name
            tasks = {label: finished(f, params, x) for label, f in (("plain", plain), ("ours", fast))}
            samples = interleaved(tasks, rounds, seconds=math.inf)
            before, after = (1e3 * np.median(samples[label]) for label in tasks)
            speed_up = results.ratio(samples["plain"], samples["ours"])
            print(f"{name:44} {direction:9} {before:9.2f} {after:9.2f} {speed_up:8.2f}x")


if __name__ == "__main__":
    main()
