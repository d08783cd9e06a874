"""Finds the depthwise layers in a model's configuration, with their names and those of the enclosing models."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Names = tuple[str, ...]

LAYERS = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
# Depthwise if it has as many groups as input channels.
CONVS = ("Conv1D", "Conv2D", "Conv3D")
# Built into Keras, with weights that look like those of a depthwise layer; older files do not say what is built in.
_BUILT_IN = frozenset(
    {f"{kind}{rank}D{suffix}" for kind in ("Conv", "Convolution") for rank in (1, 2, 3) for suffix in ("", "Transpose")}
    | {"LocallyConnected1D", "LocallyConnected2D", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "EinsumDense"}
    | {"Functional", "Model", "Sequential", "TimeDistributed", "Bidirectional", "SpectralNormalization", "Lambda"}
)

# Entries of a configuration whose named objects are not layers.
_ELSEWHERE = ("dtype", "compile_config", "build_config", "inbound_nodes")


@dataclass(frozen=True)
class Entry:
    """A layer or model in a configuration.

    Attributes:
        names: its name after those of the enclosing models and wrappers, without the whole model's.
        class_name: its class.
        config: its own configuration.
        custom: whether its class is not built into Keras; None if the configuration does not tell.
        inside_custom: whether an enclosing layer's class is not built in, which may use this layer in any way.
        shared: Keras' name for an object that occurs more than once; its first occurrence may lack it, and has None.
    """

    names: Names
    class_name: str
    config: dict[str, Any]
    custom: bool | None
    inside_custom: bool
    shared: int | None

    @property
    def is_ours(self) -> bool:
        """Whether it is one of LAYERS, or a convolution with groups."""
        if self.custom:
            return False
        groups = self.config.get("groups", 1)
        return self.class_name in LAYERS or (self.class_name in CONVS and isinstance(groups, int) and groups > 1)

    def content(self) -> str:
        """Its configuration without Keras' numbers of objects."""
        return json.dumps([self.class_name, _without_numbers(self.config)], sort_keys=True)


def entries(config: dict[str, Any]) -> list[Entry]:
    """Every named layer and model in a configuration, in order."""
    found: list[Entry] = []
    # Without recursion: a configuration may be nested as deeply as JSON allows.
    waiting: list[tuple[Any, Names, bool]] = [(config, (), False)]
    while waiting:
        node, names, inside_custom = waiting.pop()
        if isinstance(node, dict):
            class_name, inner = node.get("class_name"), node.get("config")
            if isinstance(class_name, str) and isinstance(inner, dict) and isinstance(inner.get("name"), str):
                names = (*names, inner["name"])
                custom = _is_custom(node, class_name)
                shared = node.get("shared_object_id")
                found.append(
                    Entry(
                        names[1:] or names,
                        class_name.rpartition(">")[2].replace("Convolution", "Conv"),  # Keras writes both
                        inner,
                        custom,
                        inside_custom,
                        shared if isinstance(shared, int) else None,
                    )
                )
                inside_custom = inside_custom or custom is not False
            node = [value for key, value in node.items() if key not in _ELSEWHERE]
        if isinstance(node, list):
            waiting += [(value, names, inside_custom) for value in reversed(node) if isinstance(value, dict | list)]
    return found


def _without_numbers(value: Any) -> Any:
    """A configuration without Keras' names of objects."""
    if isinstance(value, dict):
        return {key: _without_numbers(inner) for key, inner in value.items() if key != "shared_object_id"}
    return [_without_numbers(inner) for inner in value] if isinstance(value, list) else value


def _is_custom(node: dict[str, Any], class_name: str) -> bool | None:
    if node.get("registered_name") not in (None, class_name) or ">" in class_name:
        return True
    module = node.get("module")
    if isinstance(module, str):
        return module.split(".")[0] != "keras"
    if "module" in node and "registered_name" in node:  # Keras 3, which names its own modules
        return True
    return False if class_name in _BUILT_IN or class_name in LAYERS else None


def group_names(config: dict[str, Any]) -> dict[Names, str]:
    """The layers' names by the groups that Keras writes them into, for files whose groups lack the names.

    Keras names a group after the layer's class, and numbers the groups of one class.
    """
    found: dict[Names, str] = {}
    waiting: list[tuple[Any, Names]] = [(config, ())]
    while waiting:
        node, steps = waiting.pop()
        if not isinstance(node, dict) or not isinstance(inner := node.get("config"), dict):
            continue
        if isinstance(inner.get("name"), str):
            found[steps] = inner["name"]
        waiting.append((inner.get("layer"), (*steps, "layer")))  # a wrapper's
        layers = inner.get("layers")
        numbers: dict[str, int] = {}
        for layer in layers if isinstance(layers, list) else ():
            class_name = layer.get("class_name") if isinstance(layer, dict) else None
            if isinstance(class_name, str):
                step = _snake_case(class_name)
                number = numbers[step] = numbers.get(step, -1) + 1
                waiting.append((layer, (*steps, "layers", f"{step}_{number}" if number else step)))
    return found


def class_of_group(step: str, name: str) -> str | None:
    """The class after which Keras named a group, or else a layer, such as "depthwise_conv2d_1"; None if it did not."""
    for given in (step, name):
        match = re.fullmatch(r"(depthwise_|separable_)?conv([123])d(_transpose)?(_\d+)?", given)
        if match:
            kind = (match[1] or "").rstrip("_").title()
            class_name = f"{kind}Conv{match[2]}D{'Transpose' if match[3] else ''}"
            return class_name if class_name in LAYERS or class_name in _BUILT_IN else None
    return None


def _snake_case(class_name: str) -> str:
    """Keras' name of a group or layer for a class."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()


def named(classes: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The class to which a mapping assigns one of several names, by a key with wildcards; None if no key fits."""
    return next((cls for key, cls in classes.items() if any(fnmatchcase(name, key) for name in names)), None)


def in_order(shorter: Names, longer: Names) -> int:
    """The length of the longest common subsequence of two lists of names."""
    lengths = [0] * (len(longer) + 1)
    for name in shorter:
        previous = 0
        for index, other in enumerate(longer, 1):
            kept = lengths[index]
            lengths[index] = previous + 1 if name == other else max(kept, lengths[index - 1])
            previous = kept
    return lengths[-1]


def tell(names: list[str], limit: int = 5) -> Iterator[str]:
    """The first few names, for a message."""
    yield from map(repr, names[:limit])
    if len(names) > limit:
        yield f"{len(names) - limit} more"
