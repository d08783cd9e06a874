"""The layers' contract, shared by Linen and NNX: arguments, checks, shapes, losses, configuration."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import Array
from jax.typing import ArrayLike

from depthwise_jax import activations, constraints, initializers, regularizers
from depthwise_jax._contract.fields import CAUSAL_INITIALIZER
from depthwise_jax._core import hints
from depthwise_jax._core.layout import DATA_FORMATS, DataFormat, Layout
from depthwise_jax._core.registry import check_depth, closest
from depthwise_jax._core.window import (
    PADDINGS,
    TRANSPOSED_PADDINGS,
    canonical_output_padding,
    canonical_padding,
    per_axis,
)
from depthwise_jax.functional import Request, convolve, convolve_separably, convolve_transposed
from depthwise_jax.initializers import Initializer
from depthwise_jax.sequences import causal_conv1d_state, convolve_causally

Shape = tuple[int, ...]

# The prefix of each parameter's arguments, in Keras' order of the weights.
_DEPTHWISE = {"kernel": "depthwise", "bias": "bias"}
_SEPARABLE = {"depthwise_kernel": "depthwise", "pointwise_kernel": "pointwise", "bias": "bias"}

_DEFAULT_INITIALIZERS = {"depthwise": "glorot_uniform", "pointwise": "glorot_uniform", "bias": "zeros"}


@dataclass(frozen=True)
class Parameter:
    """A layer's parameter.

    Attributes:
        name: its name, "kernel".
        prefix: the prefix of its arguments' names, "depthwise".
        initializer: a function of (key, shape, dtype).
        regularizer: a function from the parameter to its penalty, or None.
        constraint: a function from the parameter to its projection, or None.
    """

    name: str
    prefix: str
    initializer: Initializer
    regularizer: Callable[[Array], Array] | None
    constraint: Callable[[Array], Array] | None

    def initialize(self, key: Array, shape: Shape, dtype: Any) -> Any:
        """The initializer's value, which may be in a metadata box.

        Raises:
            ValueError: the initializer refuses the shape or returns another one.
        """
        if self.prefix == "depthwise" and shape[-2] > 1:
            initializers.warn_of_fans(self.initializer)
        try:
            value = self.initializer(key, shape, dtype)
        except ValueError as error:
            raise ValueError(f"{self.prefix}_initializer: {error}") from error
        for array in jax.tree.leaves(getattr(value, "raw_value", value)):  # of nnx.VariableMetadata
            if array.shape != shape:
                raise ValueError(f"{self.prefix}_initializer must return the shape {shape}; got {array.shape}")
        return value

    def check_shape(self, shape: Shape, expected: Shape) -> None:
        """Raises ValueError if a stored parameter does not have the shape that the input requires."""
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"the parameter {self.name!r} must have the shape {tuple(expected)} to fit the input's channels; got "
                f"{tuple(shape)}{self._hint(shape, expected)}"
            )

    def _hint(self, shape: Shape, expected: Shape) -> str:
        if self.prefix != "depthwise":
            return ""
        return hints.of_kernel(shape, expected[-2], f"params[{self.name!r}]")


class Spec:
    """A layer's arguments, checked and resolved."""

    def __init__(self, layer: str, rank: int, arguments: Mapping[str, Any]):
        """Checks every argument.

        Args:
            layer: the layer's class name, for messages and the configuration.
            rank: the number of spatial axes.
            arguments: all arguments of the layer by name. A separable layer has "filters", a transposed one
                "output_padding", and a causal one neither "strides" nor "padding".

        Raises:
            ValueError, TypeError: an argument is invalid; the message names it, what came and what is expected.
        """
        self.layer = layer
        self.arguments = dict(arguments)
        self.separable = "filters" in arguments
        self.transposed = "output_padding" in arguments
        self.causal = "padding" not in arguments
        self.kernel_size = per_axis(arguments["kernel_size"], rank, "kernel_size")
        self.strides = per_axis(arguments.get("strides", 1), rank, "strides")
        self.dilation_rate = per_axis(arguments["dilation_rate"], rank, "dilation_rate")
        self.padding = canonical_padding(
            arguments.get("padding", "causal"), rank, TRANSPOSED_PADDINGS if self.transposed else PADDINGS
        )
        self.output_padding = canonical_output_padding(
            arguments.get("output_padding"), self.strides, self.dilation_rate
        )
        self.layout = Layout(rank, data_format(arguments["data_format"]))
        (self.depth_multiplier,) = per_axis(arguments["depth_multiplier"], 1, "depth_multiplier")
        (self.filters,) = per_axis(arguments["filters"], 1, "filters") if self.separable else (None,)
        if not isinstance(arguments["use_bias"], bool | np.bool_):
            raise TypeError(f"use_bias must be True or False; got {arguments['use_bias']!r}")
        self.request = Request.of(
            self.layout,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            output_padding=self.output_padding,
            **{name: arguments[name] for name in ("activation", "precision", "implementation", "in_sharding")},
        )
        self.activity_regularizer = _regularizer(arguments["activity_regularizer"], "activity_regularizer")
        names = _SEPARABLE if self.separable else _DEPTHWISE
        self.parameters = tuple(
            self._parameter(name, prefix) for name, prefix in names.items() if name != "bias" or arguments["use_bias"]
        )
        self.dtype = _floating(arguments["dtype"], "dtype")
        self.param_dtype = _floating(arguments["param_dtype"], "param_dtype")
        if self.param_dtype is None:
            raise TypeError("param_dtype must be a floating dtype; got None")

    def values(self) -> dict[str, Any]:
        """The arguments by name as comparable and hashable values; configurations become objects."""
        names = ["kernel_size", "strides", "dilation_rate", "padding", "depth_multiplier", "dtype", "param_dtype"]
        names += ["output_padding"] * self.transposed
        return {
            **resolved(self.arguments),
            **{name: getattr(self, name) for name in names if name in self.arguments},
            "data_format": self.layout.data_format,
        }

    def _parameter(self, name: str, prefix: str) -> Parameter:
        argument = f"{prefix}_initializer"
        identifier = self.arguments[argument]
        if identifier is None:
            identifier = CAUSAL_INITIALIZER if self.causal and prefix == "depthwise" else _DEFAULT_INITIALIZERS[prefix]
        initializer = initializers.get(identifier, argument)
        assert initializer is not None
        return Parameter(
            name,
            prefix,
            initializer,
            _regularizer(self.arguments[f"{prefix}_regularizer"], f"{prefix}_regularizer"),
            constraints.get(self.arguments[f"{prefix}_constraint"], f"{prefix}_constraint"),
        )

    def shapes(self, input_shape: Sequence[int]) -> dict[str, Shape]:
        """The parameters' shapes for an input of this shape, by name.

        Raises:
            ValueError: the input has too few axes, or no channels.
        """
        rank = self.layout.rank
        axes = self.layout.arrange(
            ["*batch"], ["height", "width", "depth"][:rank] if rank > 1 else ["steps"], "channels"
        )
        expected = f"the input of {self.layer} must have shape ({', '.join(axes)}) with at least {rank + 1} axes"
        if len(input_shape) <= rank:
            raise ValueError(f"{expected}; got the shape {tuple(input_shape)}")
        channels = input_shape[self.layout.channels]
        if channels < 1:
            raise ValueError(f"{expected} and at least one channel; got the shape {tuple(input_shape)}")
        outputs = channels * self.depth_multiplier
        depthwise = (*self.kernel_size, channels, self.depth_multiplier)
        if self.filters is None:
            return {"kernel": depthwise, "bias": (outputs,)}
        return {
            "depthwise_kernel": depthwise,
            "pointwise_kernel": (*(1,) * rank, outputs, self.filters),
            "bias": (self.filters,),
        }

    def __call__(self, x: Array, values: Mapping[str, Array], sharded: bool = True, **context: ArrayLike | None) -> Any:
        """The layer's output.

        Args:
            x: the input.
            values: the parameters' values by name.
            sharded: whether x is sharded as `in_sharding` says; an example input for shapes or parameters need not be.
            **context: for a causal layer, the other arguments of `causal_conv1d`.

        Returns:
            The result of `depthwise_conv`, `depthwise_conv_transpose`, `separable_conv` or `causal_conv1d`, computed in
            `dtype`, or without it in the dtype to which the input and the parameters promote.
        """
        operands = promote_dtype(x, *(values[p.name] for p in self.parameters), dtype=self.dtype)
        request = self.request if sharded else replace(self.request, in_sharding=None)
        if self.causal:
            # The state holds x as it came.
            return convolve_causally(request, x, *operands[1:], **context, operand_dtype=operands[0].dtype)
        if self.separable:
            return convolve_separably(request, *operands)
        return (convolve_transposed if self.transposed else convolve)(request, *operands)

    def initial_state(self, input_shape: Sequence[int], dtype: Any = None) -> Array:
        """A causal layer's state before the first token of an input of this shape: zeros, in the layer's dtype."""
        self.shapes(input_shape)
        return causal_conv1d_state(
            jnp.zeros(self.layout.arrange(input_shape[:-2], (0,), input_shape[self.layout.channels])),
            kernel_size=self.kernel_size[0],
            dilation_rate=self.dilation_rate[0],
            data_format=self.layout.data_format,
        ).astype(dtype or self.dtype or self.param_dtype)

    def activity_loss(self, y: Array) -> Array:
        """The activity_regularizer's penalty on the output, divided by the size of all batch axes together."""
        assert self.activity_regularizer is not None
        batch = math.prod(y.shape[: -self.layout.rank - 1])  # an int, or symbolic under jax.export
        if isinstance(batch, int) and batch == 0:
            return jnp.zeros(())
        return regularizers.penalty(self.activity_regularizer, y) / batch

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The output's shape.

        Args:
            input_shape: the input's shape, with None for every unknown axis.

        Returns:
            The output's shape, with None for every axis that depends on an unknown one.

        Raises:
            ValueError: the layer cannot take such an input, or the output would be empty.
            TypeError: an axis is neither an integer nor None.
        """
        sizes = tuple(input_shape)
        if not all(size is None or (isinstance(size, int | np.integer) and size >= 0) for size in sizes):
            raise TypeError(f"input_shape must hold integers and None; got {input_shape!r}")
        # Stand-ins for unknown axes: the window's length and the padding, which give a non-empty output; two channels,
        # which glu can halve.
        pads = ((0, 0),) * self.layout.rank if isinstance(self.padding, str) else self.padding
        window = [
            (k - 1) * d + 1 + low + high
            for k, d, (low, high) in zip(self.kernel_size, self.dilation_rate, pads, strict=True)
        ]
        stand_ins = self.layout.arrange([1] * (len(sizes) - self.layout.rank - 1), window, 2)
        known = [stand_in if size is None else int(size) for size, stand_in in zip(sizes, stand_ins, strict=False)]
        shapes = self.shapes(known)
        dtype = self.dtype or self.param_dtype
        values = {p.name: jax.ShapeDtypeStruct(shapes[p.name], dtype) for p in self.parameters}
        call = functools.partial(self, sharded=False)
        y = jax.eval_shape(call, jax.ShapeDtypeStruct(tuple(known), dtype), values)
        output = list((y[0] if self.causal else y).shape)
        for axis, size in enumerate(sizes):
            if size is None and not (self.separable and axis - len(sizes) == self.layout.channels):
                output[axis] = None
        return tuple(output)

    def get_config(self, name: str | None) -> dict[str, Any]:
        """Keras' configuration of the layer.

        Args:
            name: the layer's name, or None.

        Raises:
            ValueError: Keras has no counterpart for one of the arguments.
        """
        if self.layout.rank == 3 or self.transposed or self.causal:
            raise ValueError(f"Keras has no {self.layer}, so this layer cannot be serialised for Keras")
        if self.padding not in ("valid", "same"):
            raise ValueError(
                f"padding must be 'valid' or 'same' for a Keras configuration; got {self.arguments['padding']!r}"
            )
        for argument in ("precision", "implementation", "in_sharding"):
            if self.arguments[argument] is not None:
                raise ValueError(f"{argument} must be None for a Keras configuration; got {self.arguments[argument]!r}")
        config = {
            "trainable": True,
            "dtype": {
                "module": "keras",
                "class_name": "DTypePolicy",
                "config": {"name": _policy(self.dtype, self.param_dtype)},
                "registered_name": None,
            },
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "depth_multiplier": self.depth_multiplier,
            "data_format": self.layout.data_format,
            "dilation_rate": self.dilation_rate,
            "activation": activations.serialize(self.arguments["activation"]),
            "use_bias": bool(self.arguments["use_bias"]),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer, "activity_regularizer"),
        }
        if name is not None:
            config["name"] = name
        if self.separable:
            config["filters"] = self.filters
        window_axes = tuple(range(self.layout.rank))
        for parameter_name, prefix in (_SEPARABLE if self.separable else _DEPTHWISE).items():
            parameter = self._parameter(parameter_name, prefix)
            axes = () if prefix == "bias" else window_axes
            config |= {
                f"{prefix}_initializer": initializers.serialize(parameter.initializer, f"{prefix}_initializer", axes),
                f"{prefix}_regularizer": regularizers.serialize(parameter.regularizer, f"{prefix}_regularizer"),
                f"{prefix}_constraint": constraints.serialize(parameter.constraint, f"{prefix}_constraint", axes),
            }
        return config


def check_spelling(layer: str, valid: Sequence[str], given: Iterable[str]) -> None:
    """Raises TypeError for arguments that are another library's names for ours."""
    message = hints.of_arguments(layer, [name for name in given if name not in valid])
    if message is not None:
        raise TypeError(message)


def data_format(value: Any) -> DataFormat:
    """A data_format argument in lower case.

    Raises:
        ValueError: it is neither "channels_last" nor "channels_first", in lower or upper case.
    """
    if not isinstance(value, str) or (name := value.lower()) not in DATA_FORMATS:
        raise ValueError(f"data_format must be None or one of {DATA_FORMATS}; got {value!r}")
    return name


def serialize(layer: Any) -> dict[str, Any]:
    """The result of Keras' `serialize_keras_object` for one of our layers that has a Keras configuration."""
    return {
        "module": "keras.layers",
        "class_name": type(layer).__name__,
        "config": layer.get_config(),
        "registered_name": None,
    }


def arguments_from_config(layer: str, valid: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a Keras configuration describes.

    Args:
        layer: the class name of the layer to make.
        valid: the names of its arguments.
        config: the result of Keras' `layer.get_config()` or `serialize_keras_object(layer)`, of Keras 3 or Keras 2.

    Returns:
        The arguments by name, with initializers, regularizers and constraints as objects. Arguments that `config` does
        not name are left out.

    Raises:
        ValueError: the configuration is of another layer, or has a key that the layer does not.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict; got {type(config).__name__}")
    check_depth(config, "config")
    if "class_name" in config:
        name = str(config["class_name"]).replace("Convolution", "Conv")  # Keras uses both names
        if name != layer or config.get("module") not in (None, "keras.layers") or config.get("registered_name"):
            described = {key: config.get(key) for key in ("module", "class_name", "registered_name")}
            raise ValueError(f"config must be that of a built-in {layer}; got that of {described}")
        if not isinstance(config.get("config"), Mapping):
            raise ValueError(f"config with a 'class_name' must have a dict as its 'config'; got {dict(config)!r}")
        config = config["config"]
    arguments = dict(config)
    if arguments.pop("groups", 1) != 1:
        raise ValueError(f"groups must be 1, since each channel is its own group; got {config['groups']!r}")
    for what in ("initializer", "regularizer", "constraint"):
        # Keras 2 also wrote its base class's; if it wrote both, it used the depthwise one.
        value = arguments.pop(f"kernel_{what}", None)
        if value is not None:
            arguments.setdefault(f"depthwise_{what}", value)
    arguments.pop("batch_input_shape", None)  # Keras 2's, for the model's input rather than the layer
    if not arguments.pop("trainable", True):
        warnings.warn(
            "trainable=False has no counterpart in a Flax layer: exclude its parameters from the updates with "
            "optax.masked or optax.partition",
            stacklevel=3,
        )
    unknown = sorted(set(arguments) - {"name", *valid})
    if unknown:
        raise ValueError(f"{layer} has no argument {unknown[0]!r}; {closest(str(unknown[0]), valid)}")
    if "dtype" in arguments:
        arguments |= _dtypes(arguments["dtype"])
    return resolved(arguments)


def resolved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name: names and configurations become objects (for an activation, a name), and lists tuples."""
    values = dict(arguments)
    for name, value in arguments.items():
        kind = name.rpartition("_")[2]
        if kind in _RESOLVERS:
            values[name] = _RESOLVERS[kind](value, name)
        elif name == "activation" and isinstance(value, Mapping):
            values[name] = activations.serialize(value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return values


_RESOLVERS = {
    "initializer": initializers.get,
    "regularizer": regularizers.get,
    "constraint": constraints.get,
}


def _regularizer(identifier: Any, argument: str) -> Callable[[Array], Array] | None:
    regularizer = regularizers.get(identifier, argument)
    if isinstance(regularizer, regularizers.OrthogonalRegularizer):
        raise ValueError(
            f"{argument}: OrthogonalRegularizer needs a matrix; convolution kernels and biases are not matrices"
        )
    return regularizer


def _floating(dtype: Any, argument: str) -> Any:
    if dtype is None:
        return None
    try:
        canonical = jnp.dtype(dtype)
    except (TypeError, ValueError):
        canonical = None
    if canonical is None or not jnp.issubdtype(canonical, jnp.inexact):
        raise TypeError(f"{argument} must be a floating dtype; got {dtype!r}")
    return canonical


_MIXED = {"mixed_float16": jnp.float16, "mixed_bfloat16": jnp.bfloat16}
_PLAIN = ("float16", "bfloat16", "float32", "float64")


def _policy(dtype: Any, param_dtype: Any) -> str:
    """The name of Keras' dtype policy."""
    if dtype is None or dtype == param_dtype:
        name = param_dtype.name
    else:
        name = f"mixed_{dtype.name}" if param_dtype == jnp.float32 else ""
    if name not in _PLAIN and name not in _MIXED:
        raise ValueError(
            f"for a Keras configuration dtype and param_dtype must both be in {_PLAIN}, or float16 or bfloat16 with "
            f"param_dtype=float32; got dtype={dtype}, param_dtype={param_dtype}"
        )
    return name


def _dtypes(policy: Any) -> dict[str, Any]:
    """The arguments that a Keras dtype policy describes."""
    name = policy
    if isinstance(policy, Mapping) and policy.get("class_name") in ("DTypePolicy", "Policy"):
        inner = policy.get("config", {})
        name = inner.get("name") if isinstance(inner, Mapping) else policy
    if name is None or name == "float32":
        return {"dtype": None}
    if isinstance(name, str) and name in _MIXED:
        return {"dtype": _MIXED[name]}
    if isinstance(name, str) and name in _PLAIN:
        return {"dtype": jnp.dtype(name), "param_dtype": jnp.dtype(name)}
    raise ValueError(f"dtype must be one of Keras' policies {(*_PLAIN, *_MIXED)}; got {policy!r}")
