"""The reading of cycles from the compiler's schedules, on schedules and programs whose counts are known."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks.tpu_schedule import V5E, hbm_bytes, issued, moved_bytes, read_bundles

# Two bundles, a loop of 3 around one bundle and a loop of 5 around two, and a last bundle.
NESTED = """
     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3 = smov 0 }
   0x3 LB: >> { %v1 = vld [vmem:[%s3]] }
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
   0x5   : > { %p2 = scmp.ge.s32.totalorder %s1, 3 /* loop exit test */ }
   0x6   :  { vsyncpa 1 }
"""
# Three bundles, and a loop of 3 around three and a branch with its four bundles, as the compiler writes it: what is
# moved into or past the branch is written without the loop's depth, but is issued at each turn.
BRANCH = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %v1 = vld [vmem:[%s1]] }
   0x2   : > { %p2 = scmp.ge.s32.totalorder %s1, 3 /* loop exit test */ }
   0x3   :  { %v2 = vld [vmem:[#allocation1]] (%p2) }
   0x4   :  { %9 = sbr.rel (!%p2) target = $region7  ;;  %v3 = vpack.c.bf16 (%p2), 0.0, %v2 }
   0x5   :  {}
   0x6   :  {}
   0x7   : > { %s2 = smov %s3 }
   0x8   :  {} /* End region 3 */
   0x9   :  { vsyncpa 1 }
   0xa   :  { vsyncpa 2 }
"""


def test_nested_loops_are_counted() -> None:
    assert issued(read_bundles(NESTED), None) == (3 + 3 * (2 + 5 * 2), 0)
    assert issued(read_bundles(NESTED), 7) == (3 + 7 * (2 + 5 * 2), 0)


def test_a_loop_s_branch_is_issued_at_each_turn() -> None:
    assert issued(read_bundles(BRANCH), None) == (3 + 3 * 8, 0)


def test_a_loop_without_a_known_trip_count_is_reported() -> None:
    text = NESTED.replace("%s3, 5 /*", "%s3, %s9 /*")
    assert issued(read_bundles(text), None) == (3 + 3 * (2 + 2), 1)


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[4096,4096]{1,0:T(8,128)}", 4 * 4096 * 4096),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 2 * 8 * 128),
        ("bf16[16,100]{0,1:T(8,128)(2,1)}", 2 * 104 * 128),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("(f32[8,128]{1,0:T(8,128)}, pred[8,128]{1,0:T(8,128)})", 5 * 8 * 128),
    ],
)
def test_bytes_are_padded_and_vmem_is_free(type_: str, expected: int) -> None:
    assert hbm_bytes(type_) == expected


LARGE, PIECE = "bf16[8,16,128]{2,1,0:T(8,128)(2,1)", "bf16[2,16,128]{2,1,0:T(8,128)(2,1)"


@pytest.mark.parametrize(
    ("opcode", "type_", "operands", "images"),
    [
        ("copy", f"{LARGE}}}", [f"{LARGE}}}"], 16),
        ("slice", f"{PIECE}}}", [f"{LARGE}}}"], 4),
        ("copy-start", f"({LARGE}S(1)}}, {LARGE}}}, u32[]{{:S(2)}})", [f"{LARGE}}}"], 8),
        ("slice-start", f"(({LARGE}}}), {PIECE}S(1)}})", [f"{LARGE}}}"], 2),
    ],
)
def test_what_operations_move(opcode: str, type_: str, operands: list[str], images: int) -> None:
    assert moved_bytes(opcode, type_, operands) == images * 2 * 16 * 128


def compiled(name: str) -> tuple[float, float, int]:
    """Cycles, bytes and unknown loops of a small program; in a process whose libtpu writes its schedules."""
    import jax
    import jax.numpy as jnp

    from benchmarks.tpu_floor import Case
    from benchmarks.tpu_schedule import lower, measure

    def loop(trips: int, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, trips, lambda i, x: jnp.sin(x) * 2, x)

    large, small = (jax.ShapeDtypeStruct((n, n), "float32") for n in (4096, 1024))
    case = Case((1, 2048, 768), (4,))
    function, shapes = case.task("dx+dw", "bfloat16", "taps")
    program = {
        "gradients": lambda: lower(function, *shapes),
        "add": lambda: lower(jnp.add, large, large),
        "copy": lambda: lower(lambda x: x + 1, large),
        "loop of 10": lambda: lower(lambda x: loop(10, x), small),
        "loop of 30": lambda: lower(lambda x: loop(30, x), small),
    }[name]()
    measured = measure(program)
    return measured.cycles, measured.bytes, measured.unknown


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[float, float, int]]:
    names = ("add", "copy", "loop of 10", "loop of 30", "gradients")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(names, pool.map(compiled, names), strict=True))


@pytest.mark.parametrize(("name", "arrays"), [("add", 3), ("copy", 2)])
def test_elementwise_programs_take_the_memorys_time(
    name: str, arrays: int, programs: dict[str, tuple[float, float, int]]
) -> None:
    cycles, moved, unknown = programs[name]
    assert moved == arrays * 4 * 4096 * 4096
    assert cycles == pytest.approx(moved / V5E.bytes_per_cycle)
    assert unknown == 0


def test_a_loop_of_a_program_counts_its_trips(programs: dict[str, tuple[float, float, int]]) -> None:
    assert programs["loop of 30"][0] == pytest.approx(3 * programs["loop of 10"][0], rel=1e-3)


def test_every_loop_of_a_pipelined_program_has_a_known_trip_count(
    programs: dict[str, tuple[float, float, int]],
) -> None:
    assert programs["gradients"][2] == 0
