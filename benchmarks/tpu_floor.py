"""Depthwise convolutions and blocks around them on one TPU chip, beside plain Flax and the hardware's floors.

    python -m benchmarks.tpu_floor                          # every case; many hours, as a convolution compiles for long
    python -m benchmarks.tpu_floor --groups training blocks
    python -m benchmarks.tpu_floor --only "k4 8x" "k4 4x" --by ours taps conv
    python -m benchmarks.tpu_floor --groups blocks --only "training step" --by recomputed
    python -m benchmarks.tpu_floor --known                    # rows whose programs are known by another name
    python -m benchmarks.tpu_floor --report                 # writes the table of what is known, compiles nothing

It needs no TPU: nothing is run, and cycles are by the compiler's schedules, as benchmarks/tpu_schedule.py reads them.
Run it where `jax[tpu]` is installed, as in the virtual environment of `make test-tpu`. The figures are kept in
results/tpu_floor.json with a digest of each lowered program, and a program that is known there is not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from benchmarks.tpu_schedule import V5E, V6E, Chip, Program, lower, measure  # isort: skip  # sets the environment of libtpu

import flax
import flax.linen
import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import pallas_causal
from depthwise_jax import depthwise_conv
from depthwise_jax.lowering import taps
from depthwise_jax.lowering.choice import LOWERINGS

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("forward", "dx", "dw", "dx+dw")
DTYPES = ("bfloat16", "float32")

Shapes = tuple[Any, ...]
# A function and the shapes of its arguments.
Task = tuple[Callable[..., Any], Shapes]


@dataclass(frozen=True)
class Case:
    """A depthwise convolution."""

    x: tuple[int, ...]
    window: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1

    def __str__(self) -> str:
        options = {"s": self.stride, "d": self.dilation, "m": self.multiplier}
        suffix = "".join(f" {name}{n}" for name, n in options.items() if n > 1)
        return f"{len(self.window)}D k{self.window[0]}{suffix} {'x'.join(map(str, self.x))}"

    @property
    def is_plain_sequence(self) -> bool:
        """Whether it is a sequence at stride and dilation one, with one kernel per channel."""
        return len(self.window) == self.stride == self.dilation == self.multiplier == 1

    @property
    def padding(self) -> Literal["causal", "same"]:
        """Sequences are padded as in a causal model, images as in a convolutional network."""
        return "causal" if len(self.window) == 1 else "same"

    def shapes(self, dtype: str) -> Shapes:
        """x, kernel and g."""
        spatial = (-(-n // self.stride) for n in self.x[1:-1])
        g = (self.x[0], *spatial, self.x[-1] * self.multiplier)
        kernel = (*self.window, self.x[-1], self.multiplier)
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in (self.x, kernel, g))

    def convolve(self, by: str, x: Array, kernel: Array) -> Array:
        """The convolution by one of CONTESTANTS."""
        if by == "pallas":
            return pallas_causal.causal(x, kernel[..., 0])
        if by != "flax":
            implementation: Any = by if by in LOWERINGS else None
            return depthwise_conv(
                x,
                kernel,
                strides=self.stride,
                dilation_rate=self.dilation,
                padding=self.padding,
                implementation=implementation,
            )
        channels = self.x[-1] * self.multiplier
        module = flax.linen.Conv(
            channels,
            self.window,
            self.stride,
            self.padding.upper(),
            kernel_dilation=self.dilation,
            feature_group_count=self.x[-1],
            use_bias=False,
            dtype=x.dtype,
        )
        y: Any = module.apply({"params": {"kernel": kernel.reshape(*self.window, 1, channels)}}, x)
        return y

    def task(self, direction: str, dtype: str, by: str) -> Task:
        """One direction; the two gradients in one program are "dx+dw"."""
        conv = partial(self.convolve, by)
        x, kernel, g = self.shapes(dtype)
        tasks: dict[str, Task] = {
            "forward": (conv, (x, kernel)),
            "dx": (lambda kernel, g: jax.linear_transpose(lambda x: conv(x, kernel), x)(g)[0], (kernel, g)),
            "dw": (lambda x, g: jax.linear_transpose(lambda kernel: conv(x, kernel), kernel)(g)[0], (x, g)),
            "dx+dw": (lambda x, kernel, g: jax.vjp(conv, x, kernel)[1](g), (x, kernel, g)),
        }
        return tasks[direction]

    def floors(self, direction: str, dtype: str, chip: Chip = V5E) -> tuple[float, float]:
        """The cycles that the memory and the vector unit need at least; taps in the padding need nothing."""
        x, _, g = self.shapes(dtype)
        size = jnp.dtype(dtype).itemsize
        moved = (math.prod(x.shape) * (2 if direction == "dx+dw" else 1) + math.prod(g.shape)) * size
        products = self.x[0] * self.x[-1] * self.multiplier * (2 if direction == "dx+dw" else 1)
        for n, o, k in zip(self.x[1:-1], g.shape[1:-1], self.window, strict=True):
            extent = (k - 1) * self.dilation + 1
            low = extent - 1 if self.padding == "causal" else max(0, (o - 1) * self.stride + extent - n) // 2
            products *= sum(0 <= i * self.stride + t * self.dilation - low < n for i in range(o) for t in range(k))
        return moved / chip.bytes_per_cycle, 2 * products / chip.lanes


@dataclass(frozen=True)
class Block:
    """A block of a network around one depthwise convolution.

    Attributes:
        name: what it is called.
        x: the shape of its input.
        window: the convolution's.
        parameters: the shapes of its other parameters.
        channels: the convolution's.
        body: (parameters, x, convolution of one array) -> y.
    """

    name: str
    x: tuple[int, ...]
    window: tuple[int, ...]
    channels: int
    parameters: dict[str, tuple[int, ...]]
    body: Callable[[dict[str, Array], Array, Callable[[Array], Array]], Array]

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.x))}"

    def apply(self, by: str, parameters: dict[str, Array], x: Array) -> Array:
        """The block; by "none" a product with one tap stands in the convolution's place."""
        kernel = parameters["kernel"]

        def convolution(a: Array) -> Array:
            if by == "none":
                return a * kernel[(0,) * len(self.window)][:, 0]
            return Case(a.shape, self.window).convolve(by, a, kernel)

        return self.body(parameters, x, convolution)

    def task(self, program: str, dtype: str, by: str) -> Task:
        """The forward pass, a training step's two passes, or its backward pass alone as in a scan over layers."""
        shapes = {**self.parameters, "kernel": (*self.window, self.channels, 1)}
        parameters = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct(self.x, dtype)
        apply = partial(self.apply, by)

        def step(parameters: Any, x: Array, g: Array) -> Any:
            y, vjp = jax.vjp(apply, parameters, x)
            return y, vjp(g)

        if program == "forward":
            return apply, (parameters, x)
        if program == "training step":
            return step, (parameters, x, x)
        residuals = jax.eval_shape(lambda parameters, x: jax.vjp(apply, parameters, x)[1], parameters, x)
        return lambda residuals, g: residuals(g), (residuals, x)


PROGRAMS = ("forward", "training step", "backward")


def _normalized(a: Array, scale: Array) -> Array:
    wide = a.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(a.dtype) * scale


def mamba(batch: int, length: int, width: int, *, split: bool = True) -> Block:
    """Like Mamba's: to two branches of twice the width, a causal window of 4, bias, silu, gate, and back.

    The branches are the halves of one product, or a product each.
    """
    inner = 2 * width

    def body(p: dict[str, Array], x: Array, convolution: Callable[[Array], Array]) -> Array:
        u, gate = jnp.split(x @ p["in"], 2, axis=-1) if split else (x @ p["in"], x @ p["gate"])
        u = jax.nn.silu(convolution(u) + p["bias"])
        return (u * jax.nn.silu(gate)) @ p["out"]

    into = {"in": (width, 2 * inner)} if split else {"in": (width, inner), "gate": (width, inner)}
    parameters = {**into, "bias": (inner,), "out": (inner, width)}
    name = "Mamba-like block" if split else "Mamba-like block of 2 products"
    return Block(name, (batch, length, width), (4,), inner, parameters, body)


def conformer(batch: int, length: int, width: int) -> Block:
    """A Conformer's convolution module: norm, to a gated linear unit, a window of 31, norm, silu, and back."""

    def body(p: dict[str, Array], x: Array, convolution: Callable[[Array], Array]) -> Array:
        a = jax.nn.glu(_normalized(x, p["scale"]) @ p["in"])
        return x + jax.nn.silu(_normalized(convolution(a), p["scale2"])) @ p["out"]

    parameters = {"scale": (width,), "in": (width, 2 * width), "scale2": (width,), "out": (width, width)}
    return Block("Conformer's convolution module", (batch, length, width), (31,), width, parameters, body)


def inverted_residual(batch: int, size: int, width: int) -> Block:
    """MobileNetV2's: to six times the width, relu6, a window of 3x3, relu6, and back."""

    def body(p: dict[str, Array], x: Array, convolution: Callable[[Array], Array]) -> Array:
        a = jax.nn.relu6(x @ p["in"] + p["bias"])
        return x + jax.nn.relu6(convolution(a) + p["bias2"]) @ p["out"]

    parameters = {"in": (width, 6 * width), "bias": (6 * width,), "bias2": (6 * width,), "out": (6 * width, width)}
    return Block("inverted residual block", (batch, size, size, width), (3, 3), 6 * width, parameters, body)


def convnext(batch: int, size: int, width: int) -> Block:
    """ConvNeXt's: a window of 7x7, norm, to four times the width, gelu, and back."""

    def body(p: dict[str, Array], x: Array, convolution: Callable[[Array], Array]) -> Array:
        return x + jax.nn.gelu(_normalized(convolution(x), p["scale"]) @ p["in"]) @ p["out"]

    parameters = {"scale": (width,), "in": (width, 4 * width), "out": (4 * width, width)}
    return Block("ConvNeXt block", (batch, size, size, width), (7, 7), width, parameters, body)


def _sequences(
    windows: Sequence[int], batches: Sequence[int], lengths: Sequence[int], channels: Sequence[int], **options: int
) -> list[Case]:
    return [Case((b, n, c), (k,), **options) for k, b, n, c in itertools.product(windows, batches, lengths, channels)]


def _images(windows: Sequence[int], batches: Sequence[int], **options: int) -> list[Case]:
    sizes = ((56, 128), (28, 256), (14, 512))
    return [Case((b, n, n, c), (k, k), **options) for k, b, (n, c) in itertools.product(windows, batches, sizes)]


# What each group tries, the most telling first.
CASES: dict[str, list[Case]] = {
    "training": [
        Case((8, 2048, 2048), (4,)),
        Case((4, 2048, 2048), (4,)),
        Case((1, 2048, 2048), (4,)),
        Case((4, 8192, 4096), (4,)),
        Case((16, 1024, 1024), (4,)),
        Case((32, 56, 56, 128), (3, 3)),
        Case((4, 56, 56, 128), (3, 3)),
        Case((32, 28, 28, 128), (3, 3), multiplier=2),
        Case((32, 56, 56, 128), (3, 3), stride=2),
        Case((32, 28, 28, 256), (5, 5)),
        Case((32, 14, 14, 512), (7, 7)),
        Case((16, 1000, 512), (31,)),
        Case((4, 16, 56, 56, 64), (3, 3, 3)),
        Case((8, 28, 28, 256), (31, 31)),
    ],
    "windows": _sequences((5, 8, 9, 16, 2, 3, 6, 7), (8, 4), (2048,), (2048,)),
    "dilation": [case for d in (2, 4) for case in _sequences((4, 8), (8, 4, 1), (2048,), (2048,), dilation=d)],
    "multiplier": [
        Case((32, n, n, c), (3, 3), multiplier=m)
        for m, (c, n) in itertools.product((2, 4), ((128, 28), (256, 28), (512, 14), (64, 56)))
    ],
    "images": [*_images((3, 5, 7), (4, 1, 8, 32)), *_images((3,), (2, 6, 3, 5, 7)), *_images((5, 7), (2, 3))],
    # Where the choice between sum and convolution turns, beside the images above.
    "edges": [
        *(Case((b, 7, 7, 1024), (3, 3)) for b in range(1, 8)),
        *(Case((b, 16, 16, 512), (k, k)) for k, b in ((3, 4), (3, 5), (3, 6), (5, 4), (5, 5), (7, 4), (7, 5))),
        *(Case((b, n, n, c), (3, 3)) for b, n, c in ((2, 20, 256), (5, 20, 256), (6, 26, 256), (6, 32, 256))),
        *(Case((b, 28, 28, c), (3, 3)) for b, c in ((6, 128), (5, 512), (6, 512))),
        *(Case((b, n, n, c), (5, 5)) for b, n, c in ((5, 28, 256), (5, 14, 512), (7, 14, 512), (1, 32, 256))),
        *(Case((b, 7, 7, 1024), (5, 5)) for b in (1, 3, 5)),
        *(Case((b, 56, 56, 128), (k, k)) for k, b in ((5, 7), (7, 6), (7, 7), (3, 16))),
        *(Case((b, 48, 48, 128), (3, 3)) for b in (6, 7, 8)),
        *(Case((b, 64, 64, 128), (3, 3)) for b in (7, 8)),
        Case((4, 112, 112, 64), (3, 3)),
    ],
    "sequences": [
        *_sequences((4,), (1, 2, 4, 8, 16, 32), (2048,), (768, 1536, 2048, 2560)),
        *_sequences((4,), (8, 2), (1000, 8192), (768, 1000, 2560)),
        *_sequences((4,), (8, 4), (2048,), (2048,), stride=2),
        Case((7, 1000, 768), (4,), stride=2),
        *_sequences((2, 3, 5, 8, 9, 16), (1, 2, 16, 32), (2048,), (2048,)),
    ],
    "volumes": [Case((b, 16, 56, 56, 64), (3, 3, 3)) for b in (1, 2, 3, 4)],
    "v6e": [
        *_sequences((4,), (8, 4, 1), (2048,), (2048,)),
        Case((16, 1024, 1024), (4,)),
        *_sequences((8, 9), (8,), (2048,), (2048,)),
        Case((4, 56, 56, 128), (3, 3)),
    ],
}
BLOCKS = [
    mamba(8, 2048, 1024),
    mamba(4, 2048, 1024),
    mamba(2, 8192, 1536),
    *(mamba(*x, split=False) for x in ((8, 2048, 1024), (4, 2048, 1024), (2, 8192, 1536))),
    inverted_residual(32, 28, 32),
    inverted_residual(4, 28, 32),
    convnext(32, 14, 384),
    conformer(16, 1000, 512),
]
# This package's choice; plain Flax; this package's lowerings; its choice if no value is kept for a backward pass; its
# choice with masked padding; a stand-in for other projects' Pallas kernels, for causal sequences.
CONTESTANTS = ("ours", "flax", "taps", "conv", "recomputed", "masked", "pallas")
_CHANGES = {"recomputed": ("keeps_value", False), "masked": ("masks_padding", True)}
GROUPS = ("training", "blocks", "windows", "dilation", "multiplier", "images", "edges", "sequences", "volumes", "v6e")


@dataclass(frozen=True)
class Entry:
    """A program to compile: of a case or block, in a direction or program, in a dtype, by one of those compared."""

    group: str
    subject: Case | Block
    what: str
    dtype: str
    by: str

    @property
    def chip(self) -> Chip:
        """For which chip it is compiled."""
        return V6E if self.group == "v6e" else V5E

    @property
    def key(self) -> str:
        """Its key in the results."""
        chip = " | v6e" if self.chip is V6E else ""
        return f"{self.subject} | {self.what} | {self.dtype} | {self.by}{chip}"

    def beside(self, by: str) -> Entry:
        """The same by another of those compared."""
        return replace(self, by=by)

    def lower(self) -> Any:
        """The program, lowered for one chip."""
        function, shapes = self.subject.task(self.what, self.dtype, self.by)
        if self.by not in _CHANGES:
            return lower(function, *shapes, chip=self.chip)
        name, value = _CHANGES[self.by]
        with mock.patch.object(taps, name, return_value=value):
            return lower(function, *shapes, chip=self.chip)


def entries(groups: Sequence[str], by: Sequence[str], dtypes: Sequence[str]) -> Iterator[Entry]:
    """All programs of some groups, in order."""
    for group in groups:
        if group == "blocks":
            for block, what, b in itertools.product(BLOCKS, PROGRAMS, (*by, "none")):
                yield Entry(group, block, what, "bfloat16", b)
            continue
        for dtype, case, what, b in itertools.product(dtypes, CASES[group], DIRECTIONS, by):
            # Its two gradients are one kernel.
            if b != "pallas" or (case.is_plain_sequence and what in ("forward", "dx+dw")):
                yield Entry(group, case, what, dtype, b)


# Figures of a program, and the digest of its lowered text.
Figures = dict[str, Any]


_MOVE = re.compile(r"^ *(%\w+) = stablehlo\.(reshape|transpose|slice) (%\w+).*?: \(tensor<(\S+)>\) -> tensor<(\S+)>")


def digest(lowered: Any, chip: Chip = V5E) -> str:
    """What tells a program lowered for a chip from others that compute something else, or in another order.

    What moves nothing is left out: reshapes, transposes and whole slices that add, drop or pass axes of one. So a
    convolution by this package's "conv" is the same program as by Flax where it adds no more to it.
    """

    def lengths(shape: str) -> list[str]:
        return [n for n in shape.split("x") if n != "1"]

    names: dict[str, str] = {}
    lines: list[str] = [] if chip is V5E else [chip.topology]

    def renamed(found: re.Match[str]) -> str:
        return names.get(found[0], found[0])

    for line in re.sub(r"@jit_\w+", "", lowered.as_text()).splitlines():
        move = _MOVE.match(line)
        if move and lengths(move[4]) == lengths(move[5]) and _keeps_order(move):
            names[move[1]] = names.get(move[3], move[3])
            continue
        name = re.match(r"^ *(%\w+)(?::\d+)? = ", line)
        if "func.func" in line:
            names.clear()
        line = re.sub(r"%\w+", renamed, line)
        if name:
            names[name[1]] = f"%{len(lines)}"
        lines.append(line.split(" = ")[-1] if name else line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _keeps_order(move: re.Match[str]) -> bool:
    """Whether a transpose leaves the axes longer than one in their order; what is none does."""
    found = re.search(r"dims = \[([\d, ]*)\]", move[0])
    if not found:
        return True
    sizes = move[4].split("x")
    axes = [axis for axis in map(int, found[1].split(", ")) if sizes[axis] != "1"]
    return axes == sorted(axes)


def figures(program: Program) -> Figures:
    """What the results keep of a program."""
    return {
        "cycles": round(program.cycles),
        "bytes": round(program.bytes),
        "temporaries": program.temporaries,
        "seconds": round(program.seconds, 1),
        "unknown": program.unknown,
    }


_HEAD = """\
# One TPU v5e chip: cycles by the compiler's schedules, beside plain flax.linen.Conv and the floors

Written by `python -m benchmarks.tpu_floor` with jax {jax} and its libtpu; nothing was run on a TPU.
benchmarks/tpu_schedule.py says how cycles are read, and what the model leaves out. Thousands of cycles.
Sequences are padded as causal, images as same.

* memory: the floor of x, y and their gradients crossing HBM once, at {hbm:.0f} bytes a cycle. It counts their values,
  not the padding of their layouts in HBM, which ours moves too: XLA pads 1,000 channels to 1,024 where they lie along
  the lanes, which alone is 1.02 times the floor.
* vector unit: the floor of two operations for each product, at {lanes} a cycle.
* flax: plain flax.linen.Conv. taps, conv: this package's two formulations, where the choice hung on them.
* recomputed: ours, but XLA may compute the convolution again in the backward pass instead of keeping it.
* masked: ours, but products with the padding are masked.
* pallas: this repository's own benchmarks/pallas_causal.py, in place of other projects' Pallas kernels.
* "=": the program of "ours", by its lowered text, so it was compiled once.
* ">=": a lower bound. Copies around a convolution may have a loop whose trip count is computed when the program runs;
  it counts as run once.
* compile s: of a machine that others used too.
* v6e: another chip, at {v6e:.0f} bytes a cycle if it runs at {clock} GHz. A v5p has no section: its programs run on
  two cores, and the schedules do not say how the loops are shared.
* Some rows whose programs compile for long were read before two mends of benchmarks/tpu_schedule.py: of images,
  volumes, windows of 31 and four kernels per channel, most by flax and conv. They lack the branch at the end of each
  loop, and charge an asynchronous slice for its whole operand.
* Not compiled: left out for time, since a convolution may compile for minutes. Most of these rows repeat others in
  float32 or at another batch.
"""


def report(results: dict[str, Figures]) -> str:
    """The tables in Markdown, of all programs by "ours" that the results have."""
    lines = [
        _HEAD.format(
            jax=jax.__version__,
            hbm=V5E.bytes_per_cycle,
            lanes=V5E.lanes,
            v6e=V6E.bytes_per_cycle,
            clock=V6E.clock / 1e9,
        )
    ]
    for group in GROUPS:
        rows = _block_rows(results) if group == "blocks" else _case_rows(group, results)
        if rows:
            lines += [f"## {group.capitalize()}", "", *rows]
    return "\n".join(lines)


def _cell(found: Figures | None, key: str = "cycles", scale: float = 1e3) -> str:
    if found is None:
        return ""
    bound = ">= " if key == "cycles" and found["unknown"] else ""
    return f"{bound}{found[key] / scale:,.1f}"


def _ratio(one: Figures | None, other: Figures | None, digits: int = 2) -> str:
    return f"{one['cycles'] / other['cycles']:.{digits}f}" if one and other else ""


def _beside(found: Figures | None, own: Figures) -> str:
    return "=" if found and found["program"] == own["program"] else _cell(found)


def _case_rows(group: str, results: dict[str, Figures]) -> list[str]:
    rows: list[str] = []
    missing: dict[tuple[str, str], list[str]] = {}
    for entry in entries((group,), ("ours",), DTYPES):
        case = entry.subject
        own, flax_, *others = (
            results.get(entry.beside(by).key) for by in ("ours", "flax", "taps", "conv", "masked", "pallas")
        )
        if not isinstance(case, Case):
            continue
        if own is None:
            missing.setdefault((entry.dtype, str(case)), []).append(entry.what)
            continue
        memory, vector = case.floors(entry.what, entry.dtype, entry.chip)
        floors = (f"{memory / 1e3:,.1f}", f"{vector / 1e3:,.1f}", f"{own['cycles'] / max(memory, vector):.2f}")
        beside = (_beside(found, own) for found in (flax_, *others))
        cells = (str(case), entry.what, entry.dtype, _cell(own), *beside, *floors, _ratio(own, flax_))
        rows.append(f"| {' | '.join((*cells, _cell(own, 'seconds', 1)))} |")
    head = (
        "| case | direction | dtype | ours | flax | taps | conv | masked | pallas | memory | vector unit | "
        "ours / floor | ours / flax | compile s |"
    )
    return [head, "|---|---|---|" + "---:|" * 11, *rows, "", *_left_out(missing)] if rows else []


def _left_out(missing: dict[tuple[str, str], list[str]]) -> list[str]:
    """Which programs of which cases in which dtypes the table lacks."""
    cases: dict[str, list[str]] = {}
    for (dtype, case), directions in missing.items():
        which = dtype if len(directions) == len(DIRECTIONS) else f"{dtype}, {' '.join(directions)}"
        cases.setdefault(which, []).append(case)
    return [line for which, names in cases.items() for line in (f"Not compiled, {which}: {'; '.join(names)}.", "")]


def _block_rows(results: dict[str, Figures]) -> list[str]:
    rows: list[str] = []
    missing: list[str] = []
    for block, what in itertools.product(BLOCKS, PROGRAMS):
        own, *others, none = (
            results.get(Entry("", block, what, "bfloat16", by).key)
            for by in ("ours", "flax", "recomputed", "masked", "pallas", "none")
        )
        if own is None or none is None:
            missing.append(f"{block}, {what}")
            continue
        cells = (str(block), what, _cell(own), *(_beside(found, own) for found in others), _cell(none))
        ratios = (_ratio(found, none, 3) for found in (own, *others))
        rows.append(f"| {' | '.join((*cells, *ratios, _cell(own, 'temporaries', 1e6), _cell(own, 'seconds', 1)))} |")
    head = (
        "| block | program | ours | flax | recomputed | masked | pallas | without convolution | ours / without | "
        "flax / without | recomputed / without | masked / without | pallas / without | ours, temporary MB | compile s |"
    )
    left_out = [f"Not compiled: {'; '.join(missing)}.", ""] if missing else []
    return [head, "|---|---|" + "---:|" * 13, *rows, "", *left_out] if rows else []


def main() -> None:
    """Compiles what is missing, and writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--only", nargs="+", default=[""], help="programs whose names contain one of these")
    parser.add_argument("--by", nargs="+", choices=CONTESTANTS, default=("ours", "flax"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--report", action="store_true", help="lower and compile nothing")
    parser.add_argument("--known", action="store_true", help="compile nothing, but look for what is known")
    parser.add_argument("--json", type=Path, default=RESULTS / "tpu_floor.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "tpu_floor.md")
    arguments = parser.parse_args()
    results: dict[str, Figures] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    chosen = () if arguments.report else entries(arguments.groups, arguments.by, arguments.dtypes)
    for entry in chosen:
        if not any(part in entry.key for part in arguments.only):
            continue
        lowered = entry.lower()
        key = digest(lowered, entry.chip)
        known = next((known for known in results.values() if known["program"] == key), None)
        if arguments.known and known is None:
            continue
        results[entry.key] = known or {**figures(measure(lowered, entry.chip)), "program": key}
        print(entry.key, results[entry.key], flush=True)
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    arguments.output.write_text(report(results))


if __name__ == "__main__":
    main()
