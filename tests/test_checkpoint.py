"""A restart from a sharded checkpoint on another mesh goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from examples.train_sharded import spec_of, train


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_restart_on_another_mesh(tmp_path: Path) -> None:
    def mesh(data: int, model: int) -> jax.sharding.Mesh:
        return jax.make_mesh(
            (data, model),
            ("data", "model"),
            axis_types=(AxisType.Auto,) * 2,
            devices=jax.devices()[: data * model],
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected: Any = train(mesh(2, 2), 4, whole, 2)
    shutil.copytree(whole / "2", cut / "2")
    small = mesh(1, 4)
    state: Any = train(small, 4, cut, 2)

    def check(leaf: jax.Array, exact: jax.Array) -> None:
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(small, spec_of(leaf, small)), leaf.ndim)
        np.testing.assert_allclose(leaf, exact, rtol=1e-4, atol=1e-6)

    jax.tree.map(check, state, expected)
    kernel = state["params"]["SeparableConv2D_1"]["depthwise_kernel"]
    assert kernel.shape == (5, 5, 48, 1)
    assert kernel.addressable_shards[0].data.shape == (5, 5, 12, 1)
    adam = state["optimizer"][0][0]
    assert int(adam.count) == 4
    assert adam.mu["SeparableConv2D_1"]["depthwise_kernel"].addressable_shards[0].data.shape == (5, 5, 12, 1)
