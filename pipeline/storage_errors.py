"""What storage can refuse, in one line each, whichever library said it."""

from collections.abc import Iterator
from contextlib import contextmanager

import botocore.exceptions as boto

from pipeline.errors import SourceError


class StorageError(SourceError):
    """Storage refused. `kind`: NotFound | NotAFile | AccessDenied | Credentials | Unreachable |
    Changed | InvalidUri | Storage."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def faults(uri: str) -> Iterator[None]:
    """Whatever storage libraries raise inside becomes a `StorageError` that names `uri`."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, boto.BotoCoreError, boto.ClientError) as error:
        raise _fault(uri, error) from error


def _fault(uri: str, error: Exception) -> StorageError:
    detail = " ".join(str(error).split())
    code = error_code(error)
    match error:
        case FileNotFoundError() if code == "NoSuchBucket":
            return StorageError("NotFound", f"no such bucket: {uri}")
        case FileNotFoundError() | NotADirectoryError():
            return StorageError("NotFound", f"no such file: {uri}")
        case IsADirectoryError():
            return StorageError("NotAFile", f"expected a file, got a folder: {uri}")
        case OSError() if type(error).__name__ == "FileExpired" or code in ("PreconditionFailed", "412"):
            return StorageError("Changed", f"the object changed while it was read: {uri}")
        case PermissionError():
            hint = "check the credentials and the policy" if uri.startswith("s3://") else "check the permissions"
            return StorageError("AccessDenied", f"access denied: {uri} ({detail}); {hint}")
        case (
            boto.NoCredentialsError()
            | boto.PartialCredentialsError()
            | boto.CredentialRetrievalError()
            | boto.ProfileNotFound()
        ):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, or storage.anonymous"
            return StorageError("Credentials", f"no usable credentials for {uri} ({detail}); {hint}")
        case boto.ConnectionError() | boto.HTTPClientError() | TimeoutError() | ConnectionError():
            hint = "check storage.endpoint_url, storage.region and the network"
            return StorageError("Unreachable", f"cannot reach the storage of {uri} ({detail}); {hint}")
        case boto.ParamValidationError() | boto.InvalidRegionError():
            return StorageError("InvalidUri", f"cannot be asked for: {uri} ({detail})")
    return StorageError("Storage", f"{uri}: {detail or type(error).__name__}")


def error_code(error: BaseException) -> str:
    """The S3 error code behind `error`; s3fs keeps the original as its cause."""
    for one in (error, error.__cause__):
        if isinstance(one, boto.ClientError):
            return str(one.response.get("Error", {}).get("Code", ""))
    return ""
