"""Turns the errors of s3fs, botocore, pyarrow and the operating system into one-line `StorageError`s."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import botocore.exceptions as boto

from pipeline.errors import SourceError

_ARROW = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during \w+ operation")
_ARROW_KINDS = {
    "NETWORK_CONNECTION": "Unreachable",
    "REQUEST_TIMEOUT": "Unreachable",
    "SLOW_DOWN": "Unavailable",
    "SERVICE_UNAVAILABLE": "Unavailable",
    "INTERNAL_FAILURE": "Unavailable",
    "THROTTLING": "Unavailable",
    "ACCESS_DENIED": "AccessDenied",
    "SIGNATURE_DOES_NOT_MATCH": "AccessDenied",
    "INVALID_ACCESS_KEY_ID": "AccessDenied",
    "NO_SUCH_KEY": "NotFound",
    "NO_SUCH_BUCKET": "NotFound",
    "RESOURCE_NOT_FOUND": "NotFound",
}


class StorageError(SourceError):
    """A storage operation failed.

    `kind`: NotFound | NotAFile | AccessDenied | Credentials | Unreachable (no response, or a truncated one) |
    Unavailable (5xx, throttling) | Changed | InvalidUri | Storage (anything else)
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def faults(uri: str) -> Iterator[None]:
    """Turn errors of the storage libraries within the block into a `StorageError` that names `uri`."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, boto.BotoCoreError, boto.ClientError) as error:
        raise _fault(uri, error) from error


def _fault(uri: str, error: Exception) -> StorageError:
    detail = " ".join(str(error).split()) or type(error).__name__
    code = error_code(error)
    refused = client_error(error)
    status = refused.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if refused else 0
    match error:
        case OSError() if found := _ARROW.search(detail):
            again = "Unavailable" if found[2] and found[2] >= "500" else "Storage"
            return StorageError(_ARROW_KINDS.get(found[1], again), f"{uri}: {detail}")
        case FileNotFoundError() if code == "NoSuchBucket":
            return StorageError("NotFound", f"no such bucket: {uri}")
        case FileNotFoundError() | NotADirectoryError():
            return StorageError("NotFound", f"no such file: {uri}")
        case IsADirectoryError():
            return StorageError("NotAFile", f"expected a file, got a folder: {uri}")
        case OSError() if code in ("PreconditionFailed", "412"):
            return StorageError("Changed", f"the object changed while it was read: {uri}")
        case PermissionError():
            hint = "check the credentials and the policy" if uri.startswith("s3://") else "check the permissions"
            return StorageError("AccessDenied", f"access denied: {uri} ({detail}); {hint}")
        case OSError() if status >= 500 or status == 429:
            hint = "the storage is overloaded or failing; try again later, or raise storage.max_attempts"
            said = f"HTTP {status}" if code.isdigit() else f"HTTP {status} {code}"
            return StorageError("Unavailable", f"temporarily refused: {uri} ({said}); {hint}")
        case (
            boto.NoCredentialsError()
            | boto.PartialCredentialsError()
            | boto.CredentialRetrievalError()
            | boto.ProfileNotFound()
        ):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, or storage.anonymous"
            return StorageError("Credentials", f"no usable credentials for {uri} ({detail}); {hint}")
        case boto.SSLError():
            hint = "set AWS_CA_BUNDLE to the certificate of its authority, or check storage.endpoint_url"
            return StorageError("Unreachable", f"TLS failed for the server of {uri} ({detail}); {hint}")
        case boto.ConnectionError() | boto.HTTPClientError() | TimeoutError() | ConnectionError():
            hint = "check storage.endpoint_url, storage.region and the network"
            return StorageError("Unreachable", f"cannot reach the storage of {uri} ({detail}); {hint}")
        case boto.ParamValidationError() | boto.InvalidRegionError():
            return StorageError("InvalidUri", f"not a valid S3 URI: {uri} ({detail})")
    return StorageError("Storage", f"{uri}: {detail}")


def client_error(error: BaseException) -> boto.ClientError | None:
    """The botocore ClientError in `error` or in its cause, where s3fs keeps it; None if there is none."""
    return next((one for one in (error, error.__cause__) if isinstance(one, boto.ClientError)), None)


def error_code(error: BaseException) -> str:
    """The S3 error code of `error`; empty if it has none."""
    refused = client_error(error)
    return str(refused.response.get("Error", {}).get("Code", "")) if refused else ""
