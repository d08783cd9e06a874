"""The reading of what the compiler wrote: programs whose kernels, copies, transposes and bytes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from workloads.gpu.compiler import Figures, arrays, compile_for_gpu, figures, read

MIB = 2**20
LARGE = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)  # 8 MiB
SQUARE = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)  # 4 MiB
SMALL = jax.ShapeDtypeStruct((8, 16), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((8, 64, 64, 32), jnp.float32)  # 4 MiB
KERNEL = jax.ShapeDtypeStruct((5, 3, 1, 32), jnp.float32)


def grouped(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def repeated(x: Array) -> Array:
    """A sum in each of ten rounds, which cannot be fused with the next round's."""
    return lax.fori_loop(0, 10, lambda i, x: x / (1 + x.sum(0)), x)


# A function and its operands, and its kernels, copies, transposes and MiB.
PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, int, int, float]]] = {
    "sum of two": (jnp.add, (LARGE, LARGE), (1, 0, 0, 24)),
    "sum of one and itself": (lambda x: x + x, (LARGE,), (1, 0, 0, 16)),
    "copy": (lambda x: x, (LARGE,), (1, 1, 0, 16)),
    "rounding": (lambda x: x.astype(jnp.bfloat16), (LARGE,), (1, 1, 0, 12)),
    "padding": (lambda x: jnp.pad(x, ((0, 0), (0, 2048))), (LARGE,), (1, 1, 0, 24)),
    "zeros between": (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 1, 1))), (LARGE,), (1, 1, 0, 24)),
    "concatenation": (lambda x, y: jnp.concatenate([x, y]), (LARGE, LARGE), (1, 1, 0, 32)),
    "reversal": (lambda x: x[::-1], (LARGE,), (1, 1, 0, 16)),
    "transpose": (lambda x: x.T, (LARGE,), (1, 0, 1, 16)),
    "transpose and sum": (lambda x, y: x.T + y, (SQUARE, SQUARE), (1, 0, 1, 12)),
    "a small transpose": (lambda x: x.T, (SMALL,), (1, 0, 0, 2 * 512 / MIB)),
    "a small copy": (lambda x: jnp.pad(x, 1), (SMALL,), (1, 0, 0, (512 + 720) / MIB)),
    "an axis of one is moved": (lambda x: jnp.moveaxis(x[None], 0, 1) * 2, (LARGE,), (1, 0, 0, 16)),
    "a reshape": (lambda x: x.reshape(2048, 1024) * 2, (LARGE,), (1, 0, 0, 16)),
    "two that cannot be one": (lambda x: lax.optimization_barrier(x * 2) * 3, (LARGE,), (2, 0, 0, 32)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_known_programs(name: str) -> None:
    function, operands, expected = PROGRAMS[name]
    _, found = compile_for_gpu(function, *operands)
    assert (found.kernels, found.copies, found.transposes, found.bytes / MIB) == expected
    assert found.libraries == {}


def test_a_loop_counts_its_rounds() -> None:
    _, once = compile_for_gpu(lambda x: x / (1 + x.sum(0)), LARGE)
    text, ten = compile_for_gpu(repeated, LARGE)
    assert " while(" in text
    # The counter and its test are two more kernels a round, and there are two copies around the loop.
    assert 10 * once.kernels <= ten.kernels <= 10 * (once.kernels + 2) + 2
    assert 10 * once.bytes <= ten.bytes <= 11 * once.bytes


def test_library_calls_have_their_windows() -> None:
    _, found = compile_for_gpu(grouped, IMAGES, KERNEL)
    assert found.libraries == {"forward 5x3": 1}
    # The other one brings the kernel into cuDNN's order of axes.
    assert (found.kernels, found.copies, found.transposes) == (2, 0, 0)
    assert found.bytes == 2 * 4 * MIB + 3 * 5 * 3 * 32 * 4

    def gradient(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda kernel: grouped(x, kernel), KERNEL)(g)[0]

    assert compile_for_gpu(gradient, IMAGES, IMAGES)[1].libraries == {"backwardFilter 5x3": 1}


def test_temporaries_and_seconds_are_told() -> None:
    _, found = compile_for_gpu(lambda x: lax.optimization_barrier(x * 2).sum(), LARGE)
    assert found.temporaries >= 8 * MIB
    assert found.seconds > 0


# What the compiler does not write for the programs above: a change of layout, asynchronous copies, a branch, and a loop
# whose rounds are not known.
TEXT = """HloModule made_up, is_scheduled=true

%body (p: f32[1024,512]) -> f32[1024,512] {
  %p = f32[1024,512]{1,0} parameter(0)
  ROOT %negated = f32[1024,512]{1,0} negate(%p)
}

%condition (p.1: f32[1024,512]) -> pred[] {
  %p.1 = f32[1024,512]{1,0} parameter(0)
  ROOT %always = pred[] constant(true)
}

%branch (p.2: f32[1024,512]) -> f32[1024,512] {
  %p.2 = f32[1024,512]{1,0} parameter(0)
  ROOT %reversed = f32[1024,512]{1,0} reverse(%p.2), dimensions={0}
}

ENTRY %main (x: f32[1024,512], i: s32[]) -> (f32[1024,512], f32[1024,512]) {
  %x = f32[1024,512]{1,0} parameter(0), metadata={op_name="f(x)"}
  %i = s32[] parameter(1)
  %turned = f32[1024,512]{0,1} copy(%x)
  %started = (f32[1024,512]{1,0}, f32[1024,512]{1,0:S(5)}, u32[]) copy-start(%x)
  %done = f32[1024,512]{1,0} copy-done(%started)
  %looped = f32[1024,512]{1,0} while(%done), condition=%condition, body=%body
  %chosen = f32[1024,512]{1,0} conditional(%i, %looped, %looped), branch_computations={%branch, %branch}
  ROOT %both = (f32[1024,512]{1,0}, f32[1024,512]{0,1}) tuple(%chosen, %turned)
}
"""


def test_text_that_was_made_up() -> None:
    computations, entry = read(TEXT)
    assert (entry, len(computations), len(computations["main"])) == ("main", 4, 8)
    found = figures(TEXT)
    # Kernels: the copy into another layout, the started copy, one round, and two branches.
    assert (found.kernels, found.transposes, found.copies) == (5, 1, 3)


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[4,8]{1,0}", [128]),
        ("bf16[4,8]{1,0}", [64]),
        ("(f32[2]{0}, u8[0]{0}, pred[3]{0})", [8, 0, 3]),
        ("f32[]", [4]),
        ("c64[2]{0}", [16]),
        ("s4[8]{0:E(4)}", [4]),
    ],
)
def test_bytes_of_types(type_: str, expected: list[int]) -> None:
    assert [array.bytes for array in arrays(type_)] == expected


def test_figures_are_added_over_all_that_is_started() -> None:
    assert figures("ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n") == Figures(
        kernels=0, libraries={}, copies=0, transposes=0, bytes=0, temporaries=0, seconds=0.0
    )
