"""Builds pyarrow's S3 file system, used by Ray Data for Parquet, with the settings of `pipeline.storage.s3`."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs

from pipeline.config import Storage


class _ArrowS3(pyarrow.fs.S3FileSystem):
    """An S3 file system that unpickling rebuilds with the environment of the new process."""

    _made: tuple[Callable[..., Any], tuple[Any, ...]]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._made


def arrow_s3(storage: Storage, bucket: str) -> pyarrow.fs.S3FileSystem:
    """The file system for `storage`; credentials and CA bundle come from the current process's environment."""
    options: dict[str, Any] = {}
    region = storage.region
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = bundle  # the C++ SDK does not read this variable
    if storage.endpoint_url:
        # The C++ SDK reads this from the environment only; pipeline.storage.s3.connect gives the reason.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        parts = urlsplit(storage.endpoint_url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
    elif region is None and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        with suppress(OSError):
            region = pyarrow.fs.resolve_s3_region(bucket)
    fs = _ArrowS3(
        anonymous=storage.anonymous,
        region=region,
        connect_timeout=storage.timeout_s,
        request_timeout=storage.timeout_s,
        # Writes small files in one request: if the response is lost, completing a multipart upload cannot be retried.
        allow_delayed_open=True,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=storage.max_attempts),
        **options,
    )
    fs._made = (arrow_s3, (storage, bucket))
    return fs
