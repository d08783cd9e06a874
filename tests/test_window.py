"""The window's shape arithmetic against counting, and its errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from jax import export, lax

from depthwise_jax._core.window import Window, resolve
from tests.support.oracle import Oracle
from workloads.workload import EmptyOutputError


def placements(n: int, k: int, s: int, d: int, low: int, high: int) -> int:
    """How many windows fit, by trying every start."""
    return sum(start + (k - 1) * d < n + low + high for start in range(0, n + low + high, s))


@pytest.mark.parametrize("n", range(7))
def test_output_shape_counts_placements(n: int) -> None:
    for k, s, d, low, high in itertools.product((1, 2, 3), (1, 2, 5), (1, 3), (0, 2), (0, 1)):
        expected = placements(n, k, s, d, low, high)
        window = Window((k,), (s,), ((low, high),), (d,))
        if expected == 0:
            with pytest.raises(ValueError, match="empty"):
                window.output_shape((n,))
        else:
            assert window.output_shape((n,)) == (expected,)


def reads(n: int, window: Window) -> set[tuple[int, int, int]]:
    """Along one axis, every (output, tap, input position) inside the input."""
    (out,), (k,), (s,), (d,), ((low, _),) = (
        window.output_shape((n,)),
        window.size,
        window.strides,
        window.dilation,
        window.padding,
    )
    positions = ((o, t, o * s + t * d - low) for o in range(out) for t in range(k))
    return {(o, t, p) for o, t, p in positions if 0 <= p < n}


def test_same_pads_as_lax() -> None:
    for n, k, s, d in itertools.product(range(1, 9), range(1, 6), range(1, 5), range(1, 4)):
        window, _ = resolve((n,), k, s, "same", d)
        ((low, high),) = lax.padtype_to_pads((n,), ((k - 1) * d + 1,), (s,), "SAME")
        assert reads(n, window) == reads(n, Window((k,), (s,), ((low, high),), (d,))), (n, k, s, d)
        if s <= n + (k - 1) * d and d <= n:  # larger ones are replaced
            assert window.padding == ((low, high),), (n, k, s, d)
        assert window.output_shape((n,)) == (-(-n // s),)


@pytest.mark.parametrize(
    ("n", "k", "s", "pads"),
    [
        (10, 3, 2, (0, 1)),
        (10, 2, 1, (0, 1)),
        (10, 4, 3, (1, 2)),
        (7, 3, 2, (1, 1)),
        (2, 5, 1, (2, 2)),
        (3, 1, 2, (0, 0)),
        (10, 3, 4, (0, 1)),
    ],
)
def test_same_puts_the_odd_zero_at_the_end(n: int, k: int, s: int, pads: tuple[int, int]) -> None:
    assert resolve((n,), k, s, "same", 1)[0].padding == (pads,)


def test_causal_never_reads_ahead() -> None:
    window, _ = resolve((9,), 4, 1, "causal", 2)
    assert window.padding == ((6, 0),)
    assert window.output_shape((9,)) == (9,)


@pytest.mark.parametrize(("name", "mode"), [("reflect", "reflect"), ("circular", "wrap"), ("edge", "edge")])
def test_paddings_that_read_the_input_again(name: str, mode: Any) -> None:
    window, before = resolve((7, 6), (3, 4), (2, 1), name, (2, 1))
    assert window.padding == ((0, 0), (0, 0))
    assert before is not None
    assert before.mode == mode
    assert before.amounts == ((2, 2), (1, 2))
    # NumPy's modes of these names mean the same as the oracle's index arithmetic.
    a = np.arange(5.0)
    for k in (1, 2, 3, 6, 9):
        oracle = Oracle((5, 1), (k, 1, 1), padding=name)
        low, high = (k - 1) // 2, k // 2
        read = [oracle._inside(p, 5) for p in range(-low, 5 + high)]
        np.testing.assert_array_equal(np.pad(a, (low, high), mode=mode), read)


def test_scalars_hold_for_all_axes() -> None:
    assert resolve((5, 6, 7), 2, 3, 1, 1)[0] == Window((2, 2, 2), (3, 3, 3), ((1, 1),) * 3, (1, 1, 1))
    assert resolve((5, 6), (2, 3), (1, 2), ((0, 1), (2, 3)), [1, 1])[0] == Window(
        (2, 3), (1, 2), ((0, 1), (2, 3)), (1, 1)
    )


def test_numpy_integers_are_integers() -> None:
    window, _ = resolve((5,), np.int64(2), np.array([2]), np.int32(1), (np.uint8(1),))
    assert window == resolve((5,), 2, 2, 1, 1)[0]
    assert all(type(v) is int for v in (*window.size, *window.strides, *window.dilation, *window.padding[0]))


def test_equal_windows_are_one_key() -> None:
    a, b = resolve((5, 5), [3, 3], 1, "SAME", 1)[0], resolve((5, 5), 3, (1, 1), "same", [1, 1])[0]
    assert a == b
    assert hash(a) == hash(b)


def test_a_window_is_frozen() -> None:
    window: Any = resolve((5,), 3, 1, "valid", 1)[0]
    with pytest.raises(AttributeError):
        window.size = (2,)


@pytest.mark.parametrize(
    ("spatial", "kernel_size", "padding"),
    [
        ((2,), 3, "valid"),
        ((5, 2), (3, 3), "valid"),
        ((0,), 1, "valid"),
        ((0,), 3, "same"),
        ((0,), 3, "reflect"),
        ((0,), 2, "circular"),
        ((0,), 2, "edge"),
        ((1,), 4, 1),
    ],
)
def test_an_empty_output_is_refused(spatial: Any, kernel_size: Any, padding: Any) -> None:
    with pytest.raises(EmptyOutputError):
        Oracle((*spatial, 1), (*np.broadcast_to(kernel_size, len(spatial)).tolist(), 1, 1), padding=padding)
    with pytest.raises(ValueError, match=r"empty|needs an input") as error:
        resolve(spatial, kernel_size, 1, padding, 1)
    assert str(spatial) in str(error.value)


def test_no_stride_or_dilation_is_larger_than_need_be() -> None:
    # Steps of every order of magnitude, and paddings so that outputs and taps meet the input, or just miss it.
    r = np.random.default_rng(0)
    steps = (1, 2, 3, 7, 20, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**70)
    largest = 0
    for n, s, d in itertools.product((0, 1, 2, 5, 9), steps, steps):
        for _ in range(12):
            k = int(r.integers(1, 5))
            extent = (k - 1) * d + 1
            low = max(0, int(r.integers(0, 4)) * s + int(r.integers(0, k)) * d + int(r.integers(-n - 2, n + 3)))
            high = max(0, extent + int(r.integers(0, 4)) * s + int(r.integers(-2, 3)) - n - low)
            given = Window((k,), (s,), ((low, high),), (d,))
            if n + low + high < extent:
                continue
            window, _ = resolve((n,), k, s, ((low, high),), d)
            assert window.output_shape((n,)) == given.output_shape((n,)), given
            assert reads(n, window) == reads(n, given), (n, given, window)
            assert min(window.padding[0]) >= 0, (n, given, window)
            if min(s, d) <= 20 and max(s, d) >= 2**31:
                largest = max(largest, *window.strides, *window.dilation)
            if max(s, d) <= n:
                assert window == given
    assert 20 < largest < 1000


@pytest.mark.parametrize("padding", ["same", "valid", "causal", "reflect", "circular", "edge", 5])
def test_large_numbers_by_name_of_padding(padding: Any) -> None:
    for k, s, d in ((3, 2**33, 1), (1, 2**33, 2**40), (3, 1, 2**33), (3, 2**33, 2**33)):
        try:
            oracle = Oracle((12, 1), (k, 1, 1), strides=s, dilation_rate=d, padding=padding)
        except EmptyOutputError:
            with pytest.raises(ValueError, match="empty"):
                resolve((12,), k, s, padding, d)
            continue
        window, again = resolve((12,), k, s, padding, d)
        if again is None:
            assert window.output_shape((12,)) == oracle.out
            assert window.strides[0] < 2**31 or d > 2**31
            assert window.dilation[0] < 100


def test_an_axis_after_one_of_symbolic_size_is_as_it_is_alone() -> None:
    rows: Any = export.symbolic_shape("rows")[0]
    window, alone = resolve((rows, 12), 3, (1, 2**33), 1, 1)[0], resolve((12,), 3, 2**33, 1, 1)[0]
    assert (window.strides[1:], window.padding[1:]) == (alone.strides, alone.padding)
    assert alone.strides[0] < 2**31
