"""One safetensors file, opened once: header checked first, tensors read by position from the same descriptor."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from deltaserve_store.findings import refuse
from deltaserve_store.formats.safetensors_header import PREFIX_BYTES, Header, header_length, parse_header

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I16": torch.int16,
    "U8": torch.uint8,
}
CHUNK_BYTES = 4 << 20


class TensorFile:
    """Reading by ``pread`` rather than through a map: a file cut short raises an error instead of a bus error."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Raises ``AdapterInvalid`` when the file is no regular safetensors file within bounds."""
        self.name = path.name
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise refuse("not_a_regular_file", self.name, error.strerror or "unreadable", "a regular file") from None
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refuse("not_a_regular_file", self.name, "not a regular file", "a regular file")
            if status.st_size > max_bytes:
                raise refuse("file_too_large", self.name, f"{status.st_size} bytes", f"at most {max_bytes} bytes")
            prefix = os.pread(self._descriptor, PREFIX_BYTES, 0)
            length = header_length(prefix, status.st_size, self.name)
            self.header: Header = parse_header(self._read(PREFIX_BYTES, length), status.st_size, self.name)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, name: str) -> Tensor:
        """The tensor in the dtype and shape of its header entry, in memory of its own."""
        info = self.header.tensors[name]
        if info.start == info.stop:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        buffer = bytearray(info.stop - info.start)
        view = memoryview(buffer)
        position = 0
        while position < len(buffer):
            count = os.preadv(self._descriptor, [view[position : position + CHUNK_BYTES]], info.start + position)
            if count == 0:
                raise refuse("bad_offsets", name, "end of file", "all bytes of the tensor")
            position += count
        return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as stored, for digests."""
        info = self.header.tensors[name]
        for start in range(info.start, info.stop, CHUNK_BYTES):
            yield self._read(start, min(CHUNK_BYTES, info.stop - start))

    def _read(self, start: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = os.pread(self._descriptor, length, start)
            if not part:
                raise refuse("bad_header", self.name, "end of file", "the bytes that its header announces")
            parts.append(part)
            start += len(part)
            length -= len(part)
        return b"".join(parts)
