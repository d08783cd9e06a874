"""Checks of the compiled kernels that need their own process: python -m tests.support.native_checks NAME [ARGUMENT].

What may crash or hang is found by its exit status or a time limit, and an environment variable that is read once can be
set. `threads 60` and `devices` serve as commands too, for a longer run than the test's.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import re
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, explain
from depthwise_jax.lowering import MAPS, native
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case, reduced
from tests.support.meshes import make_mesh
from workloads.layers import NETWORKS

# Sizes at which all kernels have their turn: tiles and tails of channels, both heights of tiles, strides, phases.
LARGER = (
    # The first rows read nothing; here, so that no call before this has made memory for what is converted.
    Case("k9-in-padding", (1, 4, 15, 64), (9, 9, 64, 1), {"padding": ((40, 0), (4, 4))}),
    Case("k3", (2, 9, 16, 40), (3, 3, 40, 1), {"padding": "same"}),
    Case("k3-s2", (1, 13, 19, 17), (3, 3, 17, 1), {"padding": "same", "strides": 2}),
    Case("k5-tail", (1, 8, 15, 100), (5, 5, 100, 1), {"padding": 2}),
    Case("k7", (1, 8, 17, 24), (7, 7, 24, 1), {"padding": "same"}),
    # Columns 4 KiB apart, which are packed first.
    Case("k5-crowded", (1, 4, 7, 1024), (5, 5, 1024, 1), {"padding": "same"}),
    Case("k7-s2-crowded", (1, 7, 5, 1024), (7, 7, 1024, 1), {"padding": "same", "strides": 2}),
    Case("k4-causal", (2, 300, 33), (4, 33, 1), {"padding": "causal"}),
    Case("dilated", (1, 11, 14, 20), (3, 2, 20, 2), {"padding": "same", "dilation_rate": (2, 3)}),
)


def instruction_set() -> None:
    """Prints the instruction set, after the core cases in the three dtypes of networks were found right."""
    tolerances = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    for case in (*LARGER, *CORE, reduced(NETWORKS[-1])):
        both = maps.value_and_gradients(case.conv("native"))
        operands = {dtype: [a.astype(dtype) for a in case.operands()] for dtype in tolerances}
        results = jax.jit(lambda by_dtype, both=both: {dtype: both(*a) for dtype, a in by_dtype.items()})(operands)
        for dtype, tolerance in tolerances.items():
            x, w, g = operands[dtype]
            y, dx, dw = results[dtype]
            assert_close(y, case.oracle.conv(x, w), tolerance, f"{case} y")
            assert_close(dx, case.oracle.input_grad(g, w), tolerance, f"{case} dx")
            assert_close(dw, case.oracle.kernel_grad(x, g), tolerance, f"{case} dw")
    print(native.status().instruction_set)


def turned_off() -> None:
    """Prints why the environment variable turns the kernels off, after a call worked without them."""
    case = CORE[1]
    x, w, _ = case.operands()
    assert_close(case.conv()(x, w), case.oracle.conv(x, w), 1e-5)
    explained = explain(x, w, **case.geometry, platform="cpu")
    status = native.status()
    assert status.instruction_set is None
    assert explained.forward.lowering == "taps"
    assert f"not native: {status.reason}" in explained.forward.reason, explained.forward
    with pytest.raises(ValueError, match=re.escape(status.reason)):
        case.conv("native")(x, w)
    print(status.reason)


def reproducible() -> None:
    """Prints how many threads XLA's pool has, and a digest of the bits of kernel gradients, each computed six times."""
    digest = hashlib.sha256()
    cases = (
        *LARGER,
        Case("few-long-rows", (1, 4000, 48), (5, 48, 1), {"padding": "same"}),
        Case("many-rows", (8, 28, 28, 64), (3, 3, 64, 1), {"padding": "same"}),
        Case("many-taps", (2, 20, 20, 64), (13, 13, 64, 1), {"padding": "same"}),
    )
    for case in cases:
        for dtype in (jnp.float32, jnp.bfloat16):
            shapes = case.x, case.oracle.y_shape
            x, g = (jnp.asarray(case.draw(shape, i), dtype) for i, shape in enumerate(shapes))
            w = jnp.zeros(case.kernel, dtype)
            dw = jax.jit(maps.dw(case.conv("native")))
            first = np.asarray(dw(x, w, g)).tobytes()
            for _ in range(5):
                assert np.asarray(dw(x, w, g)).tobytes() == first, case
            digest.update(first)
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    print(sum("XLAEigen" in name for name in names), digest.hexdigest())


def threads(seconds: str) -> None:
    """Eight Python threads, each with convolutions of its own, for some seconds; prints how many calls they made."""
    faulthandler.dump_traceback_later(float(seconds) + 120, exit=True)  # a deadlock
    layer = NETWORKS[2]
    network = Case(layer.name, layer.x, layer.kernel, layer.geometry)
    cases = [*LARGER, Case("batch", (16, 14, 14, 96), (3, 3, 96, 1), {"padding": 1}), network, CORE[3], CORE[6]]
    failures: list[BaseException] = []
    calls = [0] * 8
    start = threading.Barrier(8)
    until = 0.0

    def work(index: int) -> None:
        try:
            nonlocal until
            ours = [cases[index], cases[(3 * index + 1) % len(cases)]]
            prepared = []
            for case in ours:
                operands = (case.draw(case.x, 0), case.draw(case.kernel, 1), case.draw(case.oracle.y_shape, 2))
                run = jax.jit(maps.value_and_gradients(case.conv("native")))
                x, w, g = operands
                truth = case.oracle.conv(x, w), case.oracle.input_grad(g, w), case.oracle.kernel_grad(x, g)
                prepared.append((case, run, operands, truth))
            start.wait()
            until = time.monotonic() + float(seconds)
            while time.monotonic() < until:
                for case, run, operands, truth in prepared:
                    for name, actual, expected in zip(("y", "dx", "dw"), run(*operands), truth, strict=True):
                        assert_close(actual, expected, 2e-5, f"{case} {name}")
                    calls[index] += 1
        except BaseException as failure:
            failures.append(failure)
            start.abort()

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    assert min(calls) > 0, calls
    print(sum(calls))


def devices() -> None:
    """Four host devices at once, each with a part of the batch, over and over; prints the number of devices."""
    faulthandler.dump_traceback_later(240, exit=True)
    mesh = make_mesh(b=4)
    for case in (
        Case("devices", (8, 14, 14, 64), (3, 3, 64, 1), {"padding": "same"}),
        Case("devices-k7", (4, 9, 20, 33), (7, 7, 33, 1), {"padding": "same"}),
        Case("devices-1d", (4, 500, 40), (4, 40, 1), {"padding": "causal"}),
    ):
        x, w, g = case.operands()
        local = maps.value_and_gradients(case.conv("native"))
        spread = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=(P("b"), P(), P("b")), out_specs=(P("b"), P("b"), P()))
        )
        expected = case.oracle.conv(x, w), case.oracle.input_grad(g, w), case.oracle.kernel_grad(x, g)
        assert "depthwise_jax.forward" in spread.lower(x, w, g).as_text()
        for _ in range(50):
            for actual, exact in zip(spread(x, w, g), expected, strict=True):
                assert_close(actual, exact, 1e-5, str(case))
    print(len(jax.devices()))


def nonsense() -> None:
    """Calls the handlers with what does not fit; each call must be an error of XLA. Prints how many there were."""
    assert native.status().instruction_set is not None
    calls = 0
    for direction in MAPS:
        _call(direction)  # what fits is no error
        for changes in _NONSENSE + (_NONSENSE_FORWARD if direction == "forward" else []):
            if 0 in changes.get({"forward": "y", "input_grad": "x", "kernel_grad": "w"}[direction], ()):
                continue  # XLA computes no empty result
            # The handler's own, or that of XLA's decoding of the call.
            with pytest.raises(Exception, match="INVALID_ARGUMENT"):
                print(direction, changes, "gave", _call(direction, **changes))
            calls += 1
    packed = {"forward": "xwy", "input_grad": "ywx", "kernel_grad": "xyw"}
    for direction, operands in packed.items():
        _call_packed(direction, operands)
        for changes in _NONSENSE_PACKED:
            with pytest.raises(Exception, match="INVALID_ARGUMENT"):
                print(direction, changes, "gave", _call_packed(direction, operands, **changes))
            calls += 1
    print(calls)


def huge() -> None:
    """Calls the handlers with attributes and empty arrays as large as they may be: they return, and soon."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a failing process, not a failing machine
    faulthandler.dump_traceback_later(100, exit=True)
    assert native.status().instruction_set is not None
    for direction in MAPS:
        for changes in _HUGE:
            begin = time.monotonic()
            for result in _call(direction, **changes):
                assert np.all(np.isfinite(result)), f"{direction} {changes}"
            took = time.monotonic() - begin
            assert took < 5, f"{direction} {changes}: {took:.1f} s"
    # As many phases as the stride, each with one tap: dx repeats g under a kernel of ones. Seconds, not minutes.
    stride = 2**18
    g = np.arange(3, dtype=np.float32)[None, :, None]
    x, w = jnp.ones((1, 3 * stride, 1)), jnp.ones((stride, 1, 1))
    f = functools.partial(depthwise_conv, strides=stride, implementation="native")
    dx = maps.dx(f)(x, w, jnp.asarray(g))
    np.testing.assert_array_equal(dx, np.repeat(g, stride, axis=1))
    print("done")


def kept() -> None:
    """Prints how many MiB a process holds longer than a call that stages long rows and sums for a large kernel."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def calls(columns: int, taps: int) -> None:
        x, w = jnp.ones((1, 8, columns, 16), jnp.float16), jnp.ones((3, taps, 16, 1), jnp.float16)
        f = lambda x, w: depthwise_conv(x, w, padding="same", implementation="native").sum()  # noqa: E731
        x_kernel, w_kernel = jnp.ones((1, 9, 9, 1024), jnp.bfloat16), jnp.ones((31, 31, 1024, 1), jnp.bfloat16)
        jax.block_until_ready((jax.grad(f, (0, 1))(x, w), jax.grad(f, (0, 1))(x_kernel, w_kernel)))

    calls(16, 9)
    before = resident()
    calls(300_000, 9)
    print(max(resident() - before, 0))


def no_memory() -> None:
    """Calls maps in a process with too little memory for what they stage: XLA's error, and right results afterwards."""
    # A staged row has 77 MB. From 32 MiB on the C library asks the system, whatever it has left from before.
    x, w = jnp.ones((1, 3, 1_200_000, 16), jnp.float16), jnp.ones((3, 9, 16, 1), jnp.float16)
    forward = jax.jit(functools.partial(depthwise_conv, padding="same", implementation="native"))
    expected = forward(x, w).block_until_ready()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmSize"].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + expected.nbytes * 5 // 4, limits[1]))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="RESOURCE_EXHAUSTED: depthwise_jax: no memory"):
        forward(x, w).block_until_ready()
    resource.setrlimit(resource.RLIMIT_AS, limits)
    np.testing.assert_array_equal(forward(x, w), expected)
    print("done")


# Two kernels per channel.
_X, _W, _Y = (2, 3, 5, 6, 17), (2, 2, 3, 3, 17), (2, 2, 2, 5, 6, 17)


def _call(
    direction: str,
    x: Sequence[int] = _X,
    w: Sequence[int] = _W,
    y: Sequence[int] = _Y,
    x_dtype: Any = jnp.float32,
    w_dtype: Any = jnp.float32,
    y_dtype: Any = jnp.float32,
    bias: Sequence[Any] = (),
    missing: str = "",
    **attributes: Any,
) -> list[np.ndarray]:
    """Calls a handler with arrays of ones of these shapes."""
    arrays = {"x": (x, x_dtype), "w": (w, w_dtype), "y": (y, y_dtype)}
    names = {"forward": ("x", "w", "y"), "input_grad": ("y", "w", "x"), "kernel_grad": ("x", "y", "w")}[direction]
    *operands, result = (arrays[name] for name in names)
    attributes = {
        "stride": np.array([1, 1, 1]),
        "low": np.array([0, 1, 1]),
        "dilation": np.array([1, 1, 1]),
        **({"activation": np.int64(0)} if direction == "forward" else {}),
        **attributes,
    }
    attributes.pop(missing, None)
    call = jax.ffi.ffi_call(f"depthwise_jax.{direction}.v4", [jax.ShapeDtypeStruct(*result)])
    extra = [np.ones(*b) for b in bias]
    return [np.asarray(a) for a in call(*(np.ones(shape, dtype) for shape, dtype in operands), *extra, **attributes)]


def _call_packed(
    direction: str,
    operands: str,
    reach: Sequence[int] = (2, 9),
    reach_dtype: Any = jnp.int32,
    axes: tuple[int, ...] = (),
    stride: int = 1,
) -> np.ndarray:
    """Calls a packed handler with arrays of ones: two rows of nine positions, and more axes before them."""
    shapes = {"x": (2, *axes, 9, 17), "w": (*axes, 4, 17), "y": (2, *axes, -(-9 // stride), 17)}
    *arrays, result = (shapes[name] for name in operands)
    rank = 1 + len(axes)
    attributes = {
        "stride": np.array([*axes, stride]),
        "low": np.array([0] * len(axes) + [3]),
        "dilation": np.ones(rank, int),
    }
    call = jax.ffi.ffi_call(f"depthwise_jax.packed_{direction}.v4", jax.ShapeDtypeStruct(result, jnp.float32))
    return np.asarray(call(*map(jnp.ones, arrays), jnp.ones(reach, reach_dtype), **attributes))


_NONSENSE_PACKED: list[dict[str, Any]] = [
    {"reach": (2, 8)},
    {"reach": (9,)},
    {"reach": ()},
    {"reach": (0,)},
    {"reach_dtype": jnp.float32},
    {"reach_dtype": jnp.int16},
    {"reach": (2, 5), "stride": 2},
    {"axes": (2,), "reach": (2, 2, 9)},
    {"axes": (1, 3), "reach": (2, 9)},
]

_FLOAT = jnp.float32
_NONSENSE: list[dict[str, Any]] = [
    {"x": (3, 5, 6, 17)},
    {"x": (1, *_X)},
    {"w": (3, 3, 17)},
    {"w": (1, *_W)},
    {"w": (17,)},
    {"y": (5, 6, 17)},
    {"y": (1, *_Y)},
    {"x": (), "w": (), "y": ()},
    {"w": _W[1:]},
    {"y": _Y[1:]},
    {"w": (1, *_W), "y": (1, *_Y)},
    {"x": (4, *_X), "w": (3, *_W), "y": (4, *_Y)},
    {"x": (4, *_X), "w": (4, *_W), "y": (5, *_Y)},
    {"y": (1, *_Y[1:])},
    {"y": (2, 1, *_Y[2:])},
    {"w": (3, *_W[1:])},
    {"w": (0, *_W[1:]), "y": (0, *_Y[1:])},
    {"x": (5, *_X[1:])},
    {"x": (*_X[:-1], 16)},
    {"w": (*_W[:-1], 18)},
    {"y": (*_Y[:-1], 1)},
    {"w": (2, 0, 3, 3, 17)},
    {"w": (2, 2, 3, 0, 17)},
    {"y": (2, 2, 2, 5, 0, 17)},
    {"y": (2, 2, 0, 5, 6, 17)},
    *(
        {name: np.array(values)}
        for name in ("stride", "dilation")
        for values in ([0, 1, 1], [1, 1, -1], [1, -(2**63), 1])
    ),
    *({name: np.array([1, 2**62, 1])} for name in ("stride", "dilation", "low")),
    *({name: np.array([1, 1, 2**63 - 1])} for name in ("stride", "dilation", "low")),
    {"low": np.array([0, -1, 0])},
    {"low": np.array([0, 0, -(2**63)])},
    *({name: np.array(values)} for name in ("stride", "low", "dilation") for values in ([1, 1], [1, 1, 1, 1], [])),
    {name: np.ones(0, np.int64) for name in ("stride", "low", "dilation")},
    {name: np.ones(4, np.int64) for name in ("stride", "low", "dilation")},
    {name: np.ones(2, np.int64) for name in ("stride", "low", "dilation")},
    *({name: np.array([1, 1, 1], np.int32)} for name in ("stride", "low", "dilation")),
    *({name: np.array([1.0, 1.0, 1.0])} for name in ("stride", "low", "dilation")),
    *({name: np.int64(1)} for name in ("stride", "low", "dilation")),
    *({name: "one"} for name in ("stride", "low", "dilation")),
    *({"missing": name} for name in ("stride", "low", "dilation")),
    *({f"{a}_dtype": dtype} for a in "xwy" for dtype in (jnp.bfloat16, jnp.int32, jnp.complex64, jnp.bool_)),
    *({f"{a}_dtype": dtype for a in "xwy"} for dtype in (jnp.int8, jnp.int32, jnp.complex64, jnp.float8_e5m2)),
    {"x_dtype": jnp.bfloat16, "y_dtype": jnp.bfloat16},
    {"x_dtype": jnp.bfloat16, "y_dtype": jnp.float16},
    {"unknown": np.int64(1), "missing": "low"},
]
_NONSENSE_FORWARD: list[dict[str, Any]] = [
    {"activation": np.int64(3)},
    {"activation": np.int64(7)},
    {"activation": np.int64(-1)},
    {"activation": np.int64(2**62)},
    {"activation": np.int32(1)},
    {"activation": np.float32(1)},
    {"missing": "activation"},
    {"bias": [((16,), _FLOAT)]},
    {"bias": [((18,), _FLOAT)]},
    {"bias": [((), _FLOAT)]},
    {"bias": [((0,), _FLOAT)]},
    {"bias": [((17,), _FLOAT)]},
    {"bias": [((2, 17), jnp.bfloat16)]},
    {"bias": [((2, 17), jnp.int32)]},
    {"bias": [((2, 17), _FLOAT), ((2, 17), _FLOAT)]},
    {"bias": [((2, 17), _FLOAT)] * 7},
]
_LIMIT = 2**31
_HUGE: list[dict[str, Any]] = [
    *(
        {name: np.array([1, 1, 1]) + (_LIMIT - 1) * np.eye(3, dtype=np.int64)[axis]}
        for name in ("stride", "dilation", "low")
        for axis in range(3)
    ),
    {"stride": np.array([_LIMIT] * 3), "dilation": np.array([_LIMIT] * 3), "low": np.array([_LIMIT] * 3)},
    *(
        {"x": shape, "y": (1, *shape), "w": (1, 1, 1, 1, 17)}
        for shape in ((0, 2**30, 1, 1, 17), (0, 1, 2**30, 1, 17), (0, 1, 1, 2**30, 17))
    ),
    {"x": (0, 1, 1, 2, 8, 17), "y": (0, 1, 1, 1, 2, 8, 17), "w": (0, 1, 2**20, 2**20, 1, 17)},
    {"x": (0, 1, 1, 2, 8, 17), "y": (0, 1, 1, 1, 2, 8, 17), "w": (0, 1, 1, 1, 2**30, 17)},
]


if __name__ == "__main__":
    checks = (instruction_set, turned_off, reproducible, threads, devices, nonsense, huge, kept, no_memory)
    {check.__name__: check for check in checks}[sys.argv[1]](*sys.argv[2:])
