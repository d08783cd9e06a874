"""Which formulation each kind of call gets on TPU, read from the lowered programs of one device."""

from __future__ import annotations

import jax
import pytest

from benchmarks.tpu_floor import DTYPES, Case
from benchmarks.tpu_schedule import lower
from depthwise_jax.lowering import DIRECTIONS

SUM, CONVOLUTION = "sum", "convolution"
# A case, and what its forward pass, dx and dw are in bfloat16.
CASES = [
    (Case((8, 256, 256), (4,)), (SUM, SUM, SUM)),
    (Case((32, 256, 256), (8,)), (SUM, SUM, SUM)),
    (Case((8, 256, 256), (9,)), (CONVOLUTION, SUM, SUM)),
    (Case((8, 256, 256), (10,)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((8, 256, 256), (16,)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((8, 256, 256), (17,)), (CONVOLUTION,) * 3),
    (Case((4, 256, 256), (16,)), (SUM, SUM, SUM)),
    (Case((4, 256, 256), (17,)), (CONVOLUTION,) * 3),
    (Case((8, 256, 256), (4,), dilation=2), (SUM, SUM, SUM)),
    (Case((8, 256, 256), (4,), stride=2), (CONVOLUTION,) * 3),
    # Images of a width that a register's rows divide lie along their width, and so does an odd number of them.
    (Case((4, 56, 56, 256), (3, 3)), (SUM, SUM, SUM)),
    (Case((2, 56, 56, 128), (3, 3)), (SUM, SUM, SUM)),
    (Case((5, 16, 16, 128), (3, 3)), (SUM, SUM, SUM)),
    (Case((6, 16, 16, 128), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((1, 28, 28, 256), (3, 3)), (SUM, SUM, SUM)),
    (Case((3, 28, 28, 64), (3, 3)), (SUM, SUM, SUM)),
    (Case((3, 7, 7, 1024), (3, 3)), (SUM, SUM, SUM)),
    (Case((5, 14, 14, 512), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((7, 14, 14, 512), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((7, 7, 7, 1024), (3, 3)), (SUM, SUM, CONVOLUTION)),
    # An even number of other images lies side by side.
    (Case((2, 20, 20, 128), (3, 3)), (CONVOLUTION,) * 3),
    (Case((4, 7, 7, 1024), (3, 3)), (CONVOLUTION,) * 3),
    (Case((6, 7, 7, 1024), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((2, 28, 28, 128), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((4, 28, 28, 128), (3, 3)), (SUM, SUM, CONVOLUTION)),
    # XLA's own kernel gradient is slow here.
    (Case((5, 28, 28, 256), (3, 3)), (SUM, SUM, SUM)),
    (Case((6, 28, 28, 256), (3, 3)), (SUM, SUM, SUM)),
    (Case((6, 28, 28, 512), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((7, 56, 56, 128), (3, 3)), (SUM, SUM, SUM)),
    (Case((7, 48, 48, 128), (3, 3)), (SUM, SUM, CONVOLUTION)),
    (Case((8, 56, 56, 128), (3, 3)), (CONVOLUTION,) * 3),
    (Case((8, 28, 28, 128), (3, 3)), (CONVOLUTION,) * 3),
    # Larger windows.
    (Case((1, 28, 28, 128), (5, 5)), (SUM, SUM, SUM)),
    (Case((5, 14, 14, 512), (5, 5)), (SUM, SUM, CONVOLUTION)),
    (Case((7, 14, 14, 512), (5, 5)), (CONVOLUTION,) * 3),
    (Case((1, 56, 56, 128), (5, 5)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((2, 28, 28, 128), (5, 5)), (CONVOLUTION,) * 3),
    (Case((4, 28, 28, 128), (5, 5)), (CONVOLUTION,) * 3),
    (Case((4, 56, 56, 128), (5, 5)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((7, 56, 56, 128), (5, 5)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((1, 28, 28, 128), (7, 7)), (SUM, SUM, SUM)),
    (Case((1, 56, 56, 128), (7, 7)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((3, 14, 14, 512), (7, 7)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((4, 28, 28, 128), (7, 7)), (CONVOLUTION,) * 3),
    (Case((1, 28, 28, 128), (8, 8)), (CONVOLUTION,) * 3),
    (Case((1, 8, 28, 28, 128), (3, 3, 3)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((2, 8, 56, 56, 64), (3, 3, 3)), (CONVOLUTION, CONVOLUTION, SUM)),
    (Case((4, 8, 56, 56, 64), (3, 3, 3)), (CONVOLUTION,) * 3),
    # Several kernels per channel, and strides.
    (Case((4, 28, 28, 128), (3, 3), multiplier=2), (CONVOLUTION,) * 3),
    (Case((4, 28, 28, 64), (3, 3), multiplier=4), (CONVOLUTION,) * 3),
    (Case((4, 28, 28, 128), (3, 3), stride=2), (CONVOLUTION,) * 3),
]
# The cases that are something else in float32: there a convolution of sequences moves more bytes, and images are not
# widened before they are read.
WIDE: dict[Case, tuple[str, ...]] = {
    **{case: (SUM,) * 3 for case, _ in CASES if len(case.window) == case.stride == 1 and case.window[0] <= 16},
    Case((1, 28, 28, 128), (5, 5)): (CONVOLUTION, CONVOLUTION, SUM),
    Case((1, 28, 28, 128), (7, 7)): (CONVOLUTION, CONVOLUTION, SUM),
    Case((5, 14, 14, 512), (5, 5)): (CONVOLUTION,) * 3,
    Case((5, 28, 28, 256), (3, 3)): (SUM, SUM, CONVOLUTION),
    Case((6, 28, 28, 256), (3, 3)): (SUM, SUM, CONVOLUTION),
    Case((7, 56, 56, 128), (3, 3)): (SUM, SUM, CONVOLUTION),
    Case((7, 56, 56, 128), (5, 5)): (CONVOLUTION,) * 3,
}


def text_of(case: Case, direction: str, dtype: str = "bfloat16") -> str:
    function, shapes = case.task(direction, dtype, "ours")
    return lower(function, *shapes).as_text()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "expected"), CASES, ids=str)
def test_formulation(case: Case, expected: tuple[str, ...], dtype: str) -> None:
    expected = WIDE.get(case, expected) if dtype == "float32" else expected
    for direction, formulation in zip(DIRECTIONS, expected, strict=True):
        convolutions = text_of(case, direction, dtype).count("stablehlo.convolution")
        assert (convolutions == 0) == (formulation == SUM), direction


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_kernels_per_channel_are_one_convolution_and_a_product_by_blocks(direction: str) -> None:
    text = text_of(Case((4, 28, 28, 256), (3, 3), multiplier=2), direction)
    assert text.count("stablehlo.convolution") == 1
    assert text.count("stablehlo.dot_general") == 1
    assert "tensor<128x256xbf16>" in text


def test_an_output_is_kept_only_where_it_is_differentiated() -> None:
    case = Case((8, 256, 256), (4,))
    assert "optimization_barrier" not in text_of(case, "forward")
    x, kernel, g = case.shapes("bfloat16")

    def step(x: jax.Array, kernel: jax.Array, g: jax.Array) -> object:
        y, vjp = jax.vjp(lambda x, kernel: case.convolve("ours", x, kernel), x, kernel)
        return y, vjp(g)

    assert lower(step, x, kernel, g).as_text().count("optimization_barrier") == 1
    image = Case((32, 28, 28, 128), (3, 3))
    gradients = lower(
        lambda x, kernel, g: jax.vjp(lambda *a: image.convolve("ours", *a), x, kernel)[1](g), x, kernel, g
    )
    assert "optimization_barrier" not in gradients.as_text()


@pytest.mark.parametrize(("window", "barriers"), [(6, 0), (7, 1)])
def test_both_gradients_are_kept_apart_above_six_taps(window: int, barriers: int) -> None:
    assert text_of(Case((8, 256, 256), (window,)), "dx+dw").count("optimization_barrier") == barriers


@pytest.mark.parametrize(
    ("case", "dtype", "stored"),
    [
        (Case((4, 56, 56, 128), (3, 3)), "bfloat16", "4x58x58x128xf32"),
        (Case((4, 56, 56, 128), (3, 3)), "float32", None),
        (Case((4, 14, 14, 512), (3, 3)), "bfloat16", None),
        (Case((5, 14, 14, 512), (3, 3)), "bfloat16", "5x16x16x512xf32"),
        (Case((2, 224, 224, 128), (3, 3)), "bfloat16", None),
    ],
    ids=str,
)
def test_a_few_narrow_images_are_widened_once(case: Case, dtype: str, stored: str | None) -> None:
    barriers = [line for line in text_of(case, "forward", dtype).splitlines() if "optimization_barrier" in line]
    assert [line.split("tensor<")[1].split(">")[0] for line in barriers] == ([stored] if stored else [])
