"""Sharding of the three maps' results, and what is known about a program that is partitioned over devices.

Batch, channels and spatial axes keep their sharding (the compiler exchanges the halo). A window's axes and the
multiplier are never sharded. The channels of x, y and kernel must agree if more than one is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.layout import Layout

# One entry of a PartitionSpec: None, a mesh axis, or a tuple of them.
Entry = Any
Entries = tuple[Entry, ...]


@dataclass(frozen=True)
class Partitioning:
    """What is known about the partitioning of one map over devices, under automatic or explicit sharding.

    The defaults describe a program that is not partitioned: on one device, or in a `shard_map` over all mesh axes.

    Attributes:
        devices: the number of devices.
        several_axes: whether the devices may form more than one mesh axis.
        replicas: whether several devices may hold the same part of x or g.
        sharded_rows: whether the first spatial axis is or may be sharded. If types do not say how x or g is sharded, it
            may be if the devices cannot share the batch equally.
        whole_images: whether the batch can be cut without cutting an image: its size is known, and no spatial axis is
            known to be sharded.
        batch: the product of the leading axes on one device, including those that operands share; None if unknown.
        whole_channels: whether each device is known to hold all channels.
    """

    devices: int = 1
    several_axes: bool = False
    replicas: bool = False
    sharded_rows: bool = False
    whole_images: bool = True
    batch: int | None = None
    whole_channels: bool = True

    @classmethod
    def of_program(
        cls, direction: str, convolution: Convolution, context: mlir.LoweringRuleContext, stacked: int
    ) -> Partitioning:
        """What a lowering rule knows of a map whose operands share `stacked` leading axes."""
        axes: Any = context.module_context.axis_context
        avals: Sequence[Any] = context.avals_in
        if isinstance(axes, mlir.SPMDAxisContext):
            mesh = _automatic(axes.mesh.shape, axes.manual_axes)
        else:
            mesh = _mesh_of(avals, axes.num_devices if isinstance(axes, mlir.ShardingContext) else 1)
        return cls.of(direction, convolution, mesh, avals, stacked)

    @classmethod
    def of_call(cls, direction: str, convolution: Convolution, avals: Sequence[Any]) -> Partitioning:
        """What is known for operands of these types, in a program under the mesh that `jax.set_mesh` has set."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes:
            sizes = _automatic(mesh.shape, mesh.manual_axes)
        else:
            sizes = _mesh_of(avals, max(1, mesh.size, *(aval.sharding.mesh.size for aval in avals)))
        return cls.of(direction, convolution, sizes, avals)

    @classmethod
    def of(
        cls,
        direction: str,
        convolution: Convolution,
        mesh: Mapping[str, int] | int,
        avals: Sequence[Any],
        stacked: int = 0,
    ) -> Partitioning:
        """What is known for a mesh: the sizes of the axes over which the compiler partitions, or the device count."""
        x = avals[0]
        batch = convolution.batch(x.shape[stacked:])
        known_batch = all(isinstance(n, int) for n in batch)
        devices = mesh if isinstance(mesh, int) else math.prod(mesh.values())
        if devices == 1:
            local = x.shape[: stacked + len(batch)]
            return cls(whole_images=known_batch, batch=math.prod(local) if known_batch else None)
        sizes = None if isinstance(mesh, int) else tuple(size for size in mesh.values() if size > 1)
        images = [
            entries(aval.sharding.spec, aval.ndim)[stacked:] for aval in avals[: 1 + (direction == "kernel_grad")]
        ]
        spatial = [convolution.layout.spatial_shape(spec) for spec in images]
        # There are no replicas if all mesh axes shard the images, in the same way, along at most one batch axis.
        own = axis_names(images[0])
        over = tuple(size for name, size in x.sharding.mesh.shape.items() if name in own and size > 1)
        split = stacked == 0 and over == sizes and len(set(images)) == 1 and not any(convolution.batch(images[0])[1:])
        shard = x.sharding.shard_shape(x.shape) if known_batch and _is_typed(x) else None
        return cls(
            devices=devices,
            several_axes=sizes is None or len(sizes) > 1,
            replicas=not split,
            sharded_rows=any(rows for rows, *_ in spatial)
            or (not _is_typed(x) and known_batch and math.prod(batch) % devices != 0),
            whole_images=known_batch and not any(map(any, spatial)),
            batch=None if shard is None else math.prod(shard[: stacked + len(batch)]),
            whole_channels=_is_typed(x) and images[0][convolution.layout.channels] is None,
        )


def _automatic(sizes: Mapping[str, int], manual: Collection[str]) -> Mapping[str, int]:
    """The mesh over which the compiler partitions inside a shard_map: empty if all axes are manual."""
    return {} if set(manual) == set(sizes) else sizes


def _mesh_of(avals: Sequence[Any], devices: int) -> Mapping[str, int] | int:
    """The mesh in the operands' types; else the number of devices, since in_shardings of jit do not reach types."""
    if devices == 1:
        return {}
    return next((aval.sharding.mesh.shape for aval in avals if not aval.sharding.mesh.empty), devices)


def _is_typed(aval: Any) -> bool:
    """Whether a type says how its array is sharded."""
    mesh = aval.sharding.mesh
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def entries(spec: PartitionSpec, ndim: int) -> Entries:
    """One entry for each of `ndim` axes: a PartitionSpec may leave out the last ones."""
    return (*spec, *(None,) * (ndim - len(spec)))


def axis_names(spec: Sequence[Entry]) -> set[str]:
    """The mesh axes that a spec names."""
    return {name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,)) if name is not None}


def typed(aval: Any, spec: PartitionSpec) -> Any:
    """The type of an array under the mesh that is set, all axes explicit, sharded by a spec."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    return aval.update(sharding=NamedSharding(explicit, PartitionSpec(*entries(spec, aval.ndim))))


def check_in_sharding(in_sharding: PartitionSpec | None) -> None:
    """Raises TypeError unless `in_sharding` is None or a PartitionSpec."""
    if in_sharding is not None and not isinstance(in_sharding, PartitionSpec):
        raise TypeError(f"in_sharding must be None or a jax.sharding.PartitionSpec; got {in_sharding!r}")


def operand_specs(in_sharding: PartitionSpec, ndim: int, layout: Layout) -> tuple[Any, ...] | None:
    """What `in_sharding` says of x, kernel and bias under the mesh that is set, which `explicit_axes` makes explicit.

    Args:
        in_sharding: the spec of x.
        ndim: the number of axes of x.
        layout: the layout of x.

    Returns:
        The mesh axes that become explicit, and the specs of x, kernel and bias; None without a mesh. Inside a
        shard_map over some axes the others stay automatic: JAX 0.10.2 cannot differentiate `explicit_axes` there.

    Raises:
        TypeError, ValueError: in_sharding is not a spec for x on this mesh.
    """
    check_in_sharding(in_sharding)
    if len(in_sharding) > ndim:
        raise ValueError(f"in_sharding must have at most one entry for each of the {ndim} axes of x; got {in_sharding}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    spec = entries(in_sharding, ndim)
    named = axis_names(spec)
    if not named.isdisjoint(mesh.manual_axes) or not named <= {*mesh.axis_names}:
        raise ValueError(
            "in_sharding must name automatic or explicit axes of the mesh; "
            f"got {in_sharding} on a mesh with the axes {mesh.axis_names}, where {mesh.manual_axes} are "
            "manual (inside shard_map, where x is already a shard)"
        )
    automatic_remain = bool(mesh.manual_axes) and AxisType.Auto in mesh.axis_types
    axes = () if automatic_remain else tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    channels = spec[layout.channels]
    kernel = PartitionSpec(*(None,) * layout.rank, channels, None)
    return axes, (in_sharding, kernel, PartitionSpec(channels))


def forward_spec(convolution: Convolution, x: Entries, kernel: Entries) -> Entries:
    """The spec of y, and of x from g and kernel."""
    layout = convolution.layout
    channels = agree("channels", x[layout.channels], _kernel_channels(kernel))
    return layout.arrange(convolution.batch(x), layout.spatial_shape(x), channels)


def kernel_grad_spec(convolution: Convolution, x: Entries, g: Entries) -> Entries:
    """The spec of kernel from x and g: the axes of the sum are not sharded in the result."""
    axis = convolution.layout.channels
    return (*(None,) * convolution.window.rank, agree("channels", x[axis], g[axis]), None)


def agree(what: str, *entries: Entry) -> Entry:
    """The common sharding of an axis of the operands.

    Raises:
        ValueError: they shard it differently.
    """
    given = {entry for entry in entries if entry is not None}
    if len(given) > 1:
        raise ValueError(
            f"the operands of a depthwise convolution shard the {what} differently, by "
            f"{' and '.join(map(repr, entries))}; "
            "expected one sharding, or that only one of them shards it (jax.sharding.reshard changes a sharding)"
        )
    return given.pop() if given else None


def _kernel_channels(kernel: Sequence[Entry]) -> Entry:
    *window, channels, multiplier = kernel
    if any(entry is not None for entry in (*window, multiplier)):
        raise ValueError(
            "the kernel of a depthwise convolution, (*window, channels, multiplier), must be sharded only along its "
            f"channels; got the sharding {tuple(kernel)}"
        )
    return channels
