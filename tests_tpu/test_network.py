"""MobileNetV2 in bfloat16 with float32 parameters, compiled for TPUs of one and of many hosts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from workloads.mobilenet import FEW_STAGES, STAGES, MobileNetV2
from workloads.tpu.compiler import Figures, compile_for_tpu, make_mesh, shard_bytes
from workloads.tpu.network import CONSTRAINT, Program, forward, training_step

SIZE = 96
# Topology, mesh axes and stages: the whole network takes minutes to compile, so only once.
MESHES: dict[str, tuple[str, dict[str, int], Any]] = {
    "v5e 2x2, batch": ("v5e:2x2", {"batch": 4}, FEW_STAGES),
    "v5e 2x2, batch and channels": ("v5e:2x2", {"batch": 2, "channels": 2}, STAGES),
    "v5e 4x4, batch": ("v5e:4x4", {"batch": 16}, FEW_STAGES),
    "v5e 4x4, batch and channels": ("v5e:4x4", {"batch": 8, "channels": 2}, FEW_STAGES),
    "v5e 16x16 on 64 hosts, batch": ("v5e:16x16", {"batch": 256}, FEW_STAGES),
    "v5e 16x16 on 64 hosts, batch and channels": ("v5e:16x16", {"batch": 128, "channels": 2}, FEW_STAGES),
}
IMAGES_PER_SHARD = 8


@dataclass(frozen=True)
class Built:
    """A compiled program of the network, and what it was compiled from."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    depthwise: list[int]
    axes: dict[str, int]
    text: str
    compiled: Any
    figures: Figures


def build(program: Callable[..., Program], name: str, plain: bool = False, in_sharding: P | None = None) -> Built:
    topology, axes, stages = MESHES[name]
    mesh = make_mesh(topology, **axes)
    model = MobileNetV2(plain=plain, constraint=None if plain else CONSTRAINT, stages=stages, in_sharding=in_sharding)
    function, arguments = program(model, IMAGES_PER_SHARD * axes["batch"], SIZE, mesh)
    with jax.set_mesh(mesh):
        text, compiled, figures = compile_for_tpu(function, *arguments)
    leaves = jax.tree_util.tree_leaves_with_path(arguments[0]["params"])
    depthwise = [leaf.shape[-2] for path, leaf in leaves if path[-2].key.endswith("depthwise")]
    assert len(depthwise) == sum(blocks for _, _, blocks, _ in stages)
    return Built(function, arguments, depthwise, axes, text, compiled, figures)


@pytest.fixture(scope="module", params=MESHES)
def inference(request: pytest.FixtureRequest) -> Built:
    return build(forward, request.param)


@pytest.fixture(scope="module", params=MESHES)
def training(request: pytest.FixtureRequest) -> Built:
    return build(training_step, request.param)


def groups(text: str, kind: str) -> list[int]:
    """The sizes above one of the groups of all convolutions of a lowered program, in order of size."""
    return sorted(int(n) for n in re.findall(rf"{kind}_group_count = (\d+)", text) if int(n) > 1)


def activation_bytes(built: Built) -> int:
    """The bytes of all that the program computes, if all of it were kept, for each device, by its shapes."""
    jaxpr = jax.make_jaxpr(built.function)(*built.arguments)
    results = [v.aval for equation in jaxpr.eqns for v in equation.outvars]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in results) // built.axes["batch"]


def check(built: Built) -> None:
    # A sum over the wide channels for each projection, over the batch for each norm and gradient; never a gather.
    assert built.figures.collectives.keys() <= {"all-reduce"}
    # Each sum runs over one of the axes or, where it is over both, over all devices.
    assert built.figures.groups <= {*built.axes.values(), math.prod(built.axes.values())}
    assert "custom_call" not in built.text
    # The layouts pad to tiles of 8 by 128, which the few channels of a kernel of three by three feel most.
    own = shard_bytes(built.arguments)
    assert own <= built.figures.arguments <= 1.5 * own + 2**22
    assert built.figures.temporaries <= activation_bytes(built)


def test_inference(inference: Built) -> None:
    check(inference)
    assert groups(inference.text, "feature") == sorted(inference.depthwise)
    assert groups(inference.text, "batch") == []
    if "channels" not in inference.axes:
        assert inference.figures.collectives == {}
    logits = inference.compiled.output_shardings
    assert logits.shard_shape((8 * inference.axes["batch"], 1000)) == (8, 1000)


def test_training(training: Built) -> None:
    check(training)
    # The convolution and its gradient in x; the gradient in the kernel.
    assert groups(training.text, "feature") == sorted(2 * training.depthwise)
    assert groups(training.text, "batch") == sorted(training.depthwise)
    # The new variables and moments stay where the old ones are.
    state, moments, _ = training.compiled.output_shardings
    for old, new in (
        *zip(jax.tree.leaves(training.arguments[0]), jax.tree.leaves(state), strict=True),
        *zip(jax.tree.leaves(training.arguments[1]), jax.tree.leaves(moments), strict=True),
    ):
        assert new.is_equivalent_to(old.sharding, old.ndim), (old, new)


@pytest.mark.parametrize("program", [forward, training_step])
@pytest.mark.parametrize("name", MESHES)
def test_nothing_is_added_to_flax(name: str, program: Callable[..., Program]) -> None:
    # Over two axes plain Flax's gradient happens to be right, since both shard x. The layers have to be told that.
    two = "channels" in MESHES[name][1]
    own = build(program, name, in_sharding=P("batch", None, None, "channels") if two else None).figures
    expected = build(program, name, plain=True).figures
    assert own.collectives == expected.collectives
    assert own.groups == expected.groups
    for figure in ("cycles", "fusions", "copies", "arguments", "outputs", "temporaries"):
        assert getattr(own, figure) <= getattr(expected, figure), figure
