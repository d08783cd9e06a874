"""Rows of documents, and what stands in them: what tests of sequences share."""

from __future__ import annotations

import numpy as np

LENGTH = 11
# Documents of one token, as long as the row, of the window's length, and longer.
DOCUMENTS = ([1, 4, 1, 5], [11], [1] * 11, [2, 9], [3, 3, 5])
ROWS = len(DOCUMENTS)
IDS = np.array([np.repeat(np.arange(len(row)) % 3, row) for row in DOCUMENTS])
POSITIONS = np.array([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS])
# A state whose tokens belong to the first document or not, padding on the left, and positions that say anything.
CONTINUED = np.array(
    [
        [7, 8, 9, 0, 1, 2, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 0, 5, 2, 1, 9, -1, 0, 3, 2],
        [2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1],
    ]
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32, the same at every run."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
