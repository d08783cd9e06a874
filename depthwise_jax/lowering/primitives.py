"""The three primitives: a convolution, and its transposes in x and in kernel.

For a fixed window the three maps

    conv_p          y  = conv(x, kernel)
    input_grad_p    dx = input_grad(g, kernel)
    kernel_grad_p   dw = kernel_grad(x, g)

are bilinear, and the two transposes of each are the other two. So they are closed under forward and reverse mode in any
nesting: every derivative of any order runs on the same three maps. A fourth,

    conv_fused_p    activation(conv(x, kernel) + bias)

is for bias and activations that a compiled kernel can apply as it stores the result. Its value stays fused when it is
differentiated. Its derivative is that of the three maps times a mask, which its value determines.

Each of the three maps also takes a third operand, `reach` (*stacked, *batch, out), for a packed map of one axis at
stride one. Output o then sums only the taps at most reach[o] >= 0 taps before its last one:

    y[o] = sum over t with K-1-t <= reach[o] of x[o + t*d - low] * kernel[t]

For a fixed reach, which is integer and has no derivative, the maps are still bilinear, and the transposes of each are
the other two with the same reach.

Their parameters: `convolution`, the static Convolution; `stacked`, the number of leading axes that both operands share,
as from vmap over both, where each index is a separate convolution; `dtype`, the result's; `implementation`, the name of
a lowering or None; and `differentiated`, True if derivatives are taken at a value, and absent otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.extend.core.primitives import name_p
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from depthwise_jax import lowering
from depthwise_jax._core import dtypes, fused, sharding
from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.sharding import Partitioning

# The name of a convolution's value in remat policies, such as
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
    implementation: lowering.Implementation | None,
    stacked: int = 0,
    **params: Any,
) -> Array:
    """Applies one of the primitives.

    Args:
        primitive: conv_p, input_grad_p or kernel_grad_p; or conv_fused_p, which takes x, kernel and perhaps a bias
            (*stacked, C*M), and the parameter `activation`, one of fused.ACTIVATIONS.
        *operands: two of x (*stacked, *batch, *spatial, C), kernel (*stacked, *window, C, M) and g, shaped like y,
            (*stacked, *batch, *out, C*M), in the order of the primitive; with channels_first as in Layout. They may
            differ in dtype. For a packed map, reach (*stacked, *batch, out) in int32 follows.
        convolution, dtype, implementation, stacked, **params: the parameters.

    Returns:
        The third of x, kernel and g or y, in `dtype`.
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
    implementation: lowering.Implementation | None,
    stacked: int,
    differentiated: bool = False,
) -> Any:
    del implementation, differentiated  # every lowering gives the same type
    shape = (*avals[0].shape[:stacked], *shape_rule(convolution, *(aval.shape[stacked:] for aval in avals[:2])))
    model = _on_mesh(avals)
    specs = [sharding.entries(aval.sharding.spec, aval.ndim) for aval in avals]
    stack = [sharding.agree("mapped axes", *(spec[axis] for spec in specs)) for axis in range(stacked)]
    spec = PartitionSpec(*stack, *spec_rule(convolution, *(spec[stacked:] for spec in specs[:2])))
    # update() keeps an aval's other properties: the manual axes over which it varies, and its memory.
    return model.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(model.sharding.mesh, spec))


def result_type(operand: Any, kernel: Any, convolution: Convolution, dtype: Any, transposed: bool) -> Any:
    """The type of y, with its sharding, from the types of x and kernel; if transposed, that of x from y and kernel."""
    return _abstract_eval(
        Convolution.input_grad_shape if transposed else Convolution.forward_shape,
        sharding.forward_spec,
        operand,
        kernel,
        convolution=convolution,
        dtype=dtype,
        implementation=None,
        stacked=0,
    )


def _transpose_rule(primitive: Primitive, position: int, cotangent_first: bool) -> Callable[..., Array]:
    """The transpose in the operand at a position: a primitive of the cotangent and the other operand."""

    def rule(cotangent: Array, *operands: Any, dtype: Any, differentiated: bool = False, **params: Any) -> Array:
        del dtype, differentiated  # the cotangent's
        aval, other = operands[position].aval, operands[1 - position]
        arguments = (cotangent, other) if cotangent_first else (other, cotangent)
        result = bind(primitive, *arguments, *operands[2:], dtype=aval.dtype, **params)
        # Under explicit sharding a cotangent has its operand's sharding, which may differ from this result's.
        mesh = jax.typeof(result).sharding.mesh
        if jax.typeof(result).sharding.spec != aval.sharding.spec:
            result = jax.sharding.reshard(result, NamedSharding(mesh, aval.sharding.spec))
        return result

    return rule


def _batching_rule(
    primitive: Primitive, operands: Sequence[Array], dims: Sequence[int | None], *, stacked: int, **params: Any
) -> tuple[Array, int]:
    """Adds a batch axis if only x or g is mapped and the map keeps it, and a stacked axis otherwise.

    The reach of a packed map has the batch axes of x and g, and is mapped with them.
    """
    first, *others = operands
    size = next(a.shape[dim] for a, dim in zip(operands, dims, strict=True) if dim is not None)
    reach = others[1:] if primitive is not conv_fused_p else []
    fixed = dims[1 : len(dims) - len(reach)]
    if dims[0] is not None and all(dim is None for dim in fixed) and primitive is not kernel_grad_p:
        first = jnp.moveaxis(first, dims[0], stacked)
        reach = [
            jnp.broadcast_to(jnp.expand_dims(a, stacked), (*a.shape[:stacked], size, *a.shape[stacked:]))
            if dim is None
            else jnp.moveaxis(a, dim, stacked)
            for a, dim in zip(reach, dims[len(dims) - len(reach) :], strict=True)
        ]
        others[len(others) - len(reach) :] = reach
        return bind(primitive, first, *others, stacked=stacked, **params), stacked
    mapped = (
        jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)
        for a, dim in zip(operands, dims, strict=True)
    )
    return bind(primitive, *mapped, stacked=stacked + 1, **params), 0


def _impl(primitive: Primitive, *operands: Array, **params: Any) -> Array:
    config: Any = jax.config
    checked = config.jax_debug_nans, config.jax_debug_infs
    with jax.disable_jit(False):  # without jit a primitive would call itself
        if not any(checked):
            return _compiled(primitive, **params)(*operands)
        # If JAX's own check of a jitted function fails, it calls it without jit, which would be this function again.
        with jax.debug_nans(False), jax.debug_infs(False):
            result = _compiled(primitive, **params)(*operands)
    _check_finite(primitive, result, *checked)
    return result


def _check_finite(primitive: Primitive, result: Array, nans: bool, infs: bool) -> None:
    """Raises FloatingPointError as jax_debug_nans and jax_debug_infs require."""
    if not jnp.issubdtype(result.dtype, jnp.inexact):
        return
    for shard in result.addressable_shards:
        values = np.asarray(shard.data)
        for name, asked, test in (("nan", nans, np.isnan), ("inf", infs, np.isinf)):
            if asked and test(values).any():
                raise FloatingPointError(f"invalid value ({name}) encountered in {primitive.name}")


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
    shapes = [aval.shape[stacked:] for aval in avals[:2]]
    *_, channels, multiplier = convolution.kernel_grad_shape(*shapes) if direction == "kernel_grad" else shapes[1]
    packed = run is lowering.run and len(avals) == 3
    numbers = avals[:2] if packed else avals
    call = lowering.Call(
        direction,
        convolution,
        platform,
        functools.reduce(dtypes.promoted, (aval.dtype for aval in numbers), dtype),
        Partitioning.of_program(direction, convolution, ctx, stacked),
        exported=ctx.module_context.lowering_parameters.for_export,
        channels=channels,
        multiplier=multiplier,
        differentiated=differentiated,
        packed=packed,
    )
    # Traced without shardings, because lax's own rules would refuse them; the compiler propagates the operands'.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals]
    # The operands' dtypes were checked when the call was made, so strict promotion need not apply here.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.numpy_dtype_promotion("standard"):
        lower = mlir.lower_fun(functools.partial(run, call=call), multiple_results=False)
        return lower(ctx.replace(avals_in=plain), *operands, dtype=dtype, stacked=stacked, **params)


def _register(
    primitive: Primitive,
    direction: str,
    abstract_eval: Callable[..., Any],
    run: Callable[..., Array],
) -> None:
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(_impl, primitive))
    batching.primitive_batchers[primitive] = functools.partial(_batching_rule, primitive)
    # One rule per platform: JAX indexes a rule that two platforms share wrongly in an export for several platforms.
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
    rules = [
        _transpose_rule(transpose, i, cotangent_first) for i, (transpose, cotangent_first) in enumerate(transposes)
    ]
    ad.primitive_jvps[primitive] = functools.partial(_bilinear_jvp, primitive)
    ad.primitive_transposes[primitive] = functools.partial(_bilinear_transpose, rules)
    jet.jet_rules[primitive] = functools.partial(_bilinear_jet, primitive)


# JAX's own rules for bilinear maps do not allow a third operand.


def _tangent(primitive: Primitive, primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
    """The tangent of a bilinear map's value."""
    (first, second, *reach), (dfirst, dsecond, *_) = primals, tangents
    terms = [(dfirst, second)] * (type(dfirst) is not ad.Zero) + [(first, dsecond)] * (type(dsecond) is not ad.Zero)
    return functools.reduce(ad.add_tangents, (bind(primitive, *term, *reach, **params) for term in terms))


def _bilinear_jvp(
    primitive: Primitive, primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[Array, Any]:
    return bind(primitive, *primals, **params), _tangent(primitive, primals, tangents, **params)


def _bilinear_transpose(
    rules: Sequence[Callable[..., Array]], cotangent: Any, *operands: Any, **params: Any
) -> list[Array | None]:
    """The cotangent of the unknown operand, by its rule; None for the others."""
    results: list[Array | None] = [None] * len(operands)
    position = next(i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    if type(cotangent) is not ad.Zero:
        results[position] = rules[position](cotangent, *operands, **params)
    return results


def _bilinear_jet(
    primitive: Primitive, primals: Sequence[Array], series: Sequence[Sequence[Array]], **params: Any
) -> tuple[Array, list[Array]]:
    """The product of two Taylor series, given and returned as coefficients without factorials."""
    first, second = ([primal, *terms] for primal, terms in zip(primals[:2], series[:2], strict=True))
    products = [
        functools.reduce(
            jnp.add, (bind(primitive, first[j], second[k - j], *primals[2:], **params) for j in range(k + 1))
        )
        for k in range(len(first))
    ]
    return products[0], products[1:]


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


def _value_jvp(
    primitive: Primitive,
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    differentiated: bool = False,
    **params: Any,
) -> tuple[Array, Any]:
    """Names a value that is differentiated. Policies ask only there, and JAX cannot transpose a name elsewhere."""
    del differentiated
    y = checkpoint_name(bind(primitive, *primals, differentiated=True, **params), CHECKPOINT_NAME)
    return y, _tangent(primitive, primals, tangents, **params)


# The two primitives that are values of functions: of depthwise_conv, and of depthwise_conv_transpose.
for _primitive in (conv_p, input_grad_p):
    ad.primitive_jvps[_primitive] = functools.partial(_value_jvp, _primitive)


def _name_jet(primals: Sequence[Array], series: Sequence[Sequence[Array]], **params: Any) -> tuple[Array, list[Array]]:
    (primal,), (terms,) = primals, series
    return name_p.bind(primal, **params), list(terms)


# jet has no rule for a name, so without one it fails on a gradient in which _value_jvp has named a value.
jet.jet_rules.setdefault(name_p, _name_jet)


def _fused_abstract_eval(x: Any, kernel: Any, *bias: Any, activation: str, **params: Any) -> Any:
    del activation
    y = _abstract_eval(Convolution.forward_shape, sharding.forward_spec, x, kernel, **params)
    spec = list(y.sharding.spec)
    axis = params["convolution"].layout.channels
    for b in bias:
        spec[axis] = sharding.agree("channels", spec[axis], *b.sharding.spec[-1:])
    return y.update(sharding=NamedSharding(_on_mesh((y, *bias)).sharding.mesh, PartitionSpec(*spec)))


def _on_mesh(avals: Sequence[Any]) -> Any:
    """The first type that has a mesh, else the first."""
    return next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])


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
            dy = dy + fused.align_bias(db.astype(y.dtype), params["convolution"].layout, y.ndim)
    return y, fused.mask(activation, y, dy)


def _fused_jet(
    primals: Sequence[Array], series: Sequence[Sequence[Array]], *, activation: str, **params: Any
) -> tuple[Array, list[Array]]:
    y = bind(conv_fused_p, *primals, activation=activation, **params)
    _, terms = _bilinear_jet(conv_p, primals[:2], series[:2], **params)
    for bias in series[2:]:
        aligned = (fused.align_bias(b.astype(y.dtype), params["convolution"].layout, y.ndim) for b in bias)
        terms = [term + b for term, b in zip(terms, aligned, strict=True)]
    return y, [fused.mask(activation, y, term) for term in terms]


_register(conv_fused_p, "forward", _fused_abstract_eval, lowering.run_fused)
ad.primitive_jvps[conv_fused_p] = _fused_jvp
jet.jet_rules[conv_fused_p] = _fused_jet
