"""Tests of access: certificates are verified, and credentials come from the AWS chain only."""

import datetime
import ipaddress
import json
import pickle

import pyarrow.fs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.config import Storage, load_config
from pipeline.errors import ConfigError
from pipeline.storage import files as st
from tests.faults import proxy
from tests.s3 import CREDENTIALS, server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a self-signed certificate for 127.0.0.1, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "storage of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + signed.public_bytes(pem))
    (path.parent / "authority.pem").write_bytes(signed.public_bytes(pem))
    return path


@pytest.fixture(scope="module")
def encrypted(certificate):
    """A TLS server with one object."""
    with server("videos") as plain, proxy(plain.endpoint_url, certificate=certificate) as front:
        st.write_bytes_atomic("s3://videos/x", b"content", plain)
        yield Storage(endpoint_url=front.endpoint_url, region="us-east-1", max_attempts=3, timeout_s=10)


def _arrow(storage):
    filesystem, path = st.arrow_filesystem("s3://videos/x", storage)
    with st.faults("s3://videos/x"), pickle.loads(pickle.dumps(filesystem)).open_input_stream(path) as stream:
        return stream.read()


def test_a_server_of_ones_own_authority_is_trusted_by_its_bundle(encrypted, certificate, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.with_name("authority.pem")))
    storage = encrypted.model_copy(update={"timeout_s": 11.0})  # another configuration, another connection
    assert st.read_bytes("s3://videos/x", storage) == b"content"
    assert _arrow(storage) == b"content"


def test_a_server_of_an_unknown_authority_is_refused_at_once(encrypted, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with pytest.raises(st.StorageError, match="AWS_CA_BUNDLE") as caught:
        st.read_bytes("s3://videos/x", encrypted)
    assert caught.value.kind == "Unreachable"
    with pytest.raises(st.StorageError, match=r"SSL|certificate") as caught:
        _arrow(encrypted)
    assert caught.value.kind == "Unreachable"


def test_a_server_is_encrypted_unless_its_address_says_otherwise():
    assert Storage().endpoint_url is None  # AWS
    for address in (
        "storage.example",
        "storage.example:9000",
        "//storage.example",
        "https://",
        "ftp://storage.example",
    ):
        with pytest.raises(ConfigError, match="expected https://"):
            _configured(address)
    assert _configured("http://storage.example:9000").storage.endpoint_url == "http://storage.example:9000"


def _configured(endpoint):
    return load_config(None, ["source.uri=a", "sink.uri=b", f"storage.endpoint_url='{endpoint}'"])


@pytest.mark.parametrize("endpoint", ["https://user:hidden@host", "https://hidden@host:9000", "user:hidden@host"])
def test_an_endpoint_with_a_password_is_refused_without_repeating_it(endpoint):
    with pytest.raises(ConfigError, match="user or password") as caught:
        _configured(endpoint)
    assert "hidden" not in str(caught.value)


def test_a_name_with_credentials_is_refused_without_repeating_them():
    for ask in (st.read_bytes, st.list_files, st.arrow_filesystem):
        with pytest.raises(st.StorageError, match="credentials") as caught:
            ask("s3://user:hidden@videos/x", Storage())
        assert caught.value.kind == "InvalidUri"
        assert "hidden" not in str(caught.value)


def test_credentials_are_no_part_of_what_is_kept_or_sent(encrypted):
    job = load_config(None, ["source.uri=s3://videos", "sink.uri=s3://out", "storage.region=us-east-1"])
    filesystem, _ = st.arrow_filesystem("s3://videos/x", encrypted)
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem)
    for kept in (job.to_yaml().encode(), json.dumps(job.model_dump(mode="json")).encode(), pickle.dumps(filesystem)):
        assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in kept
