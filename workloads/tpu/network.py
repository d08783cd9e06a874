"""Sharded programs of MobileNetV2 for the TPU compiler: its forward pass and its training step, as shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from depthwise_jax.constraints import MaxNorm
from depthwise_jax.optim import project
from workloads.mobilenet import MobileNetV2, channel_spec, is_depthwise
from workloads.tpu.compiler import sharded

Program = tuple[Callable[..., Any], tuple[Any, ...]]

CONSTRAINT = MaxNorm(2.0, axis="window")


def variables(model: MobileNetV2, size: int, mesh: Mesh) -> Any:
    """The shapes of the network's variables, its channels sharded over the mesh axis "channels" if there is one."""
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    axis = "channels" if "channels" in mesh.axis_names else None
    return sharded(
        shapes, jax.tree_util.tree_map_with_path(lambda path, leaf: channel_spec(path, leaf, axis), shapes), mesh
    )


def batch(images: int, size: int, mesh: Mesh) -> tuple[Any, Any]:
    """The shapes of images and labels, sharded over the mesh axis "batch"."""
    pixels = jax.ShapeDtypeStruct((images, size, size, 3), jnp.bfloat16)
    return sharded((pixels, jax.ShapeDtypeStruct((images,), jnp.int32)), P("batch"), mesh)


def forward(model: MobileNetV2, images: int, size: int, mesh: Mesh) -> Program:
    """The logits of (variables, images)."""
    return model.apply, (variables(model, size, mesh), batch(images, size, mesh)[0])


def training_step(model: MobileNetV2, images: int, size: int, mesh: Mesh) -> Program:
    """The new (variables, optimizer state) and the loss, of (variables, optimizer state, images, labels)."""
    state = variables(model, size, mesh)
    constraints = jax.tree_util.tree_map_with_path(
        lambda path, leaf: CONSTRAINT if is_depthwise(path, leaf) else None, state["params"]
    )
    optimizer = optax.chain(optax.adamw(1e-3), project(constraints))
    # The moments are sharded as their parameters, which name them in the last entries of the path.
    moments = jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharded(leaf, _spec_of(state["params"], path), mesh),
        jax.eval_shape(optimizer.init, state["params"]),
    )

    def step(state: Any, moments: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = model.apply({**state, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, moments = optimizer.update(gradients, moments, state["params"])
        return {"params": optax.apply_updates(state["params"], updates), **updated}, moments, value

    return step, (state, moments, *batch(images, size, mesh))


def _spec_of(params: Any, path: tuple[Any, ...]) -> P:
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    for key in keys:
        params = params[key]
    return params.sharding.spec if keys else P()
