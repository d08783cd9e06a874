"""The layers as Flax NNX modules: those of `depthwise_jax.linen`, with `in_features` first and `rngs` by name.

A parameter's constraint and regularizer are metadata of its `nnx.Param`, under "constraint" and "regularizer".
`depthwise_jax.optim.constraints_of` and `regularization_loss` find them there, also in another layer's
`nnx.Param(value, constraint=...)`.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from depthwise_jax import regularizers, settings
from depthwise_jax._contract import fields
from depthwise_jax._contract.fields import CausalFields, DepthwiseFields, SeparableFields, TransposedFields
from depthwise_jax._contract.spec import Spec, arguments_from_config, check_spelling
from depthwise_jax._core import introspect
from depthwise_jax._core.dtypes import added
from depthwise_jax._core.window import per_axis


class Loss(nnx.Intermediate):
    """The type of variable in which `nnx.capture(model, Loss)` collects the activity penalties of a call."""


class _Memo:
    """Keeps a layer's spec. All memos are equal and copies are empty, since NNX compares layers by their attributes."""

    spec: Spec | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Memo)

    def __hash__(self) -> int:
        return 0

    def __reduce__(self) -> Any:
        return _Memo, ()


class _Signature:
    """Shows `inspect` the arguments of a class, which NNX's metaclass hides."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError  # a layer's signature is that of its __call__
        _itself, *arguments = inspect.signature(owner.__init__).parameters.values()
        return inspect.Signature(arguments)


@dataclasses.dataclass(eq=False, repr=False)
class _Layer(nnx.Module):
    rank: ClassVar[int]

    in_features: int
    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)
    __signature__ = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_spelling(cls.__name__, ["rngs", *fields.names(cls)], kwargs)
        try:
            if args or kwargs:  # NNX makes copies without arguments
                inspect.signature(cls).bind(*args, **kwargs)
        except TypeError as error:
            first = ", ".join(f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING)
            raise TypeError(f"{cls.__name__}({first}, ..., rngs=nnx.Rngs(0)): {error}") from None
        return super().__new__(cls)

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        (self.in_features,) = per_axis(self.in_features, 1, "in_features")
        if self.data_format is None:  # read once, at construction, as Keras does
            self.data_format = settings.image_data_format()
        self._memo = _Memo()
        for name, value in self.spec.values().items():
            setattr(self, name, nnx.static(value))  # even where an array was given, which NNX takes for data
        contract = self.spec
        shapes = contract.shapes(contract.layout.arrange((), (1,) * self.rank, self.in_features))
        for name in shapes:
            setattr(self, name, nnx.data(None))
        for parameter in contract.parameters:
            value = parameter.initialize(rngs.params(), shapes[parameter.name], contract.param_dtype)
            if isinstance(value, meta.AxisMetadata):
                raise TypeError(
                    f"{parameter.prefix}_initializer must return an array, or use nnx.with_partitioning or "
                    f"nnx.with_metadata; got Linen's {type(value).__name__}"
                )
            tags: dict[str, Any] = {"constraint": parameter.constraint, "regularizer": parameter.regularizer}
            tags = {key: tag for key, tag in tags.items() if tag is not None}
            if tags:
                tags["instance_shape"] = shapes[parameter.name]
            setattr(self, parameter.name, nnx.Param(value, **tags))

    @property
    def spec(self) -> Spec:
        """The arguments, checked and resolved."""
        # Made from the attributes. These are plain values, so nnx.jit takes equal modules for equal.
        arguments = {name: getattr(self, name) for name in fields.names(type(self))}
        made = self._memo.spec
        # An assigned list or dict may have changed in place since.
        if made is None or any(
            made.arguments[name] is not value or isinstance(value, list | dict) for name, value in arguments.items()
        ):
            made = self._memo.spec = Spec(type(self).__name__, self.rank, arguments)
        return made

    def __call__(self, x: ArrayLike) -> Any:
        x = jnp.asarray(x)
        y = self.spec(x, self._values(x))
        self._sow_losses(y)
        return y

    def _values(self, x: Array) -> dict[str, Array]:
        """The parameters' values for an input, by name."""
        contract = self.spec
        shapes = contract.shapes(x.shape)
        values = {parameter.name: getattr(self, parameter.name)[...] for parameter in contract.parameters}
        for parameter in contract.parameters:
            parameter.check_shape(values[parameter.name].shape, shapes[parameter.name])
        return values

    def _sow_losses(self, y: Array) -> None:
        # Outside nnx.capture, sow would keep the value in the module forever.
        if self.spec.activity_regularizer is not None and hasattr(self, "__captures__"):
            loss = self.spec.activity_loss(y)
            self.sow(Loss, "activity", loss, init_fn=lambda: jnp.zeros(()), reduce_fn=added)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The output's shape for an input's shape; None means an unknown axis in both.

        Args:
            input_shape: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first.

        Raises:
            ValueError: the layer cannot take the input, or the output would be empty.
        """
        return self.spec.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Keras' configuration of this layer, which Keras' own class of the same name accepts.

        Raises:
            ValueError: Keras has no counterpart for one of the arguments.
        """
        return self.spec.get_config(None)

    @classmethod
    def from_config(cls, in_features: int, config: Mapping[str, Any], *, rngs: nnx.Rngs) -> Self:
        """Makes the layer from Keras' configuration, without importing or running anything that it names.

        Args:
            in_features: the input's channels, which Keras' configuration does not hold.
            config: as for the Linen layers' `from_config`; the name in it is ignored.
            rngs: as for the layer.

        Raises:
            ValueError: the configuration is another layer's, or names something that is not built in.
        """
        arguments = arguments_from_config(cls.__name__, fields.names(cls), config)
        arguments.pop("name", None)
        return cls(in_features, **arguments, rngs=rngs)  # pyright: ignore[reportCallIssue]


# These declare attributes that are not arguments, so they are not dataclasses.


class _Kernel:
    kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None


class _Kernels:
    depthwise_kernel: nnx.Param[Array]
    pointwise_kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None


# Each layer is itself a dataclass, because jedi shows the arguments that a class inherits only then.


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv1D(DepthwiseFields, _Kernel, _Layer):
    """A depthwise convolution over one spatial axis.

    The arguments, the errors and the penalties are those of `DepthwiseConv2D`; every argument is an attribute too.

    Attributes:
        kernel: an nnx.Param of shape `(kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.
    """

    rank = 1


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv2D(DepthwiseFields, _Kernel, _Layer):
    """A depthwise convolution over two spatial axes: each channel has `depth_multiplier` kernels of its own.

    Every argument is an attribute too.

    Attributes:
        kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.

    Args:
        in_features: the input's channels, C.
        rngs: the random numbers for the parameters, by name only.

    The other arguments, their defaults and the shapes are those of `depthwise_jax.linen.DepthwiseConv2D`. Penalties
    come from `regularization_loss`, and those of the activity from `nnx.capture(model, Loss)`.

    Raises:
        ValueError, TypeError: an argument is invalid, at construction; or an input does not fit, at a call.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = DepthwiseConv2D(12, 3, strides=3, depthwise_constraint="max_norm", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 10, 10, 12))).shape, layer.kernel.shape
        ((4, 3, 3, 12), (3, 3, 12, 1))
    """

    rank = 2


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv3D(DepthwiseFields, _Kernel, _Layer):
    """A depthwise convolution over three spatial axes; Keras has no such layer.

    The arguments, the errors and the penalties are those of `DepthwiseConv2D`; every argument is an attribute too.

    Attributes:
        kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.
    """

    rank = 3


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv1DTranspose(TransposedFields, _Kernel, _Layer):
    """A transposed depthwise convolution over one spatial axis; Keras has no such layer.

    The arguments, the errors and the penalties are those of `DepthwiseConv2DTranspose`; every argument is an attribute
    too.

    Attributes:
        kernel: an nnx.Param of shape `(kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.
    """

    rank = 1


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv2DTranspose(TransposedFields, _Kernel, _Layer):
    """A transposed depthwise convolution over two spatial axes, which makes images larger; Keras has no such layer.

    Every argument is an attribute too.

    Attributes:
        kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.

    Args:
        in_features: the input's channels, C.
        rngs: the random numbers for the parameters, by name only.

    The other arguments, their defaults and the shapes are those of `depthwise_jax.linen.DepthwiseConv2DTranspose`.
    Penalties come from `regularization_loss`, and those of the activity from `nnx.capture(model, Loss)`.

    Raises:
        ValueError, TypeError: as `DepthwiseConv2D`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = DepthwiseConv2DTranspose(12, 4, strides=2, padding="same", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 10, 10, 12))).shape, layer.kernel.shape
        ((4, 20, 20, 12), (4, 4, 12, 1))
    """

    rank = 2


@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseConv3DTranspose(TransposedFields, _Kernel, _Layer):
    """A transposed depthwise convolution over three spatial axes; Keras has no such layer.

    The arguments, the errors and the penalties are those of `DepthwiseConv2DTranspose`; every argument is an attribute
    too.

    Attributes:
        kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.
    """

    rank = 3


@dataclasses.dataclass(eq=False, repr=False)
class SeparableConv1D(SeparableFields, _Kernels, _Layer):
    """A depthwise convolution over one spatial axis, then a pointwise one.

    The arguments, the errors and the penalties are those of `SeparableConv2D`; every argument is an attribute too.

    Attributes:
        depthwise_kernel: an nnx.Param of shape `(kernel_size, in_features, depth_multiplier)`.
        pointwise_kernel: an nnx.Param of shape `(1, in_features*depth_multiplier, filters)`.
        bias: an nnx.Param of shape `(filters,)`, or None without a bias.
    """

    rank = 1


@dataclasses.dataclass(eq=False, repr=False)
class SeparableConv2D(SeparableFields, _Kernels, _Layer):
    """A depthwise convolution over two spatial axes, then a pointwise one over the channels, then bias and activation.

    Every argument is an attribute too.

    Attributes:
        depthwise_kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        pointwise_kernel: an nnx.Param of shape `(1, 1, in_features*depth_multiplier, filters)`.
        bias: an nnx.Param of shape `(filters,)`, or None without a bias.

    Args:
        in_features: the input's channels, C.
        filters: the output's channels.
        rngs: the random numbers for the parameters, by name only.

    The other arguments, their defaults and the shapes are those of `depthwise_jax.linen.SeparableConv2D`. Penalties
    come from `regularization_loss`, and those of the activity from `nnx.capture(model, Loss)`.

    Raises:
        ValueError, TypeError: as `DepthwiseConv2D`.
    """

    rank = 2


@dataclasses.dataclass(eq=False, repr=False)
class SeparableConv3D(SeparableFields, _Kernels, _Layer):
    """A depthwise convolution over three spatial axes, then a pointwise one; Keras has no such layer.

    The arguments, the errors and the penalties are those of `SeparableConv2D`; every argument is an attribute too.

    Attributes:
        depthwise_kernel: an nnx.Param of shape `(*kernel_size, in_features, depth_multiplier)`.
        pointwise_kernel: an nnx.Param of shape `(1, 1, 1, in_features*depth_multiplier, filters)`.
        bias: an nnx.Param of shape `(filters,)`, or None without a bias.
    """

    rank = 3


@dataclasses.dataclass(eq=False, repr=False)
class CausalDepthwiseConv1D(CausalFields, _Kernel, _Layer):
    """A causal depthwise convolution over time, as in each block of state-space and linear-attention models.

    Called with an input, it returns the output and the state after it; called with a state, it continues from there.
    Every argument is an attribute too.

    Attributes:
        kernel: an nnx.Param of shape `(kernel_size, in_features, depth_multiplier)`.
        bias: an nnx.Param of shape `(in_features*depth_multiplier,)`, or None without a bias.

    Args:
        in_features: the input's channels, C.
        rngs: the random numbers for the parameters, by name only.

    The other arguments, their defaults and the shapes are those of `depthwise_jax.linen.CausalDepthwiseConv1D`.

    Raises:
        ValueError, TypeError: an argument is invalid, at construction; or an input does not fit, at a call.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = CausalDepthwiseConv1D(8, activation="silu", rngs=nnx.Rngs(0))
        >>> y, state = layer(jnp.ones((2, 10, 8)))
        >>> y.shape, state.shape
        ((2, 10, 8), (2, 3, 8))
    """

    rank = 1

    def __call__(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        segment_pos: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> tuple[Array, Array]:
        """The output, and the state after it.

        Args:
            x, state, segment_pos, segment_ids, lengths: as in `causal_conv1d`.
        """
        x = jnp.asarray(x)
        y, after = self.spec(
            x,
            self._values(x),
            state=state,
            segment_pos=segment_pos,
            segment_ids=segment_ids,
            lengths=lengths,
        )
        self._sow_losses(y)
        return y, after

    def initial_state(self, input_shape: Sequence[int], dtype: DTypeLike | None = None) -> Array:
        """The state before the first token: zeros.

        Args:
            input_shape: an input's, `(*batch, L, C)` or `(*batch, C, L)`, with any L.
            dtype: the state's dtype; None means that of the computation, or else of the parameters.
        """
        return self.spec.initial_state(input_shape, dtype)


def collect(model: nnx.Module) -> Any:
    """Finds the parameters of a model that carry a constraint or a regularizer.

    Args:
        model: any NNX module, or a state of `nnx.Param`s.

    Returns:
        A tree of dicts like `nnx.state(model, nnx.Param)`. Its leaves are `introspect.Found`, or None for a parameter
        with neither. Axes that nnx.vmap and nnx.scan added must be the leading ones.

    Raises:
        ValueError: a parameter does not end in the shape that its layer gave it, as with lifted axes elsewhere.
    """
    return unflatten_dict({path: _found(path, param) for path, param in _params(model)})


def regularization_loss(model: nnx.Module) -> Array:
    """The sum of all weight penalties of a model, which depends only on its parameters; each parameter counts once.

    The sum excludes activity penalties: `nnx.capture(model, Loss)` collects those.

    Args:
        model: any NNX module, or a state of `nnx.Param`s, that contains these layers' parameters at any depth. If
            nnx.vmap or nnx.scan lifted them along leading axes, each instance counts.

    Returns:
        A scalar in float32 or wider.

    Raises:
        ValueError: as `collect`.
    """
    total = jnp.zeros((), jnp.float32)
    for path, param in _params(model):
        found = _found(path, param)
        if found is not None and found.regularizer is not None:

            def penalty(instance: Array, regularizer: Any = found.regularizer) -> Array:
                return regularizers.penalty(regularizer, instance)

            total = added(total, jnp.sum(introspect.per_instance(penalty, found.lifted_axes, reduces=True)(param[...])))
    return total


def _params(model: nnx.Module) -> Any:
    if not isinstance(model, nnx.Module | nnx.State):
        raise TypeError(f"model must be a module; got {introspect.described(model)}")
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def _found(path: tuple[Any, ...], param: nnx.Variable[Any]) -> introspect.Found | None:
    tags = param.get_metadata()
    constraint, regularizer = tags.get("constraint"), tags.get("regularizer")
    if constraint is None and regularizer is None:
        return None
    shape = tuple(param.shape)
    instance = tuple(tags.get("instance_shape", shape))
    lifted = len(shape) - len(instance)
    if lifted < 0 or shape[lifted:] != instance:
        raise ValueError(
            f"the parameter {'/'.join(map(str, path))!r} of shape {shape} must end in the shape {instance} that its "
            "layer made: nnx.vmap and nnx.scan must add leading axes for its constraint and regularizer to apply"
        )
    return introspect.Found(constraint, regularizer, shape, param.dtype, instance, tuple(range(lifted)))
