"""Files behind one kind of name: a local path, `file://…`, or `s3://bucket/key` on AWS or a compatible server.

Every function takes the URI and the `Storage` section of the configuration. Credentials come from the usual AWS
chain (environment, profile, role) and appear in no message. What goes wrong is raised as `StorageError` in one line,
on S3 after `storage.max_attempts` tries where trying again may help.
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
    """One file: `etag` changes when its content does (S3: the object's; local: modification time and size)."""

    uri: str
    size_bytes: int
    etag: str


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def local_path(uri: str) -> str:
    """The path that a local URI names; `file://` URIs are percent-decoded."""
    if uri.startswith("file://"):
        return unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if "://" in uri or "\0" in uri:
        raise StorageError("InvalidUri", f"expected a local path, file:// or s3://bucket/key, got {uri!r}")
    return os.path.expanduser(uri)


def join(base: str, *names: str) -> str:
    """`base` with `names` appended; a name that is absolute or has a scheme of its own replaces it."""
    for name in names:
        whole = "://" in name or name.startswith("/")
        base = name if whole else f"{base.rstrip('/')}/{name}"
    return base


def arrow_filesystem(uri: str, storage: Storage) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system behind `uri`, which Ray reads and writes Parquet with, and the path in it.

    It pickles to other machines. What it raises becomes a `StorageError` within `faults`.
    """
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), _path(uri)
    from pipeline.storage.arrow import arrow_s3

    key = _key(uri)
    with faults(uri):
        return arrow_s3(storage, key.partition("/")[0]), key


def stat(uri: str, storage: Storage) -> Entry:
    """One file's size and etag, now."""
    with faults(uri):
        if not is_s3(uri):
            return _entry_of_path(uri, _path(uri))
        found = _s3().info(_key(uri), storage)
        if found["type"] == "directory":
            raise IsADirectoryError(uri)
        return _entry_of_object(uri, found)


def exists(uri: str, storage: Storage) -> bool:
    """Whether there is a file or a folder; an unreachable server or a missing bucket is an error, not a no."""
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
    """Whether `uri` is a folder; a URI that names nothing is an error."""
    with faults(uri):
        if is_s3(uri):
            return bool(_s3().info(_key(uri), storage)["type"] == "directory")
        return modes.S_ISDIR(os.stat(_path(uri)).st_mode)


def read_bytes(uri: str, storage: Storage) -> bytes:
    """The whole content of a file, of one version of it."""
    with faults(uri):
        if is_s3(uri):
            return bytes(_s3().get(_key(uri), storage))
        return Path(_path(uri)).read_bytes()


def open_entry(entry: Entry, storage: Storage, **caching: Any) -> IO[bytes]:
    """A file as it was seen, to be read by range; `caching` is fsspec's, for S3.

    Reading raises what the libraries raise, within `faults` a `StorageError`: Changed when the object is another now.
    """
    with faults(entry.uri):
        if not is_s3(entry.uri):
            return open(_path(entry.uri), "rb")
        file: IO[bytes] = _s3().ObjectFile(_key(entry.uri), storage, size=entry.size_bytes, etag=entry.etag, **caching)
        return file


def write_bytes_atomic(uri: str, data: bytes, storage: Storage) -> None:
    """Readers see the old content or the new, never a part; folders are made as needed."""
    with faults(uri):
        if is_s3(uri):
            _s3().put(_key(uri), data, storage)
            return
        path = Path(_path(uri))
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)


def create_exclusive(uri: str, data: bytes, storage: Storage) -> bool:
    """Write a file that must not exist yet; False if it does. Of many callers exactly one gets True.

    `data` must be unique to the caller: a put that is repeated after a lost answer finds its own object, and only
    the content tells it from another's.
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
    """Remove one file; one that is not there is fine."""
    with faults(uri):
        if is_s3(uri):
            _s3().delete(_key(uri), storage)
            return
        with suppress(FileNotFoundError):
            os.unlink(_path(uri))


def list_files(uri: str, storage: Storage, *, recursive: bool = True, missing_ok: bool = False) -> list[Entry]:
    """All files under a folder, by name; an empty list when there are none. Folder markers are left out.

    A local folder that does not exist is an error unless `missing_ok`; S3 knows no folders, only names.
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
    """The numbers of the files `uri/N.json`, in order; none where there is no such folder."""
    names = (entry.uri.rsplit("/", 1)[-1] for entry in list_files(uri, storage, missing_ok=True))
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def _s3() -> Any:
    """`pipeline.storage.s3`, imported late: its libraries load slowly, and local files do not need them."""
    from pipeline.storage import s3

    return s3


def _key(uri: str) -> str:
    """`bucket/key`."""
    path = uri.removeprefix("s3://")
    bucket = path.partition("/")[0]
    if "@" in bucket:  # what stands before it may be a secret: it is not repeated
        raise StorageError(
            "InvalidUri",
            "expected s3://bucket/key, got a name with credentials in it; take them out and set "
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
            if os.path.isfile(path):  # no sockets, no dangling links
                yield _entry_of_path(path, path)


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A complete, synced temporary file in the folder of `path`, removed at the end unless it was renamed."""
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
