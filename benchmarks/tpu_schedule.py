"""Cycles of a program on one TPU chip, read from the TPU compiler's own final schedules; needs no TPU.

The compiler writes each operation's final schedule as a list of bundles, which the chip issues one a cycle, in loops
whose trip counts it writes beside them. An operation then takes the larger of two times:

    issue     the bundles, each times the trip counts of the loops around it
    memory    the bytes of its operands and results in HBM, at the chip's bandwidth

since the copies between HBM and VMEM overlap with the bundles. A program takes the sum over its operations, and never
less than all its bytes take, those of asynchronous copies too. This is a model. It leaves out stalls, it counts regions
that a condition skips as issued, and an operation that reads a part of an operand is charged for all of it, unless it
is a slice alone.

Import this before libtpu is loaded, at the first use of a topology: the compiler takes from the environment where to
write.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import workloads.tpu.compiler  # noqa: F401  # sets the rest of libtpu's environment

_DUMP = Path(tempfile.mkdtemp(prefix="tpu_schedule_"))
os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)


@dataclass(frozen=True)
class Chip:
    """What the model takes from a chip's data sheet.

    Attributes:
        topology: the smallest topology that the compiler knows with this chip.
        clock: cycles per second.
        bandwidth: bytes per second of HBM.
        lanes: float32 operations that the vector unit issues per cycle, a multiply and an add apart.
    """

    topology: str
    clock: float
    bandwidth: float
    lanes: int

    @property
    def bytes_per_cycle(self) -> float:
        """Bytes of HBM per cycle."""
        return self.bandwidth / self.clock


# 819 GB/s and 197 TFLOP/s (four 128 x 128 matrix units) are the data sheet's, and 1.5 GHz follows from the latter. The
# vector unit has four slots for 8 x 128 lanes, as the compiler's own table of capacities says.
V5E = Chip("v5e:2x2", 1.5e9, 819e9, 4 * 8 * 128)
# 1,640 GB/s and 918 TFLOP/s (four 256 x 256 matrix units) are the data sheet's, and 1.75 GHz follows
# from the latter. The vector unit is taken to be as wide as the v5e's.
#
# A v5p is not here: its programs run on two cores, and the schedules do not say how the loops are shared.
V6E = Chip("v6e:2x2", 1.75e9, 1640e9, 4 * 8 * 128)


@dataclass(frozen=True)
class Op:
    """An operation of a compiled program.

    Attributes:
        name, opcode: as in the HLO.
        issue: bundles times iterations.
        bytes: of its operands and results in HBM, as they are padded there.
        asynchronous: whether it is a copy that runs beside other operations.
        unknown: loops whose trip count was not found, which count as run once.
    """

    name: str
    opcode: str
    issue: float
    bytes: float
    asynchronous: bool = False
    unknown: int = 0


@dataclass(frozen=True)
class Program:
    """A compiled program, as its schedules tell.

    Attributes:
        ops: its operations, those of a loop's body with their cycles and bytes times its trip count.
        chip: the chip.
        text: its HLO.
        seconds: how long the compiler took.
        temporaries: bytes of memory beside operands and results.
    """

    ops: tuple[Op, ...]
    chip: Chip
    text: str
    seconds: float
    temporaries: int

    def cycles_of(self, op: Op) -> float:
        """What one operation takes; none if asynchronous."""
        return 0 if op.asynchronous else max(op.issue, op.bytes / self.chip.bytes_per_cycle)

    @cached_property
    def bytes(self) -> float:
        """What is moved to and from HBM."""
        return sum(op.bytes for op in self.ops)

    @cached_property
    def cycles(self) -> float:
        """What the program takes."""
        return max(sum(map(self.cycles_of, self.ops)), self.bytes / self.chip.bytes_per_cycle)

    @property
    def unknown(self) -> int:
        """How many loops have unknown trip counts; with any, `cycles` is a lower bound."""
        return sum(op.unknown for op in self.ops)


def lower(function: Callable[..., Any], *arguments: Any, chip: Chip = V5E) -> Any:
    """A function of shapes, lowered for one chip.

    Args:
        function: the function.
        *arguments: trees of `jax.ShapeDtypeStruct`.
        chip: the chip.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    return jax.jit(function).lower(*placed)


def measure(lowered: Any, chip: Chip = V5E) -> Program:
    """Compiles a lowered program, and reads its schedules."""
    shutil.rmtree(_DUMP, ignore_errors=True)
    _DUMP.mkdir()
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    text = compiled.as_text() or ""
    program = Program(tuple(_ops(text, _schedules())), chip, text, seconds, memory.temp_size_in_bytes)
    shutil.rmtree(_DUMP, ignore_errors=True)
    return program


# Schedules: a bundle is a line `address label : > > { instructions }` with one ">" for each loop around it.

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:(L[HBE]|P[BF]|CT) *)?: *((?:> ?)*)\{(.*)$")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_EXIT_PREDICATE = re.compile(r"(%\w+) = scmp[^;]*/\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \(!(%\w+)\)")
# The bundles after a branch that are issued before it is taken.
_BRANCH_SLOTS = 4
_FINAL = re.compile(r"(\d+)-(.*)-\d+-final_bundles\.txt")


@dataclass
class Bundle:
    """A line of a schedule: how many loops are around it, whether it begins one, and its instructions."""

    depth: int
    begins: bool
    text: str


def read_bundles(text: str) -> list[Bundle]:
    """The bundles of a schedule as the compiler writes it."""
    bundles: list[Bundle] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            label, marks, instructions = match.groups()
            depth = marks.count(">")
            if not depth and bundles and instructions.strip().startswith("}"):
                depth = bundles[-1].depth  # an empty bundle is written without its depth
            bundles.append(Bundle(depth, label in ("LB", "LH"), instructions))
        elif bundles:
            bundles[-1].text += line  # a long comment goes on
    _close_loops(bundles)
    return bundles


def _close_loops(bundles: list[Bundle]) -> None:
    """Puts the branch back to the beginning of each loop into the loop.

    The compiler writes what follows a loop's exit test, up to the last bundle issued before the branch is taken,
    without the loop's depth in part. It is issued at each turn.
    """
    tests: dict[str, int] = {}  # the bundle of each loop's exit test, by its predicate
    for i, bundle in enumerate(bundles):
        branch = _BRANCH.search(bundle.text)
        if branch and branch[1] in tests:
            test = tests[branch[1]]
            for issued_at_each_turn in bundles[test : i + 1 + _BRANCH_SLOTS]:
                issued_at_each_turn.depth = max(issued_at_each_turn.depth, bundles[test].depth)
        tests.update(dict.fromkeys(_EXIT_PREDICATE.findall(bundle.text), i))


def issued(bundles: list[Bundle], main_trips: int | None) -> tuple[float, int]:
    """The bundles that are issued, and the number of loops whose trip counts are unknown, which count as run once.

    Args:
        bundles: of one schedule.
        main_trips: the trip count of the longest outermost loop, if the HLO tells it. The loop's own exit test counts
            the turns that only fill and drain its pipeline too, which skip the rest.
    """
    unknown = 0

    def loops(start: int, end: int, depth: int) -> Iterable[tuple[int, int]]:
        """The loops that begin at a depth within bundles[start:end]."""
        i = start
        while i < end:
            if bundles[i].depth < depth:
                i += 1
                continue
            j = i + 1
            while j < end and bundles[j].depth >= depth and not (bundles[j].depth == depth and bundles[j].begins):
                j += 1
            yield i, j
            i = j

    def count(start: int, end: int, depth: int) -> float:
        nonlocal unknown
        inner = list(loops(start, end, depth + 1))
        longest = max(inner, key=lambda loop: loop[1] - loop[0], default=None)
        total = end - start - sum(j - i for i, j in inner)
        for i, j in inner:
            trips = main_trips if depth == 0 and (i, j) == longest else None
            if trips is None:
                tests = [t for b in bundles[i:j] if b.depth == depth + 1 for t in _EXIT.findall(b.text)]
                trips = int(tests[-1]) if tests else None
            if trips is None:
                unknown += 1
            total += (1 if trips is None else trips) * count(i, j, depth + 1)
        return total

    return count(0, len(bundles), 0), unknown


def _schedules() -> dict[str, Path]:
    """The final schedule of each operation; of one that the compiler tried again, the last."""
    matches = (_FINAL.fullmatch(path.name) for path in _DUMP.iterdir())
    found = sorted((int(m[1]), m[2], _DUMP / m[0]) for m in matches if m and "schedule-analysis" not in m[0])
    return {name: path for _, name, path in found}


# HLO: a computation is a head `%name (...) -> type {` and lines `%op = type opcode(operands), attributes`.

_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\(\d+\)")
# Operations that neither compute nor move anything, and the ends of asynchronous ones.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}


def hbm_bytes(type_: str) -> float:
    """The bytes of the arrays of an HLO type that lie in HBM, padded to the tiles of their layout."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(type_):
        if "S(" in layout:
            continue  # in VMEM or in scalar memory
        sizes = [int(n) for n in dims.split(",") if n]
        order = [int(n) for n in layout.split(":")[0].split(",") if n]
        tile = _TILE.search(layout)
        if tile and order:
            sizes = [sizes[axis] for axis in order]
            for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
                if i < len(sizes):
                    sizes[i] = -(-sizes[i] // n) * n
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(sizes) * bits / 8
    return total


def moved_bytes(opcode: str, type_: str, operands: Sequence[str]) -> float:
    """The bytes that an operation moves to or from HBM, by its type and those of its operands."""
    if opcode == "slice":
        return 2 * hbm_bytes(type_)  # it reads what it writes
    if opcode == "slice-start":
        return hbm_bytes(
            _SPACE.sub("", type_.split("), ", 1)[1])
        )  # the slice, not the operand that its type begins with
    read = sum(map(hbm_bytes, operands))
    if opcode.endswith("-start"):
        # Its type names both ends, one of them in VMEM as a rule; the other moves.
        return min(hbm_bytes(type_), read) or hbm_bytes(type_)
    return hbm_bytes(type_) + read


def _computations(text: str) -> tuple[dict[str, list[re.Match[str]]], str]:
    """The operations of each computation, and the name of the entry."""
    computations: dict[str, list[re.Match[str]]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        head, op = _HEAD.match(line), _OP.match(line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif op and name:
            computations[name].append(op)
    return computations, entry


def _ops(text: str, schedules: dict[str, Path]) -> Iterable[Op]:
    """The operations of a compiled program."""
    computations, entry = _computations(text)
    types = {op[1]: op[2] for ops in computations.values() for op in ops}

    def visit(name: str, times: float) -> Iterable[Op]:
        for match in computations[name]:
            op, type_, opcode, rest = match.groups()
            if opcode == "while":
                yield from visit(_named("body", rest), times * _trips(rest, computations))
            elif opcode == "call":
                yield from visit(_named("to_apply", rest), times)
            elif opcode in _FREE or opcode.endswith("-done"):
                continue
            else:
                names = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
                moved = moved_bytes(opcode, type_, [types[n] for n in names])
                if opcode.endswith("-start"):
                    yield Op(op, opcode, 0, times * moved, asynchronous=True)
                    continue
                issue, unknown = 0.0, 0
                if op in schedules:
                    bundles = read_bundles(schedules[op].read_text(errors="replace"))
                    issue, unknown = issued(bundles, _iterations(rest))
                elif opcode == "custom-call":
                    moved = 0  # ConcatBitcast and the like
                yield Op(op, opcode, times * issue, times * moved, unknown=unknown)

    return visit(entry, 1)


def _named(what: str, rest: str) -> str:
    match = re.search(rf"{what}=%?([\w.\-]+)", rest)
    assert match, rest
    return match[1]


def _trips(rest: str, computations: dict[str, list[re.Match[str]]]) -> int:
    """How often a while loop runs."""
    known = re.search(r'known_trip_count":?\{"n":"?(\d+)', rest)
    if known:
        return int(known[1])
    limits = [op[4] for op in computations[_named("condition", rest)] if op[3] == "constant"]
    found = re.match(r"(\d+)\)", limits[-1]) if limits else None
    if not found:
        raise ValueError(f"a loop with a trip count that is not in the program: {rest[:200]}")
    return int(found[1])


def _iterations(rest: str) -> int | None:
    """The trip count of an operation's main loop, as the HLO has it."""
    bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', rest)
    return math.prod(int(n.strip('"')) for n in bounds[1].split(",")) if bounds and bounds[1] else None
