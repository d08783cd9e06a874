# %% [markdown]
# # Performance
#
# What `python -m benchmarks.peers --json benchmarks/results/cpu.json` measured, compared with that machine's
# peak: the bandwidth of a copy and the rate of multiply-adds, both measured in the same run. Nothing is timed here.
#
# Each layer is a depthwise layer of a known network. Every result was compared with a float64 reference before it was
# timed; samples were taken in turn, and a ratio is the median of pairwise ratios. Figures are for one call in a chain
# of eight, which for JAX is one compiled program, as in a network; those of plain lax are for single calls,
# because a chain of its slowest layers would take too long to time. A layer's name gives its input's shape, its window
# and its stride. *dx* is the gradient with respect to the input, *dw* that with respect to the kernel.

# %%
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

sys.path.insert(0, "..")  # workloads/ lies beside this directory

from depthwise_jax import explain
from depthwise_jax.lowering import native
from workloads import results
from workloads.chart import STYLES, TITLES, draw
from workloads.layers import NETWORKS
from workloads.layers import title as layer_title

plt.style.use("depthwise_jax.mplstyle")
data = results.read(Path("../benchmarks/results/cpu.json"))
print(data["machine"]["cpu"], "with", data["threads"], "threads; compiled kernels:", data["compiled_kernels"])
print(", ".join(f"{name} {version}" for name, version in data["versions"].items()))
rows = {(row["layer"], row["direction"], row["mode"]): row for row in data["rows"]}
layers = list(dict.fromkeys(row["layer"] for row in data["rows"]))
DIRECTIONS = {direction: TITLES[direction] for direction in ("forward", "dx", "dw")}
PEERS = {"torch_channels_last": "chain", "lax": "single"}
print(len(layers), "layers")

# %% [markdown]
# ## The machine
#
# The bandwidth depends on the size: small copies stay in the caches. A layer's memory limit is the time of a copy that
# moves as many bytes as its operands and its result have.

# %%
sizes = np.array([point["bytes"] for point in data["limits"]["copy"]])
bandwidths = np.array([point["GB/s"] for point in data["limits"]["copy"]])
peak = max(data["limits"]["multiply_add"].values())
figure, ax = plt.subplots(figsize=(6, 3))
ax.semilogx(sizes / 2**20, bandwidths, "o-", base=2)
ax.set(xlabel="bytes read and written [MiB]", ylabel="bandwidth of a copy [GB/s]", ylim=(0, None))
plt.show()
print(data["limits"]["copy_is"])
print(data["limits"]["multiply_add_is"], data["limits"]["multiply_add"])

# %% [markdown]
# ## Every layer and every peer
#
# The grey bars are the least time that the machine allows: light for memory, dark for arithmetic.

# %%
with plt.rc_context({"figure.constrained_layout.use": False}):  # it lays itself out
    draw(data, "chain")
plt.show()

# %% [markdown]
# ## Rooflines
#
# Multiply-adds per second over multiply-adds per byte. The slopes are the fastest and the slowest copy that was
# measured, the ceiling is the matrix product.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
intensity = np.geomspace(0.1, 200, 100)
for ax, (direction, title) in zip(axes, DIRECTIONS.items(), strict=True):
    for bandwidth, style, name in ((bandwidths.max(), "--", "fastest copy"), (bandwidths.min(), "-", "slowest copy")):
        limit = np.minimum(peak, bandwidth * intensity)
        ax.loglog(intensity, limit, style, color="black", linewidth=1, label=f"limits, {name}")
    for peer, mode in (PEERS | {"ours": "chain"}).items():
        style = STYLES[peer]
        chosen = [rows[layer, direction, mode] for layer in layers if (layer, direction, mode) in rows]
        chosen = [row for row in chosen if peer in row["ms"]]
        rate = [row["multiply_adds"] / (1e6 * np.median(row["ms"][peer])) for row in chosen]
        where = [row["multiply_adds"] / row["bytes"] for row in chosen]
        ax.plot(
            where,
            rate,
            style.marker,
            color=style.colour,
            markeredgecolor="white",
            markeredgewidth=0.4,
            label=style.title,
        )
    ax.set(title=title, xlabel="multiply-adds per byte")
axes[0].set_ylabel("multiply-adds [G/s]")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
plt.show()

# %% [markdown]
# ## Ratios
#
# Time of ours over the peer's, each layer a point, sorted: below 1 ours is faster.


# %%
def ratios(peer: str, direction: str, mode: str) -> dict[str, float]:
    """By layer, ours over the peer's, where both were measured."""
    measured = {layer: rows.get((layer, direction, mode), {"ms": {}})["ms"] for layer in layers}
    return {layer: results.ratio(ms["ours"], ms[peer]) for layer, ms in measured.items() if "ours" in ms and peer in ms}


figure, axes = plt.subplots(1, len(PEERS), figsize=(10, 3.2))
summary: dict[tuple[str, str], dict[str, Any]] = {}
for ax, (peer, mode) in zip(axes, PEERS.items(), strict=True):
    for (direction, title), marker in zip(DIRECTIONS.items(), "os^", strict=True):
        found = ratios(peer, direction, mode)
        ax.semilogy(sorted(found.values()), marker, markersize=4, label=title)
        worst = max(found, key=lambda layer, found=found: found[layer], default=None)
        summary[STYLES[peer].title, title] = {
            "layers": len(found),
            "geometric mean": results.mean(found.values()) if found else np.nan,
            "worst": found[worst] if worst else np.nan,
            "worst layer": layer_title(worst) if worst else "none",
        }
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set(
        title=f"against {STYLES[peer].title}, {mode} calls",
        xlabel="layers, sorted",
        ylabel="time of ours / time of the peer",
    )
axes[0].legend()
plt.show()
display(pd.DataFrame(summary).T)

# %% [markdown]
# ## What is chosen, and why
#
# `explain` tells which *lowering* (way to compute a map) this machine would use for each map of each layer.
# "Bound by" names the larger of the two limits above. The last columns say how much of it the measurement reached:
# 100 % is the limit.

# %%
status = native.status()
print("compiled kernels on the machine that ran this notebook:", status.instruction_set or status.reason)
table: dict[str, dict[str, str]] = {}
reasons: dict[str, None] = {}  # in the order in which they are met
for case in NETWORKS:
    x, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in (case.x, case.kernel))
    explanation = explain(x, kernel, **case.geometry, platform="cpu")
    choices = {"forward": explanation.forward, "dx": explanation.input_grad, "dw": explanation.kernel_grad}
    reasons |= {str(choice): None for choice in choices.values()}
    line = {direction: choice.lowering for direction, choice in choices.items()}
    for direction in DIRECTIONS:
        row = rows.get((case.name, direction, "chain"))
        if row is None or "ours" not in row["ms"]:
            continue
        memory = results.memory_ms(data["limits"], row["bytes"])
        arithmetic = results.arithmetic_ms(data["limits"], row["multiply_adds"])
        line["bound by"] = "memory" if memory > arithmetic else "arithmetic"
        line[f"{direction}, of the limit"] = f"{max(memory, arithmetic) / np.median(row['ms']['ours']):.0%}"
    table[layer_title(case.name)] = line
print(*reasons, sep="\n")
with pd.option_context("display.max_rows", None):
    display(pd.DataFrame(table).T.fillna(""))

# %% [markdown]
# The choice depends on the platform and on the number of mesh axes over which the compiler partitions the program. One
# layer on three platforms, and partitioned:

# %%
x, kernel = jax.ShapeDtypeStruct((8, 56, 56, 144), "float32"), jax.ShapeDtypeStruct((3, 3, 144, 1), "float32")
chosen = {}
for platform, partitioned in (("cpu", 0), ("cpu", 2), ("tpu", 0), ("cuda", 0), ("cuda", 2)):
    explanation = explain(x, kernel, padding="same", platform=platform, partitioned=partitioned)
    choices = {"forward": explanation.forward, "dx": explanation.input_grad, "dw": explanation.kernel_grad}
    chosen[f"{platform}, {partitioned} mesh axes"] = choices
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(chosen).T)
