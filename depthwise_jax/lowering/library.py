"""Finds the library of the compiled kernels, or the reason why it is missing."""

from __future__ import annotations

import importlib.metadata
import struct
import sys
from pathlib import Path

from depthwise_jax.version import __version__

NAME = "libdepthwise_jax.so"


def find() -> Path | str:
    """The library's path, or the reason why there is no library.

    The library is in this package, or where the package was installed. The two differ if Python imports the sources in
    the current folder, which have no library, rather than the installed package.
    """
    try:
        distribution = importlib.metadata.distribution("depthwise_jax")
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    # From Python 3.12 on, distribution.files leaves out files that are gone.
    record = (distribution.read_text("RECORD") if distribution else None) or ""
    names = [line.split(",")[0] for line in record.splitlines()]
    installed = [
        Path(str(distribution.locate_file(name))).resolve()
        for name in names
        if distribution is not None and name.endswith(f"/{NAME}")
    ]
    imported = [(Path(entry) / NAME).resolve() for entry in sys.modules["depthwise_jax.lowering"].__path__]
    path = next(filter(Path.is_file, [*imported, *installed]), None)
    where = f"depthwise_jax {__version__} is imported from {Path(__file__).parents[1]}"
    if path is None and distribution is None:
        return f"{where}, which has no library and was not installed: install it with pip"
    if distribution is not None and distribution.version != __version__ and (path is None or path in installed):
        return f"{where}, but version {distribution.version} is installed: install it again"
    if path is not None:
        return path
    if installed:
        return f"{installed[0]} was installed but is gone: install depthwise_jax again"
    return (
        f"{where}, and was installed without its library, because there was no C++ compiler or the build failed: "
        "`pip install --verbose` shows why"
    )


def check_whole(path: Path) -> None:
    """Raises OSError for a truncated ELF file, which would end the process when loaded."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] == b"\x7fELF\x02\x01" and len(header) == 64:  # 64 bits, little-endian
        (start,) = struct.unpack_from("<Q", header, 40)  # the section headers, which are at the end
        size, number = struct.unpack_from("<HH", header, 58)
        if path.stat().st_size < start + size * number:
            raise OSError(f"it has {path.stat().st_size} bytes of {start + size * number}")
