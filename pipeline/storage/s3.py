"""S3 for `files.py`: every request is tried up to `storage.max_attempts` times, with the body of its answer.

The libraries' own retries are off. They leave out bodies that are cut short, multiply with each other, and give an
attempt that waits for a timeout a second and third round; here `max_attempts` × `timeout_s` is what silence costs.
Paths are `bucket/key`. Errors are those of s3fs, botocore and the operating system: `storage_errors.faults` names them.
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

_PAUSE_S = 0.5  # before the second attempt; doubles, and a random half of it is left out
_LONGEST_PAUSE_S = 20.0
_PASSING_CODES = {"SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException"}
_CONFLICT_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}  # another write of this key is under way
_CUT = (aiohttp.ClientError, botocore.parsers.ResponseParserError, boto.IncompleteReadError)

T = TypeVar("T")


@functools.cache
def connect(storage: Storage) -> Any:
    """The s3fs file system of a configuration; one per process."""
    checksums = "when_required" if storage.endpoint_url else "when_supported"
    fs = s3fs.S3FileSystem(
        anon=storage.anonymous,
        endpoint_url=storage.endpoint_url,
        client_kwargs={"region_name": storage.region} if storage.region else {},
        config_kwargs={
            "s3": {"addressing_style": "path" if storage.path_style else "auto"},  # auto with an endpoint: path
            "retries": {"total_max_attempts": 1},
            "connect_timeout": storage.timeout_s,
            "read_timeout": storage.timeout_s,
            # Servers other than AWS reject or miscompute the newer checksums.
            "request_checksum_calculation": checksums,
            "response_checksum_validation": checksums,
        },
        use_listings_cache=False,  # another worker may just have written
        skip_instance_cache=True,
    )
    fs.retries = 1
    return fs


def patiently(storage: Storage, ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again while it fails in a way that passes: 5xx, throttling, silence, a cut answer."""
    attempt = 1
    while True:
        try:
            return ask()
        except Exception as error:
            if attempt == storage.max_attempts or not _passes(error):
                if isinstance(error, _CUT):
                    raise ConnectionError(f"the answer was cut short: {error or type(error).__name__}") from error
                raise
        time.sleep(random.uniform(0.5, 1.0) * min(_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
        attempt += 1


def info(path: str, storage: Storage) -> dict[str, Any]:
    """s3fs's description of an object or folder."""
    fs = connect(storage)
    found: dict[str, Any] = patiently(storage, lambda: fs.info(path))
    return found


def get(path: str, storage: Storage, *, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
    """An object, or its bytes `span[0]` to before `span[1]`: all of them, of the version `etag`, or an error."""
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
    if etag is not None and answer["ETag"].strip('"') != etag:  # a server that knows no If-Match
        raise StorageError(
            "Changed", f"the object changed while it was read: s3://{request['Bucket']}/{request['Key']}"
        )
    if wanted is not None and len(data) != wanted:
        raise ConnectionError(f"the answer was cut short: expected {wanted} bytes, got {len(data)}")
    return data


class ObjectFile(AbstractBufferedFile):
    """One version of an object, read by range; `size` and `etag` are what it was looked up with."""

    def __init__(self, path: str, storage: Storage, *, size: int, etag: str, **caching: Any) -> None:
        self._storage, self._etag = storage, etag
        super().__init__(connect(storage), path, "rb", size=size, **caching)

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        return get(self.path, self._storage, etag=self._etag, span=(start, end)) if end > start else b""


def put(path: str, data: bytes, storage: Storage) -> None:
    """Write an object; nobody sees a part of it."""
    fs = connect(storage)
    patiently(storage, lambda: fs.pipe_file(path, data))


def put_new(path: str, data: bytes, storage: Storage) -> bool:
    """Write an object that must not exist yet; False if it does, unless it holds `data`: then an answer was lost."""
    fs, request = connect(storage), _object(path)
    try:
        patiently(storage, lambda: fs.call_s3("put_object", Body=data, IfNoneMatch="*", **request))
    except OSError as error:
        # s3fs makes FileExistsError of PreconditionFailed, or a plain OSError: servers differ in what else they say.
        if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
            return get(path, storage) == data
        raise
    return True


def delete(path: str, storage: Storage) -> None:
    """Remove an object; one that is not there is fine."""
    fs, request = connect(storage), _object(path)
    patiently(storage, lambda: fs.call_s3("delete_object", **request))


def list_objects(path: str, storage: Storage, *, recursive: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(path, description)` of the objects in a folder, as the server orders them."""
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
