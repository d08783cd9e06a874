"""Prints a benchmark's results: tables in Markdown, and a verdict for each threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table."""
    head, *lines = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, *rows))
    print(head, "|---" * len(header) + "|", *lines, sep="\n")


@dataclass(frozen=True)
class Verdict:
    """Whether a measurement keeps a threshold.

    Attributes:
        check: the name of the check.
        passed: whether it passes; None if it was not measured.
        measured: the figures and their thresholds.
        layers: the number of measured layers and of all layers; None if the check does not concern layers.
    """

    check: str
    passed: bool | None
    measured: str = ""
    layers: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        """Whether all layers were measured."""
        return self.layers is None or self.layers[0] == self.layers[1]

    @property
    def word(self) -> str:
        """The verdict."""
        if self.passed is None:
            return "NOT MEASURED"
        return ("PASS" if self.passed else "FAIL") + ("" if self.whole else ", of a part")


def judge(verdicts: Sequence[Verdict]) -> bool:
    """Prints the verdicts, and returns whether all pass. A check not measured on all layers does not pass."""
    counts = ("" if verdict.layers is None else "{} of {}".format(*verdict.layers) for verdict in verdicts)
    rows = [(v.check, v.measured, count, v.word) for v, count in zip(verdicts, counts, strict=True)]
    print()
    table(("check", "measured", "layers", ""), rows)
    return all(verdict.passed and verdict.whole for verdict in verdicts)
