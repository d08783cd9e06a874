"""Reads the text of compiled programs."""

from __future__ import annotations

import re
from collections import Counter

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|(?:ragged-)?all-to-all|reduce-scatter|collective-(?:permute|broadcast))(?:-start)?\("
)


def collectives(text: str) -> Counter[str]:
    """How many collectives of each kind a program has."""
    return Counter(_COLLECTIVE.findall(text))
