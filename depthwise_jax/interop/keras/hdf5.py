"""Reads untrusted HDF5: from one file only, with every size checked before anything is inflated, without filters."""

import contextlib
import io
import itertools
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

# The errors that h5py and zipfile raise for a damaged file.
_ERRORS = (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError)
_ERRORS += (AttributeError, NotImplementedError, zlib.error, zipfile.BadZipFile)


class Budget:
    """The number of bytes that reading a file may take: a small multiple of the file's size.

    Keras compresses nothing, so its arrays never hold more than the file.
    """

    # Bytes that any file may take, and how many each of its bytes may become when inflated or read repeatedly. Weights
    # deflate to nine tenths of their size; data that deflates to a hundredth was made to attack.
    ALLOWANCE = 1 << 20
    RATIO = 100

    def __init__(self, path: str, size: int):
        """Starts with the allowance of a file of `size` bytes; `path` is for messages."""
        self.path = path
        self.limit = self._left = self.ALLOWANCE + self.RATIO * size

    def take(self, count: int, what: str) -> None:
        """Takes `count` bytes for `what`, its name in messages.

        Raises:
            ValueError: fewer bytes are left.
        """
        self._left -= count
        if self._left < 0:
            raise ValueError(
                f"{self.path}: {what} would take {count} bytes, more than the file stores of it; reading this "
                f"file may take {self.limit} bytes in all"
            )


@contextlib.contextmanager
def damage(path: str) -> Iterator[None]:
    """Turns a reading library's errors into ones that call the file damaged. Put only the library's calls inside."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def open_file(file: Any, budget: Budget) -> tuple[Any, "Group"]:
    """Opens a file for reading.

    Args:
        file: a file, or a stream of bytes.
        budget: the memory that reading it may take.

    Returns:
        The h5py.File, which the caller closes, and its top group.

    Raises:
        ValueError: it is damaged.
    """
    import h5py

    in_memory = isinstance(file, io.BytesIO)
    with damage(budget.path):
        data = file.getbuffer() if in_memory else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data, memoryview(data) as view:
        _check_heaps(view, budget.path)
    with damage(budget.path):
        opened = h5py.File(file, "r")
    return opened, Group(opened, budget)


# The start of a global heap, where HDF5 keeps texts: its signature and version; 8 bytes of its size follow.
_HEAP = b"GCOL\x01\0\0\0"


def _check_heaps(data: memoryview, path: str) -> None:
    """Raises ValueError for a global heap whose objects do not fit in it: HDF5 walks such a heap forever.

    An object is 2 bytes of its number, 6 irrelevant ones, 8 of its size, and its content, rounded up to a multiple of
    8. Number 0 is the free space, whose size includes these 16 bytes.
    """
    if len(data) < 16:
        raise ValueError(f"{path} is damaged: it ends within its header")
    lengths = data[10] if data[8] >= 2 else data[14]  # bytes of a size, by the version of the file's header
    if lengths != 8:
        raise ValueError(f"{path} is damaged: sizes of {lengths} bytes, where HDF5 writes 8")
    for start in _places(data, _HEAP):
        at, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
        if end > len(data):
            continue  # which HDF5 refuses
        while at + 16 <= end:
            number, size = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 8 : at + 16], "little")
            taken = size if number == 0 else 16 + -(-size // 8) * 8
            if taken < 16 or at + taken > end:
                raise ValueError(f"{path} is damaged: an object of {size} bytes in the heap of texts at {start}")
            at += taken


def _places(data: memoryview, wanted: bytes) -> Iterator[int]:
    """The places of some bytes in others, searched a piece at a time."""
    step, overlap = 1 << 24, len(wanted) - 1
    for start in range(0, len(data), step):
        piece = bytes(data[start : start + step + overlap])
        at = piece.find(wanted)
        while at >= 0:
            yield start + at
            at = piece.find(wanted, at + 1)


class Group:
    """A group of an HDF5 file, whose members must lie in that file too."""

    def __init__(self, group: Any, budget: Budget):
        self._group, self._budget = group, budget
        self._path = budget.path
        with damage(self._path):
            self.name = str(group.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self._group == other._group

    def __hash__(self) -> int:
        return hash(self._group)

    def names(self) -> list[str]:
        """The names of its members, in order."""
        with damage(self._path):
            return list(self._group)

    def __contains__(self, name: str) -> bool:
        with damage(self._path):
            return name in self._group

    def child(self, name: str) -> "Group | Array":
        """A member.

        Raises:
            ValueError: it does not exist, or it leads outside the file.
        """
        import h5py

        with damage(self._path):
            link = self._group.get(name, getlink=True)
        if link is None:
            raise ValueError(f"{self._path}: the group {self.name!r} has no {name!r}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(
                f"{self._path}: {name!r} in {self.name!r} is a {type(link).__name__}, which leads elsewhere"
            )
        with damage(self._path):
            member = self._group[name]
        if isinstance(member, h5py.Group):
            return Group(member, self._budget)
        if isinstance(member, h5py.Dataset):
            return Array(member, self._budget)
        raise ValueError(f"{self._path}: {name!r} in {self.name!r} is neither a group nor an array")

    def group(self, name: str) -> "Group":
        """The group at a path in this one; each step must lie in the file."""
        found: Group | Array = self
        for step in name.split("/"):
            if isinstance(found, Array):
                raise ValueError(f"{self._path}: {found.name!r} is an array, not a group; it has no {step!r}")
            found = found.child(step)
        if isinstance(found, Array):
            raise ValueError(f"{self._path}: {found.name!r} is an array, not a group")
        return found

    def array(self, name: str) -> "Array":
        """The array at a path in this group."""
        *groups, last = name.split("/")
        found = (self.group("/".join(groups)) if groups else self).child(last)
        if isinstance(found, Group):
            raise ValueError(f"{self._path}: {found.name!r} is a group, not an array")
        return found

    def text(self, name: str) -> str | None:
        """An attribute that holds one text; None if it does not exist."""
        found = self._attribute(name)
        if found is not None and len(found) != 1:
            raise ValueError(
                f"{self._path}: the attribute {name!r} of {self.name!r} must be one text; got {len(found)}"
            )
        return None if found is None else found[0]

    def texts(self, name: str) -> list[str] | None:
        """An attribute that holds texts, in one piece or, as Keras writes what is longer, in name0, name1, ...

        Returns:
            The texts; None if there is no such attribute.
        """
        whole = self._attribute(name)
        if whole is not None:
            return whole
        pieces = itertools.takewhile(
            lambda piece: piece is not None, (self._attribute(f"{name}{number}") for number in itertools.count())
        )
        found = [text for piece in pieces for text in piece or ()]
        return found or None

    def _attribute(self, name: str) -> list[str] | None:
        import h5py

        what = f"the attribute {name!r} of {self.name!r}"
        with damage(self._path):
            if name not in self._group.attrs:
                return None
            attribute = h5py.h5a.open(self._group.id, name.encode())
            kind = attribute.get_type()
            size = math.prod(attribute.shape or ()) * kind.get_size()
        if not isinstance(kind, h5py.h5t.TypeStringID) and size:  # HDF5 itself may crash at others
            raise ValueError(f"{self._path}: {what} must hold text")
        self._budget.take(size, what)
        with damage(self._path):
            value = self._group.attrs[name]
            entries = [] if isinstance(value, h5py.Empty) else np.asarray(value).ravel().tolist()
            texts = [entry.decode() if isinstance(entry, bytes) else entry for entry in entries]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self._path}: {what} must hold text")
        self._budget.take(sum(map(len, texts)), what)
        return texts


class Array:
    """An array of an HDF5 file, whose numbers must lie in that file, and whose size has been checked."""

    def __init__(self, dataset: Any, budget: Budget):
        self._dataset, self._budget = dataset, budget
        with damage(budget.path):
            self.name = str(dataset.name)
            shape, self._dtype = dataset.shape, dataset.dtype
            elsewhere = dataset.external or dataset.is_virtual
            self._chunks = dataset.chunks
            self._stored = dataset.id.get_storage_size()
        where = f"{budget.path}: the array {self.name!r}"
        if elsewhere:
            raise ValueError(f"{where} lies in another file")
        if shape is None:
            raise ValueError(f"{where} is empty")
        self.shape = tuple(shape)

    def check(self) -> None:
        """Raises ValueError unless the numbers are real, and no more than the file can hold."""
        where = f"{self._budget.path}: the array {self.name!r}"
        if self._dtype.kind != "f" and self._dtype != _BFLOAT16:
            raise ValueError(f"{where} must hold real floating-point numbers; got {self._dtype}")
        if self._dtype == np.longdouble and np.longdouble != np.float64:
            raise ValueError(f"{where} is {self._dtype} (long double), which JAX does not have; store it as float64")
        if self._chunks is None and self._stored != self._size(self.shape):
            raise ValueError(f"{where} of shape {self.shape} would take more than the file stores of it")
        self._budget.take(self._size(self.shape), f"the array {self.name!r} of shape {self.shape}")

    def read(self) -> np.ndarray:
        """The numbers, after `check`, in the machine's byte order."""
        if self._chunks is None:
            with damage(self._budget.path):
                array = np.asarray(self._dataset[...])
        else:
            array = self._from_chunks(self._chunks)
        if self._dtype == _BFLOAT16:
            return array.view(jnp.bfloat16)
        return array.astype(self._dtype.newbyteorder("="), copy=False)

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self._dtype.itemsize

    def _from_chunks(self, chunks: tuple[int, ...]) -> np.ndarray:
        """The numbers from chunks, inflated here: HDF5's own filters inflate without a bound, and may be plugins."""
        import h5py

        where = f"{self._budget.path}: the array {self.name!r}"
        dataset = self._dataset.id
        with damage(self._budget.path):
            created = dataset.get_create_plist()
            filters = [created.get_filter(index)[0] for index in range(created.get_nfilters())]
            count = dataset.get_num_chunks()
        known = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
        if len(filters) > 2 or filters != [code for code in known if code in filters]:
            raise ValueError(f"{where} has filters other than shuffle and gzip; store it without them")
        if count != math.prod(-(-n // chunk) for n, chunk in zip(self.shape, chunks, strict=True)):
            raise ValueError(f"{where} of shape {self.shape} would take more than the file stores of it")
        size = self._size(chunks)
        self._budget.take(size, f"a chunk of the array {self.name!r}")
        array = np.empty(self.shape, self._dtype)
        for index in range(count):
            with damage(self._budget.path):
                info = dataset.get_chunk_info(index)
            # Deflate never adds more than a thousandth.
            if info.size > size + size // 1000 + 64 or info.filter_mask:
                raise ValueError(f"{where} has a chunk of {info.size} bytes that holds {size}")
            with damage(self._budget.path):
                _, raw = dataset.read_direct_chunk(info.chunk_offset)
                if known[1] in filters:
                    raw = zlib.decompressobj().decompress(raw, size + 1)
            if len(raw) != size:
                raise ValueError(f"{where} has a chunk of {len(raw)} bytes; a chunk of shape {chunks} has {size}")
            numbers = np.frombuffer(raw, np.uint8)
            if known[0] in filters:
                numbers = np.ascontiguousarray(numbers.reshape(self._dtype.itemsize, -1).T).ravel()
            place = tuple(slice(start, start + n) for start, n in zip(info.chunk_offset, chunks, strict=True))
            target = array[place]
            target[...] = numbers.view(self._dtype).reshape(chunks)[tuple(map(slice, target.shape))]
        return array


_BFLOAT16 = np.dtype("V2")  # how h5py writes it
