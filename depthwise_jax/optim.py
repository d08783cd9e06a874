"""Optax transforms that keep constrained parameters feasible.

Examples:
    >>> import jax
    >>> import optax
    >>> from depthwise_jax import DepthwiseConv2D
    >>> from depthwise_jax.optim import constraints_of, project
    >>> model = DepthwiseConv2D(3, depthwise_constraint="max_norm")
    >>> constraints = constraints_of(model, jax.ShapeDtypeStruct((1, 28, 28, 3), "float32"))
    >>> optimizer = optax.chain(optax.adamw(1e-3), project(constraints))  # project last

A parameter is feasible if it lies in its constraint's set. `optax.apply_updates` adds the update to the parameter and
rounds the sum; `project` chooses an update after which the rounded sum is feasible. If the parameter was feasible
before (else from the second step on), this holds:

* NonNeg, Box, and the interval of a composition: exactly feasible after any update without NaN.
* MaxNorm, and MinMaxNorm with min_value=0 and rate=1: at most 4 ulp of the parameter's dtype above the bound.
* A parameter narrower than float32 becomes exactly the projection rounded to its dtype, as long as its magnitude and
  the projection's differ by less than `2**12`. For this the update is emitted in float32. With
  `jax_numpy_dtype_promotion="strict"`, JAX refuses to add float32 to a narrower dtype, so the update has the
  parameter's dtype, and only the two points above hold.
* UnitNorm, other MinMaxNorm and any other callable: the projection's own output, up to rounding.

If a slice is feasible and did not move, its numbers stay unchanged, though Keras' formulas would shrink them slightly.

Where `project` belongs in a chain:

* Last. A later transformation may lead out of the set.
* `optax.MultiSteps(optax.chain(opt, project(constraints)), k)` projects once in k micro-steps.
* `optax.chain(optax.apply_if_finite(opt, n), project(constraints))`, not the other way round: apply_if_finite needs
  updates in the gradients' dtype. For parameters narrower than float32, JAX refuses the other order with a TypeError
  about the branches of cond.
* `optax.inject_hyperparams` takes `constraints` and `select` as static arguments:
  `optax.inject_hyperparams(project, static_args=("constraints", "select"))`. To schedule a bound, give it a function
  with a numeric argument: `optax.inject_hyperparams(lambda bound: project(MaxNorm(bound)))(bound=schedule)`.

An average of feasible parameters lies in the set if the set is convex, and then only up to rounding; an average of unit
vectors is not a unit vector. Evaluate with `project_params(average, constraints)`. This concerns exponential averages
(`optax.incremental_update` of the parameters, or `optax.ema` fed with them), the slow parameters of
`optax.lookahead(optax.chain(opt, project(constraints)), ...)`, and `optax.contrib.schedule_free_eval_params`, where
`optax.chain(optax.contrib.schedule_free(opt, ...), project(constraints))` constrains only the parameters at which the
gradient is taken.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey, keystr

from depthwise_jax._core import introspect
from depthwise_jax._core.dtypes import at_least_float32, is_array, promoted
from depthwise_jax._core.registry import named, shown
from depthwise_jax.constraints import Constraint, Lifted, as_constraint, get

__all__ = ["apply_updates_projected", "constraints_of", "feasibility", "project", "project_params"]

Path = tuple[str, ...]


def constraints_of(
    model: Any,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Any:
    """The constraints of a model's layers, for `project`.

    Args:
        model: an unbound Linen module with layers of `depthwise_jax.linen` at any depth; or an NNX module with layers
            of `depthwise_jax.nnx`, without further arguments.
        *args: example inputs, arrays or `jax.ShapeDtypeStruct`s, as for `model.init`. Nothing is computed.
        rngs: as for `model.init`; any key will do, so it may be left out.
        method: as for `model.init`.
        **kwargs: as for `model.init`.

    Returns:
        A tree like `model.init(...)["params"]`, or `nnx.state(model, nnx.Param)`, with a constraint or None for each
        parameter. It is a plain tree to edit: `constraints["Dense_0"]["kernel"] = MaxNorm(0.25)`.

    Examples:
        >>> import jax
        >>> from depthwise_jax import DepthwiseConv2D
        >>> model = DepthwiseConv2D(3, depthwise_constraint="max_norm", bias_constraint="non_neg")
        >>> constraints_of(model, jax.ShapeDtypeStruct((1, 28, 28, 3), "float32"))
        {'bias': NonNeg(), 'kernel': MaxNorm(max_value=2, axis=0, exact=False)}
    """
    if isinstance(model, nn.Module):
        found = introspect.collect(model, *args, rngs=rngs, method=method, **kwargs)
    else:
        from depthwise_jax import nnx  # loaded when first used

        if args or kwargs:
            raise TypeError(
                f"model must be a flax.linen.Module to take example inputs; got {introspect.described(model)}"
            )
        found = nnx.collect(model)
    return jax.tree.map(_constraint_of, found)


def project(
    constraints: Any = None, *, select: Callable[[Path, Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """A gradient transformation after which `optax.apply_updates` gives feasible parameters: last in the chain.

    Args:
        constraints: a tree of constraints and None like the parameters, or a prefix of it: an entry in place of a
            subtree applies to each parameter in it.
        select: instead of `constraints`, a function of `(path, parameter)` that returns a constraint or None; `path` is
            the tuple of names from the root, such as `("Dense_0", "kernel")`.

    Returns:
        A transformation without state. Its `update` needs the parameters. When traced, `init` and `update` check that
        each constraint is callable and keeps shape and dtype; `init` also tries other libraries' constraints on the
        parameters and on the numbers from -1 to 1.

    Raises:
        TypeError: neither argument or both were given. From `init` and `update`: a constraint is not callable.
        ValueError: from `init` and `update`: the parameters are missing, the constraints do not match them, or a
            constraint changes shape or dtype or turns finite numbers into NaN. The message names the parameter.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from depthwise_jax.constraints import NonNeg
        >>> params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
        >>> optimizer = optax.chain(optax.sgd(2.0), project({"kernel": NonNeg(), "bias": None}))
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(new["kernel"], new["bias"])
        [0. 0. 0.] [-1. -1. -1.]
    """
    if (constraints is None) == (select is None):
        given = "neither" if constraints is None else "both"
        raise TypeError(f"project takes either constraints or select; got {given}")

    def init(params: Any) -> optax.EmptyState:
        for path, param, constraint in _constrained(params, constraints, select)[0]:
            if constraint is not None:
                _check(path, param, constraint)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        if params is None:
            raise ValueError("project needs the parameters: call update(updates, state, params)")
        leaves, treedef = _constrained(params, constraints, select)
        projected = [
            update if constraint is None or update is None else _feasible_update(path, param, update, constraint)
            for (path, param, constraint), update in zip(leaves, treedef.flatten_up_to(updates), strict=True)
        ]
        return treedef.unflatten(projected), state

    return optax.GradientTransformationExtraArgs(init, update)


def project_params(params: Any, constraints: Any) -> Any:
    """Projects each constrained parameter: the constraint's own output.

    For parameters that did not come from `project`: initial ones, imported ones, averages.

    Args:
        params: a tree of arrays.
        constraints: as for `project`.

    Returns:
        A tree like `params`, with the same dtypes.

    Raises:
        TypeError, ValueError: as `project`.
    """
    leaves, treedef = _constrained(params, constraints, None)
    return treedef.unflatten(
        [param if constraint is None else _apply(path, constraint, param) for path, param, constraint in leaves]
    )


def apply_updates_projected(params: Any, updates: Any, constraints: Any) -> Any:
    """`optax.apply_updates` and then the projection: always the constraint's own output, unlike a rounded sum.

    Args:
        params: a tree of arrays.
        updates: a tree like `params`, from a chain without `project`.
        constraints: as for `project`.

    Returns:
        The new parameters, a tree like `params`, with the same dtypes.

    Raises:
        TypeError, ValueError: as `project`.
    """
    # The sum must be rounded to the parameters' dtype first; without a barrier XLA may keep more precision.
    return project_params(jax.lax.optimization_barrier(optax.apply_updates(params, updates)), constraints)


def feasibility(params: Any, constraints: Any) -> Any:
    """How far constrained parameters lie outside their sets, to log or to assert.

    Args:
        params: a tree of arrays.
        constraints: as for `project`.

    Returns:
        A tree like `params`. Each constrained parameter becomes its largest violation, a scalar: 0 if the parameter is
        feasible, NaN if it holds a NaN. A parameter without a constraint, or with one that has no `violation`, becomes
        None.

    Raises:
        TypeError, ValueError: as `project`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from depthwise_jax.constraints import MaxNorm
        >>> print(feasibility({"kernel": jnp.array([3.0, 4.0])}, {"kernel": MaxNorm(2.0)})["kernel"])
        3.0
    """
    leaves, treedef = _constrained(params, constraints, None)
    return treedef.unflatten(
        [None if constraint is None else constraint.violation(param) for _, param, constraint in leaves]
    )


def _constraint_of(found: introspect.Found) -> Any:
    if found.constraint is None or not found.lifted_axes:
        return found.constraint
    return Lifted(as_constraint(found.constraint), found.lifted_axes)


def _constrained(
    params: Any, constraints: Any, select: Callable[[Path, Any], Any] | None
) -> tuple[list[tuple[Path, Any, Constraint | None]], Any]:
    """Each parameter with its path and constraint, and the tree's definition.

    Places without a parameter, `None` and those that `optax.masked` leaves out, get the constraint None.
    """
    leaves, treedef = jax.tree.flatten_with_path(params, is_leaf=_is_absent)
    named = [(_names(path), leaf) for path, leaf in leaves]
    lookup = select or _Prefixes(constraints, params, named)
    return [
        (path, leaf, None if _is_absent(leaf) else _resolve(path, lookup(path, leaf))) for path, leaf in named
    ], treedef


class _Prefixes:
    """A tree of constraints as a function of the path; the tree must be a prefix of the parameters."""

    def __init__(self, constraints: Any, params: Any, named: list[tuple[Path, Any]]):
        entries, _ = jax.tree.flatten_with_path(constraints, is_leaf=lambda node: node is None or callable(node))
        self.entries = {_names(path): entry for path, entry in entries}
        known = {path[:length] for path, _ in named for length in range(len(path) + 1)}
        absent = {path for path, leaf in named if _is_absent(leaf)}
        unknown = [
            path
            for path in self.entries
            if path not in known and not any(path[:length] in absent for length in range(len(path)))
        ]
        if unknown:  # perhaps in a subtree without parameters
            empty = {_names(path) for path, _ in jax.tree.leaves_with_path(params, is_leaf=_is_empty)}
            for path in unknown:
                if path not in empty:
                    raise ValueError(f"constraints do not match the parameters: params have no entry {_show(path)}")

    def __call__(self, path: Path, leaf: Any) -> Any:
        for length in range(len(path) + 1):
            if path[:length] in self.entries:
                return self.entries[path[:length]]
        raise ValueError(
            f"constraints do not match the parameters: no entry for {_show(path)}; if it has no constraint, give None"
        )


def _resolve(path: Path, entry: Any) -> Constraint | None:
    if is_array(entry):
        raise TypeError(
            f"constraint of {_show(path)} must be a constraint or None; got {shown(entry)}: "
            "were params and constraints given in the wrong order?"
        )
    resolved = get(entry, f"constraint of {_show(path)}")
    return None if resolved is None else as_constraint(resolved)


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def _names(path: Any) -> Path:
    """The names along a key path, without a final `.value` of a metadata box or an nnx Variable."""
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return tuple(keystr((key,), simple=True) for key in path)


def _show(path: Path) -> str:
    return repr("/".join(path))


def _check(path: Path, param: Any, constraint: Constraint) -> None:
    """Checks a constraint as far as is possible before the first step."""
    jax.eval_shape(lambda w: _apply(path, constraint, w), param)
    if constraint.keeps_finite:
        return
    with jax.ensure_compile_time_eval():
        probes = [jnp.linspace(-1, 1, max(1, param.size))[: param.size].reshape(param.shape).astype(param.dtype)]
        if not isinstance(param, Tracer | jax.ShapeDtypeStruct):
            probes.append(jnp.asarray(param))
        for probe in probes:
            if bool(jnp.isfinite(probe).all()) and bool(jnp.isnan(constraint(probe)).any()):
                raise ValueError(
                    f"the constraint of {_show(path)} must not return NaN for finite numbers; {constraint!r} does"
                )


def _apply(path: Path, projection: Callable[[Any], Any], w: Any) -> jax.Array:
    """`projection(w)`, its shape and dtype checked."""
    try:
        projected = jnp.asarray(projection(w))
    except (TypeError, ValueError) as error:
        _reraise(path, error)
    if projected.shape != w.shape or projected.dtype != w.dtype:
        raise ValueError(
            f"the constraint of {_show(path)} must keep shape and dtype: it made "
            f"{projected.dtype}{list(projected.shape)} of {w.dtype}{list(w.shape)}"
        )
    return projected


def _reraise(path: Path, error: Exception) -> NoReturn:
    raise named(error, f"constraint of {_show(path)}") from error


def _feasible_update(path: Path, param: Any, update: Any, constraint: Constraint) -> jax.Array:
    """The update after which `(param + update).astype(param.dtype)` is the projection, as closely as rounding allows.

    XLA may recompute an expression wherever it is used and contract a * b + c to one rounding, so the sum here may
    differ in the last bit from the sum in `optax.apply_updates`. Nothing that must hold exactly depends on that sum:
    the projection is `Constraint.project_with_margin`, and the bounds of an interval depend only on `param`.
    """
    config: Any = jax.config
    strict = config.jax_numpy_dtype_promotion == "strict"  # optax could not add float32 to a narrower parameter
    dtype = param.dtype if strict else promoted(jnp.result_type(update), at_least_float32(param.dtype))
    base = param.astype(dtype)
    # The select, which changes no sum, keeps a product in `update` from being contracted with it.
    update = jnp.where(param == param, update.astype(dtype), jnp.nan)
    new = jax.lax.optimization_barrier((base + update).astype(param.dtype))
    target = _apply(path, constraint.project_with_margin, new)
    step = jnp.where(target == new, update, target.astype(dtype) - base)
    excess = constraint.excess(new)  # the parameter's own where nothing moved; shares most of its work with `target`
    if excess is not None:
        step = jnp.where((update == 0) & (excess <= 0), update, step)
    return _within(param, base, step, *constraint.interval)


def _within(param: jax.Array, base: jax.Array, step: jax.Array, lower: Any, upper: Any) -> jax.Array:
    """The nearest to `step` after which every number lies in [lower, upper]."""
    if isinstance(lower, float) and lower == -np.inf and isinstance(upper, float) and upper == np.inf:
        return step

    def limit(bound: Any, beyond: Callable[..., jax.Array], inward: float) -> jax.Array:
        """The step that leads to the bound, or one ulp inward where the rounded sum lies beyond it."""
        bound = jnp.asarray(bound, param.dtype)
        step = bound.astype(base.dtype) - base
        inner = jnp.nextafter(step, jnp.asarray(inward, base.dtype))
        return jnp.where(beyond((base + step).astype(param.dtype), bound), inner, step)

    least, greatest = limit(lower, jnp.less, np.inf), limit(upper, jnp.greater, -np.inf)
    # They cross only far outside a narrow interval: this step goes near it, the next one into it.
    nearest = (
        jnp.clip(param, jnp.asarray(lower, param.dtype), jnp.asarray(upper, param.dtype)).astype(base.dtype) - base
    )
    return jnp.where(least <= greatest, jnp.clip(step, least, greatest), nearest)
