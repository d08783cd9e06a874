"""Sharded training with checkpoints and restarts: a starting point for a training loop on a TPU pod.

    python -m examples.train_sharded --cpu-devices 8 --model 2 --steps 40 --checkpoints /tmp/digits

trains the demo's network on eight devices of one CPU, with the batch sharded over four of them and the channels over
two. On a pod, start it with --distributed on every host, without --cpu-devices, and with a directory that all hosts
reach. Started again, it continues from the last checkpoint, on any number of devices.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax.optim import constraints_of, feasibility, project
from workloads.digits import Digits, load

BATCH = 64


def spec_of(parameter: Any, mesh: Mesh) -> P:
    """The sharding of a parameter, or of the optimiser's copy of it: the kernels' input channels over "model".

    The kernels are (height, width, C, M) and (1, 1, C, F). Axes that the mesh axis does not divide are replicated.
    """
    over_channels = parameter.ndim == 4 and parameter.shape[2] % mesh.shape["model"] == 0
    return P(None, None, "model", None) if over_channels else P()


def train(mesh: Mesh, steps: int, directory: Path, save_every: int) -> dict[str, Any]:
    """Trains to a number of steps, from the last checkpoint in a directory if there is one.

    Args:
        mesh: a mesh whose axis "data" shards the batch and whose axis "model" shards the channels.
        steps: the total number of steps.
        directory: the directory of the checkpoints.
        save_every: the number of steps between checkpoints; the last step always has one.

    Returns:
        The state: "params" and "optimizer".
    """
    (images, labels), _ = load()
    model = Digits()
    constraints = constraints_of(model, images[:1])
    schedule = optax.warmup_cosine_decay_schedule(0, 5e-3, 10, 400)
    optimizer = optax.chain(optax.adamw(schedule), project(constraints))  # project is last in the chain

    # Every array is created in its sharding, so no device ever holds a whole one.
    def initial(key: Array) -> dict[str, Any]:
        params = model.init(key, images[:1])["params"]
        return {"params": params, "optimizer": optimizer.init(params)}

    key = jax.random.key(0)
    abstract = jax.eval_shape(initial, key)
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf, mesh)), abstract)
    by_batch = NamedSharding(mesh, P("data"))

    def batch(step: int) -> tuple[Array, Array]:
        """The step's batch; each process reads the part of its devices. A restart gets the same batch."""
        chosen = np.random.default_rng(step).choice(len(images), BATCH, replace=False)

        def placed(whole: np.ndarray) -> Array:
            def part(index: Any) -> np.ndarray:
                return whole[chosen[index[0]]]

            return jax.make_array_from_callback((BATCH, *whole.shape[1:]), by_batch, part)

        return placed(images), placed(labels)

    def step(state: dict[str, Any], x: Array, y: Array) -> tuple[dict[str, Any], Array]:
        def loss_of(params: Any) -> Array:
            logits: Any = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, loss

    step_on_devices = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, by_batch, by_batch),
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )

    options = ocp.CheckpointManagerOptions(save_interval_steps=save_every, max_to_keep=2)
    with jax.set_mesh(mesh), ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:  # read in this mesh's shardings, though any mesh may have written it
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                abstract,
                shardings,
            )
            state = manager.restore(start, args=ocp.args.StandardRestore(target))
        else:
            state = jax.jit(initial, out_shardings=shardings)(key)
        for done in range(start + 1, steps + 1):
            state, loss = step_on_devices(state, *batch(done))
            if done % 10 == 0 and jax.process_index() == 0:
                print(f"step {done}: loss {float(loss):.4f}", flush=True)
            manager.save(done, args=ocp.args.StandardSave(state), force=done == steps)
        manager.wait_until_finished()
        violations = jax.jit(lambda params: feasibility(params, constraints))(state["params"])
    if jax.process_index() == 0:
        violation = max(float(value) for value in jax.tree.leaves(violations))
        print(f"from step {start} to {steps} on {mesh.size} devices; largest violation of a constraint: {violation:g}")
    return state


def main() -> None:
    """Reads the arguments, makes the mesh and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=int, default=1, help="number of devices that share the channels")
    parser.add_argument("--checkpoints", type=Path, required=True, help="a directory")
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--cpu-devices", type=int, help="run on this many devices of the CPU")
    parser.add_argument("--distributed", action="store_true", help="one of several processes, such as a pod's hosts")
    parser.add_argument("--coordinator", help="host:port of process 0, if the cluster does not tell")
    parser.add_argument("--processes", type=int, help="number of processes, if the cluster does not tell")
    parser.add_argument("--process", type=int, help="number of this process, if the cluster does not tell")
    arguments = parser.parse_args()
    if arguments.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    if arguments.distributed:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    axes = (jax.device_count() // arguments.model, arguments.model)
    mesh = jax.make_mesh(axes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    train(mesh, arguments.steps, arguments.checkpoints, arguments.save_every)


if __name__ == "__main__":
    main()
