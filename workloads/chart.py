"""Draws the results of benchmarks.peers as a chart, with the machine's limits.

A panel for each map, a line for each layer: milliseconds of one call by each contestant. The grey bars are the least
time that the machine allows: that of a copy which moves the operands and the result, and that of a matrix product with
as many multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from workloads import results
from workloads.layers import title


@dataclass(frozen=True)
class Style:
    """How a contestant is drawn: its name in the legend, its colour and its marker."""

    title: str
    colour: str
    marker: str


# Okabe and Ito's colours, which the colour-blind can tell apart, each with its own marker.
STYLES = {
    "ours": Style("depthwise_jax", "#D55E00", "o"),
    "ours bfloat16": Style("depthwise_jax, bfloat16", "#E69F00", "o"),
    "native": Style("depthwise_jax, compiled kernels", "#D55E00", "*"),
    "taps": Style("depthwise_jax, sum over taps", "#F0E442", "X"),
    "torch_channels_last": Style("PyTorch (channels last)", "#0072B2", "s"),
    "torch_channels_last bfloat16": Style("PyTorch (channels last), bfloat16", "#0072B2", "D"),
    "torch_contiguous": Style("PyTorch (channels first)", "#56B4E9", "v"),
    "tensorflow": Style("TensorFlow", "#CC79A7", "^"),
    "onnxruntime": Style("ONNX Runtime", "#009E73", "P"),
    "lax": Style("jax.lax", "#000000", "d"),
    "flax": Style("Flax", "#666666", "<"),
    "keras": Style("Keras", "#999999", ">"),
}
TITLES = {
    "forward": "forward",
    "bias_relu": "forward with bias and ReLU",
    "dx": "gradient of the input (dx)",
    "dw": "gradient of the kernel (dw)",
}


def draw(data: dict[str, Any], mode: str) -> Any:
    """The figure of one mode's rows, "single" or "chain".

    Raises:
        ValueError: the mode has no rows.
    """
    rows = [row for row in data["rows"] if row["mode"] == mode]
    if not rows:
        raise ValueError(f"mode must be one that was measured; got {mode!r}")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    directions = [name for name in TITLES if any(row["direction"] == name for row in rows)]
    names = [name for name in STYLES if any(name in row["ms"] for row in rows)]
    height = 1.8 + 0.21 * len(layers)
    width = 3.4 if len(layers) > 20 else 2.4
    # A white background reads the same on a light and on a dark page.
    figure, axes = plt.subplots(
        1,
        len(directions),
        figsize=(2.6 + width * len(directions), height),
        sharey=True,
        squeeze=False,
        facecolor="white",
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        chosen = {row["layer"]: row for row in rows if row["direction"] == direction}
        places = [layers.index(layer) for layer in chosen]
        memory = [results.memory_ms(data["limits"], row["bytes"]) for row in chosen.values()]
        arithmetic = [results.arithmetic_ms(data["limits"], row["multiply_adds"]) for row in chosen.values()]
        axis.barh(places, memory, height=0.9, color="#D9D9D9", label="least time, by memory", zorder=0)
        axis.barh(places, arithmetic, height=0.35, color="#A6A6A6", label="least time, by arithmetic", zorder=1)
        for name in reversed(names):
            style = STYLES[name]
            points = [
                (float(np.median(row["ms"][name])), layers.index(layer))
                for layer, row in chosen.items()
                if name in row["ms"]
            ]
            if points:
                # lightened outlines keep shapes apart where they overlap
                axis.scatter(
                    *zip(*points, strict=True),
                    s=22,
                    c=style.colour,
                    marker=style.marker,
                    edgecolors="white",
                    linewidths=0.4,
                    label=style.title,
                    zorder=3,
                )
        axis.set_xscale("log")
        axis.set_title(TITLES[direction], fontsize=11)
        axis.set_xlabel("ms per call (left is faster)")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(axis="x", color="#E6E6E6", zorder=-1)
        axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(layers)), [title(layer) for layer in layers], fontsize=7)
    axes[0, 0].set_ylim(len(layers) - 0.5, -0.5)
    by_label = {
        text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    shown = ["least time, by memory", "least time, by arithmetic", *(STYLES[name].title for name in names)]
    figure.legend([by_label[name] for name in shown], shown, loc="lower center", ncols=6, frameon=False, fontsize=8)
    device = data["machine"]["cpu"] if data["device"] == "cpu" else data["device"]
    calls = "one call" if mode == "single" else "per call, in chains of 8"
    figure.suptitle(f"{device}, {data['threads']} threads, float32 unless named, {calls}", fontsize=10)
    figure.tight_layout(rect=(0, 0.55 / height, 1, 1))
    return figure
