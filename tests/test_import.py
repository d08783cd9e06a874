"""Importing: what it costs, what it brings along, and that it leaves nothing behind."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

REPORT = """
import json, sys
from time import process_time
import jax, flax.linen
before, start = set(sys.modules), process_time()
import depthwise_jax
seconds = process_time() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before)}))
"""


def run(code: str, **environment: str) -> Any:
    """Runs code in a fresh interpreter, with one device as users have it, and reads its last line as JSON."""
    ours = ("XLA_FLAGS", "KERAS_BACKEND", "PYTHONDONTWRITEBYTECODE")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """What REPORT prints in three processes, from bytecode as users have it: one more, before them, writes that."""
    return [run(REPORT) for _ in range(4)][1:]


def test_import_takes_under_a_tenth_of_a_second(reports: list[dict[str, Any]]) -> None:
    # On top of jax and flax.linen.
    assert statistics.median(report["seconds"] for report in reports) < 0.1


HEAVY = {"keras", "torch", "tensorflow", "optax", "matplotlib", "pallas", "nnx"}


def test_import_brings_nothing_heavy(reports: list[dict[str, Any]]) -> None:
    new = reports[0]["new"]
    assert "depthwise_jax" in new
    assert not [name for name in new if HEAVY & set(name.split("."))]
    # These load when they are first used.
    assert not {"depthwise_jax.optim", "depthwise_jax.nnx", "depthwise_jax.interop"} & set(new)


def test_import_and_first_calls_write_no_file(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    code = f"""
import os
import statistics
os.chdir({str(work)!r})
import jax.numpy as jnp
import depthwise_jax
depthwise_jax.depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1)))
print("[]")
"""
    run(code, HOME=str(home), TMPDIR=str(tmp_path), XDG_CACHE_HOME=str(home / ".cache"), PYTHONDONTWRITEBYTECODE="1")
    assert sorted(tmp_path.rglob("*")) == [home, work]


def test_import_creates_no_backend() -> None:
    # A library that starts the devices takes away the user's chance to configure them.
    code = """
import json, jax, depthwise_jax
jax.config.update("jax_num_cpu_devices", 3)
print(json.dumps(len(jax.devices())))
"""
    assert run(code) == 3


def test_the_public_names() -> None:
    import depthwise_jax

    for name in ("depthwise_conv", "separable_conv", "conv_general_dilated", "explain"):
        assert callable(getattr(depthwise_jax, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        depthwise_jax.no_such_name  # noqa: B018


def test_dir_lists_what_a_user_looks_for() -> None:
    import depthwise_jax

    names = dir(depthwise_jax)
    assert {"DepthwiseConv2D", "depthwise_conv", "constraints", "nnx", "optim", "interop"} <= set(names)
    assert not {"Any", "importlib", "TYPE_CHECKING", "native", "lowering", "functional"} & set(names)
    for name in names:
        getattr(depthwise_jax, name)


@pytest.mark.parametrize("module", ["activations", "constraints", "initializers", "optim", "regularizers", "settings"])
def test_public_modules_list_their_names(module: str) -> None:
    imported = importlib.import_module(f"depthwise_jax.{module}")
    names = imported.__all__
    defined = {
        name
        for name, item in vars(imported).items()
        if not name.startswith("_") and getattr(item, "__module__", None) == imported.__name__ and callable(item)
    }
    internal = {"warn_of_fans"} if module == "initializers" else set()
    assert defined - internal - {"get", "serialize"} == set(names) - {"get", "serialize"}
