"""Makes one of our layers with its parameters, for Linen or NNX, and takes it apart."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from depthwise_jax import linen
from depthwise_jax._contract.spec import Spec
from depthwise_jax._core.registry import named

Framework = Literal["linen", "nnx"]
FRAMEWORKS: tuple[Framework, ...] = get_args(Framework)

# Attributes that every class has and that compute nothing.
_BOOKKEEPING = frozenset(
    {"__init__", "__repr__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__"}
    | {"__slots__", "__orig_bases__", "__parameters__", "__abstractmethods__", "_abc_impl", "__type_params__"}
    | {"__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__", "__replace__"}
)


class Converted(dict[str, Any]):
    """The converted parts of a whole model by path, and the reasons for those that were skipped.

    Attributes:
        skipped: the reason why a convolution was skipped, by its path.
    """

    def __init__(self, converted: Mapping[str, Any], skipped: Mapping[str, str]):
        super().__init__(converted)
        self.skipped = dict(skipped)

    def __str__(self) -> str:
        """A line for each convolution, converted or skipped."""
        lines = [f"{path}: converted" for path in self] + [
            f"{path}: skipped: {why}" for path, why in self.skipped.items()
        ]
        return "\n".join(lines) or "no depthwise convolution"


def overridden(cls: type, stock: type, harmless: Collection[str] = ()) -> str | None:
    """What a subclass redefines of a library's class, for a message; None if it computes what the class does.

    Args:
        cls: the subclass.
        stock: the library's class.
        harmless: names that a subclass may redefine without changing what is computed.
    """
    for base in cls.__mro__:
        if base in stock.__mro__:
            continue
        for name in vars(base):
            if name not in _BOOKKEEPING and name not in harmless and hasattr(stock, name):
                return f"{base.__name__}.{name}"
    return None


def real_array(value: Any, what: str) -> Any:
    """An array in the machine's byte order, in a floating dtype that JAX has.

    Raises:
        ValueError: it does not hold real floating-point numbers; the message begins with `what`.
    """
    if value.dtype == np.longdouble and np.longdouble != np.float64:
        raise ValueError(
            f"{what} is {value.dtype} (long double), which JAX does not have; convert it to float64 or float32"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{what} must hold real floating-point numbers; got {value.dtype}")
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(
            f"{what} is {value.dtype}, which JAX supports only with jax_enable_x64; enable it or convert to float32"
        )
    return value


def make(layer: str, arguments: Mapping[str, Any], values: Mapping[str, Any], framework: Framework, what: str) -> Any:
    """Makes a layer and its parameters.

    Args:
        layer: the layer's class name.
        arguments: its arguments, without `in_features`.
        values: its parameters' values by name, as arrays.
        framework: "linen" or "nnx".
        what: what the messages call the layer.

    Returns:
        (module, params): `params` is a dict of the values as JAX arrays.

    Raises:
        ValueError: framework is neither, an argument is invalid for the layer, or the values do not fit it.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework must be one of {FRAMEWORKS}; got {framework!r}")
    try:
        module = getattr(linen, layer)(**arguments)
    except (TypeError, ValueError) as error:
        raise named(error, what) from error
    params = {name: jnp.asarray(real_array(value, f"{what}: the parameter {name!r}")) for name, value in values.items()}
    contract: Spec = module.spec
    channels = channels_of(contract, params, what)
    check_values(contract, channels, params, what)
    if framework == "linen":
        return module, params
    from flax import nnx

    import depthwise_jax.nnx

    arguments = {key: value for key, value in arguments.items() if key != "name"}
    cls = getattr(depthwise_jax.nnx, layer)
    # Skips the initializers, whose values are replaced.
    module = nnx.eval_shape(lambda: cls(channels, **arguments, rngs=nnx.Rngs(0)))
    nnx.update(module, params)
    return module, params


def causal_arguments(arguments: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The arguments of CausalDepthwiseConv1D for a convolution that the code around it makes causal.

    Args:
        arguments: those of the DepthwiseConv1D that computes the convolution without the code around it.
        what: the convolution's name in messages.

    Raises:
        ValueError: there are several spatial axes, strides, or a padding that is unusual for a causal convolution.
    """
    rest = dict(arguments)
    padding, strides, dilation = rest.pop("padding"), rest.pop("strides"), rest["dilation_rate"]
    rank = len(rest["kernel_size"])
    if rank != 1:
        raise ValueError(f"{what}: causal=True needs one spatial axis, time; got {rank} spatial axes")
    if strides not in (1, (1,), [1]):
        raise ValueError(f"{what}: causal=True needs strides of 1; got {strides!r}")
    span = (rest["kernel_size"][0] - 1) * (dilation if isinstance(dilation, int) else dilation[0])
    kind = padding.lower() if isinstance(padding, str) else padding
    if kind not in ("causal", "valid", 0, span, ((0, 0),), ((span, 0),), ((span, span),)):
        raise ValueError(
            f"{what}: with causal=True the padding must be {span} = (kernel_size - 1)*dilation, if the last outputs "
            f"are cut off, or 0, if the input is padded first; got {padding!r}"
        )
    return rest


def parts(module: Any, params: Mapping[str, Any] | None) -> tuple[Spec, dict[str, jax.Array]]:
    """A layer's contract, and its parameters' values in the layer's order.

    Args:
        module: a layer of `depthwise_jax.linen`, with `params`; or a layer of `depthwise_jax.nnx`, without.
        params: the Linen layer's parameters.

    Raises:
        TypeError: it is not one of our layers, or `params` is missing or given without need.
        ValueError: `params` do not fit the layer.
    """
    contract = getattr(module, "spec", None)
    if not isinstance(contract, Spec):
        raise TypeError(
            f"module must be a layer of depthwise_jax.linen or depthwise_jax.nnx; got {type(module).__name__}"
        )
    if isinstance(module, nn.Module):
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be given for {contract.layer}, a Linen module; got {params!r}")
        values = dict(meta.unbox(params))
        values = {parameter.name: values.pop(parameter.name, None) for parameter in contract.parameters} | values
    else:
        if params is not None:
            raise TypeError(f"params must be None for {contract.layer}, an NNX module, which holds its parameters")
        values = {parameter.name: getattr(module, parameter.name)[...] for parameter in contract.parameters}
    what = getattr(module, "name", None) or contract.layer
    check_values(contract, channels_of(contract, values, what), values, what)
    return contract, values


def check_values(contract: Spec, channels: int, values: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless the values are the layer's parameters, in their shapes."""
    names = [parameter.name for parameter in contract.parameters]
    extra = sorted(set(values) - set(names))
    if extra:
        raise ValueError(f"{what}: {contract.layer} has no parameter {extra[0]!r} with these arguments; it has {names}")
    shapes = contract.shapes(contract.layout.arrange((), (1,) * contract.layout.rank, channels))
    for name in names:
        found = None if values.get(name) is None else tuple(jnp.shape(values[name]))
        if found != shapes[name]:
            raise ValueError(f"{what}: the parameter {name!r} must have the shape {shapes[name]}; got {found}")


def channels_of(contract: Spec, values: Mapping[str, Any], what: str) -> int:
    """The input's channels, by the first parameter's shape."""
    name = contract.parameters[0].name
    shape = jnp.shape(values[name]) if values.get(name) is not None else None
    rank = contract.layout.rank
    if shape is None or len(shape) != rank + 2 or 0 in shape:
        expected = ", ".join(map(str, (*contract.kernel_size, "C", contract.depth_multiplier)))
        raise ValueError(f"{what}: the parameter {name!r} must have the shape ({expected}); got {shape}")
    return shape[-2]
