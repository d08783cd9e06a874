"""Times depthwise layers and whole training steps on one GPU against lax and PyTorch, and against a copy's rate.

    python -m benchmarks.gpu --piece smoke      # one layer, everything once: checks that all runs and is right; minutes
    python -m benchmarks.gpu --piece table      # the layers; stops after --minutes, and continues when called again
    python -m benchmarks.gpu --piece training   # MobileNetV2 and ConvNeXt-T, in the same way
    python -m benchmarks.gpu --read benchmarks/results/gpu.json

It runs from the repository's root (PYTHONPATH=. elsewhere) with JAX for the GPU, Flax and Optax, and needs no network;
PyTorch takes part if it is installed with CUDA. The results are written after each row, and existing rows are not
measured again.

A row is a map of a layer in a dtype by a contestant. Its time is that of its kernels (benchmarks/device_time.py). The
operands rotate: between two calls with the same operands lie more bytes than four times the L2 cache. Every result is
first compared with float64 on the same device. TF32 is off for float32, in JAX and in PyTorch; PyTorch may try cuDNN's
algorithms, as XLA does. "of copy" is the time to move the map's operands and result once, at the rate of the fastest
copy in the same run, divided by the row's time.

A training step consists of the forward pass, the gradients and SGD with momentum, with parameters in float32.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import environment, training, work
from benchmarks.contestants import CONVOLUTIONS, TorchMaps, UnsupportedError, map_in_jax
from benchmarks.device_time import Time, measure
from benchmarks.optional import library
from workloads import results
from workloads.convnext import TINY, ConvNeXt, torch_convnext
from workloads.mobilenet import FEW_STAGES, STAGES, MobileNetV2, torch_mobilenet
from workloads.workload import Workload

DIRECTIONS = ("forward", "dx", "dw")
DTYPES = ("bfloat16", "float32")
# Above this many taps an elementwise dw compiles for a minute.
_FEW_TAPS = 9
# The images whose y and dx are compared with float64; dw is a sum over all images.
_COMPARED = 8
_MIB = 2**20


def _layer(name: str, x: tuple[int, ...], window: Sequence[int], multiplier: int = 1, **geometry: Any) -> Workload:
    geometry.setdefault("padding", window[0] // 2)
    return Workload(name, x, (*window, x[-1], multiplier), geometry)


# Layers of known networks with batches that make x 100 MB or larger in bfloat16, and one that fits into the L2.
LAYERS = (
    _layer("mobilenet-v1 256x56x56x128 k3", (256, 56, 56, 128), (3, 3)),
    _layer("convnext-t 256x56x56x96 k7", (256, 56, 56, 96), (7, 7)),
    _layer("mobilenet-v1 256x56x56x128 k3 s2", (256, 56, 56, 128), (3, 3), strides=2),
    _layer("efficientnet-b0 512x28x28x240 k5", (512, 28, 28, 240), (5, 5)),
    _layer("mamba 16x2048x1536 k4 causal", (16, 2048, 1536), (4,), padding="causal"),
    _layer("deeplab 256x33x33x256 k3 d6", (256, 33, 33, 256), (3, 3), padding=6, dilation_rate=6),
    _layer("mobilenet-v1 256x56x56x64 k3 m2", (256, 56, 56, 64), (3, 3), 2),
    _layer("mobilenet-v1 256x112x112x32 k3", (256, 112, 112, 32), (3, 3)),
    _layer("mobilenet-v1 1024x14x14x512 k3", (1024, 14, 14, 512), (3, 3)),
    _layer("efficientnet-b0 256x56x56x144 k5 s2", (256, 56, 56, 144), (5, 5), strides=2),
    _layer("convnext-t 1024x14x14x384 k7", (1024, 14, 14, 384), (7, 7)),
    _layer("mobilenet-v1 8x14x14x512 k3", (8, 14, 14, 512), (3, 3)),
)
# The same kinds at sizes that a CPU computes quickly.
SMALL_LAYERS = (
    _layer("k3", (2, 8, 8, 4), (3, 3)),
    _layer("k3 s2", (2, 8, 8, 4), (3, 3), strides=2),
    _layer("k4 causal", (2, 12, 4), (4,), padding="causal"),
    _layer("k3 d2 m2", (2, 9, 8, 4), (3, 3), 2, padding=2, dilation_rate=2),
)


def _networks(
    dtype: Any, batch: int, size: int, mobilenet: Any = STAGES, convnext: Any = TINY
) -> dict[str, training.Network]:
    classes = training.CLASSES
    made: dict[str, tuple[Callable[..., Any], Any, Callable[..., Any]]] = {
        "MobileNetV2": (MobileNetV2, mobilenet, torch_mobilenet),
        "ConvNeXt-T": (ConvNeXt, convnext, torch_convnext),
    }
    return {
        name: training.Network(
            flax(classes, dtype=dtype, stages=stages),
            flax(classes, dtype=dtype, stages=stages, plain=True),
            partial(torch, classes=classes, stages=stages),
            batch,
            size,
        )
        for name, (flax, stages, torch) in made.items()
    }


@dataclass(frozen=True)
class Scale:
    """The measurements of a run, and their number.

    Attributes:
        layers: the layers.
        networks: by dtype, the networks.
        calls, steps: the number of calls of a map, and of training steps, in a queue.
        between: the bytes between two calls with the same operands.
        copies: the bytes of the arrays that are copied.
    """

    layers: Sequence[Workload]
    networks: Callable[[Any], Mapping[str, training.Network]]
    calls: int
    steps: int
    between: int
    copies: Sequence[int]


SCALES = {
    "full": Scale(
        LAYERS, partial(_networks, batch=128, size=224), 20, 10, 256 * _MIB, [n * _MIB for n in (64, 256, 1024)]
    ),
    "small": Scale(
        SMALL_LAYERS,
        partial(_networks, batch=2, size=32, mobilenet=FEW_STAGES, convnext=((8, 1),)),
        2,
        2,
        4096,
        [_MIB // 4],
    ),
}
Row = dict[str, Any]


def torch_on_device() -> Any:
    """PyTorch on JAX's device, without TF32, or None."""
    torch = library("torch")
    if torch is None or (jax.default_backend() == "gpu" and not torch.cuda.is_available()):
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch


def finish(result: Any) -> None:
    """Waits for a result of JAX or PyTorch, and for everything queued before it on its stream."""
    if isinstance(result, jax.Array):
        result.block_until_ready()
    elif jax.default_backend() == "gpu":
        library("torch").cuda.synchronize()


@dataclass(frozen=True)
class Contestant:
    """A map that is ready to run.

    Attributes:
        call: queues it on the i-th set of operands; the sets are used in turn.
        read: converts a result to (*batch, *spatial, channels), or to the kernel's shape, in JAX.
        compile_s: seconds to trace and compile it.
    """

    call: Callable[[int], Any]
    read: Callable[[Any], jax.Array]
    compile_s: float = 0.0


# Operands by name: x, w, g.
Operands = dict[str, jax.Array]


def draw(case: Workload, dtype: str, between: int) -> list[Operands]:
    """Sets of operands of a layer with the same kernel; all but one together have at least a given number of bytes.

    The numbers are standard normal and exact in bfloat16, so they are the same in all dtypes.
    """
    shapes = {"x": case.x, "w": case.kernel, "g": case.resolved.y_shape}
    count = 1 + -(-between // work.traffic(case, "forward", jnp.dtype(dtype).itemsize))
    keys = jax.random.split(jax.random.key(0), 3 * count).reshape(count, 3)

    @partial(jax.jit, static_argnums=1)
    def normal(key: Any, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

    sets = [{name: normal(key, shape) for key, (name, shape) in zip(row, shapes.items(), strict=True)} for row in keys]
    return [operands | {"w": sets[0]["w"]} for operands in sets]


def truth(case: Workload, direction: str, operands: Operands) -> jax.Array:
    """A map in float64 (y and dx for the first images only): a sum of products over the window's taps.

    Each step is compiled once, with the tap as an argument.
    """
    resolved = case.resolved
    images = None if direction == "dw" else _COMPARED
    with jax.enable_x64(True):
        x, w, g = (operands[name].astype(jnp.float64) for name in ("x", "w", "g"))
        x, g = x[:images], g[:images].reshape(-1, *resolved.out, resolved.channels, resolved.multiplier)
        padded = jnp.pad(x, [(0, 0), *work.pads(case), (0, 0)])
        spans = [(n - 1) * s + 1 for n, s in zip(resolved.out, resolved.strides, strict=True)]
        region = (x.shape[0], *spans, resolved.channels)

        def read(array: jax.Array, start: Any) -> jax.Array:
            part = lax.dynamic_slice(array, (0, *start, 0), region)
            return lax.slice(part, (0,) * part.ndim, part.shape, (1, *resolved.strides, 1))[..., None]

        # The arrays are arguments, since closed-over arrays would be constants of the program.
        @jax.jit
        def forward(y: jax.Array, padded: jax.Array, weights: jax.Array, start: Any) -> jax.Array:
            return y + read(padded, start) * weights

        @jax.jit
        def dx(total: jax.Array, g: jax.Array, weights: jax.Array, start: Any) -> jax.Array:
            apart = [(0, 0, 0), *((0, 0, s - 1) for s in resolved.strides), (0, 0, 0)]
            products = lax.pad((g * weights).sum(-1), jnp.zeros((), g.dtype), apart)
            where = (0, *start, 0)
            return lax.dynamic_update_slice(total, lax.dynamic_slice(total, where, region) + products, where)

        @jax.jit
        def dw(padded: jax.Array, g: jax.Array, start: Any) -> jax.Array:
            return (read(padded, start) * g).sum(tuple(range(resolved.rank + 1)))

        taps = list(np.ndindex(*resolved.window))
        starts = [tuple(np.multiply(tap, resolved.dilation)) for tap in taps]
        if direction == "dw":
            return jnp.stack([dw(padded, g, start) for start in starts]).reshape(w.shape)
        if direction == "forward":
            y = jnp.zeros_like(g)
            for tap, start in zip(taps, starts, strict=True):
                y = forward(y, padded, w[tap], start)
            return y.reshape(*y.shape[:-2], -1)
        total = jnp.zeros_like(padded)
        for tap, start in zip(taps, starts, strict=True):
            total = dx(total, g, w[tap], start)
        inside = (slice(low, low + n) for (low, _), n in zip(work.pads(case), resolved.spatial, strict=True))
        return total[(slice(None), *inside)]


def error(result: jax.Array, expected: jax.Array) -> float:
    """The largest difference relative to the largest value."""
    with jax.enable_x64(True):
        difference = jnp.abs(result[: expected.shape[0]].astype(jnp.float64) - expected).max()
        return float(difference / jnp.abs(expected).max())


def in_jax(by: str, case: Workload, direction: str, dtype: str, sets: Sequence[Operands]) -> Contestant:
    """A contestant from contestants.CONVOLUTIONS."""
    function, names = map_in_jax(CONVOLUTIONS[by](case), case, direction, dtype)
    arguments = [[operands[name] for name in names] for operands in sets]
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments[0]).compile()
    seconds = time.perf_counter() - start
    return Contestant(lambda i: compiled(*arguments[i % len(arguments)]), lambda result: result, seconds)


def in_torch(
    channels_last: bool, torch: Any, case: Workload, direction: str, dtype: str, sets: Sequence[Operands]
) -> Contestant:
    """PyTorch's contestant in a memory format; it shares JAX's memory if the format is the same."""
    del dtype
    maps, resolved = TorchMaps(torch, case), case.resolved
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(array: jax.Array) -> Any:
        """(N, H, W, C) or (N, W, C) as (N, C, H, W)."""
        images = array.reshape(array.shape[0], *(1,) * (4 - array.ndim), *array.shape[1:])
        return torch.from_dlpack(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def kernel(array: jax.Array) -> Any:
        window = array.reshape(*(1,) * (2 - resolved.rank), *resolved.window, 1, -1)
        return torch.from_dlpack(window).permute(3, 2, 0, 1).contiguous(memory_format=layout)

    w = kernel(sets[0]["w"])
    pairs = [(tensor(operands["x"]), tensor(operands["g"])) for operands in sets]
    if direction != "forward":
        pairs = [(maps.saved(x, layout), g) for x, g in pairs]
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "forward": lambda x, g: maps.forward(x, w),
        "dx": lambda x, g: maps.dx(g, w, x),
        "dw": lambda x, g: maps.dw(x, g, w),
    }

    def call(i: int) -> Any:
        with torch.inference_mode():
            return functions[direction](*pairs[i % len(pairs)])

    def read(result: Any) -> jax.Array:
        axes = (2, 3, 1, 0) if direction == "dw" else (0, 2, 3, 1)
        array = jnp.from_dlpack(result.detach().clone().permute(axes).contiguous())
        shapes = {"dw": case.kernel, "dx": case.x, "forward": resolved.y_shape}
        return array.reshape(shapes[direction])

    return Contestant(call, read)


def contestants(torch: Any) -> dict[str, Callable[..., Contestant]]:
    """The functions that make a contestant from a case, a direction, a dtype and operands, by name."""
    found: dict[str, Callable[..., Contestant]] = {by: partial(in_jax, by) for by in ("ours", "taps", "lax")}
    if torch is not None:
        found["torch_channels_last"] = partial(in_torch, True, torch)
        found["torch_contiguous"] = partial(in_torch, False, torch)
    return found


class Layer:
    """A layer in a dtype: its operands and true results, made for the first row that needs them."""

    def __init__(self, case: Workload, dtype: str, between: int) -> None:
        self.case, self.dtype = case, dtype
        self._between = between
        self._truth: dict[str, jax.Array] = {}

    @cached_property
    def sets(self) -> list[Operands]:
        """Its operands."""
        return draw(self.case, self.dtype, self._between)

    def error(self, direction: str, result: jax.Array) -> float:
        """The error of a result on the first operands."""
        if direction not in self._truth:
            self._truth[direction] = truth(self.case, direction, self.sets[0])
        return error(result, self._truth[direction])

    def row(self, make: Callable[..., Contestant], direction: str, calls: int) -> Row:
        """The figures of a map by a contestant."""
        try:
            contestant = make(self.case, direction, self.dtype, self.sets)
        except UnsupportedError as reason:
            return {"left_out": str(reason)}
        wrong = self.error(direction, contestant.read(contestant.call(0)))
        right = wrong <= work.tolerance(direction, self.dtype)
        taken = measure(contestant.call, calls, finish)
        moved = work.traffic(self.case, direction, jnp.dtype(self.dtype).itemsize)
        return {"right": right, "error": wrong, "bytes": moved, "compile_s": contestant.compile_s, **_times(taken)}


def _times(taken: Time) -> Row:
    return {
        "us": 1e6 * taken.seconds,
        "wall_us": 1e6 * taken.wall,
        "clock": "wall" if taken.device is None else "device",
        "kernels": taken.kernels,
    }


def copies(sizes: Sequence[int], torch: Any, calls: int) -> dict[str, float]:
    """GB/s, read and written, of copies of arrays of a given size, by JAX and by PyTorch."""
    negative = jax.jit(lambda x: -x)  # reads and writes every element
    rates: dict[str, float] = {}
    for size in sizes:
        sources = [jnp.full(size // 4, i, jnp.float32) for i in range(3)]
        taken = measure(lambda i, sources=sources: negative(sources[i % 3]), calls, finish)
        rates[f"jax {size}"] = 2e-9 * size / taken.seconds
        if torch is not None:
            tensors = [torch.from_dlpack(source) for source in sources]
            target = torch.empty_like(tensors[0])
            taken = measure(lambda i, t=tensors, target=target: target.copy_(t[i % 3]), calls, finish)
            rates[f"torch {size}"] = 2e-9 * size / taken.seconds
    return rates


def training_row(by: str, network: training.Network, dtype: str, torch: Any, steps: int) -> Row:
    """The figures of a training step."""
    images, labels = training.batch(network)
    if by == "torch":
        torch.manual_seed(0)
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        step: Any = training.TorchTraining(torch, network.torch(torch), images, labels, device, dtype)
    else:
        initial = jax.jit(network.ours.init)(jax.random.key(0), images)
        model = network.ours if by == "ours" else network.flax
        variables = initial if by == "ours" else training.plain_variables(initial)
        step = training.JaxTraining(model, variables, images, labels)
    losses = [step() for _ in range(3)]
    taken = measure(lambda i: step(), steps, lambda loss: None)
    return {"losses": losses, "images": network.batch, "size": network.size, **_times(taken)}


class Run:
    """A run of some pieces: the results so far, and the remaining time."""

    def __init__(self, path: Path, minutes: float, only: str) -> None:
        self._path, self._end, self._only = path, time.monotonic() + 60 * minutes, only
        device = {"device": jax.devices()[0].device_kind, "driver": _driver()}
        self.results: dict[str, Any] = results.read(path) if path.exists() else {**device, "runs": [], "rows": []}
        if self.results["device"] != device["device"]:
            raise SystemExit(f"{path} has results of {self.results['device']}, but this is {device['device']}")
        self.left = 0

    def begin(self, rates: Mapping[str, float]) -> None:
        """Notes the versions of a run and its copies, for the rows that follow."""
        self.results["runs"].append({"versions": environment.versions(), "copy_GB/s": dict(rates)})

    def add(self, key: Mapping[str, str], measured: Callable[[], Row]) -> None:
        """Measures a row, unless it is known or the time is up, and writes it."""
        known = any(key.items() <= row.items() for row in self.results["rows"])
        if known or self._only not in " | ".join(key.values()):
            return
        if time.monotonic() > self._end:
            self.left += 1
            return
        try:
            figures = measured()
        except RuntimeError as failure:  # XLA's and PyTorch's errors, such as too little memory
            figures = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
        row = {**key, **_rounded(figures), "run": len(self.results["runs"]) - 1}
        self.results["rows"].append(row)
        results.write(self.results, self._path)
        print(row, flush=True)


def _rounded(figures: Row) -> Row:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}


def _driver() -> str | None:
    """The driver's version and the card's clocks and power limit."""
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def table(run: Run, scale: Scale, layers: Sequence[Workload], torch: Any) -> None:
    """The rows of layers."""
    makers = contestants(torch)
    for case, dtype in itertools.product(layers, DTYPES):
        layer = Layer(case, dtype, scale.between)
        for direction, (by, make) in itertools.product(DIRECTIONS, makers.items()):
            if by != "taps" or direction != "dw" or math.prod(case.resolved.window) <= _FEW_TAPS:
                key = {"layer": str(case), "direction": direction, "dtype": dtype, "by": by}
                run.add(key, partial(layer.row, make, direction, scale.calls))
        jax.clear_caches()


def train(run: Run, scale: Scale, torch: Any) -> None:
    """The rows of networks."""
    for dtype in DTYPES:
        for name, network in scale.networks(jnp.dtype(dtype)).items():
            for by in ("ours", "flax", *(["torch"] if torch is not None else [])):
                key = {"network": name, "dtype": dtype, "by": by}
                run.add(key, partial(training_row, by, network, dtype, torch, scale.steps))
                jax.clear_caches()


def disagreements(rows: Sequence[Row]) -> list[str]:
    """What is wrong: maps that differ from float64, rows that failed, and networks whose first losses differ."""
    found = [f"{row}: {row['failed']}" for row in rows if "failed" in row]
    found += [f"{row} differs from float64" for row in rows if row.get("right") is False]
    losses = {(row["network"], row["dtype"], row["by"]): row["losses"][0] for row in rows if "losses" in row}
    for (network, dtype, by), loss in losses.items():
        plain = losses.get((network, dtype, "flax"), loss)
        if by == "ours" and abs(loss - plain) > (1e-5 if dtype == "float32" else 1e-2) * abs(plain):
            found.append(f"the first loss of {network} in {dtype} is {loss}, with Flax's convolutions {plain}")
    return found


def report(data: dict[str, Any]) -> Iterator[str]:
    """The lines of the tables: microseconds and, of layers, the part of the copy's rate."""
    runs = [max(run["copy_GB/s"].values()) for run in data["runs"]]
    yield f"{data['device']}, driver {data['driver']}; copies at {', '.join(f'{rate:.0f}' for rate in runs)} GB/s"
    for kind, head in (("layer", ("layer", "direction", "dtype")), ("network", ("network", "dtype"))):
        rows = [row for row in data["rows"] if kind in row]
        names = list(dict.fromkeys(row["by"] for row in rows))
        if not rows:
            continue
        yield f"\n| {' | '.join((*head, *names))} |\n{'|---' * len(head)}{'|---:' * len(names)}|"
        for key in dict.fromkeys(tuple(row[name] for name in head) for row in rows):
            by = {row["by"]: row for row in rows if tuple(row[name] for name in head) == key}
            yield f"| {' | '.join((*key, *(_cell(by.get(name), runs) for name in names)))} |"


def _cell(row: Row | None, runs: Sequence[float]) -> str:
    if row is None or "us" not in row:
        return "" if row is None else "failed" if "failed" in row else "-"
    if "bytes" not in row:
        return f"{1e-3 * row['us']:.2f} ms"
    share = row["bytes"] / (1e3 * row["us"]) / runs[row["run"]]
    return f"{row['us']:.1f} us, {share:.2f}" + ("" if row["right"] else ", wrong")


def main() -> None:
    """Measures or reads, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", choices=("smoke", "table", "training"))
    parser.add_argument("--scale", choices=SCALES, default="full", help="small is for trying it without a GPU")
    parser.add_argument("--minutes", type=float, default=8, help="no row begins after so many; one may take another")
    parser.add_argument("--only", default="", help="rows whose names contain this, such as 'k7 | dx | float32'")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--read", type=Path, help="results to print instead of measuring")
    arguments = parser.parse_args()
    if arguments.read:
        print("\n".join(report(results.read(arguments.read))))
        return
    if arguments.piece is None:
        parser.error("--piece or --read must be given")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    if arguments.scale == "full" and jax.default_backend() != "gpu":
        raise SystemExit(f"--scale full needs a GPU, and JAX has {jax.default_backend()}")
    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    scale, torch = SCALES[arguments.scale], torch_on_device()
    run = Run(arguments.json, arguments.minutes, arguments.only)
    run.begin(copies(scale.copies, torch, scale.calls))
    if arguments.piece == "training":
        train(run, scale, torch)
    else:
        table(run, scale, scale.layers[: 1 if arguments.piece == "smoke" else None], torch)
    print("\n".join(report(run.results)))
    print(f"left for another call: {run.left} rows" if run.left else "done")
    wrong = disagreements(run.results["rows"])
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
