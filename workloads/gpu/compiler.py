"""Runs XLA's CUDA compiler on a machine without a GPU: programs for one H100, and figures of the compiled programs.

Needs JAX's CUDA plugin, ptxas and libdevice, as in the virtual environment of `make test-gpu-compiler`. Programs cannot
be run here, only read. The libraries' algorithms are not chosen, since that would require timing them: the figures
exclude what cuDNN does within a call, and the memory that it needs for it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CONFIG = Path(__file__).parent / "h100.pbtxt"
# An array of at least this many bytes is data, not a kernel: the cases' kernels are below 64 KiB.
WHOLE = 2**20


def _toolkit() -> Path:
    """The folder of ptxas and libdevice, from the packages of CUDA's compiler or from an installation."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" for folder in (found and found.submodule_search_locations) or ()]
    return next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), Path("/usr/local/cuda"))


# XLA reads them when it first compiles. Autotuning would have to run its candidates.
_FLAGS = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={_toolkit()}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
# The plugin then asks for neither a driver nor CUDA's libraries.
jax.config.update("jax_platforms", "cpu")

# Operations that start nothing on the device: names of existing memory, and the ends of asynchronous operations.
_FREE = re.compile("parameter|constant|bitcast|tuple|get-tuple-element|after-all|opt-barrier|[a-z]+-(done|id)")
# Operations that run named computations.
_CONTROL = frozenset({"while", "conditional", "call"})
# Operations within a kernel that move elements without computing.
_MOVES = re.compile(
    "parameter|constant|bitcast|reshape|tuple|get-tuple-element|copy|copy-start|transpose|pad|slice|dynamic-slice|"
    "dynamic-update-slice|concatenate|reverse|broadcast|gather|convert|iota"
)
_ITEM_BITS = {"pred": 8, "bf16": 16, "f8e5m2": 8, "f8e4m3fn": 8, "token": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*)")
_OPCODE = re.compile(r"([a-z][\w-]*)\(")


@dataclass(frozen=True)
class Array:
    """An array of a compiled program.

    Attributes:
        bits: of an element.
        shape: its shape.
        layout: its axes, the fastest first.
    """

    bits: int
    shape: tuple[int, ...]
    layout: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return math.prod(self.shape) * self.bits // 8

    def order(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes longer than one among some axes, the slowest in memory first."""
        return tuple(axes[axis] for axis in reversed(self.layout) if self.shape[axis] > 1)


def arrays(type_: str) -> list[Array]:
    """The arrays of a type in HLO's text, which may be a tuple."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, filter(None, text.split(","))))

    return [
        Array(
            _ITEM_BITS.get(name) or int(re.sub(r"\D", "", name) or 0),
            shape := numbers(dimensions),
            numbers(layout) or tuple(reversed(range(len(shape)))),
        )
        for name, dimensions, layout in _ARRAY.findall(type_)
    ]


@dataclass(frozen=True)
class Instruction:
    """One operation of a compiled program: its result, its kind, the names of its operands, and its attributes."""

    arrays: list[Array]
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def bytes(self) -> int:
        """Those of its result."""
        return sum(array.bytes for array in self.arrays)


# The instructions of a computation by name.
Computation = dict[str, Instruction]


def read(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a compiled program's text by name, and the name of the main one."""
    found: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            current = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] = _instruction(instruction[2])
    return found, entry


def _instruction(text: str) -> Instruction:
    type_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text[type_end:].lstrip())
    assert opcode is not None, text
    start = text.index(opcode[0], type_end) + len(opcode[1])
    end = _closing(text, start)
    return Instruction(arrays(text[:type_end]), opcode[1], re.findall(r"%([\w.-]+)", text[start:end]), text[end:])


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"no parenthesis closes the one at {start} of {text!r}")


@dataclass(frozen=True)
class Figures:
    """The figures of a compiled program.

    Attributes:
        kernels: the number of starts on the device: its own kernels, copies, and calls of libraries.
        libraries: the number of library calls of each kind, such as "forward 3x3": a convolution's direction and
            window.
        copies: kernels and copies that move elements of a tensor without computing.
        transposes: copies and other kernels that write a tensor in another order of its axes.
        bytes: the bytes of the operands and results of everything that it starts.
        temporaries: bytes of memory in addition to arguments and results, without the libraries' own.
        seconds: the compiler's time.
    """

    kernels: int
    libraries: dict[str, int]
    copies: int
    transposes: int
    bytes: int
    temporaries: int
    seconds: float


def figures(text: str, temporaries: int = 0, seconds: float = 0.0) -> Figures:
    """The figures of a compiled program's text."""
    computations, entry = read(text)
    started = list(_started(computations, entry))
    kinds = [_kind(instruction, computation, computations) for instruction, computation in started]
    return Figures(
        kernels=len(started),
        libraries=dict(Counter(_library(call) for call, _ in started if call.opcode == "custom-call")),
        copies=kinds.count("copy"),
        transposes=kinds.count("transpose"),
        bytes=sum(
            instruction.bytes + sum(_unique_bytes(instruction, computation)) for instruction, computation in started
        ),
        temporaries=temporaries,
        seconds=seconds,
    )


def _unique_bytes(instruction: Instruction, computation: Computation) -> Iterator[int]:
    return (computation[name].bytes for name in dict.fromkeys(instruction.operands))


def _started(computations: dict[str, Computation], name: str) -> Iterator[tuple[Instruction, Computation]]:
    """Everything that a computation starts on the device; a loop's body counts as often as it runs."""
    for instruction in computations[name].values():
        if instruction.opcode in _CONTROL:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
            called = re.findall(r"(?:body|condition|to_apply|calls|computation)=%([\w.-]+)", instruction.attributes)
            branches = re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            called += [name for names in branches for name in re.findall(r"%([\w.-]+)", names)]
            for inner in called:
                yield from list(_started(computations, inner)) * (int(trips[1]) if trips else 1)
        elif not _FREE.fullmatch(instruction.opcode):
            yield instruction, computations[name]


def _kind(instruction: Instruction, outer: Computation, computations: dict[str, Computation]) -> str:
    """ "transpose" or "copy" as in Figures, or "" for a kernel that computes."""
    if instruction.opcode == "custom-call" or instruction.bytes < WHOLE:
        return ""
    if instruction.opcode == "fusion":
        called = re.search(r"calls=%([\w.-]+)", instruction.attributes)
        assert called is not None, instruction
        inside = computations[called[1]]
        steps = [(step, inside) for step in inside.values()]
    else:
        steps = [(instruction, outer)]
    if any(step.bytes >= WHOLE and _transposes(step, scope) for step, scope in steps):
        return "transpose"
    return "copy" if all(_MOVES.fullmatch(step.opcode) for step, _ in steps) else ""


def _transposes(step: Instruction, computation: Computation) -> bool:
    """Whether an operation changes the order in memory of the axes longer than one."""
    if step.opcode not in ("transpose", "copy"):
        return False
    (source,), (target,) = computation[step.operands[0]].arrays, step.arrays
    axes = range(len(target.shape))
    if step.opcode == "transpose":
        permutation = re.search(r"dimensions=\{([\d,]+)\}", step.attributes)
        assert permutation is not None, step
        axes = [int(axis) for axis in permutation[1].split(",")]
    return source.order(range(len(source.shape))) != target.order(axes)


def _library(call: Instruction) -> str:
    """A library call's kind."""
    target = re.search(r'custom_call_target="([^"]+)"', call.attributes)
    assert target is not None, call
    window = re.search(r"window=\{size=([\dx]+)", call.attributes)
    kind = re.sub(r"^__cudnn\$conv", "", target[1])
    return f"{kind[0].lower()}{kind[1:]} {window[1]}" if window else kind


@cache
def devices(count: int) -> Sequence[Any]:
    """A number of H100s that need not exist, on one machine."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=CONFIG.read_text(), topology=f"1x1x{count}")
    return topology.devices


def compile_for_gpu(function: Callable[..., Any], *arguments: Any) -> tuple[str, Figures]:
    """The compiled text of a function of shapes, and its figures; on one GPU if the shapes have no shardings."""
    place = SingleDeviceSharding(devices(1)[0])
    placed = jax.tree.map(
        lambda a: a if a.sharding is not None else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    lowered = jax.jit(function).lower(*placed)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    return text, figures(text, memory.temp_size_in_bytes, seconds)
