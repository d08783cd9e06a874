"""Converts live and saved Keras layers into ours, every depthwise layer of a live model, and our layers into Keras'."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from depthwise_jax import activations, constraints, initializers, linen, regularizers
from depthwise_jax._contract import fields, spec
from depthwise_jax._core import registry
from depthwise_jax.interop.keras.config import CONVS, LAYERS, Names, named
from depthwise_jax.interop.modules import Converted, Framework, channels_of, make, overridden, parts, real_array

OURS = tuple(f"{kind}Conv{rank}D" for kind in ("Depthwise", "Separable") for rank in (1, 2, 3))

# What a subclass of Keras' layers may redefine without changing the computation.
_HARMLESS = frozenset({"build", "get_config", "from_config", "get_build_config", "build_from_config", "name"})
_HARMLESS |= {"_tracker", "rank"}
_KINDS = ("initializer", "regularizer", "constraint")


@dataclass(frozen=True)
class SavedLayer:
    """A layer from a file.

    Attributes:
        name: its name, after those of the enclosing models and wrappers: "encoder/dw".
        class_name: one of LAYERS; "Conv1D", "Conv2D" or "Conv3D" with groups; or the class passed to `read_weights`.
        config: the result of Keras' `get_config`; None if the file holds only weights.
        values: its parameters' arrays, by our names and in our shapes: a Conv's kernel is `(*window, C, M)`.
    """

    name: str
    class_name: str
    config: Mapping[str, Any] | None
    values: Mapping[str, np.ndarray]


def from_keras(
    layer: Any, *, framework: Framework = "linen", as_class: str | None = None, **arguments: Any
) -> tuple[Any, Any]:
    """Converts a Keras layer into the layer of ours that computes the same.

    A custom constraint, regularizer, activation or initializer of a live layer is kept if Keras runs on JAX: it is
    called with JAX arrays. A custom initializer draws from Keras' seed, not from a key.

    Args:
        layer: a built DepthwiseConv1D, DepthwiseConv2D, SeparableConv1D or SeparableConv2D of Keras 3, or a Conv1D,
            Conv2D or Conv3D with as many groups as input channels, on any backend; or a SavedLayer. A subclass may add
            anything that does not change the computation.
        framework: "linen" or "nnx", the kind of layer to make.
        as_class: the name of our layer to which a custom class corresponds, "DepthwiseConv3D"; its arguments and
            weights are read as that layer's.
        **arguments: arguments of our layer that replace the Keras layer's, such as `activation=jax.nn.silu` or
            `depthwise_constraint=NonNeg()` for custom ones.

    Returns:
        `(module, params)`, with all values unchanged. A Conv's initializer, regularizer and constraint see our kernel
        in the Conv's shape.

    Raises:
        TypeError: it is another object, or a subclass that overrides `call` or another method.
        ValueError: the layer is not built or not depthwise, or ours cannot express a part of it. The message names the
            part, and the argument that can replace it.
    """
    if isinstance(layer, SavedLayer):
        class_name, values = as_class or layer.class_name, dict(layer.values)
        if class_name not in (*OURS, *CONVS):
            raise TypeError(f"{layer.name}: class_name must be one of {', '.join((*OURS, *CONVS))}; got {class_name!r}")
        if layer.config is None:
            raise ValueError(
                f"{layer.name}: the file holds no configuration; add one with dataclasses.replace(saved, config=...)"
            )
        config = dict(layer.config)
    else:
        class_name = as_class or _stock_name(layer)
        config = _config(layer, class_name, arguments)
        values = _values(layer, class_name)
    name = layer.name
    values = {key: real_array(value, f"{name}: the parameter {key!r}") for key, value in values.items()}
    ours = f"Depthwise{class_name}" if class_name in CONVS else class_name
    if class_name in CONVS:
        config = _depthwise(config, values["kernel"])
    config = {key: value for key, value in config.items() if key not in arguments}
    config = _with_parts(config, name)
    try:
        found = spec.arguments_from_config(ours, fields.names(getattr(linen, ours)), config)
    except (TypeError, ValueError) as error:
        raise registry.named(error, name) from error
    if class_name in CONVS:
        found = _for_grouped_kernel(found, int(ours[-2]))
    return make(ours, found | arguments, values, framework, name)


def layers_from_keras(
    model: Any, *, framework: Framework = "linen", classes: Mapping[str, str] | None = None
) -> Converted:
    """Converts every depthwise and separable layer of a Keras model as `from_keras` does, by name.

    Args:
        model: a built model or layer of Keras 3, on any backend.
        framework: "linen" or "nnx", the kind of layers to make.
        classes: the layers of ours to which custom classes correspond, as for `read_weights`: by the name of a class or
            of a layer, both with the wildcards `*` and `?`.

    Returns:
        A dict of `(module, params)` by name, after those of the enclosing models and wrappers: "encoder/dw". Its
        attribute `skipped` has the reason why a layer that looks depthwise was skipped. The dict prints one line each.

    Raises:
        TypeError: it is not a Keras layer.
    """
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a model or layer of Keras; got {type(model).__name__}")
    converted, skipped = {}, {}
    for names, layer in _walk(model, (), ()):
        name = "/".join(names)
        while name in converted or name in skipped:
            name += "'"
        as_class = named(classes or {}, (name, type(layer).__name__))
        if as_class is None and not _looks_depthwise(layer):
            continue
        try:
            converted[name] = from_keras(layer, framework=framework, as_class=as_class)
        except (TypeError, ValueError) as error:
            skipped[name] = str(error).removeprefix(f"{layer.name}: ")
    return Converted(converted, skipped)


def to_keras(module: Any, params: Mapping[str, Any] | None = None) -> Any:
    """The Keras layer that computes what a layer of ours does: the way back of `from_keras`.

    Args:
        module: a 1D or 2D layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; an NNX layer has its own.

    Returns:
        A built keras.layers layer.

    Raises:
        TypeError: it is not one of our layers, or its parameters are missing or given without need.
        ValueError: Keras has no equivalent of one of the arguments, or the parameters do not fit.
    """
    import keras

    contract, values = parts(module, params)
    config = contract.get_config(getattr(module, "name", None))
    layer = getattr(keras.layers, contract.layer).from_config(config)
    channels = channels_of(contract, values, contract.layer)
    layer.build(contract.layout.arrange((None,), (None,) * contract.layout.rank, channels))
    layer.set_weights([np.asarray(value) for value in values.values()])
    return layer


def _walk(layer: Any, names: Names, around: tuple[Any, ...]) -> Iterator[tuple[Names, Any]]:
    """Every layer in a layer, with its names; a shared one at each of its places."""
    yield names or (layer.name,), layer
    inside = (*around, layer)
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if not any(child is outer for outer in inside):
            yield from _walk(child, (*names, child.name), inside)


def _looks_depthwise(layer: Any) -> bool:
    """Whether a live layer is one that ours compute, or of an unknown class with similar weights."""
    stock = _stock(layer)
    if stock is not None:
        return stock.__name__ in LAYERS or layer.groups > 1
    if type(layer).__module__.split(".")[0] == "keras":
        return False
    own = layer._trainable_variables + layer._non_trainable_variables
    shapes: list[tuple[int, ...]] = [tuple(weight.shape) for weight in own]
    if not shapes or not 3 <= len(shapes[0]) <= 5:
        return False
    *_, channels, multiplier = shapes[0]
    return shapes[1:] in ([], [(channels * multiplier,)])


def _stock(layer: Any) -> type | None:
    """The Keras class that a live layer is an instance of, if it is one that ours compute."""
    layers = getattr(sys.modules.get("keras"), "layers", None)
    classes = [getattr(layers, name) for name in (*LAYERS, *CONVS)] if layers is not None else []
    return next((cls for cls in classes if isinstance(layer, cls)), None)


def _stock_name(layer: Any) -> str:
    """The name of that class, if the layer computes what the class does."""
    stock, cls = _stock(layer), type(layer)
    if stock is None:
        raise TypeError(
            f"layer must be one of Keras' {', '.join((*LAYERS, *CONVS))}, or a SavedLayer; got {cls.__module__}."
            f"{cls.__qualname__}. For a custom class that computes the same as one of ours pass the name of ours, "
            "as_class='DepthwiseConv2D'"
        )
    what = overridden(cls, stock, _HARMLESS) or ("call" if "call" in vars(layer) else None)
    if what is not None:
        raise TypeError(
            f"{layer.name}: {cls.__module__}.{cls.__qualname__} overrides {what} of Keras' {stock.__name__}; if our "
            f"layer computes the same, pass as_class={stock.__name__!r}"
        )
    return stock.__name__


def _config(layer: Any, class_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A live layer's configuration, read from the layer: Keras' own would marshal its lambdas."""
    is_conv = class_name in CONVS
    names = [
        *fields.names(getattr(linen, f"Depthwise{class_name}" if is_conv else class_name)),
        *(f"kernel_{kind}" for kind in _KINDS),
    ]
    names += ["filters", "groups"] * is_conv
    replaced = {*given, *(name.replace("depthwise_", "kernel_") for name in given)}
    replaced |= {"dtype", "param_dtype", "precision", "implementation", "in_sharding"}  # of Flax
    config = {name: getattr(layer, name) for name in names if name not in replaced and hasattr(layer, name)}
    config |= {name: _part(layer, name, value) for name, value in config.items() if _is_part(name)}
    return config | {"name": layer.name, "trainable": layer.trainable, "dtype": layer.dtype_policy.name}


def _is_part(argument: str) -> bool:
    """Whether an argument is an initializer, a regularizer, a constraint or an activation."""
    return argument.rpartition("_")[2] in (*_KINDS, "activation")


def _part(layer: Any, argument: str, value: Any) -> Any:
    """A live layer's initializer, regularizer, constraint or activation: Keras' configuration, or a callable."""
    if value is None or isinstance(value, str | Mapping):
        return value
    kind = argument.rpartition("_")[2]
    keras = sys.modules["keras"]
    if str(getattr(value, "__module__", "")).split(".")[0] == "keras":
        config = getattr(keras, f"{kind}s").serialize(value)
        try:
            spec.resolved({argument: config})
        except (TypeError, ValueError):
            pass  # Keras has it, and we do not
        else:
            return config
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"{layer.name}: {argument}={getattr(value, '__qualname__', type(value).__qualname__)} is not one of "
            f"depthwise_jax, and runs on Keras' backend {keras.backend.backend()}; pass ours instead: "
            f"from_keras(layer, {argument}=...)"
        )
    return _KeptInitializer(value) if kind == "initializer" else value


@dataclass(frozen=True)
class _KeptInitializer:
    """A Keras initializer as a Flax initializer that ignores its key."""

    function: Callable[..., Any]

    def __call__(self, key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        return jnp.asarray(self.function(shape, dtype=jnp.dtype(dtype).name), dtype)


def _values(layer: Any, class_name: str) -> dict[str, Any]:
    """A live layer's weights by our names and in our shapes."""
    to_numpy = sys.modules["keras"].ops.convert_to_numpy  # the layer has come from it, on whatever backend
    separable = class_name.startswith("Separable")
    names = ("depthwise_kernel", "pointwise_kernel", "bias") if separable else ("kernel", "bias")
    weights = list(layer.weights)
    found = {name: value for name in names if (value := getattr(layer, name, None)) is not None}
    if "kernel" in names and "kernel" not in found and hasattr(layer, "depthwise_kernel"):  # as Keras 2 called it
        found = {"kernel": layer.depthwise_kernel, **found}
    if len(weights) != len(found):
        raise ValueError(
            f"{layer.name}: a {class_name} has the weights {list(found) or list(names)}; this layer has "
            f"{[weight.path for weight in weights]}"
        )
    values = {name: to_numpy(getattr(value, "value", value)) for name, value in found.items()}
    if class_name in CONVS:
        if "kernel" not in values:
            raise ValueError(f"{layer.name} has no weights; build it first")
        *window, inputs, outputs = values["kernel"].shape
        if inputs != 1 or outputs % layer.groups:
            raise ValueError(
                f"{layer.name} is not depthwise: groups must be the number of input channels; got "
                f"groups={layer.groups}, {layer.groups * inputs} input channels and filters={outputs}"
            )
        values["kernel"] = values["kernel"].reshape(*window, layer.groups, outputs // layer.groups)
    return values


def _with_parts(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with its initializers, regularizers, constraints and activation made.

    Raises:
        ValueError: one of them is not among ours; the message names the argument that can replace it.
    """
    made = dict(config)
    for key, value in config.items():
        if not _is_part(key):
            continue
        try:
            made |= spec.resolved({key: value})
            if key == "activation" and isinstance(value, str):
                activations.get(value)
        except (TypeError, ValueError) as error:
            argument = key.replace("kernel_", "depthwise_")
            raise ValueError(f"{name}: {error}. Pass one of ours instead: from_keras(layer, {argument}=...)") from error
    return made


def _depthwise(config: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """A Conv's configuration as a depthwise layer's, with a kernel (*window, C, M)."""
    ours = {key.replace("kernel_", "depthwise_") if _is_part(key) else key: value for key, value in config.items()}
    for key in ("groups", "filters"):
        ours.pop(key, None)
    return ours | {"depth_multiplier": np.shape(kernel)[-1]}


def _for_grouped_kernel(arguments: dict[str, Any], rank: int) -> dict[str, Any]:
    """The parts that act on a Conv's kernel (*window, 1, C*M), for ours, (*window, C, M): same numbers, same order."""
    found = dict(arguments)
    for kind in _KINDS:
        part = arguments.get(f"depthwise_{kind}")
        if part is not None:
            found[f"depthwise_{kind}"] = _for_kernel(part, rank)
    return found


def _for_kernel(part: Any, rank: int) -> Any:
    window = tuple(range(rank))
    if hasattr(part, "fans"):  # draws its numbers in order, whatever the shape, but counts with it
        fans = (*window, rank), (*window, rank + 1)
        given = fans if part.input_axes is None or part.output_axes is None else (part.input_axes, part.output_axes)
        mapped = [_our_axes(axes, rank) for axes in given]
        return dataclasses.replace(part, input_axes=mapped[0], output_axes=mapped[1])
    if isinstance(part, constraints.MaxNorm | constraints.MinMaxNorm | constraints.UnitNorm) and part.axis is not None:
        axes: Any = _our_axes(part.axis if isinstance(part.axis, tuple) else (part.axis,), rank)
        if axes:
            return dataclasses.replace(part, axis=axes if len(axes) > 1 else axes[0])
    return part if isinstance(part, _ELEMENTWISE) else _OnConvKernel(part)


_ELEMENTWISE = (initializers.Zeros, initializers.Ones, initializers.Constant, constraints.NonNeg)
_ELEMENTWISE += (initializers.RandomNormal, initializers.RandomUniform, initializers.TruncatedNormal)
_ELEMENTWISE += (regularizers.L1, regularizers.L2, regularizers.L1L2)


def _our_axes(axes: Any, rank: int) -> tuple[int, ...]:
    """A Conv kernel's axes in ours: its input axis has size one, and its output axis is our last two."""
    found: list[int] = []
    for axis in sorted(axis % (rank + 2) for axis in axes):
        found += [axis] if axis < rank else [rank, rank + 1] * (axis == rank + 1)
    return tuple(found)


@dataclass(frozen=True)
class _OnConvKernel:
    """A function of a Conv's kernel, or of a key and its shape, as a function of ours."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        if len(args) == 1:  # a regularizer or a constraint
            (kernel,) = args
            shape = kernel.shape
            result = self.function(kernel.reshape(_conv_shape(shape)))
            return result.reshape(shape) if jnp.ndim(result) else result
        key, shape, *dtype = args
        return self.function(key, _conv_shape(shape), *dtype).reshape(shape)


def _conv_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], 1, shape[-2] * shape[-1])
