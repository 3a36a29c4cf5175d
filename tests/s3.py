"""An S3 server on loopback for tests, with a bucket and credentials that mean nothing."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

from pipeline.config import Storage

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-repeat",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def server(bucket: str = "videos") -> Iterator[Storage]:
    """The configuration that reaches a server with `bucket`; servers of one process share what they hold."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    try:
        with mock.patch.dict(os.environ, CREDENTIALS):
            os.environ.pop("AWS_PROFILE", None)
            boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
            yield Storage(endpoint_url=f"http://{host}:{port}", region="us-east-1", max_attempts=1, timeout_s=10)
    finally:
        moto.stop()
