"""What the compiled and the lowered programs contain, read from their text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, depthwise_conv_transpose, explain, separable_conv
from depthwise_jax.drop_in import conv_general_dilated
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.cases import CORE, SMALL_NETWORKS, Case
from tests.support.compiling import AS_BY_DEFAULT
from tests.support.meshes import make_mesh

CONVOLUTION = re.compile(r"\bconvolution\b")


def compiled_text(f: Callable[..., Any], *operands: Any) -> str:
    return jax.jit(f).lower(*operands).compile(AS_BY_DEFAULT).as_text() or ""


def test_the_search_finds_a_convolution() -> None:
    case = CORE[2]
    assert CONVOLUTION.search(compiled_text(maps.value_and_gradients(case.conv("conv")), *case.operands()))


@pytest.mark.parametrize("case", [*CORE, SMALL_NETWORKS[1]], ids=str)
def test_taps_compile_to_no_convolution(case: Case) -> None:
    assert not CONVOLUTION.search(compiled_text(maps.value_and_gradients(case.conv("taps")), *case.operands()))


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_batched_taps_compile_to_no_convolution(case: Case) -> None:
    stacked = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in case.operands()]
    assert not CONVOLUTION.search(compiled_text(jax.vmap(maps.value_and_gradients(case.conv("taps"))), *stacked))


@pytest.mark.parametrize("case", [case for case in CORE if case.geometry.get("strides", 1) != 1], ids=str)
def test_strided_taps_keep_no_dilated_gradient(case: Case) -> None:
    x, w, g = case.operands()
    text = jax.jit(maps.dx(case.conv("taps"))).lower(x, w, g).as_text()
    assert "lhs_dilat" not in text
    # Nor one that is spelled as a pad: an interior of [.., 1, ..] is a dilation by another name.
    assert not re.search(r"interior = \[[^\]]*[1-9]", text)
    assert not re.search(r"interior = array<i64: [^>]*[1-9]", text)


def test_strided_dx_of_conv_is_a_dilation_so_the_search_works() -> None:
    case = CORE[2]
    x, w, g = case.operands()
    text = jax.jit(maps.dx(case.conv("conv"))).lower(x, w, g).as_text()
    assert "lhs_dilat" in text


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_conv_never_transposes(data_format: str) -> None:
    # The layout is in the dimension numbers.
    shape = (2, 6, 5, 3) if data_format == "channels_last" else (2, 3, 6, 5)
    case = Case("layout", shape, (3, 3, 3, 2), {"data_format": data_format})
    x, w, _ = case.operands()
    text = jax.jit(case.conv("conv")).lower(x, w).as_text()
    assert "transpose" not in text
    assert text.count("stablehlo.convolution") == 1


def test_the_pointwise_half_is_a_dot_general(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, _ = case.operands()
    p = case.draw((1, 1, 6, 4), 20)
    f = lambda x, w, p: separable_conv(x, w, p, **case.geometry, implementation=implementation)  # noqa: E731
    text = jax.jit(f).lower(x, w, p).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert text.count("stablehlo.convolution") == (1 if implementation == "conv" else 0)
    assert "dot_general" in str(jax.make_jaxpr(f)(x, w, p))


def test_the_gradients_of_the_pointwise_half_are_dot_generals() -> None:
    case = CORE[1]
    x, w, _ = case.operands()
    p = case.draw((1, 1, 6, 4), 20)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x, w, p: separable_conv(x, w, p).sum(), (0, 1, 2)))(x, w, p))
    assert "conv_general_dilated" not in jaxpr
    assert jaxpr.count("dot_general[") == 3


def test_dx_of_several_kernels_per_channel_stays_depthwise_under_conv() -> None:
    # A transposed convolution with M > 1 inputs per group is what all-gathers: here there are M of one each.
    case = CORE[1]
    x, w, g = case.operands()
    text = jax.jit(maps.dx(case.conv("conv"))).lower(x, w, g).as_text()
    assert text.count("stablehlo.convolution") == 2
    assert re.findall(r"feature_group_count = (\d+)", text) == ["3", "3"]


def test_the_chosen_program_is_the_explained_one() -> None:
    case = CORE[2]
    x, w, g = case.operands()
    explained = explain(x, w, **case.geometry, platform="cpu")
    lowerings = explained.forward.lowering, explained.input_grad.lowering, explained.kernel_grad.lowering
    for lowering, program in zip(lowerings, maps.maps(case.conv()).values(), strict=True):
        text = jax.jit(program).lower(x, w, g).as_text()
        assert bool(CONVOLUTION.search(text)) == (lowering == "conv")
        assert ("depthwise_jax." in text) == (lowering == "native")  # the handlers' names


def test_bias_and_activation_add_no_pass_over_the_output() -> None:
    # XLA fuses them into the loop that makes the convolution: one fusion, no more.
    case = CORE[0]
    x, w, _ = case.operands()
    text = compiled_text(case.conv("taps", activation="relu"), x, w, case.draw((3,), 20))
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r"= \S+ (?:fusion|maximum|add)\(", entry)) == 1, entry


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("slabs", [False, True])
def test_the_precision_arrives_in_every_convolution(slabs: bool, multiplier: int) -> None:
    # It matters on TPU alone. With slabs the kernel gradient is another convolution.
    case = Case("precision", (8, 6, 5, 3), (3, 3, 3, multiplier), {"padding": "same"})
    mesh = make_mesh(b=2, c=2)
    shardings = [NamedSharding(mesh, spec) for spec in (P("b"), P(), P("b"))] if slabs else None
    f = maps.value_and_gradients(case.conv("conv", precision="highest"))
    text = jax.jit(f, in_shardings=shardings).lower(*case.operands()).as_text()
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    assert len(convolutions) == 1 + 2 * multiplier
    assert bool(re.search(r"lhs_dilate = \[[^]]*[2-9]", text)) == slabs
    assert ("optimization_barrier" in text) == slabs  # keeps their reshape before an optimiser's arithmetic
    for convolution in convolutions:
        assert convolution.count("precision HIGHEST") == 2, convolution


def test_sharded_rows_are_moved_once_for_each_row_of_the_window() -> None:
    # Behind a barrier: XLA's CPU compiler would otherwise pad them again for each tap, in two more loops.
    case = Case("rows", (1, 8, 6, 4), (3, 3, 4, 1), {"padding": "same"})
    x, w, _ = case.operands()
    rows = NamedSharding(make_mesh(b=2), P(None, "b"))
    text = jax.jit(case.conv("taps"), in_shardings=(rows, None)).lower(x, w).as_text()
    assert text.count("optimization_barrier") == 3


def test_the_precision_arrives_in_the_pointwise_half() -> None:
    x, w, _ = CORE[1].operands()
    p = CORE[1].draw((1, 1, 6, 4), 20)
    f = lambda x, w, p: separable_conv(x, w, p, precision="highest")  # noqa: E731
    text = jax.jit(lambda *z: jax.value_and_grad(lambda *z: f(*z).sum(), (0, 1, 2))(*z)).lower(x, w, p).as_text()
    dots = re.findall(r"stablehlo\.dot_general.*", text)
    assert len([dot for dot in dots if "HIGHEST" in dot]) == len(dots) >= 3


IMAGES = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3, "precision": "highest"}
PRECISE: dict[str, Callable[..., Any]] = {
    "depthwise": lambda x, w: depthwise_conv(x, w, dilation_rate=2, precision="highest", implementation="conv"),
    "transposed": lambda x, w: depthwise_conv_transpose(x, w, strides=2, precision="highest", implementation="conv"),
    "drop-in": lambda x, w: conv_general_dilated(x, w.reshape(3, 3, 1, 6), (1, 1), "SAME", **IMAGES),
    "drop-in, transposed": lambda x, w: conv_general_dilated(
        x, w.reshape(3, 3, 1, 6), (1, 1), [(1, 2)] * 2, lhs_dilation=(2, 2), **IMAGES
    ),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("call", PRECISE)
def test_the_precision_arrives_in_every_product_of_a_platform(call: str, platform: str) -> None:
    # Copies of channels are products too, and exact at the highest precision alone.
    x, w = jax.ShapeDtypeStruct((8, 12, 11, 3), "float32"), jax.ShapeDtypeStruct((3, 3, 3, 2), "float32")
    program = jax.jit(jax.value_and_grad(lambda x, w: PRECISE[call](x, w).sum(), (0, 1)))
    text = program.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert len(products) >= 3
    for product in products:
        assert product.count("HIGHEST") == 2, product
