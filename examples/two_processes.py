"""Trains the demo's network data-parallel in two processes of two CPU devices each, and compares with one process.

    python -m examples.two_processes

starts examples.train_sharded twice, as each host of a pod would start it once, and trains in this process on one
device. It prints the largest difference of the parameters, and fails if it exceeds rounding.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from examples.train_sharded import train

# The rounding of parameters of size one after sums in another order.
TOLERANCE = 1e-5


def run_together(commands: Sequence[Sequence[str]], seconds: float) -> None:
    """Runs commands at the same time until all have succeeded; stops the others if one fails.

    Args:
        commands: the commands.
        seconds: the time limit.

    Raises:
        subprocess.CalledProcessError: one has failed.
        subprocess.TimeoutExpired: they took too long.
    """
    started = [subprocess.Popen(command) for command in commands]
    end = time.monotonic() + seconds
    try:
        running = started
        while running:
            for process in running:
                if process.poll():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
            running = [process for process in running if process.returncode is None]
            if running and time.monotonic() > end:
                raise subprocess.TimeoutExpired(running[0].args, seconds)
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    """Runs both, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300, help="time limit for the two processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        two, one = Path(directory) / "two", Path(directory) / "one"
        training = [sys.executable, "-m", "examples.train_sharded", "--steps", str(arguments.steps)]
        training += ["--checkpoints", str(two), "--cpu-devices", "2", "--distributed", "--processes", "2"]
        training += ["--coordinator", f"127.0.0.1:{free_port()}"]
        run_together([[*training, "--process", str(process)] for process in range(2)], arguments.seconds)
        jax.config.update("jax_platforms", "cpu")
        mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
        restored = train(mesh, arguments.steps, two, arguments.steps)["params"]  # all steps are done: it only reads
        expected = train(mesh, arguments.steps, one, arguments.steps)["params"]
    differences = jax.tree.map(lambda w, exact: float(np.abs(w - exact).max()), restored, expected)
    difference = max(jax.tree.leaves(differences))
    print(f"largest difference of the parameters after {arguments.steps} steps: {difference:.2g}")
    if not difference <= TOLERANCE:
        sys.exit(f"expected the same parameters, to {TOLERANCE:g}")


if __name__ == "__main__":
    main()
