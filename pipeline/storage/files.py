"""Reads, writes and lists files by URI: a local path, `file://…`, or `s3://bucket/key` on AWS or a compatible server.

Every function takes the URI and the `Storage` section of the configuration. Credentials come from the AWS chain
(environment, profile, role) and appear in no message. Errors are one-line `StorageError`s. On S3, transient errors are
raised only after `storage.max_attempts` attempts.
"""

import os
import stat as modes
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import pyarrow.fs

from pipeline.config import Storage
from pipeline.storage.errors import StorageError, error_code, faults


@dataclass(frozen=True)
class Entry:
    """One file. `etag` identifies its content: the object's on S3, modification time and size on disk."""

    uri: str
    size_bytes: int
    etag: str


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def local_path(uri: str) -> str:
    """The local path of a URI; `file://` URIs are percent-decoded."""
    if uri.startswith("file://"):
        return unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if "://" in uri or "\0" in uri:
        raise StorageError("InvalidUri", f"expected a local path, file:// or s3://bucket/key, got {uri!r}")
    return os.path.expanduser(uri)


def join(base: str, *names: str) -> str:
    """`base` with `names` appended; an absolute name or a full URI replaces what comes before it."""
    for name in names:
        whole = "://" in name or name.startswith("/")
        base = name if whole else f"{base.rstrip('/')}/{name}"
    return base


def arrow_filesystem(uri: str, storage: Storage) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system for `uri`, and the path in it.

    It can be pickled to other machines. Use it within `faults`, which turns its errors into `StorageError`.
    """
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), _path(uri)
    from pipeline.storage.arrow import arrow_s3

    key = _key(uri)
    with faults(uri):
        return arrow_s3(storage, key.partition("/")[0]), key


def stat(uri: str, storage: Storage) -> Entry:
    """One file's current size and etag."""
    with faults(uri):
        if not is_s3(uri):
            return _entry_of_path(uri, _path(uri))
        found = _s3().info(_key(uri), storage)
        if found["type"] == "directory":
            raise IsADirectoryError(uri)
        return _entry_of_object(uri, found)


def exists(uri: str, storage: Storage) -> bool:
    """Whether `uri` is a file or a folder. Raises if the server is unreachable or the bucket is missing."""
    with faults(uri):
        try:
            if is_s3(uri):
                _s3().info(_key(uri), storage)
            else:
                os.stat(_path(uri))
        except (FileNotFoundError, NotADirectoryError) as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return False
    return True


def is_folder(uri: str, storage: Storage) -> bool:
    """Whether `uri` is a folder. Raises if nothing exists there."""
    with faults(uri):
        if is_s3(uri):
            return bool(_s3().info(_key(uri), storage)["type"] == "directory")
        return modes.S_ISDIR(os.stat(_path(uri)).st_mode)


def read_bytes(uri: str, storage: Storage) -> bytes:
    """The whole content of one version of a file."""
    with faults(uri):
        if is_s3(uri):
            return bytes(_s3().get(_key(uri), storage))
        return Path(_path(uri)).read_bytes()


def open_entry(entry: Entry, storage: Storage, **caching: Any) -> IO[bytes]:
    """Open the version of a file that `entry` describes, for reading by range; `caching`: fsspec's options, for S3.

    Read it within `faults`: `StorageError` Changed if the object has changed on S3 since.
    """
    with faults(entry.uri):
        if not is_s3(entry.uri):
            return open(_path(entry.uri), "rb")
        file: IO[bytes] = _s3().ObjectFile(_key(entry.uri), storage, size=entry.size_bytes, etag=entry.etag, **caching)
        return file


def write_bytes_atomic(uri: str, data: bytes, storage: Storage) -> None:
    """Write a file atomically: readers see the old content or the new. Missing folders are created."""
    with faults(uri):
        if is_s3(uri):
            _s3().put(_key(uri), data, storage)
            return
        path = Path(_path(uri))
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)


def create_exclusive(uri: str, data: bytes, storage: Storage) -> bool:
    """Write a file if none exists; False if one does. Of concurrent callers exactly one gets True.

    `data` must be unique to the caller. A put that is retried after a lost response finds its own object, and only
    the content shows whose it is.
    """
    with faults(uri):
        if is_s3(uri):
            return bool(_s3().put_new(_key(uri), data, storage))
        path = Path(_path(uri))
        with _written_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True


def delete(uri: str, storage: Storage) -> None:
    """Delete one file, if it exists."""
    with faults(uri):
        if is_s3(uri):
            _s3().delete(_key(uri), storage)
            return
        with suppress(FileNotFoundError):
            os.unlink(_path(uri))


def list_files(uri: str, storage: Storage, *, recursive: bool = True, missing_ok: bool = False) -> list[Entry]:
    """All files under a folder, sorted by name, without S3's folder markers.

    Raises if a local folder does not exist, unless `missing_ok`. S3 has no folders: a missing one is empty.
    """
    with faults(uri):
        if is_s3(uri):
            found = _s3().list_objects(_key(uri), storage, recursive=recursive)
            entries = (_entry_of_object(f"s3://{path}", info) for path, info in found if not path.endswith("/"))
            return sorted(entries, key=lambda entry: entry.uri)
        path = _path(uri)
        if missing_ok and not os.path.lexists(path):
            return []
        if not os.path.isdir(path):
            raise StorageError("NotFound", f"no such folder: {uri}")
        return sorted(_walk(path, recursive), key=lambda entry: entry.uri)


def numbered(uri: str, storage: Storage) -> list[int]:
    """The numbers N of the files `uri/N.json`, ascending; empty if the folder does not exist."""
    names = (entry.uri.rsplit("/", 1)[-1] for entry in list_files(uri, storage, missing_ok=True))
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def _s3() -> Any:
    """`pipeline.storage.s3`, imported on first use: its libraries load slowly, and local files do not need them."""
    from pipeline.storage import s3

    return s3


def _key(uri: str) -> str:
    """`bucket/key` of an S3 URI. Raises `StorageError` InvalidUri."""
    path = uri.removeprefix("s3://")
    bucket = path.partition("/")[0]
    if "@" in bucket:  # not repeated: the part before it may be a secret
        raise StorageError(
            "InvalidUri",
            "expected s3://bucket/key, got a URI with credentials; remove them and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
        )
    if not bucket:
        raise StorageError("InvalidUri", f"expected s3://bucket/key, got {uri!r}")
    return path


def _path(uri: str) -> str:
    return os.path.abspath(local_path(uri))


def _entry_of_object(uri: str, info: dict[str, Any]) -> Entry:
    return Entry(uri, int(info["size"] if "size" in info else info["Size"]), str(info["ETag"]).strip('"'))


def _entry_of_path(uri: str, path: str) -> Entry:
    found = os.stat(path)
    if modes.S_ISDIR(found.st_mode):
        raise IsADirectoryError(uri)
    return Entry(uri, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


def _walk(root: str, recursive: bool) -> Iterator[Entry]:
    for folder, folders, names in os.walk(root):
        if not recursive:
            folders.clear()
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):  # not a socket, not a dangling link
                yield _entry_of_path(path, path)


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A complete, synced temporary file in the folder of `path`, deleted at the end unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
