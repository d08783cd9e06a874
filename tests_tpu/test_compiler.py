"""The reading of what the TPU compiler wrote: it must find what is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from workloads.tpu.compiler import _group_size, compile_for_tpu, make_mesh, shard_bytes, sharded


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,2},{1,3}}", 2),
        ("[8,2]<=[4,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4]", 8),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_1','axis_2'}", 4),
    ],
)
def test_group_sizes(groups: str, size: int) -> None:
    assert _group_size(groups) == size


def test_a_gather_and_a_sum_are_found() -> None:
    mesh = make_mesh("v5e:2x2", batch=2, channels=2)
    x = sharded(jax.ShapeDtypeStruct((256, 1024), jnp.float32), P("batch", "channels"), mesh)
    assert shard_bytes(x) == 256 * 1024
    gathered = compile_for_tpu(jnp.sin, x, out_shardings=NamedSharding(mesh, P()))[-1]
    assert gathered.collectives["all-gather"] > 0
    summed = compile_for_tpu(lambda x: x.sum(0), x, out_shardings=NamedSharding(mesh, P("channels")))[-1]
    assert summed.collectives == {"all-reduce": 1}
    assert summed.groups == {2}
    assert summed.cycles > 0
    assert summed.arguments == shard_bytes(x)
    transposed = compile_for_tpu(lambda x: (x.T + 1).reshape(-1), sharded(x, P(), mesh))[-1]
    assert transposed.copies > summed.copies == 0
