"""accelerate: runs any function with the depthwise convolutions in its jaxpr computed by this package.

Use it for code that does not accept another convolution, such as a Keras model on the JAX backend, Equinox or Haiku.
For code that does, passing it is simpler: `nnx.Conv(..., conv_general_dilated=depthwise_jax.conv_general_dilated)`, and
flax.linen.Conv's argument of the same name.

Equations are replaced in the jaxpr itself, also inside jit, scan, while, cond, remat and shard_map; everything else
stays unchanged. Accelerate a function before you differentiate it, `jax.grad(accelerate(f))`: the gradient of a
convolution in the kernel is not a depthwise convolution, so `accelerate(jax.grad(f))` leaves it unchanged.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.errors import InconclusiveDimensionOperation
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from depthwise_jax.drop_in import conv_general_dilated

# The equations whose jaxprs are searched. All others, including custom derivative rules, stay unchanged.
_LOOKED_INTO = ("jit", "pjit", "closed_call", "core_call", "scan", "while", "cond", "checkpoint", "remat2", "shard_map")


def accelerate(function: Callable[..., Any]) -> "Accelerated":
    """A function that computes the same as `function`, with its depthwise convolutions computed by this package.

    It can be differentiated, mapped and compiled like `function`. Convolutions that this package does not compute, such
    as symbolic sizes with strides, stay unchanged. Each call traces `function`, so put it under jax.jit. A remat policy
    that names lax's convolution does not recognise this package's; save "depthwise_conv" by name instead.

    Args:
        function: a function of trees that returns trees of arrays. Its arrays are traced, and its other leaves are
            passed unchanged.

    Returns:
        The function. Its `report(*args, **kwargs)` lists what it replaces and what it skips.

    Raises:
        TypeError: `function` is not callable.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> network = nn.Conv(32, (3, 3), feature_group_count=32)
        >>> x = jax.numpy.ones((8, 28, 28, 32))
        >>> variables = network.init(jax.random.key(0), x)
        >>> fast = accelerate(network.apply)
        >>> print(fast.report(variables, x))
        conv_general_dilated float32[8,28,28,32] float32[3,3,1,32] 32 groups: replaced
        >>> gradient = jax.jit(jax.grad(lambda variables: fast(variables, x).sum()))(variables)
        >>> gradient["params"]["kernel"].shape
        (3, 3, 1, 32)
    """
    if not callable(function):
        raise TypeError(f"accelerate takes a function; got {function!r}")
    return Accelerated(function)


@dataclass(frozen=True)
class Site:
    """A grouped convolution in a function's jaxpr.

    Attributes:
        path: the enclosing equations, outermost first, such as ("jit", "scan").
        lhs, rhs: the operands' types, such as "float32[8,56,56,144]".
        feature_group_count, batch_group_count: its groups.
        skipped: why it was left unchanged; None if it was replaced.
    """

    path: tuple[str, ...]
    lhs: str
    rhs: str
    feature_group_count: int
    batch_group_count: int
    skipped: str | None = None

    def __str__(self) -> str:
        groups = f"{self.feature_group_count} groups" + (
            f", {self.batch_group_count} batch groups" if self.batch_group_count > 1 else ""
        )
        verdict = "replaced" if self.skipped is None else f"skipped: {self.skipped}"
        return f"{'/'.join((*self.path, 'conv_general_dilated'))} {self.lhs} {self.rhs} {groups}: {verdict}"


@dataclass(frozen=True)
class Report:
    """What `accelerate` does with each grouped convolution of a call. It prints one line for each.

    Attributes:
        sites: the grouped convolutions, in the order of the program.
    """

    sites: tuple[Site, ...]

    @property
    def replaced(self) -> tuple[Site, ...]:
        """The convolutions computed by this package."""
        return tuple(site for site in self.sites if site.skipped is None)

    @property
    def skipped(self) -> tuple[Site, ...]:
        """The convolutions left unchanged."""
        return tuple(site for site in self.sites if site.skipped is not None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.sites)) or "no grouped convolution"


class Accelerated:
    """The result of `accelerate`: a function with a `report`.

    Args:
        function: the function whose convolutions are replaced.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        closed, arrays, treedef = _traced(self._function, args, kwargs)
        return treedef.unflatten(jaxpr_as_fun(_accelerated(closed))(*arrays))

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Whether each grouped convolution in a call with these arguments is replaced; nothing is computed.

        Args:
            *args, **kwargs: as for the function; arrays may be `jax.ShapeDtypeStruct`s.
        """
        closed, _, _ = _traced(self._function, args, kwargs)
        return Report(tuple(_sites(closed, ())))


def _traced(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[ClosedJaxpr, list[Any], Any]:
    """The function's jaxpr at these arguments, its operands, and the tree of its results."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]

    def of_arrays(*arrays: Any) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if known else leaf for known, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = treedef.unflatten(merged)
        return function(*args, **kwargs)

    arrays = [leaf for known, leaf in zip(is_array, leaves, strict=True) if known]
    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    return closed, arrays, jax.tree.structure(shapes)


# Cached by the jaxpr that was rewritten: the same jaxpr gives the same result, for which JAX finds its compiled
# program.
_rewritten: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _accelerated(jaxpr: Any) -> Any:
    """The jaxpr, closed or not, with its depthwise convolutions replaced; unchanged if it has none."""
    if jaxpr not in _rewritten:
        old = list(_open(jaxpr).eqns)
        new = [replacement for eqn in old for replacement in _replacements(eqn)]
        same = len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
        _rewritten[jaxpr] = None if same else _with_eqns(jaxpr, new)
    return jaxpr if _rewritten[jaxpr] is None else _rewritten[jaxpr]


def _replacements(eqn: JaxprEqn) -> list[JaxprEqn]:
    """The equations to compute in place of one."""
    if eqn.primitive is lax.conv_general_dilated_p:
        ours = _ours(eqn)
        return [eqn] if isinstance(ours, str) else ours
    if eqn.primitive.name not in _LOOKED_INTO:
        return [eqn]
    params = {name: _map_jaxprs(_accelerated, value) for name, value in eqn.params.items()}
    if all(new is eqn.params[name] for name, new in params.items()):
        return [eqn]
    return [eqn.replace(params=params)]


def _ours(eqn: JaxprEqn) -> list[JaxprEqn] | str:
    """A convolution's equations in this package, or why it stays unchanged."""
    params = {**eqn.params, "padding": _padding(eqn)}
    if params["padding"] is None:
        return "its padding depends on symbolic sizes"
    try:
        with eqn.ctx.manager:
            inner = jax.make_jaxpr(functools.partial(conv_general_dilated, **params))(*(v.aval for v in eqn.invars))
    except (TypeError, ValueError, NotImplementedError, InconclusiveDimensionOperation) as error:
        return f"refused: {error}"  # the function worked before, and must keep working
    if any(new.primitive is lax.conv_general_dilated_p for new in inner.jaxpr.eqns):
        return "not depthwise, or a call that conv_general_dilated leaves to lax"
    names = dict(zip(inner.jaxpr.invars, eqn.invars, strict=True))
    names |= dict(zip(inner.jaxpr.outvars, eqn.outvars, strict=True))
    return [
        new.replace(
            invars=[names.get(v, v) if not hasattr(v, "val") else v for v in new.invars],
            outvars=[names.get(v, v) for v in new.outvars],
            ctx=eqn.ctx,
            source_info=eqn.source_info,
        )
        for new in inner.jaxpr.eqns
    ]


def _padding(eqn: JaxprEqn) -> Any:
    """A convolution's padding; if symbolic, its name or None, since lax takes no symbolic pairs."""
    padding = eqn.params["padding"]
    if all(isinstance(amount, int) for pair in padding for amount in pair):
        return padding
    numbers, dilation = eqn.params["dimension_numbers"], eqn.params["rhs_dilation"]
    avals: list[Any] = [v.aval for v in eqn.invars]
    lhs, rhs = (aval.shape for aval in avals)
    spatial = [lhs[axis] for axis in numbers.lhs_spec[2:]]
    extent = [(rhs[axis] - 1) * d + 1 for axis, d in zip(numbers.rhs_spec[2:], dilation, strict=True)]
    strides = eqn.params["window_strides"]
    names = ("SAME", "SAME_LOWER")
    return next((n for n in names if [*padding] == [*lax.padtype_to_pads(spatial, extent, strides, n)]), None)


def _sites(jaxpr: Any, path: tuple[str, ...], custom: str | None = None) -> Iterator[Site]:
    """The grouped convolutions of a jaxpr; all are skipped inside `custom`, an equation that is not searched."""
    for eqn in _open(jaxpr).eqns:
        if eqn.primitive is lax.conv_general_dilated_p:
            groups, batch_groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
            if groups == batch_groups == 1:
                continue
            skipped = None
            if custom is not None:
                skipped = f"inside {custom}, which is not searched"
            elif batch_groups > 1:
                skipped = "the gradient of a convolution in its kernel; differentiate the result of accelerate instead"
            elif isinstance(ours := _ours(eqn), str):
                skipped = ours
            lhs, rhs = (v.aval.str_short() for v in eqn.invars)
            yield Site(path, lhs, rhs, groups, batch_groups, skipped)
            continue
        name = eqn.params.get("name")
        step = f"{eqn.primitive.name}:{name}" if isinstance(name, str) else eqn.primitive.name
        left_alone = custom or (None if eqn.primitive.name in _LOOKED_INTO else eqn.primitive.name)
        for value in eqn.params.values():
            found: list[Any] = []
            _map_jaxprs(found.append, value)
            for inner in found:
                yield from _sites(inner, (*path, step), left_alone)


def _map_jaxprs(function: Callable[[Any], Any], value: Any) -> Any:
    """A parameter of an equation with a function applied to its jaxprs; unchanged if none changes."""
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return function(value)
    if isinstance(value, tuple | list) and any(isinstance(entry, ClosedJaxpr | Jaxpr) for entry in value):
        new = [_map_jaxprs(function, entry) for entry in value]
        return value if all(a is b for a, b in zip(new, value, strict=True)) else type(value)(new)
    return value


def _open(jaxpr: Any) -> Any:
    """The jaxpr in a closed one; later versions of JAX have one kind."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _with_eqns(jaxpr: Any, eqns: list[JaxprEqn]) -> Any:
    new = _open(jaxpr).replace(eqns=eqns)
    return new if _open(jaxpr) is jaxpr else jaxpr.replace(jaxpr=new)
