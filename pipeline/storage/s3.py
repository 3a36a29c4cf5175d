"""S3 requests for `files.py`: each is attempted up to `storage.max_attempts` times, its response body included.

The libraries' own retries are off: they do not cover truncated bodies, and they multiply with each other and with
timeouts. Here an unresponsive server costs at most `max_attempts` × `timeout_s`, plus pauses. Paths are `bucket/key`.
Errors are those of s3fs, botocore and the operating system; `storage.errors.faults` translates them.
"""

import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto
import botocore.parsers
import s3fs
from fsspec.asyn import sync
from fsspec.spec import AbstractBufferedFile

from pipeline.config import Storage
from pipeline.storage.errors import StorageError, client_error, error_code

_PAUSE_S = 0.5  # before the second attempt; doubles with each one, times a random factor of 0.5 to 1
_LONGEST_PAUSE_S = 20.0
_PASSING_CODES = {"SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException"}
_CONFLICT_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}  # another write of this key is in progress
_CUT = (aiohttp.ClientError, botocore.parsers.ResponseParserError, boto.IncompleteReadError)

T = TypeVar("T")


@functools.cache
def connect(storage: Storage) -> Any:
    """The s3fs file system for `storage`; one per process."""
    checksums = "when_required" if storage.endpoint_url else "when_supported"
    fs = s3fs.S3FileSystem(
        anon=storage.anonymous,
        endpoint_url=storage.endpoint_url,
        client_kwargs={"region_name": storage.region} if storage.region else {},
        config_kwargs={
            "s3": {
                "addressing_style": "path" if storage.path_style else "auto"
            },  # auto means path for a custom endpoint
            "retries": {"total_max_attempts": 1},
            "connect_timeout": storage.timeout_s,
            "read_timeout": storage.timeout_s,
            # Servers other than AWS reject or miscompute the newer checksums.
            "request_checksum_calculation": checksums,
            "response_checksum_validation": checksums,
        },
        use_listings_cache=False,  # another worker may have written since
        skip_instance_cache=True,
    )
    fs.retries = 1
    return fs


def patiently(storage: Storage, ask: Callable[[], T]) -> T:
    """Call `ask` and return its result; retry on transient errors: 5xx, throttling, timeouts, truncated responses."""
    attempt = 1
    while True:
        try:
            return ask()
        except Exception as error:
            if attempt == storage.max_attempts or not _passes(error):
                if isinstance(error, _CUT):
                    raise ConnectionError(f"the response was truncated: {error or type(error).__name__}") from error
                raise
        time.sleep(random.uniform(0.5, 1.0) * min(_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
        attempt += 1


def info(path: str, storage: Storage) -> dict[str, Any]:
    """The s3fs info dictionary of an object or folder."""
    fs = connect(storage)
    found: dict[str, Any] = patiently(storage, lambda: fs.info(path))
    return found


def get(path: str, storage: Storage, *, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
    """An object's bytes, or those from `span[0]` to before `span[1]`. Raises if its etag is not `etag`."""
    fs, request = connect(storage), _object(path)
    if etag is not None:
        request["IfMatch"] = f'"{etag}"'
    if span is not None:
        request["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    wanted = None if span is None else span[1] - span[0]
    data: bytes = patiently(storage, lambda: sync(fs.loop, _get, fs, request, etag, wanted))
    return data


async def _get(fs: Any, request: dict[str, Any], etag: str | None, wanted: int | None) -> bytes:
    answer = await fs._call_s3("get_object", **request)
    async with answer["Body"] as body:
        data = bytes(await body.read())
    if etag is not None and answer["ETag"].strip('"') != etag:  # the server ignores If-Match
        raise StorageError(
            "Changed", f"the object changed while it was read: s3://{request['Bucket']}/{request['Key']}"
        )
    if wanted is not None and len(data) != wanted:
        raise ConnectionError(f"the response was truncated: expected {wanted} bytes, got {len(data)}")
    return data


class ObjectFile(AbstractBufferedFile):
    """One version of an object, read by range; `size` and `etag` come from its listing or lookup."""

    def __init__(self, path: str, storage: Storage, *, size: int, etag: str, **caching: Any) -> None:
        self._storage, self._etag = storage, etag
        super().__init__(connect(storage), path, "rb", size=size, **caching)

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        return get(self.path, self._storage, etag=self._etag, span=(start, end)) if end > start else b""


def put(path: str, data: bytes, storage: Storage) -> None:
    """Write an object atomically."""
    fs = connect(storage)
    patiently(storage, lambda: fs.pipe_file(path, data))


def put_new(path: str, data: bytes, storage: Storage) -> bool:
    """Write an object if none exists; False if one does, unless it equals `data`: then an earlier attempt wrote it."""
    fs, request = connect(storage), _object(path)
    try:
        patiently(storage, lambda: fs.call_s3("put_object", Body=data, IfNoneMatch="*", **request))
    except OSError as error:
        # s3fs raises FileExistsError or a plain OSError for PreconditionFailed, depending on the server's message.
        if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
            return get(path, storage) == data
        raise
    return True


def delete(path: str, storage: Storage) -> None:
    """Delete an object, if it exists."""
    fs, request = connect(storage), _object(path)
    patiently(storage, lambda: fs.call_s3("delete_object", **request))


def list_objects(path: str, storage: Storage, *, recursive: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(path, description)` of the objects in a folder, in the server's order."""
    fs = connect(storage)
    bucket, _, key = path.partition("/")
    request = {"Bucket": bucket, "Prefix": key and f"{key.rstrip('/')}/", "Delimiter": "" if recursive else "/"}
    while True:
        page = patiently(storage, lambda: fs.call_s3("list_objects_v2", **request))
        for found in page.get("Contents", []):
            yield f"{bucket}/{found['Key']}", found
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _object(path: str) -> dict[str, Any]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def _passes(error: Exception) -> bool:
    if (refused := client_error(error)) is not None:
        status = refused.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error_code(error) in _PASSING_CODES | _CONFLICT_CODES
    if isinstance(error, boto.SSLError):
        return False
    silence = (boto.HTTPClientError, boto.ConnectionError, boto.CredentialRetrievalError, ConnectionError, TimeoutError)
    return isinstance(error, (*silence, *_CUT))
