"""Which lowering serves which call: the lowerings by name, one table, and the choice.

A lowering is a module with the functions of `Lowering`, an entry of LOWERINGS and a row of TABLE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jax import Array

from depthwise_jax.lowering import conv, native, taps
from depthwise_jax.lowering.call import Call
from depthwise_jax.registry import closest


class Lowering(Protocol):
    """What a lowering must have."""

    def refusal(self, call: Call) -> str | None:
        """Why it cannot serve a call, or None."""
        ...

    def operand_dtype(self, call: Call) -> Any:
        """The dtype to which the operands of a call are brought, in which the three maps give their results."""
        ...

    def forward(self, x: Array, kernel: Array, call: Call) -> Array:
        """y."""
        ...

    def input_grad(self, g: Array, kernel: Array, call: Call) -> Array:
        """dx."""
        ...

    def kernel_grad(self, x: Array, g: Array, call: Call) -> Array:
        """dw."""
        ...


@runtime_checkable
class FusedLowering(Protocol):
    """What a lowering has that applies bias and activation at its store."""

    def fused(self, x: Array, kernel: Array, bias: Array | None = None, *, activation: str, call: Call) -> Array:
        """activation(y + bias)."""
        ...


LOWERINGS: dict[str, Lowering] = {"conv": conv, "taps": taps, "native": native}


@dataclass(frozen=True)
class Choice:
    """A lowering's name, and why it was chosen."""

    lowering: str
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering}: {self.reason}"


@dataclass(frozen=True)
class Rule:
    """A row of the table: the lowering to take on some platforms, and why.

    Attributes:
        platforms: the platforms.
        lowering: the name of the lowering.
        reason: why.
    """

    platforms: tuple[str, ...]
    lowering: str
    reason: str


# Of the rows for a platform the first whose lowering does not refuse the call decides; benchmarks/peers.py measures
# what they say.
TABLE = [
    Rule(("cpu",), "native", "the compiled kernels are the fastest on CPU"),
    Rule(("cpu",), "taps", "XLA's grouped convolution is many times slower on CPU"),
    Rule(("cpu",), "conv", "XLA's grouped convolution serves every call"),
    Rule(("tpu",), "conv", "XLA's grouped convolution is near the hardware's limit on TPU"),
    Rule(("cuda", "rocm"), "conv", "no measurement on a GPU says otherwise"),
    Rule(("tpu", "cuda", "rocm"), "taps", "shifted products serve every platform"),
]


def choose(call: Call, implementation: str | None) -> Choice:
    """The lowering for a call.

    Args:
        call: the call.
        implementation: a lowering that the caller insists on, or None.

    Raises:
        ValueError: the lowering cannot serve the call; without one, no lowering can.
    """
    where = f"this {call.direction} on {call.platform}"
    if implementation is not None:
        refusal = LOWERINGS[implementation].refusal(call)
        if refusal is not None:
            raise ValueError(f"implementation={implementation!r} cannot serve {where}: {refusal}")
        return Choice(implementation, "asked for by implementation=")
    refusals: list[str] = []
    for rule in TABLE:
        if call.platform in rule.platforms:
            refusal = LOWERINGS[rule.lowering].refusal(call)
            if refusal is None:
                return Choice(rule.lowering, "; ".join([rule.reason, *refusals]))
            refusals.append(f"not {rule.lowering}: {refusal}")
    raise ValueError(f"no lowering can serve {where}: {'; '.join(refusals)}")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or the name of a lowering."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in LOWERINGS):
        raise ValueError(
            f"implementation must be None or one of {tuple(LOWERINGS)}, "
            f"got implementation={implementation!r}; " + closest(str(implementation), LOWERINGS)
        )
