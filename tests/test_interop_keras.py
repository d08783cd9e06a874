"""Keras' layers and files, and our layers: round trips, every format, hostile files."""

import dataclasses
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import linen
from depthwise_jax.interop.keras import SavedLayer, from_keras, read_weights, to_keras
from tests.support import keras_fuzz
from tests.support.draws import draws
from tests.support.keras_layers import LAYERS, build, draw, weights_for
from workloads.keras_reference import keras

# Keras' own, where it turns its variables into NumPy's arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

DATA = Path(__file__).parent / "data"


def built(name: str, seed: int) -> tuple[Any, np.ndarray]:
    """A Keras layer with a random configuration and random weights, and an input."""
    config, shape = draw(name, seed)
    layer = build(name, config, shape)
    rng = np.random.default_rng(seed)
    layer.set_weights(weights_for(layer, rng))
    return layer, rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(draws(4, 8)))
@pytest.mark.parametrize("name", LAYERS)
def test_round_trips_over_random_configurations(name, seed):
    theirs, x = built(name, seed)
    expected = np.asarray(theirs(x))
    for framework in ("linen", "nnx"):
        module, params = from_keras(theirs, framework=framework)
        y = module.apply({"params": params}, x) if framework == "linen" else module(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        back = to_keras(module, params if framework == "linen" else None)
        assert type(back) is type(theirs)
        for ours, weight in zip(back.get_weights(), theirs.get_weights(), strict=True):
            assert ours.dtype == weight.dtype
            np.testing.assert_array_equal(ours, weight)
        np.testing.assert_array_equal(np.asarray(back(x)), expected)
        config = back.get_config()
        if framework == "nnx":  # an NNX module has no name
            config |= {"name": theirs.name}
        assert config == theirs.get_config()


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_dtype_policies(policy):
    theirs = keras.layers.DepthwiseConv2D(3, dtype=policy, name="dw")
    theirs.build((None, 5, 5, 2))
    module, params = from_keras(theirs)
    assert module.name == "dw"
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 2)).astype(np.float32)
    y = module.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), np.asarray(theirs(x), np.float32), rtol=0.02, atol=0.02)
    back = to_keras(module, params)
    assert back.dtype_policy.name == policy
    for ours, weight in zip(back.get_weights(), theirs.get_weights(), strict=True):
        assert ours.dtype == weight.dtype
        np.testing.assert_array_equal(ours, weight)


def test_what_is_refused():
    def made(**kwargs):
        layer = keras.layers.DepthwiseConv2D(3, **kwargs)
        layer.build((None, 9, 9, 2))
        return layer

    with pytest.raises(ValueError, match=r"fresh: the parameter 'kernel' must have the shape \(3, 3, C, 1\); got None"):
        from_keras(keras.layers.DepthwiseConv2D(3, name="fresh"))
    with pytest.raises(TypeError, match=r"Dense\. For a custom class"):
        from_keras(keras.layers.Dense(3))
    with pytest.raises(TypeError, match=r"got builtins\.dict"):
        from_keras({})
    framework: Any = "torch"
    with pytest.raises(ValueError, match="framework"):
        from_keras(made(), framework=framework)
    with pytest.raises(ValueError, match="3D"):
        to_keras(linen.DepthwiseConv3D(3), {"kernel": np.ones((3, 3, 3, 2, 1)), "bias": np.ones(2)})
    with pytest.raises(ValueError, match="causal"):
        to_keras(linen.DepthwiseConv1D(3, padding="causal"), {"kernel": np.ones((3, 2, 1)), "bias": np.ones(2)})
    with pytest.raises(ValueError, match="must be 'valid' or 'same' for a Keras configuration; got 'edge'"):
        to_keras(linen.DepthwiseConv1D(3, padding="edge"), {"kernel": np.ones((3, 2, 1)), "bias": np.ones(2)})
    with pytest.raises(ValueError, match="Keras has no DepthwiseConv2DTranspose"):
        to_keras(linen.DepthwiseConv2DTranspose(3), {"kernel": np.ones((3, 3, 2, 1)), "bias": np.ones(2)})
    with pytest.raises(ValueError, match=r"mine: the parameter 'bias' must have the shape \(2,\); got \(3,\)"):
        to_keras(linen.DepthwiseConv1D(3, name="mine"), {"kernel": np.ones((3, 2, 1)), "bias": np.ones(3)})
    with pytest.raises(TypeError, match="params"):
        to_keras(linen.DepthwiseConv1D(3))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    """A functional model: layers of all kinds, a nested model, a wrapper, and layers of other kinds."""
    layers = keras.layers
    inner = keras.Sequential(
        [
            layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False, name="dw"),  # a name that is there twice
            layers.SeparableConv2D(5, 3, padding="same", activation="relu", name="sep"),
        ],
        name="inner",
    )
    images = keras.Input((8, 8, 4), name="images")
    x = layers.Conv2D(4, 1, name="stem")(images)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", depthwise_constraint="non_neg", name="dw")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="another", dtype="mixed_bfloat16")(x)
    x = inner(layers.Activation("relu", dtype="float32")(x))
    series = keras.Input((7, 3), name="series")
    y = layers.SeparableConv1D(2, 3, name="series_sep")(layers.DepthwiseConv1D(3, name="series_dw")(series))
    clips = keras.Input((2, 6, 6, 2), name="clips")
    z = layers.TimeDistributed(layers.DepthwiseConv2D(3, name="each"), name="over_time")(clips)
    model = keras.Model([images, series, clips], [x, y, z], name="whole")
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def the_layers(model: Any) -> dict[str, Any]:
    names = ("dw", "another", "series_dw", "series_sep")
    inner = model.get_layer("inner")
    return {
        **{name: model.get_layer(name) for name in names},
        "inner/dw": inner.get_layer("dw"),
        "inner/sep": inner.get_layer("sep"),
        "over_time/each": model.get_layer("over_time").layer,
    }


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_models_written_by_keras_3(model, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    model.save(path)
    expected = the_layers(model)
    layers = read_weights(path)
    assert set(layers) == set(expected)
    for name, saved in layers.items():
        theirs = expected[name]
        assert saved.class_name == type(theirs).__name__
        assert list(saved.values) == [v.name for v in theirs.weights]
        module, params = from_keras(saved)
        assert module.get_config() == from_keras(theirs)[0].get_config()
        for value, weight in zip(params.values(), theirs.get_weights(), strict=True):
            assert value.dtype == weight.dtype
            np.testing.assert_array_equal(value, weight)


def test_weights_written_by_keras_3(model, tmp_path):
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    expected = the_layers(model)
    layers = read_weights(path)
    assert set(layers) == set(expected)  # of over_time/each its class is nowhere in the file, but its bias tells
    for name, saved in layers.items():
        assert saved.class_name == type(expected[name]).__name__
        for value, weight in zip(saved.values.values(), expected[name].get_weights(), strict=True):
            np.testing.assert_array_equal(value, weight)
    with pytest.raises(ValueError, match="dw: the file holds no configuration"):
        from_keras(layers["dw"])
    config = expected["dw"].get_config()
    module, params = from_keras(SavedLayer("dw", "DepthwiseConv2D", config, layers["dw"].values))
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(module.apply({"params": params}, x), np.asarray(expected["dw"](x)), rtol=1e-5, atol=1e-5)


def test_a_file_written_by_keras_2():
    """Written by data/write_keras2.py, with the outputs that Keras 2 computed."""
    layers = read_weights(DATA / "keras2.h5")
    expected = np.load(DATA / "keras2.npz")
    assert set(layers) == {"dw", "nested/dw", "nested/sep", "sep1d"}
    assert layers["dw"].config is not None
    assert layers["dw"].config["groups"] == 1
    for name, saved in layers.items():
        key = name.replace("/", "_")
        module, params = from_keras(saved)
        y = module.apply({"params": params}, expected[f"{key}_x"])
        np.testing.assert_allclose(y, expected[f"{key}_y"], rtol=1e-5, atol=1e-5)


def test_weights_alone_in_the_legacy_layout(tmp_path):
    path = tmp_path / "old.h5"
    kernel, bias = np.ones((3, 3, 2, 1), np.float32), np.arange(2.0, dtype=np.float32)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["dw", "dense"]
        for layer, weights in {
            "dw": {"depthwise_kernel": kernel, "bias": bias},
            "dense": {"kernel": kernel[0, 0]},
        }.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0" for name in weights]
            for name, value in weights.items():
                group[f"{layer}/{name}:0"] = value
    (saved,) = read_weights(path).values()
    assert (saved.name, saved.class_name, saved.config) == ("dw", "DepthwiseConv2D", None)
    np.testing.assert_array_equal(saved.values["kernel"], kernel)
    np.testing.assert_array_equal(saved.values["bias"], bias)


# --- hostile files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Any:
    model = keras.Sequential([keras.Input((5, 5, 2)), keras.layers.DepthwiseConv2D(3, name="dw")])
    model.set_weights([np.ones(w.shape, w.dtype) for w in model.get_weights()])
    return model


@pytest.fixture
def archive(small, tmp_path) -> Any:
    """(path, members): a .keras file's parts, to be written again by `pack`."""
    path = tmp_path / "model.keras"
    small.save(path)
    with zipfile.ZipFile(path) as file:
        return path, {name: file.read(name) for name in file.namelist()}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def edited(content: bytes, edit: Any) -> bytes:
    """An HDF5 file in memory after a change."""
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        edit(file)
    return buffer.getvalue()


VARS = "layers/depthwise_conv2d/vars"


def replace_kernel(value: Any, **kwargs: Any) -> Any:
    def edit(file):
        del file[f"{VARS}/0"]
        file.create_dataset(f"{VARS}/0", data=value, **kwargs)

    return edit


def link(value: Any, place: str = f"{VARS}/0") -> Any:
    def edit(file):
        del file[place]
        file[place] = value

    return edit


def external_storage(file):
    del file[f"{VARS}/0"]
    file.create_dataset(f"{VARS}/0", (3, 3, 2, 1), "f4", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    del file[f"{VARS}/0"]
    layout = h5py.VirtualLayout((3, 3, 2, 1), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", (3, 3, 2, 1))
    file.create_virtual_dataset(f"{VARS}/0", layout)


def made_up(file):
    del file[f"{VARS}/0"]
    file.create_dataset(f"{VARS}/0", (3, 3, 1 << 40, 1), "f4", chunks=(3, 3, 1024, 1), fillvalue=1.0)


def endless(file):
    file[f"{VARS}/../again"] = file["layers"]
    file["layers/again"] = file["layers"]


HOSTILE = {
    "wrong shape": (
        replace_kernel(np.ones((3, 2, 2, 1), np.float32)),
        r"'dw': .*'kernel'.*\(3, 3, 2, 1\).*\(3, 2, 2, 1\)",
    ),
    "wrong rank": (replace_kernel(np.ones((3, 3), np.float32)), r"'dw': .*'kernel'.*\(3, 3, C, 1\); got \(3, 3\)"),
    "a scalar": (replace_kernel(np.float32(1)), r"'dw': .*'kernel'.*got \(\)"),
    "strings": (replace_kernel([b"x"], dtype=h5py.string_dtype()), "real floating-point numbers; got object"),
    "references": (replace_kernel(np.zeros(3), dtype="i8"), "floating-point numbers; got int64"),
    "a structure": (replace_kernel(np.zeros(3, [("a", "f4")])), "floating-point numbers"),
    "an external link": (link(h5py.ExternalLink("/etc/passwd", "/x")), "ExternalLink"),
    "an external link to a group": (link(h5py.ExternalLink("other.h5", "/"), "layers"), "ExternalLink"),
    "a soft link": (link(h5py.SoftLink("/layers")), "SoftLink"),
    "external storage": (external_storage, "another file"),
    "a virtual dataset": (virtual, "another file"),
    "numbers that are not stored": (made_up, "more than the file stores"),
    "groups in a circle": (endless, "more than once"),
    "a missing array": (
        lambda file: file.__delitem__(f"{VARS}/1"),
        r"'dw': .*'bias' must have the shape \(2,\); got None",
    ),
    "one too many": (lambda file: file.__setitem__(f"{VARS}/2", np.ones(2, np.float32)), "'dw' has a variable '2'"),
    "a group as array": (
        lambda file: (file.__delitem__(f"{VARS}/0"), file.create_group(f"{VARS}/0")),
        "is a group, not an array",
    ),
    "no such layer": (lambda file: file.__delitem__("layers/depthwise_conv2d"), "no weights for the layer 'dw'"),
}


def test_two_layers_under_one_name_are_told_apart_by_their_places(archive):
    path, members = archive
    edit = lambda file: file.copy("layers/depthwise_conv2d", "layers/depthwise_conv2d_1")  # noqa: E731
    members["model.weights.h5"] = edited(members["model.weights.h5"], edit)
    first, second = read_weights(pack(path, members)).items()
    assert (first[0], "depthwise_conv2d_1" in second[0]) == ("dw", True)
    np.testing.assert_array_equal(first[1].values["kernel"], second[1].values["kernel"])


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_weights(archive, what):
    path, members = archive
    edit, message = HOSTILE[what]
    members["model.weights.h5"] = edited(members["model.weights.h5"], edit)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        read_weights(pack(path, members))
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("layer", "weight", "message"),
    [
        ("out", "dw/depthwise_kernel:0", "ExternalLink"),
        ("out/dw", "depthwise_kernel:0", "ExternalLink"),
        ("dw", "out/depthwise_kernel:0", "ExternalLink"),
        ("dw", "absent/depthwise_kernel:0", "has no 'absent'"),
        ("absent", "depthwise_kernel:0", "has no 'absent'"),
        ("dw", "a/b/depthwise_kernel:0", "is an array, not a group"),
        ("/", "/", "has no|damaged"),
        ("dw dw", "again/depthwise_kernel:0", "there are two layers 'dw/again'"),
    ],
)
def test_hostile_legacy_files(tmp_path, layer, weight, message):
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["dw/depthwise_kernel:0"] = np.ones((3, 3, 2, 1), np.float32)
        file["dw"].attrs["weight_names"] = ["depthwise_kernel:0"]
        file.attrs["weight_names"] = ["dw/depthwise_kernel:0"]
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = layer.split()
        file["out"] = h5py.ExternalLink(str(outside), "/")
        file.create_group("dw").attrs["weight_names"] = [weight]
        file["dw/out"] = h5py.ExternalLink(str(outside), "/dw")
        file["dw/a/b"] = np.ones(3, np.float32)
        file["dw/again/depthwise_kernel:0"] = np.ones((3, 3, 2, 1), np.float32)
    with pytest.raises(ValueError, match=message):
        read_weights(path)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/outside", "a/../../b", "..\\outside", "C:\\outside"])
def test_members_that_climb_out(archive, name):
    path, members = archive
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match="leads out"):
        read_weights(pack(path, {**members, name: b"x"}))
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_truncated_files(small, tmp_path, suffix, part):
    path = tmp_path / f"model{suffix}"
    small.save(path) if suffix == ".keras" else small.save_weights(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(path)


def test_flipped_bytes_in_a_compressed_archive(archive):
    path, members = archive
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(len(content), size=60):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        try:
            layers = read_weights(path)
        except ValueError:
            refused += 1
        else:  # a byte that says nothing, such as a date
            np.testing.assert_array_equal(layers["dw"].values["kernel"], np.ones((3, 3, 2, 1)))
    assert refused > 40


def test_a_broken_archive(archive):
    path, members = archive
    with pytest.raises(ValueError, match=r"one member 'model\.weights\.h5'"):
        read_weights(pack(path, {"config.json": members["config.json"]}))
    for content, message in ((b"{", "not JSON"), (b"[]", "must be a dict; got a list"), (b"\xff\xfe", "not JSON")):
        with pytest.raises(ValueError, match=message):
            read_weights(pack(path, {**members, "config.json": content}))
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    with pytest.raises(ValueError, match="not JSON"):
        read_weights(pack(path, {**members, "config.json": deep}))
    nested = b'{"a":[' * 150 + b"1" + b"]}" * 150
    with pytest.raises(ValueError, match="nested more than 200 deep"):
        read_weights(pack(path, {**members, "config.json": nested}))
    with pytest.raises(ValueError, match="damaged"):
        read_weights(pack(path, {**members, "model.weights.h5": b"no HDF5"}))


def test_pickles_are_refused(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (ran,)

    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="a pickle is never loaded"):
        read_weights(pickled)
    assert not ran.exists()


CODE = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=" * 40, "defaults": None, "closure": None}}


@pytest.mark.parametrize(
    "argument", ["activation", "depthwise_constraint", "bias_regularizer", "depthwise_initializer"]
)
def test_a_lambda_in_a_layer_is_not_run_and_can_be_replaced(archive, argument):
    path, members = archive
    config = json.loads(members["config.json"])
    config["config"]["layers"][-1]["config"][argument] = CODE
    saved = read_weights(pack(path, {**members, "config.json": json.dumps(config).encode()}))["dw"]
    np.testing.assert_array_equal(saved.values["kernel"], np.ones((3, 3, 2, 1)))
    with pytest.raises(
        ValueError, match=rf"dw: {argument}: .*__lambda__.*from_keras\(layer, {argument}=...\)"
    ) as refused:
        from_keras(saved)
    assert "4wEA" not in str(refused.value)
    given = jax.nn.initializers.ones if argument.endswith("initializer") else jnp.tanh
    arguments: dict[str, Any] = {argument: given}
    module, _ = from_keras(saved, **arguments)
    assert getattr(module, argument) is given


def test_a_lambda_elsewhere_in_the_model_refuses_nothing(archive):
    path, members = archive
    config = json.loads(members["config.json"])
    config["config"]["layers"].append({"class_name": "Lambda", "config": {"name": "l", "function": CODE}})
    assert set(read_weights(pack(path, {**members, "config.json": json.dumps(config).encode()}))) == {"dw"}


def test_other_files(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"must be a \.keras archive or an HDF5 file"):
        read_weights(text)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "absent.keras")


def test_read_weights_needs_no_keras(archive):
    code = (
        "import sys; from depthwise_jax.interop.keras import read_weights, from_keras; "
        f"saved = read_weights({str(archive[0])!r})['dw']; from_keras(saved); assert 'keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- size -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_read(tmp_path):
    """A sample; `python -m tests.support.keras_fuzz 2000` reads more."""
    assert keras_fuzz.run(100, tmp_path, seed=1) > 50


# Reads files one after another; prints what it said of each and by how many MiB the process grew meanwhile, at most.
READER = """
import json, re, sys
from pathlib import Path
import h5py
from depthwise_jax.interop.keras import read_weights
def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    try:
        said = str(list(read_weights(path)))
    except ValueError as error:
        said = str(error)
    print(json.dumps((memory("VmHWM") - before, said)))
"""


def peaks_of_reading(paths: list[Path]) -> list[tuple[float, str]]:
    """By how many MiB a process grew that read each file, and what it said."""
    done = subprocess.run([sys.executable, "-c", READER, *map(str, paths)], check=True, capture_output=True, text=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def chunked(array: np.ndarray, chunks: Any, **kwargs: Any) -> Any:
    return replace_kernel(array, chunks=chunks, **kwargs)


SIZE = 1 << 28  # bytes of a bomb


def huge(shape: tuple[int, ...], chunks: tuple[int, ...], stored: int | None = None) -> Any:
    """Zeros that deflate to a thousandth, and again to a hundredth; or a chunk that holds more than it says."""

    def edit(file):
        del file[f"{VARS}/0"]
        limits = {"maxshape": (3, 3, None, 1)}
        made = file.create_dataset(f"{VARS}/0", shape, "f4", chunks=chunks, compression="gzip", **limits)
        packed = zlib.compress(bytes(stored or int(np.prod(chunks)) * 4), 9)
        for place in np.ndindex(*(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True))):
            made.id.write_direct_chunk(tuple(p * chunk for p, chunk in zip(place, chunks, strict=True)), packed)

    return edit


WIDE = SIZE // 4 // 9
BOMBS: dict[str, tuple[Any, str]] = {
    "an array": (huge((3, 3, WIDE, 1), (3, 3, WIDE // 64, 1)), "would take 2684"),
    "a chunk": (huge((3, 3, 2, 1), (3, 3, WIDE, 1)), "a chunk of the array .* would take 2684"),
    "a chunk of more than it says": (huge((3, 3, 2, 1), (3, 3, 2, 1), stored=SIZE), r"a chunk of (73|\d{6}) bytes"),
    "a configuration": (None, "the archive's member 'config.json' would take 2684"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="resets the peak of memory, which Linux alone can")
def test_a_small_file_takes_little_memory(archive, tmp_path):
    _, members = archive
    bombs = {}
    for name, (edit, message) in BOMBS.items():
        for deflated in (False, True) if edit else (True,):  # such a configuration that is stored is not small
            if edit is None:
                changed = {"config.json": members["config.json"] + b" " * SIZE}
            else:
                changed = {"model.weights.h5": edited(members["model.weights.h5"], edit)}
            path = tmp_path / f"{name} {deflated}.keras"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as file:
                for member, content in (members | changed).items():
                    file.writestr(member, content)
            bombs[path] = message
    # The first, one that is read whole, brings what h5py and NumPy keep.
    (_, whole), *rest = peaks_of_reading([archive[0], *bombs])
    assert "dw" in whole
    for (path, message), (growth, said) in zip(bombs.items(), rest, strict=True):
        assert re.search(message, said) or "would take" in said, path
        assert growth < 64, path  # MiB


@pytest.mark.parametrize(
    "kwargs", [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"shuffle": True}]
)
@pytest.mark.parametrize("chunks", [(3, 3, 2, 1), (2, 3, 1, 1), (1, 1, 1, 1)])
def test_compressed_arrays_are_read(archive, kwargs, chunks):
    """Keras compresses nothing, but h5repack does."""
    path, members = archive
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 1)).astype(np.float32)
    members["model.weights.h5"] = edited(members["model.weights.h5"], chunked(kernel, chunks, **kwargs))
    np.testing.assert_array_equal(read_weights(pack(path, members))["dw"].values["kernel"], kernel)


@pytest.mark.parametrize("kwargs", [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 2}])
def test_other_filters_are_refused(archive, kwargs):
    path, members = archive
    edit = chunked(np.ones((3, 3, 2, 1), np.float32), (3, 3, 2, 1), **kwargs)
    members["model.weights.h5"] = edited(members["model.weights.h5"], edit)
    with pytest.raises(ValueError, match="has filters other than shuffle and gzip"):
        read_weights(pack(path, members))


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", "<f2"])
def test_arrays_of_any_byte_order(archive, dtype):
    path, members = archive
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 1)).astype(dtype)
    members["model.weights.h5"] = edited(members["model.weights.h5"], replace_kernel(kernel))
    saved = read_weights(pack(path, members))["dw"]
    assert saved.values["kernel"].dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(saved.values["kernel"], kernel)
    direct = dataclasses.replace(saved, values={**saved.values, "kernel": kernel})
    if np.dtype(dtype).itemsize == 8:
        with pytest.raises(ValueError, match=r"'kernel' is .*float64.*jax_enable_x64|'kernel' is >f8"):
            from_keras(direct)
        return
    np.testing.assert_array_equal(
        np.asarray(from_keras(direct)[1]["kernel"]), kernel.astype(saved.values["kernel"].dtype)
    )


def test_long_doubles_and_complex_numbers_are_refused(archive):
    path, members = archive
    weights = members["model.weights.h5"]
    for dtype, message in (
        (np.longdouble, "long double"),
        (np.complex64, "real floating-point numbers; got complex64"),
    ):
        kernel = np.ones((3, 3, 2, 1), dtype)
        members["model.weights.h5"] = edited(weights, replace_kernel(kernel))
        with pytest.raises(ValueError, match=message):
            read_weights(pack(path, members))
        with pytest.raises(ValueError, match=message):
            from_keras(SavedLayer("dw", "DepthwiseConv2D", {"name": "dw", "kernel_size": 3}, {"kernel": kernel}))


def test_an_error_of_ours_is_no_damage(archive, monkeypatch):
    """What fails in our own code is not called a damaged file."""
    path, _ = archive
    monkeypatch.setattr("depthwise_jax.interop.keras.files.entries", lambda config: config["missing"])
    with pytest.raises(KeyError):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_bfloat16_arrays(tmp_path, suffix):
    layer = keras.layers.DepthwiseConv2D(3, name="dw", dtype="bfloat16")
    model = keras.Sequential([keras.Input((5, 5, 2)), layer])
    kernel = np.linspace(-3, 3, 18, dtype=np.float32).reshape(3, 3, 2, 1).astype(jnp.bfloat16)
    model.set_weights([kernel, np.asarray([0.5, -7], jnp.bfloat16)])
    path = tmp_path / f"model{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)
    (saved,) = read_weights(path).values()
    assert saved.values["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(saved.values["kernel"], kernel)
    np.testing.assert_array_equal(saved.values["bias"], np.asarray([0.5, -7], jnp.bfloat16))
