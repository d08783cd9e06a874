"""How the tests compile: quickly, and each program once in a run.

Nearly all programs of the tests are small and run once, so compiling them took most of the suite's time.
"""

from __future__ import annotations

import os
from importlib.metadata import version

# Less work for LLVM, and the older emitters of fused loops, which take a third of the newer ones' time; jaxlib 0.11 has
# the newer ones alone. By `make test`, the whole suite: 2,250 seconds of CPU time without, 1,170 with.
_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    **({"xla_cpu_use_fusion_emitters": False} if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11) else {}),
}
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _QUICKLY.items())

# What XLA does by default, for a program whose compiled text is read.
AS_BY_DEFAULT = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
    **{name: True for name in _QUICKLY if name == "xla_cpu_use_fusion_emitters"},
}

# What contracts a * b + c to one rounding on CPU, which takes some of LLVM's optimisation: a program whose rounding is
# the matter. Compiles twice as fast as what XLA does by default.
CONTRACTING = {"xla_backend_optimization_level": 1}


def environment(programs: str) -> dict[str, str]:
    """Variables for this process, before it imports jax, and for those that it starts.

    Args:
        programs: a folder for compiled programs, which all processes of a run share: three programs in five are
            another test's, too.
    """
    return {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}".strip(),
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
