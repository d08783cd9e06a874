"""The TPU compiler on a machine without a TPU: meshes of its topologies, and the figures of what it makes of a program.

Needs libtpu, which `jax[tpu]` brings. Nothing can be run: what is compiled here is read.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Before libtpu is loaded: it shall not ask for machines, and several processes may compile at once.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from workloads.hlo import collectives

_ALL_REDUCE = re.compile(
    r" all-reduce(?:-start)?\(.*?replica_groups=(\{\{.*?\}\}|mesh\[.*?\] ?\{.*?\}|mesh\[.*?\]|\[.*?\])"
)


def make_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh over all devices of a topology such as "v5e:2x2", with automatic axes of these sizes."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def sharded(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """The shapes of a tree of arrays with the shardings of a tree of specs, or of one spec for all."""
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def shard_bytes(tree: Any) -> int:
    """The bytes that one device holds of a tree of sharded shapes, without what the layout adds."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a program, for each device.

    Attributes:
        collectives: how many of each kind.
        groups: the sizes of the groups of devices over which the all-reduces run.
        cycles: the sum of the compiler's estimates for its fusions; good for comparing like with like alone.
        fusions: how many there are.
        copies: copies and transposes, which are what a change of layout costs.
        arguments, outputs, temporaries: bytes of memory.
    """

    collectives: Counter[str]
    groups: frozenset[int]
    cycles: int
    fusions: int
    copies: int
    arguments: int
    outputs: int
    temporaries: int


def compile_for_tpu(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, Any, Figures]:
    """The lowered text of a function of sharded shapes, the compiled program and its figures."""
    lowered = jax.jit(function, **options).lower(*arguments)
    compiled = lowered.compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    figures = Figures(
        collectives=collectives(text),
        groups=frozenset(map(_group_size, _ALL_REDUCE.findall(text))),
        cycles=sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
        fusions=len(re.findall(r" fusion\(", text)),
        copies=len(re.findall(r" (?:copy|transpose)\(", text)),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )
    return lowered.as_text(), compiled, figures


def _group_size(groups: str) -> int:
    """The number of devices of a group, in each of the three ways in which HLO writes groups."""
    if groups.startswith("{{"):
        return groups[2:].split("}")[0].count(",") + 1
    if groups.startswith("["):  # [groups,size]<=[...]
        return int(groups[1:].split("]")[0].split(",")[-1])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
    axes, _, chosen = groups.partition("]")
    names = re.findall(r"'(\w+)'", chosen) or re.findall(r"'(\w+)'", axes)
    return math.prod(int(sizes[name]) for name in names)
