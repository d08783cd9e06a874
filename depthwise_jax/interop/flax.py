"""Converts between Flax's Conv with one group per channel and our layers: single layers and trees of parameters."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jax import lax

from depthwise_jax._core import introspect
from depthwise_jax.drop_in import conv_general_dilated
from depthwise_jax.interop.modules import Framework, causal_arguments, make, overridden, parts

Path = tuple[str, ...]


def from_flax(
    conv: Any, params: Mapping[str, Any] | None = None, *, causal: bool = False, framework: Framework | None = None
) -> tuple[Any, Any]:
    """Converts a Flax Conv with one group per channel into the layer of ours that computes the same.

    Args:
        conv: a flax.linen.Conv, or an nnx.Conv, whose feature_group_count is the number of input channels.
        params: the Linen Conv's parameters, kernel `(*window, 1, C*M)` and bias `(C*M,)`; None for an nnx.Conv.
        causal: True for a Conv over one spatial axis that is causal: the code around it pads it by
            `(kernel_size - 1)*kernel_dilation` and cuts off the last outputs, or pads its input first; or its padding
            is "CAUSAL". The result is then a `CausalDepthwiseConv1D`, which also returns the state for the tokens that
            follow. Otherwise a Conv with the padding "CAUSAL" becomes `DepthwiseConv1D(padding="causal")`, which has
            the same parameters and returns only the output.
        framework: "linen" or "nnx", the kind of layer to make; that of `conv` by default.

    Returns:
        `(module, params)`, with the kernel as `(*window, C, M)` and all values unchanged. Initializers are not
        converted, since they are made for another shape.

    Raises:
        TypeError: it is not a Conv, or its parameters are missing or given without need.
        ValueError: the Conv is not depthwise, has a setting that our layers cannot express, or its subclass overrides
            `__call__`, `param` or another method (also by lifting, as nn.remat); the message names it.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> conv = nn.Conv(64, (3, 3), feature_group_count=32)
        >>> params = conv.init(jax.random.key(0), jax.numpy.ones((1, 28, 28, 32)))["params"]
        >>> layer, ours = from_flax(conv, params)
        >>> type(layer).__name__, params["kernel"].shape, ours["kernel"].shape
        ('DepthwiseConv2D', (3, 3, 1, 64), (3, 3, 32, 2))
    """
    is_linen = isinstance(conv, nn.Conv)
    if is_linen:
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be given for a flax.linen.Conv; got params={params!r}")
        if "kernel" not in params and "params" in params:
            raise ValueError("params must hold 'kernel'; got 'params' in its place: pass variables['params']")
        values = dict(meta.unbox(params))
    elif _is_nnx_conv(conv):
        if params is not None:
            raise TypeError("params must be None for an nnx.Conv, which holds its own parameters")
        values = {name: p[...] for name in ("kernel", "bias") if (p := getattr(conv, name)) is not None}
    else:
        raise TypeError(f"conv must be a flax.linen.Conv or an nnx.Conv; got {type(conv).__name__}")
    what = getattr(conv, "name", None) or "Conv"
    _check_stock(conv, what)
    rank = 1 if isinstance(conv.kernel_size, int) else len(conv.kernel_size)
    size = (conv.kernel_size,) if isinstance(conv.kernel_size, int) else tuple(conv.kernel_size)
    groups, features = conv.feature_group_count, conv.out_features if not is_linen else conv.features
    shape = jnp.shape(values.get("kernel", ()))
    if len(shape) != rank + 2 or shape[:rank] != size or shape[-1] != features:
        window = ", ".join(map(str, size))
        raise ValueError(f"{what}: the parameter 'kernel' must have the shape ({window}, 1, {features}); got {shape}")
    if shape[-2] != 1 or features % groups:
        raise ValueError(
            f"{what} is not depthwise: its feature_group_count must be the number of input channels, and divide "
            f"features; got feature_group_count={groups}, {groups * shape[-2]} input channels and features={features}"
        )
    if rank > 3:
        raise ValueError(f"{what} has {rank} spatial axes; a layer of depthwise_jax has one to three")
    _check_plain(conv, what)
    arguments = {
        "kernel_size": size,
        "strides": 1 if conv.strides is None else conv.strides,
        "padding": _padding(conv.padding),
        "depth_multiplier": features // groups,
        "data_format": "channels_last",
        "dilation_rate": 1 if conv.kernel_dilation is None else conv.kernel_dilation,
        "use_bias": conv.use_bias,
        "dtype": conv.dtype,
        "param_dtype": jnp.result_type(values["kernel"]),
        "precision": conv.precision,
        "name": getattr(conv, "name", None),
    }
    values["kernel"] = kernel_from_flax(values["kernel"], groups)
    layer = f"DepthwiseConv{rank}D"
    if causal:
        arguments, layer = causal_arguments(arguments, what), "CausalDepthwiseConv1D"
    return make(layer, arguments, values, framework or ("linen" if is_linen else "nnx"), what)


def to_flax(
    module: Any, params: Mapping[str, Any] | None = None, *, framework: Framework | None = None
) -> tuple[Any, Any]:
    """Converts a depthwise layer of ours into the Flax Conv that computes the same: the inverse of `from_flax`.

    Args:
        module: a depthwise layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; None for an NNX layer.
        framework: "linen" or "nnx", the kind of Conv to make; that of `module` by default.

    Returns:
        `(conv, params)`, a flax.linen.Conv, or an nnx.Conv that holds these parameters. Initializers, regularizers and
        constraints are not converted, since a Conv cannot hold them.

    Raises:
        TypeError: it is not one of our layers, or its parameters are missing or given without need.
        ValueError: a Conv cannot express the layer; the message names the argument.
    """
    contract, values = parts(module, params)
    if contract.separable:
        raise ValueError(f"a {contract.layer} is two convolutions, not one Conv")
    if contract.transposed:
        raise ValueError(f"a flax ConvTranspose has no groups; got a {contract.layer}")
    if contract.padding == "edge":
        raise ValueError("a flax Conv has no padding 'edge'; got padding='edge'")
    if contract.layout.data_format != "channels_last":
        raise ValueError(f"a flax Conv is channels_last; got data_format={contract.layout.data_format!r}")
    if contract.arguments["activation"] not in (None, "linear"):
        raise ValueError(f"a flax Conv has no activation; got activation={contract.arguments['activation']!r}")
    *_, channels, multiplier = values["kernel"].shape
    values["kernel"] = kernel_to_flax(values["kernel"])
    arguments = {
        "kernel_size": contract.kernel_size,
        "strides": contract.strides,
        "padding": contract.padding.upper() if isinstance(contract.padding, str) else contract.padding,
        "kernel_dilation": contract.dilation_rate,
        "feature_group_count": channels,
        "use_bias": contract.arguments["use_bias"],
        "dtype": contract.dtype,
        "param_dtype": contract.param_dtype,
        "precision": contract.arguments["precision"],
    }
    if (framework or ("linen" if isinstance(module, nn.Module) else "nnx")) == "linen":
        return nn.Conv(channels * multiplier, name=getattr(module, "name", None), **arguments), values
    from flax import nnx

    conv = nnx.eval_shape(lambda: nnx.Conv(channels, channels * multiplier, **arguments, rngs=nnx.Rngs(0)))
    nnx.update(conv, values)
    return conv, values


def params_from_flax(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Converts a model's parameters path by path: each depthwise Conv's kernel becomes that of one of our layers.

    Use it for a model in which our layers replace the depthwise Convs under the same names.

    Args:
        model: the unbound Linen model with its flax.linen.Convs; or an nnx model.
        params: its parameters, a tree of dicts; the entries of other modules stay unchanged.
        *args, **kwargs: for a Linen model, the arguments of `model.init`; example inputs may be
            `jax.ShapeDtypeStruct`s.

    Returns:
        A tree like `params`. The kernel `(*window, 1, C*M)` of each Conv with `feature_group_count = C > 1` becomes
        `(*window, C, M)`. Axes that nn.scan and nn.vmap added must be leading ones.

    Warns:
        UserWarning: a depthwise Conv of a subclass that computes something else is left unchanged; it names the path.

    Raises:
        ValueError: a path of the model is not in `params`, or its kernel has another shape.
    """
    groups = _linen_groups(model, args, kwargs) if isinstance(model, nn.Module) else _nnx_groups(model)
    return _with_kernels(params, groups)


def params_to_flax(params: Any, params_of_convs: Any) -> Any:
    """Converts a tree of parameters back: each kernel that `params_from_flax` changed gets its Conv's shape.

    Args:
        params: a tree of dicts with kernels `(*window, C, M)`.
        params_of_convs: a tree like it, of anything with a shape, such as `jax.eval_shape(model.init, ...)["params"]`
            of the model with its Convs. If a kernel has the shape `(*window, 1, C*M)` in it, the kernel of `params`
            gets that shape.

    Returns:
        A tree like `params_of_convs` with the values of `params`.

    Raises:
        ValueError: the trees differ in more than such kernels.
    """

    ours, theirs = meta.unbox(params), meta.unbox(params_of_convs)
    try:
        chex.assert_trees_all_equal_structs(ours, theirs)
    except AssertionError as error:
        raise ValueError(f"params must be a tree like params_of_convs: {error}") from error

    def back(path: Any, value: Any, target: Any) -> Any:
        shape, wanted = jnp.shape(value), jnp.shape(target)
        if shape == wanted:
            return value
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if path[-1] != jax.tree_util.DictKey("kernel") or len(shape) < 3:
            raise ValueError(f"the parameter {name!r} must have the shape {wanted}; got {shape}")
        if wanted != (*shape[:-2], 1, shape[-2] * shape[-1]):
            raise ValueError(f"the parameter {name!r} must be a depthwise kernel that fits {wanted}; got {shape}")
        return kernel_to_flax(value)

    return jax.tree.map_with_path(back, ours, theirs)


def kernel_from_flax(kernel: Any, channels: int) -> Any:
    """`(..., 1, C*M)` as `(..., C, M)`; output channel `c*M + m` is the same in both.

    Args:
        kernel: a kernel `(*window, 1, C*M)` of Flax's Conv; it may have more leading axes.
        channels: the input's channels C.
    """
    return kernel.reshape((*kernel.shape[:-2], channels, kernel.shape[-1] // channels))


def kernel_to_flax(kernel: Any) -> Any:
    """`(..., C, M)` as `(..., 1, C*M)`.

    Args:
        kernel: a kernel `(*window, C, M)` of depthwise_conv; it may have more leading axes.
    """
    return kernel.reshape((*kernel.shape[:-2], 1, kernel.shape[-2] * kernel.shape[-1]))


def _is_nnx_conv(conv: Any) -> bool:
    from flax import nnx

    return isinstance(conv, nnx.Conv)


# What a subclass of Flax's Conv may redefine without changing the computation: its arguments' defaults, and the
# attributes that Flax gives each class.
_HARMLESS = frozenset(
    {"__dataclass_params__", "__dataclass_fields__", "__eq__", "__hash__", "__match_args__", "__post_init__", "parent"}
    | {"name", "scope", "_state", "_parent_ref", "_compact_name_scope_methods", "_pytree__is_pytree", "_pytree__nodes"}
    | {field for field in nn.Conv.__dataclass_fields__ if field not in ("conv_general_dilated", "promote_dtype")}
)


def _check_stock(conv: Any, what: str) -> None:
    """Raises ValueError for a subclass that does not compute what its Conv does."""
    from flax import nnx

    stock = nn.Conv if isinstance(conv, nn.Conv) else nnx.Conv
    found = overridden(type(conv), stock, _HARMLESS)
    if found is not None:
        raise ValueError(
            f"{what}: {type(conv).__module__}.{type(conv).__qualname__} overrides {found} of Flax's Conv; convert a "
            "plain Conv with the same parameters (with causal=True if the subclass pads or cuts to be causal), or keep "
            "it and pass it this package's conv_general_dilated"
        )


def _check_plain(conv: Any, what: str) -> None:
    """Raises ValueError for a Conv's settings that our layers lack."""
    for name in ("mask", "preferred_element_type", "conv_general_dilated_cls"):
        if getattr(conv, name, None) is not None:
            raise ValueError(f"{what}: {name} must be None, since the layers of depthwise_jax have no such argument")
    dilation = conv.input_dilation
    if dilation is not None and any(step != 1 for step in ((dilation,) if isinstance(dilation, int) else dilation)):
        raise ValueError(f"{what}: input_dilation must be 1; got {dilation!r}, a transposed convolution")
    if conv.conv_general_dilated not in (None, lax.conv_general_dilated, conv_general_dilated):
        raise ValueError(
            f"{what}: conv_general_dilated={conv.conv_general_dilated!r} is a custom function; only lax's or this "
            "package's can be converted"
        )
    from flax.nnx.nn.dtypes import promote_dtype as nnx_promote_dtype

    if conv.promote_dtype not in (promote_dtype, nnx_promote_dtype):
        raise ValueError(f"{what}: promote_dtype must be Flax's own, which our layers use; got {conv.promote_dtype!r}")


def _padding(padding: Any) -> Any:
    """Flax also takes one integer per axis."""
    if isinstance(padding, str | int):
        return padding
    return tuple((amount, amount) if isinstance(amount, int) else tuple(amount) for amount in padding)


def _linen_groups(model: nn.Module, args: Any, kwargs: Any) -> dict[Path, int]:
    """The depthwise Convs of a Linen model by path, with their channels."""
    groups: dict[Path, int] = {}

    def watch(call: Callable[..., Any], call_args: Any, call_kwargs: Any, context: Any) -> Any:
        conv = context.module
        if isinstance(conv, nn.Conv) and context.method_name == "__call__":
            (x,) = call_args or call_kwargs.values()
            if _is_depthwise(conv, x.shape[-1], conv.path):
                groups[conv.path] = conv.feature_group_count
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(watch):
        introspect.collect(model, *args, **kwargs)  # traces init
    return groups


def _nnx_groups(model: Any) -> dict[Path, int]:
    """The depthwise Convs of an NNX model by path, with their channels."""
    from flax import nnx

    return {
        tuple(map(str, path)): conv.feature_group_count
        for path, conv in nnx.iter_modules(model)
        if isinstance(conv, nnx.Conv) and _is_depthwise(conv, conv.in_features, path)
    }


def _is_depthwise(conv: Any, channels: int, path: Sequence[Any]) -> bool:
    """Whether a Conv is depthwise and one of our layers can replace it."""
    if not conv.feature_group_count == channels > 1:
        return False
    try:
        _check_stock(conv, "/".join(map(str, path)))
    except ValueError as error:
        warnings.warn(f"left as it is: {error}", stacklevel=2)
        return False
    return True


def _with_kernels(params: Any, groups: Mapping[Path, int]) -> Any:
    found = set()

    def convert(path: Any, value: Any) -> Any:
        *conv, name = (str(getattr(entry, "key", entry)) for entry in path)
        channels = groups.get(tuple(conv))
        if name != "kernel" or channels is None:
            return value
        found.add(tuple(conv))
        shape = jnp.shape(value)
        if len(shape) < 3 or shape[-2] != 1 or shape[-1] % channels:
            raise ValueError(
                f"the parameter {'/'.join((*conv, name))!r} of a depthwise Conv with {channels} channels must have the "
                f"shape (*window, 1, {channels}*M); got {shape}"
            )
        return kernel_from_flax(value, channels)

    converted = jax.tree_util.tree_map_with_path(convert, meta.unbox(params))
    missing = sorted(set(groups) - found)
    if missing:
        raise ValueError(f"params must have the model's parameter {'/'.join((*missing[0], 'kernel'))!r}")
    return converted
