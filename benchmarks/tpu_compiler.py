"""What the TPU compiler makes of depthwise layers and of MobileNetV2, ours beside plain Flax and lax; needs no TPU.

Run as `python -m benchmarks.tpu_compiler` from the repository's root, where `jax[tpu]` is installed, as in the virtual
environment of `make test-tpu`. It prints a table in Markdown, which `--output` writes to a file as well.

Estimated cycles are the compiler's and overstate: they are for comparing like with like. Nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from workloads.tpu.compiler import Figures, compile_for_tpu, make_mesh  # isort: skip  # sets the environment of libtpu

import jax
from jax.sharding import PartitionSpec as P

from depthwise_jax.lowering import DIRECTIONS as MAPS
from workloads.mobilenet import FEW_STAGES, STAGES, MobileNetV2
from workloads.tpu.layers import LAYERS, Layer, compile_layer, ours, plain, told
from workloads.tpu.network import CONSTRAINT, forward, training_step

HEADER = ("program", "by", "est. cycles", "fusions", "copies", "collectives", "groups of", "temporary MB")


def row(program: str, by: str, figures: Figures) -> tuple[str, ...]:
    """One line of the table."""
    collectives = ", ".join(f"{n} {name}" for name, n in sorted(figures.collectives.items()))
    return (
        program,
        by,
        f"{figures.cycles:,}",
        str(figures.fusions),
        str(figures.copies),
        collectives or "none",
        ", ".join(map(str, sorted(figures.groups))) or "-",
        f"{figures.temporaries / 1e6:.1f}",
    )


# A line of the table before it is compiled: the program, by whom, and the compilation.
Entry = tuple[str, str, Callable[[], Figures]]


def layers() -> Iterator[Entry]:
    """Forward with bias and relu6, dx and dw of single layers, on v5e 2x2, over one mesh axis and over two."""
    one, two = make_mesh("v5e:2x2", batch=4), make_mesh("v5e:2x2", batch=2, channels=2)
    contestants: dict[str, Callable[..., Any]] = {"ours": ours, "lax": plain}
    with_taps = {**contestants, "taps": partial(ours, implementation="taps")}

    def entry(layer: Layer, direction: str, sharding: str, by: str, *options: Any) -> Entry:
        return f"{layer} {direction}, {sharding}", by, lambda: compile_layer(layer, direction, *options)[1]

    for layer in LAYERS:
        for direction in MAPS:
            for by, convolve in contestants.items():
                yield entry(layer, direction, "4 batch", by, convolve, one)
        # Here lax's gradient is wrong: its groups are of all four devices, and it counts each half of the batch twice.
        for by, convolve in with_taps.items():
            yield entry(layer, "dw", "2 batch of 2x2", by, convolve, two)
        for direction in MAPS:
            for by, convolve in {"ours": ours, "ours, in_sharding": told, "lax": plain}.items():
                yield entry(layer, direction, "2 batch x 2 channels", by, convolve, two, "channels")


def networks(stages: Any, size: int, images: Sequence[int]) -> Iterator[Entry]:
    """The network's forward pass and training step, with batch and channels sharded, on v5e 2x2."""

    def compiled(program: Callable[..., Any], by: str, axes: dict[str, int], images: int) -> Figures:
        mesh, plain = make_mesh("v5e:2x2", **axes), by == "flax"
        spec = P("batch", None, None, "channels") if by == "ours, in_sharding" else None
        model = MobileNetV2(plain=plain, constraint=None if plain else CONSTRAINT, stages=stages, in_sharding=spec)
        function, arguments = program(model, images * axes["batch"], size, mesh)
        with jax.set_mesh(mesh):
            return compile_for_tpu(function, *arguments)[-1]

    blocks = sum(stage[2] for stage in stages)
    shardings = {"batch": 4}, {"batch": 2, "channels": 2}
    programs = {"forward": forward, "training step": training_step}
    for axes, count, (name, program) in itertools.product(shardings, images, programs.items()):
        sharding = " x ".join(f"{n} {axis}" for axis, n in axes.items())
        for by in ("ours", "ours, in_sharding", "flax") if "channels" in axes else ("ours", "flax"):
            label = f"MobileNetV2, {blocks} blocks, {name}, {sharding}, {count} images each"
            yield label, by, partial(compiled, program, by, axes, count)


def main() -> None:
    """Prints the table line by line, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", choices=("none", "few", "all"), default="all", help="of the network")
    parser.add_argument("--size", type=int, default=96, help="height and width of the network's images")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[16, 32], help="the network's images for each shard of the batch"
    )
    parser.add_argument("--only", default="", help="the programs whose names contain this")
    parser.add_argument("--output", type=Path, help="file to write")
    arguments = parser.parse_args()
    lines = []

    def emit(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    emit(f"jax {jax.__version__}, v5e 2x2, bfloat16; by the TPU compiler, for each device.\n")
    emit(f"| {' | '.join(HEADER)} |")
    emit("|---|---|" + "---:|" * 3 + "---|---|---:|")
    stages = {"few": FEW_STAGES, "all": STAGES}.get(arguments.blocks)
    for name, by, figures in (*layers(), *(networks(stages, arguments.size, arguments.images) if stages else ())):
        if arguments.only in name:
            emit(f"| {' | '.join(row(name, by, figures()))} |")
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
