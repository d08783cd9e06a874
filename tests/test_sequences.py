"""causal_conv1d: chunks, packed documents, lengths and states, against loops over documents, on every lowering."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import depthwise_jax
from depthwise_jax import depthwise_conv, explain
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.documents import CONTINUED, DOCUMENTS, IDS, LENGTH, POSITIONS, ROWS, draw
from tests.support.oracle import CausalOracle, Oracle

# As Any: tests give them what they refuse, and arrays of NumPy for those of JAX.
causal_conv1d: Any = depthwise_jax.causal_conv1d
causal_conv1d_state: Any = depthwise_jax.causal_conv1d_state

# Kernel size, dilation, multiplier, batch axes, data format.
Geometry = tuple[int, int, int, tuple[int, ...], str]
GEOMETRIES: list[Geometry] = [
    (4, 1, 1, (ROWS,), "channels_last"),
    (1, 1, 2, (ROWS,), "channels_last"),
    (LENGTH + 2, 1, 1, (), "channels_last"),
    (3, 2, 2, (1, ROWS), "channels_first"),
    (4, 5, 1, (ROWS,), "channels_first"),
    (4, 1, 1, (ROWS,), "channels_first"),
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g)).replace(" ", ""))


def turned(a: Any, data_format: str) -> Any:
    """An array (*batch, L, C) in a data format, or back."""
    return a if data_format == "channels_last" else np.swapaxes(a, -1, -2)


def operands(geometry: Geometry, channels: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x in the data format, kernel and bias."""
    size, _, multiplier, batch, data_format = geometry
    x = turned(draw(*batch, LENGTH, channels), data_format)
    return x, draw(size, channels, multiplier), draw(channels * multiplier)


def function(geometry: Geometry, implementation: str | None = None) -> Callable[..., Any]:
    _, dilation, _, _, data_format = geometry
    return functools.partial(
        causal_conv1d, dilation_rate=dilation, data_format=data_format, implementation=implementation
    )


# ---- Chunks


@geometries
def test_chunks_of_any_length_give_the_numbers_of_the_whole(geometry: Geometry, implementation: str) -> None:
    size, dilation, _, batch, data_format = geometry
    x, kernel, _ = operands(geometry)
    conv = function(geometry, implementation)
    options = {"dilation_rate": dilation, "data_format": data_format, "implementation": implementation}
    whole = depthwise_conv(x, kernel, padding="causal", **options)
    oracle = Oracle(x.shape, kernel.shape, padding="causal", dilation_rate=dilation, data_format=data_format)
    assert_close(whole, oracle.conv(x, kernel), 1e-5)
    axis = -2 if data_format == "channels_last" else -1
    span = (size - 1) * dilation
    last = np.concatenate([np.zeros((*batch, span, 3), np.float32), turned(x, data_format)], -2)[..., LENGTH:, :]
    for lengths in ([LENGTH], [0, 1, 2, 0, 1, 7]):
        state, outputs, start = None, [], 0
        for n in lengths:
            chunk = np.take(x, np.arange(start, start + n), axis)
            y, state = conv(chunk, kernel, state=state)
            outputs.append(y)
            start += n
        y = np.concatenate(outputs, axis)
        if implementation == "native":
            np.testing.assert_array_equal(y, whole)
        else:  # XLA multiplies and adds at once where no mask stands between, as in the padding of the first chunk
            assert_close(y, np.asarray(whole, np.float64), 1e-6)
        np.testing.assert_array_equal(state, turned(last, data_format))


def test_the_state_keeps_its_dtype_and_leaves_that_of_y() -> None:
    x, kernel, _ = operands(GEOMETRIES[0])
    narrow, wide = jnp.asarray(x, jnp.bfloat16), jnp.asarray(draw(ROWS, 3, 3))
    y, state = causal_conv1d(narrow, jnp.asarray(kernel, jnp.bfloat16), state=wide)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    y, state = causal_conv1d(x, kernel, state=wide.astype(jnp.bfloat16))
    assert (y.dtype, state.dtype) == (jnp.float32, jnp.bfloat16)
    # Of one token the state moves up, in its dtype.
    _, state = causal_conv1d(narrow[:, :1], jnp.asarray(kernel, jnp.bfloat16), state=wide)
    np.testing.assert_array_equal(state, jnp.concatenate([wide[:, 1:], narrow[:, :1].astype(jnp.float32)], 1))
    assert causal_conv1d(narrow, jnp.asarray(kernel, jnp.bfloat16))[1].dtype == jnp.bfloat16


def test_an_empty_chunk() -> None:
    x, kernel, bias = operands((4, 1, 2, (ROWS,), "channels_last"))
    state = jnp.asarray(draw(ROWS, 3, 3))
    y, after = causal_conv1d(x[:, :0], kernel, bias, state=state, activation="glu", lengths=np.zeros(ROWS, int))
    assert (y.shape, y.dtype) == ((ROWS, 0, 3), jnp.float32)  # glu halves the channels
    np.testing.assert_array_equal(after, state)
    np.testing.assert_array_equal(causal_conv1d(x[:, :0], kernel)[1], np.zeros((ROWS, 3, 3)))


def test_bias_and_activation_come_last(implementation: str) -> None:
    x, kernel, bias = operands(GEOMETRIES[0])
    conv = functools.partial(causal_conv1d, x, kernel, implementation=implementation)
    for arguments in ({}, {"segment_ids": IDS}):
        expected = np.asarray(conv(**arguments)[0]) + bias
        for name, activation in (("silu", jax.nn.silu), ("relu", jax.nn.relu)):
            y, _ = conv(bias, activation=name, **arguments)
            np.testing.assert_allclose(y, activation(expected), atol=1e-6)


# ---- Packed documents


@geometries
def test_packed_is_the_documents_apart(geometry: Geometry, implementation: str) -> None:
    """Forward and all gradients, by ids and by positions."""
    _, dilation, _, batch, data_format = geometry
    x, kernel, bias = operands(geometry)
    ids, positions = (a[0] if not batch else a.reshape(*batch, LENGTH) for a in (IDS, POSITIONS))
    conv = function(geometry, implementation)
    by_ids = lambda x, kernel, bias: conv(x, kernel, bias, segment_ids=ids)[0]  # noqa: E731
    g = draw(*jax.eval_shape(by_ids, x, kernel, bias).shape, seed=1)
    y, dx, dkernel, dbias = jax.jit(maps.value_and_gradients(by_ids))(x, kernel, bias, g)
    np.testing.assert_array_equal(jax.jit(lambda *a: conv(*a, segment_pos=positions)[0])(x, kernel, bias), y)
    # Each document by itself.
    rows = turned(x, data_format).reshape(-1, LENGTH, 3)
    g_rows = turned(g, data_format).reshape(len(rows), LENGTH, -1)
    true_y, true_dx, true_dkernel = np.zeros(g_rows.shape), np.zeros(rows.shape), np.zeros(kernel.shape)
    for row, documents in enumerate(DOCUMENTS[: len(rows)]):
        start = 0
        for n in documents:
            part = slice(start, start + n)
            oracle = Oracle((n, 3), kernel.shape, padding="causal", dilation_rate=dilation)
            true_y[row, part] = oracle.add_bias(oracle.conv(rows[row, part], kernel), bias)
            true_dx[row, part] = oracle.input_grad(g_rows[row, part], kernel)
            true_dkernel += oracle.kernel_grad(rows[row, part], g_rows[row, part])
            start += n
    assert_close(turned(np.asarray(y), data_format).reshape(true_y.shape), true_y, 1e-5, "y")
    assert_close(turned(np.asarray(dx), data_format).reshape(true_dx.shape), true_dx, 1e-5, "dx")
    assert_close(dkernel, true_dkernel, 1e-5, "dkernel")
    assert_close(dbias, g_rows.sum((0, 1), dtype=np.float64), 1e-5, "dbias")


@pytest.mark.parametrize(("size", "dilation", "multiplier"), [(4, 1, 1), (3, 2, 2), (4, 4, 1), (1, 1, 1)])
def test_documents_that_go_on_from_a_state(size: int, dilation: int, multiplier: int, implementation: str) -> None:
    """In one chunk and in several, gradients in the state too."""
    oracle = CausalOracle(size, dilation)
    x, kernel, state = draw(ROWS, LENGTH, 3), draw(size, 3, multiplier), draw(ROWS, oracle.span, 3, seed=2)
    z = np.concatenate([state, x], 1)
    conv = functools.partial(causal_conv1d, dilation_rate=dilation, implementation=implementation)
    y, pullback = jax.vjp(
        lambda x, kernel, state: conv(x, kernel, state=state, segment_pos=CONTINUED)[0], x, kernel, state
    )
    assert_close(y, oracle.forward(z, kernel, CONTINUED), 1e-5, "y")
    g = draw(*y.shape, seed=3)
    dx, dkernel, dstate = pullback(g)
    dz, dw = oracle.gradients(z, kernel, CONTINUED, g)
    assert_close(np.concatenate([dstate, dx], 1), dz, 1e-5, "dz")
    assert_close(dkernel, dw, 1e-5, "dkernel")
    chunks, after = [], state
    for start, end in ((0, 1), (1, 3), (3, 3), (3, LENGTH)):
        part, after = conv(x[:, start:end], kernel, state=after, segment_pos=CONTINUED[:, start:end])
        chunks.append(part)
    np.testing.assert_array_equal(np.concatenate(chunks, 1), y)
    np.testing.assert_array_equal(after, z[:, LENGTH:])


def test_a_position_of_any_integer_type(implementation: str) -> None:
    x, kernel, _ = operands(GEOMETRIES[0])
    expected = causal_conv1d(x, kernel, segment_ids=IDS, implementation=implementation)[0]
    for dtype in (jnp.int8, jnp.uint8, jnp.uint32, jnp.int16):
        y, _ = causal_conv1d(x, kernel, segment_pos=jnp.asarray(POSITIONS, dtype), implementation=implementation)
        np.testing.assert_array_equal(y, expected)
        y, _ = causal_conv1d(x, kernel, segment_ids=jnp.asarray(IDS, dtype), implementation=implementation)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_any_order(implementation: str) -> None:
    """Beside a plain masked sum: the gradient, its derivative along a tangent, and that one's gradient."""
    size, dilation = 3, 2
    span = (size - 1) * dilation
    positions = CONTINUED[:2, :7]
    x, kernel, state = (a.astype(np.float64) for a in (draw(2, 7, 2), draw(size, 2, 2), draw(2, span, 2)))
    bias = draw(4).astype(np.float64)

    def conv(x: Any, kernel: Any, bias: Any, state: Any) -> Any:
        return causal_conv1d(
            x,
            kernel,
            bias,
            state=state,
            segment_pos=positions,
            dilation_rate=dilation,
            activation="silu",
            implementation=implementation,
        )[0]

    def plain(x: Any, kernel: Any, bias: Any, state: Any) -> Any:
        z = jnp.concatenate([state, x], 1)
        terms: list[Any] = [
            jnp.where(
                ((positions >= j * dilation) | (j == 0))[..., None, None],
                z[:, span - j * dilation :][:, :7, :, None] * kernel[size - 1 - j],
                0,
            )
            for j in range(size)
        ]
        return jax.nn.silu(functools.reduce(jnp.add, terms).reshape(2, 7, 4) + bias)

    arguments = (x, kernel, bias, state)
    tangents = tuple(draw(*a.shape, seed=4).astype(np.float64) for a in arguments)

    def derivatives(f: Callable[..., Any]) -> Any:
        gradient = jax.grad(lambda *arguments: (f(*arguments) ** 3).sum(), (0, 1, 2, 3))

        def along(*arguments: Any) -> Any:
            return jax.jvp(gradient, arguments, tangents)

        total = lambda *arguments: sum(jnp.vdot(a, t) for a, t in zip(along(*arguments)[1], tangents, strict=True))  # noqa: E731
        return jax.jit(lambda *arguments: (along(*arguments), jax.grad(total, (0, 1, 2, 3))(*arguments)))(*arguments)

    for ours, theirs in zip(jax.tree.leaves(derivatives(conv)), jax.tree.leaves(derivatives(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_taylor_mode(implementation: str) -> None:
    positions = POSITIONS[:2]
    (x, w), (u, v) = ((draw(2, LENGTH, 2, seed=seed), draw(3, 2, 1, seed=seed)) for seed in (0, 1))
    conv = functools.partial(causal_conv1d, segment_pos=positions, implementation=implementation)
    y, (slope, curvature) = jet.jet(lambda x, w: conv(x, w)[0], (x, w), ([u, 0 * u], [v, 0 * v]))
    exact = lambda x, w: CausalOracle(3).forward(np.pad(x, ((0, 0), (2, 0), (0, 0))), w, positions)  # noqa: E731
    assert_close(y, exact(x, w), 1e-5)
    assert_close(slope, exact(u, w) + exact(x, v), 1e-5)
    assert_close(curvature, 2 * exact(u, v), 1e-5)


@pytest.mark.parametrize("mapped", ["x", "kernel", "state", "segment_pos", "lengths", "x segment_pos"])
def test_vmap_of_each_operand(mapped: str) -> None:
    check_vmap(mapped.split(), None)


def test_vmap_of_all_operands(implementation: str) -> None:
    check_vmap(["x", "kernel", "bias", "state", "segment_pos", "lengths"], implementation)


def check_vmap(names: Sequence[str], implementation: str | None) -> None:
    """Value, state and gradients are those of a loop."""
    arguments = {
        "x": draw(2, LENGTH, 3),
        "kernel": draw(3, 3, 2),
        "bias": draw(6),
        "state": draw(2, 2, 3),
        "segment_pos": CONTINUED[:2],
        "lengths": np.array([3, 11]),
    }
    for name in names:
        other = draw(*arguments[name].shape, seed=5)
        if arguments[name].dtype.kind == "i":
            other = {"segment_pos": CONTINUED[2:4], "lengths": np.array([0, 1])}[name]
        arguments[name] = np.stack([arguments[name], other])

    def conv(arguments: dict[str, Any]) -> Any:
        def value(numbers: dict[str, Any]) -> Any:
            y, state = causal_conv1d(**arguments | numbers, implementation=implementation)
            return (jnp.sin(y)).sum() + (state**2).sum(), (y, state)

        numbers = {name: a for name, a in arguments.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        return jax.value_and_grad(value, has_aux=True)(numbers)

    axes = {name: 0 if name in names else None for name in arguments}
    results = jax.jit(jax.vmap(conv, (axes,)))(arguments)
    one = jax.jit(conv)
    for i in range(2):
        expected = one({name: a[i] if name in names else a for name, a in arguments.items()})
        for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=2e-4, atol=2e-5)


def test_nothing_leaks_from_one_document_to_another(implementation: str) -> None:
    x, kernel, bias = operands(GEOMETRIES[0])
    bad = (POSITIONS == 0).cumsum(1) == 2  # the second document of each row
    spoiled = np.where(bad[..., None], np.nan, x)

    def conv(x: Any, kernel: Any) -> Any:
        return causal_conv1d(x, kernel, bias, segment_ids=IDS, implementation=implementation)[0]

    y, pullback = jax.vjp(conv, spoiled, kernel)
    dx, _ = pullback(jnp.ones_like(y))
    np.testing.assert_array_equal(np.isnan(y).any(-1), bad)
    assert np.isfinite(dx).all()
    # A NaN in the cotangent of a document's outputs stays in the document.
    dx, _ = pullback(jnp.where(bad[..., None], np.nan, jnp.ones_like(y)))
    np.testing.assert_array_equal(np.isnan(dx).any(-1), bad)
    # The gradient of a document's outputs is exactly 0 outside of it.
    dx, _ = pullback(jnp.where(bad[..., None], jnp.ones_like(y), 0))
    assert not np.asarray(dx)[~bad].any()
    assert np.asarray(dx)[bad].all()


def test_a_stale_state_is_not_read(implementation: str) -> None:
    """Neither its values nor, in any gradient, NaN in it; and nothing of the window's taps that are not reached."""
    x, kernel, _ = operands(GEOMETRIES[0])
    stale = np.full((ROWS, 3, 3), np.nan, np.float32)

    def conv(x: Any, kernel: Any, state: Any) -> Any:
        return causal_conv1d(x, kernel, state=state, segment_pos=POSITIONS, implementation=implementation)[0]

    y, pullback = jax.vjp(conv, x, kernel, stale)
    fresh, fresh_pullback = jax.vjp(conv, x, kernel, np.zeros_like(stale))
    np.testing.assert_array_equal(y, fresh)
    gradients, expected = pullback(y), fresh_pullback(y)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.asarray(gradients[2]).any()
    first_of_all = np.where(np.arange(4)[:, None, None] < 3, np.nan, kernel)
    y, _ = causal_conv1d(
        x, first_of_all, state=stale, segment_pos=np.zeros((ROWS, LENGTH), int), implementation=implementation
    )
    np.testing.assert_allclose(y, x * kernel[3, :, 0], rtol=1e-6)


def test_left_padding_is_not_seen(implementation: str) -> None:
    x, kernel, _ = operands(GEOMETRIES[0])
    positions = np.arange(LENGTH) - np.arange(ROWS)[:, None]
    y, _ = causal_conv1d(x, kernel, segment_pos=positions, implementation=implementation)
    for row in range(ROWS):
        alone, _ = causal_conv1d(x[row, row:], kernel, implementation=implementation)
        np.testing.assert_allclose(y[row, row:], alone, atol=1e-6)


# ---- Lengths


@geometries
def test_the_state_ends_at_each_rows_length(geometry: Geometry) -> None:
    size, dilation, _, batch, data_format = geometry
    x, kernel, _ = operands(geometry)
    span = (size - 1) * dilation
    state = turned(draw(*batch, span, 3, seed=6), data_format)
    z = np.concatenate([turned(state, data_format), turned(x, data_format)], -2).reshape(-1, span + LENGTH, 3)
    count = len(z)
    for first in (0, 1, LENGTH):
        lengths = np.resize([first, 0, 1, 2, LENGTH - 1], count)
        expected = np.stack([row[n : n + span] for row, n in zip(z, lengths, strict=True)])
        lengths = lengths.reshape(batch)
        _, after = function(geometry)(x, kernel, state=state, lengths=lengths)
        np.testing.assert_array_equal(turned(np.asarray(after), data_format).reshape(expected.shape), expected)
        options = {"kernel_size": size, "dilation_rate": dilation, "data_format": data_format}
        np.testing.assert_array_equal(causal_conv1d_state(x, state, lengths=lengths, **options), after)
        without = causal_conv1d_state(x, lengths=lengths, **options)
        np.testing.assert_array_equal(without, causal_conv1d_state(x, np.zeros_like(state), lengths=lengths, **options))


def test_prefill_of_padded_rows_then_decoding() -> None:
    """Each row goes on as if it had been alone."""
    x, kernel, bias = operands(GEOMETRIES[0])
    lengths = np.array([1, 2, 5, 8, 0])
    following = draw(ROWS, 4, 3, seed=7)
    _, state = causal_conv1d(x, kernel, bias, lengths=lengths)
    y, _ = causal_conv1d(following, kernel, bias, state=state)
    for row, n in enumerate(lengths):
        alone = np.concatenate([x[row, :n], following[row]])
        np.testing.assert_array_equal(y[row], causal_conv1d(alone, kernel, bias)[0][n:])


def test_rollback_to_what_was_accepted() -> None:
    x, kernel, _ = operands(GEOMETRIES[0])
    _, before = causal_conv1d(x, kernel)
    draft = draw(ROWS, 4, 3, seed=8)
    causal_conv1d(draft, kernel, state=before)
    accepted = np.array([0, 1, 2, 4, 3])
    state = causal_conv1d_state(draft, before, kernel_size=4, lengths=accepted)
    for row, n in enumerate(accepted):
        np.testing.assert_array_equal(state[row], np.concatenate([x[row], draft[row, :n]])[-3:])


def test_the_gradient_through_the_state_of_padded_rows() -> None:
    x, state = draw(2, 5, 3), draw(2, 2, 3, seed=9)
    g = draw(2, 2, 3, seed=10)
    lengths = np.array([1, 5])

    def after(x: Any, state: Any) -> Any:
        return causal_conv1d_state(x, state, kernel_size=3, lengths=lengths)

    dx, dstate = jax.vjp(after, x, state)[1](g)
    dz = np.zeros((2, 7, 3), np.float32)
    for row, n in enumerate(lengths):
        dz[row, n : n + 2] = g[row]
    np.testing.assert_array_equal(np.concatenate([dstate, dx], 1), dz)


# ---- Programs


def test_decoding_in_a_scan() -> None:
    x, kernel, bias = operands(GEOMETRIES[0])
    expected, last = causal_conv1d(x, kernel, bias, activation="silu")

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(state: jax.Array, tokens: jax.Array) -> Any:
        def step(state: jax.Array, token: jax.Array) -> Any:
            y, state = causal_conv1d(token[:, None], kernel, bias, state=state, activation="silu")
            return state, y[:, 0]

        return lax.scan(step, state, tokens)

    state = jnp.zeros((ROWS, 3, 3))
    after, y = decode(state, jnp.moveaxis(x, 1, 0))
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 1), expected, atol=1e-6)
    np.testing.assert_array_equal(after, last)
    assert state.is_deleted()


def test_export_with_a_symbolic_length() -> None:
    x, kernel, bias = operands(GEOMETRIES[0])
    state = draw(ROWS, 3, 3, seed=11)

    def conv(x: Any, state: Any, positions: Any, ids: Any, lengths: Any) -> Any:
        return (
            causal_conv1d(x, kernel, bias, state=state, segment_pos=positions, activation="silu"),
            causal_conv1d(x, kernel, bias, state=state, lengths=lengths),
            causal_conv1d(x, kernel, bias, segment_ids=ids),
            causal_conv1d(x, kernel, bias),
        )

    (length,) = export.symbolic_shape("l")
    types = (
        jax.ShapeDtypeStruct((ROWS, length, 3), "float32"),
        jax.ShapeDtypeStruct(state.shape, "float32"),
        *(jax.ShapeDtypeStruct((ROWS, length), "int32"),) * 2,
        jax.ShapeDtypeStruct((ROWS,), "int32"),
    )
    exported = export.export(jax.jit(conv), platforms=("cpu", "tpu", "cuda"))(*types)
    for n in (2, LENGTH):
        arguments = (x[:, :n], state, CONTINUED[:, :n].astype(np.int32), IDS[:, :n].astype(np.int32))
        arguments += (np.full(ROWS, n // 2, np.int32),)
        for ours, theirs in zip(
            jax.tree.leaves(exported.call(*arguments)), jax.tree.leaves(conv(*arguments)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_remat_policy_keeps_the_packed_value() -> None:
    x, kernel, _ = operands(GEOMETRIES[0])

    def loss(x: Any, kernel: Any) -> Any:
        return jnp.sin(causal_conv1d(x, kernel, segment_ids=IDS)[0]).sum()

    policy = jax.checkpoint_policies.save_only_these_names("depthwise_conv")
    saved = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1)))(x, kernel)
    assert str(saved).count("= depthwise_conv[") == 1


def test_explain_tells_of_packed_maps() -> None:
    x, kernel = jax.ShapeDtypeStruct((8, 64, 32), "float32"), jax.ShapeDtypeStruct((4, 32, 1), "float32")
    for platform in ("tpu", "cuda", "rocm"):
        told = explain(x, kernel, padding="causal", packed=True, platform=platform)
        assert {told.forward.lowering, told.input_grad.lowering, told.kernel_grad.lowering} == {"taps"}
    assert "one for each tap" in explain(x, kernel, packed=True, platform="cuda").forward.reason


# ---- Meshes

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


@pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(None, None, "a"), PartitionSpec("a", None, "b")])
@pytest.mark.parametrize("kinds", [(AxisType.Auto,) * 2, (AxisType.Explicit,) * 2], ids=["auto", "explicit"])
@pytest.mark.parametrize("stated", [False, True])
def test_batch_and_channels_shard_without_collectives(spec: PartitionSpec, kinds: Any, stated: bool) -> None:
    """But for the kernel gradient's sum over a sharded batch."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x, kernel, state = draw(8, LENGTH, 16), draw(4, 16, 1), draw(8, 3, 16)
    positions, lengths = np.resize(CONTINUED, (8, LENGTH)), np.arange(8)
    channels = PartitionSpec(None, spec[2] if len(spec) > 2 else None, None)

    def forward(x: Any, kernel: Any, state: Any, positions: Any, spec: Any = spec if stated else None) -> Any:
        packed = causal_conv1d(x, kernel, state=state, segment_pos=positions, in_sharding=spec)
        return packed, causal_conv1d(x, kernel, state=state, lengths=lengths, in_sharding=spec)

    def gradients(x: Any, kernel: Any, state: Any, positions: Any, **options: Any) -> Any:
        def loss(x: Any, kernel: Any, state: Any) -> Any:
            (y, after), _ = forward(x, kernel, state, positions, **options)
            return (y**2).sum() + (after**3).sum()

        return jax.grad(loss, (0, 1, 2))(x, kernel, state)

    expected = [jax.jit(functools.partial(f, spec=None))(x, kernel, state, positions) for f in (forward, gradients)]
    specs = spec, channels, spec, PartitionSpec(spec[0])
    with jax.set_mesh(mesh):
        arguments = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip((x, kernel, state, positions), specs, strict=True)
        ]
        for f, truth, reduces in zip((forward, gradients), expected, (False, spec[0] is not None), strict=True):
            compiled = jax.jit(f).lower(*arguments).compile()
            assert COLLECTIVE.findall(compiled.as_text() or "") == ["all-reduce"] * reduces
            for ours, theirs in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(truth), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


# ---- Errors

X, KERNEL = np.ones((2, 5, 3), np.float32), np.ones((4, 3, 1), np.float32)
WIDE = {"x": np.ones((2, 5, 6)), "kernel": np.ones((4, 6, 1))}
ONES, STATE = np.ones((2, 5), int), np.ones((2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        # fla and EasyDeL keep as many tokens as the window has, Mamba channels first.
        (
            {"state": np.ones((2, 4, 3))},
            ValueError,
            r"state must have shape .* = \(2, 3, 3\).*\(2, 4, 3\).*\[\.\.\., 1:, :\]",
        ),
        ({"state": np.ones((2, 3, 5))}, ValueError, r"state must have shape .*got shape \(2, 3, 5\)$"),
        (WIDE | {"state": np.ones((2, 6, 3))}, ValueError, r"swapaxes\(state, -1, -2\)$"),
        (WIDE | {"state": np.ones((2, 6, 4))}, ValueError, r"swapaxes\(state, -1, -2\)\[\.\.\., 1:, :\]"),
        ({"x": np.ones((2, 3)), "state": STATE}, ValueError, r"time axis: jnp.expand_dims\(x, 1\)"),
        (
            {
                "x": np.ones((2, 3)),
                "state": STATE,
                "data_format": "channels_first",
                "kernel": np.ones((4, 2, 1)),
            },
            ValueError,
            r"time axis: jnp.expand_dims\(x, 2\)",
        ),
        ({"x": np.ones((2, 3)), "lengths": ONES[:, 0]}, ValueError, "lengths must have shape .* time axis"),
        ({"x": np.ones((2, 3)), "segment_pos": ONES[:, :1]}, ValueError, "segment_pos must have shape .* time axis"),
        ({"x": np.ones(3)}, ValueError, "x must have shape"),
        ({"x": np.ones((2, 5, 4))}, ValueError, "with 3 channels"),
        ({"segment_ids": ONES, "segment_pos": ONES}, ValueError, "segment_ids .*segment_pos"),
        ({"segment_ids": ONES, "state": STATE}, ValueError, "segment_ids .* state.*segment_pos"),
        ({"segment_ids": np.ones((2, 5))}, TypeError, "segment_ids must be integers; got dtype float"),
        ({"segment_pos": np.ones((2, 5), bool)}, TypeError, "segment_pos must be integers; got dtype bool"),
        ({"lengths": np.ones(2)}, TypeError, "lengths must be integers"),
        ({"segment_ids": ONES[:, 1:]}, ValueError, r"segment_ids must have shape .*\(2, 5\).*\(2, 4\)"),
        ({"lengths": ONES}, ValueError, r"lengths must have shape \(\*batch,\) = \(2,\).*\(2, 5\)"),
        ({"kernel": np.ones((4, 3))}, ValueError, r"kernel must have shape \(K, C, M\).*\[\.\.\., None\]"),
        ({"kernel": np.ones((3, 3, 3, 1))}, ValueError, r"kernel must have shape \(K, C, M\)"),
        ({"dilation_rate": 0}, ValueError, "dilation_rate"),
        ({"dilation_rate": (1, 2)}, ValueError, "dilation_rate"),
        ({"bias": np.ones(2)}, ValueError, "bias must have shape"),
        ({"bias": np.ones(2), "x": np.ones((2, 0, 3))}, ValueError, "bias must have shape"),
        ({"implementation": "slow"}, ValueError, "implementation must be"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d(**{"x": X, "kernel": KERNEL} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": np.ones(3)}, ValueError, "x must have shape"),
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"state": np.ones((2, 4, 3))}, ValueError, "state must have shape"),
        ({"lengths": np.ones(2)}, TypeError, "lengths must be integers"),
        ({"data_format": "NCL"}, ValueError, "data_format"),
    ],
)
def test_errors_of_the_state_alone(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d_state(**{"x": X, "kernel_size": 4} | arguments)
