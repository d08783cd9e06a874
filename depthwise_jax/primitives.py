"""The three primitives: a convolution, and its transposes in x and in kernel.

For a fixed window the three maps

    conv_p          y  = conv(x, kernel)
    input_grad_p    dx = input_grad(g, kernel)
    kernel_grad_p   dw = kernel_grad(x, g)

are bilinear, and the two transposes of each are the other two. So they are closed under forward and reverse mode in any
nesting: every derivative of any order runs on the same three maps. A fourth,

    conv_fused_p    activation(conv(x, kernel) + bias)

is for what a compiled kernel can do at its store. Its value stays fused where it is differentiated, and its derivative
is the three maps' times a mask that its value tells.

Their parameters: `convolution`, the static Convolution; `stacked`, how many leading axes both operands have in common,
each index of which is a convolution of its own (what vmap over both makes); `dtype`, the result's; `implementation`,
the name of a lowering or None; and `differentiated`, True where derivatives are taken at a value of conv_p or
conv_fused_p, and absent elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from depthwise_jax import lowering, sharding
from depthwise_jax.convolution import Convolution

# What remat policies call a convolution's value, such as
# jax.checkpoint_policies.save_only_these_names("depthwise_conv").
CHECKPOINT_NAME = "depthwise_conv"

conv_p = Primitive("depthwise_conv")
input_grad_p = Primitive("depthwise_input_grad")
kernel_grad_p = Primitive("depthwise_kernel_grad")
conv_fused_p = Primitive("depthwise_conv_fused")


def bind(
    primitive: Primitive,
    *operands: Array,
    convolution: Convolution,
    dtype: Any,
    implementation: str | None,
    stacked: int = 0,
    **params: Any,
) -> Array:
    """Applies one of the primitives.

    Args:
        primitive: conv_p, input_grad_p or kernel_grad_p; or conv_fused_p, which takes x, kernel and perhaps a bias
            (*stacked, C*M), and the parameter `activation`, one of lowering.native.ACTIVATIONS.
        *operands: two of x (*stacked, *batch, *spatial, C), kernel (*stacked, *window, C, M) and g, shaped as y,
            (*stacked, *batch, *out, C*M), in the order of the primitive; channels_first as Layout has it. They may
            differ in dtype.
        convolution, dtype, implementation, stacked, **params: the parameters.

    Returns:
        The third, in `dtype`.
    """
    # shard_map's type check demands operands that vary over the same manual axes.
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    aligned = [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(operands, missing, strict=True)]
    return primitive.bind(
        *aligned,
        convolution=convolution,
        dtype=jnp.dtype(dtype),
        implementation=implementation,
        stacked=stacked,
        **params,
    )


def _abstract_eval(
    shape_rule: Callable[..., tuple[int, ...]],
    spec_rule: Callable[..., tuple[Any, ...]],
    *avals: Any,
    convolution: Convolution,
    dtype: Any,
    implementation: str | None,
    stacked: int,
    differentiated: bool = False,
) -> Any:
    del implementation, differentiated  # every lowering gives the same type
    shape = (*avals[0].shape[:stacked], *shape_rule(convolution, *(aval.shape[stacked:] for aval in avals)))
    model = next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])
    specs = [(*aval.sharding.spec, *(None,) * (aval.ndim - len(aval.sharding.spec))) for aval in avals]
    stack = [sharding.agree("mapped axes", *(spec[axis] for spec in specs)) for axis in range(stacked)]
    spec = PartitionSpec(*stack, *spec_rule(convolution, *(spec[stacked:] for spec in specs)))
    # update() keeps what else an aval has: the manual axes over which it varies, and its memory.
    return model.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(model.sharding.mesh, spec))


def _transpose_rule(primitive: Primitive, position: int, cotangent_first: bool) -> Callable[..., Array]:
    """The transpose in the operand at a position, as a primitive of the cotangent and the other operand."""

    def rule(cotangent: Array, *operands: Any, dtype: Any, differentiated: bool = False, **params: Any) -> Array:
        del dtype, differentiated  # the cotangent's
        aval, other = operands[position].aval, operands[1 - position]
        arguments = (cotangent, other) if cotangent_first else (other, cotangent)
        result = bind(primitive, *arguments, dtype=aval.dtype, **params)
        # Under explicit sharding a cotangent is sharded as its operand is, which may differ from this result.
        mesh = jax.typeof(result).sharding.mesh
        if jax.typeof(result).sharding.spec != aval.sharding.spec:
            result = jax.sharding.reshard(result, NamedSharding(mesh, aval.sharding.spec))
        return result

    return rule


def _batching_rule(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], *, stacked: int, **params: Any
) -> tuple[Array, int]:
    """One more batch axis where only x or g is mapped, over a map that keeps it; one more stacked axis otherwise."""
    first, *others = operands
    if dims[0] is not None and all(dim is None for dim in dims[1:]) and primitive is not kernel_grad_p:
        first = jnp.moveaxis(first, dims[0], stacked)
        return bind(primitive, first, *others, stacked=stacked, **params), stacked
    size = next(a.shape[dim] for a, dim in zip(operands, dims, strict=True) if dim is not None)
    mapped = (
        jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)
        for a, dim in zip(operands, dims, strict=True)
    )
    return bind(primitive, *mapped, stacked=stacked + 1, **params), 0


def _impl(primitive: Primitive, *operands: Array, **params: Any) -> Array:
    with jax.disable_jit(False):  # a primitive is the smallest thing that runs: without jit it would call itself
        return _compiled(primitive, **params)(*operands)


@functools.lru_cache(maxsize=4096)
def _compiled(primitive: Primitive, **params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(primitive.bind, **params))


def _lowering_rule(
    run: Callable[..., Array],
    direction: str,
    platform: str,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    convolution: Convolution,
    dtype: Any,
    stacked: int,
    differentiated: bool = False,
    **params: Any,
) -> Any:
    avals: Sequence[Any] = ctx.avals_in
    image = avals[0].shape[stacked:]
    specs = [(*aval.sharding.spec, *(None,) * (aval.ndim - len(aval.sharding.spec))) for aval in avals[:2]]
    spatial = [convolution.layout.spatial_shape(spec) for spec in (specs if direction == "kernel_grad" else specs[:1])]
    partitioned = _partitioned(ctx)
    shapes = [aval.shape[stacked:] for aval in avals[:2]]
    *_, channels, multiplier = convolution.kernel_grad_shape(*shapes) if direction == "kernel_grad" else shapes[1]
    call = lowering.Call(
        direction,
        convolution,
        platform,
        jnp.result_type(*(aval.dtype for aval in avals), dtype),
        partitioned=partitioned,
        copies=bool(stacked) or not _without_copies(avals, specs, convolution, partitioned),
        rows=any(rows for rows, *_ in spatial)
        or (not _typed(avals[0]) and lowering.is_small(convolution.batch(image), math.prod(partitioned))),
        slabs=not any(map(any, spatial)) and lowering.has_slabs(image, convolution),
        exported=ctx.module_context.lowering_parameters.for_export,
        batch=_batch_on_one_device(avals[0], stacked, convolution, partitioned),
        channels=channels,
        multiplier=multiplier,
        whole_channels=not partitioned or (_typed(avals[0]) and specs[0][convolution.layout.channels] is None),
        differentiated=differentiated,
    )
    # Traced without shardings, which lax's own rules would refuse: the compiler propagates them from the operands.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        lower = mlir.lower_fun(functools.partial(run, call=call), multiple_results=False)
        return lower(ctx.replace(avals_in=plain), *operands, dtype=dtype, stacked=stacked, **params)


def _partitioned(ctx: mlir.LoweringRuleContext) -> tuple[int, ...]:
    """The mesh axes over which the compiler partitions this program: none on one device, or if all is in shard_map."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        return () if axes.manual_axes == frozenset(axes.mesh.axis_names) else _large(axes.mesh.shape.values())
    if not isinstance(axes, mlir.ShardingContext) or axes.num_devices == 1:
        return ()
    avals: Sequence[Any] = ctx.avals_in
    meshes = (aval.sharding.mesh for aval in avals)
    # A mesh that only the arguments of jit have (in_shardings) is not seen here.
    return next((_large(mesh.shape.values()) for mesh in meshes if not mesh.empty), (axes.num_devices, 1))


def _batch_on_one_device(aval: Any, stacked: int, convolution: Convolution, partitioned: tuple[int, ...]) -> int | None:
    """The product of the leading axes of x or y on one device, if the types tell it."""
    leading = convolution.batch(aval.shape[stacked:])
    if not all(isinstance(n, int) for n in leading) or (partitioned and not _typed(aval)):
        return None
    shape = aval.sharding.shard_shape(aval.shape) if _typed(aval) else aval.shape
    return math.prod(shape[: stacked + len(leading)])


def _typed(aval: Any) -> bool:
    """Whether a type says how its array is sharded."""
    mesh = aval.sharding.mesh
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _without_copies(
    avals: Sequence[Any], specs: Sequence[Sequence[Any]], convolution: Convolution, partitioned: tuple[int, ...]
) -> bool:
    """Whether the types of x and g shard both alike over all mesh axes, and one batch axis at most."""
    x, g = specs
    names = {name for entry in x for name in (entry if isinstance(entry, tuple) else (entry,))}
    over = _large(size for name, size in avals[0].sharding.mesh.shape.items() if name in names)
    return x == g and over == partitioned and not any(convolution.batch(x)[1:])


def _large(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size > 1)


def _register(
    primitive: Primitive,
    direction: str,
    abstract_eval: Callable[..., Any],
    run: Callable[..., Array],
) -> None:
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(_impl, primitive))
    batching.primitive_batchers[primitive] = functools.partial(_batching_rule, primitive)
    # One platform per rule: a rule that two platforms share is indexed wrongly in an export for several platforms.
    for platform in lowering.PLATFORMS:
        rule = functools.partial(_lowering_rule, run, direction, platform)
        mlir.register_lowering(primitive, rule, platform=platform)


def _define(
    primitive: Primitive,
    direction: str,
    shape_rule: Callable[..., tuple[int, ...]],
    spec_rule: Callable[..., tuple[Any, ...]],
    transposes: tuple[tuple[Primitive, bool], tuple[Primitive, bool]],
) -> None:
    _register(primitive, direction, functools.partial(_abstract_eval, shape_rule, spec_rule), lowering.run)
    rules = (
        _transpose_rule(transpose, i, cotangent_first) for i, (transpose, cotangent_first) in enumerate(transposes)
    )
    ad.defbilinear(primitive, *rules)


_define(
    conv_p,
    "forward",
    Convolution.forward_shape,
    sharding.forward_spec,
    ((input_grad_p, True), (kernel_grad_p, False)),
)
_define(
    input_grad_p,
    "input_grad",
    Convolution.input_grad_shape,
    sharding.forward_spec,
    ((conv_p, True), (kernel_grad_p, True)),
)
_define(
    kernel_grad_p,
    "kernel_grad",
    Convolution.kernel_grad_shape,
    sharding.kernel_grad_spec,
    ((input_grad_p, False), (conv_p, False)),
)


def _conv_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, differentiated: bool = False, **params: Any
) -> tuple[Array, Any]:
    """Names the value where it is differentiated, the only place where policies ask: JAX cannot transpose a name."""
    del differentiated
    x, kernel = primals
    dx, dkernel = tangents
    y = checkpoint_name(bind(conv_p, x, kernel, differentiated=True, **params), CHECKPOINT_NAME)
    terms = [(dx, kernel)] * (type(dx) is not ad.Zero) + [(x, dkernel)] * (type(dkernel) is not ad.Zero)
    return y, functools.reduce(ad.add_tangents, (bind(conv_p, *term, **params) for term in terms))


ad.primitive_jvps[conv_p] = _conv_jvp


def _fused_abstract_eval(x: Any, kernel: Any, *bias: Any, activation: str, **params: Any) -> Any:
    del activation
    y = _abstract_eval(Convolution.forward_shape, sharding.forward_spec, x, kernel, **params)
    spec = list(y.sharding.spec)
    axis = params["convolution"].layout.channels
    for b in bias:
        spec[axis] = sharding.agree("channels", spec[axis], *b.sharding.spec[-1:])
    return y.update(sharding=NamedSharding(y.sharding.mesh, PartitionSpec(*spec)))


def _fused_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, activation: str, differentiated: bool = False, **params: Any
) -> tuple[Array, Array]:
    del differentiated
    x, kernel, *_ = primals
    dx, dkernel, *dbias = (None if type(tangent) is ad.Zero else tangent for tangent in tangents)
    y = bind(conv_fused_p, *primals, activation=activation, differentiated=True, **params)
    y = checkpoint_name(y, CHECKPOINT_NAME)
    dy = jnp.zeros_like(y)
    if dx is not None:
        dy = bind(conv_p, dx, kernel, **params)
    if dkernel is not None:
        term = bind(conv_p, x, dkernel, **params)
        dy = term if dx is None else dy + term
    for db in dbias:
        if db is not None:
            dy = dy + lowering.align_bias(db.astype(y.dtype), params["convolution"].layout, y.ndim)
    if activation != "linear":
        inside = (y > 0) & (y < 6) if activation == "relu6" else y > 0
        dy = jnp.where(inside, dy, jnp.zeros_like(dy))
    return y, dy


_register(conv_fused_p, "forward", _fused_abstract_eval, lowering.run_fused)
ad.primitive_jvps[conv_fused_p] = _fused_jvp
