"""EEGNet keeps its two constraints while it learns real multichannel series."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from depthwise_jax.constraints import MaxNorm
from depthwise_jax.optim import constraints_of, project, project_params
from workloads.eegnet import CHANNELS, CLASSES, HEAD_LIMIT, SAMPLES, SPATIAL_LIMIT, EEGNet, load

STEPS = 150


def test_both_constraints_hold_at_every_step() -> None:
    model, series = EEGNet(), load()
    x, y = series["train"]
    assert x.shape == (40, CHANNELS, SAMPLES, 1)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init, static_argnums=2)(rngs, x, True)
    constraints = constraints_of(model, x, True, rngs=rngs)
    constraints["head"]["kernel"] = MaxNorm(HEAD_LIMIT)
    tx = optax.chain(optax.adam(0.02), project(constraints))
    params = project_params(variables["params"], constraints)

    def step(carry: Any, key: jax.Array) -> Any:
        params, stats, state = carry

        def loss(params: Any) -> Any:
            logits, changed = model.apply(
                {"params": params, "batch_stats": stats}, x, True, rngs={"dropout": key}, mutable="batch_stats"
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        params: Any = optax.apply_updates(params, updates)
        return (params, stats, state), (value, params["spatial"]["kernel"], params["head"]["kernel"])

    carry = params, variables["batch_stats"], tx.init(params)
    keys = jax.random.split(jax.random.key(2), STEPS)
    (params, stats, _), (losses, spatial, head) = jax.jit(lambda c: jax.lax.scan(step, c, keys))(carry)

    for kernels, shape, bound in (
        (spatial, (STEPS, CHANNELS, 1, 4, 2), SPATIAL_LIMIT),
        (head, (STEPS, 3 * 8, CLASSES), HEAD_LIMIT),
    ):
        assert kernels.shape == shape
        norms = np.linalg.norm(np.asarray(kernels, np.float64), axis=1)
        assert norms.max() <= bound + 4 * np.spacing(np.float32(bound))
        assert norms.max() > 0.999 * bound  # the constraint was at work

    assert losses[-1] < losses[0]
    logits: Any = model.apply({"params": params, "batch_stats": stats}, series["test"][0], False)
    assert np.mean(np.argmax(logits, -1) == series["test"][1]) > 0.9
