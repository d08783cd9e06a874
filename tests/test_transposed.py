"""The transposed depthwise convolution: against a float64 loop, PyTorch, Keras, Equinox and linear_transpose."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import depthwise_jax.nnx
from depthwise_jax import depthwise_conv, depthwise_conv_transpose, explain, linen
from depthwise_jax.constraints import MaxNorm
from depthwise_jax.lowering import PLATFORMS
from depthwise_jax.optim import constraints_of
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import PLAIN
from tests.support.meshes import make_mesh
from tests.support.oracle import Array, widest
from workloads.hlo import collectives
from workloads.keras_reference import keras
from workloads.workload import Workload

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Spread:
    """One call of depthwise_conv_transpose, and the true maps as loops over inputs and taps.

    Attributes:
        name: the case's.
        x, kernel: the operands' shapes.
        cut: what is cut off the (n - 1)*s + e outputs at either end; zeros are added where it is negative.
        geometry: the call's keyword arguments.
    """

    name: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    cut: Pairs
    geometry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.kernel) - 2

    @property
    def channel_axis(self) -> int:
        return -1 if self.geometry.get("data_format") != "channels_first" else -1 - self.rank

    def steps(self, argument: str) -> tuple[int, ...]:
        value = self.geometry.get(argument, 1)
        return (value,) * self.rank if isinstance(value, int) else value

    @property
    def y(self) -> tuple[int, ...]:
        """The shape of y."""
        return np.shape(self.conv(np.zeros(self.x), np.zeros(self.kernel)))

    def function(self, implementation: str | None = None, **options: Any) -> Callable[..., Any]:
        return partial(depthwise_conv_transpose, **self.geometry, implementation=implementation, **options)

    def operands(self, stream: int = 0) -> tuple[Array, Array, Array]:
        """x, the kernel and a cotangent, standard normal in float32."""
        draw = Workload(f"transposed-{self.name}", self.x, self.kernel).draw
        shapes = (self.x, self.kernel, self.y)
        x, w, g = (draw(shape, 3 * stream + i) for i, shape in enumerate(shapes))
        return x, w, g

    def _last(self, a: Any) -> Array:
        """With the channels last and one batch axis, in float64."""
        a = np.moveaxis(widest(a), self.channel_axis, -1)
        return a.reshape(-1, *a.shape[a.ndim - self.rank - 1 :])

    def _terms(self, spatial: Sequence[int], out: Sequence[int]) -> Any:
        """Every (input position, tap, output position) inside the outputs, behind one batch axis."""
        for position in itertools.product(*map(range, spatial)):
            for tap in itertools.product(*map(range, self.kernel[: self.rank])):
                written = [
                    i * s + t * d - low
                    for i, s, t, d, (low, _) in zip(
                        position, self.steps("strides"), tap, self.steps("dilation_rate"), self.cut, strict=True
                    )
                ]
                if all(0 <= o < n for o, n in zip(written, out, strict=True)):
                    yield (slice(None), *position), tap, (slice(None), *written)

    def out(self, spatial: Sequence[int]) -> tuple[int, ...]:
        axes = zip(spatial, self.kernel, self.steps("strides"), self.steps("dilation_rate"), self.cut, strict=False)
        return tuple((n - 1) * s + (k - 1) * d + 1 - low - high for n, k, s, d, (low, high) in axes)

    def conv(self, x: Any, w: Any) -> Array:
        """y."""
        moved, w = self._last(x), widest(w)
        batch, spatial = np.moveaxis(np.empty(np.shape(x)), self.channel_axis, -1).shape, moved.shape[1:-1]
        y = np.zeros((len(moved), *self.out(spatial), *w.shape[self.rank :]), np.result_type(moved, w))
        for i, t, o in self._terms(spatial, self.out(spatial)):
            y[o] += moved[i][..., None] * w[t]
        channels = math.prod(w.shape[self.rank :])
        y = y.reshape(*batch[: len(batch) - self.rank - 1], *self.out(spatial), channels)
        return np.moveaxis(y, -1, self.channel_axis)

    def input_grad(self, g: Any, w: Any) -> Array:
        """dx."""
        w, *size = widest(w), *np.moveaxis(np.empty(self.x), self.channel_axis, -1).shape
        spatial = size[len(size) - self.rank - 1 : -1]
        g = self._last(g).reshape(-1, *self.out(spatial), *w.shape[self.rank :])
        dx = np.zeros((len(g), *spatial, size[-1]))
        for i, t, o in self._terms(spatial, self.out(spatial)):
            dx[i] += (g[o] * w[t]).sum(-1)
        return np.moveaxis(dx.reshape(size), -1, self.channel_axis)

    def kernel_grad(self, x: Any, g: Any) -> Array:
        """dw."""
        x = self._last(x)
        g = self._last(g).reshape(-1, *self.out(x.shape[1:-1]), *self.kernel[self.rank :])
        dw = np.zeros(self.kernel)
        for i, t, o in self._terms(x.shape[1:-1], self.out(x.shape[1:-1])):
            dw[t] += (x[i][..., None] * g[o]).sum(0)
        return dw

    def __str__(self) -> str:
        return self.name


def _case(name: str, x: Sequence[int], kernel: Sequence[int], cut: Pairs, **geometry: Any) -> Spread:
    return Spread(name, tuple(x), tuple(kernel), cut, geometry)


CORE = (
    _case("2d", (2, 4, 3, 3), (3, 2, 3, 1), [(0, 0), (0, 0)]),
    # 4*2 and 3*2 outputs: a window of 4 gives one too many at each end, one of 3 one in all, at the end.
    _case("2d-same-strided", (2, 4, 3, 3), (4, 3, 3, 1), [(1, 1), (0, 1)], strides=2, padding="same"),
    _case(
        "2d-pairs-m2-first",
        (2, 3, 4, 3),
        (3, 4, 3, 2),
        [(1, 0), (2, 0)],
        strides=(2, 3),
        padding=((1, 1), (2, 1)),
        output_padding=1,
        data_format="channels_first",
    ),
    _case(
        "2d-strided-dilated-m2",
        (1, 3, 4, 2),
        (2, 3, 2, 2),
        [(1, 1), (1, 0)],
        strides=(2, 3),
        dilation_rate=(3, 2),
        padding=1,
        output_padding=(0, 1),
    ),
    _case("1d-strided", (2, 5, 3), (4, 3, 1), [(1, 0)], strides=3, padding=1, output_padding=1),
    _case("3d-m2", (1, 2, 3, 2, 2), (2, 3, 2, 2, 2), [(0, 0), (1, 1), (0, 0)], strides=(2, 1, 2), padding="same"),
    _case("2d-vector", (1, 4, 5, 19), (3, 3, 19, 1), [(0, 1), (0, 1)], strides=2, padding="same"),
)

CASES = (
    *CORE,
    # A stride above the window: zeros behind by name, as in Keras, and none with pairs, as in PyTorch.
    _case("2d-valid-beyond-window", (2, 3, 2, 2), (2, 1, 2, 2), [(0, -1), (0, -3)], strides=(3, 4)),
    _case("1d-same-beyond-window", (2, 3, 2), (2, 2, 1), [(0, -1)], strides=3, padding="same"),
    _case("1d-pairs-beyond-window", (2, 3, 2), (2, 2, 1), [(0, 0)], strides=4, padding=0),
    # With a number for output_padding: e - 1 - p outputs are cut for odd spans with "same", e - p for even ones.
    _case("1d-valid-output-padding", (2, 3, 2), (3, 2, 1), [(0, -1)], strides=2, output_padding=1),
    _case("1d-same-output-padding", (2, 3, 2), (5, 2, 1), [(1, 2)], strides=2, padding="SAME", output_padding=1),
    _case("1d-same-output-padding-even", (2, 3, 2), (4, 2, 2), [(2, 2)], strides=3, padding="same", output_padding=0),
    _case("1d-same-odd", (2, 4, 2), (5, 2, 1), [(2, 2)], padding="same"),
    # An output_padding below the dilation but not below the stride, as PyTorch allows: zeros that no window reaches.
    _case("1d-output-padding-below-dilation", (2, 3, 2), (2, 2, 2), [(0, -2)],
          padding=0, dilation_rate=3, output_padding=2),
    _case("2d-output-padding-below-dilation", (1, 3, 2, 2), (2, 2, 2, 1), [(1, -2), (0, 0)],
          strides=(2, 1), padding=((1, 1), (0, 0)), dilation_rate=(4, 1), output_padding=(3, 0)),
    _case("1d-all-paddings-inside", (2, 4, 2), (4, 2, 1), [(3, 3)], padding=3),
    _case("1d-padding-beyond-window", (2, 6, 2), (2, 2, 1), [(3, 4)], strides=2, padding=((3, 4),)),
    _case("1d-one-input", (2, 1, 3), (4, 3, 2), [(1, 1)], strides=2, padding="same"),
    _case("1d-first-m2", (2, 3, 4), (3, 3, 2), [(0, 1)], strides=2, padding="same", data_format="channels_first"),
    _case("2d-1x1", (2, 3, 2, 3), (1, 1, 3, 1), [(0, 0), (0, 0)]),
    _case("2d-no-batch", (3, 4, 2), (3, 3, 2, 2), [(0, 1), (0, 1)], strides=2, padding="same"),
    _case("2d-two-batch-axes-first", (2, 2, 3, 3, 2), (2, 2, 3, 1), [(0, 0), (0, 0)],
          strides=2, data_format="channels_first"),
    _case("2d-empty-batch", (0, 3, 2, 3), (2, 2, 3, 2), [(0, 0), (0, 0)], strides=2),
    _case("3d-first-dilated", (1, 2, 2, 3, 2), (2, 2, 2, 2, 1), [(0, 0), (0, 0), (0, 0)],
          dilation_rate=(2, 1, 2), data_format="channels_first"),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: Spread, implementation: str) -> None:
    x, w, g = case.operands()
    y, dx, dw = jax.jit(maps.value_and_gradients(case.function(implementation)))(x, w, g)
    assert y.dtype == jnp.float32
    assert_close(y, case.conv(x, w), 1e-5, "value")
    assert_close(dx, case.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", [c for c in CASES if 0 not in c.x], ids=str)
def test_the_loop_is_linear_and_its_gradients_its_transposes(case: Spread) -> None:
    # The loops are ours, so they have a judge as well.
    x, w, g = (widest(a) for a in case.operands())
    value = np.vdot(case.conv(x, w), g)
    np.testing.assert_allclose(np.vdot(case.input_grad(g, w), x), value, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.vdot(case.kernel_grad(x, g), w), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CORE[:4], ids=str)
def test_float64_bias_and_activation(case: Spread, implementation: str, x64: None) -> None:
    x, w, _ = (a.astype(np.float64) for a in case.operands())
    bias = np.arange(math.prod(case.kernel[-2:])) - 2.0
    y = case.function(implementation, activation="relu")(x, w, bias)
    expected = case.conv(x, w) + bias.reshape((-1,) + (1,) * (-1 - case.channel_axis))
    assert_close(y, np.maximum(expected, 0), 1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_summed_in_float32(dtype: Any, implementation: str) -> None:
    case = CORE[3]
    x, w, _ = (jnp.asarray(a, dtype) for a in case.operands())
    y = case.function(implementation)(x, w)
    exact = case.conv(x, w)
    assert y.dtype == dtype
    step = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2 + float(jnp.finfo(dtype).smallest_subnormal)
    assert np.all(np.abs(widest(y) - exact) <= step + 1e-6 * np.max(np.abs(exact)))
    assert case.function(implementation, preferred_element_type=jnp.float32)(x, w).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_integers_and_complex_numbers(dtype: Any) -> None:
    case = CORE[3]
    x, w, _ = ((4 * a).astype(dtype) for a in case.operands())
    for lowering in (None, "taps"):
        y = case.function(lowering)(x, w)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, case.conv(x, w), rtol=1e-5, atol=1e-4 if dtype == np.complex64 else 0)
    if dtype == np.int32:
        with pytest.raises(ValueError, match=r"implementation='conv' .*linear_transpose.*int32"):
            case.function("conv")(x, w)
        for platform in PLATFORMS:
            told = explain(x, w, **case.geometry, transposed=True, platform=platform)
            assert told.forward.lowering == "taps"
    else:
        np.testing.assert_allclose(case.function("conv")(x, w), case.conv(x, w), rtol=1e-5, atol=1e-4)


# --- peers ----------------------------------------------------------------------------------------------------------


def by_pairs(case: Spread) -> bool:
    return not isinstance(case.geometry.get("padding", "valid"), str)


@pytest.mark.parametrize("case", [c for c in CASES if by_pairs(c)], ids=str)
def test_pytorch_agrees(case: Spread, torch: Any) -> None:
    x, w, _ = case.operands()
    rank, geometry = case.rank, case.geometry
    padding = geometry["padding"]
    pairs = [(padding, padding)] * rank if isinstance(padding, int) else padding
    extra = case.geometry.get("output_padding", 0)
    extra = (extra,) * rank if isinstance(extra, int) else extra
    # PyTorch cuts both ends alike, and puts what is less at the end into output_padding.
    conv = getattr(torch.nn.functional, f"conv_transpose{rank}d")
    y = conv(
        torch.from_numpy(np.moveaxis(x, case.channel_axis, -1 - rank).copy()),
        torch.from_numpy(np.moveaxis(w, (-2, -1), (0, 1)).copy()),
        stride=case.steps("strides"),
        padding=tuple(low for low, _ in pairs),
        output_padding=tuple(p + max(low - high, 0) for p, (low, high) in zip(extra, pairs, strict=True)),
        groups=case.kernel[-2],
        dilation=case.steps("dilation_rate"),
    ).numpy()
    for axis, (low, high) in enumerate(pairs):
        y = np.delete(y, np.s_[y.shape[axis - rank] - max(high - low, 0) :], axis=axis - rank)
    assert_close(case.function()(x, w), np.moveaxis(y, -1 - rank, case.channel_axis).astype(np.float64), 1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_pytorch_agrees_over_all_its_geometries(rank: int, torch: Any) -> None:
    random, checked = np.random.default_rng(rank), 0
    every = [*itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 4), (0, 1, 2), (0, 1, 2, 3), (1, 2))]
    for index in random.choice(len(every), 60, replace=False):
        k, s, d, p, op, m = every[index]
        x = random.normal(size=(2, 3, *(3, 4)[:rank])).astype(np.float32)
        weight = random.normal(size=(3, m, *(k,) * rank)).astype(np.float32)
        options = {"padding": p, "output_padding": op}
        ours = partial(depthwise_conv_transpose, data_format="channels_first", strides=s, dilation_rate=d, **options)
        kernel = np.moveaxis(weight, (0, 1), (-2, -1))
        if op >= max(s, d) or 2 * s + (k - 1) * d + 1 - 2 * p + op < 1:
            with pytest.raises(ValueError, match="output_padding"):
                ours(x, kernel)
            continue
        theirs = getattr(torch.nn.functional, f"conv_transpose{rank}d")
        y = theirs(torch.from_numpy(x), torch.from_numpy(weight), stride=s, dilation=d, groups=3, **options).numpy()
        assert_close(ours(x, kernel), y.astype(np.float64), 1e-5, f"{(k, s, d, p, op, m)}")
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("k", "s", "d"), [(3, 2, 1), (4, 2, 1), (2, 3, 1), (5, 3, 1), (3, 1, 2), (1, 2, 1)])
def test_keras_agrees_on_names_and_output_padding(padding: str, k: int, s: int, d: int) -> None:
    # Keras' layer mixes channels: its kernel is zero where ours has none.
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, 3), (k, k, 3, 2)))
    dense = np.zeros((k, k, 6, 3), np.float32)
    for c, m in itertools.product(range(3), range(2)):
        dense[:, :, 2 * c + m, c] = kernel[:, :, c, m]
    for op in (None, *range(s)):
        options = {"strides": s, "padding": padding, "output_padding": op, "dilation_rate": d}
        y = depthwise_conv_transpose(x, kernel, **options)
        expected = keras.ops.conv_transpose(x, dense, data_format="channels_last", **options)
        assert_close(y, np.asarray(expected, np.float64), 1e-5, f"output_padding={op}")


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equinox_agrees(rank: int, m: int) -> None:
    # Equinox flips nothing either, but its kernel is that of the convolution of the dilated input: flipped.
    for s, p, op, d in ((1, 0, 0, 1), (2, 1, 1, 1), (3, ((0, 1),) * rank, 2, 1), (2, 1, 0, 2)):
        layer = eqx.nn.ConvTranspose(rank, 3, 3 * m, 3, s, p, op, d, groups=3, key=jax.random.key(0))
        x = np.random.default_rng(0).normal(size=(3, *(4, 3, 2)[:rank])).astype(np.float32)
        weight, bias = np.asarray(layer.weight), np.asarray(layer.bias)
        flipped = np.flip(weight.reshape(3, m, *weight.shape[2:]), tuple(range(2, rank + 2)))
        kernel = np.moveaxis(flipped, (0, 1), (-2, -1))
        options = {"strides": s, "padding": p, "output_padding": op, "dilation_rate": d}
        y = depthwise_conv_transpose(x, kernel, bias.reshape(-1), data_format="channels_first", **options)
        assert_close(y, np.asarray(layer(jnp.asarray(x)), np.float64), 1e-5, str(options))


@pytest.mark.parametrize("case", [c for c in CASES if c.kernel[-1] == 1 and 0 not in c.x], ids=str)
def test_it_is_the_transpose_of_depthwise_conv(case: Spread, implementation: str) -> None:
    # Of the convolution that gives x of y: what is cut off y is its padding, and a rest beyond its windows stays zero.
    x, w, _ = case.operands()
    options = {name: case.geometry[name] for name in case.geometry if name not in ("padding", "output_padding")}
    # A window of at most the padding reads nothing but zeros there.
    if min(map(min, case.cut)) < 0:
        with pytest.raises(ValueError, match="negative"):
            depthwise_conv(np.zeros(case.y, np.float32), w, padding=tuple(case.cut), **options)
        return
    conv = partial(depthwise_conv, kernel=w, padding=tuple(case.cut), implementation=implementation, **options)
    (expected,) = jax.linear_transpose(conv, jax.ShapeDtypeStruct(case.y, jnp.float32))(jnp.asarray(x))
    assert_close(case.function(implementation)(x, w), np.asarray(expected, np.float64), 1e-6)


# --- transformations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CORE[:4], ids=str)
def test_second_order(case: Spread, implementation: str, x64: None) -> None:
    # f = sum(sin(y)): D2 f[u] = sum(cos(y) y_u), whose gradient in x and the kernel is that of any bilinear y.
    z, u = (tuple(a.astype(np.float64) for a in case.operands(stream)[:2]) for stream in (0, 1))
    y, along = case.conv(*z), case.conv(u[0], z[1]) + case.conv(z[0], u[1])
    through_y, through_yu = -np.sin(y) * along, np.cos(y)
    expected = (
        case.input_grad(through_y, z[1]) + case.input_grad(through_yu, u[1]),
        case.kernel_grad(z[0], through_y) + case.kernel_grad(u[0], through_yu),
    )
    function = case.function(implementation)

    def f(z: Any) -> Any:
        return jnp.sin(function(*z)).sum()

    def products(z: Any, u: Any) -> dict[str, Any]:
        forward = lambda z: jax.jvp(f, (z,), (u,))[1]  # noqa: E731
        return {
            "forward over reverse": jax.jvp(jax.grad(f), (z,), (u,))[1],
            "reverse over forward": jax.grad(forward)(z),
            "reverse over reverse": jax.grad(lambda z: sum(map(jnp.vdot, jax.grad(f)(z), u)))(z),
        }

    for name, actual in jax.jit(products)(z, u).items():
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-12, name)


@pytest.mark.parametrize("case", [CORE[1], CORE[2]], ids=str)
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(case: Spread, mapped: Any, implementation: str) -> None:
    stacks = [np.stack([case.operands(stream)[i] for stream in range(3)]) for i in range(2)]
    operands = [stack if axis == 0 else stack[0] for stack, axis in zip(stacks, mapped, strict=True)]
    y = jax.jit(jax.vmap(case.function(implementation), mapped))(*operands)
    for i in range(3):
        own = [a[i] if axis == 0 else a for a, axis in zip(operands, mapped, strict=True)]
        assert_close(y[i], case.conv(*own), 1e-5)


def test_it_can_be_transposed_itself(implementation: str) -> None:
    case = CORE[2]
    x, w, g = case.operands()
    (dx,) = jax.linear_transpose(lambda x: case.function(implementation)(x, w), x)(jnp.asarray(g))
    assert_close(dx, case.input_grad(g, w), 1e-5)


@pytest.mark.parametrize("m", [1, 2])
def test_a_remat_policy_knows_its_value_by_name(m: int) -> None:
    x, w = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, m))
    policy = jax.checkpoint_policies.save_only_these_names("depthwise_conv")

    def loss(x: Any, w: Any) -> Any:
        return jnp.sin(depthwise_conv_transpose(jnp.sin(x), w, strides=2, activation="gelu")).sum()

    def count(f: Any) -> int:
        text = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w))
        return len(re.findall(r"depthwise_input_grad\[", text))

    copies = int(m > 1)  # their gradient is one too
    assert count(jax.checkpoint(loss)) == 2 + copies
    assert count(jax.checkpoint(loss, policy=policy)) == count(loss) == 1 + copies
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss, policy=policy), 1)(x, w), jax.grad(loss, 1)(x, w))


def test_scan_and_jit() -> None:
    case = CORE[1]
    w = case.operands()[1]
    xs = np.stack([case.operands(stream)[0] for stream in range(3)])
    ys = jax.jit(lambda xs, w: jax.lax.scan(lambda w, x: (w, case.function()(x, w)), w, xs)[1])(xs, w)
    for x, y in zip(xs, ys, strict=True):
        assert_close(y, case.conv(x, w), 1e-5)


@pytest.mark.parametrize("padding", ["valid", "same", 1])
@pytest.mark.parametrize("m", [1, 2])
def test_export_with_symbolic_sizes(padding: Any, m: int) -> None:
    w = np.random.default_rng(0).normal(size=(3, 4, 2, m)).astype(np.float32)
    f = partial(depthwise_conv_transpose, strides=2, padding=padding)
    shape = export.symbolic_shape("b, h, w, 2")
    program = export.export(jax.jit(f), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32), w)
    for size in ((2, 3, 4, 2), (1, 5, 1, 2)):
        x = np.random.default_rng(1).normal(size=size).astype(np.float32)
        assert_close(program.call(x, w), np.asarray(f(x, w), np.float64), 1e-6)


# --- meshes ---------------------------------------------------------------------------------------------------------

MESH_CASES = [
    _case(f"mesh-m{m}-stride{s}", (4, 8, 3, 4), (4, 2, 4, m), [(1, 1), (0, 0)], strides=s, padding=((1, 1), (0, 0)))
    for m, s in itertools.product((1, 2), (1, 2))
] + [_case("mesh-first", (4, 4, 8, 3), (3, 2, 4, 2), [(0, 1), (0, 0)], strides=2, padding="same",
           data_format="channels_first")]  # fmt: skip


# An explicit mesh's types say what in_sharding says.
@pytest.mark.parametrize(
    ("axis_type", "told"),
    [(AxisType.Auto, False), (AxisType.Auto, True), (AxisType.Explicit, False)],
    ids=["untold", "in_sharding", "explicit"],
)
@pytest.mark.parametrize("lowering", PLAIN)
@pytest.mark.parametrize("case", MESH_CASES, ids=str)
def test_sharded_batch_and_channels(case: Spread, lowering: str, axis_type: AxisType, told: bool) -> None:
    # No collective in y and dx; one all-reduce over the batch in dw, which cannot do without.
    mesh = make_mesh(axis_type, b=4, c=2)
    image = P("b", None, None, "c") if case.channel_axis == -1 else P("b", "c")
    kernel = P(None, None, "c", None)
    x, w, g = case.operands()
    options = {"in_sharding": image} if told else {}
    f = case.function(lowering, **options)
    shardings = tuple(NamedSharding(mesh, spec) for spec in (image, image, kernel))
    truth = case.conv(x, w), case.input_grad(g, w), case.kernel_grad(x, g)
    with jax.set_mesh(mesh):
        operands = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, image), (w, kernel), (g, image))]
        compiled = jax.jit(maps.value_and_gradients(f), out_shardings=shardings).lower(*operands).compile()
        for name, actual, expected in zip(("y", "dx", "dw"), compiled(*operands), truth, strict=True):
            assert_close(actual, expected, 1e-5, name)
        assert collectives(str(compiled.as_text())) == Counter({"all-reduce": 1})


def test_shard_map() -> None:
    case = MESH_CASES[2]
    x, w, _ = case.operands()
    spread = jax.shard_map(case.function(), mesh=make_mesh(b=8), in_specs=(P("b"), P()), out_specs=P("b"))
    x = np.concatenate([x, x])
    assert_close(jax.jit(spread)(x, w), case.conv(x, w), 1e-5)


# --- explain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", [CORE[0], CORE[1], CORE[2], CORE[4]], ids=str)
def test_a_program_is_lowered_as_explained(case: Spread, platform: str) -> None:
    x, w, g = case.operands()
    f = case.function()
    told = explain(x, w, **case.geometry, platform=platform, transposed=True)
    maps = {
        "forward": ("input_grad", f, (x, w)),
        "input_grad": ("forward", lambda g, w: jax.linear_transpose(lambda x: f(x, w), x)(g)[0], (g, w)),
        "kernel_grad": ("kernel_grad", lambda x, g: jax.linear_transpose(lambda w: f(x, w), w)(g)[0], (x, g)),
    }
    for name, (direction, program, operands) in maps.items():
        text = jax.jit(program).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
        native = f"depthwise_jax.{direction}.v" in text
        found = "native" if native else "conv" if "stablehlo.convolution" in text else "taps"
        assert found == getattr(told, name).lowering, name


def test_explain_refuses_arguments_of_another_call() -> None:
    with pytest.raises(ValueError, match="output_padding must be None without transposed=True; got 1"):
        explain(np.ones((1, 4, 2)), np.ones((2, 2, 1)), output_padding=1)
    with pytest.raises(ValueError, match="packed must be False with transposed=True; got True"):
        explain(np.ones((1, 4, 2)), np.ones((2, 2, 1)), transposed=True, packed=True)


# --- bad input ------------------------------------------------------------------------------------------------------

X, W = np.ones((2, 4, 5, 3), np.float32), np.ones((3, 3, 3, 2), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"output_padding": 1}, ValueError, ("output_padding", "smaller", "got 1 with", "strides=(1, 1)")),
        ({"output_padding": (0, 2), "strides": (3, 2)}, ValueError, ("output_padding", "(0, 2)", "strides=(3, 2)")),
        ({"output_padding": -1, "strides": 2}, ValueError, ("output_padding", "non-negative", "-1")),
        ({"output_padding": (1,), "strides": 2}, ValueError, ("output_padding", "2 of them", "(1,)")),
        ({"output_padding": 1.0, "strides": 2}, TypeError, ("output_padding", "1.0")),
        ({"output_padding": True, "strides": 2}, TypeError, ("output_padding", "True")),
        ({"padding": "causal"}, ValueError, ("padding", "'valid', 'same'", "'causal'")),
        ({"padding": "reflect"}, ValueError, ("padding", "'valid', 'same'", "'reflect'")),
        ({"padding": (1, 1)}, TypeError, ("padding", "((1, 1), (1, 1))")),
        ({"padding": -1}, ValueError, ("padding", "-1")),
        ({"padding": 4}, ValueError, ("empty", "(4, 5)", "padding=4", "cut")),
        ({"strides": 0}, ValueError, ("strides", "0")),
        ({"kernel": np.ones((3, 3, 4, 2))}, ValueError, ("x", "4 channels", "(2, 4, 5, 3)")),
        ({"kernel": np.ones((3, 3))}, ValueError, ("kernel", "(*window, channels, multiplier)")),
        ({"x": np.ones((2, 0, 5, 3))}, ValueError, ("empty", "(0, 5)")),
        ({"bias": np.ones(3)}, ValueError, ("bias", "C*M", "(6,)", "(3,)")),
        ({"activation": "rellu"}, ValueError, ("rellu",)),
        ({"implementation": "tap"}, ValueError, ("implementation", "'tap'")),
        ({"data_format": "NHWC"}, ValueError, ("data_format", "NHWC")),
    ],
    ids=str,
)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)):
        depthwise_conv_transpose(**{"x": X, "kernel": W, **options})


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers(rank: int, framework: str) -> None:
    arguments: dict[str, Any] = {"strides": 2, "padding": "same", "output_padding": 1, "depth_multiplier": 2}
    arguments |= {"activation": "relu", "data_format": "channels_first", "bias_initializer": "ones"}
    x = np.random.default_rng(0).normal(size=(2, 3, *(4, 3, 2)[:rank])).astype(np.float32)
    name = f"DepthwiseConv{rank}DTranspose"
    if framework == "linen":
        layer: Any = getattr(linen, name)(3, **arguments)
        assert getattr(depthwise_jax, name) is getattr(linen, name)
        y, variables = layer.init_with_output(jax.random.key(0), x)
        params = variables["params"]
    else:
        layer = getattr(depthwise_jax.nnx, name)(3, 3, **arguments, rngs=nnx.Rngs(0))
        y, params = layer(x), {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    assert params["kernel"].shape == (*(3,) * rank, 3, 2)
    options = {key: arguments[key] for key in ("strides", "padding", "output_padding", "activation", "data_format")}
    np.testing.assert_array_equal(y, depthwise_conv_transpose(x, params["kernel"], params["bias"], **options))
    assert y.shape == (2, 6, *(8, 6, 4)[:rank]) == layer.compute_output_shape(x.shape)
    assert layer.compute_output_shape((None, 3, *(None,) * rank)) == (None, 6, *(None,) * rank)


def test_what_a_layer_draws_is_what_the_convolution_s_draws() -> None:
    x = jnp.ones((1, 8, 8, 3))
    ours, theirs = linen.DepthwiseConv2DTranspose(4, strides=2), linen.DepthwiseConv2D(4)
    params, expected = (layer.init(jax.random.key(0), x)["params"] for layer in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_layer_s_regularizers_and_constraints() -> None:
    layer: Any = linen.DepthwiseConv2DTranspose(
        3, depthwise_constraint=MaxNorm(1.0, axis="window"), depthwise_regularizer="l2", activity_regularizer="l2"
    )
    x = jnp.ones((2, 4, 4, 3))
    variables = layer.init(jax.random.key(0), x)
    assert constraints_of(layer, x)["kernel"] == MaxNorm(1.0, axis="window")
    kernel = 5 * jnp.ones((3, 3, 3, 1))
    assert_close(MaxNorm(1.0, axis="window")(kernel), np.full((3, 3, 3, 1), 1 / 3), 1e-6)
    assert float(linen.regularization_loss(layer, {**variables["params"], "kernel": kernel}, x)) == pytest.approx(6.75)
    y, state = layer.apply(variables, x, mutable="losses")
    assert float(state["losses"]["activity"]) == pytest.approx(0.01 * float((y**2).sum()) / 2, rel=1e-5)


def test_a_layer_in_a_network_trains() -> None:
    class Upsampler(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.DepthwiseConv2DTranspose(4, strides=2, padding="same")(linen.DepthwiseConv2D(3, 2, "same")(x))

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    model: Any = Upsampler()
    params = model.init(jax.random.key(0), x)["params"]
    loss = jax.jit(lambda params: ((model.apply({"params": params}, x) - x) ** 2).mean())
    before = float(loss(params))
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))
    assert float(loss(params)) < 0.9 * before


def test_equal_nnx_layers_compile_once() -> None:
    layers = [depthwise_jax.nnx.DepthwiseConv1DTranspose(2, 3, output_padding=[1], strides=2, rngs=nnx.Rngs(i))
              for i in range(2)]  # fmt: skip
    assert layers[0].output_padding == (1,)
    traced = []

    @nnx.jit
    def f(layer: Any, x: Any) -> Any:
        traced.append(1)
        return layer(x)

    for layer in layers:
        assert f(layer, jnp.ones((1, 4, 2))).shape == (1, 10, 2)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output_padding": 2, "strides": 2}, ValueError, r"output_padding must be smaller .* got 2 "),
        ({"output_padding": "1"}, TypeError, r"output_padding must be a non-negative integer .*'1'"),
        ({"padding": "circular"}, ValueError, r"padding must be one of \('valid', 'same'\).*'circular'"),
        ({"filters": 3}, TypeError, r"filters"),
        ({"padding_mode": "zeros"}, TypeError, r"padding_mode"),
    ],
)
def test_a_layer_checks_its_arguments_at_construction(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linen.DepthwiseConv2DTranspose(3, **arguments)
    with pytest.raises(error, match=message):
        depthwise_jax.nnx.DepthwiseConv2DTranspose(3, 3, **arguments, rngs=nnx.Rngs(0))


def test_a_layer_has_no_keras_configuration() -> None:
    for rank in (1, 2, 3):
        layer: Any = getattr(linen, f"DepthwiseConv{rank}DTranspose")(3)
        with pytest.raises(ValueError, match=f"Keras has no DepthwiseConv{rank}DTranspose"):
            layer.get_config()
    config = {"class_name": "Conv2DTranspose", "config": {"kernel_size": 3, "filters": 2}}
    with pytest.raises(ValueError, match="DepthwiseConv2DTranspose"):
        linen.DepthwiseConv2DTranspose.from_config(config)
    # Arguments by name make one, as they make a DepthwiseConv3D.
    assert linen.DepthwiseConv2DTranspose.from_config({"kernel_size": 3, "output_padding": None}).kernel_size == 3
