"""Damaged Keras files, each of which must be refused by name: `python -m tests.support.keras_fuzz 2000` reads 2,000.

Each file is one of the three formats with bytes flipped, bytes overwritten, or the end cut off; archives are deflated
too. A reading must end in a ValueError or in layers, in bounded time and memory, and write nothing. The HDF5 library
itself may loop on a damaged file, so that each batch runs in a process with a time limit.
"""

import io
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np

# Seconds that one file of some kilobytes may take, and how much the process may grow over all of them, in MiB. The
# largest of 2,000 files took 0.1 s, and the process grew by 30 MiB.
SECONDS = 5
MEBIBYTES = 200


def seeds() -> list[tuple[str, bytes]]:
    """The sound files, by the ends of their names."""
    from workloads.keras_reference import keras

    layers = keras.layers
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="dw")(inputs)
    x = keras.Sequential([layers.SeparableConv2D(2, 3, name="sep")], name="inner")(x)
    x = layers.Conv2D(4, 1, groups=2, name="grouped")(x)
    model = keras.Model(inputs, x)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".keras", ".h5", ".weights.h5"):
            path = Path(folder) / f"model{suffix}"
            model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
            found.append((suffix, path.read_bytes()))
    deflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(found[0][1])) as source, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as to:
        for name in source.namelist():
            to.writestr(name, source.read(name))
    # Beside an archive's checksums, which catch most: weights that are damaged and packed again.
    return [*found, (".keras", deflated.getvalue())]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with a few bytes changed, or cut off."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(len(content))]
    broken = bytearray(content)
    # Half of the damage is where HDF5 has its headers, not in the numbers.
    for _ in range(int(rng.integers(1, 9))):
        place = int(rng.integers(min(len(content), 4096) if rng.integers(2) else len(content)))
        broken[place] = (broken[place] ^ (1 << rng.integers(8))) if kind == 1 else int(rng.integers(256))
    return bytes(broken)


def packed_again(content: bytes, rng: np.random.Generator) -> bytes:
    """An archive whose weights or configuration are damaged, with checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as to:
        damaged_name = ("model.weights.h5", "config.json")[int(rng.random() < 0.3)]
        for name in source.namelist():
            to.writestr(name, damaged(source.read(name), rng) if name == damaged_name else source.read(name))
    return out.getvalue()


def read(folder: Path, names: list[str]) -> int:
    """Reads files in this process, and returns how many of them were refused.

    Raises:
        AssertionError: one took too long, or too much memory.
        Exception: whatever `read_weights` raises beside ValueError.
    """
    from depthwise_jax.interop.keras import read_weights

    refused = 0
    before = None
    for name in names:
        print(name, file=sys.stderr)  # the last one is to blame
        start = time.process_time()
        with warnings.catch_warnings(action="ignore"):
            try:
                read_weights(folder / name)
            except ValueError as refusal:
                if name not in str(refusal):
                    raise
                refused += 1
        assert time.process_time() - start < SECONDS, name
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = before or peak  # after the first, which imports h5py
        assert peak - before < MEBIBYTES, f"{name} took {peak - before:.0f} MiB"
    return refused


def run(count: int, folder: Path, seed: int = 0) -> int:
    """Writes damaged files into a folder, reads them in another process, and returns how many were refused."""
    rng = np.random.default_rng(seed)
    sound = seeds()
    for index in range(count):
        suffix, content = sound[index % len(sound)]
        again = suffix == ".keras" and rng.random() < 0.7
        (folder / f"{index}{suffix}").write_bytes(packed_again(content, rng) if again else damaged(content, rng))
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.keras_fuzz", "--read", str(folder)],
        capture_output=True,
        text=True,
        timeout=60 + count,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(folder.iterdir()) == before
    return int(done.stdout)


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        place = Path(sys.argv[2])
        print(read(place, sorted(path.name for path in place.iterdir())))
    else:
        with tempfile.TemporaryDirectory() as name:
            print(f"{run(int(sys.argv[1]), Path(name))} of {sys.argv[1]} files were refused by name; none did more")
