"""Times whole training steps: with this package's depthwise layers, with flax.linen.Conv instead, and in PyTorch.

    python -m benchmarks.training                       # MobileNetV2 and ConvNeXt blocks, 2 threads
    python -m benchmarks.training --json benchmarks/results/training.json --check

A step is the forward pass, the gradient of the cross entropy and SGD with momentum, in float32, all in place. The two
Flax models differ only in the depthwise layer and start from the same parameters; their first losses are compared.
PyTorch runs the same layers with as many parameters, channels last, not compiled. Samples are taken in turn in one
process.

To show where the time goes, every layer of MobileNetV2 is timed separately, forward and backward, and summed by kind;
the rest of the step is activations, sums of branches, the stem, the classifier, the loss and the optimiser. Within a
step XLA fuses neighbouring operations, so these figures are the cost of each layer outside a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import command, environment
from benchmarks.optional import library
from benchmarks.report import Verdict, table
from benchmarks.timing import finished, interleaved
from depthwise_jax import DepthwiseConv2D
from workloads import results
from workloads.convnext import ConvNeXt, torch_convnext
from workloads.mobilenet import STAGES, MobileNetV2, torch_mobilenet

CLASSES = 1000
_RATE, _MOMENTUM = 1e-3, 0.9
KINDS: tuple[str, ...] = ("depthwise", "pointwise", "batch norm")


@dataclass(frozen=True)
class Network:
    """A network to train: its two Flax models, its PyTorch model, and the images."""

    ours: nn.Module
    flax: nn.Module
    torch: Callable[[Any], Any]
    batch: int
    size: int


NETWORKS = {
    "MobileNetV2": Network(
        MobileNetV2(CLASSES, dtype=jnp.float32),
        MobileNetV2(CLASSES, plain=True, dtype=jnp.float32),
        torch_mobilenet,
        batch=8,
        size=96,
    ),
    "ConvNeXt blocks": Network(ConvNeXt(), ConvNeXt(plain=True), torch_convnext, batch=8, size=112),
}


def batch(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Images (batch, size, size, 3) and labels (batch,)."""
    rng = np.random.default_rng(0)
    shape = (network.batch, network.size, network.size, 3)
    return rng.standard_normal(shape).astype(np.float32), rng.integers(CLASSES, size=network.batch)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """The mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_of(model: nn.Module, optimizer: optax.GradientTransformation) -> Any:
    """(params, statistics, state, images, labels) -> (params, statistics, state, loss); the first three are donated."""

    def step(params: Any, statistics: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, **statistics}
            logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels), changed

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    return jax.jit(step, donate_argnums=(0, 1, 2))


class JaxTraining:
    """A model in training; calling it makes a step and returns the loss when it is done.

    Attributes:
        seconds: to trace, lower and compile the step.
        parameters: the number of parameters.
    """

    def __init__(self, model: nn.Module, variables: Any, images: Any, labels: Any) -> None:
        optimizer = optax.sgd(_RATE, momentum=_MOMENTUM)
        params = jax.tree.map(jnp.array, variables["params"])
        statistics = {name: jax.tree.map(jnp.array, tree) for name, tree in variables.items() if name != "params"}
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._carry = (params, statistics, optimizer.init(params))
        self._batch = (jnp.asarray(images), jnp.asarray(labels))
        start = time.perf_counter()
        self._step = step_of(model, optimizer).lower(*self._carry, *self._batch).compile()
        self.seconds = time.perf_counter() - start

    def __call__(self) -> float:
        """The loss before the step."""
        *carry, loss = self._step(*self._carry, *self._batch)
        self._carry = tuple(carry)
        jax.block_until_ready(self._carry)
        return float(loss)


class TorchTraining:
    """The model in PyTorch, on a device; in bfloat16 by PyTorch's automatic casts, as a user would run it."""

    def __init__(
        self,
        torch: Any,
        model: Any,
        images: np.ndarray,
        labels: np.ndarray,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self._model = model.to(device, memory_format=torch.channels_last).train()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._optimizer = torch.optim.SGD(model.parameters(), _RATE, _MOMENTUM)
        nchw = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).to(device)
        self._images = nchw.contiguous(memory_format=torch.channels_last)
        self._labels = torch.from_numpy(labels).to(device)
        self._loss = torch.nn.functional.cross_entropy
        self._autocast = partial(torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self) -> float:
        """The loss before the step."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(self._model(self._images), self._labels)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())


def plain_variables(variables: Any) -> Any:
    """Our model's variables for its plain twin: depthwise kernels (h, w, C, 1) become (h, w, 1, C)."""

    def convert(path: Any, leaf: Any) -> Any:
        layer, name = (entry.key for entry in path[-2:])
        return jnp.swapaxes(leaf, -1, -2) if layer.endswith("depthwise") and name == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: convert(path, leaf) if len(path) > 2 else leaf, variables
    )


def train(network: Network, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step and seconds of its compilation, by contestant.

    Raises:
        AssertionError: the two Flax models differ in the loss or in a step's gain, or PyTorch's model has another
            number of parameters.
    """
    images, labels = batch(network)
    initial = jax.jit(network.ours.init)(jax.random.key(0), images)
    makers = {
        "ours": partial(JaxTraining, network.ours, initial, images, labels),
        "flax": partial(JaxTraining, network.flax, plain_variables(initial), images, labels),
    }
    jax.jit(lambda x: x + 1).lower(1.0).compile()  # costs of a process's first compilation
    compilations: dict[str, list[float]] = {name: [] for name in makers}
    trainings: dict[str, Any] = {}
    for _ in range(4):
        for name, make in makers.items():
            jax.clear_caches()
            trainings[name] = make()
            compilations[name].append(trainings[name].seconds)
    torch = library("torch")
    if torch is not None:
        torch.manual_seed(0)
        trainings["torch"] = TorchTraining(torch, network.torch(torch), images, labels)
    counts = {name: training.parameters for name, training in trainings.items()}
    assert len(set(counts.values())) == 1, counts
    losses = {name: [training() for _ in range(3)] for name, training in trainings.items()}
    # Only the first losses agree to rounding: relu6 and batch norm make a fresh network's gradient jump with the last
    # bits of its parameters. But one step must reduce the loss equally.
    np.testing.assert_allclose(losses["ours"][0], losses["flax"][0], rtol=1e-5)
    np.testing.assert_allclose(*(np.subtract(*losses[name][:2]) for name in makers), rtol=0.1)
    samples = interleaved(trainings, rounds, seconds)
    return {
        "parameters": counts["ours"],
        "losses": losses,
        "ms": {name: results.milliseconds(taken) for name, taken in samples.items()},
        "compile_s": {name: [round(value, 2) for value in taken] for name, taken in compilations.items()},
    }


def mobilenet_layers(batch: int, size: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Its depthwise, pointwise and batch norm layers: kind, input shape, output channels, stride."""
    size, channels = size // 2, 32
    layers = [("batch norm", (batch, size, size, 32), 32, 1)]

    def add(kind: str, features: int, stride: int = 1) -> None:
        nonlocal size, channels
        layers.append((kind, (batch, size, size, channels), features, stride))
        size, channels = -(-size // stride), features
        layers.append(("batch norm", (batch, size, size, channels), channels, 1))

    for expansion, features, blocks, first_stride in STAGES:
        for i in range(blocks):
            if expansion > 1:
                add("pointwise", expansion * channels)
            add("depthwise", channels, first_stride if i == 0 else 1)
            add("pointwise", features)
    add("pointwise", 1280)
    return layers


def layer_in_jax(kind: str, shape: tuple[int, ...], features: int, stride: int) -> Callable[[], Any]:
    """A single layer, forward and backward in its input and its parameters."""
    layer: nn.Module = {
        "depthwise": lambda: DepthwiseConv2D(3, stride, "same", use_bias=False),
        "pointwise": lambda: nn.Conv(features, (1, 1), use_bias=False),
        "batch norm": lambda: nn.BatchNorm(use_running_average=False),
    }[kind]()
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params, statistics = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}

    def apply(params: Any, x: Any) -> Any:
        return layer.apply({"params": params, **statistics}, x, mutable=["batch_stats"])[0]

    g = jnp.ones_like(jax.eval_shape(apply, params, x))

    @jax.jit
    def both(params: Any, x: Any, g: Any) -> Any:
        y, pullback = jax.vjp(apply, params, x)
        return y, pullback(g)

    return finished(both, params, x, g)


def layer_in_torch(torch: Any, kind: str, shape: tuple[int, ...], features: int, stride: int) -> Callable[[], Any]:
    """A single layer in PyTorch, channels last."""
    batch, height, width, channels = shape
    layer = {
        "depthwise": lambda: torch.nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        "pointwise": lambda: torch.nn.Conv2d(channels, features, 1, bias=False),
        "batch norm": lambda: torch.nn.BatchNorm2d(channels),
    }[kind]()
    layer = layer.to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.ones_like(layer(x).detach())
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, g)


def parts(network: Network, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by contestant and kind of layer, each layer timed separately."""
    torch = library("torch")
    totals: dict[str, dict[str, float]] = {
        name: dict.fromkeys(KINDS, 0.0) for name in ("ours", *(["torch"] if torch is not None else []))
    }
    layers = mobilenet_layers(network.batch, network.size)
    for layer in dict.fromkeys(layers):
        tasks = {"ours": layer_in_jax(*layer)} | ({"torch": layer_in_torch(torch, *layer)} if torch is not None else {})
        for task in tasks.values():
            task()
        for name, taken in interleaved(tasks, rounds, seconds=1.0).items():
            totals[name][layer[0]] += 1e3 * layers.count(layer) * float(np.median(taken))
    return {name: {kind: round(ms, 3) for kind, ms in kinds.items()} for name, kinds in totals.items()}


def report(data: dict[str, Any]) -> None:
    """Prints the tables."""
    print()
    table(
        ("network", "step", "ms", "ours / it", "compile s", "last loss"),
        [
            (
                network,
                name,
                f"{np.median(taken):.2f}",
                f"{results.ratio(found['ms']['ours'], taken):.3f}",
                f"{min(found['compile_s'][name]):.2f}" if name in found["compile_s"] else "",
                f"{found['losses'][name][-1]:.3f}",
            )
            for network, found in data["networks"].items()
            for name, taken in found["ms"].items()
        ],
    )
    if not data["parts"]:
        return
    print("\nMobileNetV2, layers timed separately, forward and backward, ms; the rest is the step less their sum\n")
    rows = []
    for name, kinds in data["parts"].items():
        step = float(np.median(data["networks"]["MobileNetV2"]["ms"][name]))
        cells = [*(kinds[kind] for kind in KINDS), step - sum(kinds.values()), step]
        rows.append((name, *(f"{cell:.2f}" for cell in cells)))
    table(("", *KINDS, "rest", "step"), rows)


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """At least 5 times faster than flax.linen.Conv, compiled in no more time."""
    step, compilation = "MobileNetV2 step against flax.linen.Conv", "MobileNetV2 compile time"
    found = data["networks"].get("MobileNetV2")
    if found is None:
        return [Verdict(step, None), Verdict(compilation, None)]
    speed = 1 / results.ratio(found["ms"]["ours"], found["ms"]["flax"])
    ours, flax = (min(found["compile_s"][name]) for name in ("ours", "flax"))
    return [
        Verdict(step, speed >= 5, f"{speed:.2f}x faster (at least 5x)"),
        Verdict(compilation, ours <= flax, f"{ours:.2f} s (at most that with flax.linen.Conv, {flax:.2f} s)"),
    ]


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The results of a run; raises if a value is wrong."""
    networks = {name: train(NETWORKS[name], arguments.rounds, arguments.seconds) for name in arguments.networks}
    data = {
        "machine": environment.machine(),
        "versions": environment.versions(),
        "threads": arguments.threads,
        "networks": networks,
        "parts": parts(NETWORKS["MobileNetV2"], arguments.rounds) if "MobileNetV2" in networks else {},
    }
    return data, []


def main() -> None:
    """Measures or reads, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20, help="for a contestant's samples of a step; see timing")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    command.add_results_options(parser)
    command.run("benchmarks.training", parser.parse_args(), measure, report, verdicts)


if __name__ == "__main__":
    main()
