"""Models as their libraries have them, random weights: every depthwise layer's output beside its own library's.

Marked "models": `make test-models` runs them all, the ordinary suite the smallest.
"""

import contextlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthwise_jax.interop.keras import SavedLayer, from_keras, layers_from_keras, read_weights
from depthwise_jax.interop.torch import layers_from_torch, params_from_state_dict
from workloads.keras_reference import keras

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
]
slow = pytest.mark.models

# Models of keras.applications: their arguments, and how many depthwise and separable layers they have.
KERAS: dict[str, tuple[dict[str, Any], int]] = {
    "MobileNet": ({"alpha": 0.25}, 13),
    "MobileNetV2": ({}, 17),
    "MobileNetV3Small": ({}, 11),
    "EfficientNetB0": ({}, 16),
    "EfficientNetV2B0": ({}, 16),
    "NASNetMobile": ({}, 160),
    "Xception": ({"input_shape": (71, 71, 3)}, 34),
    "ConvNeXtTiny": ({}, 18),
}


def files(model: Any, folder: Path) -> dict[str, dict[str, SavedLayer]]:
    """What is read of the model's three files; of weights alone with what they cannot tell."""
    found = {}
    for suffix in (".keras", ".h5", ".weights.h5"):
        path = folder / f"model{suffix}"
        model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
        # ConvNeXt's layers are Conv2D with groups, which weights alone do not tell.
        convs = {"*_depthwise_conv": "Conv2D"} if suffix == ".weights.h5" and "convnext" in model.name else {}
        found[suffix] = read_weights(path, classes=convs)
    return found


@pytest.mark.parametrize("name", [name if name == "MobileNet" else pytest.param(name, marks=slow) for name in KERAS])
def test_keras_applications(name, tmp_path):
    arguments, count = KERAS[name]
    make = getattr(keras.applications, name)
    model = make(**{"weights": None, "include_top": False, "input_shape": (32, 32, 3), **arguments})
    rng = np.random.default_rng(0)
    live = layers_from_keras(model)
    assert len(live) == count
    assert live.skipped == {}
    read = files(model, tmp_path)
    for layers in read.values():
        assert set(layers) == set(live)
    worst = 0.0
    for key, (module, params) in live.items():
        theirs = model
        for step in key.split("/"):
            theirs = getattr(theirs, "layer", None) or theirs.get_layer(step)
        channels = params[next(iter(params))].shape[-2]
        x = rng.normal(size=(1, 9, 9, channels)).astype(np.float32)
        expected = np.asarray(theirs(x))
        difference = np.abs(np.asarray(module.apply({"params": params}, x)) - expected).max()
        worst = max(worst, float(difference / (np.abs(expected).max() + 1e-6)))
        for suffix, layers in read.items():
            saved = layers[key]
            if suffix == ".weights.h5":
                assert saved.config is None
                saved = SavedLayer(key, saved.class_name, theirs.get_config(), saved.values)
            ours, values = from_keras(saved)
            assert ours.kernel_size == module.kernel_size
            assert (ours.strides, ours.padding) == (module.strides, module.padding)
            for value, weight in zip(values.values(), params.values(), strict=True):
                np.testing.assert_array_equal(value, weight)
    assert worst < 1e-5


def torch_models() -> dict[str, Any]:
    """Makers of models, by name; torchvision's need no operators of its own."""
    torch = importlib.import_module("torch")

    def torchvision(name: str) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            # Built beside a CUDA build of PyTorch, its operators do not load beside the CPU build.
            patch.setattr(torch.library, "register_fake", lambda *args, **kwargs: lambda function: function)
            return getattr(importlib.import_module("torchvision.models"), name)(weights=None)

    def efficientnet_lite() -> Any:
        package = importlib.import_module("efficientnet_lite_pytorch")
        return package.EfficientNet.from_name("efficientnet-lite0")

    names = ("mobilenet_v2", "mobilenet_v3_small", "convnext_tiny")
    return {name: lambda name=name: torchvision(name) for name in names} | {"efficientnet_lite": efficientnet_lite}


# How many depthwise convolutions they have.
PYTORCH = {"mobilenet_v2": 17, "mobilenet_v3_small": 11, "convnext_tiny": 18, "efficientnet_lite": 16}


@pytest.mark.models
@pytest.mark.parametrize("name", PYTORCH)
def test_models_of_pytorch(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra `torch` brings it")
    try:
        model = torch_models()[name]().eval()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    layers = layers_from_torch(model)
    assert len(layers) + len(layers.skipped) == PYTORCH[name]
    if name == "efficientnet_lite":  # whose convolutions pad in a forward of their own
        assert all("overrides" in why and ".forward of torch.nn.Conv2d" in why for why in layers.skipped.values())
    else:
        assert layers.skipped == {}
    found = params_from_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for path, (layer, params) in layers.items():
        conv = model.get_submodule(path)
        x = torch.randn(1, conv.in_channels, 9, 9, generator=generator)
        with torch.no_grad():
            expected = conv(x).numpy()
        y = np.asarray(layer.apply({"params": params}, x.numpy()))
        assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
        np.testing.assert_array_equal(found[path]["kernel"], params["kernel"])


@pytest.mark.models
def test_two_thousand_damaged_files(tmp_path):
    from tests.support import keras_fuzz

    assert keras_fuzz.run(2000, tmp_path) > 1000
