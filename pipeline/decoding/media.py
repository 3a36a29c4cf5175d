"""One video or image of a unit, reachable by range or as a local file."""

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
    """An object that was looked up and found to be what the plan saw; close it to free its local copy."""

    def __init__(self, uri: str, storage: Storage, *, etag: str | None = None) -> None:
        """Raises `UnitError` (fetch): the storage's own kinds, Empty, or Changed where `etag` is not the object's."""
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
        """A seekable binary file that fetches what is read; `check` tells whether all of it came."""
        file = Ranged(self._opened(block_size=_RANGE_BLOCK_BYTES, cache_type="readahead"))
        self._open.append(file)
        return file

    def check(self) -> None:
        """Raises `UnitError` (fetch) if a read by range has failed, which FFmpeg takes for the end of the file."""
        for file in self._open:
            if isinstance(file, Ranged) and file.error is not None:
                with fetching(), faults(self.uri):
                    raise file.error

    def head(self, count: int = 4096) -> bytes:
        """The first bytes."""
        data = self.ranged().read(count)
        self.check()
        return data

    def local_path(self, max_bytes: int) -> str:
        """A path to the whole content: the file's own, or that of a local copy which no name points to."""
        if not self.remote:
            return os.path.abspath(local_path(self.uri))
        if self._copy is None:
            if self.entry.size_bytes > max_bytes:
                raise UnitError(
                    "fetch",
                    "TooLarge",
                    f"{self.uri} has {self.entry.size_bytes} bytes, and at most {max_bytes} are copied to local disk; "
                    "raise decode.max_object_bytes or choose decode.backend auto or pyav",
                )
            self._copy = self._copied()
        return self._copy

    def _copied(self) -> str:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close); unlinked, so a crash leaves nothing
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
    """A file for FFmpeg that ends where reading fails, and remembers why."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        if self.error is not None:
            return b""
        try:
            return bytes(self._file.read(count))
        except Exception as error:  # FFmpeg would print it and go on
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
    """Errors of the storage become the unit's errors of stage fetch."""
    try:
        yield
    except StorageError as error:
        raise UnitError("fetch", error.kind, error.message) from error


@contextmanager
def decoding(uri: str) -> Iterator[None]:
    """FFmpeg's errors become the unit's errors of stage decode, those of the file it reads errors of stage fetch."""
    try:
        with fetching(), faults(uri):
            try:
                yield
            except av.error.FFmpegError as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise  # the file's, not its content's
                detail = " ".join(str(error.strerror).split())
                raise UnitError("decode", "Corrupt", f"cannot be decoded ({detail}): {uri}") from error
    except MemoryError as error:
        raise UnitError("decode", "OutOfMemory", f"a frame does not fit into memory: {uri}") from error
