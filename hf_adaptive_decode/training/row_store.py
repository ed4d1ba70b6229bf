"""
Numbers of a data set's rows in one safetensors file that is filled in place and read while it grows.

It knows tensors, files and disks; no model, no loss, and not what the numbers are.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

# The names that safetensors' format has for what is stored.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
}
_NOT_OFFERED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_UNCOMMITTED_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Field:
    """What is kept of each position."""

    dtype: torch.dtype
    # behind the position
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Of one position."""
        return self.dtype.itemsize * math.prod(self.shape)


class RowStore:
    """
    Tensors whose first dimension runs over the positions of all rows of a data set, each row's behind the last one's.

    Beside the fields the file holds `offsets`, int64 `[rows + 1]`: where each row's positions begin; and `filled`,
    uint8 `[rows]`: 1 from when a row's numbers are on the disk. So what a killed process leaves can be gone on with.

    Args:
        path (`Path`): The file. One of other metadata, fields or rows is deleted and made anew.
        counts (sequence of `int`): Positions of each row.
        fields (mapping of `str` to [`Field`]): What is kept of each position.
        metadata (mapping of `str` to `str`): Says what the numbers were made from.

    Raises:
        `OSError`: From [`~open`], if the disk has no room for the whole file, which is reserved at once.
    """

    def __init__(
        self, path: Path, counts: Sequence[int], fields: Mapping[str, Field], metadata: Mapping[str, str]
    ) -> None:
        self.path, self._fields = path, dict(fields)
        offsets = [0, *accumulate(counts)]
        self._header, self._places = _layout(len(counts), offsets[-1], fields, metadata)
        self.bytes = len(self._header) + sum(end - start for _, _, start, end in self._places.values())
        self._offsets = torch.tensor(offsets)
        self._memory: mmap.mmap | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._filled = torch.zeros(len(counts), dtype=torch.bool)
        self._pending: list[int] = []
        self._pending_bytes = 0

    @property
    def positions(self) -> int:
        """Of all rows."""
        return int(self._offsets[-1])

    @property
    def rows(self) -> int:
        """Of the data set."""
        return len(self._filled)

    @property
    def rows_filled(self) -> int:
        """How many rows are there, or about to be."""
        return int(self._filled.sum())

    def is_there(self) -> bool:
        """Whether the file exists as it has to be, whatever of it is filled."""
        try:
            with self.path.open("rb") as file:
                return file.read(len(self._header)) == self._header and self.path.stat().st_size == self.bytes
        except FileNotFoundError:
            return False

    def open(self) -> None:
        """Makes the file unless it is there, and maps it into memory."""
        if not self.is_there():
            self._make()
        with self.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.bytes)
        for name, (dtype, shape, start, _) in self._places.items():
            place = len(self._header) + start
            flat = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=place)
            self._tensors[name] = flat.view(shape)
        self._tensors["offsets"].copy_(self._offsets)
        self._filled = self._tensors["filled"].bool()

    def has(self, rows: torch.Tensor) -> bool:
        """Whether every one of these rows, long `[B]`, can be read."""
        return bool(self._filled[rows].all())

    def counts(self, rows: torch.Tensor) -> torch.Tensor:
        """Positions of each of these rows, long `[B]`."""
        return self._offsets[rows + 1] - self._offsets[rows]

    def read(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every field of these rows' positions, one row behind the other; copies."""
        spans = [slice(*self._offsets[row : row + 2].tolist()) for row in rows.tolist()]
        return {name: torch.cat([self._tensors[name][span] for span in spans]) for name in self._fields}

    def write(self, rows: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Keeps every field of these rows' positions, ordered as by [`~read`]; rows that are there stay as they are."""
        if self.has(rows):
            return
        start, values = 0, {name: value.to("cpu") for name, value in values.items()}
        for row, count in zip(rows.tolist(), self.counts(rows).tolist(), strict=True):
            if not self._filled[row]:
                span = slice(*self._offsets[row : row + 2].tolist())
                for name in self._fields:
                    self._tensors[name][span] = values[name][start : start + count]
                self._filled[row] = True
                self._pending.append(row)
                self._pending_bytes += count * sum(field.bytes for field in self._fields.values())
            start += count
        if self._pending_bytes >= _UNCOMMITTED_BYTES:
            self.commit()

    def commit(self) -> None:
        """Brings what was written to the disk, and only then marks its rows as filled."""
        if self._memory is None or not self._pending:
            return
        self._memory.flush()
        self._tensors["filled"][self._pending] = 1
        self._memory.flush()
        self._pending, self._pending_bytes = [], 0

    def _make(self) -> None:
        """Reserves the whole file under another name, so that one of the right name has its space."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        try:
            with new.open("wb") as file:
                file.write(self._header)
                file.flush()
                _reserve(file.fileno(), len(self._header), self.bytes)
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError:
            new.unlink(missing_ok=True)
            raise


def _layout(
    rows: int, positions: int, fields: Mapping[str, Field], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]]:
    """The file's header, and of each tensor its dtype, shape, and first and last byte behind the header."""
    shapes = {name: (field.dtype, (positions, *field.shape)) for name, field in fields.items()}
    shapes |= {"offsets": (torch.int64, (rows + 1,)), "filled": (torch.uint8, (rows,))}
    places, end = {}, 0
    # By falling size of an element, each tensor begins at a multiple of its own.
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        start, end = end, end + dtype.itemsize * math.prod(shape)
        places[name] = (dtype, shape, start, end)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape, start, stop) in places.items():
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


def _reserve(handle: int, start: int, end: int) -> None:
    """Takes the disk's blocks for a file, so that no later write into its memory map can find none."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, start, end - start)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
        else:
            return
    block = bytes(1 << 20)
    for at in range(start, end, len(block)):
        os.write(handle, block[: end - at])
