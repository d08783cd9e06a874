"""The compiled kernels: what they refuse and why, the fused primitive, what the handlers check, threads and devices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, explain
from depthwise_jax.lowering import DIRECTIONS, Implementation, library, native
from tests.support import maps
from tests.support.assertions import assert_close, assert_within_roundings
from tests.support.cases import Case, label
from tests.support.compiling import QUICK_FLAGS
from tests.support.meshes import make_mesh
from tests.support.oracle import Oracle, widest

ROOT = Path(__file__).parents[1]
STATUS = native.status()
TURNED_OFF = os.environ.get("DEPTHWISE_JAX_ISA") == "none"
needs_kernels = pytest.mark.skipif(STATUS.instruction_set is None, reason=STATUS.reason)

# From the highest on: a machine that has one has all below it.
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
HERE = (
    INSTRUCTION_SETS[INSTRUCTION_SETS.index(STATUS.instruction_set) :]
    if STATUS.instruction_set in INSTRUCTION_SETS
    else tuple(filter(None, [STATUS.instruction_set]))
)


def checked(name: str, *arguments: object, timeout: float = 300, **environment: str) -> str:
    """The last line that a check of native_checks.py prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.native_checks", name, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(TURNED_OFF, reason="turned off by DEPTHWISE_JAX_ISA=none")
def test_the_kernels_are_there_where_a_compiler_is() -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None and STATUS.instruction_set is None:
        pytest.skip("no C++ compiler")
    assert STATUS.instruction_set is not None, f"{compiler} is there, but: {STATUS.reason}"
    assert STATUS.reason == ""


# Refusals


X, W = np.ones((2, 5, 4, 3), np.float32), np.ones((3, 3, 3, 1), np.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.complex64, jnp.float8_e4m3fn], ids=str)
def test_a_dtype_without_kernels_is_refused_by_name(dtype: Any) -> None:
    message = (
        rf"implementation='native' cannot compute this forward on cpu: .*float32.*bfloat16.*not for {jnp.dtype(dtype)}"
    )
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.asarray(X).astype(dtype), jnp.asarray(W).astype(dtype), implementation="native")


@needs_kernels
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_partitioned_program_is_refused(axis_type: AxisType) -> None:
    mesh = make_mesh(axis_type, b=2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("b")))
        w = jax.device_put(W, NamedSharding(mesh, P()))
        with pytest.raises(ValueError, match=r"'native' cannot compute this forward on cpu: .*partition.*shard_map"):
            jax.jit(lambda x, w: depthwise_conv(x, w, implementation="native"))(x, w)
        y = jax.jit(depthwise_conv)(x, w)
    assert_close(y, Oracle(X.shape, W.shape).conv(X, W), 1e-5)


@needs_kernels
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "tpu")], ids="-".join)
def test_an_exported_program_is_refused(platforms: tuple[str, ...]) -> None:
    f = jax.jit(lambda x, w: depthwise_conv(x, w, implementation="native"))
    with pytest.raises(ValueError, match=r"'native' cannot compute this forward on cpu: an exported program"):
        export.export(f, platforms=platforms)(X, W)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_other_platforms_are_refused(platform: str) -> None:
    with pytest.raises(ValueError, match=f"'native' cannot compute this forward on {platform}: .*compiled for CPUs"):
        explain(X, W, implementation="native", platform=platform)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("direction", ["forward", "input_grad", "kernel_grad"])
def test_other_platforms_are_refused_at_lowering(direction: str, platform: str) -> None:
    def forward(x: Any, w: Any) -> Any:
        return depthwise_conv(x, w, implementation="native")

    y = jnp.zeros(Oracle(X.shape, W.shape).y_shape, jnp.float32)
    maps: dict[str, Any] = {
        "forward": forward,
        "input_grad": lambda x, w: jax.linear_transpose(lambda x: forward(x, w), x)(y),
        "kernel_grad": lambda x, w: jax.linear_transpose(lambda w: forward(x, w), w)(y),
    }
    traced = jax.jit(maps[direction]).trace(jnp.asarray(X), jnp.asarray(W))
    reason = f"'native' cannot compute this {direction} on {platform}: .*compiled for CPUs"
    with pytest.raises(ValueError, match=reason):
        traced.lower(lowering_platforms=(platform,))


@needs_kernels
def test_explain_says_why() -> None:
    whole = explain(X, W, platform="cpu")
    assert {choice.lowering for choice in (whole.forward, whole.input_grad, whole.kernel_grad)} == {"native"}
    partitioned = explain(X, W, platform="cpu", partitioned=1)
    for choice in (partitioned.forward, partitioned.input_grad, partitioned.kernel_grad):
        assert choice.lowering == "taps"
        assert re.search("not native: .*partition", choice.reason), choice
    integers = explain(X.astype(np.int32), W.astype(np.int32), platform="cpu")
    assert re.search("not native: there are kernels for float32, .*, but not for int", integers.forward.reason)
    (n,) = export.symbolic_shape("n", constraints=["n >= 3"])
    symbolic = explain(jax.ShapeDtypeStruct((2, n, 4, 3), jnp.float32), W, platform="cpu")
    assert re.search("not native: .*known spatial sizes", symbolic.forward.reason)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ({"strides": 2**33, "dilation_rate": 2**33, "padding": 2**34}, r"strides up to .*but not \(8589934592,\)"),
        ({"dilation_rate": 2**32, "strides": 2**31, "padding": 2**33}, r"dilation_rate up to 2\*\*31"),
        ({"strides": 2**31, "dilation_rate": 2**31, "padding": 2**32}, r"padding before the input up to 2\*\*31"),
        ({"padding": ((0, 2**33),)}, r"output sizes up to 2\*\*31, but not \(8589934602,\)"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_count_is_refused_by_name(geometry: dict[str, Any], words: str) -> None:
    x, w = jax.ShapeDtypeStruct((1, 12, 1), jnp.float32), jax.ShapeDtypeStruct((3, 1, 1), jnp.float32)
    with pytest.raises(ValueError, match=f"'native' cannot compute this forward on cpu: the kernels take {words}"):
        explain(x, w, **geometry, implementation="native", platform="cpu")
    with pytest.raises(ValueError, match=r"'taps' cannot compute this forward on cpu: .* in 32 bits, .* outputs over"):
        explain(x, w, **geometry, implementation="taps", platform="cpu")
    # What lax's convolution computes wrongly is refused too: no call is wrong in silence.
    if "dilation_rate" in geometry:
        with pytest.raises(ValueError, match=r"no lowering can compute .*native.*taps.*XLA's convolution is wrong"):
            explain(x, w, **geometry, platform="cpu")
    else:
        assert explain(x, w, **geometry, platform="cpu").forward.lowering == "conv"


@pytest.mark.parametrize(
    "geometry",
    [
        {"strides": 2**33, "padding": 5},
        {"strides": 2**31, "padding": 2**31},
        {"dilation_rate": 2**32, "padding": "same"},
        {"dilation_rate": 2**40, "padding": "causal"},
        {"strides": 2**40, "dilation_rate": 2**20, "padding": 2**40},
    ],
    ids=str,
)
def test_strides_and_dilations_of_any_size(geometry: dict[str, Any], implementation: Implementation) -> None:
    case = Case("huge", (2, 12, 17), (3, 17, 1), geometry)
    x, w, g = case.operands()
    for actual, (name, expected) in zip(
        maps.value_and_gradients(case.conv(implementation))(x, w, jnp.asarray(g)),
        maps.truth(case, x, w, g).items(),
        strict=True,
    ):
        assert_close(actual, expected, 1e-5, name)


# Without the library


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "turned off by DEPTHWISE_JAX_ISA=none"), ("mmx", "'mmx' is not an instruction set")]
)
def test_the_environment_variable(name: str, reason: str) -> None:
    if name != "none" and STATUS.instruction_set is None:
        pytest.skip(STATUS.reason)
    assert reason in checked("turned_off", DEPTHWISE_JAX_ISA=name)


@needs_kernels
def test_the_library_is_small() -> None:
    # What bounds the number of kernels that are compiled: several for each window, for each instruction set.
    path = library.find()
    assert isinstance(path, Path)
    assert path.stat().st_size < 3_000_000


def test_a_build_that_fails_leaves_the_package_without_a_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += [f"--config-settings=build-dir={tmp_path}/build", f"--wheel-dir={tmp_path}", str(ROOT)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "depthwise_jax/lowering/native.py" in names
    assert not [name for name in names if name.endswith(".so")]


# Instruction sets, threads, devices


@pytest.mark.parametrize("name", HERE)
def test_instruction_sets(name: str) -> None:
    assert checked("instruction_set", DEPTHWISE_JAX_ISA=name) == name


@needs_kernels
def test_kernel_gradients_do_not_depend_on_the_threads() -> None:
    # NPROC sets the size of XLA's pool; its threads are counted, so that the runs are known to differ.
    lines = [checked("reproducible", NPROC=str(n)).split() for n in (1, 5)]
    assert [int(threads) for threads, _ in lines] == [1, 5]
    assert len({digest for _, digest in lines}) == 1


@needs_kernels
def test_eight_python_threads_at_once() -> None:
    # For a minute: python -m tests.support.native_checks threads 60
    assert int(checked("threads", 1)) >= 8


@needs_kernels
def test_four_devices_at_once() -> None:
    assert checked("devices", XLA_FLAGS=f"{QUICK_FLAGS} --xla_force_host_platform_device_count=4") == "4"


# The handlers, called directly


@needs_kernels
def test_nonsense_is_an_error() -> None:
    assert int(checked("nonsense")) > 100


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_keeps_little_memory() -> None:
    # 1 MiB of each of three kinds for each thread, beside what XLA's and the C library's allocators keep.
    # Without the compiler's memory: a program that is not kept for other processes, and no unusual options.
    assert float(checked("kept", XLA_FLAGS="", JAX_ENABLE_COMPILATION_CACHE="false")) < 32


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_is_an_error() -> None:
    assert checked("no_memory") == "done"


@needs_kernels
def test_huge_attributes_and_empty_arrays() -> None:
    assert checked("huge") == "done"


# Values


@needs_kernels
@pytest.mark.parametrize("wide", [False, True])
def test_the_same_bits_with_and_without_x64(wide: bool) -> None:
    case = Case("x64", (2, 7, 9, 20), (3, 3, 20, 1), {"padding": "same", "strides": 2})
    x, w, g = case.operands()
    b = case.draw((20,), 9)
    f = jax.jit(maps.gradients(case.conv("native", activation="relu6")))
    with jax.enable_x64(wide):
        results = [np.asarray(a) for a in (case.conv("native", activation="relu6")(x, w, b), *f(x, w, b, g))]
    y = case.oracle.add_bias(case.oracle.conv(x, w), b)
    assert {a.dtype for a in results} == {np.dtype(np.float32)}
    assert_close(results[0], np.clip(y, 0, 6), 1e-5)
    assert_close(results[2], case.oracle.kernel_grad(x, g * ((y > 0) & (y < 6))), 1e-5)


# float32's sums, and half a unit in the last place of the narrow dtypes.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float64: 1e-13}


def classes(a: Any) -> np.ndarray:
    """0 where finite, 1 and -1 where infinite, 2 where no number."""
    a = widest(a)
    return np.where(np.isnan(a), 2, np.where(np.isinf(a), np.sign(a), 0))


@needs_kernels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64], ids=label)
@pytest.mark.parametrize("channels", [3, 17, 24, 100])
@pytest.mark.parametrize("geometry", [{}, {"strides": 2}, {"dilation_rate": (1, 2)}], ids=str)
def test_what_is_not_finite_lands_where_the_oracle_puts_it(channels: int, geometry: Any, dtype: Any, x64: None) -> None:
    case = Case(f"infinite-{channels}", (2, 6, 11, channels), (3, 3, channels, 1), {"padding": "same", **geometry})
    operands = case.operands()
    r = np.random.default_rng(channels)
    for a in operands:
        # Anywhere, in the first and last pixels and taps, and in the channels of the last, incomplete vector.
        for value in (np.nan, np.inf, -np.inf):
            a[tuple(int(r.integers(n)) for n in a.shape)] = value
        flat = a.reshape(-1, channels)
        flat[0, -1], flat[-1, 0], flat[-1, -1] = np.inf, np.nan, -np.inf
    x, w, g = (jnp.asarray(a, dtype) for a in operands)
    results = jax.jit(maps.value_and_gradients(case.conv("native")))(x, w, g)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        truth = maps.truth(case, x, w, g)
    for actual, (name, expected) in zip(results, truth.items(), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(classes(actual), classes(expected), err_msg=name)
        finite = np.isfinite(expected)
        assert np.any(finite)
        assert_close(np.where(finite, widest(actual), 0), np.where(finite, expected, 0), TOLERANCE[dtype], name)


# Bias and activation in the store

FORMULA = {None: lambda y: y, "relu": lambda y: np.maximum(y, 0), "relu6": lambda y: np.clip(y, 0, 6)}
FUSED = [(True, None), (True, "relu"), (True, "relu6"), (False, "relu"), (False, "relu6")]


def fused_case(channels: int, data_format: str = "channels_last", multiplier: int = 1) -> Case:
    shape = (2, channels, 6, 9) if data_format == "channels_first" else (2, 6, 9, channels)
    return Case(
        f"fused-{channels}", shape, (3, 3, channels, multiplier), {"padding": "same", "data_format": data_format}
    )


@pytest.mark.parametrize(("biased", "activation"), FUSED)
@pytest.mark.parametrize(
    ("channels", "multiplier", "data_format"),
    [
        (3, 2, "channels_first"),
        (17, 1, "channels_last"),
        (24, 1, "channels_first"),
        (40, 2, "channels_last"),
        (100, 1, "channels_last"),
    ],
)
def test_fused_values(
    channels: int,
    multiplier: int,
    data_format: str,
    biased: bool,
    activation: str | None,
    implementation: Implementation,
) -> None:
    case = fused_case(channels, data_format, multiplier)
    x, w, _ = case.operands()
    bias = [case.draw((channels * multiplier,), 9)] * biased
    f = case.conv(implementation, activation=activation)
    y = case.oracle.conv(2 * x, w)
    assert_close(f(2 * x, w, *bias), FORMULA[activation](case.oracle.add_bias(y, bias[0]) if biased else y), 1e-5)
    assert "depthwise_conv_fused" in str(jax.make_jaxpr(f)(x, w, *bias))


@needs_kernels
@pytest.mark.parametrize(("biased", "activation"), FUSED)
def test_fused_is_one_call_and_no_pass_of_its_own(biased: bool, activation: str | None) -> None:
    case = fused_case(24)
    x, w, _ = case.operands()
    bias = [case.draw((24,), 9)] * biased
    text = jax.jit(case.conv("native", activation=activation)).lower(x, w, *bias).compile().as_text() or ""
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r" custom-call\(", entry)) == 1
    assert not re.search(r" (?:fusion|maximum|minimum|clamp|add|copy|call)\(", entry), entry


@needs_kernels
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_channels_first_costs_two_transposes(direction: str) -> None:
    # Forward and dx: of what is read and of what is written; dw: of both that are read.
    case = fused_case(24, "channels_first")
    program = maps.maps(case.conv("native"))[direction]
    text = jax.jit(program).lower(*case.operands()).compile().as_text() or ""
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r" custom-call\(", entry)) == 1
    # What else makes an array as large as x, in either layout.
    passes = re.findall(r"= f32\[2,(?:24,6,9|6,9,24)\]\S* (?!parameter|bitcast|custom-call)", entry)
    assert len(passes) == 2, entry


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=label)
@pytest.mark.parametrize(("biased", "activation"), FUSED)
@needs_kernels
def test_fused_rounds_once(biased: bool, activation: str | None, dtype: Any) -> None:
    case = fused_case(40)
    x, w, _ = (jnp.asarray(a, dtype) for a in case.operands())
    bias = [jnp.asarray(case.draw((40,), 9), dtype)] * biased
    y = case.oracle.conv(x, w)
    exact = FORMULA[activation](case.oracle.add_bias(y, bias[0]) if biased else y)
    actual = case.conv("native", activation=activation)(x, w, *bias)
    assert actual.dtype == dtype
    assert_within_roundings(actual, exact, exact)
    # Nearly all are the float64 value rounded to the nearest; float32's sums decide a few ties otherwise.
    assert np.mean(np.asarray(actual) == exact.astype(np.float32).astype(dtype)) > 0.995


def test_the_mask_at_the_kinks(implementation: Implementation) -> None:
    # One tap of 1: y is x + b. At 0 and at 6 exactly the slope is 0, and what is no number passes none on.
    x = np.array([-1, 0, 1e-30, 3, 5.75, 6, 6.25, np.nan, np.inf, -np.inf], np.float32).reshape(-1, 1)
    w, b, g = np.ones((1, 1, 1), np.float32), np.zeros(1, np.float32), np.full((10, 1), 2, np.float32)
    for activation, value, slope in (
        ("relu", [0, 0, 1e-30, 3, 5.75, 6, 6.25, np.nan, np.inf, 0], [0, 0, 1, 1, 1, 1, 1, 0, 1, 0]),
        ("relu6", [0, 0, 1e-30, 3, 5.75, 6, 6, np.nan, 6, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]),
    ):
        f = jax.jit(lambda x, w, b, a=activation: depthwise_conv(x, w, b, activation=a, implementation=implementation))
        y, vjp = jax.vjp(f, x, w, b)
        np.testing.assert_array_equal(y[:, 0], np.asarray(value, np.float32))
        dx, _, db = vjp(g)
        np.testing.assert_array_equal(dx[:, 0], 2 * np.asarray(slope))
        np.testing.assert_array_equal(db, [2 * np.sum(slope)])
        tangent = jax.jvp(lambda x, f=f: f(x, w, b), (x,), (np.ones_like(x),))[1]
        np.testing.assert_array_equal(tangent[:, 0], slope)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_fused_derivatives_to_second_order(implementation: Implementation, activation: str | None, x64: None) -> None:
    # Against lax's convolution and jnp's maximum and minimum, in float64.
    case = fused_case(17)
    operands = [a.astype(np.float64) for a in (2 * case.draw(case.x), case.draw(case.kernel, 1), case.draw((17,), 9))]
    tangents = [case.draw(a.shape, 20 + i).astype(np.float64) for i, a in enumerate(operands)]
    target = case.draw(case.oracle.y_shape, 30).astype(np.float64)

    def reference(x: Any, w: Any, b: Any) -> Any:
        y = b + lax.conv_general_dilated(
            x,
            w.reshape(3, 3, 1, 17),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=17,
        )
        inside = (y > 0) & (y < 6) if activation == "relu6" else (y > 0) if activation else True
        return jnp.where(inside, y, 6.0 * (y >= 6) if activation == "relu6" else 0.0)

    def second_order(f: Any) -> Any:
        loss = lambda *z: (jnp.sin(f(*z)) * target).sum()  # noqa: E731
        gradient = jax.grad(loss, (0, 1, 2))
        return jax.jit(lambda z, t: (gradient(*z), jax.jvp(gradient, tuple(z), tuple(t))[1]))(operands, tangents)

    ours = second_order(case.conv(implementation, activation=activation))
    theirs = second_order(reference)
    for name, actual, expected in zip("xwbxwb", jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(actual, np.asarray(expected), 1e-12, name)


@pytest.mark.parametrize(
    "mapped", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_fused_vmap_over_each_operand(implementation: Implementation, activation: str, mapped: tuple[int, ...]) -> None:
    case = fused_case(20, multiplier=2)
    shapes = case.x, case.kernel, (40,)
    operands = [
        2 * case.draw((3, *shape) if axis else shape, i)
        for i, (shape, axis) in enumerate(zip(shapes, mapped, strict=True))
    ]
    f = jax.vmap(case.conv(implementation, activation=activation), [0 if axis else None for axis in mapped])
    y = jax.jit(f)(*operands)
    for i in range(3):
        x, w, b = (a[i] if axis else a for a, axis in zip(operands, mapped, strict=True))
        exact = FORMULA[activation](case.oracle.add_bias(case.oracle.conv(x, w), b))
        assert_close(y[i], exact, 1e-5)
