"""Imports libraries that a benchmark compares with, if they are installed."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks import environment


def library(name: str) -> Any:
    """The module, PyTorch's with as many threads as this process has processors; None if it is not installed."""
    try:
        module: Any = importlib.import_module(name)
    except ImportError:
        return None
    if name == "torch":
        module.set_num_threads(environment.processors())
    return module
