"""Finds the parameters of a Linen model that have a constraint or regularizer, and the axes that lifting added.

A layer creates its parameters with `tagged`. Only while `collect` traces a model's init does `tagged` put the parameter
in a metadata box. `nn.vmap` and `nn.scan` tell such a box every axis that they add, so the lifted axes are known
exactly, at any depth, whether the modules are shared, rematerialised, compact or set up.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import DenyList, Scope, init, meta
from jax.tree_util import DictKey

from depthwise_jax._core.dtypes import is_array

# A flag of the scope, because every lifting passes flags on and nn.jit keys its cache of traces by them.
_FLAG = "depthwise_jax_introspection"


@dataclass(frozen=True)
class Found:
    """A tagged parameter.

    Attributes:
        constraint: the layer's constraint on the parameter, a callable, or None.
        regularizer: the layer's regularizer of the parameter, a callable, or None.
        shape: the whole parameter's shape in the params.
        dtype: its dtype.
        instance_shape: the shape that the layer requested, which its constraint and regularizer expect.
        lifted_axes: the axes of `shape` that nn.vmap and nn.scan added, ascending; () for a plain parameter.
    """

    constraint: Callable[..., Any] | None
    regularizer: Callable[..., Any] | None
    shape: tuple[int, ...]
    dtype: Any
    instance_shape: tuple[int, ...]
    lifted_axes: tuple[int, ...]


def collect(
    model: nn.Module,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Any:
    """Finds the tagged parameters of a model. Nothing is computed: init is traced only for its shapes.

    Args:
        model: an unbound Linen module.
        *args: example inputs, arrays or `jax.ShapeDtypeStruct`s, as for `model.init`.
        rngs: as for `model.init`; any key will do, so it may be left out.
        method: as for `model.init`.
        **kwargs: as for `model.init`; those that are not arrays stay unchanged.

    Returns:
        A tree like `model.init(...)["params"]` whose leaves are `Found`, or None for a parameter with neither
        constraint nor regularizer. A metadata box (`nn.Partitioned`) becomes one leaf, so the tree is a prefix of
        boxed params and the same tree as unboxed ones.

    Raises:
        TypeError: the model is not a Linen module, or its method does not take the example inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module; got {described(model)}")
    if method is None or isinstance(method, str):
        try:
            inspect.signature(getattr(model, method or "__call__")).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"a Linen model must be followed by example inputs, as for model.init: {error}") from None
    leaves, treedef = jax.tree.flatten((args, kwargs))
    traced = list(map(is_array, leaves))

    def run(scope: Scope, *args: Any, **kwargs: Any) -> Any:
        module = model.copy(parent=scope)
        if method is None or isinstance(method, str):
            return getattr(module, method or "__call__")(*args, **kwargs)
        return getattr(method, "__func__", method)(module, *args, **kwargs)

    def trace_init(flags: dict[str, bool], arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        args, kwargs = treedef.unflatten(
            [next(remaining) if known else leaf for known, leaf in zip(traced, leaves, strict=True)]
        )
        # Like model.init, but with the flags.
        initialise = init(run, mutable=DenyList("intermediates"), flags=flags)
        _, variables = initialise(jax.random.key(0) if rngs is None else rngs, *args, **kwargs)
        return variables.get("params", {})

    arrays = [leaf for known, leaf in zip(traced, leaves, strict=True) if known]
    boxed = jax.eval_shape(partial(trace_init, {_FLAG: True}), arrays)
    boxes = jax.tree.leaves_with_path(boxed, is_leaf=meta.is_axis_metadata)
    found = {path: box.found() for path, box in boxes if isinstance(box, _Box)}
    # The tree comes from a trace without boxes: nn.WeightNorm names its parameters after others' paths, boxes included.
    params = jax.eval_shape(partial(trace_init, {}), arrays)
    return jax.tree.map_with_path(lambda path, _: found.get(path), params, is_leaf=meta.is_axis_metadata)


def described(model: Any) -> str:
    """A description of an object passed in place of a module, for a message."""
    if isinstance(model, type):
        return f"the class {model.__name__}: make a module first, {model.__name__}(...)"
    return f"an object of type {type(model).__name__}"


def tagged(
    module: nn.Module,
    init: Callable[..., Any],
    *,
    constraint: Callable[..., Any] | None,
    regularizer: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Wraps the initializer `init` that a layer passes to `self.param`, so `collect` finds the parameter.

    Args:
        module: the layer, bound.
        init: the initializer, `(key, shape, dtype)`; its result may itself be a metadata box (`nn.Partitioned`).
        constraint: the parameter's constraint, or None.
        regularizer: the parameter's regularizer, or None.

    Returns:
        `init` itself, unless `collect` is tracing and there is something to find.
    """
    assert module.scope is not None
    if not module.scope.has_flag(_FLAG) or (constraint is None and regularizer is None):
        return init

    def boxed(*args: Any, **kwargs: Any) -> _Box:
        value = init(*args, **kwargs)
        (array,) = jax.tree.leaves(value)
        return _Box(value, _Tag(constraint, regularizer), array.shape, ())

    return boxed


def per_instance(
    function: Callable[..., Any], lifted_axes: tuple[int, ...], reduces: bool = False
) -> Callable[..., Any]:
    """Lifts a function of one instance's parameter to the whole parameter.

    Args:
        function: array of the instance's shape to array of the same shape; or to a scalar, with `reduces`.
        lifted_axes: the axes that lifting added, ascending, as in `Found`.
        reduces: whether `function` returns a scalar.

    Returns:
        A function of the whole parameter that maps `function` over the lifted axes: the result has the whole
        parameter's shape, or one scalar per instance.
    """
    for axis in lifted_axes:
        function = jax.vmap(function, in_axes=axis, out_axes=0 if reduces else axis)
    return function


@dataclass(frozen=True)
class _Tag:
    """The mark that `collect` looks for. As a part of the tree's structure it must be hashable for any callables."""

    constraint: Any = field(compare=False)
    regularizer: Any = field(compare=False)
    keys: tuple[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", (_key(self.constraint), _key(self.regularizer)))


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


@dataclass(frozen=True)
class _Box(meta.AxisMetadata[Any]):
    value: Any
    tag: _Tag
    instance_shape: tuple[int, ...]
    axes: tuple[int, ...]

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Box":
        return replace(self, value=val)

    # Flax calls both while the array has the axis.
    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        new = self._positive(index)
        axes = sorted([new, *(axis + (axis >= new) for axis in self.axes)])
        return replace(self, value=meta.add_axis(self.value, index, params), axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        old = self._positive(index)
        axes = (axis - (axis > old) for axis in self.axes if axis != old)
        return replace(self, value=meta.remove_axis(self.value, index, params), axes=tuple(axes))

    def _positive(self, index: int) -> int:
        (array,) = jax.tree.leaves(self)
        return index % np.ndim(array)

    def found(self) -> Found:
        (array,) = jax.tree.leaves(self)
        return Found(
            self.tag.constraint, self.tag.regularizer, array.shape, array.dtype, self.instance_shape, self.axes
        )


def _flatten_box(box: _Box) -> Any:
    # With a key like a dict's, since nn.SpectralNorm reads the keys of a parameter's path.
    return ((DictKey("value"), box.value),), (box.tag, box.instance_shape, box.axes)


def _unflatten_box(static: Any, children: Any) -> _Box:
    return _Box(*children, *static)


jax.tree_util.register_pytree_with_keys(_Box, _flatten_box, _unflatten_box)
