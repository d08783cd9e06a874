"""Packed documents on one TPU chip: causal_conv1d beside masked forms of other models, and the memory's floor.

    python -m benchmarks.tpu_packed

As benchmarks/tpu_floor.py, it needs no TPU, and runs where `jax[tpu]` is installed. It writes tpu_packed.json and
tpu_packed.md in results/; a program that is known there is not compiled again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tpu_schedule import V5E, lower, measure  # isort: skip  # sets the environment of libtpu

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_floor import Block, Figures, Shapes, digest, figures, mamba
from depthwise_jax import causal_conv1d

RESULTS = Path(__file__).parent / "results"
WINDOW = 4
SHAPES = ((8, 2048, 2048), (1, 2048, 2048))
BLOCKS = (mamba(8, 2048, 1024), mamba(4, 2048, 1024))


def ours(x: Array, kernel: Array, positions: Array) -> Array:
    """By segment_pos."""
    return causal_conv1d(x, kernel, segment_pos=positions)[0]


def ours_by_ids(x: Array, kernel: Array, ids: Array) -> Array:
    """By segment_ids."""
    return causal_conv1d(x, kernel, segment_ids=ids)[0]


def recurrentgemma(x: Array, kernel: Array, positions: Array) -> Array:
    """Windows of x, each cut, multiplied with a mask of zeros and ones, padded, and multiplied with its weights."""
    length = x.shape[1]
    windows = (
        jnp.pad(x[:, : length - j] * (positions[:, j:] >= j).astype(x.dtype)[..., None], ((0, 0), (j, 0), (0, 0)))
        for j in range(WINDOW)
    )
    return sum((w * kernel[WINDOW - 1 - j, :, 0] for j, w in enumerate(windows)), start=jnp.zeros_like(x))


def praxis(x: Array, kernel: Array, positions: Array) -> Array:
    """x moved by one position more for each tap, and masked where it left its document."""
    y, moved = x * kernel[-1, :, 0], x
    for j in range(1, WINDOW):
        moved = jnp.pad(moved, ((0, 0), (1, 0), (0, 0)))[:, : x.shape[1]]
        y += jnp.where((positions >= j)[..., None], moved, jnp.zeros_like(moved)) * kernel[WINDOW - 1 - j, :, 0]
    return y


CONTESTANTS = {"ours": ours, "ours, by ids": ours_by_ids, "RecurrentGemma": recurrentgemma, "praxis": praxis}
# How many arrays of the shape of x cross the memory once.
ARRAYS = {"forward": 2, "dx": 2, "dw": 2, "dx+dw": 3}


@dataclass(frozen=True)
class Entry:
    """A program to compile, and the cycles that the memory needs for it at least; None for a block."""

    key: str
    function: Callable[..., Any]
    shapes: Shapes
    floor: float | None


def cases() -> Iterator[Entry]:
    """The directions of each shape by each contestant; positions are counted in the floor."""
    for shape in SHAPES:
        x = jax.ShapeDtypeStruct(shape, "bfloat16")
        kernel = jax.ShapeDtypeStruct((WINDOW, shape[-1], 1), "bfloat16")
        positions = jax.ShapeDtypeStruct(shape[:2], "int32")
        for name, conv in CONTESTANTS.items():

            def dx(kernel: Array, g: Array, positions: Array, conv: Any = conv, x: Any = x) -> Any:
                return jax.linear_transpose(lambda x: conv(x, kernel, positions), x)(g)[0]

            def dw(x: Array, g: Array, positions: Array, conv: Any = conv, kernel: Any = kernel) -> Any:
                return jax.linear_transpose(lambda kernel: conv(x, kernel, positions), kernel)(g)[0]

            def both(x: Array, kernel: Array, g: Array, positions: Array, conv: Any = conv) -> Any:
                return jax.vjp(lambda x, kernel: conv(x, kernel, positions), x, kernel)[1](g)

            tasks: dict[str, tuple[Callable[..., Any], Shapes]] = {
                "forward": (conv, (x, kernel, positions)),
                "dx": (dx, (kernel, x, positions)),
                "dw": (dw, (x, x, positions)),
                "dx+dw": (both, (x, kernel, x, positions)),
            }
            for direction, (function, shapes) in tasks.items():
                moved = 2 * ARRAYS[direction] * math.prod(shape) + 4 * math.prod(shape[:2])
                label = f"{'x'.join(map(str, shape))} | {direction} | {name}"
                yield Entry(label, function, shapes, moved / V5E.bytes_per_cycle)


def blocks() -> Iterator[Entry]:
    """A training step of a block, packed and not."""
    for block in BLOCKS:
        shapes = {**block.parameters, "kernel": (WINDOW, block.channels, 1)}
        parameters = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
        x, positions = (jax.ShapeDtypeStruct(s, t) for s, t in ((block.x, "bfloat16"), (block.x[:2], "int32")))
        for name, conv in {"packed": ours, "unpacked": lambda x, kernel, _: causal_conv1d(x, kernel)[0]}.items():
            step = partial(_step, block, conv)
            yield Entry(f"{block} | training step | {name}", step, (parameters, x, positions, x), None)


def _step(block: Block, conv: Any, parameters: Any, x: Array, positions: Array, g: Array) -> Any:
    def apply(parameters: Any, x: Array) -> Array:
        return block.body(parameters, x, lambda a: conv(a, parameters["kernel"], positions))

    y, vjp = jax.vjp(apply, parameters, x)
    return y, vjp(g)


def report(results: dict[str, Figures]) -> str:
    """The tables in Markdown."""
    lines = [
        "# Packed documents on one TPU v5e chip: cycles by the compiler's schedules",
        "",
        f"Written by `python -m benchmarks.tpu_packed` with jax {jax.__version__} and its libtpu; nothing was run on a",
        "TPU. A causal window of 4 over (batch, length, channels) in bfloat16, with a position for each token.",
        "Thousands of cycles, and their ratio to the time in which x, y, gradients and positions cross HBM once.",
        "",
        "Both gradients are one loop that reads x, g and positions once, and vector instructions bound it. At",
        "(1, 2048, 2048) XLA takes blocks of 8 x 1,024 values, where it takes 8 x 512 of the larger batch.",
        "",
        f"| shape | direction | floor | {' | '.join(CONTESTANTS)} |",
        "|---|---|" + "---:|" * (1 + len(CONTESTANTS)),
    ]
    floors = {entry.key: entry.floor for entry in cases()}
    for key in floors:
        shape, direction, name = key.split(" | ")
        if name != "ours":
            continue
        cells: list[str] = []
        for other in CONTESTANTS:
            found, floor = results.get(f"{shape} | {direction} | {other}"), floors[key]
            cells.append(f"{found['cycles'] / 1e3:,.1f} ({found['cycles'] / floor:.2f})" if found and floor else "")
        lines.append(f"| {shape} | {direction} | {(floors[key] or 0) / 1e3:,.1f} | {' | '.join(cells)} |")
    lines += ["", "| block, training step | packed | unpacked | packed / unpacked |", "|---|---:|---:|---:|"]
    for block in BLOCKS:
        packed, unpacked = (results.get(f"{block} | training step | {name}") for name in ("packed", "unpacked"))
        if packed and unpacked:
            ratio = f"{packed['cycles'] / unpacked['cycles']:.3f}"
            lines.append(f"| {block} | {packed['cycles'] / 1e3:,.0f} | {unpacked['cycles'] / 1e3:,.0f} | {ratio} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Compiles what is missing, and writes the results and the table."""
    path = RESULTS / "tpu_packed.json"
    results: dict[str, Figures] = json.loads(path.read_text()) if path.exists() else {}
    for entry in (*cases(), *blocks()):
        lowered = lower(entry.function, *entry.shapes)
        key = digest(lowered)
        if entry.key in results and results[entry.key]["program"] == key:
            continue
        results[entry.key] = {**figures(measure(lowered)), "program": key}
        print(entry.key, results[entry.key], flush=True)
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        (RESULTS / "tpu_packed.md").write_text(report(results))


if __name__ == "__main__":
    main()
