"""Times two builds of the compiled kernels against each other, interleaved in one process.

    python -m benchmarks.builds OLD.so NEW.so
    python -m benchmarks.builds OLD.so NEW.so --layers k3,k5,k7,s2 --modes single --rounds 15

Both libraries are loaded at once and called on the same operands, without the rest of the package. Every result is
compared with a float64 reference before it is timed. A row is a layer of workloads/layers.py, a direction, and single
calls or chains of calls in one program. Its ratio is the median over rounds of new / old, so less than 1 means that the
new build is faster. The range after it holds the middle half of the rounds: if it is wide, the machine was busy, and
the ratio of the fastest samples is more reliable. Judge by the geometric means at the end. On a busy machine, --threads
1 avoids waiting for other threads.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chains, command, environment, work
from benchmarks.chains import CHAIN
from benchmarks.timing import interleaved
from depthwise_jax.lowering import native
from depthwise_jax.lowering.call import DIRECTIONS, MAPS
from workloads import results
from workloads.workload import Workload

# By direction and mode, new / old by the median over rounds and by the fastest samples.
Ratios = dict[tuple[str, str], tuple[float, float]]

BUILDS = ("old", "new")
MODES = ("single", "chain")
# More than the samples of any layer take, so no layer gets fewer rounds.
_SECONDS = 600


def load(build: str, path: Path) -> str:
    """Registers the maps of a library as `benchmark.<build>.<map>`; returns the instruction set that it uses.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: its calls differ from the package's.
        ValueError: this machine does not support DEPTHWISE_JAX_ISA.
    """
    library = ctypes.CDLL(str(path.resolve()))
    library.depthwise_jax_instruction_set.restype = ctypes.c_char_p
    instruction_set = library.depthwise_jax_instruction_set()
    if instruction_set is None:
        raise ValueError("DEPTHWISE_JAX_ISA must name an instruction set that this machine supports")
    abi = next((abi for abi in range(native._ABI, 0, -1) if hasattr(library, f"depthwise_jax_forward_v{abi}")), None)
    for name in MAPS:
        handler = getattr(library, f"depthwise_jax_{name}_v{abi}")
        jax.ffi.register_ffi_target(f"benchmark.{build}.{name}", jax.ffi.pycapsule(handler), platform="cpu")
    return instruction_set.decode()


def maps(build: str, case: Workload, dtype: str) -> dict[str, Callable[..., Any]]:
    """The maps of a case by direction, on operands from `arranged`."""
    oracle = case.resolved
    channels, multiplied = oracle.channels, () if oracle.multiplier == 1 else (oracle.multiplier,)
    batch = int(np.prod(oracle.batch))
    shapes = {
        "forward": (*multiplied, batch, *oracle.out, channels),
        "dx": (batch, *oracle.spatial, channels),
        "dw": (*multiplied, *oracle.window, channels),
    }
    geometry: dict[str, Any] = {
        "stride": np.array(oracle.strides, np.int64),
        "low": np.array(oracle.low, np.int64),
        "dilation": np.array(oracle.dilation, np.int64),
    }
    return {
        direction: partial(
            jax.ffi.ffi_call(f"benchmark.{build}.{DIRECTIONS[direction]}", jax.ShapeDtypeStruct(shape, dtype)),
            **geometry,
            **({"activation": np.int64(0)} if direction == "forward" else {}),
        )
        for direction, shape in shapes.items()
    }


def arranged(case: Workload, operands: work.Operands) -> work.Operands:
    """x, w and g as the kernels take them: with the axis of a channel's M kernels first in w and g, unless M is 1."""
    multiplier = case.resolved.multiplier
    w, g = operands["w"], operands["g"]
    g = np.moveaxis(g.reshape(*g.shape[:-1], -1, multiplier), -1, 0)
    w = np.moveaxis(w, -1, 0)
    return {"x": operands["x"], "w": w, "g": g} if multiplier > 1 else {"x": operands["x"], "w": w[0], "g": g[0]}


def restored(case: Workload, direction: str, result: work.Array) -> work.Array:
    """A result of the kernels in the reference's layout."""
    if case.resolved.multiplier > 1 and direction != "dx":
        result = np.moveaxis(result, 0, -1)
    elif direction == "dw":
        result = result[..., None]
    return result.reshape(case.resolved.y_shape) if direction == "forward" else result


def measure(case: Workload, dtype: str, modes: tuple[str, ...], rounds: int) -> Ratios:
    """Prints a row for each direction and mode of a layer; returns the ratio of each, by the median and by the fastest.

    Raises:
        ValueError: a result is wrong.
    """
    operands = work.operands(case)
    arrays = {name: jnp.asarray(array, dtype) for name, array in arranged(case, operands).items()}
    ratios = {}
    for direction, (first, second) in {"forward": ("x", "w"), "dx": ("g", "w"), "dw": ("x", "g")}.items():
        truth = work.truth(case, direction, operands)
        arguments = (arrays[first], arrays[second])
        made: dict[str, Mapping[str, Callable[[], Any]]] = {}
        for build in BUILDS:
            function = maps(build, case, dtype)[direction]
            single, chain = chains.single(function, *arguments), chains.chain(function, direction, *arguments)
            made[build] = {"single": single, "chain": chain}
            result = restored(case, direction, np.asarray(made[build]["single"](), np.float64))
            error = work.error(result, truth)
            if error > work.tolerance(direction, dtype):
                raise ValueError(f"{case.name} {direction}: the {build} build has a relative error of {error:.2e}")
        for mode in modes:
            functions = {build: made[build][mode] for build in BUILDS}
            for function in functions.values():
                function()
            samples = interleaved(functions, rounds, _SECONDS)
            each = np.divide(samples["new"], samples["old"])
            low, ratio, high = (float(q) for q in np.quantile(each, (0.25, 0.5, 0.75)))
            fastest = min(samples["new"]) / min(samples["old"])
            calls = CHAIN if mode == "chain" else 1
            old, new = (1e3 * float(np.median(samples[build])) / calls for build in BUILDS)
            print(
                f"{case.name} {direction} {mode}: {old:.4f} -> {new:.4f} ms, median {ratio:.3f} ({low:.3f} to "
                f"{high:.3f}), fastest {fastest:.3f}",
                flush=True,
            )
            ratios[direction, mode] = ratio, fastest
    jax.clear_caches()
    return ratios


def means(ratios: Sequence[tuple[float, float]]) -> list[str]:
    """The geometric mean of each column."""
    return [f"{results.mean(column):.3f}" for column in zip(*ratios, strict=True)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a library")
    parser.add_argument("new", type=Path, help="the library to compare with it")
    command.add_layers_option(parser)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=environment.INSTRUCTION_SETS)
    arguments = parser.parse_args()
    modes = command.names(arguments.modes, MODES, "modes")
    cases = command.layers(arguments)
    environment.enter("benchmarks.builds", arguments.threads, arguments.isa)
    for build, path in zip(BUILDS, (arguments.old, arguments.new), strict=True):
        print(f"{build}: {path}, {load(build, path)}")
    rows: list[tuple[str, tuple[float, float]]] = []
    for case in cases:
        found = measure(case, arguments.dtype, modes, arguments.rounds)
        rows += [(f"{direction} {mode}", ratios) for (direction, mode), ratios in found.items()]
    print("\ngeometric means of new / old, by the median and by the fastest:")
    for kind in dict.fromkeys(kind for kind, _ in rows):
        print(kind, *means([ratios for other, ratios in rows if other == kind]))
    print(f"all {len(rows)} rows of {len(cases)} layers", *means([ratios for _, ratios in rows]))


if __name__ == "__main__":
    main()
