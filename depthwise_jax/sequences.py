"""causal_conv1d: the short causal convolution of sequence models, with state, packed documents and lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from depthwise_jax._core import hints
from depthwise_jax._core.layout import DataFormat, Layout
from depthwise_jax._core.window import per_axis
from depthwise_jax.functional import Request, array, convolve, empty_output, kernel_layout
from depthwise_jax.lowering import Implementation


def causal_conv1d(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    state: ArrayLike | None = None,
    segment_pos: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    dilation_rate: int = 1,
    activation: Any = None,
    data_format: DataFormat = "channels_last",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
    in_sharding: PartitionSpec | None = None,
) -> tuple[Array, Array]:
    """Convolves each channel over time with its own kernels; an output sees the inputs up to its own and none later.

    With `S = (K - 1)*dilation_rate` and `z = [state, x]` along time,

    `y[t, c*M + m] = sum over j < K of z[S + t - j*dilation_rate, c] * kernel[K-1-j, c, m]`,

    where with segment_pos only the terms with `j*dilation_rate <= segment_pos[t]` or `j = 0` count. Without state and
    segments it is `depthwise_conv(padding="causal")`. A sequence may be computed in chunks of any length, each with the
    state after the chunk before it; the numbers are the same as for the whole sequence.

    Args:
        x: `(*batch, L, C)`, or `(*batch, C, L)` with channels_first; any number of batch axes, any `L >= 0`. One
            decoding step has `L = 1`.
        kernel: `(K, C, M)`.
        bias: `(C*M,)`, added to the convolution.
        state: `(*batch, S, C)`, or `(*batch, C, S)` with channels_first: the inputs before x, oldest first; None means
            zeros. It does not influence the dtype of y.
        segment_pos: `(*batch, L)`, integers: how many tokens of its own document precede each token, including those in
            the state. It describes several documents in a row, documents that continue in the next chunk, a stale state
            (0 at the first token) and padding (negative: the token sees only itself).
        segment_ids: `(*batch, L)`, integers: adjacent tokens with the same id are a document. For rows that begin with
            a document, without a state; segment_pos is more general.
        lengths: `(*batch,)`, integers from 0 to L: the number of tokens in each row; the rest is padding. The returned
            state ends there, and the outputs after it are meaningless.
        dilation_rate: distance between taps in time.
        activation: a name ("silu", "gelu", ...) or a callable, applied last.
        data_format: "channels_last" or "channels_first".
        precision, preferred_element_type, implementation, in_sharding: as in `depthwise_conv`.

    Returns:
        y, `(*batch, L, C*M)` or `(*batch, C*M, L)`, in the dtype that x, kernel and bias promote to; and the state
        after x, in the state's shape and dtype (those of x without one).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what came and what is expected.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((2, 10, 8)), jnp.ones((4, 8, 1))
        >>> y, state = causal_conv1d(x, kernel, activation="silu")
        >>> y.shape, state.shape
        ((2, 10, 8), (2, 3, 8))
        >>> y, state = causal_conv1d(x[:, -1:], kernel, state=state)
        >>> y.shape, state.shape
        ((2, 1, 8), (2, 3, 8))
    """
    x, kernel = array("x", x), array("kernel", kernel)
    if kernel.ndim != 3:
        raise ValueError(
            f"kernel must have shape (K, C, M); got shape {kernel.shape}{hints.of_kernel(kernel.shape, None)}"
        )
    request = Request.of(
        kernel_layout(kernel.shape, data_format, "kernel"),
        strides=1,
        padding="causal",
        dilation_rate=dilation_rate,
        activation=activation,
        precision=precision,
        implementation=implementation,
        in_sharding=in_sharding,
    )
    return convolve_causally(
        request,
        x,
        kernel,
        bias,
        state=state,
        segment_pos=segment_pos,
        segment_ids=segment_ids,
        lengths=lengths,
        preferred_element_type=preferred_element_type,
    )


def causal_conv1d_state(
    x: ArrayLike,
    state: ArrayLike | None = None,
    *,
    kernel_size: int,
    dilation_rate: int = 1,
    lengths: ArrayLike | None = None,
    data_format: DataFormat = "channels_last",
) -> Array:
    """The state of `causal_conv1d` after x, without the convolution.

    After speculative decoding, `causal_conv1d_state(drafted, state_before, kernel_size=K, lengths=accepted)` is the
    state after the tokens that were accepted.

    Args:
        x, state, dilation_rate, lengths, data_format: as in `causal_conv1d`.
        kernel_size: K.

    Returns:
        The state, as `causal_conv1d` returns it.

    Raises:
        TypeError, ValueError: as causal_conv1d.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(10.0).reshape(2, 5, 1)
        >>> causal_conv1d_state(x, kernel_size=3, lengths=jnp.array([5, 1]))[..., 0].tolist()
        [[3.0, 4.0], [0.0, 5.0]]
    """
    x, layout = array("x", x), Layout(1, data_format)
    if x.ndim < 2:
        raise ValueError(f"x must have shape {_axes(layout, 'L', 'C')}; got shape {x.shape}")
    span = _span(kernel_size, dilation_rate)
    state = _checked_state(state, x, span, layout)
    return _state_after(x, state, _checked_lengths(lengths, x, layout), span, layout)


def convolve_causally(
    request: Request,
    x: Array,
    kernel: Array,
    bias: ArrayLike | None = None,
    *,
    state: ArrayLike | None = None,
    segment_pos: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    preferred_element_type: DTypeLike | None = None,
    operand_dtype: Any = None,
) -> tuple[Array, Array]:
    """causal_conv1d of a request with padding "causal"; x and state are first cast to operand_dtype if one is given."""
    layout, taps = request.layout, kernel.shape[0]
    (length,) = request.spatial(x.shape, kernel.shape)
    (dilation,) = per_axis(request.dilation_rate, 1, "dilation_rate")
    span = _span(taps, dilation)
    if segment_ids is not None and segment_pos is not None:
        raise ValueError(
            "segment_ids must be None if segment_pos is given; got both: pass only segment_pos, which also says where "
            "documents begin"
        )
    if segment_ids is not None and state is not None:
        raise ValueError(
            "segment_ids must be None if a state is given; got both: pass segment_pos instead, since ids do not tell "
            "which tokens of the state belong to the first document"
        )
    state = _checked_state(state, x, span, layout)
    if segment_ids is not None:
        reach = _run_lengths(_per_token(segment_ids, "segment_ids", x, layout), span)
    elif segment_pos is not None:
        reach = _per_token(segment_pos, "segment_pos", x, layout)
    else:
        reach = None
    after = _state_after(x, state, _checked_lengths(lengths, x, layout), span, layout)
    if operand_dtype is not None:
        x = x.astype(operand_dtype)
    if isinstance(length, int) and length == 0:
        return empty_output(request, x, kernel, bias, preferred_element_type=preferred_element_type), after
    if reach is not None:
        reach = jnp.clip(reach // dilation, 0, taps - 1).astype(jnp.int32)
    if state is not None:
        request = replace(request, padding="valid")
        x = lax.concatenate([state.astype(x.dtype), x], x.ndim + layout.spatial[0])
    y = convolve(request, x, kernel, bias, reach=reach, preferred_element_type=preferred_element_type)
    return y, after


def _span(kernel_size: int, dilation_rate: int) -> int:
    """How many positions before its own position an output sees."""
    (size,), (dilation,) = per_axis(kernel_size, 1, "kernel_size"), per_axis(dilation_rate, 1, "dilation_rate")
    return (size - 1) * dilation


def _axes(layout: Layout, length: Any, channels: Any, *batch: Any) -> str:
    """A shape in words."""
    return f"({', '.join(map(str, layout.arrange(batch or ['*batch'], [length], channels)))})"


def _checked_state(state: ArrayLike | None, x: Array, span: int, layout: Layout) -> Array | None:
    if state is None:
        return None
    state = array("state", state)
    batch, channels = x.shape[: x.ndim - 2], x.shape[layout.channels]
    expected = tuple(layout.arrange(batch, [span], channels))
    if state.shape == expected:
        return state
    hint = ""
    if state.ndim == x.ndim + 1:
        axis = state.ndim + layout.spatial[0]
        hint = f"; x of one token needs a time axis: jnp.expand_dims(x, {axis})"
    elif state.shape == tuple(layout.arrange(batch, [span + 1], channels)):
        kept = "state[..., 1:, :]" if layout.channels == -1 else "state[..., 1:]"
        hint = f"; a state holds only the inputs before x, oldest first: of one as wide as the window, pass {kept}"
    elif state.shape == (*batch, *reversed(expected[-2:])):
        hint = "; of a state of the other data format, pass jnp.swapaxes(state, -1, -2)"
    elif state.shape == (*batch, *reversed(layout.arrange((), [span + 1], channels))):
        kept = "jnp.swapaxes(state, -1, -2)" + ("[..., 1:, :]" if layout.channels == -1 else "[..., 1:]")
        hint = f"; of a state of the other data format that is as wide as the window, pass {kept}"
    raise ValueError(
        f"state must have shape {_axes(layout, '(K-1)*dilation_rate', 'C')} = {expected}, to fit x of shape {x.shape}; "
        f"got shape {state.shape}{hint}"
    )


def _per_token(values: ArrayLike, name: str, x: Array, layout: Layout) -> Array:
    """segment_pos or segment_ids, checked."""
    values = _integers(values, name)
    expected = (*x.shape[: x.ndim - 2], *layout.spatial_shape(x.shape))
    if values.shape != expected:
        raise ValueError(
            f"{name} must have shape (*batch, L) = {expected}, to fit x of shape {x.shape} and "
            f"data_format={layout.data_format!r}; got shape {values.shape}{_no_time_axis(x, values.shape[:-1])}"
        )
    return values if values.dtype.itemsize > 2 else values.astype(jnp.int32)


def _checked_lengths(lengths: ArrayLike | None, x: Array, layout: Layout) -> Array | None:
    if lengths is None:
        return None
    lengths = _integers(lengths, "lengths")
    if lengths.shape != x.shape[: x.ndim - 2]:
        raise ValueError(
            f"lengths must have shape (*batch,) = {x.shape[: x.ndim - 2]}, to fit x of shape {x.shape} and "
            f"data_format={layout.data_format!r}; got shape {lengths.shape}{_no_time_axis(x, lengths.shape)}"
        )
    return lengths


def _no_time_axis(x: Array, batch: tuple[int, ...]) -> str:
    """A hint if x seems to be (B, C), one token of each row, where another argument has this batch."""
    return "; x of one token needs a time axis too, (B, 1, C)" if x.ndim == 2 and batch == x.shape[:1] else ""


def _integers(values: ArrayLike, name: str) -> Array:
    values = array(name, values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers; got dtype {values.dtype}")
    return values


def _run_lengths(ids: Array, most: int) -> Array:
    """How many tokens directly before each one have the same id, counted at least up to `most`."""
    width, counts = 1, (ids == _before(ids, 1)) & (_before(jnp.ones_like(ids), 1) == 1)
    counts = counts.astype(jnp.int32)
    while width < most:
        counts += jnp.where(counts == width, _before(counts, width), 0)
        width *= 2
    return counts


def _before(a: Array, by: int) -> Array:
    """The entry `by` places before each entry of the last axis; zero before the first."""
    return lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0)] * (a.ndim - 1) + [(by, -by, 0)])


def _state_after(x: Array, state: Array | None, lengths: Array | None, span: int, layout: Layout) -> Array:
    """The last `span` positions of [state, x], or those before lengths[row] of x."""
    axis = x.ndim + layout.spatial[0]
    batch, length, channels = x.shape[: x.ndim - 2], x.shape[axis], x.shape[layout.channels]
    if state is None:
        state = jnp.zeros(layout.arrange(batch, [span], channels), x.dtype)
    if span == 0 or (isinstance(length, int) and length == 0):
        return state
    if lengths is not None:
        places = jnp.expand_dims(lengths, -1) + jnp.arange(span)
        kept, added = (jnp.expand_dims(places - start, layout.channels) for start in (0, span))
        return jnp.where(added < 0, _taken(state, kept, axis), _taken(x, added, axis).astype(state.dtype))
    if isinstance(length, int) and length >= span:
        return lax.slice_in_dim(x, length - span, length, axis=axis).astype(state.dtype)
    # A symbolic length may be less than the span.
    joined = lax.concatenate([state, x.astype(state.dtype)], axis)
    return lax.slice_in_dim(joined, length, length + span, axis=axis)


def _taken(a: Array, places: Array, axis: int) -> Array:
    """The entries at some places of an axis; for places outside, the nearest entry."""
    return jnp.take_along_axis(a, jnp.clip(places, 0, a.shape[axis] - 1), axis=axis, mode="clip")
