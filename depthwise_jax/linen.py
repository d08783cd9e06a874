"""The layers as Flax Linen modules, with Keras' arguments, names and numbers and Flax's conventions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from depthwise_jax import regularizers, settings
from depthwise_jax._contract import fields
from depthwise_jax._contract.fields import CausalFields, DepthwiseFields, SeparableFields, TransposedFields
from depthwise_jax._contract.spec import Parameter, Spec, arguments_from_config, check_spelling, data_format
from depthwise_jax._core import introspect
from depthwise_jax._core.dtypes import added


class _Layer(nn.Module):
    rank: ClassVar[int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_spelling(cls.__name__, fields.names(cls), kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in {"kernel_size", "strides", "padding", "dilation_rate"}.intersection(fields.names(type(self))):
            object.__setattr__(self, name, _hashable(getattr(self, name)))
        # Read once, at construction, as Keras does: clones keep it.
        given = settings.image_data_format() if self.data_format is None else self.data_format
        object.__setattr__(self, "data_format", data_format(given))
        arguments = {name: getattr(self, name) for name in fields.names(type(self))}
        object.__setattr__(self, "spec", Spec(type(self).__name__, self.rank, arguments))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike) -> Any:
        x = jnp.asarray(x)
        values = _values(self, x)
        y = self.spec(x, values, sharded=not self.is_initializing())
        _sow_losses(self, values, y)
        return y

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
        return self.spec.get_config(self.name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes the layer from Keras' configuration, without importing or running anything that it names.

        Args:
            config: what Keras' `layer.get_config()` or `keras.saving.serialize_keras_object(layer)` returns, as Keras 3
                or Keras 2 writes it.

        Raises:
            ValueError: the configuration is another layer's, or names something that is not built in.
        """
        return cls(**arguments_from_config(cls.__name__, fields.names(cls), config))


def _hashable(value: Any) -> Any:
    """Lists as tuples, so a module can be a static argument of jax.jit."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _zero() -> Any:
    return 0.0


# Functions rather than methods, whose names Flax would add to the profile.


def _values(module: _Layer, x: Array) -> dict[str, Array]:
    """The parameters' values for an input, by name."""
    shapes = module.spec.shapes(x.shape)
    return {p.name: _value(module, p, shapes[p.name], module.spec.param_dtype) for p in module.spec.parameters}


def _sow_losses(module: _Layer, values: Mapping[str, Array], y: Array) -> None:
    """Sows the penalties of a call, if the collection is mutable."""
    if not module.is_mutable_collection("losses") or module.is_initializing():
        return
    for parameter in module.spec.parameters:
        if parameter.regularizer is not None:
            loss = regularizers.penalty(parameter.regularizer, values[parameter.name])
            # Once per parameter, even if the layer is called several times.
            module.sow("losses", parameter.name, loss, init_fn=_zero, reduce_fn=lambda _, new: new)
    if module.spec.activity_regularizer is not None:
        loss = module.spec.activity_loss(y)
        module.sow("losses", "activity", loss, init_fn=_zero, reduce_fn=added)


def _value(module: nn.Module, parameter: Parameter, shape: tuple[int, ...], dtype: Any) -> Array:
    """The parameter's value, initialised if necessary."""
    if module.has_variable("params", parameter.name):
        stored = meta.unbox(module.get_variable("params", parameter.name))
        parameter.check_shape(stored.shape, shape)
    init = introspect.tagged(
        module, parameter.initialize, constraint=parameter.constraint, regularizer=parameter.regularizer
    )
    return module.param(parameter.name, init, shape, dtype)


class DepthwiseConv1D(DepthwiseFields, _Layer):
    """A depthwise convolution over one spatial axis.

    The input is `(*batch, steps, C)`, or `(*batch, C, steps)` with channels_first, and the parameter `kernel` is
    `(kernel_size, C, depth_multiplier)`. The arguments, the output and the errors are those of `DepthwiseConv2D`.
    """

    rank = 1


class DepthwiseConv2D(DepthwiseFields, _Layer):
    """A depthwise convolution over two spatial axes: each channel has `depth_multiplier` kernels of its own.

    The input is `(*batch, height, width, C)`, or `(*batch, C, height, width)` with channels_first, with any number of
    batch axes. The output has `C*depth_multiplier` channels; channel `c*depth_multiplier + m` is input channel `c`
    under its `m`-th kernel. The parameters are `kernel`, `(*kernel_size, C, depth_multiplier)`, and `bias`,
    `(C*depth_multiplier,)`.

    Args:
        kernel_size: the window's size, one integer or one per spatial axis.
        strides: steps of the window, one integer or one per spatial axis.
        padding: "valid", "same" (`ceil(n / strides)` outputs, the odd zero at the end), or any other padding of
            `depthwise_conv`.
        depth_multiplier: output channels per input channel.
        data_format: "channels_last" or "channels_first"; None means `settings.image_data_format()` at construction.
        dilation_rate: distance between the window's taps, one integer or one per spatial axis; works with any strides.
        activation: None, one of Keras' names or a callable, applied last. "softmax", "log_softmax", "glu" and
            "sparsemax" act along the channels.
        use_bias: whether a bias is added.
        depthwise_initializer, bias_initializer: one of Keras' names or configurations, an object of
            `depthwise_jax.initializers`, any callable of (key, shape, dtype) or an array; None means "glorot_uniform"
            and "zeros".
        depthwise_regularizer, bias_regularizer: one of Keras' names or configurations, an object of
            `depthwise_jax.regularizers`, or any callable from the parameter to its penalty. The penalties are sown into
            the collection "losses" if it is mutable, once per parameter; see `regularization_loss`.
        activity_regularizer: the same, for the output after the activation; its penalty is divided by the batch size
            and summed over calls.
        depthwise_constraint, bias_constraint: one of Keras' names or configurations, an object of
            `depthwise_jax.constraints`, or any callable from the parameter to its projection. The optimiser applies
            them: `depthwise_jax.optim.project`.
        dtype: the dtype of the computation; None promotes the input and the parameters.
        param_dtype: the dtype of the parameters.
        precision: as in `jax.lax.conv_general_dilated`.
        implementation, in_sharding: as in `depthwise_conv`; the example input of `init` need not have this sharding.

    Under nn.scan and nn.vmap, penalties are sown only if the collection "losses" is lifted.

    Raises:
        ValueError, TypeError: an argument is invalid, at construction; or an input does not fit, at a call.

    Examples:
        >>> import jax
        >>> layer = DepthwiseConv2D(3, strides=3, activation="relu", depthwise_constraint="max_norm")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((4, 10, 10, 12)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((4, 3, 3, 12), (3, 3, 12, 1))
        >>> DepthwiseConv2D.from_config(layer.get_config()).strides
        (3, 3)
    """

    rank = 2


class DepthwiseConv3D(DepthwiseFields, _Layer):
    """A depthwise convolution over three spatial axes; Keras has no such layer.

    The input is `(*batch, height, width, depth, C)`, or `(*batch, C, height, width, depth)` with channels_first, and
    the parameter `kernel` is `(*kernel_size, C, depth_multiplier)`. The arguments, the output and the errors are those
    of `DepthwiseConv2D`.
    """

    rank = 3


class DepthwiseConv1DTranspose(TransposedFields, _Layer):
    """A transposed depthwise convolution over one spatial axis; Keras has no such layer.

    The input is `(*batch, steps, C)`, or `(*batch, C, steps)` with channels_first, and the parameter `kernel` is
    `(kernel_size, C, depth_multiplier)`. The arguments, the output and the errors are those of
    `DepthwiseConv2DTranspose`.
    """

    rank = 1


class DepthwiseConv2DTranspose(TransposedFields, _Layer):
    """A transposed depthwise convolution over two spatial axes, which makes images larger; Keras has no such layer.

    The input is `(*batch, height, width, C)`, or `(*batch, C, height, width)` with channels_first, with any number of
    batch axes. Input `i` adds to the outputs from `i*strides` on, with `depth_multiplier` kernels for each channel. The
    kernels are not flipped. The parameters are `kernel`, `(*kernel_size, C, depth_multiplier)`, and `bias`,
    `(C*depth_multiplier,)`.

    Args:
        strides: outputs between the windows of two neighbouring inputs, one integer or one per spatial axis.
        padding: "valid" or "same", as in Keras' Conv2DTranspose, an integer, or pairs; see `depthwise_conv_transpose`.
        output_padding: outputs to add at the end, as in `depthwise_conv_transpose`; the last of the arguments.

    The other arguments are those of `DepthwiseConv2D`.

    Raises:
        ValueError, TypeError: as `DepthwiseConv2D`.

    Examples:
        >>> import jax
        >>> layer = DepthwiseConv2DTranspose(4, strides=2, padding="same")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((4, 10, 10, 12)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((4, 20, 20, 12), (4, 4, 12, 1))
    """

    rank = 2


class DepthwiseConv3DTranspose(TransposedFields, _Layer):
    """A transposed depthwise convolution over three spatial axes; Keras has no such layer.

    The input is `(*batch, height, width, depth, C)`, or `(*batch, C, height, width, depth)` with channels_first, and
    the parameter `kernel` is `(*kernel_size, C, depth_multiplier)`. The arguments, the output and the errors are those
    of `DepthwiseConv2DTranspose`.
    """

    rank = 3


class SeparableConv1D(SeparableFields, _Layer):
    """A depthwise convolution over one spatial axis, then a pointwise one, then bias and activation.

    The input is `(*batch, steps, C)`, or `(*batch, C, steps)` with channels_first; the parameters are
    `depthwise_kernel`, `(kernel_size, C, depth_multiplier)`, `pointwise_kernel`, `(1, C*depth_multiplier, filters)`,
    and `bias`, `(filters,)`. The arguments, the output and the errors are those of `SeparableConv2D`.
    """

    rank = 1


class SeparableConv2D(SeparableFields, _Layer):
    """A depthwise convolution over two spatial axes, then a pointwise one over the channels, then bias and activation.

    The input is `(*batch, height, width, C)`, or `(*batch, C, height, width)` with channels_first, with any number of
    batch axes. The output has `filters` channels. The parameters are `depthwise_kernel`,
    `(*kernel_size, C, depth_multiplier)`, `pointwise_kernel`, `(1, 1, C*depth_multiplier, filters)`, and `bias`,
    `(filters,)`.

    Args:
        filters: output channels.
        pointwise_initializer, pointwise_regularizer, pointwise_constraint: like the depthwise ones, for the pointwise
            kernel. The norm constraints' default axis has size 1 there: pass axis=-2 for a norm per filter.

    The other arguments are those of `DepthwiseConv2D`, and `depth_multiplier` comes after `dilation_rate`, as in Keras.

    Raises:
        ValueError, TypeError: as `DepthwiseConv2D`.

    Examples:
        >>> import jax
        >>> layer = SeparableConv2D(16, 3, padding="same", use_bias=False)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((4, 10, 10, 12)))
        >>> y.shape, variables["params"]["pointwise_kernel"].shape
        ((4, 10, 10, 16), (1, 1, 12, 16))
    """

    rank = 2


class SeparableConv3D(SeparableFields, _Layer):
    """A depthwise convolution over three spatial axes, then a pointwise one; Keras has no such layer.

    The input is `(*batch, height, width, depth, C)`, or `(*batch, C, height, width, depth)` with channels_first; the
    parameters are `depthwise_kernel`, `(*kernel_size, C, depth_multiplier)`, `pointwise_kernel`,
    `(1, 1, 1, C*depth_multiplier, filters)`, and `bias`, `(filters,)`. The arguments, the output and the errors are
    those of `SeparableConv2D`.
    """

    rank = 3


class CausalDepthwiseConv1D(CausalFields, _Layer):
    """A causal depthwise convolution over time, as in each block of state-space and linear-attention models.

    Called with an input `(*batch, L, C)`, or `(*batch, C, L)` with channels_first, it returns the output and the state
    after it; called with a state, it continues from there. Keras has no such layer. The parameters are `kernel`,
    `(kernel_size, C, depth_multiplier)`, and `bias`, `(C*depth_multiplier,)`.

    Args:
        kernel_size: the number of tokens that an output sees, including its own.
        depthwise_initializer: as for `DepthwiseConv1D`; by default as in PyTorch for such a convolution, uniform with
            the variance `1 / (3*kernel_size)`.

    The other arguments are those of `DepthwiseConv1D`, except strides and padding.

    Raises:
        ValueError, TypeError: an argument is invalid, at construction; or an input does not fit, at a call.

    Examples:
        >>> import jax
        >>> layer = CausalDepthwiseConv1D(activation="silu")
        >>> x = jax.numpy.ones((2, 10, 8))
        >>> (y, state), variables = layer.init_with_output(jax.random.key(0), x)
        >>> y.shape, state.shape, variables["params"]["kernel"].shape
        ((2, 10, 8), (2, 3, 8), (4, 8, 1))
        >>> y, state = layer.apply(variables, x[:, -1:], state)  # one token more
        >>> y.shape, state.shape
        ((2, 1, 8), (2, 3, 8))
    """

    rank = 1

    @nn.compact
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
        values = _values(self, x)
        y, after = self.spec(
            x,
            values,
            sharded=not self.is_initializing(),
            state=state,
            segment_pos=segment_pos,
            segment_ids=segment_ids,
            lengths=lengths,
        )
        _sow_losses(self, values, y)
        return y, after

    def initial_state(self, input_shape: Sequence[int], dtype: DTypeLike | None = None) -> Array:
        """The state before the first token: zeros.

        Args:
            input_shape: an input's, `(*batch, L, C)` or `(*batch, C, L)`, with any L.
            dtype: the state's dtype; None means that of the computation, or else of the parameters.
        """
        return self.spec.initial_state(input_shape, dtype)


def regularization_loss(
    model: nn.Module,
    params: Any,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Array:
    """The sum of all weight penalties of a model, which depends only on its parameters.

    Works for any Linen model that contains these layers at any depth, including inside nn.scan and nn.vmap (each
    instance counts), whatever collections these lift. The sum excludes activity penalties, which are sown into
    "losses".

    Args:
        model: the unbound model.
        params: its parameters, as `model.init(...)["params"]` gives them.
        *args, rngs, method, **kwargs: the arguments of `model.init`; example inputs may be `jax.ShapeDtypeStruct`s.

    Returns:
        A scalar in float32 or wider.

    Raises:
        ValueError: `params` lacks a regularized parameter of the model, or holds one of another shape.

    Examples:
        >>> import jax
        >>> layer = DepthwiseConv2D(3, depthwise_initializer="ones", depthwise_regularizer="l2")
        >>> x = jax.numpy.ones((1, 8, 8, 4))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> print(f"{regularization_loss(layer, params, x):.3f}")  # 0.01 times the 36 weights' squares
        0.360
    """
    found = introspect.collect(model, *args, rngs=rngs, method=method, **kwargs)
    params = meta.unbox(params)
    total = jnp.zeros((), jnp.float32)
    for path, parameter in jax.tree_util.tree_leaves_with_path(found):
        if parameter.regularizer is None:
            continue
        name, value = jax.tree_util.keystr(path), params
        for entry in path:
            if not isinstance(value, Mapping) or entry.key not in value:
                raise ValueError(f"params must hold the model's parameter {name}")
            value = value[entry.key]
        if jnp.shape(value) != parameter.shape:
            raise ValueError(f"params{name} must have the shape {parameter.shape}; got {jnp.shape(value)}")

        def penalty(instance: Array, regularizer: Any = parameter.regularizer) -> Array:
            return regularizers.penalty(regularizer, instance)

        total = added(total, jnp.sum(introspect.per_instance(penalty, parameter.lifted_axes, reduces=True)(value)))
    return total
