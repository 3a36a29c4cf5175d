"""Files behind one kind of name: a local path, `file://…`, or `s3://bucket/key` on AWS or a compatible server.

Every function takes the URI and the `Storage` section of the configuration. Credentials come from the usual AWS
chain (environment, profile, role) and appear in no message. What goes wrong is raised as `StorageError` in one line.
"""

import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import botocore.exceptions as boto
import fsspec
import pyarrow.fs

from pipeline.config import Storage
from pipeline.storage_errors import StorageError, error_code, faults

_CONFLICT_TRIES = 5  # conditional puts that meet another one in flight (HTTP 409)


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


def filesystem(uri: str, storage: Storage) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system behind `uri` (one per process and configuration) and the path in it."""
    if is_s3(uri):
        return _s3(storage), _key(uri)
    return _local(), os.path.abspath(local_path(uri))


def arrow_filesystem(uri: str, storage: Storage) -> tuple[pyarrow.fs.FileSystem, str]:
    """The same for pyarrow, which Ray reads and writes Parquet with; pickles to other machines."""
    if is_s3(uri):
        key = _key(uri)
        with faults(uri):
            return _arrow_s3(storage, key.partition("/")[0]), key
    return pyarrow.fs.LocalFileSystem(), os.path.abspath(local_path(uri))


def stat(uri: str, storage: Storage) -> Entry:
    """One file's size and etag, now."""
    fs, path = filesystem(uri, storage)
    with faults(uri):
        info = fs.info(path)
        if info["type"] == "directory":
            raise StorageError("NotAFile", f"expected a file, got a folder: {uri}")
        return _entry(uri, info)


def exists(uri: str, storage: Storage) -> bool:
    """Whether there is a file or a folder; an unreachable server or a missing bucket is an error, not a no."""
    fs, path = filesystem(uri, storage)
    with faults(uri):
        try:
            fs.info(path)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, boto.ClientError) and error_code(error) == "NoSuchBucket":
                raise
            return False
    return True


def is_folder(uri: str, storage: Storage) -> bool:
    """Whether `uri` is a folder; a URI that names nothing is an error."""
    fs, path = filesystem(uri, storage)
    with faults(uri):
        return bool(fs.info(path)["type"] == "directory")


def read_bytes(uri: str, storage: Storage) -> bytes:
    fs, path = filesystem(uri, storage)
    with faults(uri):
        return bytes(fs.cat_file(path))


def write_bytes_atomic(uri: str, data: bytes, storage: Storage) -> None:
    """Readers see the old content or the new, never a part; folders are made as needed."""
    fs, path = filesystem(uri, storage)
    with faults(uri):
        if is_s3(uri):
            fs.pipe_file(path, data)
            return
        with _written_beside(Path(path), data) as temporary:
            os.replace(temporary, path)


def create_exclusive(uri: str, data: bytes, storage: Storage) -> bool:
    """Write a file that must not exist yet; False if it does. Of many callers exactly one gets True.

    `data` must be unique to the caller: a put that is repeated after a lost answer finds its own object, and only
    the content tells it from another's.
    """
    fs, path = filesystem(uri, storage)
    with faults(uri):
        if is_s3(uri):
            return _put_new(fs, path, data)
        with _written_beside(Path(path), data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True


def delete(uri: str, storage: Storage) -> None:
    """Remove one file; one that is not there is fine."""
    fs, path = filesystem(uri, storage)
    with faults(uri):
        if is_s3(uri):
            bucket, _, key = path.partition("/")
            fs.call_s3("delete_object", Bucket=bucket, Key=key)
            return
        with suppress(FileNotFoundError):
            os.unlink(path)


def list_files(uri: str, storage: Storage, *, recursive: bool = True, missing_ok: bool = False) -> list[Entry]:
    """All files under a folder, by name; an empty list when there are none. Folder markers are left out.

    A local folder that does not exist is an error unless `missing_ok`; S3 knows no folders, only names.
    """
    fs, path = filesystem(uri, storage)
    with faults(uri):
        if is_s3(uri):
            found = fs.find(path, detail=True, maxdepth=None if recursive else 1)
            return sorted(
                (_entry(f"s3://{name}", info) for name, info in found.items() if not name.endswith("/")),
                key=lambda entry: entry.uri,
            )
        if missing_ok and not os.path.lexists(path):
            return []
        if not os.path.isdir(path):
            raise StorageError("NotFound", f"no such folder: {uri}")
        return sorted(_walk(path, recursive), key=lambda entry: entry.uri)


def _key(uri: str) -> str:
    key = uri.removeprefix("s3://")
    if not key.partition("/")[0]:
        raise StorageError("InvalidUri", f"expected s3://bucket/key, got {uri!r}")
    return key


def _entry(uri: str, info: dict[str, Any]) -> Entry:
    if is_s3(uri):
        return Entry(uri, int(info["size"]), str(info["ETag"]).strip('"'))
    found = os.stat(info["name"])
    return Entry(uri, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


def _walk(root: str, recursive: bool) -> Iterator[Entry]:
    for folder, folders, names in os.walk(root):
        if not recursive:
            folders.clear()
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):  # no sockets, no dangling links
                yield _entry(path, {"name": path})


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


def _put_new(fs: Any, path: str, data: bytes) -> bool:
    bucket, _, key = path.partition("/")
    for attempt in range(_CONFLICT_TRIES):
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except OSError as error:
            # moto and AWS answer PreconditionFailed, which s3fs makes FileExistsError or a plain OSError.
            if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
                return bool(fs.cat_file(path) == data)
            if error_code(error) not in ("ConditionalRequestConflict", "409") or attempt == _CONFLICT_TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    return False


@functools.cache
def _local() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("file")


@functools.cache
def _s3(storage: Storage) -> Any:
    import s3fs  # half of this module's import time, and local files do without

    checksums = "when_required" if storage.endpoint_url else "when_supported"
    _endpoint(storage)
    fs = s3fs.S3FileSystem(
        anon=storage.anonymous,
        endpoint_url=storage.endpoint_url,
        client_kwargs={"region_name": storage.region} if storage.region else {},
        config_kwargs={
            "s3": {"addressing_style": "path" if storage.path_style else "auto"},  # auto with an endpoint: path
            "retries": {"total_max_attempts": storage.max_attempts, "mode": "standard"},
            "connect_timeout": storage.timeout_s,
            "read_timeout": storage.timeout_s,
            # Servers other than AWS reject or miscompute the newer checksums.
            "request_checksum_calculation": checksums,
            "response_checksum_validation": checksums,
        },
        use_listings_cache=False,  # another worker may just have written
        skip_instance_cache=True,
    )
    fs.retries = min(2, storage.max_attempts)  # for bodies cut short; requests are retried inside botocore
    return fs


def _endpoint(storage: Storage) -> tuple[str, str]:
    """Scheme and host of the configured server; empty for AWS."""
    parts = urlsplit(storage.endpoint_url or "")
    if storage.endpoint_url and not (parts.scheme in ("http", "https") and parts.netloc):
        raise StorageError(
            "InvalidUri", f"expected storage.endpoint_url as http(s)://host, got {storage.endpoint_url!r}"
        )
    return parts.scheme, parts.netloc + parts.path.rstrip("/")


class _ArrowS3(pyarrow.fs.S3FileSystem):
    """pyarrow's S3 that is built anew, environment included, in the process it is unpickled in."""

    _made: tuple[Callable[..., Any], tuple[Any, ...]]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._made


def _arrow_s3(storage: Storage, bucket: str) -> pyarrow.fs.S3FileSystem:
    options: dict[str, Any] = {}
    region = storage.region
    if storage.endpoint_url:
        # The C++ SDK takes this from the environment only; see _s3 for the reason.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        options["scheme"], options["endpoint_override"] = _endpoint(storage)
    elif region is None and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        with suppress(OSError):
            region = pyarrow.fs.resolve_s3_region(bucket)
    fs = _ArrowS3(
        anonymous=storage.anonymous,
        region=region,
        connect_timeout=storage.timeout_s,
        request_timeout=storage.timeout_s,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=storage.max_attempts),
        **options,
    )
    fs._made = (_arrow_s3, (storage, bucket))
    return fs
