"""Single layers compiled for a TPU, beside lax's: the same convolutions, no more of anything, no gather."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jax.sharding import Mesh

from depthwise_jax.lowering import DIRECTIONS
from workloads.tpu.compiler import make_mesh
from workloads.tpu.layers import EXPECTED, LAYERS, Layer, compile_layer, ours, plain, told


@pytest.fixture(scope="module")
def one_axis() -> Mesh:
    return make_mesh("v5e:2x2", batch=4)


@pytest.fixture(scope="module")
def two_axes() -> Mesh:
    return make_mesh("v5e:2x2", batch=2, channels=2)


def check_convolutions(text: str, layer: Layer, direction: str) -> None:
    """Grouped convolutions alone: no taps, which are products, and no custom call."""
    features, batches = (1, layer.channels) if direction == "dw" else (layer.channels, 1)
    count = 1 if direction == "forward" else layer.multiplier
    assert text.count("stablehlo.convolution") == count
    assert re.findall(r"feature_group_count = (\d+)", text) == [str(features)] * count
    assert re.findall(r"batch_group_count = (\d+)", text) == [str(batches)] * count
    assert "stablehlo.multiply" not in text
    assert "custom_call" not in text


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_nothing_is_added_to_lax(layer: Layer, direction: str, axes: int, one_axis: Mesh, two_axes: Mesh) -> None:
    # Over two axes lax's gradient is right where both shard x, which the layer has to be told.
    where: tuple[Any, ...] = (one_axis,) if axes == 1 else (two_axes, "channels")
    text, figures = compile_layer(layer, direction, ours if axes == 1 else told, *where)
    check_convolutions(text, layer, direction)
    assert figures.collectives == EXPECTED[direction]
    _, expected = compile_layer(layer, direction, plain, *where)
    # In a program of its own the gradient's new layout takes a few cycles more; in a network there is none.
    slack = 1.005 if (axes, direction) == (2, "dw") else 1
    assert figures.cycles <= slack * expected.cycles
    # With several kernels per channel a gradient is as many convolutions, where lax's own takes many times as long.
    if direction == "forward" or layer.multiplier == 1:
        assert figures.fusions <= expected.fusions
        assert figures.copies <= expected.copies
    assert figures.temporaries <= expected.temporaries
    assert figures.arguments <= expected.arguments
    assert figures.outputs <= expected.outputs


@pytest.mark.parametrize("channels", [None, "channels"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[-1]], ids=str)
def test_two_mesh_axes(layer: Layer, direction: str, channels: str | None, two_axes: Mesh) -> None:
    text, figures = compile_layer(layer, direction, ours, two_axes, channels)
    check_convolutions(text, layer, direction)
    assert figures.collectives == EXPECTED[direction]
    if direction == "dw":
        # Over the axis that shards the batch, and no other: else the sum counts replicas more than once.
        assert figures.groups == {2}


def test_the_kernel_gradient_of_lax_counts_replicas(two_axes: Mesh) -> None:
    # What the one above would not pass, and why there is more than lax's convolution.
    _, figures = compile_layer(LAYERS[0], "dw", plain, two_axes)
    assert figures.groups == {4}


@pytest.mark.parametrize("channels", [None, "channels"])
@pytest.mark.parametrize("layer", LAYERS[:5], ids=str)
def test_the_kernel_gradient_on_two_mesh_axes_costs_a_tenth_more_at_most(
    layer: Layer, channels: str | None, two_axes: Mesh
) -> None:
    _, figures = compile_layer(layer, "dw", ours, two_axes, channels)
    _, expected = compile_layer(layer, "dw", plain, two_axes, channels)
    assert figures.cycles <= 1.1 * expected.cycles
    assert figures.copies == 0
    assert figures.temporaries <= expected.temporaries
