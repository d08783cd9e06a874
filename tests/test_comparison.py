"""The README's table of features beside Keras, Flax and PyTorch: what its cells say is tried."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import depthwise_jax
import depthwise_jax.optim
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import Case
from tests.support.meshes import make_mesh

README = Path(__file__).parent.parent / "README.md"
LIBRARIES = ("here", "Keras", "Flax", "PyTorch")
CHANNELS = 4

# What each library's depthwise layer over two axes makes of x (*batch, 9, 9, CHANNELS); its arguments are ours.
Layer = Callable[..., Any]


def here(x: np.ndarray, rank: int = 2, **arguments: Any) -> Any:
    layer = getattr(depthwise_jax, f"DepthwiseConv{rank}D")(3, **arguments)
    return layer.init_with_output(jax.random.key(0), x)[0]


def keras_layer(x: np.ndarray, rank: int = 2, **arguments: Any) -> Any:
    return getattr(keras.layers, f"DepthwiseConv{rank}D")(3, **arguments)(x)


def flax_layer(x: np.ndarray, rank: int = 2, **arguments: Any) -> Any:
    names = {"strides": "strides", "padding": "padding", "dilation_rate": "kernel_dilation"}
    given: dict[str, Any] = {
        names[name]: value.upper() if isinstance(value, str) else value for name, value in arguments.items()
    }
    conv = nn.Conv(CHANNELS, (3,) * rank, feature_group_count=CHANNELS, **given)
    return conv.init_with_output(jax.random.key(0), x)[0]


def torch_layer(x: np.ndarray, rank: int = 2, padding: Any = 0, **arguments: Any) -> Any:
    torch: Any = pytest.importorskip("torch")
    names = {"strides": "stride", "dilation_rate": "dilation"}
    given = {names[name]: value for name, value in arguments.items()}
    if padding in ("reflect", "circular", "edge", "causal"):
        given |= {"padding": 1, "padding_mode": "replicate" if padding == "edge" else padding}
    else:
        given["padding"] = padding
    conv = getattr(torch.nn, f"Conv{rank}d")(CHANNELS, CHANNELS, 3, groups=CHANNELS, **given)
    return conv(torch.from_numpy(np.moveaxis(x, -1, x.ndim - rank - 1).copy()))


LAYERS: dict[str, Layer] = {"here": here, "Keras": keras_layer, "Flax": flax_layer, "PyTorch": torch_layer}


def table() -> dict[str, dict[str, str]]:
    """The table's cells by row and library."""
    text = README.read_text().split("## Comparison\n")[1].split("\n(1)")[0]
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line.strip()]
    assert [heading.split()[0] for heading in rows[0][-4:]] == list(LIBRARIES)
    return {row[0]: dict(zip(LIBRARIES, row[1:], strict=True)) for row in rows[2:]}


def image(*batch: int, rank: int = 2, dtype: str = "float32") -> np.ndarray:
    return np.ones((*batch, *(9,) * rank, CHANNELS), dtype)


def works(layer: Layer, *args: Any, **arguments: Any) -> bool:
    try:
        layer(*args, **arguments)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("library", LIBRARIES)
def test_shapes(library: str) -> None:
    cells, layer = {row: cell[library] for row, cell in table().items()}, LAYERS[library]
    ranks = {rank for rank in (1, 2, 3) if works(layer, image(1, rank=rank), rank=rank)}
    assert ranks == {"1 to 3": {1, 2, 3}, "any": {1, 2, 3}, "1, 2": {1, 2}}[cells["spatial axes of a depthwise layer"]]
    leading = {count for count in (0, 1, 2) if works(layer, image(*(1,) * count))}
    meaning = {"any": {0, 1, 2}, "one": {1}, "none or one": {0, 1}}
    assert leading == meaning[cells["leading batch axes"]]
    assert works(layer, image(1, dtype="int32")) == (cells["integer input"] == "yes")


@pytest.mark.parametrize("library", LIBRARIES)
def test_paddings(library: str) -> None:
    cells, layer = {row: cell[library] for row, cell in table().items()}, LAYERS[library]
    assert works(layer, image(1), padding="valid")
    assert works(layer, image(1), padding="same")
    assert works(layer, image(1), padding="same", strides=2) == (cells["same padding with strides"] == "yes")
    others = {"integer": 1, "pairs": ((1, 0), (2, 1)), "causal": "causal", "reflect": "reflect"}
    others |= {"circular": "circular", "edge": "edge"}
    named = cells["padding, besides valid and same"]
    found = [name for name, p in others.items() if works(layer, image(1, rank=1 if name == "causal" else 2), **_1d(p))]
    assert ", ".join(found) == named.replace("none", "")


def _1d(padding: Any) -> dict[str, Any]:
    return {"padding": padding, "rank": 1} if padding == "causal" else {"padding": padding}


@pytest.mark.parametrize("library", LIBRARIES)
def test_strides_with_dilation(library: str) -> None:
    cell = table()["strides with dilation"][library]
    assert works(LAYERS[library], image(1), strides=2, dilation_rate=2) == (cell == "yes")


def test_fans() -> None:
    cells, channels = table()["fan-in of the default initializer"], 256
    window, everything = math.sqrt(1 / 9), math.sqrt(2 / (9 * channels + 9))
    x = np.ones((1, 3, 3, channels), np.float32)

    def deviation(kernel: Any) -> float:
        return float(np.asarray(kernel).std())

    def close(kernel: Any, expected: float) -> bool:
        return abs(deviation(kernel) / expected - 1) < 0.1

    theirs = keras.layers.DepthwiseConv2D(3)
    theirs.build(x.shape)
    assert cells["Keras"] == "all channels"
    assert close(theirs.kernel.value, everything)
    conv = nn.Conv(channels, (3, 3), feature_group_count=channels)
    assert cells["Flax"] == "window"
    assert close(conv.init(jax.random.key(0), x)["params"]["kernel"], window)
    layer = depthwise_jax.DepthwiseConv2D(3)
    assert cells["here"].startswith("as Keras")
    assert close(layer.init(jax.random.key(0), x)["params"]["kernel"], everything)
    right = depthwise_jax.initializers.LecunNormal(fan="window")
    layer = depthwise_jax.DepthwiseConv2D(3, depthwise_initializer=right)
    assert close(layer.init(jax.random.key(0), x)["params"]["kernel"], window)
    assert cells["PyTorch"] == "window"
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")
        assert close(torch.nn.Conv2d(channels, channels, 3, groups=channels).weight.detach(), math.sqrt(1 / 27))


def test_arguments() -> None:
    rows = table()
    row = rows["activation, regularizers and constraints as arguments"]
    assert [row[library] for library in LIBRARIES] == ["yes", "yes", "no", "no"]
    arguments: dict[str, Any] = {
        "activation": "relu",
        "depthwise_regularizer": "l2",
        "depthwise_constraint": "max_norm",
    }
    depthwise_jax.DepthwiseConv2D(3, **arguments)
    keras.layers.DepthwiseConv2D(3, **arguments)
    fields = set(nn.Conv.__dataclass_fields__)
    assert not [name for name in fields if any(word in name for word in ("activation", "regularizer", "constraint"))]
    separable = rows["spatial axes of a separable layer"]
    for library, module in (("here", depthwise_jax), ("Keras", keras.layers)):
        found = [str(rank) for rank in (1, 2, 3) if hasattr(module, f"SeparableConv{rank}D")]
        assert separable[library] == {"1, 2, 3": "1 to 3"}.get(", ".join(found), ", ".join(found))


def test_channels_first() -> None:
    cells = table()["channels first"]
    x = np.ones((1, CHANNELS, 9, 11), np.float32)
    assert [cells[library] for library in LIBRARIES] == ["yes", "yes", "no", "always"]
    ours = depthwise_jax.DepthwiseConv2D(3, data_format="channels_first")
    assert ours.init_with_output(jax.random.key(0), x)[0].shape == (1, CHANNELS, 7, 9)
    assert keras.layers.DepthwiseConv2D(3, data_format="channels_first")(x).shape == (1, CHANNELS, 7, 9)
    assert not [name for name in nn.Conv.__dataclass_fields__ if "format" in name or "dimension" in name]
    assert torch_layer(image(1)).shape[1] == CHANNELS


def test_configurations() -> None:
    row = table()["Keras' configurations"]
    assert [row[library] for library in LIBRARIES] == ["yes", "yes", "no", "no"]
    config = keras.layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu", name="dw").get_config()
    ours = depthwise_jax.DepthwiseConv2D.from_config(config)
    assert (ours.kernel_size, ours.strides, ours.padding, ours.name) == ((3, 3), (2, 2), "same", "dw")
    assert keras.layers.DepthwiseConv2D.from_config(ours.get_config()).get_config() == config
    assert not hasattr(nn.Conv, "from_config")


def test_feasible_weights() -> None:
    row, average = table()["weights feasible after each update"], table()["and after an average of weights"]
    assert [row[library] for library in LIBRARIES] == ["yes", "yes", "no", "no"]
    assert [average[library] for library in LIBRARIES] == ["`project_params`", "no", "no", "no"]
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(2, 3, 3, CHANNELS, 1)).astype(np.float32)
    layer = depthwise_jax.DepthwiseConv2D(3, use_bias=False, depthwise_constraint="unit_norm")
    theirs = keras.layers.DepthwiseConv2D(3, use_bias=False, depthwise_constraint="unit_norm")
    theirs.build(image(1).shape)
    constraints = depthwise_jax.optim.constraints_of(layer, image(1))
    transform = optax.chain(optax.sgd(1.0), depthwise_jax.optim.project(constraints))
    params: Any = layer.init(jax.random.key(0), image(1))["params"]
    ours, others = [], []
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    for step in steps:
        updates, _ = transform.update({"kernel": jnp.asarray(step)}, transform.init(params), params)
        params = optax.apply_updates(params, updates)
        ours.append(params)
        optimizer.apply([step], [theirs.kernel])
        others.append(np.asarray(theirs.kernel.value))

    def norms(kernel: Any) -> np.ndarray:
        return np.sqrt(np.sum(np.asarray(kernel, np.float64) ** 2, axis=0))

    for kernel in (*(params["kernel"] for params in ours), *others):
        np.testing.assert_allclose(norms(kernel), 1, atol=1e-5)
    mean = jax.tree.map(lambda *kernels: sum(kernels) / len(kernels), *ours)
    assert norms(mean["kernel"]).min() < 0.99
    projected: Any = depthwise_jax.optim.project_params(mean, constraints)
    np.testing.assert_allclose(norms(projected["kernel"]), 1, atol=1e-5)
    optimizer.finalize_variable_values([theirs.kernel])  # the average, as after fit
    assert norms(theirs.kernel.value).min() < 0.99


def test_kernel_gradient_on_a_mesh() -> None:
    row = table()["kernel gradient on a mesh of several axes"]
    assert [row[library] for library in LIBRARIES] == ["right", "too large (1)", "too large (1)", "not JAX"]
    mesh = make_mesh(b=2, c=2)
    case = Case("mesh", (4, 9, 9, CHANNELS), (3, 3, CHANNELS, 1), {"padding": "same"})
    x, w, g = case.operands()
    truth = case.oracle.kernel_grad(x, g)
    x, g = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("b"))) for a in (x, g))

    def of_lax(x: Any, w: Any) -> Any:
        w, names = w.reshape(3, 3, 1, CHANNELS), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=CHANNELS)

    right, too_large = (jax.jit(maps.dw(f))(x, w, g) for f in (case.conv(), of_lax))
    assert_close(right, truth, 1e-5)
    assert_close(too_large, 2 * truth, 1e-5)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert "://" in target or (README.parent / target).exists(), target
