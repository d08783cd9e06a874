"""Keras' layers and models as people have them: each is right, or refused by name; Keras is the judge."""

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import constraints
from depthwise_jax.interop.keras import SavedLayer, from_keras, layers_from_keras, read_weights, to_keras
from workloads.keras_reference import keras

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
]

L = keras.layers


def randomized(layer: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.normal(size=w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


def built(layer: Any, *shape: int) -> Any:
    layer.build((None, *(shape or (9, 9, 4))))
    return randomized(layer)


# --- live layers ----------------------------------------------------------------------------------------------------


class Same(L.DepthwiseConv2D):
    """As people have it: other defaults, another build and configuration, helpers."""

    def __init__(self, kernel_size=3, note="mine", **kwargs):
        super().__init__(kernel_size, padding="same", **kwargs)
        self.note = note

    def build(self, input_shape):
        super().build(input_shape)
        self.doubled = 2

    def get_config(self):
        return super().get_config() | {"note": self.note}

    def penalty(self):
        return keras.ops.sum(self.kernel)


@keras.saving.register_keras_serializable("tests")
class Doubling(L.DepthwiseConv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


class Called(L.SeparableConv1D):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Mixin:
    def call(self, inputs):
        return 2 * super().call(inputs)  # pyright: ignore[reportAttributeAccessIssue]


MIXED: Any = type("Mixed", (Mixin, L.Conv2D), {})


@keras.saving.register_keras_serializable("tests")
class DepthwiseConv3D(L.Layer):
    """As people have it, since Keras has none."""

    def __init__(self, kernel_size, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size

    def build(self, input_shape):
        shape = (*self.kernel_size, input_shape[-1], 1)
        self.depthwise_kernel = self.add_weight(shape=shape, name="depthwise_kernel")
        self.bias = self.add_weight(shape=(input_shape[-1],), name="bias")

    def call(self, inputs):
        kernel = keras.ops.reshape(self.depthwise_kernel, (*self.kernel_size, 1, -1))
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        y = jax.lax.conv_general_dilated(
            inputs, kernel, (1, 1, 1), "VALID", dimension_numbers=numbers, feature_group_count=inputs.shape[-1]
        )
        return y + self.bias

    def get_config(self):
        return super().get_config() | {"kernel_size": self.kernel_size}


class Clip(keras.constraints.Constraint):
    def __call__(self, w):
        return keras.ops.clip(w, -0.5, 0.5)


class Center(keras.constraints.Constraint):
    """Depends on the kernel's axes."""

    def __call__(self, w):
        return w - keras.ops.mean(w, axis=(0, 1, 2), keepdims=True)


class Sum(keras.regularizers.Regularizer):
    def __call__(self, x):
        return keras.ops.sum(x)


def ramp(shape, dtype=None):
    return keras.ops.reshape(keras.ops.arange(int(np.prod(shape)), dtype=dtype), shape)


def dw(**kwargs: Any) -> Any:
    return built(L.DepthwiseConv2D(3, **kwargs))


def grouped(filters: int = 8, **kwargs: Any) -> Any:
    return built(L.Conv2D(filters, 3, groups=4, **kwargs))


def replaced(layer: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def lora(layer: Any) -> Any:
    layer.enable_lora(2)
    return layer


IMAGES, SERIES, CLIPS = (9, 9, 4), (9, 4), (5, 6, 7, 4)
RIGHT: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "subclass that computes the same": (lambda: built(Same()), IMAGES),
    "strides with dilation": (lambda: dw(strides=(2, 1), dilation_rate=(1, 2), padding="same"), IMAGES),
    "custom constraint": (lambda: dw(depthwise_constraint=Clip(), bias_constraint=Clip()), IMAGES),
    "constraint by a function": (lambda: dw(depthwise_constraint=lambda w: w / 2), IMAGES),
    "activation by a function": (lambda: dw(activation=lambda x: x * keras.ops.sigmoid(x)), IMAGES),
    "activation by an operation": (lambda: dw(activation=keras.ops.silu), IMAGES),
    "activation by a layer": (lambda: dw(activation=L.ReLU(max_value=1.0, negative_slope=0.1)), IMAGES),
    "custom regularizers": (lambda: dw(depthwise_regularizer=Sum(), activity_regularizer=Sum()), IMAGES),
    "custom initializers": (lambda: dw(depthwise_initializer=ramp, bias_initializer=ramp), IMAGES),
    "Conv2D with groups": (lambda: grouped(), IMAGES),
    "Conv2D with groups, once each": (lambda: grouped(4, padding="same", strides=2), IMAGES),
    "Conv2D with groups and more": (
        lambda: grouped(dilation_rate=(1, 2), use_bias=False, activation="gelu", kernel_regularizer="l2"),
        IMAGES,
    ),
    "Conv2D with a norm of each filter": (
        lambda: grouped(kernel_constraint=keras.constraints.MaxNorm(0.5, axis=[0, 1, 2])),
        IMAGES,
    ),
    "Conv2D with a norm over all": (
        lambda: grouped(kernel_constraint=keras.constraints.MinMaxNorm(0.5, 1, 0.5, axis=[0, 1, 2, 3])),
        IMAGES,
    ),
    "Conv2D with a norm of each weight": (lambda: grouped(kernel_constraint=keras.constraints.UnitNorm(2)), IMAGES),
    "Conv2D with a custom constraint": (lambda: grouped(kernel_constraint=Center(), bias_constraint=Clip()), IMAGES),
    "Conv2D with a custom regularizer": (lambda: grouped(kernel_regularizer=Sum()), IMAGES),
    "Conv2D with a custom initializer": (lambda: grouped(kernel_initializer=ramp), IMAGES),
    "Conv2D with fans": (lambda: grouped(kernel_initializer=keras.initializers.HeNormal(seed=3)), IMAGES),
    "Conv2D with other fans": (
        lambda: grouped(
            kernel_initializer=keras.initializers.GlorotUniform(seed=3, input_axes=[0], output_axes=[1, 3])
        ),
        IMAGES,
    ),
    "Conv2D with an orthogonal start": (
        lambda: grouped(kernel_initializer=keras.initializers.Orthogonal(seed=3)),
        IMAGES,
    ),
    "Conv2D with one input channel": (lambda: built(L.Conv2D(3, 3), 9, 9, 1), (9, 9, 1)),
    "Conv1D with groups": (lambda: built(L.Conv1D(4, 3, groups=4, padding="causal", dilation_rate=2), *SERIES), SERIES),
    "Conv3D with groups": (lambda: built(L.Conv3D(8, 2, groups=4), *CLIPS), CLIPS),
}


@pytest.mark.parametrize("name", RIGHT)
def test_live_layers_that_are_right(name):
    make, shape = RIGHT[name]
    theirs = make()
    x = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    expected = np.asarray(theirs(x))
    module, params = from_keras(theirs)
    y, state = module.apply({"params": params}, x, mutable="losses")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    nnx_module, _ = from_keras(theirs, framework="nnx")
    np.testing.assert_allclose(nnx_module(x), expected, rtol=1e-5, atol=1e-5)
    losses = [float(loss) for loss in theirs.losses]
    np.testing.assert_allclose(sum(jax.tree.leaves(state)), sum(losses), rtol=1e-4, atol=1e-4)
    kernel = params["kernel"]
    their_constraint = getattr(theirs, "kernel_constraint", None) or getattr(theirs, "depthwise_constraint", None)
    assert (their_constraint is None) == (module.depthwise_constraint is None)
    if their_constraint is not None:
        projected = np.asarray(their_constraint(theirs.kernel.value)).reshape(kernel.shape)
        ours = constraints.get(module.depthwise_constraint)
        assert ours is not None
        np.testing.assert_allclose(ours(kernel), projected, rtol=1e-5, atol=1e-6)
    initializer = getattr(theirs, "kernel_initializer", None) or theirs.depthwise_initializer
    if initializer is ramp or getattr(initializer, "seed", None) == 3:
        drawn = np.asarray(initializer(theirs.kernel.shape, dtype="float32")).reshape(kernel.shape)
        np.testing.assert_array_equal(
            module.init(jax.random.key(0), x)["params"]["kernel"], drawn.reshape(kernel.shape)
        )


def test_a_grouped_convolution_comes_back_as_a_depthwise_one():
    theirs = grouped(kernel_constraint="max_norm", kernel_regularizer="l1", activation="relu")
    x = np.random.default_rng(1).normal(size=(2, *IMAGES)).astype(np.float32)
    back = to_keras(*from_keras(theirs))
    assert type(back) is L.DepthwiseConv2D
    np.testing.assert_allclose(np.asarray(back(x)), np.asarray(theirs(x)), rtol=1e-5, atol=1e-5)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "call": (
        lambda: built(Doubling(3)),
        TypeError,
        r"overrides Doubling\.call of Keras' DepthwiseConv2D",
    ),
    "__call__": (lambda: built(Called(2, 3), *SERIES), TypeError, r"overrides Called\.__call__"),
    "mixin": (lambda: built(MIXED(4, 3, groups=4)), TypeError, r"Mixed overrides Mixin\.call"),
    "call of the instance": (lambda: replaced(dw(), call=lambda x: x), TypeError, "overrides call"),
    "custom class": (lambda: built(DepthwiseConv3D((2, 2, 2)), *CLIPS), TypeError, r"DepthwiseConv3D.*as_class="),
    "other groups": (lambda: built(L.Conv2D(8, 3, groups=2)), ValueError, r"not depthwise.*groups=2, 4 input channels"),
    "no groups": (lambda: built(L.Conv2D(8, 3)), ValueError, r"not depthwise.*groups=1, 4 input channels"),
    "transposed": (lambda: built(L.Conv2DTranspose(8, 3)), TypeError, "Conv2DTranspose"),
    "wrapped": (lambda: built(L.SpectralNormalization(L.DepthwiseConv2D(3))), TypeError, "SpectralNormalization"),
    "activation with weights": (lambda: built(with_prelu()), ValueError, r"weights \['kernel', 'bias'\].*alpha"),
    "adapted": (lambda: lora(built(L.Conv2D(8, 3, groups=4))), ValueError, r"weights \['kernel', 'bias'\].*lora"),
    "not built": (lambda: L.Conv2D(8, 3, groups=4, name="fresh"), ValueError, "fresh.*build it first"),
    "orthogonal penalty": (
        lambda: dw(depthwise_regularizer=keras.regularizers.OrthogonalRegularizer()),
        ValueError,
        "depthwise_regularizer: OrthogonalRegularizer",
    ),
}


def with_prelu() -> Any:
    activation = L.PReLU(shared_axes=[1, 2])
    activation.build((None, 7, 7, 4))
    return L.DepthwiseConv2D(3, activation=activation)


@pytest.mark.parametrize("name", WRONG)
def test_live_layers_that_are_refused(name):
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message) as refused:
        from_keras(make())
    assert "4wEA" not in str(refused.value)


def test_a_custom_class_is_taken_by_naming_ours():
    theirs = built(DepthwiseConv3D((2, 1, 3)), *CLIPS)
    x = np.random.default_rng(1).normal(size=(2, *CLIPS)).astype(np.float32)
    module, params = from_keras(theirs, as_class="DepthwiseConv3D")
    np.testing.assert_allclose(module.apply({"params": params}, x), np.asarray(theirs(x)), rtol=1e-5, atol=1e-5)


def test_an_argument_takes_the_place_of_a_custom_part(monkeypatch):
    theirs = dw(activation=lambda x: x * keras.ops.sigmoid(x), depthwise_constraint=Clip())
    conv = grouped(kernel_constraint=Center())
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")  # where a custom part cannot run on JAX' arrays
    with pytest.raises(ValueError, match=r"activation=.*lambda.*torch.*from_keras\(layer, activation=\.\.\.\)"):
        from_keras(theirs)
    with pytest.raises(
        ValueError, match=r"depthwise_constraint=Clip.*from_keras\(layer, depthwise_constraint=\.\.\.\)"
    ):
        from_keras(theirs, activation=jax.nn.silu)
    module, params = from_keras(theirs, activation=jax.nn.silu, depthwise_constraint=constraints.Box(-0.5, 0.5))
    assert module.activation is jax.nn.silu
    x = np.random.default_rng(1).normal(size=(2, *IMAGES)).astype(np.float32)
    np.testing.assert_allclose(module.apply({"params": params}, x), np.asarray(theirs(x)), rtol=1e-5, atol=1e-5)
    ours = constraints.NonNeg()
    assert from_keras(conv, depthwise_constraint=ours)[0].depthwise_constraint is ours


# --- models and their files -----------------------------------------------------------------------------------------


def functional(inner: Callable[[Any], Any], shape: tuple[int, ...] = (12, 12, 4), name: str = "whole") -> Any:
    inputs = keras.Input(shape)
    return keras.Model(inputs, inner(inputs), name=name)


def same(name: str, **kwargs: Any) -> Any:
    return L.DepthwiseConv2D(3, padding="same", name=name, **kwargs)


def name_scopes() -> Any:
    with keras.name_scope("stage1"):
        x = inputs = keras.Input((12, 12, 4))
        x = same("dw")(x)
        with keras.name_scope("deep"):
            x = same("other")(x)
            x = keras.Sequential([same("dw"), L.SeparableConv2D(4, 3, name="sep")], name="inner")(x)
    return keras.Model(inputs, x)


def shared_layer() -> Any:
    layer = same("shared")
    inner = functional(layer, name="inner")
    return functional(lambda x: inner(layer(x)))


def shared_model() -> Any:
    backbone = functional(lambda x: same("b")(same("a")(x)), name="backbone")
    left, right = (functional(backbone, name=name) for name in ("left", "right"))
    return functional(lambda x: L.Add()([left(x), right(x)]))


def inside_sequential() -> Any:
    inner = keras.Sequential([same("dw"), L.BatchNormalization()], name="inner")
    keras.Sequential([keras.Input((12, 12, 4)), inner, L.Conv2D(2, 1)], name="outer")
    return inner


def nested() -> Any:
    def level(depth: int) -> Any:
        inner = same("dw") if depth == 0 else level(depth - 1)
        return functional(lambda x: same(f"last{depth}")(inner(x)), name=f"level{depth}")

    return level(3)


def wrapped() -> Any:
    def inner(x):
        x = L.SpectralNormalization(same("normalized"), name="wrapper")(x)
        x = L.Reshape((1, 12, 12, 4))(x)
        return L.TimeDistributed(same("each"), name="over_time")(x)

    return functional(inner)


@keras.saving.register_keras_serializable("tests")
class Block(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = L.DepthwiseConv2D(3, padding="same")
        self.named = same("named", use_bias=False, depth_multiplier=1)
        self.many = [L.SeparableConv2D(4, 3, padding="same"), {"key": [L.DepthwiseConv2D(1)]}]
        self.conv = L.Conv2D(4, 1, name="plain")  # whose bias tells that it is not a depthwise layer

    def call(self, inputs):
        separable, others = self.many
        return self.conv(others["key"][0](separable(self.named(self.first(inputs)))))


@keras.saving.register_keras_serializable("tests")
class Network(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dw = L.DepthwiseConv2D(3)
        self.blocks = [Block(name="block"), Block(name="block_1")]
        self.head = keras.Sequential([L.DepthwiseConv2D(1, name="q")], name="head")

    def call(self, inputs):
        return self.head(self.blocks[1](self.blocks[0](self.dw(inputs))))


def subclassed() -> Any:
    model = Network()
    model(np.ones((1, 12, 12, 4), np.float32))
    return model


def grouped_convolutions() -> Any:
    def inner(x):
        x = L.Conv2D(8, 3, groups=4, kernel_constraint="non_neg", name="multiplied")(x)
        x = L.Conv2D(8, 7, groups=8, padding="same", name="convnext")(x)
        x = L.Conv2D(8, 3, groups=2, name="grouped")(x)
        x = L.Conv1D(8, 3, groups=8, padding="causal", name="series")(L.Reshape((-1, 8))(x))
        return L.Dense(2)(x)

    return functional(inner)


def frozen() -> Any:
    def inner(x):
        x = same("first", trainable=False)(x)
        return same("second")(L.BatchNormalization()(x))

    return functional(functional(inner, name="inner"))


def lambda_elsewhere() -> Any:
    return functional(lambda x: L.Lambda(lambda y: 2 * y)(same("dw")(x)))


def long_names() -> Any:
    """More names than an attribute of HDF5 holds."""

    def inner(x):
        for index in range(150):
            x = L.BatchNormalization(name=f"{'a_long_name_of_a_scope_in_a_backbone_' * 3}{index}")(x)
        return same("dw")(x)

    return functional(functional(inner, name="backbone"))


# A model, and what its layers are called: in every format, unless a second set says otherwise for the weights alone.
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "name scopes": (name_scopes, {"dw", "other", "inner/dw", "inner/sep"}),
    "shared layer": (shared_layer, {"shared", "inner/shared"}),
    "shared model": (shared_model, {f"{side}/backbone/{name}" for side in ("left", "right") for name in "ab"}),
    "saved from inside a Sequential": (inside_sequential, {"dw"}),
    "nested": (
        nested,
        {"level2/level1/level0/dw", "level2/level1/level0/last0", "level2/level1/last1", "level2/last2", "last3"},
    ),
    "wrapped": (wrapped, {"wrapper/normalized", "over_time/each"}),
    "grouped convolutions": (grouped_convolutions, {"multiplied", "convnext", "series"}),
    "frozen": (frozen, {"inner/first", "inner/second"}),
    "a lambda elsewhere": (lambda_elsewhere, {"dw"}),
    "long names": (long_names, {"backbone/dw"}),
}


def layer_at(model: Any, name: str) -> Any:
    for step in name.split("/"):
        model = getattr(model, "layer", None) or model.get_layer(step)
    return model


def save(model: Any, folder: Path, suffix: str) -> Path:
    path = folder / f"model{suffix}"
    model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
    return path


def assert_has(saved: SavedLayer, theirs: Any) -> None:
    values = list(saved.values.values())
    for value, weight in zip(values, theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(value.ravel(), weight.ravel())
    kernel = values[0].shape
    assert kernel[-2:] == (theirs.groups, theirs.filters // theirs.groups) if saved.class_name.startswith("Conv") else 1


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize("name", MODELS)
def test_models_in_three_formats(name, suffix, tmp_path):
    make, names = MODELS[name]
    model = randomized(make())
    path = save(model, tmp_path, suffix)
    classes = {}
    if suffix == ".weights.h5":  # which hold a shared layer once, and no groups
        kept = {"shared layer": {"shared"}, "shared model": {"left/backbone/a", "left/backbone/b"}}
        names = kept.get(name, names)
        if name == "grouped convolutions":
            with pytest.warns(UserWarning, match="look depthwise: 'series', 'multiplied', 'convnext'"):
                assert set(read_weights(path)) == set()
            classes = {"convnext": "Conv2D", "series": "Conv1D"}
            names = set(classes)
    if classes:
        with pytest.warns(UserWarning, match="look depthwise: 'multiplied'"):
            layers = read_weights(path, classes=classes)
    else:
        layers = read_weights(path)
    assert set(layers) == names
    for key, saved in layers.items():
        theirs = layer_at(model, key)
        assert_has(saved, theirs)
        if saved.config is None:
            assert suffix == ".weights.h5"
            saved = SavedLayer(saved.name, type(theirs).__name__, theirs.get_config(), saved.values)
        rank = 1 if "1D" in saved.class_name else 2
        x = np.random.default_rng(0).normal(
            size=(1, *(9,) * rank, theirs.weights[0].shape[-2] * getattr(theirs, "groups", 1))
        )
        x = x.astype(np.float32)
        with frozen_warning(theirs):
            module, params = from_keras(saved)
        np.testing.assert_allclose(module.apply({"params": params}, x), np.asarray(theirs(x)), rtol=1e-5, atol=1e-5)


def frozen_warning(*layers: Any) -> Any:
    if all(layer.trainable for layer in layers):
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="trainable=False")


@pytest.mark.parametrize("name", MODELS)
def test_live_models(name):
    make, names = MODELS[name]
    model = make()
    with frozen_warning(*(layer_at(model, key) for key in names)):
        layers = layers_from_keras(model)
    assert set(layers) == names
    assert set(layers.skipped) == ({"grouped"} if name == "grouped convolutions" else set())
    for key, (_, params) in layers.items():
        for value, weight in zip(params.values(), layer_at(model, key).get_weights(), strict=True):
            np.testing.assert_array_equal(np.ravel(value), weight.ravel())


SUBCLASSED = {
    "depthwise_conv2d", "block/depthwise_conv2d", "block/separable_conv2d", "block/depthwise_conv2d_1",
    "block_1/depthwise_conv2d", "block_1/separable_conv2d", "block_1/depthwise_conv2d_1", "head/q",
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_subclassed_models(suffix, tmp_path):
    """Their layers' classes are told by names and shapes; where they are not, a warning names the layer."""
    keras.utils.clear_session(free_memory=False)
    model = randomized(subclassed())
    path = save(model, tmp_path, suffix)
    with pytest.warns(UserWarning, match=r"look depthwise: 'block/named', 'block_1/named'\..*classes=") as caught:
        layers = read_weights(path)
    assert len(caught) == 1
    live = layers_from_keras(model)
    assert {n for n in live if not n.endswith("named")} == set(layers)
    assert len(layers) == len(SUBCLASSED)
    for name, saved in layers.items():
        assert saved.config is None or suffix == ".keras" or "head" in name
        for value, ours in zip(saved.values.values(), live[name][1].values(), strict=True):
            np.testing.assert_array_equal(value, ours)
    layers = read_weights(path, classes={"*/named": "DepthwiseConv2D"})
    np.testing.assert_array_equal(layers["block_1/named"].values["kernel"], live["block_1/named"][1]["kernel"])


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_custom_classes_in_files(suffix, tmp_path):
    clips = keras.Input((5, 6, 7, 4))
    images = keras.Input((9, 9, 4))
    outputs = [DepthwiseConv3D((2, 2, 2), name="dw3")(clips), Doubling(3, name="double")(images)]
    model = randomized(keras.Model([clips, images], outputs))
    path = save(model, tmp_path, suffix)
    with pytest.warns(
        UserWarning, match=r"look depthwise: 'dw3 \(of class DepthwiseConv3D\)'.*'double \(of class Doubling\)'"
    ):
        assert set(read_weights(path)) == set()
    saved = read_weights(path, classes={"DepthwiseConv3D": "DepthwiseConv3D", "dou*": "DepthwiseConv2D"})
    assert {name: layer.class_name for name, layer in saved.items()} == {
        "dw3": "DepthwiseConv3D",
        "double": "DepthwiseConv2D",
    }
    module, params = from_keras(saved["dw3"])
    x = np.random.default_rng(0).normal(size=(1, 5, 6, 7, 4)).astype(np.float32)
    expected = np.asarray(model.get_layer("dw3")(x))
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    assert set(layers_from_keras(model).skipped) == {"dw3", "double"}
    assert set(layers_from_keras(model, classes={"*": "DepthwiseConv3D"})) >= {"dw3"}
    with pytest.raises(ValueError, match=r"classes must name one of Depth.*'DepthwiseConv4D' for 'dw3'"):
        read_weights(path, classes={"dw3": "DepthwiseConv4D"})


def test_groups_without_names_as_early_keras_3_wrote_them(tmp_path):
    model = randomized(nested())
    path = save(model, tmp_path, ".keras")
    expected = read_weights(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = tmp_path / "weights.h5"
    weights.write_bytes(members["model.weights.h5"])
    for renamed in (False, True):
        with h5py.File(weights, "a") as file:
            found: list[Any] = []
            file.visititems(lambda name, item: found.append(item) if name.endswith("vars") else None)  # noqa: B023
            for item in found:
                item.attrs.pop("name", None)
            if renamed:  # Keras 2.13
                file.move("layers", "_layer_checkpoint_dependencies")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", members["config.json"])
            archive.writestr("model.weights.h5", weights.read_bytes())
        layers = read_weights(path)
        assert set(layers) == set(expected)
        for name, saved in layers.items():
            np.testing.assert_array_equal(saved.values["kernel"], expected[name].values["kernel"])


@pytest.mark.parametrize("frozen", [(), ("a",), ("a", "b")])
def test_names_that_tell_no_difference(frozen, tmp_path):
    """Layers of one name in nested models, under scopes that name neither: Keras goes by their order."""

    def inner(name: str) -> Any:
        with keras.name_scope(f"scope_of_{name}"):
            return functional(same("dw", trainable=name not in frozen), name=name)

    a, b = inner("a"), inner("b")
    both = functional(lambda x: b(a(x)), name="both")
    model = randomized(functional(both))
    path = save(model, tmp_path, ".h5")
    if len(frozen) == 1:  # which is written last
        with pytest.raises(ValueError, match="'scope_of_b/dw' in 'both' may be those of 'both/a/dw' or 'both/b/dw'"):
            read_weights(path)
        return
    layers = read_weights(path)
    for name, theirs in (("both/a/dw", a), ("both/b/dw", b)):
        np.testing.assert_array_equal(layers[name].values["kernel"], theirs.get_layer("dw").get_weights()[0])


def test_a_prototype_inside_a_custom_class_is_named(tmp_path):
    """A configuration of a layer that a custom class keeps, and made no weights for."""
    model = randomized(functional(same("dw")))
    path = save(model, tmp_path, ".keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    prototype = {
        "module": "keras.layers",
        "class_name": "DepthwiseConv2D",
        "config": {"name": "p", "kernel_size": [3, 3]},
    }
    custom = {"module": "mine", "class_name": "Repeat", "config": {"name": "repeat", "layer": prototype}}
    config["config"]["layers"].append({**custom, "registered_name": "mine>Repeat"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", members["model.weights.h5"])
    with pytest.warns(UserWarning, match=r"'repeat/p \(made by a custom class\)'"):
        assert set(read_weights(path)) == {"dw"}


def test_only_models_of_keras_are_taken():
    with pytest.raises(TypeError, match="got dict"):
        layers_from_keras({})
    layers = layers_from_keras(dw(name="alone"))
    assert set(layers) == {"alone"}
    assert str(layers) == "alone: converted"
    assert jnp.shape(layers["alone"][1]["kernel"]) == (3, 3, 4, 1)
