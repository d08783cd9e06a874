"""Prepares a benchmark's process with equal threads and instruction sets for all peers, and describes the machine.

Libraries read their settings when they are first imported, so `enter` restarts the benchmark with them set. This module
does not import JAX.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Each instruction set's name in depthwise_jax, oneDNN (PyTorch, TensorFlow) and XLA.
INSTRUCTION_SETS = {
    "avx512": ("AVX512_CORE_BF16", "AVX512"),
    "avx2": ("AVX2", "AVX2"),
    "baseline": ("SSE41", "SSE4_2"),
}
_ENTERED = "DEPTHWISE_JAX_BENCHMARK"
_PACKAGES = ("jax", "jaxlib", "flax", "keras", "numpy", "torch", "tensorflow", "tensorflow-cpu", "onnxruntime")
# The flags of a processor for the width of its vectors and the types that it multiplies.
_FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512", "avx_vnni", "amx", "asimd", "bf16", "sve")


def enter(module: str, threads: int, isa: str | None = None) -> None:
    """Restarts the process until it has `threads` threads for every library.

    Args:
        module: the benchmark's module, as in `python -m module`.
        threads: the number of processors that the process may use, and of threads in pools with their own count.
        isa: a key of INSTRUCTION_SETS to which every library is held, or None.

    Raises:
        ValueError: there are fewer processors than threads.
    """
    if os.environ.get(_ENTERED) == (settings := f"{threads} {isa}"):
        return
    if hasattr(os, "sched_getaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) < threads:
            raise ValueError(f"threads must be at most the {len(processors)} processors there are; got {threads}")
        os.sched_setaffinity(0, processors[:threads])
    environment = {
        **os.environ,
        _ENTERED: settings,
        "KERAS_BACKEND": "jax",
        "NPROC": str(threads),  # XLA's pool
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves some of a GPU's memory to the peers
    }
    if isa is not None:
        onednn, xla = INSTRUCTION_SETS[isa]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={xla}".strip()
        environment |= {"DEPTHWISE_JAX_ISA": isa, "ONEDNN_MAX_CPU_ISA": onednn, "XLA_FLAGS": flags}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The processor's model, its relevant flags, and the number of processors in use."""
    model, flags = platform.processor() or platform.machine(), []
    information = Path("/proc/cpuinfo")
    if information.exists():
        fields: dict[str, str] = {}
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        model = fields.get("model name", model)
        if "cpu family" in fields:
            model += f", family {fields['cpu family']} model {fields['model']}"
        flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": model,
        "flags": sorted(flag for flag in flags if flag.startswith(_FLAGS)),
        "processors": processors(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
