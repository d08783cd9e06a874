"""`python -m depthwise_jax` reports what is installed, what computes a few layers, whether it is right, and how fast.

Use it for bug reports, and to find out why a call is slow. It takes about half a minute. Its exit status is

* 0 if all values are right, with or without compiled kernels: the line "compiled kernels" says why they are not used;
* 1 if a value is wrong, or if the installed JAX is too old for this package;
* 2 if JAX cannot use a device, as with `JAX_PLATFORMS=cuda` on a machine without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from depthwise_jax import __version__, depthwise_conv, explain
from depthwise_jax.lowering import DIRECTIONS, Implementation, native

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
ROUNDS = 5


@dataclass(frozen=True)
class Example:
    """A call of depthwise_conv: the shapes of x and kernel, and the other arguments."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: int = 1
    padding: str = "same"
    dilation_rate: int = 1
    data_format: str = "channels_last"
    activation: str | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        defaults = {"strides": 1, "padding": "same", "dilation_rate": 1, "data_format": "channels_last"}
        given = {name: getattr(self, name) for name in (*defaults, "activation") if getattr(self, name) is not None}
        others = "".join(f" {name}={value}" for name, value in given.items() if value != defaults.get(name))
        return f"{self.dtype} x{list(self.x)} kernel{list(self.kernel)}{others}"

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments that explain takes too."""
        return {name: getattr(self, name) for name in ("strides", "padding", "dilation_rate", "data_format")}


# An odd number of channels, a stride, several kernels per channel, a dilation, one and three axes, a fused activation.
CHECKED = (
    Example((2, 12, 11, 37), (3, 3, 37, 1)),
    Example((2, 12, 11, 16), (3, 3, 16, 2), strides=2),
    Example((2, 24, 15, 15), (3, 3, 24, 1), padding="valid", dilation_rate=2, data_format="channels_first"),
    Example((2, 40, 8), (4, 8, 1), padding="causal"),
    Example((1, 6, 7, 5, 8), (2, 3, 2, 8, 1)),
    Example((2, 14, 14, 32), (5, 3, 32, 1), activation="relu"),
    Example((2, 9, 9, 32), (3, 3, 32, 1), activation="relu", dtype="bfloat16"),
)
# The largest allowed error, relative to the sum of the magnitudes of the terms.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-7}

TIMED = {
    "MobileNetV2 3x3": Example((1, 56, 56, 144), (3, 3, 144, 1)),
    "EfficientNet 5x5, stride 2": Example((1, 28, 28, 240), (5, 5, 240, 1), strides=2),
    "ConvNeXt 7x7": Example((1, 14, 14, 384), (7, 7, 384, 1)),
    "Mamba, causal 4": Example((1, 1024, 256), (4, 256, 1), padding="causal"),
}


def main() -> int:
    """Prints the report; returns the exit status."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores")
    versions = {"depthwise_jax": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that one of the platforms has a device
        asked = os.environ.get("JAX_PLATFORMS")
        cure = f"JAX_PLATFORMS={asked} allows none: unset it, or install JAX for that platform" if asked else str(error)
        print(f"devices: none that JAX can use; {cure}")
        return 2
    print(f"devices: {len(devices)} {devices[0].platform} ({devices[0].device_kind})")
    print(f"compiled kernels: {compiled_kernels()}")

    print("\nlowerings (ways to compute a call) that are chosen:")
    for name, call in TIMED.items():
        print(f"  {name}")
        choices: dict[str, list[str]] = {}
        for direction, choice in vars(_explain(call)).items():
            choices.setdefault(str(choice), []).append(direction)
        for choice, directions in choices.items():
            print(f"    {', '.join(directions)}: {choice}")

    print("\nself-check against loops in float64 (forward; dx and dw, the gradients of x and of the kernel):")
    failures = []
    for name in available():
        outcome = check(name)
        failures += [f"{name}: {failure}" for failure in outcome.failures]
        right = outcome.served - len(outcome.failures)
        unserved = len(CHECKED) - outcome.served
        print(
            f"  {name}: {right} of {outcome.served} calls right, largest error {outcome.largest:.2g} of the allowed one"
            + (f"; it cannot compute {unserved}" if unserved else "")
        )

    if not failures:
        print(f"\nself-benchmark, small layers: ms a call, times faster than jax.lax; medians of {ROUNDS} rounds")
        print("  " + " " * 28 + "".join(f"{name:>20}" for name in DIRECTIONS))
        for name, call in TIMED.items():
            cells, wrong = benchmark(call)
            failures += [f"{name}: {failure}" for failure in wrong]
            print(f"  {name:28}" + "".join(f"{f'{ms:.2f} ms {ratio:6.1f}x':>20}" for ms, ratio in cells))

    print("\n" + ("\n".join(f"FAILED {failure}" for failure in failures) or "all values right"))
    return 1 if failures else 0


def compiled_kernels() -> str:
    """The instruction set of the compiled kernels, or why they are not used."""
    status = native.status()
    return status.instruction_set or f"none ({status.reason})"


def available() -> list[Implementation]:
    """The lowerings that can run on the default device."""
    compiled = jax.devices()[0].platform == "cpu" and native.status().instruction_set is not None
    return [name for name in get_args(Implementation) if name != "native" or compiled]


@dataclass
class Outcome:
    """The result of a check: how many calls the lowering computes, the largest error over the allowed one, failures."""

    served: int = 0
    largest: float = 0.0
    failures: list[str] = field(default_factory=list)


def check(implementation: Implementation) -> Outcome:
    """Compares a lowering with the truth on each call of CHECKED that it can compute."""
    outcome = Outcome()
    for call in CHECKED:
        try:
            _explain(call, implementation)
        except ValueError:  # the lowering refuses this call
            continue
        outcome.served += 1
        x, kernel, bias, g = _operands(call)
        expected, scales = truth(call, *(np.asarray(operand, np.float64) for operand in (x, kernel, bias, g)))
        # Near the activation's kink rounding decides the derivative: no gradient arrives there.
        smooth = np.abs(expected[0]) > 0.05 if call.activation else np.ones(expected[0].shape, bool)
        g = jnp.where(smooth, g, 0)
        expected, scales = truth(call, *(np.asarray(operand, np.float64) for operand in (x, kernel, bias, g)))

        def maps(x: Array, kernel: Array, bias: Array, g: Array, call: Example = call) -> tuple[Array, ...]:
            y, transpose = jax.vjp(
                lambda x, kernel: depthwise_conv(
                    x,
                    kernel,
                    bias,
                    **call.geometry,
                    activation=call.activation,
                    precision="highest",
                    implementation=implementation,
                ),
                x,
                kernel,
            )
            return y, *transpose(g)

        try:
            results = jax.jit(maps)(x, kernel, bias, g)
        except Exception as error:  # becomes a FAILED line and exit status 1; the rest is still checked
            outcome.failures.append(f"{call}: {type(error).__name__}: {error}")
            continue
        wrong = []
        for name, result, value, scale in zip(DIRECTIONS, results, expected, scales, strict=True):
            error = np.max(np.abs(np.asarray(result, np.float64) - value) / scale) / TOLERANCE[call.dtype]
            outcome.largest = float(np.fmax(outcome.largest, error))
            if not error <= 1:  # NaN too
                wrong.append(f"{name} is off by {error:.2g} times the allowed error")
        if wrong:
            outcome.failures.append(f"{call}: {', '.join(wrong)}")
    return outcome


def truth(
    call: Example, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, g: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """y, dx and dw by a loop over the taps, and for each the sum of the magnitudes of its terms."""
    if call.data_format == "channels_first":
        x, g = np.moveaxis(x, 1, -1), np.moveaxis(g, 1, -1)
    window, spatial, (channels, multiplier) = kernel.shape[:-2], x.shape[1:-1], kernel.shape[-2:]
    spans = [(k - 1) * call.dilation_rate + 1 for k in window]
    if call.padding == "same":
        needed = [(-(-n // call.strides) - 1) * call.strides + e - n for n, e in zip(spatial, spans, strict=True)]
        pads = [(max(total, 0) // 2, max(total, 0) - max(total, 0) // 2) for total in needed]
    else:
        pads = [(e - 1 if call.padding == "causal" else 0, 0) for e in spans]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    out = [(n - e) // call.strides + 1 for n, e in zip(padded.shape[1:-1], spans, strict=True)]
    inside = (slice(None), *(slice(low, low + n) for (low, _), n in zip(pads, spatial, strict=True)))

    def maps(padded: np.ndarray, kernel: np.ndarray, bias: np.ndarray, g: np.ndarray, relu: bool) -> list[np.ndarray]:
        y = np.zeros((x.shape[0], *out, channels, multiplier)) + bias.reshape(channels, multiplier)
        dx, dw = np.zeros(padded.shape), np.zeros(kernel.shape)
        taps = {
            tap: (
                slice(None),
                *(
                    slice(t * call.dilation_rate, t * call.dilation_rate + n * call.strides, call.strides)
                    for t, n in zip(tap, out, strict=True)
                ),
            )
            for tap in itertools.product(*map(range, window))
        }
        for tap, read in taps.items():
            y += padded[read][..., None] * kernel[tap]
        g = g.reshape(y.shape) * (y > 0 if relu else 1)
        for tap, read in taps.items():
            dx[read] += (g * kernel[tap]).sum(-1)
            dw[tap] = (padded[read][..., None] * g).sum(tuple(range(g.ndim - 2)))
        y = (np.maximum(y, 0) if relu else y).reshape(*y.shape[:-2], -1)
        return [y, dx[inside], dw]

    values = maps(padded, kernel, bias, g, call.activation == "relu")
    scales = [np.maximum(s, 1e-3) for s in maps(np.abs(padded), np.abs(kernel), np.abs(bias), np.abs(g), False)]
    if call.data_format == "channels_first":
        for results in (values, scales):
            results[:2] = (np.moveaxis(result, -1, 1) for result in results[:2])
    return values, scales


def benchmark(call: Example) -> tuple[list[tuple[float, float]], list[str]]:
    """Times the chosen lowering of a call against plain lax.

    Returns:
        Milliseconds and how many times faster than lax for each of DIRECTIONS; and the differences from lax's values.
    """
    x, kernel, _, g = _operands(call)
    window, channels = kernel.shape[:-2], kernel.shape[-2]
    names = "DHW"[-len(window) :]
    padding = [(window[0] - 1, 0)] if call.padding == "causal" else call.padding.upper()

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel.reshape(*window, 1, -1),
            (call.strides,) * len(window),
            padding,
            dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
            feature_group_count=channels,
        )

    def ours(x: Array, kernel: Array) -> Array:
        return depthwise_conv(x, kernel, **call.geometry)

    def maps(function: Callable[..., Array]) -> tuple[Callable[..., Array], ...]:
        return (
            jax.jit(lambda x, kernel, g: function(x, kernel)),
            jax.jit(lambda x, kernel, g: jax.vjp(lambda x: function(x, kernel), x)[1](g)[0]),
            jax.jit(lambda x, kernel, g: jax.vjp(lambda kernel: function(x, kernel), kernel)[1](g)[0]),
        )

    cells, wrong = [], []
    for name, contestants in zip(DIRECTIONS, zip(maps(ours), maps(plain), strict=True), strict=True):
        result, reference = (np.asarray(function(x, kernel, g), np.float64) for function in contestants)
        # Both round to the device's matrix units: to half a per cent on GPUs and TPUs.
        error = np.max(np.abs(result - reference)) / np.max(np.abs(reference))
        if not error <= (1e-4 if jax.devices()[0].platform == "cpu" else 2e-2):
            wrong.append(f"{name} differs from lax's by {error:.2g} of its largest value")
        seconds = np.zeros((ROUNDS + 1, 2))
        for turn in seconds:
            for i, function in enumerate(contestants):
                start = time.perf_counter()
                jax.block_until_ready(function(x, kernel, g))
                turn[i] = time.perf_counter() - start
        chosen, lax_seconds = seconds[1:].T
        cells.append((1e3 * float(np.median(chosen)), float(np.median(lax_seconds / chosen))))
    return cells, wrong


def _explain(call: Example, implementation: Implementation | None = None) -> Any:
    x, kernel = (jax.ShapeDtypeStruct(shape, call.dtype) for shape in (call.x, call.kernel))
    return explain(x, kernel, **call.geometry, implementation=implementation)


def _operands(call: Example) -> list[Array]:
    """x, kernel, bias and a cotangent, the same at every run."""
    random = np.random.default_rng(0)
    x, kernel = (jax.ShapeDtypeStruct(shape, call.dtype) for shape in (call.x, call.kernel))
    y = jax.eval_shape(lambda x, kernel: depthwise_conv(x, kernel, **call.geometry), x, kernel)
    shapes = (call.x, call.kernel, (call.kernel[-2] * call.kernel[-1],), y.shape)
    return [jnp.asarray(random.standard_normal(shape), call.dtype) for shape in shapes]


if __name__ == "__main__":
    sys.exit(main())
