"""Between Keras' depthwise and separable layers and ours: objects, and the files that Keras writes.

Keras itself is needed, and imported, by `to_keras` alone; files are read with h5py. What is read is checked, but the
HDF5 library beneath can be led into a loop by a damaged file: read strangers' files in a process with a time limit.
"""

import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from depthwise_jax import linen, spec
from depthwise_jax.interop.modules import channels_of, check_values, make, parts

LAYERS = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")

Names = tuple[str, ...]

# What zipfile, zlib, json and h5py raise where a file is not what it should be.
_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    UnicodeError,
    ArithmeticError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class SavedLayer:
    """A layer out of a file.

    Attributes:
        name: its name, after those of the models and wrappers that it lies in: "encoder/dw".
        class_name: one of LAYERS.
        config: what Keras' `get_config` gives; None where the file holds weights alone.
        values: its parameters' arrays, by our names.
    """

    name: str
    class_name: str
    config: Mapping[str, Any] | None
    values: Mapping[str, np.ndarray]


def from_keras(layer: Any, *, framework: str = "linen") -> tuple[Any, Any]:
    """The layer of ours that computes what a Keras layer does.

    Args:
        layer: a built DepthwiseConv1D, DepthwiseConv2D, SeparableConv1D or SeparableConv2D of Keras 3, on any backend;
            or a SavedLayer.
        framework: "linen" or "nnx", the kind of layer to make.

    Returns:
        `(module, params)`, every value as it was.

    Raises:
        TypeError: another object, a subclass of these layers too.
        ValueError: the layer is not built, or has what ours cannot spell, by name: strides above 1 with dilation_rate
            above 1 (which `depthwise_conv` computes), lambdas, and what is not built into Keras.
    """
    class_name = layer.class_name if isinstance(layer, SavedLayer) else type(layer).__name__
    ours = isinstance(layer, SavedLayer) or type(layer).__module__.split(".")[0] == "keras"
    if not ours or class_name not in LAYERS:
        raise TypeError(f"layer must be one of Keras' {', '.join(LAYERS)}, or a SavedLayer; got {type(layer).__name__}")
    if isinstance(layer, SavedLayer):
        config, values = layer.config, layer.values
        if config is None:
            raise ValueError(
                f"{layer.name}: the file holds no configuration; give it one, dataclasses.replace(saved, config=...)"
            )
    else:
        config = layer.get_config()
        to_numpy = sys.modules["keras"].ops.convert_to_numpy  # the layer has come from it, on whatever backend
        values = {variable.name: to_numpy(variable.value) for variable in layer.weights}
    arguments = spec.arguments_from_config(class_name, _arguments(class_name), config)
    return make(class_name, arguments, values, framework, layer.name)


def to_keras(module: Any, params: Mapping[str, Any] | None = None) -> Any:
    """The Keras layer that computes what a layer of ours does: the way back of `from_keras`.

    Args:
        module: a 1D or 2D layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; an NNX layer has its own.

    Returns:
        A built keras.layers layer.

    Raises:
        TypeError: no layer of ours, or its parameters missing or given twice.
        ValueError: Keras has no word for one of the arguments, or the parameters do not fit.
    """
    import keras

    contract, values = parts(module, params)
    config = contract.get_config(getattr(module, "name", None))
    layer = getattr(keras.layers, contract.layer).from_config(config)
    channels = channels_of(contract, values, contract.layer)
    layer.build(contract.layout.arrange((None,), (None,) * contract.layout.rank, channels))
    layer.set_weights([np.asarray(value) for value in values.values()])
    return layer


def read_weights(path: str | PathLike[str]) -> dict[str, SavedLayer]:
    """Reads the depthwise and separable layers out of a file that Keras wrote; nothing is run, and nothing written.

    Args:
        path: a `.keras` or `.weights.h5` file of Keras 3, or a legacy `.h5` file of Keras 2 or 3, told by its content.

    Returns:
        The layers by name. A `.weights.h5` file holds no configurations, and a layer in a wrapper is not known there.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is none of these, is damaged, holds a lambda, refers to other files, or holds arrays that
            do not fit their layer; the message says what and where.
    """
    path = fspath(path)
    with open(path, "rb") as file:
        data = file.read()
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return _read_archive(archive, path)
        if data.startswith(b"\x89HDF\r\n\x1a\n"):
            return _read_h5(data, None, path)
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    pickled = "; a pickle is never loaded" if data.startswith(b"\x80") else ""
    raise ValueError(f"{path} is neither a .keras archive nor an HDF5 file{pickled}")


def _arguments(class_name: str) -> list[str]:
    return [name for name in getattr(linen, class_name).__dataclass_fields__ if name not in ("parent", "name")]


def _read_archive(archive: zipfile.ZipFile, path: str) -> dict[str, SavedLayer]:
    names = archive.namelist()
    for name in names:
        for parsed in (PurePosixPath(name), PureWindowsPath(name)):
            if parsed.is_absolute() or parsed.drive or ".." in parsed.parts:
                raise ValueError(f"{path}: the archive's member {name!r} leads out of it")
    for member in ("config.json", "model.weights.h5"):
        if names.count(member) != 1:
            raise ValueError(f"{path}: a .keras archive has one member {member!r}; got {names}")
    return _read_h5(archive.read("model.weights.h5"), _json(archive.read("config.json"), path), path)


def _json(text: Any, path: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the model's configuration is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the model's configuration is no dict but a {type(config).__name__}")
    return config


def _read_h5(data: bytes, config: dict[str, Any] | None, path: str) -> dict[str, SavedLayer]:
    import h5py

    with h5py.File(io.BytesIO(data), "r") as file:
        legacy = config is None and ("layer_names" in file.attrs or "model_weights" in file)
        if legacy and "model_config" in file.attrs:
            config = _json(file.attrs["model_config"], path)
        configs = {} if config is None else _configs(config, path)
        root = config.get("config", {}) if config is not None else {}
        root_name = root.get("name") if isinstance(root, dict) else None
        found = _legacy(file, configs, root_name, path) if legacy else _native(file, path)
        layers: dict[str, SavedLayer] = {}
        for names, class_name, values in found:
            known = configs.get(names)
            if config is not None:
                if known is None:
                    continue  # another kind of layer
                class_name = known["class_name"]
            if class_name is not None:
                name = "/".join(names)
                if name in layers:
                    raise ValueError(f"{path}: there are two layers {name!r}")
                layers[name] = _saved(name, class_name, known and known["config"], values, path)
        missing = ["/".join(names) for names in configs if "/".join(names) not in layers]
        if missing:
            raise ValueError(f"{path}: there are no weights for the layer {missing[0]!r}")
        return layers


def _configs(config: dict[str, Any], path: str) -> dict[Names, dict[str, Any]]:
    """The configurations of our kinds of layers in a model's, by the names of what they lie in and their own."""
    found: dict[Names, dict[str, Any]] = {}

    def walk(node: Any, names: Names) -> None:
        if isinstance(node, list):
            for entry in node:
                walk(entry, names)
        if not isinstance(node, dict):
            return
        class_name, inner = node.get("class_name"), node.get("config")
        if class_name in ("Lambda", "__lambda__"):
            raise ValueError(f"{path}: the configuration holds a {class_name}, code of its own, which is refused")
        if isinstance(class_name, str) and isinstance(inner, dict) and isinstance(inner.get("name"), str):
            names = (*names, inner["name"])
            if class_name in LAYERS and node.get("module") in (None, "keras.layers"):
                found[names[1:] or names] = node  # without the whole model's own name
        for value in node.values():
            walk(value, names)

    walk(config, ())
    return found


def _native(file: Any, path: str) -> Iterator[tuple[Names, str | None, dict[str, Any]]]:
    """Each layer of Keras 3's own layout: its names, its class as far as the group's name tells, and its variables."""
    import h5py

    seen: set[Any] = set()

    def walk(group: Any, names: Names, step: str) -> Iterator[tuple[Names, str | None, dict[str, Any]]]:
        if group in seen:  # linked to twice
            raise ValueError(f"{path}: the group {group.name!r} is there more than once")
        seen.add(group)
        if "vars" in group:
            variables = _child(group, "vars", path)
            if step:  # not the whole model
                names = (*names, str(variables.attrs.get("name", step)))
            class_name = _class_of(step)
            if len(variables):
                yield names, class_name, {key: (variables, key) for key in variables}
        for key in group:
            child = _child(group, key, path)
            if key != "vars" and isinstance(child, h5py.Group):
                yield from walk(child, names, key)

    return walk(file, (), "")


def _legacy(
    file: Any, configs: Mapping[Names, Any], root: str | None, path: str
) -> Iterator[tuple[Names, str | None, dict[str, Any]]]:
    """Each layer of the legacy layout, which tells weights apart by their names: "dw/depthwise_kernel:0"."""
    top = _child(file, "model_weights", path) if "model_weights" in file else file
    layers: dict[Names, dict[str, Any]] = {}
    for group_name in _texts(top.attrs.get("layer_names", ())):
        group = _at(top, group_name, path)
        for weight in _texts(group.attrs.get("weight_names", ())):
            *names, parameter = weight.partition(":")[0].split("/")
            # Some Keras versions begin a weight's name with the whole model's, and some leave a nested model's out.
            tails = [tuple(names)] + [tuple(names[1:])] * (names[:1] == [root])
            candidates = [(group_name, *tail) for tail in tails] + tails
            names = next((candidate for candidate in candidates if candidate in configs), tails[0])
            layers.setdefault(names, {})[parameter] = (group, weight)
    for names, values in layers.items():
        class_name = None
        if "depthwise_kernel" in values:
            group, weight = values["depthwise_kernel"]
            rank = _dataset(group, weight, path).ndim - 2
            class_name = f"{'SeparableConv' if 'pointwise_kernel' in values else 'DepthwiseConv'}{rank}D"
        yield names, class_name if class_name in LAYERS else None, values


def _saved(name: str, class_name: str, config: Any, places: Mapping[str, Any], path: str) -> SavedLayer:
    """A layer with its arrays, checked against its configuration."""
    names = (
        ["kernel", "bias"] if class_name.startswith("Depthwise") else ["depthwise_kernel", "pointwise_kernel", "bias"]
    )
    values = {}
    for key, (group, entry) in places.items():
        # Keras 3 numbers the variables in order; Keras 2 calls a depthwise layer's kernel depthwise_kernel.
        known = names[int(key)] if key.isdecimal() and int(key) < len(names) else key
        known = "kernel" if known == "depthwise_kernel" and "kernel" in names else known
        if known not in names:
            raise ValueError(f"{path}: the layer {name!r} has a variable {key!r}; a {class_name} has {names}")
        values[known] = _array(_dataset(group, entry, path), path)
    if config is not None:
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
            if key in ("kernel_size", "depth_multiplier", "use_bias", "filters")
        }
        try:
            contract = getattr(linen, class_name)(**arguments, data_format="channels_last").spec
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the layer {name!r}: {error}") from error
        check_values(contract, channels_of(contract, values, f"{path}: {name}"), values, f"{path}: {name}")
    return SavedLayer(name, class_name, config, values)


def _class_of(group: str) -> str | None:
    """The class of ours that Keras names a group after, "depthwise_conv2d_1"."""
    match = re.fullmatch(r"(depthwise|separable)_conv([12])d(_\d+)?", group)
    return match and f"{match[1].title()}Conv{match[2]}D"


def _texts(value: Any) -> list[str]:
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in value]


def _child(group: Any, name: str, path: str) -> Any:
    """A member of a group, which must lie in this file."""
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        raise ValueError(f"{path}: the group {group.name!r} has no {name!r}")
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{path}: {name!r} in {group.name!r} is a {type(link).__name__}, which leads elsewhere")
    return group[name]


def _at(group: Any, name: str, path: str) -> Any:
    """What lies at a path in a group, step by step, as a link on the way would lead elsewhere too."""
    import h5py

    for step in name.split("/"):
        if not isinstance(group, h5py.Group):
            raise ValueError(f"{path}: {group.name!r} is no group, and has no {step!r}")
        group = _child(group, step, path)
    return group


def _dataset(group: Any, name: str, path: str) -> Any:
    import h5py

    dataset = _at(group, name, path)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path}: {dataset.name!r} is no array")
    return dataset


def _array(dataset: Any, path: str) -> np.ndarray:
    """A dataset's numbers, which must lie in this file."""
    where = f"{path}: the array {dataset.name!r}"
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{where} lies in another file")
    bfloat16 = dataset.dtype == np.dtype("V2")  # how h5py writes it
    if dataset.dtype.kind != "f" and not bfloat16:
        raise ValueError(f"{where} must hold floating-point numbers; got {dataset.dtype}")
    # Deflate makes at most 1032 bytes of one: more are not stored, but made up to fill the memory.
    if dataset.size * dataset.dtype.itemsize > 1032 * dataset.id.get_storage_size():
        raise ValueError(f"{where} of shape {dataset.shape} is larger than what the file stores of it")
    array = np.asarray(dataset[...])
    return array.view(jnp.bfloat16) if bfloat16 else array
