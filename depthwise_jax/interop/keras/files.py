"""Reads the files that Keras writes: .keras archives, .weights.h5 and legacy .h5, recognised by their content."""

import io
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from depthwise_jax import linen
from depthwise_jax.interop.keras.config import (
    CONVS,
    LAYERS,
    Entry,
    Names,
    class_of_group,
    entries,
    group_names,
    in_order,
    named,
    tell,
)
from depthwise_jax.interop.keras.hdf5 import Array, Budget, Group, damage, open_file
from depthwise_jax.interop.keras.layers import OURS, SavedLayer
from depthwise_jax.interop.modules import channels_of, check_values


def read_weights(path: str | PathLike[str], *, classes: Mapping[str, str] | None = None) -> dict[str, SavedLayer]:
    """Reads the depthwise and separable layers from a file that Keras wrote, without running or writing anything.

    A Conv1D, Conv2D or Conv3D with as many groups as input channels is a depthwise layer too.

    Args:
        path: a `.keras` or `.weights.h5` file of Keras 3, or a legacy `.h5` file of Keras 2 or 3; its content decides.
        classes: what the file does not record: the layer of ours or of Keras, such as "DepthwiseConv3D" or "Conv2D", by
            the name of a custom class, or of a layer as it is returned; both may contain the wildcards `*` and `?`.

    Returns:
        The layers by name. A `.weights.h5` file holds no configurations, nor does any file for layers that a custom
        class made: their `config` is None. Layers that would share a name have their groups' paths in the file.

    Warns:
        UserWarning: layers that look depthwise are left out because the file does not record their class; it names
            them.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is none of these, is damaged, refers to other files, would take more memory than a small
            multiple of its size, or holds arrays that do not fit their layer; the message says what and where.
    """
    path = fspath(path)
    classes = _checked(classes or {})
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(8)
        file.seek(0)
        budget = Budget(path, size)
        if start.startswith(b"PK"):
            data, config = _unpacked(file, path, budget)
            return _read_h5(io.BytesIO(data), config, budget, classes)
        if start == b"\x89HDF\r\n\x1a\n":
            return _read_h5(file, None, budget, classes)
    pickled = "; a pickle is never loaded" if start.startswith(b"\x80") else ""
    raise ValueError(f"{path} must be a .keras archive or an HDF5 file{pickled}")


def _checked(classes: Mapping[str, str]) -> Mapping[str, str]:
    for name, class_name in classes.items():
        if class_name not in (*OURS, *CONVS):
            raise ValueError(f"classes must name one of {', '.join((*OURS, *CONVS))}; got {class_name!r} for {name!r}")
    return classes


def _unpacked(file: Any, path: str, budget: Budget) -> tuple[bytes, dict[str, Any]]:
    """The weights and the configuration in an archive."""
    with damage(path), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
    for name in names:
        for parsed in (PurePosixPath(name), PureWindowsPath(name)):
            if parsed.is_absolute() or parsed.drive or ".." in parsed.parts:
                raise ValueError(f"{path}: the archive's member {name!r} leads outside it")
    contents = []
    for wanted in ("model.weights.h5", "config.json"):
        if names.count(wanted) != 1:
            raise ValueError(f"{path}: a .keras archive must have one member {wanted!r}; got {names}")
        member = members[names.index(wanted)]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: the archive's member {wanted!r} must be stored or deflated")
        budget.take(member.file_size, f"the archive's member {wanted!r}")
        with damage(path), zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            contents.append(stream.read(member.file_size))
            if stream.read(1):  # which also checks the checksum
                raise zipfile.BadZipFile(f"{wanted!r} is larger than it says")
    weights, config = contents
    return weights, _json(config, path)


def _json(text: Any, path: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the model's configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the model's configuration must be a dict; got a {type(config).__name__}")
    level: list[Any] = [config]
    for _ in range(_DEEPEST):
        level = [
            inner
            for node in level
            for inner in (node.values() if isinstance(node, dict) else node)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return config
    raise ValueError(f"{path}: the model's configuration is nested more than {_DEEPEST} deep")


# How deeply a configuration may be nested; a model in a model takes four levels.
_DEEPEST = 200


@dataclass(frozen=True)
class _Found:
    """A layer's arrays in a file, before its class is known.

    Attributes:
        names: its names, as in Entry.
        place: its path in the file.
        hint: the class after which Keras named its group or the layer, or None.
        arrays: its arrays by their names or numbers in the file, in order.
        entry: its entry in the configuration, or None.
    """

    names: Names
    place: str
    hint: str | None
    arrays: Mapping[str, Array]
    entry: Entry | None = None

    @property
    def name(self) -> str:
        return "/".join(self.names)


def _read_h5(
    file: Any, config: dict[str, Any] | None, budget: Budget, classes: Mapping[str, str]
) -> dict[str, SavedLayer]:
    path = budget.path
    opened, top = open_file(file, budget)
    try:
        legacy = config is None and ("model_weights" in top or top.texts("layer_names") is not None)
        if legacy and (text := top.text("model_config")) is not None:
            config = _json(text, path)
        known = [] if config is None else entries(config)
        found = _legacy(top, known, path) if legacy else _native(top, config, known, path)
        return _layers(found, known, budget, classes)
    finally:
        with damage(path):
            opened.close()


def _layers(
    found: list[_Found], known: list[Entry], budget: Budget, classes: Mapping[str, str]
) -> dict[str, SavedLayer]:
    """The layers that ours compute, with a warning about those that may be among them."""
    path = budget.path
    layers: dict[str, SavedLayer] = {}
    unknown: list[str] = []
    read: dict[Names, SavedLayer] = {}
    for layer in found:
        class_name = _class(layer, classes)
        if class_name is None:
            if _looks_depthwise(layer):
                what = layer.entry and layer.entry.class_name
                unknown.append(f"{layer.name} (of class {what})" if what else layer.name)
            continue
        name = layer.name if layer.name not in layers else layer.place
        if name in layers:
            raise ValueError(f"{path}: there are two layers {name!r}")
        saved = _saved(name, class_name, layer, path)
        if saved is not None:
            layers[name] = saved
            read[layer.names] = saved
    weighted = {layer.names for layer in found}
    # Keras writes a shared layer once, under its first name, whose configuration may lack its number.
    by_number: dict[int, Entry] = {}
    by_content: dict[str, list[Entry]] = {}
    for entry in known:
        if entry.is_ours and entry.names in weighted:
            if entry.shared is None:
                by_content.setdefault(entry.content(), []).append(entry)
            else:
                by_number[entry.shared] = entry
    for entry in known:
        if not entry.is_ours or entry.names in weighted:
            continue
        name = "/".join(entry.names)
        first: list[Entry] = []
        if entry.shared is not None:
            first = [by_number[entry.shared]] if entry.shared in by_number else by_content.get(entry.content(), [])
        if len(first) == 1:
            if first[0].names in read:
                layers[name] = replace(read[first[0].names], name=name, config=entry.config)
        elif first:
            unknown.append(f"{name} (shared, and written under another name)")
        elif entry.inside_custom:
            unknown.append(f"{name} (made by a custom class)")
        else:
            raise ValueError(f"{path}: there are no weights for the layer {name!r}")
    if unknown:
        warnings.warn(
            f"{path}: left out because the file does not record their class, though they look depthwise: "
            f"{', '.join(tell(unknown))}. Pass their classes by name, "
            "read_weights(path, classes={'the name': 'DepthwiseConv2D'})",
            stacklevel=4,
        )
    return layers


def _class(layer: _Found, classes: Mapping[str, str]) -> str | None:
    """The class of a layer in a file, if it is one of ours or of Keras' convolutions; else None."""
    given = [layer.name] + (
        [layer.entry.class_name] if layer.entry is not None and layer.entry.custom is not False else []
    )
    if (class_name := named(classes, given)) is not None:
        return class_name
    if layer.entry is not None:
        return layer.entry.class_name if layer.entry.is_ours else None
    if "depthwise_kernel" in layer.arrays:
        rank = len(layer.arrays["depthwise_kernel"].shape) - 2
        class_name = f"{'SeparableConv' if 'pointwise_kernel' in layer.arrays else 'DepthwiseConv'}{rank}D"
        return class_name if class_name in OURS else None
    if layer.hint in LAYERS:
        return layer.hint
    if layer.hint is not None:
        return None
    # If C is not 1, only a depthwise layer has a bias of C*M numbers with a kernel (*window, C, M).
    shapes = [array.shape for array in layer.arrays.values()]
    if len(shapes) == 2 and 3 <= len(shapes[0]) <= 5:
        *_, channels, multiplier = shapes[0]
        if channels > 1 and shapes[1] == (channels * multiplier,):
            return f"DepthwiseConv{len(shapes[0]) - 2}D"
    return None


def _looks_depthwise(layer: _Found) -> bool:
    """Whether a layer of unknown class may be depthwise, by its arrays' shapes."""
    if layer.entry is not None and layer.entry.custom is False:
        return False
    shapes = [array.shape for array in layer.arrays.values()]
    if not shapes or not 3 <= len(shapes[0]) <= 5:
        return False
    *_, channels, multiplier = shapes[0]
    if "depthwise_kernel" in layer.arrays or (len(shapes) == 3 and len(shapes[1]) == len(shapes[0])):
        return True
    if len(shapes) > 2 or (len(shapes) == 2 and shapes[1] != (channels * multiplier,)):
        return False
    if layer.entry is None and layer.hint is not None:  # Keras' convolution, whose groups the file does not record
        return layer.hint in CONVS and channels == 1 and multiplier > 1
    return True


def _native(top: Group, config: dict[str, Any] | None, known: list[Entry], path: str) -> list[_Found]:
    """Each layer in Keras 3's layout."""
    by_names = {entry.names: entry for entry in known}
    structure = {} if config is None else group_names(config)
    found: list[_Found] = []
    seen: set[Group] = set()
    waiting: list[tuple[Group, Names, Names]] = [(top, (), ())]
    while waiting:
        group, names, steps = waiting.pop()
        if group in seen:  # linked to twice
            raise ValueError(f"{path}: the group {group.name!r} occurs more than once")
        seen.add(group)
        members = group.names()
        if "vars" in members:
            variables = group.group("vars")
            if steps:  # not the whole model
                name = variables.text("name") or structure.get(steps, steps[-1])
                names = (*names, name)
            keys = variables.names()
            if keys and steps:
                arrays = {key: variables.array(key) for key in sorted(keys, key=lambda key: (len(key), key))}
                hint = class_of_group(steps[-1], names[-1])
                found.append(_Found(names, "/".join(steps), hint, arrays, by_names.get(names)))
        for key in reversed(members):
            if key == "vars":
                continue
            child = group.child(key)
            if isinstance(child, Group):
                # Keras 2.13 uses another name
                step = "layers" if key == "_layer_checkpoint_dependencies" else key
                waiting.append((child, names, (*steps, step)))
    return found


def _legacy(top: Group, known: list[Entry], path: str) -> list[_Found]:
    """Each layer in the legacy layout, which distinguishes weights by name: "dw/depthwise_kernel:0"."""
    if "model_weights" in top:
        top = top.group("model_weights")
    found: list[_Found] = []
    for group_name in top.texts("layer_names") or ():
        group = top.group(group_name)
        layers: dict[Names, dict[str, Array]] = {}
        for weight in group.texts("weight_names") or ():
            *scopes, parameter = weight.partition(":")[0].split("/")
            layers.setdefault(tuple(scopes), {})[parameter] = group.array(weight)
        found += _matched(group_name, layers, [entry for entry in known if entry.names[0] == group_name], path)
    return found


def _matched(
    group: str, layers: Mapping[Names, Mapping[str, Array]], known: list[Entry], path: str
) -> Iterator[_Found]:
    """The layers of one group of the legacy layout, each with its entry.

    A weight's name begins with the scopes in which its layer was made: name scopes, and some or all enclosing models.
    So an entry's names occur in it in order, after the group's. If the names do not distinguish layers, the layers come
    in the model's order, as Keras reads them.

    Raises:
        ValueError: they come in another order, since Keras writes frozen layers last.
    """
    around = {entry.names[:length] for entry in known for length in range(1, len(entry.names))}
    leaves = [entry for entry in known if entry.names not in around]
    by_name: dict[str, list[Entry]] = {}
    for entry in leaves:
        by_name.setdefault(entry.names[-1], []).append(entry)
    matches: dict[Names, Entry] = {}
    ranked = sorted(
        (
            (in_order(entry.names, (group, *scopes)), scopes, entry)
            for scopes in layers
            for entry in by_name.get(scopes[-1] if scopes else group, ())
        ),
        key=lambda match: match[0],
        reverse=True,
    )
    taken: set[Names] = set()
    for score, scopes, entry in ranked:
        if scopes not in matches and entry.names not in taken:
            rivals = [other for other in by_name[entry.names[-1]] if other.names not in taken]
            alike = [other for other in rivals if in_order(other.names, (group, *scopes)) == score]
            if len({bool(other.config.get("trainable", True)) for other in alike}) > 1:
                names = " or ".join(repr("/".join(other.names)) for other in alike)
                raise ValueError(f"{path}: the weights {'/'.join(scopes)!r} in {group!r} may be those of {names}")
            matches[scopes] = entry
            taken.add(entry.names)
    rest = [scopes for scopes in layers if scopes not in matches]
    free = [entry for entry in leaves if entry.names not in taken and entry.is_ours]
    if len(rest) == len(free) == 1:  # Keras 2 names the weights of a wrapped layer after the wrapper
        matches[rest[0]] = free[0]
    for scopes, arrays in layers.items():
        entry = matches.get(scopes)
        # Keras also writes the scopes around a whole model, which are not part of its layers' names.
        inner = scopes[scopes.index(group) :] if group in scopes else (group, *scopes)
        names = inner if entry is None else entry.names
        hint = class_of_group("", names[-1])
        yield _Found(names, "/".join((group, *scopes)), hint, arrays, entry)


def _saved(name: str, class_name: str, layer: _Found, path: str) -> SavedLayer | None:
    """A layer with its arrays, which are checked against its configuration before they are read.

    Returns:
        The layer; None for a convolution with several channels per group.
    """
    config = None if layer.entry is None else layer.entry.config
    separable = class_name.startswith("Separable")
    parameters = ["depthwise_kernel", "pointwise_kernel", "bias"] if separable else ["kernel", "bias"]
    arrays: dict[str, Array] = {}
    for key, array in layer.arrays.items():
        # Keras 3 numbers the variables in order; Keras 2 names a depthwise layer's kernel depthwise_kernel.
        known = parameters[int(key)] if key.isdecimal() and int(key) < len(parameters) else key
        known = "kernel" if known == "depthwise_kernel" and not separable else known
        if known not in parameters:
            raise ValueError(f"{path}: the layer {name!r} has a variable {key!r}; a {class_name} has {parameters}")
        arrays[known] = array
    shapes = {known: array.shape for known, array in arrays.items()}
    if class_name in CONVS and "kernel" in shapes:
        *window, inputs, outputs = shapes["kernel"] if len(shapes["kernel"]) > 2 else (0, 0, 0)
        groups = config.get("groups", 1) if config is not None else outputs
        if inputs != 1 or groups < 1 or outputs % groups:
            return None
        shapes["kernel"] = (*window, groups, outputs // groups)
    for array in arrays.values():
        array.check()
    _check_shapes(class_name, config, shapes, f"{path}: the layer {name!r}")
    values = {known: arrays[known].read().reshape(shapes[known]) for known in parameters if known in arrays}
    return SavedLayer(name, class_name, config, values)


def _check_shapes(class_name: str, config: Any, shapes: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless arrays of these shapes are the parameters of a layer with this configuration."""
    rank = int(class_name[-2])
    first = next((shapes[known] for known in ("kernel", "depthwise_kernel") if known in shapes), ())
    if config is None or "kernel_size" not in config:
        if len(first) != rank + 2:
            raise ValueError(f"{what}: the kernel of a {class_name} must have {rank + 2} axes; got the shape {first}")
        return
    given = ("kernel_size", "depth_multiplier", "use_bias") + ("filters",) * class_name.startswith("Separable")
    arguments = {key: tuple(v) if isinstance(v := config[key], list) else v for key in given if key in config}
    ours = class_name
    if class_name in CONVS:
        ours = f"Depthwise{class_name}"
        arguments["depth_multiplier"] = first[-1] if first else 1
    try:
        contract = getattr(linen, ours)(**arguments, data_format="channels_last").spec
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    stand_ins = {known: np.broadcast_to(np.float32(0), shape) for known, shape in shapes.items()}
    check_values(contract, channels_of(contract, stand_ins, what), stand_ins, what)
