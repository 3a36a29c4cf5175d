"""Opens one video or image of a unit, by range or as a local file."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import av.error

from pipeline.config import Storage
from pipeline.errors import UnitError
from pipeline.storage.files import Entry, StorageError, faults, is_s3, local_path, open_entry, stat

_COPY_BLOCK_BYTES = 16 << 20
_RANGE_BLOCK_BYTES = 1 << 20


class Media:
    """A file whose etag matches the plan; `close` frees its local copy."""

    def __init__(self, uri: str, storage: Storage, *, etag: str | None = None) -> None:
        """Look up `uri`. Raises `UnitError` (fetch): kinds of StorageError, Empty, or Changed (etag not as planned)."""
        with fetching():
            self.entry: Entry = stat(uri, storage)
        self.uri = uri
        self.remote = is_s3(uri)
        self._storage = storage
        self._open: list[IO[bytes] | Ranged] = []
        self._copy: str | None = None
        if etag is not None and etag != self.entry.etag:
            raise UnitError(
                "fetch", "Changed", f"the object changed since it was planned: {uri}; plan again to caption it"
            )
        if self.entry.size_bytes == 0:
            raise UnitError("fetch", "Empty", f"the file has no bytes: {uri}")

    def ranged(self) -> "Ranged":
        """A seekable binary file, fetched as it is read. Call `check` after reading: errors look like end of file."""
        file = Ranged(self._opened(block_size=_RANGE_BLOCK_BYTES, cache_type="readahead"))
        self._open.append(file)
        return file

    def check(self) -> None:
        """Raise `UnitError` (fetch) if a read by range failed; FFmpeg sees such a failure as end of file."""
        for file in self._open:
            if isinstance(file, Ranged) and file.error is not None:
                with fetching(), faults(self.uri):
                    raise file.error

    def head(self, count: int = 4096) -> bytes:
        """The first `count` bytes."""
        data = self.ranged().read(count)
        self.check()
        return data

    def local_path(self, max_bytes: int) -> str:
        """The path of the local file, or of an unlinked local copy of the object."""
        if not self.remote:
            return os.path.abspath(local_path(self.uri))
        if self._copy is None:
            if self.entry.size_bytes > max_bytes:
                raise UnitError(
                    "fetch",
                    "TooLarge",
                    f"{self.uri} has {self.entry.size_bytes} bytes, more than the {max_bytes} copied to local disk; "
                    "raise decode.max_object_bytes, or set decode.backend to auto or pyav",
                )
            self._copy = self._copied()
        return self._copy

    def _copied(self) -> str:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close); unlinked, so a crash leaves no file
        self._open.append(copy)
        with fetching(), faults(self.uri), self._opened(cache_type="none") as source:
            while block := source.read(_COPY_BLOCK_BYTES):
                copy.write(block)
            copy.flush()
            if copy.tell() != self.entry.size_bytes:
                raise OSError(errno.EIO, f"expected {self.entry.size_bytes} bytes, got {copy.tell()}")
        return f"/proc/self/fd/{copy.fileno()}"

    def read(self) -> bytes:
        """The whole content."""
        with fetching(), faults(self.uri), self._opened(cache_type="none") as source:
            return bytes(source.read())

    def _opened(self, **caching: Any) -> Any:
        with fetching():
            return open_entry(self.entry, self._storage, **caching)

    def close(self) -> None:
        for file in self._open:
            file.close()
        self._open.clear()
        self._copy = None


class Ranged:
    """A file for FFmpeg that reports end of file where reading fails, and stores the error."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        if self.error is not None:
            return b""
        try:
            return bytes(self._file.read(count))
        except Exception as error:  # FFmpeg would print it and continue
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()


@contextmanager
def fetching() -> Iterator[None]:
    """Turn `StorageError` within the block into `UnitError` of stage fetch."""
    try:
        yield
    except StorageError as error:
        raise UnitError("fetch", error.kind, error.message) from error


@contextmanager
def decoding(uri: str) -> Iterator[None]:
    """Turn FFmpeg errors within the block into `UnitError` of stage decode, and storage errors into stage fetch."""
    try:
        with fetching(), faults(uri):
            try:
                yield
            except av.error.FFmpegError as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise  # an error of the file, not of its content
                detail = " ".join(str(error.strerror).split())
                raise UnitError("decode", "Corrupt", f"cannot be decoded ({detail}): {uri}") from error
    except MemoryError as error:
        raise UnitError("decode", "OutOfMemory", f"a frame does not fit into memory: {uri}") from error
