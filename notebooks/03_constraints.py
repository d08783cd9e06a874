# %% [markdown]
# # Constraints
#
# A constraint is a projection onto a set, and the place where it is applied decides whether the weights lie in the set
# (are *feasible*). `project`, last in an Optax chain, applies it to the result of `optax.apply_updates`. This notebook
# measures what happens when it is applied elsewhere: inside the forward pass, before the update, first in the chain,
# before an average.

# %%
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from IPython.display import display

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from constrained import (
    STEPS,
    Params,
    Step,
    batches,
    constrained_by,
    eegnet_training,
    initial,
    loss_of,
    noisy_series,
    norms,
    train,
)

from depthwise_jax.constraints import MaxNorm, NonNeg, UnitNorm
from depthwise_jax.optim import constraints_of, feasibility, project, project_params
from workloads.eegnet import HEAD_LIMIT, SPATIAL_LIMIT, EEGNet

plt.style.use("depthwise_jax.mplstyle")

# %% [markdown]
# ## Four places
#
# A classifier of handwritten digits with eight 5x5 filters, trained by plain gradient descent on the same batches. Each
# filter's norm must not exceed 0.5.

# %%
LIMIT = 0.5
data = batches()
examples = data[0][0]
start, sgd = initial(examples), optax.sgd(0.1)
ball = constrained_by(MaxNorm(LIMIT, axis="window"), examples)


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


def run(step: Step, optimizer: Any, constraints: Any) -> Any:
    """The losses and the parameters after each step, from feasible initial parameters."""
    params = project_params(start, constraints)
    return train(step, optimizer.init(params), params, data)


# %%
first, last = optax.chain(project(ball), sgd), optax.chain(sgd, project(ball))
runs = {
    "last in the chain": run(plain(last), last, ball),
    "inside the forward pass": run(inside(sgd, ball), sgd, ball),
    "before the update": run(before(sgd, ball), sgd, ball),
    "first in the chain": run(plain(first), first, ball),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
# Lines that coincide lie on top of each other: the widest is drawn first.
for (name, (losses, params)), width in zip(runs.items(), (6, 3.5, 1.5, 1), strict=True):
    left.plot(norms(params).max(axis=1), label=name, linewidth=width)
    right.plot(np.convolve(losses, np.ones(20) / 20, mode="valid"), linewidth=width)
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
# * *Before the update*, every step ends outside by the length of the last update: the weights that are evaluated,
#   averaged or saved break the constraint.
# * *First in the chain*, `project` mistakes the gradient for the update, and what it passes on is no longer a gradient.
# * *Inside the forward pass*, the stored weights are free and only their projection counts. Outside the ball the loss
#   depends only on a filter's direction, so its gradient is orthogonal to the filter, and each step of gradient descent
#   makes the filter longer. The longer it is, the less a step turns it.
#
# The losses of the first three hardly differ here; their stored weights do.

# %%
_, params = runs["inside the forward pass"]
final = jax.tree.map(lambda p: p[-1], params)
batch = data[0][-1], data[1][-1]
kernel = final["filters"]["kernel"]
for name, projection in (("inside the forward pass", ball), ("outside it", constrained_by(None, examples))):
    gradient = jax.grad(lambda p, projection=projection: loss_of(project_params(p, projection), batch))(final)
    gradient = gradient["filters"]["kernel"]
    lengths = jnp.linalg.norm(kernel, axis=(0, 1)) * jnp.linalg.norm(gradient, axis=(0, 1))
    cosines = jnp.abs((kernel * gradient).sum(axis=(0, 1)) / lengths)[norms(params)[-1][None] > LIMIT]
    print(f"projection {name:24} largest |cosine| of a filter and its gradient: {float(cosines.max()):.1e}")

# %% [markdown]
# ## Weights that die
#
# Inside the forward pass `NonNeg` is a rectifier on the weights: below zero the gradient is zero, so a weight that
# starts or arrives there stays. With `project` a weight rests at exactly zero and leaves when the gradient is negative.

# %%
positive = constrained_by(NonNeg(), examples)
constrained = optax.chain(sgd, project(positive))
kernels = {
    name: np.asarray(params["filters"]["kernel"]).reshape(STEPS, -1)
    for name, (_, params) in {
        "last in the chain": run(plain(constrained), constrained, positive),
        "inside the forward pass": train(inside(sgd, positive), sgd.init(start), start, data),
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
# it a unit vector again. An average must be projected before it is used.

# %%
sphere = constrained_by(UnitNorm(axis="window"), examples)
on_sphere = optax.chain(optax.adam(0.02), project(sphere))
losses, params = run(plain(on_sphere), on_sphere, sphere)


def follow(average: Params, params: Params) -> tuple[Params, Params]:
    average = optax.incremental_update(params, average, 0.05)
    return average, average


_, averages = jax.lax.scan(follow, project_params(start, sphere), params)
projected = jax.vmap(lambda p: project_params(p, sphere))(averages)
figure, ax = plt.subplots(figsize=(6, 3.2))
for name, tree in (("parameters", params), ("average", averages), ("average, projected", projected)):
    ax.plot(norms(tree).min(axis=1), label=name, linewidth=6 if name == "parameters" else 1.5)
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
# 0.25. The series are those of a smart watch's motion sensors: six channels, four activities. On the clean series every
# network is right about nearly all test series, so the task here is harder: five series of each activity to train on,
# and noise with the standard deviation of the signal. Three ways to train, each from eight seeds: with `project` in the
# chain, with only the initial weights projected, and without a constraint.

# %%
series = noisy_series(0)
rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
constraints = constraints_of(EEGNet(), series["train"][0], True, rngs=rngs)
constraints["head"]["kernel"] = MaxNorm(HEAD_LIMIT)  # an nn.Dense, which cannot declare one
trainings = {
    "project in the chain": eegnet_training(constraints, at_start=True, in_chain=True),
    "projected at the start only": eegnet_training(constraints, at_start=True, in_chain=False),
    "no constraint": eegnet_training(constraints, at_start=False, in_chain=False),
}
SEEDS = 8
results = {
    label: [training(jax.random.key(seed), *noisy_series(seed).values()) for seed in range(SEEDS)]
    for label, training in trainings.items()
}

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, name, limit in zip(axes, ("spatial", "head"), (SPATIAL_LIMIT, HEAD_LIMIT), strict=True):
    for (label, runs_of), width in zip(results.items(), (6, 2.5, 1.2), strict=True):
        lengths = np.linalg.norm(np.asarray(runs_of[0][0][name], np.float64), axis=1)
        ax.plot(lengths.reshape(len(lengths), -1).max(axis=1), label=label, linewidth=width)
    ax.axhline(limit, color="black", linestyle="--", linewidth=1, label="bound")
    ax.set(xlabel="training step", ylabel="largest norm", title=f"{name} kernel, first seed", ylim=(0, None))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()


def summary(values: Any) -> str:
    """The mean over seeds, and its standard error."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


table = {}
for label, runs_of in results.items():
    _, accuracies, losses = zip(*runs_of, strict=True)
    table[label] = {"test accuracy": summary(accuracies), "test loss [nats]": summary(losses)}
display(pd.DataFrame(table).T)

# %% [markdown]
# The accuracies differ by little more than their standard errors: here the constraint does not make the network right
# more often. It makes the network less sure of wrong answers: the bounded head gives smaller logits, and the test loss
# is clearly lower. Projecting only the initial weights hardly helps, since the head leaves its set in the first steps.
