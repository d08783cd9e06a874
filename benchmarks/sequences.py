"""Times causal_conv1d on CPU: packed against unpacked, masked shifts and PyTorch, and a step of decoding.

    python -m benchmarks.sequences                   # two threads; writes results/sequences.json
    python -m benchmarks.sequences --rounds 40

All functions run in one process, interleaved, and ratios are medians over rounds. PyTorch takes part if it is
installed. "masked shifts" is the usual handwritten code: a sum of shifted products, masked by position.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import environment

RESULTS = Path(__file__).parent / "results"
X, WINDOW = (2, 2048, 1024), 4
TOKEN = (8, 1, 4096)
# Tokens in each packed document.
DOCUMENT = 100


def main() -> None:
    """Times the contestants, prints a table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30, help="for one function in an attempt")
    parser.add_argument("--attempts", type=int, default=3, help="the most attempts while the machine is noisy")
    parser.add_argument("--json", type=Path, default=RESULTS / "sequences.json")
    arguments = parser.parse_args()
    environment.enter("benchmarks.sequences", arguments.threads)
    from benchmarks import timing  # imports NumPy, which reads its settings
    from workloads import results

    rows: list[dict[str, Any]] = []
    for name, functions in {"training": training(), "decoding": decoding()}.items():
        reference = next(iter(functions))
        for function in functions.values():
            function()
        samples, attempts = timing.calm(functions, arguments.rounds, arguments.seconds, arguments.attempts)
        for function, durations in samples.items():
            over = results.ratio(durations, samples[reference])
            fastest = 1e3 * min(durations)
            print(f"{name:9} {function:22} {fastest:9.3f} ms  {over:7.2f} times {reference}", flush=True)
            row: dict[str, Any] = {"what": name, "by": function, "milliseconds": results.milliseconds(durations)}
            rows.append(row | {f"over {reference}": round(over, 3), "attempts": attempts})
    found = {
        "shapes": {"training": X, "window": WINDOW, "document": DOCUMENT, "decoding": TOKEN, "dtype": "float32"},
        "machine": environment.machine(),
        "versions": environment.versions(("jax", "jaxlib", "numpy", "torch")),
        "rows": rows,
    }
    results.write(found, arguments.json)


def training() -> dict[str, Callable[[], Any]]:
    """The value and both gradients for a given cotangent."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.optional import library
    from depthwise_jax import causal_conv1d

    random = np.random.default_rng(0)
    x, kernel, g = (random.standard_normal(shape, np.float32) for shape in (X, (WINDOW, X[-1], 1), X))
    positions = np.tile(np.arange(X[1]) % DOCUMENT, (X[0], 1))

    def ours(x: Any, kernel: Any, **options: Any) -> Any:
        return causal_conv1d(x, kernel, **options)[0]

    def shifts(x: Any, kernel: Any) -> Any:
        padded = jnp.pad(x, ((0, 0), (WINDOW - 1, 0), (0, 0)))
        terms = (
            jnp.where(
                positions[..., None] >= j, padded[:, WINDOW - 1 - j :][:, : X[1]] * kernel[WINDOW - 1 - j, :, 0], 0
            )
            for j in range(WINDOW)
        )
        return sum(terms)

    def compiled(f: Callable[..., Any]) -> Callable[[], Any]:
        def step(x: Any, kernel: Any, g: Any) -> Any:
            y, pullback = jax.vjp(f, x, kernel)
            return y, pullback(g)

        operands = jax.device_put((x, kernel, g))
        run = jax.jit(step).lower(*operands).compile()
        return lambda: jax.block_until_ready(run(*operands))

    functions = {
        "unpacked": compiled(ours),
        "packed": compiled(lambda x, kernel: ours(x, kernel, segment_pos=positions)),
        "packed, plain XLA": compiled(lambda x, kernel: ours(x, kernel, segment_pos=positions, implementation="taps")),
        "masked shifts": compiled(shifts),
    }
    torch = library("torch")
    if torch is not None:
        x_first, weight = torch.tensor(x.swapaxes(1, 2).copy()), torch.tensor(kernel[..., 0].T[:, None].copy())
        x_first.requires_grad_()
        weight.requires_grad_()
        cotangent = torch.tensor(g.swapaxes(1, 2).copy())

        def step() -> Any:
            y = torch.nn.functional.conv1d(torch.nn.functional.pad(x_first, (WINDOW - 1, 0)), weight, groups=X[-1])
            return torch.autograd.grad(y, (x_first, weight), cotangent)

        functions["PyTorch, unpacked"] = step
    return functions


def decoding() -> dict[str, Callable[[], Any]]:
    """One token more."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.optional import library
    from depthwise_jax import causal_conv1d, depthwise_conv

    random = np.random.default_rng(0)
    span = WINDOW - 1
    shapes = (TOKEN, (TOKEN[0], span, TOKEN[2]), (WINDOW, TOKEN[2], 1))
    token, state, kernel = jax.device_put([random.standard_normal(shape, np.float32) for shape in shapes])

    def valid(token: Any, state: Any, kernel: Any) -> Any:
        return depthwise_conv(jnp.concatenate([state, token], 1), kernel)

    def valid_and_state(token: Any, state: Any, kernel: Any) -> Any:
        joined = jnp.concatenate([state, token], 1)
        return depthwise_conv(joined, kernel), joined[:, 1:]

    def ours(token: Any, state: Any, kernel: Any) -> Any:
        return causal_conv1d(token, kernel, state=state)

    def by_hand(token: Any, state: Any, kernel: Any) -> Any:
        joined = jnp.concatenate([state, token], 1)
        return (joined * kernel[..., 0]).sum(1, keepdims=True), joined[:, 1:]

    def compiled(f: Callable[..., Any]) -> Callable[[], Any]:
        run = jax.jit(f).lower(token, state, kernel).compile()
        return lambda: jax.block_until_ready(run(token, state, kernel))

    functions = {
        "valid": compiled(valid),
        "valid, and the state": compiled(valid_and_state),
        "causal_conv1d": compiled(ours),
        "by hand": compiled(by_hand),
    }
    torch = library("torch")
    if torch is not None:
        token_, state_ = (torch.tensor(np.asarray(a).swapaxes(1, 2).copy()) for a in (token, state))
        weight = torch.tensor(np.asarray(kernel)[..., 0].T[:, None].copy())

        def step() -> Any:
            with torch.inference_mode():
                joined = torch.cat([state_, token_], -1)
                return torch.nn.functional.conv1d(joined, weight, groups=TOKEN[2]), joined[..., 1:]

        functions["PyTorch"] = step
    return functions


if __name__ == "__main__":
    main()
