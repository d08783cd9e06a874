"""explain tells what a program is lowered to: real programs, on every platform, under all that is known of sharding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, explain, lowering
from depthwise_jax.lowering import choice, native
from depthwise_jax.lowering.call import Call
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import Case
from tests.support.meshes import make_mesh

COMPILED = native.status().instruction_set is not None
X, W = np.ones((4, 8, 6, 4), np.float32), np.ones((3, 3, 4, 1), np.float32)
OPTIONS: dict[str, Any] = {"padding": "same"}
BATCH, BOTH, ROWS = P("b"), P("b", None, None, "c"), P(None, "b")


def programs(options: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Each map alone, of x and kernel: y has the shape of x, which stands for its gradient."""

    def f(x: Any, w: Any) -> Any:
        return depthwise_conv(x, w, **OPTIONS, **options)

    input_grad, kernel_grad = (lambda x, w, map_=map_: map_(f)(x, w, x) for map_ in (maps.dx, maps.dw))
    return dict(zip(lowering.MAPS, (f, input_grad, kernel_grad), strict=True))


def lowered(text: str, direction: str) -> str:
    """The lowering of a map in the text of a program that holds no other."""
    if f"depthwise_jax.{direction}.v" in text:
        return "native"
    return "conv" if "stablehlo.convolution" in text else "taps"


def mesh_of(axis_type: AxisType | None, axes: int) -> Any:
    return None if axis_type is None else make_mesh(axis_type, **({"b": 2, "c": 2} if axes == 2 else {"b": 4}))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# The type of the mesh axes, their number, the sharding of x, and options.
PROGRAMS = {
    "one device": (None, 0, None, {}),
    "one automatic axis": (AUTO, 1, BATCH, {}),
    "one automatic axis that no type names": (AUTO, 1, None, {}),
    "two automatic axes": (AUTO, 2, BATCH, {}),
    "two automatic axes that no type names": (AUTO, 2, None, {}),
    "two automatic axes, rows": (AUTO, 2, ROWS, {}),
    "one explicit axis": (EXPLICIT, 1, BATCH, {}),
    "two explicit axes": (EXPLICIT, 2, BATCH, {}),
    "two explicit axes, all of them": (EXPLICIT, 2, BOTH, {}),
    "two explicit axes, rows": (EXPLICIT, 2, ROWS, {}),
    "in_sharding over all axes": (AUTO, 2, None, {"in_sharding": BOTH}),
    "in_sharding over some axes": (AUTO, 2, None, {"in_sharding": BATCH}),
    "in_sharding, rows": (AUTO, 2, None, {"in_sharding": ROWS}),
}


@pytest.mark.parametrize("platform", lowering.PLATFORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_lowered_as_explained(name: str, platform: str) -> None:
    axis_type, axes, spec, options = PROGRAMS[name]
    mesh = mesh_of(axis_type, axes)
    x, w = jnp.asarray(X), jnp.asarray(W)
    if spec is not None:
        x = jax.device_put(X, NamedSharding(mesh, spec))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        explained = explain(x, w, **OPTIONS, **options, platform=platform)
        for direction, f in programs(options).items():
            try:
                text = jax.jit(f).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
            except ValueError as error:
                pytest.fail(f"{direction}: explained as {explained}, but {error}")
            assert lowered(text, direction) == getattr(explained, direction).lowering, f"{direction}\n{explained}"


@pytest.mark.parametrize("platform", lowering.PLATFORMS)
@pytest.mark.parametrize(
    ("manual", "options"),
    [({"b", "c"}, {}), ({"b"}, {}), ({"b"}, {"in_sharding": P(None, None, None, "c")})],
    ids=["all axes", "some axes", "some axes, in_sharding"],
)
def test_inside_shard_map(manual: set[str], options: dict[str, Any], platform: str) -> None:
    mesh = mesh_of(AUTO, 2)
    found: dict[str, tuple[str, str]] = {}
    for direction, f in programs(options).items():
        explanations: list[Any] = []

        def local(x: Any, w: Any, f: Any = f, explanations: list[Any] = explanations) -> Any:
            explanations.append(explain(x, w, **OPTIONS, **options, platform=platform))
            return f(x, w)

        out = P() if direction == "kernel_grad" else BATCH
        spread = jax.shard_map(local, mesh=mesh, in_specs=(BATCH, P()), out_specs=out, axis_names=manual)
        with jax.set_mesh(mesh):
            text = jax.jit(spread).trace(X, W).lower(lowering_platforms=(platform,)).as_text()
        found[direction] = lowered(text, direction), getattr(explanations[0], direction).lowering
    assert all(actual == told for actual, told in found.values()), found


def test_an_exported_program_runs_without_this_package() -> None:
    f = jax.jit(programs({})["forward"])
    text = export.export(f, platforms=("cpu",))(X, W).mlir_module()
    assert lowered(text, "forward") == "taps"  # what explain tells of is a program that runs here


def test_a_gpu_by_the_name_of_the_default_backend() -> None:
    assert explain(X, W, platform="gpu") == explain(X, W, platform="cuda")


@pytest.mark.parametrize(("partitioned", "expected"), [(0, "conv"), (1, "conv"), (2, "taps")])
def test_a_number_of_mesh_axes_stands_for_a_mesh(partitioned: int, expected: str) -> None:
    assert explain(X, W, platform="cuda", partitioned=partitioned).kernel_grad.lowering == expected


# Calls on CUDA, and what serves forward, dx and dw. dx is a sum in float32, where few windows overlap.
CONV, SUM = "conv", "taps"
ON_CUDA: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], tuple[str, str, str]]] = [
    ((4, 8, 6, 4), (3, 3, 4, 1), {}, (CONV, CONV, CONV)),
    ((4, 8, 6, 4), (3, 3, 4, 1), {"dilation_rate": 2}, (CONV, CONV, CONV)),
    ((4, 8, 6, 4), (3, 3, 4, 2), {}, (CONV, CONV, CONV)),
    ((4, 8, 4), (4, 4, 1), {"padding": "causal"}, (CONV, CONV, CONV)),
    ((4, 8, 6, 4), (3, 3, 4, 1), {"strides": 2}, (CONV, SUM, CONV)),
    ((4, 4, 8, 6), (3, 3, 4, 1), {"strides": 2, "data_format": "channels_first"}, (CONV, SUM, CONV)),
    ((4, 8, 4), (5, 4, 1), {"strides": 2}, (CONV, SUM, CONV)),
    ((4, 8, 6, 4), (3, 3, 4, 1), {"strides": (1, 2)}, (CONV, CONV, CONV)),
    ((4, 8, 6, 4), (3, 3, 4, 2), {"strides": 2}, (CONV, CONV, CONV)),
    ((4, 8, 6, 4), (5, 5, 4, 1), {"strides": 2}, (CONV, CONV, CONV)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("x", "kernel", "geometry", "expected"), ON_CUDA, ids=str)
def test_what_serves_a_gpu_and_that_no_time_was_measured(
    x: tuple[int, ...], kernel: tuple[int, ...], geometry: dict[str, Any], expected: tuple[str, str, str], dtype: str
) -> None:
    shapes = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(kernel, dtype)
    geometry = {"padding": "same"} | geometry
    explained = explain(*shapes, **geometry, platform="cuda")
    choices = explained.forward, explained.input_grad, explained.kernel_grad
    assert tuple(chosen.lowering for chosen in choices) == (expected if dtype == "float32" else (CONV,) * 3)
    assert all("compiled for an H100; no time was measured on a GPU" in chosen.reason for chosen in choices)
    other = explain(*shapes, **geometry, platform="rocm")
    for chosen in (other.forward, other.input_grad, other.kernel_grad):
        assert chosen.lowering == CONV
        assert "nothing was measured or compiled" in chosen.reason


@pytest.mark.parametrize(("padding", "strides", "expected"), [(0, 1, SUM), (1, 1, CONV), (0, 2, CONV)])
def test_several_kernels_of_one_tap_are_a_product(padding: int, strides: int, expected: str) -> None:
    kernel = np.ones((1, 1, 4, 2), np.float32)
    assert explain(X, kernel, padding=padding, strides=strides, platform="cuda").forward.lowering == expected


@pytest.mark.parametrize(
    ("axis_type", "batch", "expected"),
    # Two devices can share a batch of 4 equally, but not one of 3; where types tell, they tell of whole rows.
    [(AUTO, 4, SUM), (AUTO, 3, CONV), (EXPLICIT, 4, SUM), (EXPLICIT, 3, SUM)],
)
def test_a_sum_on_a_gpu_needs_whole_rows(axis_type: AxisType, batch: int, expected: str) -> None:
    mesh = make_mesh(axis_type, c=2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, None, None, "c"))
        x = jax.ShapeDtypeStruct((batch, 8, 6, 4), jnp.float32, sharding=sharding)
        assert explain(x, W, strides=2, padding="same", platform="cuda").input_grad.lowering == expected


@pytest.mark.parametrize(
    ("images", "shape", "data_format", "expected"),
    [
        (4, (16, 16, 3), "channels_last", SUM),
        ("n", (16, 16, 3), "channels_last", CONV),  # they may be many
        (4, (3, 16, 16), "channels_first", CONV),
    ],
)
def test_a_sum_on_a_tpu_needs_a_known_few_images_with_their_channels_last(
    images: int | str, shape: tuple[int, ...], data_format: Any, expected: str
) -> None:
    (batch,) = export.symbolic_shape(images) if isinstance(images, str) else (images,)
    x, w = jax.ShapeDtypeStruct((batch, *shape), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 1), jnp.float32)
    explained = explain(x, w, **OPTIONS, data_format=data_format, platform="tpu")
    assert {explained.forward.lowering, explained.input_grad.lowering, explained.kernel_grad.lowering} == {expected}


# A lowering of one's own: a module with these functions, a name and a row.


def toy_lowering() -> Any:
    def forward(x: Any, kernel: Any, call: Call) -> Any:
        n = call.convolution.out[0]
        return jnp.sum(jnp.stack([x[..., t : t + n, :] * kernel[t, :, 0] for t in range(kernel.shape[0])]), axis=0)

    def input_grad(g: Any, kernel: Any, call: Call) -> Any:
        x = jnp.zeros((*g.shape[:-2], *call.convolution.spatial, g.shape[-1]), g.dtype)
        return jax.linear_transpose(lambda x: forward(x, kernel, call), x)(g)[0]

    def kernel_grad(x: Any, g: Any, call: Call) -> Any:
        kernel = jnp.zeros((*call.convolution.window.size, x.shape[-1], 1), x.dtype)
        return jax.linear_transpose(lambda kernel: forward(x, kernel, call), kernel)(g)[0]

    def refusal(call: Call) -> str | None:
        window = call.convolution.window
        plain = window.rank == 1 and window.strides == (1,) and window.padding == ((0, 0),) and window.dilation == (1,)
        return None if plain else "it knows plain rows only"

    functions = {"forward": forward, "input_grad": input_grad, "kernel_grad": kernel_grad}
    return SimpleNamespace(refusal=refusal, operand_dtype=lambda call: call.dtype, **functions)


def test_a_lowering_is_one_module_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.LOWERINGS, "toy", toy_lowering())
    monkeypatch.setattr(choice, "TABLE", [choice.Rule(("cpu",), "toy", "a row of one's own"), *choice.TABLE])
    case = Case("toy", (2, 9, 3), (4, 3, 1))
    x, w, g = case.operands()
    assert explain(x, w, platform="cpu").forward.reason == "a row of one's own"
    results = maps.value_and_gradients(case.conv("toy"))(x, w, jnp.asarray(g))
    for actual, (name, expected) in zip(results, maps.truth(case, x, w, g).items(), strict=True):
        assert_close(actual, expected, 1e-5, name)
    assert "not toy: it knows plain rows only" in explain(x, w, platform="cpu", strides=2).forward.reason
    with pytest.raises(ValueError, match=r"'toy' cannot compute .* plain rows only"):
        case.conv("toy")(jnp.ones((1, 9, 9, 3)), jnp.ones((2, 2, 3, 1)))
