# %% [markdown]
# # Constraints
#
# A constraint is a projection onto a set, and the place where it is applied decides whether the weights lie in the set.
# `project`, last in an Optax chain, applies it to what `optax.apply_updates` will make of the parameters. This notebook
# measures what happens when it is applied elsewhere: inside the forward pass, before the update, first in the chain,
# before an average.

# %%
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from IPython.display import display

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from depthwise_jax import DepthwiseConv2D
from depthwise_jax.constraints import MaxNorm, NonNeg, UnitNorm
from depthwise_jax.optim import constraints_of, feasibility, project, project_params
from workloads.digits import load
from workloads.eegnet import HEAD_LIMIT, SPATIAL_LIMIT, EEGNet
from workloads.eegnet import load as load_series

plt.style.use("depthwise_jax.mplstyle")

# %% [markdown]
# ## Four places
#
# A classifier of handwritten digits with eight 5x5 filters, trained by plain gradient descent on the same batches. Each
# filter's norm must not exceed 0.5.

# %%
STEPS, BATCH, LIMIT = 300, 64, 0.5


class Classifier(nn.Module):
    """Logits (batch, 10) of images (batch, 28, 28, 1)."""

    constraint: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        filters = DepthwiseConv2D(
            5, strides=2, depth_multiplier=8, activation="relu", depthwise_constraint=self.constraint, name="filters"
        )
        return nn.Dense(10)(filters(x).reshape(len(x), -1))


model: Any = Classifier()
(images, labels), (test_images, test_labels) = load()
order = np.random.default_rng(0).integers(len(images), size=(STEPS, BATCH))
data = jnp.asarray(images)[order], jnp.asarray(labels)[order]
start = model.init(jax.random.key(0), images[:1])["params"]

Params = Any
Step = Callable[..., tuple[Params, Any, Any]]


def loss_of(params: Params, batch: Any) -> Any:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()


def train(step: Step, optimizer: Any, params: Params) -> Any:
    """Runs `step` over the batches; returns the losses and the parameters after each step."""

    def body(carry: Any, batch: Any) -> Any:
        params, state, loss = step(*carry, batch)
        return (params, state), (loss, params)

    return jax.jit(lambda params: jax.lax.scan(body, (params, optimizer.init(params)), data)[1])(params)


def plain(optimizer: Any) -> Step:
    """The usual step."""

    def step(params: Params, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def inside(optimizer: Any, constraints: Any) -> Step:
    """The projection as a part of the forward pass."""

    def step(params: Params, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: loss_of(project_params(p, constraints), batch))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def before(optimizer: Any, constraints: Any) -> Step:
    """The projection of the parameters, and then the update."""

    def step(params: Params, state: Any, batch: Any) -> Any:
        return plain(optimizer)(project_params(params, constraints), state, batch)

    return step


def constrained_by(constraint: Any) -> Any:
    """The tree for `project` of a classifier with this constraint on its filters."""
    return constraints_of(Classifier(constraint), images[:1])


sgd, ball = optax.sgd(0.1), constrained_by(MaxNorm(LIMIT, axis="window"))
first, last = optax.chain(project(ball), sgd), optax.chain(sgd, project(ball))
runs = {
    "last in the chain": train(plain(last), last, project_params(start, ball)),
    "inside the forward pass": train(inside(sgd, ball), sgd, project_params(start, ball)),
    "before the update": train(before(sgd, ball), sgd, project_params(start, ball)),
    "first in the chain": train(plain(first), first, project_params(start, ball)),
}


def norms(params: Params) -> np.ndarray:
    """The norms of the filters after each step, (steps, filters)."""
    return np.linalg.norm(np.asarray(params["filters"]["kernel"], np.float64), axis=(1, 2))[:, 0]


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for (name, (losses, params)), dash in zip(runs.items(), ("-", "-", "--", ":"), strict=True):
    left.plot(norms(params).max(axis=1), dash, label=name)
    right.plot(np.convolve(losses, np.ones(20) / 20, mode="valid"), dash)
left.axhline(LIMIT, color="black", linestyle="--", linewidth=1, label="bound")
left.set(xlabel="training step", ylabel="largest norm of a stored filter", ylim=(0.35, 0.75))
right.set(xlabel="training step", ylabel="loss, mean of 20 steps [nats]", ylim=(0, 4))
figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5)
plt.show()

# %%
rows = {}
for name, (losses, params) in runs.items():
    excess = np.maximum(norms(params) - LIMIT, 0)
    rows[name] = {
        "largest excess over the bound": f"{excess.max():.1e}",
        "steps that end outside": int((excess.max(axis=1) > 4 * np.spacing(np.float32(LIMIT))).sum()),
        "mean loss of the last 20 steps": f"{np.mean(losses[-20:]):.3g}",
    }
display(pd.DataFrame(rows).T)

# %% [markdown]
# * *Before the update*, every step ends outside by the length of the last update: what is evaluated, averaged or saved
#   is not what the constraint promised.
# * *First in the chain*, `project` mistakes the gradient for the update, and what it passes on is no longer a gradient.
# * *Inside the forward pass*, the stored weights are free and only their projection counts. Outside the ball the loss
#   depends on a filter's direction alone, so its gradient is orthogonal to it, and each step of gradient descent makes
#   the filter longer: the longer it is, the less a step turns it.
#
# In the loss the first three hardly differ here; in what is stored they do.

# %%
_, params = runs["inside the forward pass"]
final = jax.tree.map(lambda p: p[-1], params)
batch = data[0][-1], data[1][-1]
kernel = final["filters"]["kernel"]
for name, projection in (("inside the forward pass", ball), ("outside it", constrained_by(None))):
    gradient = jax.grad(lambda p, projection=projection: loss_of(project_params(p, projection), batch))(final)
    gradient = gradient["filters"]["kernel"]
    lengths = jnp.linalg.norm(kernel, axis=(0, 1)) * jnp.linalg.norm(gradient, axis=(0, 1))
    cosines = jnp.abs((kernel * gradient).sum(axis=(0, 1)) / lengths)[norms(params)[-1][None] > LIMIT]
    print(f"projection {name:24} largest |cosine| of a filter and its gradient: {float(cosines.max()):.1e}")

# %% [markdown]
# ## Weights that die
#
# Inside the forward pass `NonNeg` is a rectifier on the weights: below zero the gradient is zero, so a weight that
# starts or goes there stays. With `project` a weight rests at exactly zero and leaves it when the gradient says so.

# %%
positive = constrained_by(NonNeg())
constrained = optax.chain(sgd, project(positive))
kernels = {
    name: np.asarray(params["filters"]["kernel"]).reshape(STEPS, -1)
    for name, (_, params) in {
        "last in the chain": train(plain(constrained), constrained, project_params(start, positive)),
        "inside the forward pass": train(inside(sgd, positive), sgd, start),
    }.items()
}
figure, ax = plt.subplots(figsize=(6, 3.2))
for name, values in kernels.items():
    ax.plot((values <= 0).mean(axis=1), label=name)
ax.set(xlabel="training step", ylabel="fraction of weights at or below 0")
ax.legend()
plt.show()
for name, values in kernels.items():
    returned = ((values[:-1] <= 0) & (values[1:] > 0)).any(axis=0)
    print(f"{name:24} weights that came back from 0: {returned.sum()} of {(values <= 0).any(axis=0).sum()}")

# %% [markdown]
# ## Averages
#
# The mean of members of a convex set is a member; the mean of unit vectors is not a unit vector. `project_params` makes
# one of it. An average must be projected again before it is used.

# %%
sphere = constrained_by(UnitNorm(axis="window"))
on_sphere = optax.chain(optax.adam(0.02), project(sphere))
losses, params = train(plain(on_sphere), on_sphere, project_params(start, sphere))


def follow(average: Params, params: Params) -> tuple[Params, Params]:
    average = optax.incremental_update(params, average, 0.05)
    return average, average


_, averages = jax.lax.scan(follow, project_params(start, sphere), params)
projected = jax.vmap(lambda p: project_params(p, sphere))(averages)
figure, ax = plt.subplots(figsize=(6, 3.2))
for name, tree in (("parameters", params), ("average", averages), ("average, projected", projected)):
    ax.plot(norms(tree).min(axis=1), label=name, linewidth=3 if name == "parameters" else 1.4)
ax.set(xlabel="training step", ylabel="smallest norm of a filter")
ax.legend()
plt.show()
for name, tree in (("average", averages), ("average, projected", projected)):
    violation = feasibility(jax.tree.map(lambda p: p[-1], tree), sphere)["filters"]["kernel"]
    print(f"{name:20} violation at the end: {violation:.1e}")

# %% [markdown]
# ## Rounding
#
# Even in the right place a projection can be undone: `optax.apply_updates` adds an update to the parameter and rounds.
# The obvious transformation emits `constraint(p + u) - p`; `project` emits the update after which the rounded sum is
# feasible. The figures are the largest excess over 1,000 steps with random updates, in units of the last place at the
# bound.

# %%
constraint = MaxNorm(1.0, axis="window")


def obvious(params: Any, updates: Any) -> Any:
    return constraint(params + updates) - params


def ours(params: Any, updates: Any) -> Any:
    return project(constraint).update(updates, optax.EmptyState(), params)[0]


def worst(update: Callable[[Any, Any], Any], dtype: Any) -> float:
    """The largest excess of a filter's norm after a step, in ulp of the bound."""

    def body(params: Any, key: Any) -> Any:
        updates = 0.3 * jax.random.normal(key, params.shape, dtype)
        params = jnp.asarray(optax.apply_updates(params, update(params, updates)))
        return params, params

    kernel = constraint(jax.random.normal(jax.random.key(0), (3, 3, 16, 2), dtype))
    keys = jax.random.split(jax.random.key(1), 1000)
    kernels = np.asarray(jax.jit(lambda w: jax.lax.scan(body, w, keys)[1])(kernel), np.float64)
    excess = np.linalg.norm(kernels, axis=(1, 2)).max() - 1
    return max(float(excess / float(jnp.finfo(dtype).eps)), 0.0)


rounding = {
    dtype.__name__: {"constraint(p + u) - p": worst(obvious, dtype), "project": worst(ours, dtype)}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
}
display(pd.DataFrame(rounding).T.round(2).rename_axis("excess [ulp]"))

# %% [markdown]
# ## EEGNet
#
# EEGNet (Lawhern et al., 2018) bounds the norm of each spatial filter by 1 and that of each column of the classifier by
# 0.25. The series are those of a smart watch's motion sensors: six channels, four activities, 40 series to train on and
# 40 to test. Three runs: with `project` in the chain, with the projection applied to the initial weights alone, and
# without.


# %%
network: Any = EEGNet()
series = load_series()
rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
variables = network.init(rngs, series["train"][0], True)
constraints = constraints_of(network, series["train"][0], True, rngs=rngs)
constraints["head"]["kernel"] = MaxNorm(HEAD_LIMIT)  # an nn.Dense, which cannot declare one


@partial(jax.jit, static_argnames="in_chain")
def eegnet_train(params: Any, in_chain: bool) -> Any:
    """150 steps; returns the trained variables and the two constrained kernels after each step."""
    x, y = series["train"]
    optimizer = optax.chain(optax.adam(0.02), *([project(constraints)] if in_chain else []))

    def body(carry: Any, key: Any) -> Any:
        params, stats, state = carry

        def loss(params: Any) -> Any:
            logits, changed = network.apply(
                {"params": params, "batch_stats": stats}, x, True, rngs={"dropout": key}, mutable="batch_stats"
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        params: Any = optax.apply_updates(params, updates)
        return (params, stats, state), {name: params[name]["kernel"] for name in ("spatial", "head")}

    carry = params, variables["batch_stats"], optimizer.init(params)
    (params, stats, _), kernels = jax.lax.scan(body, carry, jax.random.split(jax.random.key(2), 150))
    return {"params": params, "batch_stats": stats}, kernels


@jax.jit
def eegnet_accuracy(variables: Any) -> Any:
    x, y = series["test"]
    return jnp.mean(network.apply(variables, x, False).argmax(-1) == y)


def eegnet_run(params: Any, in_chain: bool) -> tuple[dict[str, np.ndarray], float]:
    """The norms of the constrained slices after each step, and the test accuracy."""
    trained, kernels = eegnet_train(params, in_chain)
    lengths = {name: np.linalg.norm(np.asarray(w, np.float64), axis=1) for name, w in kernels.items()}
    return lengths, float(eegnet_accuracy(trained))


eegnet = {
    "project in the chain": eegnet_run(project_params(variables["params"], constraints), in_chain=True),
    "projected at the start only": eegnet_run(project_params(variables["params"], constraints), in_chain=False),
    "no constraint": eegnet_run(variables["params"], in_chain=False),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, name, limit in zip(axes, ("spatial", "head"), (SPATIAL_LIMIT, HEAD_LIMIT), strict=True):
    for label, (lengths, _) in eegnet.items():
        ax.plot(lengths[name].reshape(len(lengths[name]), -1).max(axis=1), label=label)
    ax.axhline(limit, color="black", linestyle="--", linewidth=1, label="bound")
    ax.set(xlabel="training step", ylabel="largest norm", title=f"{name} kernel", ylim=(0, None))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()
for label, (_, accuracy) in eegnet.items():
    print(f"{label:28} test accuracy {accuracy:.1%}")
