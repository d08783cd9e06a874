"""Compiles depthwise convolutions for an H100 without a GPU, and compares ours with plain flax.linen.Conv.

    python -m benchmarks.gpu_compiler                          # every case; some minutes
    python -m benchmarks.gpu_compiler --only "stride 2" --by ours flax conv taps
    python -m benchmarks.gpu_compiler --report                 # writes the table of what is known, compiles nothing

Run it where JAX's CUDA plugin is installed, as in the virtual environment of `make test-gpu-compiler`. Nothing is
run: workloads/gpu/compiler.py says what is read, and what that leaves out. The figures are kept in
results/gpu_compiler.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import work
from benchmarks.contestants import CONVOLUTIONS, map_in_jax
from depthwise_jax.lowering import DIRECTIONS
from workloads.gpu.compiler import Figures, compile_for_gpu
from workloads.workload import Workload

RESULTS = Path(__file__).parent / "results"
DTYPES = ("bfloat16", "float32")


def _layer(name: str, x: tuple[int, ...], window: tuple[int, ...], multiplier: int = 1, **geometry: Any) -> Workload:
    channels = x[1] if geometry.get("data_format") == "channels_first" else x[-1]
    return Workload(name, x, (*window, channels, multiplier), {"padding": "same", **geometry})


# Layers of the networks that use them: tensors of 12 to 103 MB in bfloat16.
CASES = (
    _layer("3x3", (32, 56, 56, 128), (3, 3)),
    _layer("5x5", (32, 28, 28, 240), (5, 5)),
    _layer("7x7", (32, 56, 56, 96), (7, 7)),
    _layer("3x3, stride 2", (32, 56, 56, 128), (3, 3), strides=2),
    _layer("3x3, stride 2, padding 1", (32, 56, 56, 128), (3, 3), strides=2, padding=1),
    _layer("3x3, stride 2, channels first", (32, 128, 56, 56), (3, 3), strides=2, data_format="channels_first"),
    _layer("3x3, stride 2, multiplier 2", (32, 56, 56, 64), (3, 3), 2, strides=2),
    _layer("5x5, stride 2", (32, 56, 56, 144), (5, 5), strides=2),
    _layer("3x3, dilation 2", (32, 56, 56, 128), (3, 3), dilation_rate=2),
    _layer("causal 4", (8, 2048, 1536), (4,), padding="causal"),
    _layer("causal 4, dilation 2", (8, 2048, 1536), (4,), padding="causal", dilation_rate=2),
    _layer("3x3, channels first", (32, 128, 56, 56), (3, 3), data_format="channels_first"),
    _layer("3x3, multiplier 2", (32, 56, 56, 64), (3, 3), 2),
    _layer("3x3x3", (4, 16, 56, 56, 64), (3, 3, 3)),
)


@dataclass(frozen=True)
class Entry:
    """A program to compile: of a case, in a direction, in a dtype, by one of CONVOLUTIONS."""

    case: Workload
    direction: str
    dtype: str
    by: str

    @property
    def key(self) -> str:
        """Its key in the results."""
        return f"{self.case} | {self.direction} | {self.dtype} | {self.by}"

    def compile(self) -> Figures:
        """Compiles it."""
        function, names = map_in_jax(CONVOLUTIONS[self.by](self.case), self.case, self.direction, self.dtype)
        shapes = {"x": self.case.x, "w": self.case.kernel, "g": self.case.resolved.y_shape}
        return compile_for_gpu(function, *(jax.ShapeDtypeStruct(shapes[name], self.dtype) for name in names))[1]


def entries(by: Sequence[str]) -> Iterator[Entry]:
    """All programs, in order."""
    for case, direction, dtype, name in itertools.product(CASES, DIRECTIONS, DTYPES, by):
        yield Entry(case, direction, dtype, name)


def report(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "# One H100: what XLA compiles depthwise convolutions to, beside plain flax.linen.Conv",
        "",
        f"Written by `python -m benchmarks.gpu_compiler` with jax {jax.__version__} and its CUDA plugin; nothing was",
        "run on a GPU. Kernels are all that the program starts. Library calls are cuDNN's convolutions, with their",
        "windows. Copies and transposes are kernels that move a whole tensor: copies compute nothing, transposes",
        "change the order of its axes. MB moved are the operands and results of all kernels, and the least is those of",
        "the map. Temporary memory is without what cuDNN asks for. A cell is ours / Flax, or one figure for both.",
        "",
        "| case | direction | dtype | kernels | library calls | copies | transposes | MB moved | least | temporary MB "
        "| compile s |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for own in entries(("ours",)):
        pair = [results.get(Entry(own.case, own.direction, own.dtype, by).key) for by in ("ours", "flax")]
        if all(pair):
            lines.append(f"| {' | '.join(_cells(own, pair))} |")
    return "\n".join(lines) + "\n"


def _cells(entry: Entry, pair: Sequence[Any]) -> list[str]:
    def cell(text: Callable[[Any], str]) -> str:
        return " / ".join(dict.fromkeys(map(text, pair)))

    def calls(figures: Any) -> str:
        return ", ".join(f"{n} {kind}" for kind, n in sorted(figures["libraries"].items())) or "none"

    least = work.traffic(entry.case, entry.direction, jnp.dtype(entry.dtype).itemsize)
    return [
        str(entry.case),
        entry.direction,
        entry.dtype,
        cell(lambda figures: str(figures["kernels"])),
        cell(calls),
        cell(lambda figures: str(figures["copies"])),
        cell(lambda figures: str(figures["transposes"])),
        cell(lambda figures: f"{figures['bytes'] / 1e6:.1f}"),
        f"{least / 1e6:.1f}",
        cell(lambda figures: f"{figures['temporaries'] / 1e6:.1f}"),
        cell(lambda figures: f"{figures['seconds']:.1f}"),
    ]


def main() -> None:
    """Compiles, and writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="programs whose names contain this")
    parser.add_argument("--by", nargs="+", choices=CONVOLUTIONS, default=("ours", "flax"))
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_compiler.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_compiler.md")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for entry in () if arguments.report else entries(arguments.by):
        if arguments.only in entry.key:
            found = entry.compile()
            results[entry.key] = asdict(found) | {"seconds": round(found.seconds, 1)}
            print(entry.key, results[entry.key], flush=True)
            arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    arguments.output.write_text(report(results))


if __name__ == "__main__":
    main()
